/* gemm on the backend under test (LSA_BACKEND, default cpu) against `ref`. */
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

/* Host pointers in, host result out. */
static void run(const char *device, lsa_gemm_args a, int shift) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, shift);
    a.a = lsa_rig_in(&r, a.a, a.m * a.k, 4);
    a.b = lsa_rig_in(&r, a.b, a.k * a.n, 4);
    a.c = a.beta == 0.0f ? lsa_rig_out(&r, a.c, a.m * a.n, 4) : lsa_rig_inout(&r, a.c, a.m * a.n, 4);
    if (lsa_gemm(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

typedef struct fixture {
    float *a, *b, *c0, *want, *got;
} fixture;

static fixture make(int64_t m, int64_t n, int64_t k, lsa_rng *g) {
    fixture f = {LSA_GEN_NEW(float, m *k), LSA_GEN_NEW(float, k *n), LSA_GEN_NEW(float, m *n),
                 LSA_GEN_NEW(float, m *n), LSA_GEN_NEW(float, m *n)};
    lsa_gen_fill(f.a, m * k, 1, g);
    lsa_gen_fill(f.b, k * n, 1, g);
    lsa_gen_fill(f.c0, m * n, 1, g);
    memcpy(f.want, f.c0, (size_t)(m * n) * 4);
    memcpy(f.got, f.c0, (size_t)(m * n) * 4);
    return f;
}
static void drop(fixture *f) {
    free(f->a), free(f->b), free(f->c0), free(f->want), free(f->got);
}

static void test_against_ref(void **s) {
    (void)s;
    static const int64_t shape[][3] = {
        {1, 1, 1},      {3, 5, 7},     {33, 65, 129}, {1, 200, 64}, {200, 1, 64}, {64, 64, 1}, {31, 128, 256},
        {128, 33, 512}, {257, 96, 40}, {2, 3, 2048},  {0, 5, 3},    {5, 0, 3},    {5, 4, 0}};
    lsa_rng g = lsa_rng_make(1, 1);
    double worst = 0;
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int mode = 0; mode < 8; mode++) {
            const int64_t m = shape[i][0], n = shape[i][1], k = shape[i][2];
            fixture f = make(m, n, k, &g);
            lsa_gemm_args a = {
                mode & 1, mode & 2, m,     n, k, mode & 4 ? 0.37f : 1.0f, mode & 4 ? 1.0f : 0.0f,
                f.a,      f.b,      f.want};
            char what[64];
            snprintf(what, sizeof what, "gemm %lldx%lldx%lld mode %d", (long long)m, (long long)n,
                     (long long)k, mode);
            run("ref", a, 0);
            a.c = f.got;
            run(lsa_gen_backend(), a, mode & 1 ? 4 : 0);
            const lsa_tol t = lsa_tol_sum((double)k);
            assert_true(lsa_compare_f32(what, f.got, f.want, m * n, t));
            worst = fmax(worst, lsa_worst_rel_f32(f.got, f.want, m * n) / t.rtol);
            drop(&f);
        }
    printf("gemm: largest error is %.2f of the bound\n", worst);
}

/* NaN in one row of A reaches that row of C and no other; an infinity stays one. */
static void test_special_values(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(1, 2);
    fixture f = make(9, 11, 20, &g);
    f.a[3 * 20 + 7] = NAN;
    f.a[5 * 20 + 1] = INFINITY;
    lsa_gemm_args a = {false, false, 9, 11, 20, 1, 0, f.a, f.b, f.want};
    run("ref", a, 0);
    a.c = f.got;
    run(lsa_gen_backend(), a, 0);
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < 11; j++) assert_int_equal(isnan(f.got[i * 11 + j]) != 0, i == 3);
    assert_true(lsa_compare_f32("special values", f.got, f.want, 99, lsa_tol_sum(20)));
    drop(&f);
}

static void test_deterministic(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(1, 3);
    for (int mode = 0; mode < 4; mode++) {
        fixture f = make(130, 70, 300, &g);
        lsa_gemm_args a = {mode & 1, mode & 2, 130, 70, 300, 1, 0, f.a, f.b, f.want};
        const int nt = omp_get_max_threads();
        omp_set_num_threads(1);
        run(lsa_gen_backend(), a, 0);
        omp_set_num_threads(4);
        a.c = f.got;
        run(lsa_gen_backend(), a, 0);
        assert_memory_equal(f.got, f.want, 130 * 70 * 4);
        omp_set_num_threads(nt);
        drop(&f);
    }
}

static void test_refuses(void **s) {
    (void)s;
    float x[4] = {0};
    lsa_ctx *c = lsa_gen_ctx(lsa_gen_backend());
    const lsa_gemm_args ok = {false, false, 2, 2, 1, 1, 0, x, x, x};
    lsa_gemm_args a;
    lsa_err err = {0};
    a = ok, a.beta = 0.5f;
    assert_int_equal(lsa_gemm(c, &a, &err), LSA_E_ARG);
    assert_non_null(strstr(err.msg, "beta"));
    a = ok, a.m = -1;
    assert_int_equal(lsa_gemm(c, &a, NULL), LSA_E_ARG);
    a = ok, a.m = INT64_MAX / 2;
    assert_int_equal(lsa_gemm(c, &a, NULL), LSA_E_ARG);
    a = ok, a.b = NULL;
    assert_int_equal(lsa_gemm(c, &a, NULL), LSA_E_ARG);
    a = ok, a.c = NULL;
    assert_int_equal(lsa_gemm(c, &a, NULL), LSA_E_ARG);
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_against_ref), cmocka_unit_test(test_special_values),
                                   cmocka_unit_test(test_deterministic), cmocka_unit_test(test_refuses)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
