/* The GPU retriever against the host: queries and logits on every numeric path against double sums over the
 * golden chain (ref backend, query_path.h), for rows and pages, heads 8 to 128, several requests of different
 * lengths; sets against lsa_select on the same logits, id by id. Skipped (77) without a GPU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

#ifndef LSA_HAVE_CUDA
int main(void) {
    const char *const require = getenv("LSA_REQUIRE");
    printf("skipped: built without CUDA\n");
    return require ? 1 : 77;
}
#else
#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/model/gpu_retrieve.h"
#include "tests/testkit/gen.h"

enum { LAYERS = 2, HIDDEN = 96, M = 5, GUARD = 64 };
static lsa_err err;
#define OK(call)                                                                                             \
    do {                                                                                                     \
        if ((call) != LSA_OK) fail_msg("%s", err.msg);                                                       \
    } while (0)
#define CU(call) assert_int_equal((call), cudaSuccess)

static void *to_device(const void *host, size_t bytes) {
    void *p = NULL;
    CU(cudaMalloc(&p, bytes ? bytes : 1));
    CU(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    return p;
}

typedef struct request {
    int64_t n;      /* chunks */
    uint8_t *row;   /* [n, 132] */
    uint8_t *dev;   /* rows, or the pool */
    int32_t *pages; /* device */
} request;

/* Rows on the device, or a pool of pages in another order with foreign pages between. */
static void place(request *r, bool paged, lsa_rng *rng) {
    if (!paged) {
        r->dev = to_device(r->row, (size_t)r->n * 132);
        return;
    }
    const int64_t n_page = (r->n + 63) / 64, pool = n_page + 3;
    uint8_t *const p = LSA_GEN_NEW(uint8_t, pool * 8448);
    int32_t *const at = LSA_GEN_NEW(int32_t, pool);
    memset(p, 0x7f, (size_t)pool * 8448); /* NaN codes where nothing belongs to the request */
    for (int64_t i = 0; i < pool; i++) at[i] = (int32_t)i;
    for (int64_t i = pool - 1; i > 0; i--) {
        const int64_t j = lsa_gen_range(rng, 0, i);
        const int32_t x = at[i];
        at[i] = at[j];
        at[j] = x;
    }
    for (int64_t c = 0; c < r->n; c++) {
        uint8_t *const page = p + (int64_t)at[c / 64] * 8448;
        memcpy(page + c % 64 * 128, r->row + c * 132, 128);
        memcpy(page + 8192 + c % 64 * 4, r->row + c * 132 + 128, 4);
    }
    r->dev = to_device(p, (size_t)pool * 8448);
    r->pages = to_device(at, (size_t)n_page * 4);
    free(p);
    free(at);
}

typedef struct rig {
    lsa_indexer_geom g;
    float *params, freq[64];
    uint16_t *hidden;
    float *x;
    int64_t position[M];
    request r[LAYERS][M];
    int64_t ld;
} rig;

static void open_rig(rig *k, int heads, int rank, const int64_t n[M], bool paged, uint64_t seed) {
    lsa_rng rng = lsa_rng_make(seed, 77);
    memset(k, 0, sizeof *k);
    k->g = (lsa_indexer_geom){.hidden = HIDDEN,
                              .n_head = heads,
                              .head_dim = 128,
                              .rank = rank,
                              .eps = 1e-6f,
                              .n_layer = LAYERS,
                              .rope = {64, 160000, 16, 65536, 32, 1}};
    for (int32_t l = 0; l < LAYERS; l++) k->g.ord[l].v = l, k->g.id[l].v = 2 * l + 2;
    lsa_rope_freqs(k->freq, &k->g.rope);
    k->params = LSA_GEN_NEW(float, lsa_indexer_n_param(&k->g));
    lsa_indexer_init_random(k->params, &k->g, seed);
    k->x = LSA_GEN_NEW(float, M *HIDDEN);
    k->hidden = LSA_GEN_NEW(uint16_t, M * HIDDEN);
    for (int64_t i = 0; i < M * HIDDEN; i++) {
        k->hidden[i] = lsa_f32_to_bf16(lsa_gen_normal(&rng));
        k->x[i] = lsa_bf16_to_f32(k->hidden[i]);
    }
    const int64_t position[M] = {3, 70000, 999999, 4095, 262143};
    for (int i = 0; i < M; i++) {
        k->position[i] = position[i];
        if (n[i] > k->ld) k->ld = n[i];
        for (int l = 0; l < LAYERS; l++) {
            request *const r = &k->r[l][i];
            r->n = n[i];
            r->row = LSA_GEN_NEW(uint8_t, n[i] * 132 + 1);
            lsa_gen_keys(r->row, n[i], &rng);
            place(r, paged, &rng);
        }
    }
    k->ld += 7;
}
static void close_rig(rig *k) {
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < M; i++) {
            free(k->r[l][i].row);
            cudaFree(k->r[l][i].dev);
            cudaFree(k->r[l][i].pages);
        }
    free(k->params), free(k->x), free(k->hidden);
}

/* Logits of one request in double from the host's query of the path. */
static void want(double *z, const rig *k, int l, int i, lsa_query_path path, float *q, const float *w) {
    const request *const r = &k->r[l][i];
    lsa_query_path_row(path, &k->g, k->freq, k->position[i], q, NULL, q, NULL, NULL);
    for (int64_t c = 0; c < r->n; c++) {
        float key[128];
        lsa_key_decode(key, r->row + c * 132);
        z[c] = 0;
        for (int h = 0; h < k->g.n_head; h++) {
            double p = 0;
            for (int j = 0; j < 128; j++) p += (double)key[j] * (double)q[h * 128 + j];
            z[c] += (double)w[h] * fmax(p, 0);
        }
    }
}

/* raw = Wb u and w of all requests, by the ref backend. */
static void raw_queries(float *raw, float *w, const rig *k, int l) {
    lsa_ctx *const ctx = lsa_gen_ctx("ref");
    const int64_t r = k->g.rank, H = k->g.n_head;
    float *const a = LSA_GEN_NEW(float, M *r), *const u = LSA_GEN_NEW(float, M *r), rstd[M];
    const lsa_indexer_act act = {a, rstd, u, raw, w};
    OK(lsa_indexer_query_raw(ctx, &k->g, k->params, l, M, k->x, &act, &err));
    (void)H;
    free(a), free(u);
}

static lsa_select_rule rule_of(int mode, int score, int64_t n) {
    lsa_select_rule r = {.mode = (lsa_select_mode)mode,
                         .score = (lsa_score_rule)score,
                         .n_layer = LAYERS,
                         .k = mode == LSA_SELECT_PAGES ? n / 640 + 2 : n / 7,
                         .sink = 3,
                         .tail = 70,
                         .budget = 0.1,
                         .threshold = score == LSA_SCORE_SUM ? 0.02f : 0.51f};
    for (int l = 0; l < LAYERS; l++) r.temperature[l] = 0.5f + (float)l, r.offset[l] = 0.1f * (float)l;
    return r;
}

/* Every mode and score on the device's logits, against lsa_select. */
static void check_select(lsa_gpu_retriever *x, const rig *k, const float *dev_z, const float *z) {
    int64_t n[M];
    for (int i = 0; i < M; i++) n[i] = k->r[0][i].n;
    int64_t *const dev_n = to_device(n, sizeof n);
    int32_t *out = NULL, *n_out = NULL;
    CU(cudaMalloc((void **)&out, (size_t)(M * k->ld) * 4));
    CU(cudaMalloc((void **)&n_out, sizeof(int32_t) * M));
    int32_t *const got = LSA_GEN_NEW(int32_t, M * k->ld), *const expect = LSA_GEN_NEW(int32_t, k->ld + 1);
    for (int variant = 0; variant < 3 * 6 + 4; variant++) {
        const bool continued = variant >= 3 * 6; /* each mode on the continued sum */
        lsa_select_rule r = continued ? rule_of(variant - 3 * 6, LSA_SCORE_SUM, n[1])
                                      : rule_of(variant / 3 % 4, variant % 3, n[1]);
        int64_t ld_out = k->ld;
        if (continued) r.reach = 16;
        for (int j = 0; j < r.reach; j++) r.cost[j] = 0.002f * (float)j;
        if (variant / 3 == 4) r.mode = LSA_SELECT_THRESHOLD, r.cap = 40;
        if (variant / 3 == 5) { /* threshold by length, and no room for everything */
            r.mode = LSA_SELECT_THRESHOLD;
            r.n_knot = 3;
            for (int j = 0; j < 3; j++)
                r.knot_length[j] = 100 << (3 * j), r.knot_threshold[j] = r.threshold + 0.01f * (float)j;
            ld_out = 50;
        }
        CU(cudaMemset(out, 0xA5, (size_t)(M * k->ld) * 4));
        OK(lsa_gpu_retriever_select(x, M, &r, dev_z, k->ld, dev_n, out, ld_out, n_out, NULL, &err));
        CU(cudaDeviceSynchronize());
        int32_t count[M];
        CU(cudaMemcpy(count, n_out, sizeof count, cudaMemcpyDeviceToHost));
        CU(cudaMemcpy(got, out, (size_t)(M * k->ld) * 4, cudaMemcpyDeviceToHost));
        for (int i = 0; i < M; i++) {
            int64_t n_want;
            OK(lsa_select(expect, &n_want, NULL, &r, z + i * k->ld, M * k->ld, n[i], &err));
            if (n_want > ld_out) n_want = ld_out;
            if (count[i] != n_want)
                fail_msg("variant %d, request %d: %d kept, expected %lld", variant, i, count[i],
                         (long long)n_want);
            assert_memory_equal(got + i * ld_out, expect, (size_t)n_want * 4);
            if (ld_out == k->ld && n_want < ld_out)
                assert_int_equal(got[i * ld_out + n_want], (int32_t)0xA5A5A5A5); /* nothing behind */
        }
    }
    cudaFree(dev_n), cudaFree(out), cudaFree(n_out);
    free(got), free(expect);
}

static double worst_seen[LSA_QUERY_PATHS];

static void run(int heads, int rank, bool paged, bool portable, lsa_query_path path, const int64_t n[M]) {
    rig k;
    open_rig(&k, heads, rank, n, paged, (uint64_t)(heads + rank));
    lsa_ctx *const ctx = lsa_gen_ctx("cuda");
    lsa_gpu_retriever *x = NULL, *twin = NULL;
    const int64_t cells = LAYERS * M * k.ld;
    float *const z = LSA_GEN_NEW(float, cells), *const raw = LSA_GEN_NEW(float, (int64_t)M *heads * 128),
                 *const w = LSA_GEN_NEW(float, (int64_t)M *heads), *dev_z = NULL;
    double *const zd = LSA_GEN_NEW(double, k.ld);
    OK(lsa_gpu_retriever_create(&x, ctx, &k.g, k.params, path, M, k.ld, portable, &err));
    OK(lsa_gpu_retriever_clone(&twin, x, &err));
    lsa_gpu_retriever_destroy(x); /* the weights live on in the clone */
    x = twin;
    uint16_t *const hidden = to_device(k.hidden, M * HIDDEN * 2);
    int64_t *const position = to_device(k.position, sizeof k.position);
    CU(cudaMalloc((void **)&dev_z, (size_t)cells * 4));
    CU(cudaMemset(dev_z, 0xFF, (size_t)cells * 4));
    for (int l = 0; l < LAYERS; l++) {
        lsa_gpu_keys keys[M];
        for (int i = 0; i < M; i++) keys[i] = (lsa_gpu_keys){k.r[l][i].dev, k.r[l][i].pages, k.r[l][i].n};
        lsa_gpu_keys *const dev_keys = to_device(keys, sizeof keys);
        OK(lsa_gpu_retriever_query(x, l, M, hidden, position, NULL, &err));
        OK(lsa_gpu_retriever_score(x, l, M, dev_keys, dev_z + l * M * k.ld, k.ld, NULL, &err));
        CU(cudaDeviceSynchronize());
        cudaFree(dev_keys);
    }
    CU(cudaMemcpy(z, dev_z, (size_t)cells * 4, cudaMemcpyDeviceToHost));
    /* NUMERIC: f32 adds in another order; bf16 and fp8 round q, so a value next to a rounding boundary may
     * fall on the other side; the tensor core adds fp8 products with fewer bits. Seen: 3e-6, 4e-3 and 4e-3 of
     * a request's rms. */
    const double limit = path == LSA_PATH_F32 ? 2e-5 : 2e-2;
    for (int l = 0; l < LAYERS; l++) {
        raw_queries(raw, w, &k, l);
        for (int i = 0; i < M; i++) {
            want(zd, &k, l, i, path, raw + (int64_t)i * heads * 128, w + (int64_t)i * heads);
            double ss = 0;
            for (int64_t c = 0; c < n[i]; c++) ss += zd[c] * zd[c];
            const double rms = sqrt(ss / (double)(n[i] ? n[i] : 1)) + 1e-30;
            const float *const mine = z + (l * M + i) * k.ld;
            for (int64_t c = 0; c < n[i]; c++) {
                const double e = fabs((double)mine[c] - zd[c]) / rms;
                if (e > worst_seen[path]) worst_seen[path] = e;
                if (!(e <= limit))
                    fail_msg(
                        "heads %d paged %d portable %d path %s layer %d request %d chunk %lld: %g, expected %g",
                        heads, paged, portable, lsa_query_path_name(path), l, i, (long long)c,
                        (double)mine[c], zd[c]);
            }
            for (int64_t c = n[i]; c < k.ld; c++)
                assert_true(isnan(mine[c])); /* the rest of the row is untouched */
        }
    }
    check_select(x, &k, dev_z, z);
    lsa_gpu_retriever_destroy(x);
    cudaFree(hidden), cudaFree(position), cudaFree(dev_z);
    free(z), free(raw), free(w), free(zd);
    close_rig(&k);
}

static void test_paths(void **s) {
    (void)s;
    const int64_t n[M] = {1, 3000, 64, 0, 777};
    for (int path = 0; path < LSA_QUERY_PATHS; path++)
        for (int portable = 0; portable < 2; portable++)
            for (int paged = 0; paged < 2; paged++) {
                run(128, 64, paged, portable, (lsa_query_path)path, n);
                run(64, 36, paged, portable, (lsa_query_path)path, n);
                run(32, 64, paged, portable, (lsa_query_path)path, n);
                run(8, 6, paged, portable, (lsa_query_path)path, n); /* unaligned rows */
            }
    for (int path = 0; path < LSA_QUERY_PATHS; path++)
        printf("%s: largest difference %.2g of the rms\n", lsa_query_path_name((lsa_query_path)path),
               worst_seen[path]);
}

/* Parts of a request on many blocks, and more keys than a block's ring holds. */
static void test_long(void **s) {
    (void)s;
    const int64_t n[M] = {100000, 5, 20001, 8192, 65};
    run(8, 8, true, false, LSA_PATH_FP8, n);
    run(8, 8, false, false, LSA_PATH_FP8, n);
    run(8, 8, true, false, LSA_PATH_BF16, n);
    run(8, 8, true, true, LSA_PATH_F32, n);
}

/* Every kernel once, small: for compute-sanitizer (argument "short"). */
static void test_short(void **s) {
    (void)s;
    const int64_t n[M] = {1, 300, 64, 0, 77};
    for (int path = 0; path < LSA_QUERY_PATHS; path++)
        for (int portable = 0; portable < 2; portable++) {
            run(128, 8, true, portable, (lsa_query_path)path, n);
            run(8, 6, false, portable, (lsa_query_path)path, n);
        }
}

static void test_refuses(void **s) {
    (void)s;
    const int64_t n[M] = {1, 1, 1, 1, 1};
    rig k;
    open_rig(&k, 8, 8, n, false, 1);
    lsa_gpu_retriever *x = NULL;
    lsa_err e = {0};
    assert_int_equal(
        lsa_gpu_retriever_create(&x, lsa_gen_ctx("cuda"), &k.g, k.params, LSA_PATH_FP8, 0, 10, false, &e),
        LSA_E_ARG);
    assert_null(x);
    OK(lsa_gpu_retriever_create(&x, lsa_gen_ctx("cuda"), &k.g, k.params, LSA_PATH_FP8, 2, 10, false, &err));
    assert_int_equal(lsa_gpu_retriever_query(x, LAYERS, 1, NULL, NULL, NULL, NULL), LSA_E_ARG);
    assert_int_equal(lsa_gpu_retriever_score(x, 0, 3, NULL, NULL, 1, NULL, NULL), LSA_E_ARG);
    lsa_gpu_retriever_destroy(x);
    close_rig(&k);
}

int main(int argc, char **argv) {
    lsa_ctx *ctx = NULL;
    if (lsa_ctx_create(&ctx, "cuda", &err) != LSA_OK) {
        const char *const require = getenv("LSA_REQUIRE");
        printf("skipped: %s\n", err.msg);
        return require && strstr(require, "gpu") ? 1 : 77;
    }
    lsa_ctx_destroy(ctx);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_paths), cmocka_unit_test(test_long),
                                       cmocka_unit_test(test_refuses)};
    const struct CMUnitTest little[] = {cmocka_unit_test(test_short), cmocka_unit_test(test_refuses)};
    if (argc > 1 && !strcmp(argv[1], "short")) return cmocka_run_group_tests(little, NULL, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#endif
