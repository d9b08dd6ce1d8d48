/* Small floats against brute force: every code decodes by its formula, every conversion picks the nearest
 * code with ties to even. */
#include <math.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/core/dtype.h"
#include "kernels/core/rng.h"

/* Value of sign-exponent-mantissa bits without infinities unless ieee. */
static double value(uint32_t code, int e_bits, int m_bits, bool ieee) {
    const int bias = (1 << (e_bits - 1)) - 1;
    const uint32_t m = code & ((1u << m_bits) - 1), e = code >> m_bits & ((1u << e_bits) - 1);
    const double sign = code >> (m_bits + e_bits) & 1 ? -1 : 1;
    if (ieee && e == (1u << e_bits) - 1) return m ? (double)NAN : sign * (double)INFINITY;
    if (e == 0) return sign * ldexp(m, 1 - bias - m_bits);
    return sign * ldexp((1u << m_bits) + m, (int)e - bias - m_bits);
}

static void test_f16(void **s) {
    (void)s;
    for (uint32_t c = 0; c < 65536; c++) {
        const double want = value(c, 5, 10, true);
        const float got = lsa_f16_to_f32((uint16_t)c);
        if (isnan(want)) {
            assert_true(isnan(got) && isnan(lsa_f16_to_f32(lsa_f32_to_f16(got))));
            continue;
        }
        assert_true((double)got == want);
        assert_int_equal(lsa_f32_to_f16(got), c);
        const double next = value(c + 1, 5, 10, true);
        if ((c & 0x7fff) >= 0x7bff || !isfinite(next)) continue;
        const float middle = (float)((want + next) / 2); /* exact in f32: ties go to the even code */
        assert_int_equal(lsa_f32_to_f16(middle), c % 2 ? c + 1 : c);
        assert_int_equal(lsa_f32_to_f16(nextafterf(middle, (float)want)), c);
        assert_int_equal(lsa_f32_to_f16(nextafterf(middle, (float)next)), c + 1);
    }
    assert_int_equal(lsa_f32_to_f16(1e6f), 0x7c00);
    assert_int_equal(lsa_f32_to_f16(-1e6f), 0xfc00);
}

static void test_bf16(void **s) {
    (void)s;
    for (uint32_t c = 0; c < 65536; c++) {
        const float f = lsa_bf16_to_f32((uint16_t)c);
        if (isnan(f))
            assert_true(isnan(lsa_bf16_to_f32(lsa_f32_to_bf16(f))));
        else
            assert_int_equal(lsa_f32_to_bf16(f), c);
    }
    assert_int_equal(lsa_f32_to_bf16(lsa_bits_f32(0x3f808000)), 0x3f80); /* tie, even below */
    assert_int_equal(lsa_f32_to_bf16(lsa_bits_f32(0x3f818000)), 0x3f82); /* tie, even above */
    assert_int_equal(lsa_f32_to_bf16(lsa_bits_f32(0x3f808001)), 0x3f81);
    assert_true(
        isnan(lsa_bf16_to_f32(lsa_f32_to_bf16(lsa_bits_f32(0x7f800001))))); /* not rounded to infinity */
}

/* The nearest of n ascending values, ties to the even index. */
static int nearest(const double *v, int n, double x) {
    int best = 0;
    for (int i = 1; i < n; i++) {
        const double d = fabs(v[i] - x), b = fabs(v[best] - x);
        if (d < b || (d == b && i % 2 == 0)) best = i;
    }
    return best;
}

static void test_e4m3(void **s) {
    (void)s;
    double v[127];
    lsa_rng r = lsa_rng_make(1, 2);
    for (uint32_t c = 0; c < 256; c++) {
        if ((c & 0x7f) == 0x7f) {
            assert_true(isnan(lsa_e4m3_to_f32((uint8_t)c)));
            continue;
        }
        const double want = value(c, 4, 3, false);
        assert_true((double)lsa_e4m3_to_f32((uint8_t)c) == want);
        if (c < 127) v[c] = want;
        assert_int_equal(lsa_f32_to_e4m3((float)want), c);
    }
    for (int i = 0; i < 20000; i++) {
        float x = ldexpf(lsa_rng_uniform(&r) + 0.5f, (int)lsa_rng_below(&r, 24) - 14);
        if (i < 126) x = (float)((v[i] + v[i + 1]) / 2);
        const int c = nearest(v, 127, (double)x);
        assert_int_equal(lsa_f32_to_e4m3(x), c);
        assert_int_equal(lsa_f32_to_e4m3(-x), c | 0x80);
    }
    assert_int_equal(lsa_f32_to_e4m3(1e9f), 0x7e);
    assert_int_equal(lsa_f32_to_e4m3(-1e9f), 0xfe);
    assert_int_equal(lsa_f32_to_e4m3(NAN), 0x7f);
}

static void test_e2m1_e8m0(void **s) {
    (void)s;
    static const double v[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    for (int i = 0; i <= 700; i++) {
        const float x = (float)i / 100;
        const int c = nearest(v, 8, fmin((double)x, 6));
        assert_true(fabs((double)lsa_e2m1_table[lsa_f32_to_e2m1(x)] - v[c]) == 0);
        assert_true((double)lsa_e2m1_table[lsa_f32_to_e2m1(-x)] == -v[c]);
    }
    for (int b = 0; b < 255; b++) assert_true((double)lsa_e8m0_to_f32((uint8_t)b) == ldexp(1, b - 127));
    assert_true(isnan(lsa_e8m0_to_f32(255)));
    for (int e = -100; e < 100; e++) {
        assert_true(lsa_pow2_ceil(ldexpf(1, e)) == ldexpf(1, e));
        assert_true(lsa_pow2_ceil(nextafterf(ldexpf(1, e), INFINITY)) == ldexpf(1, e + 1));
    }
}

static void test_key(void **s) {
    (void)s;
    float row[128], back[128];
    uint8_t code[132], again[132];
    lsa_rng r = lsa_rng_make(3, 4);
    for (int t = 0; t < 200; t++) {
        const float size = ldexpf(1, (int)lsa_rng_below(&r, 60) - 40);
        float amax = 0;
        for (int i = 0; i < 128; i++)
            row[i] = t ? size * (lsa_rng_uniform(&r) - 0.5f) : 0, amax = fmaxf(amax, fabsf(row[i]));
        lsa_key_encode(code, row);
        lsa_key_decode(back, code);
        float scale;
        memcpy(&scale, code + 128, 4);
        assert_true(scale == fmaxf(1e-4f, amax) / 448.0f);
        /* half a step: 2^-4 of the value, or of the smallest normal */
        for (int i = 0; i < 128; i++)
            assert_true(fabsf(back[i] - row[i]) <= fmaxf(fabsf(row[i]) / 16, scale / 1024) * 1.0001f);
        lsa_key_encode(again, back);
        lsa_key_decode(row, again);
        for (int i = 0; i < 128; i++)
            assert_true(fabsf(row[i] - back[i]) <= 1e-6f * amax); /* decoded keys are codes */
    }
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_f16), cmocka_unit_test(test_bf16),
                                   cmocka_unit_test(test_e4m3), cmocka_unit_test(test_e2m1_e8m0),
                                   cmocka_unit_test(test_key)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
