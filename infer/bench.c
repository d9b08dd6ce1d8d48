/* lsa-decode bench: cases, their rows, comparisons, and a pool of memory filled with requests. */
#include "infer/bench.h"

#include <stdio.h>
#include <string.h>

#include "infer/bench_check.h"
#include "kernels/core/clock.h"
#include "kernels/core/json.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/model/gpu_teacher.h"

enum { TAU = 64, REPLAYS = 7, CYCLES = 3, MEMORY_HEADS = 128, MEMORY_RANK = 2048, POOL_REQUESTS = 64 };
static const int64_t FLUSH = 256 << 20, PAGE = LSA_CHUNK * LSA_PAGE_CHUNKS;

typedef struct row { /* seconds, bytes */
    bool lsa;
    int64_t context;
    int32_t batch;
    int64_t pages, active, kv, rows, keys, keys_level1, hca, window, tables, work;
    double part[LSA_BATCH_PARTS], level1, swap, moved; /* of a cycle */
    lsa_bench_check check;
} row;

typedef struct bench {
    lsa_ctx *ctx;
    const lsa_bench_opts *o;
    lsa_gpu_batch_opts shape; /* of full attention */
    int32_t hidden, n_csa;
    lsa_gpu_retriever *memory;
    lsa_gpu_pages *host;
    LSA_VEC(row) row;
} bench;

/* ---- shapes ---- */

static lsa_gpu_batch_opts shape_of(const bench *x, bool lsa, int64_t context, int32_t batch) {
    lsa_gpu_batch_opts s = x->shape;
    const int64_t pages = context / PAGE;
    s.tokens = context, s.batch = batch;
    if (!lsa) {
        s.n_memory = 0;
        return s;
    }
    s.reserve = (int64_t)(x->o->budget * (double)pages + 1e-9);
    if (s.reserve < 2) s.reserve = pages < 2 ? pages : 2;
    s.staging = s.reserve == pages ? 0 : (s.reserve + 9) / 10;
    return s;
}

static void count(row *r, const lsa_gpu_batch *b, const lsa_gpu_batch_opts *s) {
    const lsa_gpu_batch_use *u = lsa_gpu_batch_count(b);
    r->pages = s->reserve ? s->reserve : s->tokens / PAGE;
    r->active = lsa_gpu_batch_resident(b);
    r->kv = lsa_gpu_batch_kv(u), r->rows = u->rows, r->keys = u->keys, r->keys_level1 = u->keys_level1;
    r->hca = u->hca, r->window = u->window, r->tables = u->tables, r->work = u->work;
}

/* The reference server's memory layers (10, 12 and 20 of 21), in a model of any number of CSA layers. */
static void memory_layers(lsa_gpu_batch_opts *s, int32_t n_csa) {
    const int32_t at[3] = {n_csa / 2, n_csa / 2 + 2, n_csa - 1};
    for (int i = 0; i < 3; i++)
        if (at[i] < n_csa && (s->n_memory == 0 || at[i] > s->memory[s->n_memory - 1]))
            s->memory[s->n_memory++] = at[i];
}

/* That level 1 has room for. */
static int32_t most_requests(const lsa_bench_opts *o) {
    const int64_t most = o->batch[o->n_batch - 1];
    return most > POOL_REQUESTS ? (int32_t)most : POOL_REQUESTS;
}

static lsa_status make_memory(bench *x, const lsa_teacher_config *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    float *params = NULL;
    lsa_indexer_geom g = {.hidden = c->hidden,
                          .n_head = MEMORY_HEADS,
                          .head_dim = 128,
                          .rank = MEMORY_RANK,
                          .eps = c->norm_eps,
                          .rope = c->rope_compress,
                          .n_layer = x->shape.n_memory};
    for (int32_t j = 0; j < g.n_layer; j++) {
        g.ord[j].v = x->shape.memory[j];
        g.id[j] = c->csa_id[x->shape.memory[j]];
    }
    LSA_TRY(LSA_NEW(params, lsa_indexer_n_param(&g), err));
    lsa_indexer_init_random(params, &g, 1);
    LSA_TRY(lsa_gpu_retriever_create(&x->memory, x->ctx, &g, params, LSA_PATH_FP8, most_requests(x->o),
                                     x->o->context[x->o->n_context - 1] / LSA_CHUNK, false, err));
done:
    lsa_free(params);
    return st;
}

/* ---- printing ---- */

static double us(double seconds) {
    return 1e6 * seconds;
}
static double level1_step(const row *r) {
    return r->level1 / TAU;
}

static void print_row(const bench *x, const row *r) {
    if (!x->o->json) {
        printf("%8lld %5d %-5s %9.1f %8.1f %8.1f %8.1f %8.1f %8.1f %8.1f %8.2f %8.1f %9.2f  %016llx\n",
               (long long)r->context, r->batch, r->lsa ? "lsa" : "full", (double)r->kv / r->batch / 1e6,
               us(r->part[LSA_BATCH_SCORE]), us(r->part[LSA_BATCH_TOPK]), us(r->part[LSA_BATCH_ATTEND]),
               us(r->part[LSA_BATCH_CSA]), us(r->part[LSA_BATCH_OTHER]), us(r->part[LSA_BATCH_STEP]),
               us(level1_step(r)), us(r->swap), r->moved / 1e6, (unsigned long long)r->check.checksum);
        fflush(stdout);
        return;
    }
    const double key_bytes = (double)(r->active * LSA_PAGE_CHUNKS * LSA_KEY_BYTES) * r->batch * x->n_csa;
    printf(
        "{\"case\": \"step\", \"mode\": \"%s\", \"context\": %lld, \"batch\": %d, \"reserve_pages\": %lld, "
        "\"resident_pages\": %lld, \"kv_bytes_per_request\": %.0f, \"rows_bytes\": %lld, \"keys_bytes\": "
        "%lld, \"level1_keys_bytes\": %lld, \"hca_bytes\": %lld, \"window_bytes\": %lld, \"table_bytes\": "
        "%lld, \"work_bytes\": %lld, \"score_us\": %.2f, \"topk_us\": %.2f, \"attend_us\": %.2f, "
        "\"csa_us\": %.2f, \"other_us\": %.2f, \"step_us\": %.2f, \"key_gb_per_s\": %.1f, \"level1_us\": "
        "%.2f, \"level1_us_per_step\": %.3f, \"swap_us\": %.1f, \"swap_bytes\": %.0f, \"logit_off\": %.2g, "
        "\"output_off\": %.2g, \"checksum\": \"%016llx\"}\n",
        r->lsa ? "lsa" : "full", (long long)r->context, r->batch, (long long)r->pages, (long long)r->active,
        (double)r->kv / r->batch, (long long)r->rows, (long long)r->keys, (long long)r->keys_level1,
        (long long)r->hca, (long long)r->window, (long long)r->tables, (long long)r->work,
        us(r->part[LSA_BATCH_SCORE]), us(r->part[LSA_BATCH_TOPK]), us(r->part[LSA_BATCH_ATTEND]),
        us(r->part[LSA_BATCH_CSA]), us(r->part[LSA_BATCH_OTHER]), us(r->part[LSA_BATCH_STEP]),
        key_bytes / (r->part[LSA_BATCH_SCORE] + 1e-12) / 1e9, us(r->level1), us(level1_step(r)), us(r->swap),
        r->moved, r->check.logit_off, r->check.out_off, (unsigned long long)r->check.checksum);
    fflush(stdout);
}

/* ---- a case ---- */

/* Level 1, swap-in and publication once. */
static lsa_status cycle(bench *x, lsa_gpu_batch *b, int32_t no, row *r, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int32_t *page, *n;
    int64_t ld, moved = 0;
    LSA_TRY(lsa_gpu_batch_level1(b, x->memory, x->hidden, no, &page, &ld, &n, &r->level1, err));
    LSA_TRY(lsa_gpu_batch_swap(b, x->host, page, ld, n, &moved, err));
    LSA_TRY(lsa_gpu_batch_publish(b, &r->swap, err));
    r->moved = (double)moved;
done:
    return st;
}

static lsa_status run_case(bench *x, bool lsa, int64_t context, int32_t batch, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_batch_opts s = shape_of(x, lsa, context, batch);
    lsa_gpu_batch *b = NULL;
    row r = {.lsa = lsa, .context = context, .batch = batch};
    LSA_TRY(lsa_gpu_batch_create(&b, x->ctx, &s, err));
    if (lsa)
        for (int32_t i = 0; i < 2; i++) LSA_TRY(cycle(x, b, i, &r, err)); /* the first warms up */
    LSA_TRY(lsa_bench_check_batch(&r.check, b, &s, err));                 /* of the swapped pages too */
    count(&r, b, &s);
    for (int p = 0; p < LSA_BATCH_PARTS; p++)
        LSA_TRY(lsa_gpu_batch_time(b, (lsa_gpu_batch_part)p, REPLAYS, FLUSH, &r.part[p], err));
    print_row(x, &r);
    LSA_TRY(LSA_VEC_RESERVE(x->row, x->row.len + 1, err));
    x->row.data[x->row.len++] = r;
done:
    lsa_gpu_batch_destroy(b);
    return st;
}

/* A case that does not fit is said and left out. */
static lsa_status try_case(bench *x, bool lsa, int64_t context, int32_t batch, lsa_err *err) {
    lsa_err local = {0};
    const lsa_status st = run_case(x, lsa, context, batch, &local);
    if (st == LSA_E_NOMEM) {
        if (x->o->json)
            printf(
                "{\"case\": \"step\", \"mode\": \"%s\", \"context\": %lld, \"batch\": %d, \"fits\": false}\n",
                lsa ? "lsa" : "full", (long long)context, batch);
        else
            printf("%8lld %5d %-5s does not fit\n", (long long)context, batch, lsa ? "lsa" : "full");
        return LSA_OK;
    }
    if (st != LSA_OK) LSA_RET_FAIL(st, "%s", local.msg);
    return LSA_OK;
}

static const row *find(const bench *x, bool lsa, int64_t context, int64_t batch) {
    for (int64_t i = 0; i < x->row.len; i++)
        if (x->row.data[i].lsa == lsa && x->row.data[i].context == context && x->row.data[i].batch == batch)
            return &x->row.data[i];
    return NULL;
}

/* ---- comparisons ---- */

static double with_level1(const row *r) {
    return r->part[LSA_BATCH_CSA] + level1_step(r);
}

static void compare(const bench *x) {
    for (int32_t i = 0; i < x->o->n_context; i++)
        for (int32_t j = 0; j < x->o->n_batch; j++) {
            const row *f = find(x, false, x->o->context[i], x->o->batch[j]),
                      *l = find(x, true, x->o->context[i], x->o->batch[j]);
            if (!f || !l) continue;
            const double bytes = (double)l->kv / (double)f->kv;
            if (x->o->json)
                printf(
                    "{\"case\": \"compare\", \"context\": %lld, \"batch\": %d, \"kv_share\": %.5f, "
                    "\"csa_times_faster\": %.3f, \"csa_with_level1_times_faster\": %.3f, "
                    "\"step_times_faster\": %.3f, \"level1_share\": %.4f, \"swap_share_of_cycle\": %.4f}\n",
                    (long long)f->context, f->batch, bytes, f->part[LSA_BATCH_CSA] / l->part[LSA_BATCH_CSA],
                    f->part[LSA_BATCH_CSA] / with_level1(l),
                    f->part[LSA_BATCH_STEP] / (l->part[LSA_BATCH_STEP] + level1_step(l)),
                    level1_step(l) / l->part[LSA_BATCH_CSA], l->swap / (TAU * l->part[LSA_BATCH_STEP]));
            else
                printf(
                    "%lld tokens, batch %d: %.2f %% of full's bytes; CSA layers %.2f times as fast, %.2f "
                    "with level 1 (%.1f %% of them), steps %.2f; copies take %.1f %% of a cycle beside it\n",
                    (long long)f->context, f->batch, 100 * bytes,
                    f->part[LSA_BATCH_CSA] / l->part[LSA_BATCH_CSA], f->part[LSA_BATCH_CSA] / with_level1(l),
                    100 * level1_step(l) / l->part[LSA_BATCH_CSA],
                    f->part[LSA_BATCH_STEP] / (l->part[LSA_BATCH_STEP] + level1_step(l)),
                    100 * l->swap / (TAU * l->part[LSA_BATCH_STEP]));
        }
}

/* The shortest context, at each batch, and the smallest batch, at each context, where LSA is faster. */
static void break_even(const bench *x) {
    for (int pass = 0; pass < 2; pass++) {
        const int32_t outer = pass ? x->o->n_context : x->o->n_batch,
                      inner = pass ? x->o->n_batch : x->o->n_context;
        for (int32_t a = 0; a < outer; a++) {
            int64_t found = -1;
            for (int32_t k = 0; k < inner && found < 0; k++) {
                const int64_t context = x->o->context[pass ? a : k], batch = x->o->batch[pass ? k : a];
                const row *f = find(x, false, context, batch), *l = find(x, true, context, batch);
                if (f && l && f->part[LSA_BATCH_STEP] > l->part[LSA_BATCH_STEP] + level1_step(l))
                    found = pass ? batch : context;
            }
            const long long at = (long long)(pass ? x->o->context[a] : x->o->batch[a]);
            if (x->o->json && found < 0)
                printf("{\"case\": \"break_even\", \"%s\": %lld, \"smallest_%s\": null}\n",
                       pass ? "context" : "batch", at, pass ? "batch" : "context");
            else if (x->o->json)
                printf("{\"case\": \"break_even\", \"%s\": %lld, \"smallest_%s\": %lld}\n",
                       pass ? "context" : "batch", at, pass ? "batch" : "context", (long long)found);
            else if (found < 0)
                printf("break-even: %s %lld: full is faster in every case that ran\n",
                       pass ? "context" : "batch", at);
            else
                printf("break-even: %s %lld: LSA is faster from %s %lld on\n", pass ? "context" : "batch", at,
                       pass ? "batch" : "context", (long long)found);
        }
    }
}

/* ---- a pool ---- */

/* Steps of a pool full of requests, with level 1, copies and publication beside them. */
static lsa_status run_pool(bench *x, bool lsa, double *tokens_per_s, int32_t *requests, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t context = x->o->context[x->o->n_context - 1], pool = (int64_t)(x->o->pool_gb * 1e9);
    const lsa_gpu_batch_opts one = shape_of(x, lsa, context, 1);
    lsa_gpu_batch *b = NULL;
    const int32_t *page, *n;
    int64_t ld, moved = 0, all_moved = 0;
    row r = {.lsa = lsa, .context = context};
    LSA_TRY(lsa_gpu_batch_create(&b, x->ctx, &one, err));
    if (lsa) LSA_TRY(lsa_gpu_batch_level1(b, x->memory, x->hidden, 0, &page, &ld, &n, NULL, err));
    count(&r, b, &one);
    lsa_gpu_batch_destroy(b);
    b = NULL;
    *requests = (int32_t)(pool / r.kv);
    if (*requests < 1)
        LSA_FAIL(LSA_E_ARG, "--pool-gb %.1f: one %s request needs %.2f GB", x->o->pool_gb,
                 lsa ? "LSA" : "full", (double)r.kv / 1e9);
    if (lsa && *requests > most_requests(x->o)) *requests = most_requests(x->o);
    const lsa_gpu_batch_opts s = shape_of(x, lsa, context, *requests);
    LSA_TRY(lsa_gpu_batch_create(&b, x->ctx, &s, err));
    if (lsa) LSA_TRY(lsa_gpu_batch_level1(b, x->memory, x->hidden, 0, &page, &ld, &n, NULL, err));
    LSA_TRY(lsa_gpu_batch_steps(b, TAU, NULL, err)); /* warm */
    LSA_TRY(lsa_ctx_sync(x->ctx, err));
    const double start = lsa_now_s();
    for (int32_t c = 0; c < CYCLES; c++) {
        LSA_TRY(lsa_gpu_batch_steps(b, TAU, NULL, err));
        if (!lsa) continue;
        LSA_TRY(lsa_gpu_batch_level1(b, x->memory, x->hidden, c + 1, &page, &ld, &n, NULL, err));
        LSA_TRY(lsa_gpu_batch_swap(b, x->host, page, ld, n, &moved, err));
        LSA_TRY(lsa_gpu_batch_publish(b, NULL, err));
        all_moved += moved;
    }
    LSA_TRY(lsa_ctx_sync(x->ctx, err));
    *tokens_per_s = (double)TAU * CYCLES * *requests / (lsa_now_s() - start);
    LSA_TRY(lsa_bench_check_batch(&r.check, b, &s, err));
    count(&r, b, &s);
    if (x->o->json)
        printf(
            "{\"case\": \"pool\", \"mode\": \"%s\", \"context\": %lld, \"pool_bytes\": %lld, \"requests\": "
            "%d, \"kv_bytes\": %lld, \"steps\": %d, \"tokens_per_s\": %.1f, \"swapped_bytes\": %lld, "
            "\"logit_off\": %.2g, \"output_off\": %.2g, \"checksum\": \"%016llx\"}\n",
            lsa ? "lsa" : "full", (long long)context, (long long)pool, *requests, (long long)r.kv,
            TAU * CYCLES, *tokens_per_s, (long long)all_moved, r.check.logit_off, r.check.out_off,
            (unsigned long long)r.check.checksum);
    else
        printf("a pool of %.1f GB at %lld tokens, %s: %d requests (%.2f GB), %.0f tokens/s of all over %d "
               "steps, %.2f GB swapped in  %016llx\n",
               x->o->pool_gb, (long long)context, lsa ? "lsa" : "full", *requests, (double)r.kv / 1e9,
               *tokens_per_s, TAU * CYCLES, (double)all_moved / 1e9, (unsigned long long)r.check.checksum);
    if (r.kv > pool)
        LSA_FAIL(LSA_E_BUG, "%lld bytes were allocated from a pool of %lld", (long long)r.kv,
                 (long long)pool);
done:
    lsa_gpu_batch_destroy(b);
    return st;
}

static lsa_status run_pools(bench *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    double rate[2];
    int32_t n[2];
    for (int lsa = 0; lsa < 2; lsa++) LSA_TRY(run_pool(x, lsa, &rate[lsa], &n[lsa], err));
    if (!x->o->json)
        printf("the same pool: %.1f times the requests, %.2f times the tokens/s\n", (double)n[1] / n[0],
               rate[1] / rate[0]);
done:
    return st;
}

static lsa_status begin(bench *x, const lsa_teacher_config *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_batch_opts *const s = &x->shape;
    s->n_layer = c->n_layer, s->n_head = c->n_head, s->head_dim = c->head_dim, s->rope_dim = c->rope_dim;
    s->window = c->window, s->index_n_head = c->index_n_head, s->index_head_dim = c->index_head_dim;
    s->top_k = c->index_topk;
    memcpy(s->ratio, c->ratio, sizeof s->ratio);
    x->hidden = c->hidden, x->n_csa = c->n_csa;
    memory_layers(s, c->n_csa);
    const lsa_gpu_batch_opts longest = shape_of(x, true, x->o->context[x->o->n_context - 1], 1);
    LSA_TRY(lsa_gpu_pages_create(&x->host, x->ctx, &longest, err));
    LSA_TRY(make_memory(x, c, err));
    lsa_info(
        "%s: %d layers, %d of them CSA; attention and indexers only, projections and experts are left "
        "out; every request has the same synthetic rows, in %.2f GB of pinned host memory that all share; "
        "budget %.3g of all chunks, a tenth of it staging; level 1 (%d layers, %d heads, rank %d) every %d "
        "steps; the L2 cache is emptied before each timed step",
        lsa_ctx_describe(x->ctx), c->n_layer, c->n_csa, (double)lsa_gpu_pages_bytes(x->host) / 1e9,
        x->o->budget, s->n_memory, MEMORY_HEADS, MEMORY_RANK, TAU);
    if (!x->o->json)
        printf("%8s %5s %-5s %9s %8s %8s %8s %8s %8s %8s %8s %8s %9s  %s\n", "context", "batch", "mode",
               "MB/req", "score", "top-k", "attend", "CSA", "other", "step", "level1/t", "swap", "swap MB",
               "checksum (times in us; swap of a cycle)");
done:
    return st;
}

lsa_status lsa_bench(lsa_ctx *ctx, const lsa_teacher_config *c, const lsa_bench_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    bench x = {.ctx = ctx, .o = o};
    if (lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA)
        LSA_FAIL(LSA_E_DEVICE, "bench measures a GPU: use --device cuda");
    LSA_TRY(begin(&x, c, err));
    for (int32_t i = 0; i < o->n_context; i++)
        for (int32_t j = 0; j < o->n_batch; j++)
            for (int lsa = 0; lsa < 2; lsa++)
                LSA_TRY(try_case(&x, lsa, o->context[i], (int32_t)o->batch[j], err));
    compare(&x);
    break_even(&x);
    if (o->pool_gb > 0) LSA_TRY(run_pools(&x, err));
done:
    lsa_gpu_retriever_destroy(x.memory);
    lsa_gpu_pages_destroy(x.host);
    lsa_free(x.row.data);
    return st;
}
