/* indexer_score_fwd and _bwd on the backend under test against `ref`.
 *
 * The gradient jumps where key.q crosses 0: candidates for which a product is closer to 0 than rounding could
 * move it get dz = 0, so that both sides must agree everywhere else. Rows of zeros among the keys give
 * products of exactly 0. */
#include <math.h>
#include <omp.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <cmocka.h>

#include "kernels/core/dtype.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/ops.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/tol.h"

enum { D = 128 };

typedef struct fixture {
    int64_t m, H, n, n_key;
    float *q, *w, *z0, *dz;
    uint8_t *keys;
    int64_t *base;
    int32_t *cand, *n_cand;
} fixture;

static fixture make(int64_t m, int64_t H, int64_t n, bool list, lsa_rng *g) {
    fixture f = {.m = m, .H = H, .n = n, .n_key = n + 40};
    f.q = LSA_GEN_NEW(float, m *H *D);
    f.w = LSA_GEN_NEW(float, m *H);
    f.z0 = LSA_GEN_NEW(float, m *n);
    f.dz = LSA_GEN_NEW(float, m *n);
    f.keys = LSA_GEN_NEW(uint8_t, f.n_key * LSA_KEY_BYTES);
    f.base = LSA_GEN_NEW(int64_t, m);
    f.n_cand = LSA_GEN_NEW(int32_t, m);
    f.cand = list ? LSA_GEN_NEW(int32_t, m * n) : NULL;
    lsa_gen_fill(f.q, m * H * D, 1, g);
    lsa_gen_fill(f.w, m * H, 0.1f, g);
    lsa_gen_fill(f.z0, m * n, 1, g);
    lsa_gen_fill(f.dz, m * n, 1, g);
    lsa_gen_keys(f.keys, f.n_key, g);
    for (int64_t i = 0; i < m; i++) {
        f.base[i] = i % 3 == 2 ? 0 : lsa_gen_range(g, 0, 40);
        f.n_cand[i] = (int32_t)(i == 0 ? n : i == 1 ? 0 : lsa_gen_range(g, 0, n));
        for (int64_t j = 0; list && j < n; j++)
            f.cand[i * n + j] = (int32_t)lsa_gen_range(g, 0, n - 1); /* repeats allowed */
    }
    return f;
}
static void drop(fixture *f) {
    free(f->q), free(f->w), free(f->z0), free(f->dz), free(f->keys), free(f->base), free(f->cand),
        free(f->n_cand);
}

static void keep_away_from_kinks(fixture *f) {
    float key[D];
    for (int64_t i = 0; i < f->m; i++)
        for (int64_t j = 0; j < f->n_cand[i]; j++) {
            lsa_key_decode(key,
                           f->keys + (f->base[i] + (f->cand ? f->cand[i * f->n + j] : j)) * LSA_KEY_BYTES);
            for (int64_t h = 0; h < f->H; h++) {
                double p = 0;
                for (int x = 0; x < D; x++) p += (double)key[x] * (double)f->q[(i * f->H + h) * D + x];
                if (p != 0 && fabs(p) < 1e-4) f->dz[i * f->n + j] = 0;
            }
        }
}

static void run_fwd(const char *device, const fixture *f, bool accumulate, float *z) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 8);
    lsa_indexer_score_fwd_args a = {f->m, f->H, D,    f->n, f->n_key,   NULL, NULL,
                                    NULL, NULL, NULL, NULL, accumulate, NULL};
    a.q = lsa_rig_in(&r, f->q, f->m * f->H * D, 4);
    a.w = lsa_rig_in(&r, f->w, f->m * f->H, 4);
    a.keys = lsa_rig_in(&r, f->keys, f->n_key, LSA_KEY_BYTES);
    a.key_base = lsa_rig_in(&r, f->base, f->m, 8);
    a.cand = lsa_rig_in(&r, f->cand, f->m * f->n, 4);
    a.n_cand = lsa_rig_in(&r, f->n_cand, f->m, 4);
    if (accumulate) memcpy(z, f->z0, (size_t)(f->m * f->n) * 4);
    a.z = accumulate ? lsa_rig_inout(&r, z, f->m * f->n, 4) : lsa_rig_out(&r, z, f->m * f->n, 4);
    if (lsa_indexer_score_fwd(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

static void run_bwd(const char *device, const fixture *f, float *dq, float *dw) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 8);
    lsa_indexer_score_bwd_args a = {f->m, f->H, D,    f->n, f->n_key, NULL, NULL,
                                    NULL, NULL, NULL, NULL, NULL,     NULL, NULL};
    a.q = lsa_rig_in(&r, f->q, f->m * f->H * D, 4);
    a.w = lsa_rig_in(&r, f->w, f->m * f->H, 4);
    a.keys = lsa_rig_in(&r, f->keys, f->n_key, LSA_KEY_BYTES);
    a.key_base = lsa_rig_in(&r, f->base, f->m, 8);
    a.cand = lsa_rig_in(&r, f->cand, f->m * f->n, 4);
    a.n_cand = lsa_rig_in(&r, f->n_cand, f->m, 4);
    a.dz = lsa_rig_in(&r, f->dz, f->m * f->n, 4);
    a.dq = lsa_rig_out(&r, dq, f->m * f->H * D, 4);
    a.dw = lsa_rig_out(&r, dw, f->m * f->H, 4);
    if (lsa_indexer_score_bwd(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

static double worst_z, worst_dq;

static void compare_fwd(const fixture *f, bool accumulate, const char *what) {
    float *want = LSA_GEN_NEW(float, f->m * f->n), *got = LSA_GEN_NEW(float, f->m * f->n);
    const lsa_tol tol = lsa_tol_score((double)f->H);
    run_fwd("ref", f, accumulate, want);
    run_fwd(lsa_gen_backend(), f, accumulate, got);
    assert_true(lsa_compare_f32(what, got, want, f->m * f->n, tol));
    for (int64_t i = 0; i < f->m && !accumulate; i++) /* padding is exactly zero */
        for (int64_t j = f->n_cand[i]; j < f->n; j++) assert_true(got[i * f->n + j] == 0.0f);
    const double e = lsa_worst_rel_f32(got, want, f->m * f->n) / tol.rtol;
    if (e > worst_z) worst_z = e;
    free(want), free(got);
}

static void compare_bwd(const fixture *f, const char *what) {
    const int64_t nq = f->m * f->H * D, nw = f->m * f->H;
    float *dq[2] = {LSA_GEN_NEW(float, nq), LSA_GEN_NEW(float, nq)},
          *dw[2] = {LSA_GEN_NEW(float, nw), LSA_GEN_NEW(float, nw)};
    const lsa_tol tol = lsa_tol_score_grad((double)f->n);
    run_bwd("ref", f, dq[0], dw[0]);
    run_bwd(lsa_gen_backend(), f, dq[1], dw[1]);
    assert_true(lsa_compare_f32(what, dq[1], dq[0], nq, tol));
    assert_true(lsa_compare_f32(what, dw[1], dw[0], nw, tol));
    const double e = lsa_worst_rel_f32(dq[1], dq[0], nq) / tol.rtol;
    if (e > worst_dq) worst_dq = e;
    for (int b = 0; b < 2; b++) free(dq[b]), free(dw[b]);
}

static void test_against_ref(void **s) {
    (void)s;
    static const int64_t shape[][3] = {{1, 8, 1},     {3, 8, 17},  {2, 32, 127},  {5, 32, 128}, {4, 64, 129},
                                       {3, 128, 257}, {4, 1, 300}, {3, 5, 33},    {2, 33, 64},  {3, 127, 50},
                                       {0, 8, 5},     {3, 8, 0},   {2, 16, 1000}, {9, 48, 90}};
    lsa_rng g = lsa_rng_make(6, 1);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int list = 0; list < 2; list++) {
            fixture f = make(shape[i][0], shape[i][1], shape[i][2], list, &g);
            char what[80];
            snprintf(what, sizeof what, "score m %lld H %lld n %lld list %d", (long long)f.m, (long long)f.H,
                     (long long)f.n, list);
            compare_fwd(&f, false, what);
            compare_fwd(&f, true, what);
            keep_away_from_kinks(&f);
            compare_bwd(&f, what);
            drop(&f);
        }
    printf("score: largest error is %.2f (forward) and %.2f (backward) of the bound\n", worst_z, worst_dq);
}

static void test_all_masked(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(6, 2);
    fixture f = make(3, 32, 70, true, &g);
    for (int i = 0; i < 3; i++) f.n_cand[i] = 0;
    for (int64_t k = 0; k < f.n_key * LSA_KEY_BYTES; k++)
        f.keys[k] = 0xff; /* NaN codes and NaN scales: must not be read */
    compare_fwd(&f, false, "all masked");
    compare_bwd(&f, "all masked");
    drop(&f);
}

/* Large and tiny logits keep their relative accuracy. */
static void test_scales(void **s) {
    (void)s;
    for (int big = 0; big < 2; big++) {
        lsa_rng g = lsa_rng_make(6, 3);
        fixture f = make(3, 32, 70, false, &g);
        for (int64_t k = 0; k < f.m * f.H * D; k++) f.q[k] *= big ? 1e18f : 1e-18f;
        for (int64_t k = 0; k < f.m * f.H; k++) f.w[k] *= big ? 1e15f : 1e-15f;
        compare_fwd(&f, false, "scaled");
        compare_bwd(&f, "scaled");
        drop(&f);
    }
}

/* NaN in one query or in one key reaches the scores that use it, and no other. */
static void test_nan(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(6, 4);
    fixture f = make(4, 8, 30, false, &g);
    float z[120], dq[4 * 8 * D], dw[32];
    for (int i = 0; i < 4; i++) f.n_cand[i] = 30, f.base[i] = i == 3 ? 30 : 0;
    f.q[(0 * 8 + 3) * D + 100] = NAN;
    f.keys[12 * LSA_KEY_BYTES + 5] = 0x7f;
    run_fwd(lsa_gen_backend(), &f, false, z);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 30; j++)
            assert_int_equal(isnan(z[i * 30 + j]) != 0, i == 0 || (i < 3 && j == 12));
    run_bwd(lsa_gen_backend(), &f, dq, dw);
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 8; h++)
            assert_int_equal(isnan(dw[i * 8 + h]) != 0,
                             i == 0 ? 1 : i < 3); /* key 12 is in reach of queries 0 to 2 */
    f.keys[12 * LSA_KEY_BYTES + 5] = 0x10;
    f.q[(0 * 8 + 3) * D + 100] = 0.5f;
    f.dz[1 * 30 + 7] = NAN;
    run_bwd(lsa_gen_backend(), &f, dq, dw);
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 8; h++) assert_int_equal(isnan(dw[i * 8 + h]) != 0, i == 1);
    drop(&f);
}

/* The formula itself on numbers small enough for a head: key e0 (value 1), H = 2. */
static void test_by_hand(void **s) {
    (void)s;
    float row[D] = {0}, q[2 * D] = {0}, w[2] = {0.5f, -2.0f}, z[2], dz[2] = {3.0f, 10.0f}, dq[2 * D], dw[2];
    uint8_t keys[2 * LSA_KEY_BYTES];
    row[0] = 448.0f; /* scale 1, code 448 */
    lsa_key_encode(keys, row);
    row[0] = -448.0f;
    lsa_key_encode(keys + LSA_KEY_BYTES, row);
    q[0] = 0.25f;
    q[D] = 0.125f;
    int64_t base = 0;
    int32_t n_cand = 2;
    fixture f = {1, 2, 2, 2, q, w, NULL, dz, keys, &base, NULL, &n_cand};
    run_fwd(lsa_gen_backend(), &f, false, z);
    assert_true(z[0] == 0.5f * 112.0f - 2.0f * 56.0f &&
                z[1] == 0.0f); /* the second key is inactive in both heads */
    run_bwd(lsa_gen_backend(), &f, dq, dw);
    assert_true(dw[0] == 3.0f * 112.0f && dw[1] == 3.0f * 56.0f);
    assert_true(dq[0] == 0.5f * 3.0f * 448.0f && dq[D] == -2.0f * 3.0f * 448.0f);
    for (int x = 1; x < D; x++) assert_true(dq[x] == 0.0f && dq[D + x] == 0.0f);
}

static void test_deterministic(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(6, 5);
    for (int list = 0; list < 2; list++) {
        fixture f = make(11, 32, 700, list, &g);
        const int64_t nz = f.m * f.n, nq = f.m * f.H * D, nw = f.m * f.H;
        float *z[2] = {LSA_GEN_NEW(float, nz), LSA_GEN_NEW(float, nz)},
              *dq[2] = {LSA_GEN_NEW(float, nq), LSA_GEN_NEW(float, nq)};
        float *dw[2] = {LSA_GEN_NEW(float, nw), LSA_GEN_NEW(float, nw)};
        const int nt = omp_get_max_threads();
        for (int b = 0; b < 2; b++) {
            omp_set_num_threads(b ? 4 : 1);
            run_fwd(lsa_gen_backend(), &f, false, z[b]);
            run_bwd(lsa_gen_backend(), &f, dq[b], dw[b]);
        }
        omp_set_num_threads(nt);
        assert_memory_equal(z[0], z[1], (size_t)nz * 4);
        assert_memory_equal(dq[0], dq[1], (size_t)nq * 4);
        assert_memory_equal(dw[0], dw[1], (size_t)nw * 4);
        for (int b = 0; b < 2; b++) free(z[b]), free(dq[b]), free(dw[b]);
        drop(&f);
    }
}

/* Key rows past 2^31 bytes of the pool: byte offsets must be 64-bit. Pages that are never touched cost
 * nothing on a host. */
static void test_far_keys(void **s) {
    (void)s;
    const int64_t n_key = 17000000, bytes = n_key * LSA_KEY_BYTES; /* 2.2 GB */
    lsa_rng g = lsa_rng_make(6, 6);
    fixture f = make(2, 8, 20, false, &g);
    lsa_err err = {0};
    lsa_ctx *c = lsa_gen_ctx(lsa_gen_backend());
    uint8_t *pool = NULL;
    if (lsa_gen_on_gpu()) {
        if (LSA_CTX_NEW(c, pool, bytes, &err) != LSA_OK) {
            printf("skipped: %s\n", err.msg);
            drop(&f);
            return;
        }
    } else {
        void *p = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        assert_true(p != MAP_FAILED);
        pool = p;
    }
    const int64_t at = n_key - f.n_key;
    f.n_cand[0] = f.n_cand[1] = 20;
    f.base[0] = 3, f.base[1] = 17;
    float near_z[40], far_z[40];
    run_fwd(lsa_gen_backend(), &f, false, near_z);
    assert_int_equal(
        lsa_ctx_upload(c, pool + at * LSA_KEY_BYTES, f.keys, (size_t)(f.n_key * LSA_KEY_BYTES), &err),
        LSA_OK);
    f.base[0] += at, f.base[1] += at;
    lsa_rig r;
    lsa_rig_open(&r, lsa_gen_backend(), 8);
    lsa_indexer_score_fwd_args a = {f.m, f.H, D, f.n, n_key, NULL, NULL, pool, NULL, NULL, NULL, false, NULL};
    a.q = lsa_rig_in(&r, f.q, f.m * f.H * D, 4);
    a.w = lsa_rig_in(&r, f.w, f.m * f.H, 4);
    a.key_base = lsa_rig_in(&r, f.base, f.m, 8);
    a.n_cand = lsa_rig_in(&r, f.n_cand, f.m, 4);
    a.z = lsa_rig_out(&r, far_z, f.m * f.n, 4);
    assert_int_equal(lsa_indexer_score_fwd(r.ctx, &a, &err), LSA_OK);
    lsa_rig_close(&r);
    assert_memory_equal(near_z, far_z, sizeof near_z);
    if (lsa_gen_on_gpu())
        lsa_ctx_free(c, pool);
    else
        munmap(pool, (size_t)bytes);
    drop(&f);
}

static void test_refuses(void **s) {
    (void)s;
    float x[D] = {0};
    uint8_t k[LSA_KEY_BYTES] = {0};
    int64_t base = 0;
    int32_t nc = 1;
    lsa_ctx *c = lsa_gen_ctx(lsa_gen_backend());
    const lsa_indexer_score_fwd_args ok = {1, 1, D, 1, 1, x, x, k, &base, NULL, &nc, false, x};
    lsa_indexer_score_fwd_args a;
    a = ok, a.d = 64;
    assert_int_equal(lsa_indexer_score_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.n_head = 129;
    assert_int_equal(lsa_indexer_score_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.n_head = 0;
    assert_int_equal(lsa_indexer_score_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.n_key = 0; /* columns but no keys */
    assert_int_equal(lsa_indexer_score_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.keys = NULL;
    assert_int_equal(lsa_indexer_score_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.z = NULL;
    assert_int_equal(lsa_indexer_score_fwd(c, &a, NULL), LSA_E_ARG);
    /* with no columns the gradient is still written, so its memory is still needed */
    const lsa_indexer_score_bwd_args b = {1, 1, D, 0, 0, x, x, NULL, &base, NULL, &nc, NULL, NULL, x};
    assert_int_equal(lsa_indexer_score_bwd(c, &b, NULL), LSA_E_ARG);
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_against_ref), cmocka_unit_test(test_all_masked),
                                   cmocka_unit_test(test_scales),      cmocka_unit_test(test_nan),
                                   cmocka_unit_test(test_by_hand),     cmocka_unit_test(test_deterministic),
                                   cmocka_unit_test(test_far_keys),    cmocka_unit_test(test_refuses)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
