/* rmsnorm_fwd and rmsnorm_bwd on the backend under test against `ref`. */
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

static void run_fwd(const char *device, lsa_rmsnorm_fwd_args a) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 4);
    a.x = lsa_rig_in(&r, a.x, a.m * a.r, 4);
    a.g = lsa_rig_in(&r, a.g, a.r, 4);
    a.y = lsa_rig_out(&r, a.y, a.m * a.r, 4);
    a.rstd = lsa_rig_out(&r, a.rstd, a.m, 4);
    if (lsa_rmsnorm_fwd(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

/* alias: dx is written over dy, as the query path does. */
static void run_bwd(const char *device, lsa_rmsnorm_bwd_args a, bool alias) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 4);
    a.x = lsa_rig_in(&r, a.x, a.m * a.r, 4);
    a.g = lsa_rig_in(&r, a.g, a.r, 4);
    a.rstd = lsa_rig_in(&r, a.rstd, a.m, 4);
    if (alias) {
        memcpy(a.dx, a.dy, (size_t)(a.m * a.r) * 4);
        a.dx = lsa_rig_inout(&r, a.dx, a.m * a.r, 4);
        a.dy = a.dx;
    } else {
        a.dy = lsa_rig_in(&r, a.dy, a.m * a.r, 4);
        a.dx = lsa_rig_out(&r, a.dx, a.m * a.r, 4);
    }
    a.dg = a.accumulate ? lsa_rig_inout(&r, a.dg, a.r, 4) : lsa_rig_out(&r, a.dg, a.r, 4);
    if (lsa_rmsnorm_bwd(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

static void one(int64_t m, int64_t n, int mode, uint64_t seed) {
    lsa_rng g = lsa_rng_make(2, seed);
    float *x = LSA_GEN_NEW(float, m *n), *w = LSA_GEN_NEW(float, n), *dy = LSA_GEN_NEW(float, m *n);
    float *y[2], *rstd[2], *dx[2], *dg[2];
    for (int b = 0; b < 2; b++) {
        y[b] = LSA_GEN_NEW(float, m *n);
        dx[b] = LSA_GEN_NEW(float, m *n);
        rstd[b] = LSA_GEN_NEW(float, m);
        dg[b] = LSA_GEN_NEW(float, n);
    }
    lsa_gen_fill(x, m * n, 1, &g);
    lsa_gen_fill(w, n, 1, &g);
    lsa_gen_fill(dy, m * n, 1, &g);
    lsa_gen_fill(dg[0], n, 1, &g);
    memcpy(dg[1], dg[0], (size_t)n * 4);
    for (int64_t j = 0; j < n && m > 2;
         j++) { /* rows that overflow a float square, vanish, or are subnormal */
        x[j] *= 1e25f;
        x[n + j] = 0;
        x[2 * n + j] *= 1e-41f;
    }
    if (mode == 3 && m > 3) x[3 * n + n / 2] = NAN;
    const char *dev[2] = {"ref", lsa_gen_backend()};
    for (int b = 0; b < 2; b++) {
        run_fwd(dev[b], (lsa_rmsnorm_fwd_args){m, n, 1e-6f, x, w, y[b], rstd[b]});
        run_bwd(dev[b],
                (lsa_rmsnorm_bwd_args){m, n, x, w, rstd[0], dy, mode == 2 ? NULL : dx[b], dg[b], mode == 1},
                mode == 0 || mode == 3);
    }
    for (int64_t i = 0; i < m; i++) { /* row by row: their sizes differ by 60 orders of magnitude */
        assert_true(lsa_compare_f32("y", y[1] + i * n, y[0] + i * n, n, lsa_tol_elem()));
        if (mode != 2)
            assert_true(lsa_compare_f32("dx", dx[1] + i * n, dx[0] + i * n, n, lsa_tol_sum((double)n)));
    }
    assert_true(lsa_compare_f32("rstd", rstd[1], rstd[0], m, lsa_tol_elem()));
    assert_true(lsa_compare_f32("dg", dg[1], dg[0], n, lsa_tol_sum((double)m)));
    if (mode == 3 && m > 3)
        for (int64_t j = 0; j < n; j++) assert_true(isnan(y[1][3 * n + j]) && !isnan(y[1][4 * n + j]));
    for (int b = 0; b < 2; b++) free(y[b]), free(dx[b]), free(rstd[b]), free(dg[b]);
    free(x), free(w), free(dy);
}

static void test_against_ref(void **s) {
    (void)s;
    static const int64_t shape[][2] = {{1, 1}, {5, 48}, {33, 257}, {0, 8}, {7, 2048}, {300, 31}};
    uint64_t seed = 0;
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int mode = 0; mode < 4; mode++) one(shape[i][0], shape[i][1], mode, seed++);
}

/* Bit-equal for 1 and 4 threads; with 16 rows every element of dg has many terms. */
static void test_deterministic(void **s) {
    (void)s;
    enum { M = 64, N = 333 };
    static float x[M * N], w[N], dy[M * N], rstd[M], y[2][M * N], dx[2][M * N], dg[2][N], rs[2][M];
    lsa_rng g = lsa_rng_make(2, 99);
    lsa_gen_fill(x, M * N, 1, &g);
    lsa_gen_fill(w, N, 1, &g);
    lsa_gen_fill(dy, M * N, 1, &g);
    lsa_gen_fill(rstd, M, 1, &g);
    const int nt = omp_get_max_threads();
    for (int b = 0; b < 2; b++) {
        omp_set_num_threads(b ? 4 : 1);
        run_fwd(lsa_gen_backend(), (lsa_rmsnorm_fwd_args){M, N, 1e-6f, x, w, y[b], rs[b]});
        run_bwd(lsa_gen_backend(), (lsa_rmsnorm_bwd_args){M, N, x, w, rstd, dy, dx[b], dg[b], false}, false);
    }
    omp_set_num_threads(nt);
    assert_memory_equal(y[0], y[1], sizeof y[0]);
    assert_memory_equal(rs[0], rs[1], sizeof rs[0]);
    assert_memory_equal(dx[0], dx[1], sizeof dx[0]);
    assert_memory_equal(dg[0], dg[1], sizeof dg[0]);
}

static void test_refuses(void **s) {
    (void)s;
    float x[4] = {0};
    lsa_ctx *c = lsa_gen_ctx(lsa_gen_backend());
    lsa_rmsnorm_fwd_args f = {1, 4, 1e-6f, x, x, x, NULL};
    assert_int_equal(lsa_rmsnorm_fwd(c, &f, NULL), LSA_E_ARG);
    f = (lsa_rmsnorm_fwd_args){1, 0, 1e-6f, x, x, x, x};
    assert_int_equal(lsa_rmsnorm_fwd(c, &f, NULL), LSA_E_ARG);
    lsa_rmsnorm_bwd_args b = {1, 4, x, x, x, x, x, NULL, false};
    assert_int_equal(lsa_rmsnorm_bwd(c, &b, NULL), LSA_E_ARG);
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_against_ref), cmocka_unit_test(test_deterministic),
                                   cmocka_unit_test(test_refuses)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
