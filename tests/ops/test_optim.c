/* adamw and sumsq on the backend under test against `ref`. */
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

#include "kernels/ops.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/tol.h"

static void run_adamw(const char *device, lsa_adamw_args a) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 4);
    a.g = lsa_rig_in(&r, a.g, a.n, 4);
    a.p = lsa_rig_inout(&r, a.p, a.n, 4);
    a.m = lsa_rig_inout(&r, a.m, a.n, 4);
    a.v = lsa_rig_inout(&r, a.v, a.n, 4);
    if (lsa_adamw(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

static void test_adamw(void **s) {
    (void)s;
    static const int64_t size[] = {0, 1, 3, 255, 256, 257, 100003};
    for (size_t k = 0; k < sizeof size / sizeof *size; k++) {
        const int64_t n = size[k];
        lsa_rng r = lsa_rng_make(4, (uint64_t)n);
        float *g = LSA_GEN_NEW(float, n), *p[3], *m[3], *v[3];
        for (int b = 0; b < 3; b++)
            p[b] = LSA_GEN_NEW(float, n), m[b] = LSA_GEN_NEW(float, n), v[b] = LSA_GEN_NEW(float, n);
        lsa_gen_fill(p[0], n, 1, &r);
        for (int b = 1; b < 3; b++) memcpy(p[b], p[0], (size_t)n * 4);
        for (int64_t t = 1; t <= 4; t++) {
            lsa_gen_fill(g, n, 0.1f, &r);
            for (int64_t i = 0; i < n; i += 5)
                g[i] = i % 2 ? 0.0f : g[i] * 1e-9f; /* at rest, and where eps matters */
            for (int b = 0; b < 3; b++) {
                const int nt = omp_get_max_threads();
                if (b == 2) omp_set_num_threads(4);
                run_adamw(b ? lsa_gen_backend() : "ref", (lsa_adamw_args){n, t, 1e-2f, 0.9f, 0.999f, 1e-8f,
                                                                          0.05f, 0.7f, g, p[b], m[b], v[b]});
                omp_set_num_threads(nt);
            }
        }
        /* every step adds its roundings: 4 steps */
        const lsa_tol tol = {1e-37, 4 * lsa_tol_elem().rtol, 1e-11};
        assert_true(lsa_compare_f32("adamw p", p[1], p[0], n, tol));
        assert_true(lsa_compare_f32("adamw m", m[1], m[0], n, tol));
        assert_true(lsa_compare_f32("adamw v", v[1], v[0], n, tol));
        assert_memory_equal(p[1], p[2], (size_t)n * 4);
        assert_memory_equal(m[1], m[2], (size_t)n * 4);
        assert_memory_equal(v[1], v[2], (size_t)n * 4);
        for (int b = 0; b < 3; b++) free(p[b]), free(m[b]), free(v[b]);
        free(g);
    }
}

/* First step by hand: m/(1-b1) = g, v/(1-b2) = g^2, so p moves by lr * sign(g), after decay. */
static void test_adamw_by_hand(void **s) {
    (void)s;
    float g[3] = {2.0f, -0.5f, 0.0f}, p[3] = {1.0f, 1.0f, 1.0f}, m[3] = {0}, v[3] = {0};
    run_adamw(lsa_gen_backend(), (lsa_adamw_args){3, 1, 0.1f, 0.9f, 0.999f, 1e-8f, 0.5f, 1, g, p, m, v});
    const float want[3] = {0.85f, 1.05f, 0.95f};
    assert_true(lsa_compare_f32("first step", p, want, 3, lsa_tol_elem()));
    g[0] = NAN;
    run_adamw(lsa_gen_backend(), (lsa_adamw_args){3, 2, 0.1f, 0.9f, 0.999f, 1e-8f, 0.5f, 1, g, p, m, v});
    assert_true(isnan(p[0]) && !isnan(p[1]) && !isnan(p[2]));
}

static double run_sumsq(const char *device, const float *x, int64_t n) {
    lsa_rig r;
    lsa_err err = {0};
    double out = 0;
    lsa_rig_open(&r, device, 8);
    const float *dx = lsa_rig_in(&r, x, n, 4);
    double *o = lsa_rig_out(&r, &out, 1, sizeof out);
    if (lsa_sumsq(r.ctx, &(lsa_sumsq_args){n, dx, o}, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
    return out;
}

static void test_sumsq(void **s) {
    (void)s;
    static const int64_t size[] = {0, 1, 2, 65535, 65536, 65537, 400001};
    for (size_t k = 0; k < sizeof size / sizeof *size; k++) {
        lsa_rng r = lsa_rng_make(5, (uint64_t)size[k]);
        float *x = LSA_GEN_NEW(float, size[k]);
        /* whole numbers: the sum is exact in any order, so backends must agree to the bit */
        for (int64_t i = 0; i < size[k]; i++) x[i] = (float)lsa_gen_range(&r, -1000, 1000);
        assert_true(run_sumsq(lsa_gen_backend(), x, size[k]) == run_sumsq("ref", x, size[k]));
        lsa_gen_fill(x, size[k], 1e20f, &r); /* squares overflow a float */
        const double want = run_sumsq("ref", x, size[k]), got = run_sumsq(lsa_gen_backend(), x, size[k]);
        assert_true(lsa_compare_f64("sumsq", &got, &want, 1, (lsa_tol){0, 1e-12, 0}));
        const int nt = omp_get_max_threads();
        omp_set_num_threads(4);
        assert_true(run_sumsq(lsa_gen_backend(), x, size[k]) == got);
        omp_set_num_threads(nt);
        if (size[k]) {
            x[size[k] - 1] = NAN;
            assert_true(isnan(run_sumsq(lsa_gen_backend(), x, size[k])));
        }
        free(x);
    }
}

static void test_refuses(void **s) {
    (void)s;
    float x[1] = {0};
    double o;
    lsa_ctx *c = lsa_gen_ctx(lsa_gen_backend());
    lsa_adamw_args a = {1, 0, 0.1f, 0.9f, 0.999f, 1e-8f, 0, 1, x, x, x, x};
    assert_int_equal(lsa_adamw(c, &a, NULL), LSA_E_ARG);
    a.t = 1, a.beta2 = 1.0f;
    assert_int_equal(lsa_adamw(c, &a, NULL), LSA_E_ARG);
    a.beta2 = 0.9f, a.v = NULL;
    assert_int_equal(lsa_adamw(c, &a, NULL), LSA_E_ARG);
    assert_int_equal(lsa_sumsq(c, &(lsa_sumsq_args){1, NULL, &o}, NULL), LSA_E_ARG);
    assert_int_equal(lsa_sumsq(c, &(lsa_sumsq_args){0, NULL, NULL}, NULL), LSA_E_ARG);
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_adamw), cmocka_unit_test(test_adamw_by_hand),
                                   cmocka_unit_test(test_sumsq), cmocka_unit_test(test_refuses)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
