/* See judge_teacher.h. NUMERIC: both sum in f32 in different orders, so a selection may differ where two
 * logits are closer than that; such tokens are counted, and few are allowed. */
#include "tests/testkit/judge_teacher.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/dump/tap.h"
#include "kernels/core/dtype.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"

typedef struct record { /* of one layer and token */
    int32_t n, *sel;
    float *logit, *mass, *hidden, window, sink;
} record;

typedef struct judge {
    const lsa_teacher_config *c;
    int64_t n_token;
    record *cpu, *gpu, *to; /* [n_csa, n_token]; to: where the taps write */
} judge;

static void keep(record *r, const judge *j, const lsa_tap_csa *t) {
    const size_t bytes = (size_t)t->n_sel * 4, width = (size_t)j->c->hidden * 4;
    *r = (record){t->n_sel,      malloc(bytes + 4), malloc(bytes + 4), malloc(bytes + 4),
                  malloc(width), t->window_mass,    t->sink_mass};
    if (!r->sel || !r->logit || !r->mass || !r->hidden) abort();
    memcpy(r->sel, t->sel, bytes);
    memcpy(r->logit, t->sel_logit, bytes);
    memcpy(r->mass, t->mass, bytes);
    memcpy(r->hidden, t->hidden, width);
}
static void drop(record *r) {
    free(r->sel);
    free(r->logit);
    free(r->mass);
    free(r->hidden);
}

static void on_csa(void *user, const lsa_tap_csa *t) {
    const judge *j = user;
    keep(&j->to[t->ord.v * j->n_token + t->position], j, t);
}

/* Differences of rows of numbers: the largest, the root mean square, rows apart by more than `step`. */
typedef struct spread {
    double most, squares, step;
    int64_t n, rows, rows_apart;
} spread;

static void differ(double *worst, const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= *worst)) *worst = d;
    }
}
static void differ_row(spread *x, const float *a, const float *b, int64_t n) {
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)a[i] - (double)b[i];
        if (!(fabs(d) <= worst)) worst = fabs(d);
        x->squares += d * d;
    }
    x->n += n;
    x->rows++;
    x->rows_apart += !(worst <= x->step);
    if (!(worst <= x->most)) x->most = worst;
}
static double rms(const spread *x) {
    return sqrt(x->squares / (double)lsa_max_i64(x->n, 1));
}

static lsa_status run_gpu(judge *j, spread *keys, spread *logits, lsa_ctx *ctx, const lsa_engine *e,
                          const lsa_session *s, const int32_t *token, const float *want, int64_t chunk,
                          lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_run *x = NULL;
    float *buf = NULL;
    const int64_t n = j->n_token, V = j->c->vocab;
    const lsa_taps taps = {.user = j, .csa = on_csa};
    lsa_gpu_doc doc = {.token = token, .n = n, .hidden_stride = 1, .taps = &taps};
    LSA_TRY(LSA_NEW(buf, chunk * V, err));
    LSA_TRY(lsa_gpu_run_create(&x, ctx, e, n, chunk, false, err));
    for (int32_t o = 0; o < j->c->n_csa; o++)
        LSA_TRY(LSA_NEW(doc.key[o], (n / LSA_CHUNK + 1) * j->c->index_head_dim, err));
    LSA_TRY(lsa_gpu_run_feed(x, &(lsa_gpu_doc *){&doc}, 1, NULL, NULL, err));
    LSA_TRY(lsa_gpu_run_drain(x, err));
    if (doc.left) LSA_FAIL(LSA_E_NUMERIC, "%lld layers never came", (long long)doc.left);
    for (int32_t o = 0; o < j->c->n_csa; o++) {
        int64_t all;
        const float *const theirs = lsa_session_keys(s, (lsa_csa_ord){o}, &all);
        for (int64_t i = 0; i < all; i++)
            differ_row(keys, doc.key[o] + i * j->c->index_head_dim, theirs + i * j->c->index_head_dim,
                       j->c->index_head_dim);
    }
    for (int64_t p = 0; p < n; p += chunk) {
        const int64_t m = lsa_min_i64(chunk, n - p);
        LSA_TRY(lsa_gpu_run_logits(x, p, m, buf, err));
        for (int64_t i = 0; i < m; i++) differ_row(logits, buf + i * V, want + (p + i) * V, V);
    }
done:
    lsa_gpu_run_destroy(x);
    for (int32_t o = 0; o < j->c->n_csa; o++) lsa_free(doc.key[o]);
    lsa_free(buf);
    return st;
}

typedef struct difference {
    const char *name;
    spread d;
    double rms, rows; /* bounds */
} difference;

static int judge_one(const difference *x) {
    const bool good =
        isfinite(x->d.most) && rms(&x->d) <= x->rms && (double)x->d.rows_apart <= x->rows * (double)x->d.rows;
    printf("  %-13s largest %.2g, rms %.2g, rows apart by more than %g: %lld of %lld%s\n", x->name, x->d.most,
           rms(&x->d), x->d.step, (long long)x->d.rows_apart, (long long)x->d.rows, good ? "" : ": FAILED");
    return !good;
}

/* Two orders of an f32 sum may fall on either side of a boundary: of two logits that are nearly equal, or,
 * with simulations, of a step of 1/8 (fp8) or 1/2 (fp4) of a number's binade; what reads that row carries it
 * on. The largest difference is then that of one such row, which says nothing; what a wrong kernel would
 * change is how many rows are apart and by how much in the mean. Bounds from an H100: without simulations 1
 * of 12,000 selections and 1 of 4,000 tokens apart, rms 3.1e-5, 8.5e-7, 3.6e-6, 3.3e-8, 4.4e-7 in the order
 * below; with them 97 of 6,000 selections, 3.6 %, 0.6 %, 11.5 %, 0 and 0.03 % of the rows, rms 2.1e-3,
 * 3.1e-3, 4.4e-3, 4.3e-6, 7.7e-5. */
static int compare(const judge *j, bool sim, const spread *keys, const spread *logits) {
    const int64_t rows = j->c->n_csa * j->n_token;
    int64_t other = 0;
    difference d[] = {{"logits", *logits, sim ? 0.01 : 1e-4, sim ? 0.1 : 0.002},
                      {"keys", *keys, sim ? 0.01 : 2e-5, sim ? 0.05 : 0.002},
                      {"native logits", {.step = sim ? 0.02 : 1e-4}, sim ? 0.015 : 3e-5, sim ? 0.25 : 0.002},
                      {"mass", {.step = sim ? 1e-3 : 1e-5}, sim ? 5e-5 : 2e-6, sim ? 0.02 : 0.002},
                      {"hidden", {.step = sim ? 1e-2 : 1e-4}, sim ? 3e-4 : 2e-5, sim ? 0.02 : 0.002}};
    for (int64_t i = 0; i < rows; i++) {
        const record *a = &j->cpu[i], *b = &j->gpu[i];
        differ_row(&d[4].d, a->hidden, b->hidden, j->c->hidden);
        if (a->n != b->n || memcmp(a->sel, b->sel, (size_t)a->n * 4)) {
            other++;
            continue;
        }
        differ_row(&d[2].d, a->logit, b->logit, a->n);
        differ_row(&d[3].d, a->mass, b->mass, a->n);
        differ_row(&d[3].d, &a->window, &b->window, 1);
        differ_row(&d[3].d, &a->sink, &b->sink, 1);
    }
    int bad = (double)other > (sim ? 0.05 : 0.001) * (double)rows;
    printf("%lld tokens%s: selections apart %lld of %lld%s\n", (long long)j->n_token,
           sim ? ", cache simulations" : "", (long long)other, (long long)rows, bad ? ": FAILED" : "");
    for (size_t i = 0; i < sizeof d / sizeof *d; i++) bad += judge_one(&d[i]);
    return bad;
}

int judge_teacher(lsa_ctx *ctx, const char *dir, int64_t n, int64_t chunk, bool sim) {
    lsa_status st = LSA_OK;
    lsa_err why = {0}, *const err = &why;
    lsa_engine *e = NULL;
    lsa_session *s = NULL;
    judge j = {.n_token = n};
    int32_t *token = NULL;
    float *logits = NULL;
    spread keys = {.step = sim ? 1e-2 : 1e-4}, next = {.step = sim ? 0.02 : 1e-3};
    int bad = 1;
    const lsa_engine_opts eo = {.sim_fp8_kv = sim, .sim_fp4_index = sim};
    lsa_rng rng = lsa_rng_make(11, 5);
    LSA_TRY(lsa_engine_open(&e, dir, &eo, err));
    j.c = lsa_engine_config(e);
    LSA_TRY(LSA_NEW(token, n, err));
    LSA_TRY(LSA_NEW(logits, n * j.c->vocab, err));
    LSA_TRY(LSA_NEW(j.cpu, j.c->n_csa * n, err));
    LSA_TRY(LSA_NEW(j.gpu, j.c->n_csa * n, err));
    for (int64_t i = 0; i < n; i++) token[i] = (int32_t)lsa_rng_below(&rng, (uint64_t)j.c->vocab);
    LSA_TRY(lsa_session_create(&s, e, &(lsa_session_opts){.max_tokens = n, .chunk = n}, err));
    const lsa_taps taps = {.user = &j, .csa = on_csa};
    j.to = j.cpu;
    LSA_TRY(lsa_session_forward(s, token, n, logits, false, &taps, err));
    j.to = j.gpu;
    LSA_TRY(run_gpu(&j, &keys, &next, ctx, e, s, token, logits, chunk, err));
    bad = compare(&j, sim, &keys, &next);
done:
    if (st != LSA_OK) printf("%s\n", why.msg);
    for (int64_t i = 0; j.cpu && j.gpu && i < j.c->n_csa * n; i++) {
        drop(&j.cpu[i]);
        drop(&j.gpu[i]);
    }
    lsa_free(j.cpu);
    lsa_free(j.gpu);
    lsa_free(token);
    lsa_free(logits);
    lsa_session_destroy(s);
    lsa_engine_close(e);
    return bad;
}

/* ---- a document's statistics ---- */

static double worst_f16(const uint16_t *a, const uint16_t *b, int64_t n) {
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        const float x = lsa_f16_to_f32(a[i]), y = lsa_f16_to_f32(b[i]);
        differ(&worst, &x, &y, 1);
    }
    return worst;
}

static bool same(const void *a, const void *b, int64_t bytes) {
    return bytes == 0 || memcmp(a, b, (size_t)bytes) == 0;
}

/* Votes and selections are the same; numbers differ by a step of their small formats. */
static int compare_documents(const lsa_doc_stats *a, const lsa_doc_stats *b, const lsa_teacher_config *c) {
    int bad = a->n_key != b->n_key || a->n_hidden != b->n_hidden || a->n_probe != 2 || b->n_probe != 2 ||
              a->n_probe_logit != b->n_probe_logit || a->labels.n_entry != b->labels.n_entry ||
              a->labels.n_entry == 0 || a->token_xxh64 != b->token_xxh64;
    if (bad) return 1;
    bad += !same(a->labels.begin, b->labels.begin, (a->n_token + 1) * 8) +
           !same(a->labels.chunk, b->labels.chunk, a->labels.n_entry * 4) +
           !same(a->labels.votes, b->labels.votes, a->labels.n_entry);
    double logit = 0, mass = 0, probe = 0;
    for (int32_t o = 0; o < c->n_csa; o++) {
        const lsa_csr *x = &a->stats[o], *y = &b->stats[o];
        int64_t other = 0;
        if (x->n_entry != y->n_entry) return 1;
        bad += !same(x->begin, y->begin, (a->n_token + 1) * 8) + !same(x->chunk, y->chunk, x->n_entry * 4);
        logit = fmax(logit, worst_f16(x->logit, y->logit, x->n_entry));
        mass = fmax(mass, worst_f16(x->mass, y->mass, x->n_entry));
        mass = fmax(mass, worst_f16(a->local_mass[o], b->local_mass[o], a->n_token));
        mass = fmax(mass, worst_f16(a->sink_mass[o], b->sink_mass[o], a->n_token));
        const lsa_csr *d = &a->dense[o], *f = &b->dense[o]; /* an entry at dense_min may be on either side */
        bad += d->n_row != f->n_row || d->n_row < 2 || d->n_entry != f->n_entry ||
               !same(d->chunk, f->chunk, d->n_entry * 4);
        if (d->n_entry == f->n_entry) mass = fmax(mass, worst_f16(d->mass, f->mass, d->n_entry));
        mass = fmax(mass, worst_f16(d->rest, f->rest, lsa_min_i64(d->n_row, f->n_row)));
        for (int64_t i = 0; i < a->n_hidden * c->hidden; i++) other += a->hidden[o][i] != b->hidden[o][i];
        for (int64_t i = 0; i < a->n_key * LSA_KEY_BYTES; i++) other += a->key[o][i] != b->key[o][i];
        bad += other * 50 > a->n_hidden * c->hidden + a->n_key * LSA_KEY_BYTES;
        differ(&probe, a->probe_logit[o], b->probe_logit[o], a->n_probe_logit);
        differ(&probe, a->probe_iq[o], b->probe_iq[o], 2 * c->index_n_head * 128);
        differ(&probe, a->probe_iw[o], b->probe_iw[o], 2 * c->index_n_head);
    }
    printf("a document: %lld votes, native logits %.2g, masses %.2g, probes %.2g%s\n",
           (long long)a->labels.n_entry, logit, mass, probe, bad ? ": FAILED" : "");
    return bad + !(logit <= 0.01 && mass <= 1e-3 && probe <= 1e-3);
}

int judge_dump(lsa_ctx *ctx, const char *dir, int64_t n) {
    lsa_status st = LSA_OK;
    lsa_err why = {0}, *const err = &why;
    lsa_engine *e = NULL;
    lsa_reader cpu = {0}, gpu = {0};
    lsa_doc_stats a = {0}, b = {0};
    int32_t *token = NULL;
    int bad = 1;
    lsa_rng rng = lsa_rng_make(12, 6);
    LSA_TRY(lsa_engine_open(&e, dir, NULL, err));
    const lsa_teacher_config *c = lsa_engine_config(e);
    lsa_dump_rule rule = {.top_p = 0.6,
                          .pool = c->index_topk,
                          .hidden_stride = 16,
                          .stats = true,
                          .dense_every = 16,
                          .dense_min = 1e-4};
    for (int32_t o = 0; o < c->n_csa; o++) rule.has_keys[o] = true;
    LSA_TRY(LSA_NEW(token, n, err));
    for (int64_t i = 0; i < n; i++) token[i] = (int32_t)lsa_rng_below(&rng, (uint64_t)c->vocab);
    const lsa_doc doc = {.name = "random", .token = token, .n_token = n};
    LSA_TRY(lsa_session_create(&cpu.session, e, &(lsa_session_opts){.max_tokens = n, .chunk = LSA_TAP_CHUNK},
                               err));
    LSA_TRY(lsa_gpu_run_create(&gpu.gpu, ctx, e, n, 0, false, err));
    LSA_TRY(lsa_reader_check(&gpu, c, &rule, err));
    LSA_TRY(lsa_tap_document(&a, &cpu, c, &rule, &doc, true, NULL, NULL, err));
    LSA_TRY(lsa_tap_document(&b, &gpu, c, &rule, &doc, true, NULL, NULL, err));
    bad = compare_documents(&a, &b, c);
done:
    if (st != LSA_OK) printf("%s\n", why.msg);
    lsa_doc_stats_fini(&a);
    lsa_doc_stats_fini(&b);
    lsa_free(token);
    lsa_session_destroy(cpu.session);
    lsa_gpu_run_destroy(gpu.gpu);
    lsa_engine_close(e);
    return bad;
}
