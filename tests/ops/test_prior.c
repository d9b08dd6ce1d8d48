/* prior_fwd and _bwd on the backend under test: the feature against the C library's logarithm in double, sums
 * against the definition written once more here and against finite differences; all backends give the bits of
 * `ref`. */
#include <math.h>
#include <omp.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "kernels/model/indexer.h"
#include "kernels/ops.h"
#include "kernels/prior.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/tol.h"

typedef struct fixture {
    int64_t m, n;
    float *recent, *memory, *z, *dz, weight[LSA_PRIOR_WEIGHTS];
    int32_t *n_cand;
} fixture;

/* Features of which two thirds are 0, as they are. */
static fixture make(int64_t m, int64_t n, lsa_rng *g) {
    fixture f = {m, n, NULL, NULL, NULL, NULL, {0.75f, -0.3125f}, NULL};
    float **p[] = {&f.recent, &f.memory, &f.z, &f.dz};
    for (int k = 0; k < 4; k++) {
        *p[k] = LSA_GEN_NEW(float, m *n);
        lsa_gen_fill(*p[k], m * n, 1, g);
        for (int64_t i = 0; k < 2 && i < m * n; i++) (*p[k])[i] = fmaxf(0, (*p[k])[i] - 0.4f);
    }
    f.n_cand = LSA_GEN_NEW(int32_t, m);
    for (int64_t i = 0; i < m; i++) f.n_cand[i] = (int32_t)(i == 0 ? n : i == 1 ? 0 : lsa_gen_range(g, 0, n));
    for (int64_t i = 0; i < m; i++) /* what lies behind the candidates must not be read */
        for (int64_t c = i * n + f.n_cand[i]; c < (i + 1) * n; c++) f.recent[c] = f.memory[c] = f.dz[c] = NAN;
    return f;
}
static void drop(fixture *f) {
    free(f->recent), free(f->memory), free(f->z), free(f->dz), free(f->n_cand);
}

static void run_fwd(const char *device, const fixture *f, float *z) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 4);
    lsa_prior_fwd_args a = {.m = f->m, .n = f->n};
    a.recent = lsa_rig_in(&r, f->recent, f->m * f->n, 4);
    a.memory = lsa_rig_in(&r, f->memory, f->m * f->n, 4);
    a.weight = lsa_rig_in(&r, f->weight, LSA_PRIOR_WEIGHTS, 4);
    a.n_cand = lsa_rig_in(&r, f->n_cand, f->m, 4);
    if (f->m > 0 && f->n > 0) memcpy(z, f->z, (size_t)(f->m * f->n) * 4);
    a.z = lsa_rig_inout(&r, z, f->m * f->n, 4);
    if (lsa_prior_fwd(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}
static void run_bwd(const char *device, const fixture *f, float *dweight) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 4);
    lsa_prior_bwd_args a = {.m = f->m, .n = f->n};
    a.recent = lsa_rig_in(&r, f->recent, f->m * f->n, 4);
    a.memory = lsa_rig_in(&r, f->memory, f->m * f->n, 4);
    a.dz = lsa_rig_in(&r, f->dz, f->m * f->n, 4);
    a.n_cand = lsa_rig_in(&r, f->n_cand, f->m, 4);
    a.dweight = lsa_rig_out(&r, dweight, LSA_PRIOR_WEIGHTS, 4);
    if (lsa_prior_bwd(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

/* ln(1 + x / UNIT) over the masses that occur and far beyond; 0 exactly at 0. */
static void test_feature(void **s) {
    (void)s;
    double worst = 0;
    int64_t seen = 0;
    for (float x = 1e-9f; x < 1e6f; x *= 1.0007f, seen++) {
        const double want = log1p((double)x / (double)LSA_PRIOR_UNIT), got = (double)lsa_prior_feature(x);
        /* 1 + x / UNIT is rounded, which is felt where it is near 1 */
        const double off = fabs(got - want) / (want + 2 * (double)LSA_U);
        if (!(off <= 6 * (double)LSA_U || fabs(got - want) <= 2 * (double)LSA_U))
            fail_msg("x = %g: %.9g, expected %.9g", (double)x, got, want);
        worst = fmax(worst, want > 0.5 ? off : 0);
    }
    assert_true(seen > 40000);
    assert_true(lsa_prior_feature(0.0f) == 0.0f && lsa_prior_feature(-0.0f) == 0.0f);
    assert_true(isnan(lsa_prior_feature(NAN)));
    for (float x = 0; x < 1e-2f; x += 1e-5f) assert_true(lsa_prior_feature(x + 1e-5f) > lsa_prior_feature(x));
    printf("feature: off by at most %.2g of itself\n", worst);
}

/* A window that ends: recent masses go into the memory. By hand. */
static void test_end_window(void **s) {
    (void)s;
    float recent[] = {1, 0, 0.5f}, memory[] = {0, 2, 1}, p[3];
    const float w[] = {2, 0};
    lsa_prior_end_window(recent, memory, 3);
    for (int c = 0; c < 3; c++) assert_true(recent[c] == 0.0f);
    assert_true(memory[0] == 1.0f && memory[1] == 2 * LSA_PRIOR_DECAY && memory[2] == 0.5f + LSA_PRIOR_DECAY);
    recent[1] = LSA_PRIOR_UNIT;
    lsa_prior_values(p, recent, memory, w, 3);
    assert_true(p[0] == 0.0f && p[2] == 0.0f && fabs((double)p[1] - 2 * log(2)) < 1e-6);
}

static void test_definition(void **s) {
    (void)s;
    static const int64_t shape[][2] = {{1, 1}, {3, 17},  {4, 64},   {0, 8},
                                       {3, 0}, {9, 300}, {5, 1024}, {2, 2049}};
    lsa_rng g = lsa_rng_make(32, 1);
    for (size_t k = 0; k < sizeof shape / sizeof *shape; k++) {
        fixture f = make(shape[k][0], shape[k][1], &g);
        const int64_t n = f.m * f.n;
        float *z = LSA_GEN_NEW(float, n), *ref = LSA_GEN_NEW(float, n), d[2], dref[2];
        double sum[2] = {0, 0}, size[2] = {1e-30, 1e-30};
        run_fwd(lsa_gen_backend(), &f, z);
        run_fwd("ref", &f, ref);
        if (n) assert_memory_equal(z, ref, (size_t)n * 4);
        run_bwd(lsa_gen_backend(), &f, d);
        run_bwd("ref", &f, dref);
        for (int64_t i = 0; i < n; i++) {
            const bool in = i % f.n < f.n_cand[i / f.n];
            double want = (double)f.z[i];
            for (int w = 0; in && w < 2; w++) {
                const double x = (double)(w ? f.memory : f.recent)[i];
                want += (double)f.weight[w] * x;
                sum[w] += x * (double)f.dz[i];
                size[w] += fabs(x * (double)f.dz[i]);
            }
            if (!in) assert_true(z[i] == f.z[i]);
            if (in && f.recent[i] == 0.0f && f.memory[i] == 0.0f) assert_true(z[i] == f.z[i]);
            assert_true(fabs((double)z[i] - want) <= 4 * (double)LSA_U * (1 + fabs(want)));
        }
        for (int w = 0; w < 2; w++) {
            assert_true(fabs((double)d[w] - sum[w]) <= 2 * (double)LSA_U * size[w]);
            assert_true(fabs((double)dref[w] - sum[w]) <= 2 * (double)LSA_U * size[w]);
        }
        free(z), free(ref), drop(&f);
    }
}

/* Slopes of sum(dz * z) along the weights: the function is linear, so a wide step is exact. */
static void test_finite_differences(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(32, 2);
    fixture f = make(4, 70, &g);
    float d[2], *z = LSA_GEN_NEW(float, 280);
    run_bwd(lsa_gen_backend(), &f, d);
    for (int w = 0; w < 2; w++) {
        double v[2] = {0, 0};
        const float at = f.weight[w];
        for (int side = 0; side < 2; side++) {
            f.weight[w] = side ? at - 0.5f : at + 0.5f;
            run_fwd(lsa_gen_backend(), &f, z);
            for (int64_t i = 0; i < 280; i++)
                if (i % 70 < f.n_cand[i / 70]) v[side] += (double)z[i] * (double)f.dz[i];
        }
        f.weight[w] = at;
        assert_true(fabs((double)d[w]) > 0.1);
        assert_true(fabs((v[0] - v[1]) - (double)d[w]) <= 1e-5 * (1 + fabs((double)d[w])));
    }
    free(z), drop(&f);
}

static void test_deterministic(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(32, 3);
    fixture f = make(23, 700, &g);
    float a[2], b[2];
    const int nt = omp_get_max_threads();
    omp_set_num_threads(1);
    run_bwd(lsa_gen_backend(), &f, a);
    omp_set_num_threads(4);
    run_bwd(lsa_gen_backend(), &f, b);
    omp_set_num_threads(nt);
    assert_memory_equal(a, b, sizeof a);
    drop(&f);
}

static void test_refuses(void **s) {
    (void)s;
    float x[4] = {0};
    int32_t nc = 4;
    lsa_err err = {0};
    lsa_ctx *c = lsa_gen_ctx(lsa_gen_backend());
    const lsa_prior_fwd_args ok = {1, 4, x, x, x, &nc, x};
    const lsa_prior_bwd_args back = {1, 4, x, x, x, &nc, x};
    lsa_prior_fwd_args a;
    lsa_prior_bwd_args b;
    a = ok, a.memory = NULL;
    assert_int_equal(lsa_prior_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.m = -1;
    assert_int_equal(lsa_prior_fwd(c, &a, NULL), LSA_E_ARG);
    b = back, b.dweight = NULL;
    assert_int_equal(lsa_prior_bwd(c, &b, NULL), LSA_E_ARG);
    assert_int_equal(lsa_indexer_prior_check(x, "x", &err), LSA_OK);
    x[1] = INFINITY;
    assert_int_equal(lsa_indexer_prior_check(x, "x", &err), LSA_E_FORMAT);
    assert_string_equal(err.msg, "x: prior: w_2 is inf; expected a finite number");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_feature),       cmocka_unit_test(test_end_window),
        cmocka_unit_test(test_definition),    cmocka_unit_test(test_finite_differences),
        cmocka_unit_test(test_deterministic), cmocka_unit_test(test_refuses)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
