/* Sums of plan.h. The layouts are those of data/shard_write.c, data/dump/tap.c and infer/size.c;
 * tests/cli/test_plan.py compares every part with what a dump wrote and with the peak of its memory. */
#include "data/dump/plan.h"

#include <math.h>
#include <string.h>

#include "data/shard_write.h"
#include "infer/gpu_run.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

#define MIB (INT64_C(1) << 20)

/* Most chunks that one layer can vote for out of a pool of n: the smallest prefix, in descending order, whose
 * mass exceeds top_p is longest when all n are equal. One more for rounding. */
static int64_t most_votes(const lsa_dump_rule *r, int64_t n) {
    return lsa_min_i64(n, (int64_t)floor(r->top_p * (double)n) + 2);
}

/* Most chunks that all layers together can vote for, by how many are visible: grows up to `full` of them. */
typedef struct voted {
    int64_t full;
    double last, *below; /* value from `full` on; [full+1] sums over fewer visible chunks */
} voted;

static lsa_status voted_init(voted *v, const lsa_dump_load *l, lsa_err *err) {
    const int64_t n_csa = l->c->n_csa, all = n_csa * most_votes(&l->rule, l->rule.pool);
    v->full = lsa_max_i64(l->rule.pool, all);
    v->last = (double)all;
    const lsa_status st = LSA_NEW(v->below, v->full + 1, err);
    for (int64_t i = 0; st == LSA_OK && i < v->full; i++)
        v->below[i + 1] =
            v->below[i] + (double)lsa_min_i64(i, n_csa * most_votes(&l->rule, lsa_min_i64(i, l->rule.pool)));
    return st;
}

/* Over the tokens of a document: 4 see each number of chunks below the last one, 3 see none. */
static double most_voted(const voted *v, int64_t n) {
    const int64_t chunks = n / LSA_CHUNK, k = lsa_min_i64(chunks, v->full);
    const double at_end = chunks < v->full ? v->below[chunks + 1] - v->below[chunks] : v->last;
    return LSA_CHUNK * (v->below[k] + (double)(chunks - k) * v->last) +
           (double)(n - LSA_CHUNK * chunks + 1) * at_end;
}

/* Entries of dense rows of one layer: a mass of at least dense_min fits 1/dense_min times into 1. */
static double most_dense(const lsa_dump_rule *r, int64_t n) {
    if (r->dense_every == 0) return 0;
    const double every = (double)r->dense_every / LSA_CHUNK, rows = (double)(n / r->dense_every),
                 cap = r->dense_min > 0 ? floor(1.001 / r->dense_min) : (double)n,
                 k = fmin(rows, floor(cap / every)); /* rows that see fewer */
    return every * k * (k + 1) / 2 + (rows - k) * cap;
}

typedef struct parts {
    double disk[LSA_DISK_PARTS];
    double made; /* what sealing allocates */
} parts;

static int64_t keyed_layers(const lsa_dump_load *l) {
    int64_t n = 0;
    for (int32_t o = 0; o < l->c->n_csa; o++) n += l->rule.has_keys[o];
    return n;
}

static void add_document(parts *p, const lsa_dump_load *l, const voted *v, int64_t n) {
    const lsa_dump_rule *r = &l->rule;
    const double keyed = (double)keyed_layers(l), n_csa = l->c->n_csa;
    const double keys = (double)(n / LSA_CHUNK) * LSA_KEY_BYTES,
                 hidden = (double)(n / r->hidden_stride) * 2 * l->c->hidden, votes = most_voted(v, n),
                 dense = most_dense(r, n), picked = lsa_visible_sum(n, LSA_CHUNK, l->c->index_topk);
    p->disk[LSA_DISK_KEYS] += keys * keyed;
    p->disk[LSA_DISK_HIDDEN] += hidden * keyed + 8 * (double)(n / r->hidden_stride);
    p->disk[LSA_DISK_VOTES] += 5 * votes + 8 * (double)n;
    if (r->stats) p->disk[LSA_DISK_STATS] += n_csa * (8 * picked + 12 * (double)n);
    if (r->dense_every) p->disk[LSA_DISK_DENSE] += n_csa * (6 * dense + 18 * (double)(n / r->dense_every));
    p->disk[LSA_DISK_TABLES] += 128 + 12 * (double)n;
    p->made += (20 + 8 * (r->stats ? n_csa : 0)) * (double)n + 8 * (double)(n / r->hidden_stride);
    if (r->dense_every) p->made += 16 * n_csa * (double)(n / r->dense_every);
}

static double sum_of(const parts *p) {
    double s = 0;
    for (int i = 0; i < LSA_DISK_PARTS; i++) s += p->disk[i];
    return s;
}

/* What every shard has once: the last entries of the begin arrays, probe rows of its first document, HDF5's
 * own structures. */
static double per_shard(const lsa_dump_load *l, int64_t longest) {
    const double keyed = (double)keyed_layers(l), n_csa = l->c->n_csa;
    const double probe = 2 * keyed * 4 * (l->c->index_n_head * 129.0 + (double)(longest / LSA_CHUNK));
    return (1 + n_csa) * LSA_SHARD_HEAD_PER_LAYER + probe + 8 * (5 + 2 * n_csa);
}

/* Slots of tap.c for the longest document, and the arrays made of them. */
static double document_bytes(const lsa_dump_load *l, const parts *one, int64_t n) {
    const lsa_dump_rule *r = &l->rule;
    const double cap = (double)lsa_min_i64(l->c->index_topk, n / LSA_CHUNK + 1), rows = (double)n;
    double slots = rows * 8 * (double)lsa_ceil_div(r->pool, 64); /* votes, as bits */
    if (r->pool != l->c->index_topk) slots += rows * 4 * r->pool;
    if (r->pool == l->c->index_topk && !r->stats) slots += rows * 4 * cap; /* else they become the shard's */
    if (r->stats) slots += rows * 12;                                      /* how many were selected; begin */
    if (r->dense_every) slots += 32 * (double)(n / r->dense_every) + 6 * most_dense(r, n);
    return slots * l->c->n_csa + sum_of(one) + per_shard(l, n);
}

static void host_bytes(lsa_dump_plan *p, const lsa_dump_load *l, const parts *all, const parts *one) {
    const lsa_session_opts so = {.max_tokens = p->longest, .chunk = LSA_TAP_CHUNK};
    p->host[LSA_HOST_SEQUENCE] = lsa_session_bytes(l->c, &so, l->threads);
    p->host[LSA_HOST_DOCUMENT] = (int64_t)document_bytes(l, one, p->longest);
    /* sealing makes positions and begin arrays; the rest goes to the file from where it lies */
    const double open = fmin((double)l->shard_bytes, sum_of(all)),
                 made = all->made * fmin(1, (open + sum_of(one)) / fmax(sum_of(all), 1));
    p->host[LSA_HOST_SHARD] = (int64_t)(open + made);
    p->host[LSA_HOST_PROGRAM] = 8 * p->tokens + (64 + 40 * (int64_t)l->threads) * MIB;
    p->host_bytes = 0;
    for (int i = 0; i < LSA_HOST_PARTS; i++) p->host_bytes += p->host[i];
}

lsa_status lsa_dump_bytes(lsa_dump_plan *p, const lsa_dump_load *l, lsa_err *err) {
    lsa_status st = LSA_OK;
    parts all = {0}, one = {0};
    voted v = {0};
    LSA_TRY(voted_init(&v, l, err));
    p->documents = l->n;
    p->tokens = p->longest = p->disk_bytes = 0;
    for (int64_t i = 0; i < l->n; i++) {
        if (l->length[i] > (INT64_C(1) << 31) || !lsa_add_i64(p->tokens, l->length[i], &p->tokens))
            LSA_FAIL(LSA_E_ARG, "document %lld has %lld tokens; at most 2^31 are possible", (long long)i,
                     (long long)l->length[i]);
        p->longest = lsa_max_i64(p->longest, l->length[i]);
        add_document(&all, l, &v, l->length[i]);
    }
    add_document(&one, l, &v, p->longest);
    const double shards =
        fmin((double)l->n, floor(sum_of(&all) / (double)lsa_max_i64(l->shard_bytes, 1)) + 1);
    all.disk[LSA_DISK_TABLES] += shards * per_shard(l, p->longest);
    if (!(sum_of(&all) < 0x1p62))
        LSA_FAIL(LSA_E_ARG, "%lld tokens are more than any disk holds", (long long)p->tokens);
    for (int i = 0; i < LSA_DISK_PARTS; i++) p->disk_bytes += p->disk[i] = (int64_t)all.disk[i];
    host_bytes(p, l, &all, &one);
done:
    lsa_free(v.below);
    return st;
}

lsa_status lsa_dump_cost(lsa_dump_plan *p, const lsa_dump_load *l, lsa_err *err) {
    lsa_status st = LSA_OK;
    memset(p, 0, sizeof *p);
    LSA_TRY(lsa_teacher_measure(&p->teacher, l->c, err));
    LSA_TRY(lsa_engine_bytes(&p->host[LSA_HOST_WEIGHTS], l->c, err));
    LSA_TRY(lsa_dump_bytes(p, l, err));
    for (int64_t i = 0; i < l->n; i++) p->flops += lsa_teacher_flops(l->c, &p->teacher, l->length[i]);
done:
    return st;
}

/* Of a token, between two layers. */
static int64_t stream_bytes(const lsa_dump_load *l) {
    return (l->half_streams ? 2 : 4) * (int64_t)l->c->hc_mult * l->c->hidden;
}

/* What kernels/cuda/teacher/teacher.cu allocates for documents of n tokens, but for the statistics' slots. */
static int64_t gpu_state(const lsa_teacher_config *c, int64_t n) {
    const int64_t m = lsa_min_i64(n, LSA_GPU_RUN_CHUNK), D = c->head_dim, Di = c->index_head_dim,
                  heads = (int64_t)c->n_head * D, index = (int64_t)c->index_n_head * Di,
                  streams = (int64_t)c->hc_mult * c->hidden, chunks = n / LSA_CHUNK + 1,
                  logits = lsa_max_i64(lsa_min_i64(m * (chunks + 32), INT64_C(1) << 28), chunks + 32);
    const int64_t whole = n * (streams + 5 * D + 4 * Di) + chunks * (D + 2 * Di) + m * streams,
                  part = m * (c->q_rank + 2 * heads + 3 * index + heads +
                              2 * (int64_t)c->o_groups * c->o_rank + 3 * (int64_t)c->hidden + c->n_expert +
                              (int64_t)c->n_expert_tok * (c->moe_dim + c->hidden));
    return 4 * (whole + part + 2 * logits);
}

void lsa_dump_streamed_cost(lsa_dump_plan *p, const lsa_dump_load *l) {
    lsa_dump_streamed *s = &p->streamed;
    s->token_bytes = stream_bytes(l);
    s->wave_tokens = p->host_budget / s->token_bytes;
    s->gpu_bytes = p->teacher.largest_layer + 2 * (p->host[LSA_HOST_WEIGHTS] / lsa_max_i64(l->c->n_layer, 1));
    s->gpu_state = gpu_state(l->c, p->longest);
    s->gpu_bytes += s->gpu_state + 2 * 4 * (int64_t)l->c->vocab * l->c->hidden;
    s->passes = p->longest <= s->wave_tokens;
    int64_t wave = 0;
    for (int64_t i = 0; s->passes && i < l->n; i++) { /* documents whole, in order */
        if (wave + l->length[i] > s->wave_tokens) {
            s->passes++;
            wave = 0;
        }
        wave += l->length[i];
    }
    s->bus_bytes = (double)s->passes * (double)p->teacher.bytes +
                   2.0 * l->c->n_layer * (double)s->token_bytes * (double)p->tokens;
    s->flop_seconds = p->flops / LSA_PLAN_FLOPS;
    s->bus_seconds = s->bus_bytes / LSA_PLAN_BUS;
}

void lsa_dump_plan_streaming(lsa_dump_plan *p, const lsa_dump_load *l) {
    const lsa_teacher_config *c = l->c;
    const int64_t outside = 2 * 4 * (int64_t)c->vocab * c->hidden,
                  token = stream_bytes(l) + lsa_dump_flight_bytes(l, 1);
    p->host_bytes -= p->host[LSA_HOST_WEIGHTS] + p->host[LSA_HOST_SEQUENCE];
    p->host[LSA_HOST_WEIGHTS] = outside + 2 * p->teacher.largest_layer;
    p->host[LSA_HOST_SEQUENCE] = stream_bytes(l) * p->longest;
    p->host_bytes += p->host[LSA_HOST_WEIGHTS] + p->host[LSA_HOST_SEQUENCE];
    const int64_t left = lsa_max_i64(p->host_budget - p->host_bytes, 0) / 2;
    p->streamed.wave_tokens = lsa_max_i64(left / token, p->longest);
}

int64_t lsa_dump_flight_bytes(const lsa_dump_load *l, int64_t n) {
    const lsa_dump_rule *r = &l->rule;
    const int64_t labels = 5 * most_votes(r, r->pool),
                  entries = (r->stats ? 8 : 4) * (int64_t)l->c->index_topk;
    return n * l->c->n_csa * (labels + entries + lsa_ceil_div(r->pool, 8) + 200);
}

void lsa_dump_plan_beside(lsa_dump_plan *p, const lsa_dump_load *l) {
    const int64_t sealing = lsa_min_i64(LSA_DUMP_SEALING * l->shard_bytes, p->disk_bytes),
                  flying = lsa_min_i64(LSA_DUMP_IN_FLIGHT, 2 * p->disk_bytes);
    p->host[LSA_HOST_SHARD] += sealing;
    p->host[LSA_HOST_DOCUMENT] += flying;
    p->host_bytes += sealing + flying;
}
