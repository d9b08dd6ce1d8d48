/* continuation_fwd and _bwd on the backend under test: against numbers that can be checked by hand, against
 * the definition written once more here, against finite differences, and by what a routing must conserve.
 * Forward is compared bit by bit: it is one subtraction and comparisons. */
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

#include "kernels/core/lsa_ids.h"
#include "kernels/continuation.h"
#include "kernels/model/indexer.h"
#include "kernels/ops.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/tol.h"

typedef struct fixture {
    int64_t m, n;
    int32_t reach;
    float *z, *cost, *dout;
    int32_t *n_cand;
} fixture;

/* Scores and costs of one size, so that every distance wins somewhere; whole numbers (ties) when `ties`. */
static fixture make(int64_t m, int64_t n, int32_t reach, bool ties, lsa_rng *g) {
    fixture f = {m, n, reach, NULL, NULL, NULL, NULL};
    f.z = LSA_GEN_NEW(float, m *n);
    f.cost = LSA_GEN_NEW(float, reach);
    f.dout = LSA_GEN_NEW(float, m *n);
    f.n_cand = LSA_GEN_NEW(int32_t, m);
    lsa_gen_fill(f.z, m * n, 2, g);
    lsa_gen_fill(f.cost, reach, 1, g);
    lsa_gen_fill(f.dout, m * n, 1, g);
    for (int64_t k = 0; ties && k < m * n; k++) f.z[k] = roundf(f.z[k]);
    for (int32_t j = 0; j < reach; j++) f.cost[j] = ties ? (float)(j % 3) : fabsf(f.cost[j]);
    for (int64_t i = 0; i < m; i++) f.n_cand[i] = (int32_t)(i == 0 ? n : i == 1 ? 0 : lsa_gen_range(g, 0, n));
    for (int64_t i = 0; i < m; i++) /* what lies behind the candidates must not be read */
        for (int64_t c = f.n_cand[i]; c < n; c++) f.z[i * n + c] = f.dout[i * n + c] = NAN;
    return f;
}
static void drop(fixture *f) {
    free(f->z), free(f->cost), free(f->dout), free(f->n_cand);
}

static void run_fwd(const char *device, const fixture *f, float *out, uint8_t *from) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 4);
    lsa_continuation_fwd_args a = {.m = f->m, .n = f->n, .reach = f->reach};
    a.z = lsa_rig_in(&r, f->z, f->m * f->n, 4);
    a.cost = lsa_rig_in(&r, f->cost, f->reach, 4);
    a.n_cand = lsa_rig_in(&r, f->n_cand, f->m, 4);
    a.out = lsa_rig_out(&r, out, f->m * f->n, 4);
    a.from = lsa_rig_out(&r, from, f->m * f->n, 1);
    if (lsa_continuation_fwd(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}
static void run_bwd(const char *device, const fixture *f, const uint8_t *from, float *dz, float *dcost) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 4);
    lsa_continuation_bwd_args a = {.m = f->m, .n = f->n, .reach = f->reach};
    a.from = lsa_rig_in(&r, from, f->m * f->n, 1);
    a.dout = lsa_rig_in(&r, f->dout, f->m * f->n, 4);
    a.n_cand = lsa_rig_in(&r, f->n_cand, f->m, 4);
    a.dz = lsa_rig_out(&r, dz, f->m * f->n, 4);
    a.dcost = lsa_rig_out(&r, dcost, f->reach, 4);
    if (lsa_continuation_bwd(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

typedef struct result {
    float *out, *dz, *dcost;
    uint8_t *from;
} result;
static result run(const char *device, const fixture *f) {
    const int64_t n = f->m * f->n;
    result r = {LSA_GEN_NEW(float, n), LSA_GEN_NEW(float, n), LSA_GEN_NEW(float, f->reach),
                LSA_GEN_NEW(uint8_t, n)};
    run_fwd(device, f, r.out, r.from);
    run_bwd(device, f, r.from, r.dz, r.dcost);
    return r;
}
static void forget(result *r) {
    free(r->out), free(r->dz), free(r->dcost), free(r->from);
}

/* The definition, once more: all values in a list, the largest, the first of equals. */
static void check_definition(const fixture *f, const result *r) {
    for (int64_t i = 0; i < f->m; i++)
        for (int64_t c = 0; c < f->n; c++) {
            float want = 0;
            int from = 0;
            for (int j = f->reach; c < f->n_cand[i] && j >= 0;
                 j--) { /* from the far end: equals are replaced */
                if (j > c) continue;
                const float v = j ? f->z[i * f->n + c - j] - f->cost[j - 1] : f->z[i * f->n + c];
                if (j == (c < f->reach ? c : f->reach) || v >= want) want = v, from = j;
            }
            if (!(r->out[i * f->n + c] == want) || r->from[i * f->n + c] != from)
                fail_msg("row %lld, chunk %lld: %g from %d, expected %g from %d", (long long)i, (long long)c,
                         (double)r->out[i * f->n + c], r->from[i * f->n + c], (double)want, from);
        }
}

/* Nothing of the gradient is lost or made: over a row dz adds up to dout, and the costs take what was moved.
 */
static void check_routing(const fixture *f, const result *r) {
    double moved = 0, costs = 0, size = 0;
    for (int64_t i = 0; i < f->m; i++) {
        double in = 0, out = 0;
        for (int64_t c = 0; c < f->n; c++) {
            out += (double)r->dz[i * f->n + c];
            if (c >= f->n_cand[i]) {
                assert_true(r->dz[i * f->n + c] == 0.0f);
                continue;
            }
            in += (double)f->dout[i * f->n + c];
            size += fabs((double)f->dout[i * f->n + c]);
            if (r->from[i * f->n + c]) moved += (double)f->dout[i * f->n + c];
        }
        assert_true(fabs(in - out) <= 1e-6 * (size + 1));
    }
    for (int32_t j = 0; j < f->reach; j++) costs += (double)r->dcost[j];
    assert_true(fabs(costs + moved) <= 1e-6 * (size + 1));
}

static void test_definition(void **s) {
    (void)s;
    static const int64_t shape[][3] = {{1, 1, 1},    {3, 17, 16},  {4, 64, 1},    {3, 5, 64},
                                       {4, 511, 16}, {3, 513, 16}, {2, 1030, 64}, {0, 8, 4},
                                       {3, 0, 16},   {9, 300, 7},  {5, 1024, 16}, {2, 2049, 3}};
    lsa_rng g = lsa_rng_make(31, 1);
    int64_t lent = 0;
    for (size_t k = 0; k < sizeof shape / sizeof *shape; k++)
        for (int ties = 0; ties < 2; ties++) {
            fixture f = make(shape[k][0], shape[k][1], (int32_t)shape[k][2], ties, &g);
            result got = run(lsa_gen_backend(), &f), want = run("ref", &f);
            const int64_t n = f.m * f.n;
            check_definition(&f, &got);
            check_routing(&f, &got);
            assert_memory_equal(got.out, want.out, (size_t)n * 4);
            assert_memory_equal(got.from, want.from, (size_t)n);
            assert_true(lsa_compare_f32("dz", got.dz, want.dz, n, lsa_tol_sum(f.reach + 1)));
            assert_true(lsa_compare_f32("dcost", got.dcost, want.dcost, f.reach, lsa_tol_sum(1)));
            for (int64_t c = 0; c < n; c++) lent += got.from[c] > 0;
            forget(&got), forget(&want), drop(&f);
        }
    assert_true(lent > 1000); /* or the test saw nothing */
}

/* Five chunks, reach 2, costs 1 and 3: a peak of 10 is lent for 9 and 7; equal values stay where they are. */
static void test_by_hand(void **s) {
    (void)s;
    float z[] = {10, 0, 0, 6, 5}, cost[] = {1, 3}, dout[] = {1, 2, 4, 8, 16}, out[5], dz[5], dcost[2];
    uint8_t from[5];
    int32_t n_cand = 5;
    fixture f = {1, 5, 2, z, cost, dout, &n_cand};
    const float want[] = {10, 9, 7, 6, 5}, want_dz[] = {7, 0, 0, 8, 16};
    const uint8_t want_from[] = {0, 1, 2, 0, 0}; /* the last: 6 - 1 equals its own 5 */
    run_fwd(lsa_gen_backend(), &f, out, from);
    run_bwd(lsa_gen_backend(), &f, from, dz, dcost);
    assert_memory_equal(out, want, sizeof want);
    assert_memory_equal(from, want_from, sizeof from);
    assert_memory_equal(dz, want_dz, sizeof dz);
    assert_true(dcost[0] == -2.0f && dcost[1] == -4.0f);
    n_cand = 2; /* chunks behind the candidates lend and take nothing */
    run_fwd(lsa_gen_backend(), &f, out, from);
    run_bwd(lsa_gen_backend(), &f, from, dz, dcost);
    assert_true(out[1] == 9 && out[2] == 0 && out[4] == 0 && from[2] == 0 && dz[0] == 3 && dz[2] == 0);
    assert_true(dcost[0] == -2.0f && dcost[1] == 0.0f);
}

/* Costs so high that nothing is lent give back the scores and the gradient bit by bit. */
static void test_too_dear(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(31, 2);
    fixture f = make(3, 200, 16, false, &g);
    for (int j = 0; j < 16; j++) f.cost[j] = 1e6f;
    result r = run(lsa_gen_backend(), &f);
    for (int64_t i = 0; i < 3; i++)
        for (int64_t c = 0; c < f.n_cand[i]; c++)
            assert_true(r.out[i * 200 + c] == f.z[i * 200 + c] && r.dz[i * 200 + c] == f.dout[i * 200 + c]);
    for (int j = 0; j < 16; j++) assert_true(r.dcost[j] == 0.0f);
    forget(&r), drop(&f);
}

static double value(const fixture *f) {
    float *out = LSA_GEN_NEW(float, f->m * f->n);
    uint8_t *from = LSA_GEN_NEW(uint8_t, f->m * f->n);
    double sum = 0;
    run_fwd(lsa_gen_backend(), f, out, from);
    for (int64_t i = 0; i < f->m; i++)
        for (int64_t c = 0; c < f->n_cand[i]; c++)
            sum += (double)f->dout[i * f->n + c] * (double)out[i * f->n + c];
    free(out), free(from);
    return sum;
}

/* Slopes of sum(dout * out): scores lie on a grid of 1/16, costs at least 1/128 off it and each other, so
 * that no two values are closer than 1/128 and a step of 1/512 changes no winner; then the slope is exact. */
static void test_finite_differences(void **s) {
    (void)s;
    const float h = 0x1p-9f;
    lsa_rng g = lsa_rng_make(31, 3);
    fixture f = make(3, 40, 6, false, &g);
    for (int64_t k = 0; k < 120; k++)
        f.z[k] = roundf(f.z[k] * 16) / 16, f.dout[k] = roundf(f.dout[k] * 8) / 8;
    for (int j = 0; j < 6; j++) f.cost[j] = roundf(f.cost[j] * 16) / 16 + (float)(j + 1) / 128;
    result r = run(lsa_gen_backend(), &f);
    int moved = 0;
    for (int k = 0; k < 126; k++) {
        float *x = k < 120 ? &f.z[k] : &f.cost[k - 120];
        if (k < 120 && k % 40 >= f.n_cand[k / 40]) continue;
        const float x0 = *x, want = k < 120 ? r.dz[k] : r.dcost[k - 120];
        *x = x0 + h;
        const double above = value(&f);
        *x = x0 - h;
        const double below = value(&f), slope = (above - below) / (2 * (double)h);
        *x = x0;
        if (!(fabs(slope - (double)want) <= 1e-9))
            fail_msg("input %d: slope %.9g, gradient %.9g", k, slope, (double)want);
        moved += k >= 120 && want != 0;
    }
    assert_true(moved >= 4);
    forget(&r), drop(&f);
}

/* A NaN score stays at its chunk; a NaN gradient goes where its score came from. */
static void test_nan(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(31, 4);
    fixture f = make(3, 60, 16, false, &g);
    for (int i = 0; i < 3; i++) {
        f.n_cand[i] = 60;
        lsa_gen_fill(f.z + i * 60, 60, 2, &g);
        lsa_gen_fill(f.dout + i * 60, 60, 1, &g);
    }
    f.z[60 + 20] = NAN;
    result r = run(lsa_gen_backend(), &f);
    for (int k = 0; k < 180; k++) assert_int_equal(isnan(r.out[k]) != 0, k == 80);
    assert_int_equal(r.from[80], 0);
    f.dout[120 + 7] = NAN;
    run_bwd(lsa_gen_backend(), &f, r.from, r.dz, r.dcost);
    for (int k = 0; k < 180; k++) assert_int_equal(isnan(r.dz[k]) != 0, k == 127 - r.from[127]);
    for (int j = 1; j <= 16; j++) assert_int_equal(isnan(r.dcost[j - 1]) != 0, j == r.from[127]);
    forget(&r), drop(&f);
}

/* The host function in place gives what it gives beside. */
static void test_in_place(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(31, 5);
    for (int64_t n = 0; n < 2600; n += 1 + n / 2) {
        fixture f = make(1, n, 16, true, &g);
        float *out = LSA_GEN_NEW(float, n);
        lsa_continue(out, NULL, f.z, n, f.cost, 16);
        lsa_continue(f.z, NULL, f.z, n, f.cost, 16);
        assert_memory_equal(out, f.z, (size_t)n * 4);
        lsa_continue(f.z, NULL, f.z, n, f.cost, 0);
        assert_memory_equal(out, f.z, (size_t)n * 4);
        free(out), drop(&f);
    }
}

static void test_deterministic(void **s) {
    (void)s;
    lsa_rng g = lsa_rng_make(31, 6);
    fixture f = make(23, 700, 16, true, &g);
    const int nt = omp_get_max_threads();
    omp_set_num_threads(1);
    result a = run(lsa_gen_backend(), &f);
    omp_set_num_threads(4);
    result b = run(lsa_gen_backend(), &f);
    omp_set_num_threads(nt);
    assert_memory_equal(a.dz, b.dz, 23 * 700 * 4);
    assert_memory_equal(a.dcost, b.dcost, 16 * 4);
    forget(&a), forget(&b), drop(&f);
}

static void test_refuses(void **s) {
    (void)s;
    float x[4] = {0}, y[4];
    uint8_t from[4] = {0};
    int32_t nc = 4;
    lsa_err err = {0};
    lsa_ctx *c = lsa_gen_ctx(lsa_gen_backend());
    const lsa_continuation_fwd_args ok = {1, 4, 1, x, x, &nc, y, from};
    const lsa_continuation_bwd_args back = {1, 4, 1, from, x, &nc, y, y};
    lsa_continuation_fwd_args a;
    lsa_continuation_bwd_args b;
    a = ok, a.reach = 0;
    assert_int_equal(lsa_continuation_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.reach = LSA_MAX_REACH + 1;
    assert_int_equal(lsa_continuation_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.out = x;
    assert_int_equal(lsa_continuation_fwd(c, &a, NULL), LSA_E_ARG);
    a = ok, a.from = NULL;
    assert_int_equal(lsa_continuation_fwd(c, &a, NULL), LSA_E_ARG);
    b = back, b.dz = x;
    assert_int_equal(lsa_continuation_bwd(c, &b, NULL), LSA_E_ARG);
    b = back, b.dcost = NULL;
    assert_int_equal(lsa_continuation_bwd(c, &b, NULL), LSA_E_ARG);
    assert_int_equal(lsa_indexer_costs_check(x, 4, "x", &err), LSA_OK);
    x[2] = -1;
    assert_int_equal(lsa_indexer_costs_check(x, 4, "x", &err), LSA_E_FORMAT);
    assert_string_equal(err.msg, "x: continuation: b_3 is -1; expected a finite number of at least 0");
    x[2] = NAN;
    assert_int_equal(lsa_indexer_costs_check(x, 4, "x", NULL), LSA_E_FORMAT);
    assert_int_equal(lsa_indexer_costs_check(x, LSA_MAX_REACH + 1, "x", NULL), LSA_E_FORMAT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition),    cmocka_unit_test(test_by_hand),
        cmocka_unit_test(test_too_dear),      cmocka_unit_test(test_finite_differences),
        cmocka_unit_test(test_nan),           cmocka_unit_test(test_in_place),
        cmocka_unit_test(test_deterministic), cmocka_unit_test(test_refuses)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
