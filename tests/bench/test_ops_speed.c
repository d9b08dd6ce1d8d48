/* Time of every op at the shapes of the mini recipe: one JSON line per case, on the backend LSA_BACKEND.
 * Never gates on time.
 *
 * The floor of a case is the larger of bytes / (byte rate of AdamW over 64 M parameters) and FLOPs / (rate of
 * a large f32 GEMM), both measured in this run; bytes count every array once. The checksum is over the output
 * that was timed. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/clock.h"
#include "kernels/core/hash.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/ops.h"
#include "tests/testkit/gen.h"

enum { REPEATS = 15 };
static lsa_ctx *g_ctx;
static double g_byte_rate, g_flop_rate; /* bytes/s, FLOP/s */

static void must(lsa_status st, const lsa_err *err) {
    if (st == LSA_OK) return;
    fprintf(stderr, "%s\n", err->msg);
    exit(1);
}
static void *dev(int64_t n, size_t size, const void *host) {
    lsa_err err = {0};
    void *p = NULL;
    must(lsa_ctx_alloc_(g_ctx, &p, n, size, "bench", &err), &err);
    if (host) must(lsa_ctx_upload(g_ctx, p, host, (size_t)n * size, &err), &err);
    return p;
}
static float *random_dev(int64_t n, float s, uint64_t seed) {
    lsa_rng r = lsa_rng_make(seed, 1);
    float *h = LSA_GEN_NEW(float, n);
    lsa_gen_fill(h, n, s, &r);
    float *d = dev(n, 4, h);
    free(h);
    return d;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct bench {
    const char *name, *shape;
    double bytes, flops;
    void (*run)(void);
    const void *out;
    size_t out_bytes;
} bench;

/* Median seconds: batches of calls long enough that the clock's and the launch's share is small. */
static double median(void (*run)(void)) {
    lsa_err err = {0};
    double t[REPEATS];
    int inner = 1;
    run();
    must(lsa_ctx_sync(g_ctx, &err), &err);
    for (int i = 0; i < REPEATS; i++) {
        const double t0 = lsa_now_s();
        for (int k = 0; k < inner; k++) run();
        must(lsa_ctx_sync(g_ctx, &err), &err);
        const double dt = lsa_now_s() - t0;
        t[i] = dt / inner;
        if (i == 0) inner = dt < 2e-3 ? (int)(2e-3 / (dt + 1e-9)) + 1 : 1;
    }
    qsort(t, REPEATS, sizeof *t, ascending);
    return t[REPEATS / 2];
}

static void report(const bench *b) {
    lsa_err err = {0};
    const double s = median(b->run);
    unsigned char *out = malloc(b->out_bytes + 1);
    if (!out) exit(1);
    must(lsa_ctx_download(g_ctx, out, b->out, b->out_bytes, &err), &err);
    const double floor_s =
        fmax(g_byte_rate > 0 ? b->bytes / g_byte_rate : 0, g_flop_rate > 0 ? b->flops / g_flop_rate : 0);
    printf(
        "{\"bench\": \"%s\", \"shape\": \"%s\", \"device\": \"%s\", \"ms\": %.4f, \"gb_per_s\": %.1f, \"tflop_per_s\": %.3f, "
        "\"of_floor\": %.3f, \"checksum\": \"%016llx\"}\n",
        b->name, b->shape, lsa_ctx_describe(g_ctx), 1e3 * s, b->bytes / s / 1e9, b->flops / s / 1e12,
        floor_s > 0 ? floor_s / s : 1.0, (unsigned long long)lsa_xxh64(out, b->out_bytes));
    fflush(stdout);
    free(out);
}

/* Arguments of the cases: set once, read by the closures below. */
static lsa_sumsq_args g_sumsq;
static lsa_gemm_args g_big, g_up, g_dw;
static lsa_rmsnorm_fwd_args g_norm;
static lsa_rmsnorm_bwd_args g_norm_bwd;
static lsa_rope_hadamard_args g_rope;
static lsa_indexer_score_fwd_args g_fwd;
static lsa_indexer_score_bwd_args g_bwd;
static lsa_loss_kl_args g_kl;
static lsa_loss_pointwise_args g_focal;
static lsa_adamw_args g_adamw;

#define RUN(fn, op, args)                                                                                    \
    static void fn(void) {                                                                                   \
        lsa_err err = {0};                                                                                   \
        must(op(g_ctx, &args, &err), &err);                                                                  \
    }
RUN(run_sumsq, lsa_sumsq, g_sumsq)
RUN(run_big, lsa_gemm, g_big)
RUN(run_up, lsa_gemm, g_up)
RUN(run_dw, lsa_gemm, g_dw)
RUN(run_norm, lsa_rmsnorm_fwd, g_norm)
RUN(run_norm_bwd, lsa_rmsnorm_bwd, g_norm_bwd)
RUN(run_rope, lsa_rope_hadamard, g_rope)
RUN(run_fwd, lsa_indexer_score_fwd, g_fwd)
RUN(run_bwd, lsa_indexer_score_bwd, g_bwd)
RUN(run_kl, lsa_loss_kl, g_kl)
RUN(run_focal, lsa_loss_pointwise, g_focal)
RUN(run_adamw, lsa_adamw, g_adamw)

int main(void) {
    const bool gpu = lsa_gen_on_gpu();
    g_ctx = lsa_gen_ctx(lsa_gen_backend());
    const int64_t big = gpu ? 4096 : 512;
    const int64_t m = gpu ? 256 : 32, n = gpu ? 4096 : 1024, H = 32, r = 256, d = 256, P = 3367680;
    const double mn = (double)m * (double)n, dm = (double)m, dn = (double)n, dH = (double)H, dr = (double)r;
    char shape[12][64];
    lsa_rng rng = lsa_rng_make(9, 9);

    const int64_t many = gpu ? 1 << 26 : 1 << 22;
    float *pool[4];
    for (int i = 0; i < 4; i++) pool[i] = dev(many, 4, NULL);
    double *sum = dev(1, 8, NULL);
    g_adamw =
        (lsa_adamw_args){many, 10, 1e-3f, 0.9f, 0.999f, 1e-8f, 0.01f, 1, pool[0], pool[1], pool[2], pool[3]};
    g_byte_rate = 28.0 * (double)many / median(run_adamw);
    g_sumsq = (lsa_sumsq_args){many, pool[0], sum};
    float *ba = random_dev(big * big, 1, 1), *bc = dev(big * big, 4, NULL);
    g_big = (lsa_gemm_args){false, true, big, big, big, 1, 0, ba, ba, bc};
    g_flop_rate = 2.0 * pow((double)big, 3) / median(run_big);

    float *x = random_dev(m * d, 1, 2), *wb = random_dev(H * 128 * r, 0.06f, 3), *u = random_dev(m * r, 1, 4),
          *g = random_dev(r, 1, 5);
    float *q = random_dev(m * H * 128, 1, 6), *w = random_dev(m * H, 1, 7), *y = dev(m * r, 4, NULL),
          *rstd = dev(m, 4, NULL);
    float *dq = dev(m * H * 128, 4, NULL), *dw = dev(m * H, 4, NULL), *dg = dev(r, 4, NULL),
          *dwb = dev(H * 128 * r, 4, NULL), *qq = dev(m * H * 128, 4, NULL);
    uint8_t *keys_h = LSA_GEN_NEW(uint8_t, n * LSA_KEY_BYTES);
    lsa_gen_keys(keys_h, n, &rng);
    uint8_t *keys = dev(n * LSA_KEY_BYTES, 1, keys_h);
    free(keys_h);
    int32_t *nc_h = LSA_GEN_NEW(int32_t, m);
    int64_t *base_h = LSA_GEN_NEW(int64_t, m), *pos_h = LSA_GEN_NEW(int64_t, m);
    for (int64_t i = 0; i < m; i++) nc_h[i] = (int32_t)n, pos_h[i] = 64 * i;
    int32_t *n_cand = dev(m, 4, nc_h);
    int64_t *base = dev(m, 8, base_h), *position = dev(m, 8, pos_h);
    float *freq = random_dev(32, 0.01f, 8), *z = dev(m * n, 4, NULL), *dz = random_dev(m * n, 1e-3f, 10);
    float *target_h = LSA_GEN_NEW(float, m *n);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < 32; j++)
            target_h[i * n + (int64_t)lsa_rng_below(&rng, (uint64_t)n)] += 1.0f / 32;
    float *target = dev(m * n, 4, target_h);
    double *row = dev(m, 8, NULL);
    float *p = random_dev(P, 0.05f, 11), *grad = random_dev(P, 1e-3f, 12), *m1 = dev(P, 4, NULL),
          *v1 = dev(P, 4, NULL);

    g_up = (lsa_gemm_args){false, true, m, H * 128, r, 1, 0, u, wb, qq};
    g_dw = (lsa_gemm_args){true, false, H * 128, r, m, 1, 0, q, u, dwb};
    g_norm = (lsa_rmsnorm_fwd_args){m, r, 1e-6f, x, g, y, rstd};
    g_norm_bwd = (lsa_rmsnorm_bwd_args){m, r, x, g, rstd, u, y, dg, false};
    g_rope = (lsa_rope_hadamard_args){m, H, 128, 64, false, position, freq, q};
    g_fwd = (lsa_indexer_score_fwd_args){m, H, 128, n, n, q, w, keys, base, NULL, n_cand, false, z};
    g_bwd = (lsa_indexer_score_bwd_args){m, H, 128, n, n, q, w, keys, base, NULL, n_cand, dz, dq, dw};
    g_kl = (lsa_loss_kl_args){m, n, 1.0f / (float)m, z, target, NULL, n_cand, dz, row};
    g_focal = (lsa_loss_pointwise_args){m, n, true, 0, 1e-3f, z, target, NULL, n_cand, dz, row};
    g_adamw = (lsa_adamw_args){P, 10, 1e-3f, 0.9f, 0.999f, 1e-8f, 0.01f, 1, grad, p, m1, v1};

    const double score_flop = 2 * mn * dH * 128, q_bytes = dm * dH * 512;
    const bench list[] = {
        {"sumsq", shape[0], 4.0 * (double)many, 2.0 * (double)many, run_sumsq, sum, 8},
        {"gemm", shape[1], 12.0 * (double)(big * big), 2.0 * pow((double)big, 3), run_big, bc,
         (size_t)(big * big) * 4},
        {"gemm_query_up", shape[2], 4 * (dm * dr + dH * 128 * dr + dm * dH * 128), 2 * dm * dH * 128 * dr,
         run_up, qq, (size_t)(m * H * 128) * 4},
        {"gemm_grad_wq_b", shape[3], 4 * (dm * dr + dH * 128 * dr + dm * dH * 128), 2 * dm * dH * 128 * dr,
         run_dw, dwb, (size_t)(H * 128 * r) * 4},
        {"rmsnorm_fwd", shape[4], 4 * (2 * dm * dr + dr + dm), 4 * dm * dr, run_norm, y, (size_t)(m * r) * 4},
        {"rmsnorm_bwd", shape[4], 4 * (3 * dm * dr + 2 * dr + dm), 8 * dm * dr, run_norm_bwd, dg,
         (size_t)r * 4},
        {"rope_hadamard", shape[5], 2 * q_bytes, dm * dH * 128 * 10, run_rope, rstd, 4},
        {"indexer_score_fwd", shape[6], q_bytes + 132 * dn + 4 * mn, score_flop, run_fwd, z,
         (size_t)(m * n) * 4},
        {"indexer_score_bwd", shape[6], 2 * q_bytes + 132 * dn + 4 * mn, 2 * score_flop, run_bwd, dq,
         (size_t)(m * H * 128) * 4},
        {"loss_kl", shape[7], 12 * mn, 12 * mn, run_kl, row, (size_t)m * 8},
        {"loss_focal", shape[7], 12 * mn, 30 * mn, run_focal, row, (size_t)m * 8},
        {"adamw", shape[8], 28.0 * (double)P, 14.0 * (double)P, run_adamw, m1, (size_t)P * 4},
    };
    snprintf(shape[0], 64, "%lld", (long long)many);
    snprintf(shape[1], 64, "%lld^3", (long long)big);
    snprintf(shape[2], 64, "m %lld, %lld -> %lld", (long long)m, (long long)r, (long long)(H * 128));
    snprintf(shape[3], 64, "m %lld, [%lld, %lld]", (long long)m, (long long)(H * 128), (long long)r);
    snprintf(shape[4], 64, "[%lld, %lld]", (long long)m, (long long)r);
    snprintf(shape[5], 64, "[%lld, %lld, 128]", (long long)m, (long long)H);
    snprintf(shape[6], 64, "m %lld, heads %lld, n %lld", (long long)m, (long long)H, (long long)n);
    snprintf(shape[7], 64, "[%lld, %lld]", (long long)m, (long long)n);
    snprintf(shape[8], 64, "%lld", (long long)P);
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) report(&list[i]);
    return 0; /* memory goes with the process */
}
