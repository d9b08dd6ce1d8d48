/* Speed of the server ABI on a GPU: one layer, 262,144 chunks (1 M tokens), 128 heads, rank 2048, inside a
 * CUDA graph, keys in pages and rotated through pools larger than the L2 cache. One JSON line a case; floors:
 * key bytes (132 a chunk) over the copy rate measured in the same run. Skipped (77) without a GPU. */
#include <stdio.h>
#include <stdlib.h>

#ifndef LSA_HAVE_CUDA
int main(void) {
    printf("skipped: built without CUDA\n");
    return 77;
}
#else
#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/hash.h"
#include "data/indexer_file.h"
#include "export/abi/lsa_indexer.h"
#include "kernels/core/file.h"
#include "tests/testkit/gen.h"

enum { CHUNKS = 262144, PAGES = CHUNKS / 64, POOLS = 4, IN_GRAPH = 8, REPEATS = 21, BATCH = 16, HEADS = 128 };
#define POOL_BYTES ((size_t)PAGES * 8448)

static lsa_err err;
static char text[LSA_IDX_ERROR];
static void ok(lsa_status st) {
    if (st == LSA_OK) return;
    fprintf(stderr, "%s\n", err.msg);
    exit(1);
}
static void idx(int code) {
    if (code == LSA_IDX_OK) return;
    fprintf(stderr, "%s\n", text);
    exit(1);
}
static void cu(cudaError_t e) {
    if (e == cudaSuccess) return;
    fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(e));
    exit(1);
}
static void *device(const void *host, size_t bytes) {
    void *p = NULL;
    cu(cudaMalloc(&p, bytes));
    if (host) cu(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    return p;
}
static int ascending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

typedef struct bench {
    cudaStream_t s;
    lsa_idx *x;
    uint8_t *pool[BATCH];
    lsa_idx_keys *keys;    /* device [BATCH], each with its pool */
    uint16_t *hidden;      /* device [BATCH, d] */
    int64_t *position, *n; /* device [BATCH] */
    float *logit;          /* device [BATCH, CHUNKS] */
    int32_t *out, *n_out;
    float **state; /* device [1]: observed masses [2, CHUNKS] */
    double copy_rate;
} bench;

static void one(bench *b, int what, int i, const lsa_idx_rule *rule) {
    float *const z = b->logit + (int64_t)(i % POOLS) * CHUNKS;
    if (what == 2) { /* a batch */
        idx(lsa_idx_score(b->x, 0, BATCH, b->keys, b->logit, CHUNKS, b->s, text));
        return;
    }
    if (what == 3) {
        idx(lsa_idx_query(b->x, 0, 1, b->hidden, b->position, b->s, text));
        return;
    }
    if (what == 4) {
        idx(lsa_idx_query(b->x, 0, BATCH, b->hidden, b->position, b->s, text));
        return;
    }
    if (what == 5 || what == 6) /* all of level 1 */
        idx(lsa_idx_query(b->x, 0, 1, b->hidden, b->position, b->s, text));
    idx(lsa_idx_score(b->x, 0, 1, b->keys + i % POOLS, z, CHUNKS, b->s, text));
    if (what == 6)
        idx(lsa_idx_select_observed(b->x, 1, rule, z, CHUNKS, b->n, (const float *const *)b->state, CHUNKS,
                                    b->out, CHUNKS, b->n_out, b->s, text));
    else if (rule)
        idx(lsa_idx_select(b->x, 1, rule, z, CHUNKS, b->n, b->out, CHUNKS, b->n_out, b->s, text));
}

/* Median microseconds of one call inside a graph of IN_GRAPH of them. */
static double time_it(bench *b, int what, const lsa_idx_rule *rule) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t e0, e1;
    float t[REPEATS];
    cu(cudaEventCreate(&e0));
    cu(cudaEventCreate(&e1));
    cu(cudaStreamBeginCapture(b->s, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < IN_GRAPH; i++) one(b, what, i, rule);
    cu(cudaStreamEndCapture(b->s, &graph));
    cu(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = -3; i < REPEATS; i++) {
        cu(cudaEventRecord(e0, b->s));
        cu(cudaGraphLaunch(exec, b->s));
        cu(cudaEventRecord(e1, b->s));
        cu(cudaEventSynchronize(e1));
        if (i >= 0) cu(cudaEventElapsedTime(&t[i], e0, e1));
    }
    qsort(t, REPEATS, sizeof *t, ascending);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaEventDestroy(e0);
    cudaEventDestroy(e1);
    return 1e3 * (double)t[REPEATS / 2] / IN_GRAPH;
}

static double copy_rate(cudaStream_t s) {
    const size_t bytes = (size_t)2 << 30;
    void *const a = device(NULL, bytes), *const c = device(NULL, bytes);
    cudaEvent_t e0, e1;
    float t[REPEATS];
    cu(cudaEventCreate(&e0));
    cu(cudaEventCreate(&e1));
    for (int i = -2; i < REPEATS; i++) {
        cu(cudaEventRecord(e0, s));
        cu(cudaMemcpyAsync(c, a, bytes, cudaMemcpyDeviceToDevice, s));
        cu(cudaEventRecord(e1, s));
        cu(cudaEventSynchronize(e1));
        if (i >= 0) cu(cudaEventElapsedTime(&t[i], e0, e1));
    }
    qsort(t, REPEATS, sizeof *t, ascending);
    cudaFree(a), cudaFree(c);
    return 2.0 * (double)bytes / (1e-3 * (double)t[REPEATS / 2]);
}

static void report(bench *b, const char *name, const char *path, double us, double bytes, int requests) {
    const double floor_us = 1e6 * bytes / b->copy_rate;
    float *const z = LSA_GEN_NEW(float, CHUNKS);
    cu(cudaMemcpy(z, b->logit, CHUNKS * sizeof *z, cudaMemcpyDeviceToHost));
    printf(
        "{\"bench\": \"retrieve\", \"case\": \"%s\", \"path\": \"%s\", \"requests\": %d, \"chunks\": %d, \"heads\": %d, \"us\": %.2f, "
        "\"floor_us\": %.2f, \"of_floor\": %.2f, \"times_floor\": %.2f, \"gb_per_s\": %.0f, \"copy_gb_per_s\": %.0f, \"tflop_per_s\": %.0f, "
        "\"checksum\": \"%016llx\"}\n",
        name, path, requests, CHUNKS, HEADS, us, floor_us, floor_us / us, us / floor_us, 1e-3 * bytes / us,
        1e-9 * b->copy_rate, 2e-6 * requests * CHUNKS * HEADS * 128.0 / us,
        (unsigned long long)lsa_xxh64(z, CHUNKS * sizeof *z));
    fflush(stdout);
    free(z);
}

/* All of level 1 for one layer: query, scores and pages; plain, with a continuation, and with observed masses
 * too. */
static void level1(bench *b, const lsa_indexer_file *plain, const char *folder, const lsa_idx_rule *rule,
                   double bytes) {
    static const char *const NAME[] = {"level 1", "level 1, continuation", "level 1, continuation and prior"};
    for (int k = 0; k < 3; k++) {
        lsa_indexer_file f = *plain;
        const lsa_idx_options o = {"cuda", LSA_IDX_FP8, BATCH, CHUNKS};
        f.geom.reach = k > 0 ? 16 : 0;
        f.geom.prior = k > 1;
        float *const params = LSA_GEN_NEW(float, lsa_indexer_n_param(&f.geom));
        lsa_indexer_init_random(params, &f.geom, 1);
        f.params = params;
        ok(lsa_indexer_file_save(&f, folder, &err));
        idx(lsa_idx_open(&b->x, LSA_IDX_ABI, folder, &o, text));
        report(b, NAME[k], "fp8", time_it(b, k > 1 ? 6 : 5, rule),
               bytes + 4.0 * (double)lsa_indexer_n_param(&f.geom), 1);
        lsa_idx_close(b->x);
        free(params);
    }
}

int main(void) {
    bench b = {0};
    lsa_ctx *ctx = NULL;
    if (lsa_ctx_create(&ctx, "cuda", &err) != LSA_OK) {
        printf("skipped: %s\n", err.msg);
        return 77;
    }
    const lsa_indexer_geom g = {.hidden = 4096,
                                .n_head = HEADS,
                                .head_dim = 128,
                                .rank = 2048,
                                .eps = 1e-6f,
                                .n_layer = 1,
                                .id = {{2}},
                                .rope = {64, 160000, 16, 65536, 32, 1}};
    lsa_rng r = lsa_rng_make(3, 9);
    float *const params = LSA_GEN_NEW(float, lsa_indexer_n_param(&g));
    lsa_indexer_init_random(params, &g, 1);
    char folder[] = "/tmp/lsa-retrieve-XXXXXX";
    if (!mkdtemp(folder)) return 1;
    const lsa_indexer_file f = {.geom = g, .params = params, .tau = 64, .tail = 256, .threshold = 0.5};
    ok(lsa_indexer_file_save(&f, folder, &err));
    cu(cudaStreamCreateWithFlags(&b.s, cudaStreamNonBlocking));
    b.copy_rate = copy_rate(b.s);

    uint8_t *const pool = LSA_GEN_NEW(uint8_t, POOL_BYTES);
    int32_t *const page = LSA_GEN_NEW(int32_t, PAGES);
    for (int64_t p = 0; p < PAGES; p++) {
        for (int i = 0; i < 8192; i += 4) {
            const uint32_t w = lsa_rng_u32(&r) & 0xBFBFBFBFu; /* magnitudes below 2: no NaN code */
            memcpy(pool + p * 8448 + i, &w, 4);
        }
        for (int i = 0; i < 64; i++) {
            const float s = 0.5f + 0.5f * lsa_rng_uniform(&r);
            memcpy(pool + p * 8448 + 8192 + 4 * i, &s, 4);
        }
    }
    lsa_idx_keys keys[BATCH];
    int64_t position[BATCH], n[BATCH];
    uint16_t *const hidden = LSA_GEN_NEW(uint16_t, BATCH * 4096);
    for (int64_t i = 0; i < BATCH * 4096; i++) hidden[i] = lsa_f32_to_bf16(lsa_gen_normal(&r));
    for (int i = 0; i < BATCH; i++) {
        for (int32_t p = 0; p < PAGES; p++) page[p] = p;
        for (int32_t p = PAGES - 1; p > 0; p--) { /* pages in random order, another one for each request */
            const int64_t j = lsa_gen_range(&r, 0, p);
            const int32_t x = page[p];
            page[p] = page[j];
            page[j] = x;
        }
        b.pool[i] = device(pool, POOL_BYTES);
        keys[i] = (lsa_idx_keys){b.pool[i], device(page, sizeof(int32_t) * PAGES), CHUNKS};
        position[i] = 4 * (int64_t)CHUNKS - 1 - i;
        n[i] = CHUNKS;
    }
    b.keys = device(keys, sizeof keys);
    b.position = device(position, sizeof position);
    b.n = device(n, sizeof n);
    b.hidden = device(hidden, BATCH * 4096 * 2);
    b.logit = device(NULL, (size_t)BATCH * CHUNKS * 4);
    b.out = device(NULL, CHUNKS * 4);
    b.n_out = device(NULL, 64);
    const double key_bytes = 132.0 * CHUNKS;

    float *const mass = LSA_GEN_NEW(float, 2 * CHUNKS);
    for (int64_t i = 0; i < 2 * CHUNKS; i++)
        mass[i] = lsa_rng_uniform(&r) < 0.9f ? 0 : 0.01f * lsa_rng_uniform(&r);
    float *const masses = device(mass, sizeof *mass * 2 * CHUNKS);
    b.state = device(&masses, sizeof masses);
    free(mass);
    lsa_idx_rule pages = {
        .mode = LSA_IDX_PAGES, .ensemble = LSA_IDX_SUM, .tail = 64, .k = 384, .budget = 0.1};
    for (int path = LSA_IDX_FP8; path >= LSA_IDX_BF16; path--) {
        const char *const name = path == LSA_IDX_FP8 ? "fp8" : "bf16";
        const lsa_idx_options o = {"cuda", path, BATCH, CHUNKS};
        idx(lsa_idx_open(&b.x, LSA_IDX_ABI, folder, &o, text));
        idx(lsa_idx_query(b.x, 0, BATCH, b.hidden, b.position, b.s, text));
        const double score = time_it(&b, 0, NULL);
        report(&b, "score", name, score, key_bytes, 1);
        if (path == LSA_IDX_FP8) {
            float *const z = LSA_GEN_NEW(float, CHUNKS);
            cu(cudaMemcpy(z, b.logit, CHUNKS * sizeof *z, cudaMemcpyDeviceToHost));
            qsort(z, CHUNKS, sizeof *z, ascending);
            lsa_idx_rule rule = {.mode = LSA_IDX_THRESHOLD,
                                 .ensemble = LSA_IDX_SUM,
                                 .tail = 64,
                                 .k = 384,
                                 .budget = 0.1,
                                 .threshold = z[(int)(0.9 * CHUNKS)]};
            free(z);
            report(&b, "score + threshold", name, time_it(&b, 0, &rule), key_bytes, 1);
            pages.threshold = rule.threshold;
            rule.mode = LSA_IDX_PAGES;
            report(&b, "score + 384 pages", name, time_it(&b, 0, &rule), key_bytes, 1);
            rule.mode = LSA_IDX_BUDGET;
            report(&b, "score + budget 10 %", name, time_it(&b, 0, &rule), key_bytes, 1);
            report(&b, "query", name, time_it(&b, 3, NULL), 4.0 * (double)lsa_indexer_n_param(&g), 1);
            report(&b, "query", name, time_it(&b, 4, NULL), 4.0 * (double)lsa_indexer_n_param(&g), BATCH);
        }
        report(&b, "score", name, time_it(&b, 2, NULL), key_bytes * BATCH, BATCH);
        lsa_idx_close(b.x);
    }
    level1(&b, &f, folder, &pages, key_bytes);
    ok(lsa_remove_tree(folder, &err));
    lsa_ctx_destroy(ctx);
    return 0;
}
#endif
