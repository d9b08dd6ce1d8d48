/* Philox 4x32-10 against the known answers published with Random123, and the streams made of it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "kernels/core/rng.h"

static void test_known_answers(void **s) {
    (void)s;
    static const struct {
        uint64_t key, c0, c1;
        uint32_t want[4];
    } t[] = {
        {0, 0, 0, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
        {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
        {0x299f31d0a4093822u,
         0x85a308d3243f6a88u,
         0x0370734413198a2eu,
         {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
    };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        const lsa_u32x4 o = lsa_philox(t[i].key, t[i].c0, t[i].c1);
        assert_memory_equal(o.v, t[i].want, sizeof o.v);
    }
}

static void test_stream_is_blocks_in_order(void **s) {
    (void)s;
    lsa_rng r = lsa_rng_make(7, 9);
    for (uint64_t b = 0; b < 3; b++) {
        const lsa_u32x4 o = lsa_philox(7, b, 9);
        for (int i = 0; i < 4; i++) assert_int_equal(lsa_rng_u32(&r), o.v[i]);
    }
}

/* Every value of a small range comes up about equally often, and the range's ends are respected. */
static void test_below_and_uniform(void **s) {
    (void)s;
    lsa_rng r = lsa_rng_make(1, 2);
    int count[7] = {0};
    double sum = 0;
    for (int i = 0; i < 70000; i++) {
        const uint64_t v = lsa_rng_below(&r, 7);
        assert_true(v < 7);
        count[v]++;
    }
    for (int i = 0; i < 7; i++) assert_in_range(count[i], 9500, 10500);
    for (int i = 0; i < 10000; i++) {
        const float u = lsa_rng_uniform(&r);
        assert_true(u >= 0.0f && u < 1.0f);
        sum += (double)u;
    }
    assert_true(sum > 4900 && sum < 5100);
    assert_int_equal(lsa_rng_below(&r, 1), 0);
}

/* Neighbouring arguments give unrelated keys: no collision among 2 x 2^10 pairs. */
static void test_mix_separates(void **s) {
    (void)s;
    static uint64_t seen[2048];
    int n = 0;
    for (uint64_t a = 0; a < 32; a++)
        for (uint64_t b = 0; b < 32; b++) {
            seen[n++] = lsa_mix64(a, b);
            seen[n++] = lsa_mix64(lsa_mix64(a, b), 1);
        }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++) assert_true(seen[i] != seen[j]);
}

int main(void) {
    const struct CMUnitTest t[] = {
        cmocka_unit_test(test_known_answers), cmocka_unit_test(test_stream_is_blocks_in_order),
        cmocka_unit_test(test_below_and_uniform), cmocka_unit_test(test_mix_separates)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
