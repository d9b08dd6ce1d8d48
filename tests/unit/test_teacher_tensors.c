/* The tensors that follow from config.json, against the published inventory of the real checkpoints
 * (architecture notes 11.2), and the closed forms of the arithmetic against plain loops. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "data/teacher_tensors.h"

static lsa_teacher_config load(const char *path) {
    lsa_teacher_config c;
    lsa_err err = {0};
    if (lsa_teacher_config_load(&c, path, &err) != LSA_OK) fail_msg("%s", err.msg);
    return c;
}

/* What the MTP block adds, written out from section 10: a window layer with a bias router, two fp8
 * projections, three norms and a head collapse. */
typedef struct extra {
    int64_t tensors, f32, bytes;
} extra;
static extra mtp(int64_t d, int64_t H, int64_t q, int64_t G, int64_t moe, int64_t E) {
    extra x = {0};
    const int64_t fp8[][2] = {{q, d},        {H * 512, q}, {512, d}, {G * 1024, H * 512 / G},
                              {d, G * 1024}, {moe, d},     {d, moe}, {moe, d},
                              {d, d},        {d, d}};
    for (size_t i = 0; i < sizeof fp8 / sizeof *fp8; i++) {
        x.tensors += 2;
        x.bytes += fp8[i][0] * fp8[i][1] + fp8[i][0] / 128 * (fp8[i][1] / 128);
    }
    x.tensors += E * 6;
    x.bytes += E * 3 * moe * d / 2 + E * 3 * moe * d / 32;
    const int64_t bf16[] = {d, d, q, 512, E * d, d, d, d};
    for (size_t i = 0; i < sizeof bf16 / sizeof *bf16; i++) x.tensors++, x.bytes += 2 * bf16[i];
    const int64_t f32[] = {24 * 4 * d, 24, 3, 24 * 4 * d, 24, 3, H, E, 4 * 4 * d, 4, 1};
    for (size_t i = 0; i < sizeof f32 / sizeof *f32; i++) x.tensors++, x.f32++, x.bytes += 4 * f32[i];
    return x;
}

static void test_inventory(void **state) {
    (void)state;
    static const struct {
        const char *path;
        int64_t d, H, q, G, moe, E, tensors, f32, bytes;
        int32_t n_csa, first, last;
        double params;
    } want[] = {{"tests/fixtures/v4-flash/config.json", 4096, 64, 1024, 8, 2048, 256, 69187, 417,
                 INT64_C(159609485896), 21, 2, 42, 284.33e9},
                {"tests/fixtures/v4-pro/config.json", 7168, 128, 1536, 16, 3072, 384, 145116, 590,
                 INT64_C(864704792696), 30, 2, 60, 1573.0e9}};
    for (size_t i = 0; i < 2; i++) {
        const lsa_teacher_config c = load(want[i].path);
        const extra x = mtp(want[i].d, want[i].H, want[i].q, want[i].G, want[i].moe, want[i].E);
        lsa_teacher_size s;
        assert_int_equal(lsa_teacher_measure(&s, &c, NULL), LSA_OK);
        assert_int_equal(s.tensors + x.tensors, want[i].tensors);
        assert_int_equal(s.f32_tensors + x.f32, want[i].f32);
        assert_int_equal(s.bytes + x.bytes, want[i].bytes);
        assert_true(fabs(s.params / want[i].params - 1) < 1e-4);
        assert_int_equal(c.n_csa, want[i].n_csa);
        assert_int_equal(c.csa_id[0].v, want[i].first);
        assert_int_equal(c.csa_id[c.n_csa - 1].v, want[i].last);
    }
}

static void test_sums(void **state) {
    (void)state;
    static const int64_t n[] = {0, 1, 3, 4, 5, 127, 128, 129, 1000, 4099}, ratio[] = {1, 4, 128},
                         cap[] = {1, 2, 7, 128, 100000};
    for (size_t i = 0; i < sizeof n / sizeof *n; i++)
        for (size_t j = 0; j < 3; j++)
            for (size_t k = 0; k < 5; k++) {
                int64_t sum = 0;
                for (int64_t t = 0; t < n[i]; t++) {
                    const int64_t v = (t + 1) / ratio[j];
                    sum += v < cap[k] ? v : cap[k];
                }
                assert_true(lsa_visible_sum(n[i], ratio[j], cap[k]) == (double)sum);
            }
}

/* Flash's published 13 B active parameters include the head and embedding rows that a dump does not multiply;
 * the long-context term of section 7: 90 GFLOP of index scores a token at 1 Mi tokens. */
static void test_flops(void **state) {
    (void)state;
    const lsa_teacher_config c = load("tests/fixtures/v4-flash/config.json");
    lsa_teacher_size s;
    assert_int_equal(lsa_teacher_measure(&s, &c, NULL), LSA_OK);
    assert_true(fabs((s.active + 129280.0 * 4096) / 13e9 - 1) < 0.05);
    const int64_t n = 1 << 20;
    const double last = lsa_teacher_flops(&c, &s, n) - lsa_teacher_flops(&c, &s, n - 1);
    const double rows = 21 * (512 + 128) + 20 * (8192 + 128) + 2 * 128, attend = 4.0 * 64 * 512 * rows;
    assert_true(fabs((last - 2 * s.active - attend) / 90.2e9 - 1) < 1e-3);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_inventory), cmocka_unit_test(test_sums),
                                       cmocka_unit_test(test_flops)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
