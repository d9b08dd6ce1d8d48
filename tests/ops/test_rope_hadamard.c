/* rope_hadamard on the backend under test against `ref`, and its inverse against itself. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "kernels/model/rope.h"
#include "kernels/ops.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/tol.h"

static void run(const char *device, lsa_rope_hadamard_args a) {
    lsa_rig r;
    lsa_err err = {0};
    lsa_rig_open(&r, device, 8);
    a.position = lsa_rig_in(&r, a.position, a.m, 8);
    a.freq = lsa_rig_in(&r, a.freq, a.rope_dim / 2, 4);
    a.q = lsa_rig_inout(&r, a.q, a.m * a.n_head * a.d, 4);
    if (lsa_rope_hadamard(r.ctx, &a, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_rig_close(&r);
}

static void test_against_ref(void **s) {
    (void)s;
    static const int64_t shape[][4] = {
        {1, 1, 2, 0},     {1, 1, 2, 2},     {3, 2, 128, 64},  {5, 1, 8, 4},   {2, 3, 1024, 512},
        {7, 32, 128, 64}, {2, 128, 128, 0}, {2, 1, 128, 128}, {0, 4, 64, 32}, {4, 0, 64, 32}};
    lsa_rng g = lsa_rng_make(3, 1);
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int inverse = 0; inverse < 2; inverse++) {
            const int64_t m = shape[i][0], H = shape[i][1], d = shape[i][2], rd = shape[i][3], n = m * H * d;
            float *x = LSA_GEN_NEW(float, n), *want = LSA_GEN_NEW(float, n), *got = LSA_GEN_NEW(float, n),
                  *freq = LSA_GEN_NEW(float, rd / 2);
            int64_t *pos = LSA_GEN_NEW(int64_t, m);
            lsa_rope_freqs(freq, &(lsa_rope){(int32_t)rd, 160000, 16, 65536, 32, 1});
            lsa_gen_fill(x, n, 1, &g);
            for (int64_t k = 0; k < m; k++) pos[k] = k == 0 ? 0 : k == 1 ? 1 : lsa_gen_range(&g, 2, 1048575);
            memcpy(want, x, (size_t)n * 4);
            memcpy(got, x, (size_t)n * 4);
            run("ref", (lsa_rope_hadamard_args){m, H, d, rd, inverse, pos, freq, want});
            run(lsa_gen_backend(), (lsa_rope_hadamard_args){m, H, d, rd, inverse, pos, freq, got});
            assert_true(lsa_compare_f32("rope_hadamard", got, want, n, lsa_tol_rope((double)d)));
            run(lsa_gen_backend(), (lsa_rope_hadamard_args){m, H, d, rd, !inverse, pos, freq, got});
            assert_true(lsa_compare_f32("there and back", got, x, n, lsa_tol_rope((double)d * (double)d)));
            free(x), free(want), free(got), free(freq), free(pos);
        }
}

/* The order of the Hadamard butterflies and the pairing of the rotation, by hand: d = 4, unit vectors. */
static void test_by_hand(void **s) {
    (void)s;
    const int64_t pos = 2;
    const float freq = 0.25f; /* angle 0.5 on channels 2, 3 */
    const double c = cos(0.5), n = sin(0.5);
    float q[8] = {0, 1, 0, 0, 0, 0, 1, 0};
    const float want[8] = {0.5f,
                           -0.5f,
                           0.5f,
                           -0.5f,
                           (float)((c + n) / 2),
                           (float)((c - n) / 2),
                           (float)((-c - n) / 2),
                           (float)((-c + n) / 2)};
    run(lsa_gen_backend(), (lsa_rope_hadamard_args){1, 2, 4, 2, false, &pos, &freq, q});
    assert_true(lsa_compare_f32("by hand", q, want, 8, lsa_tol_rope(4)));
}

/* NaN spreads over its own head only. */
static void test_nan_stays_in_its_head(void **s) {
    (void)s;
    const int64_t pos = 5;
    float q[3 * 128] = {0};
    q[128 + 3] = NAN;
    run(lsa_gen_backend(), (lsa_rope_hadamard_args){1, 3, 128, 0, false, &pos, NULL, q});
    for (int i = 0; i < 3 * 128; i++) assert_int_equal(isnan(q[i]) != 0, i / 128 == 1);
}

static void test_refuses(void **s) {
    (void)s;
    float q[128] = {0};
    int64_t pos = 0;
    lsa_ctx *c = lsa_gen_ctx(lsa_gen_backend());
    const lsa_rope_hadamard_args bad[] = {
        {1, 1, 96, 0, false, &pos, q, q},    {1, 1, 128, 3, false, &pos, q, q},
        {1, 1, 128, 256, false, &pos, q, q}, {1, 1, 2048, 0, false, &pos, q, q},
        {1, 1, 128, 64, false, NULL, q, q},  {1, 1, 128, 64, false, &pos, NULL, q}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(lsa_rope_hadamard(c, &bad[i], NULL), LSA_E_ARG);
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_against_ref), cmocka_unit_test(test_by_hand),
                                   cmocka_unit_test(test_nan_stays_in_its_head),
                                   cmocka_unit_test(test_refuses)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
