/* The search of thresholds: exact counts on small sets, ties, lengths between knots as kernels/model/select.h
 * words it, and scores whose level drifts with length. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/rng.h"
#include "trainer/threshold.h"

static void count(lsa_score_counts *c, int64_t n, const float *s, int64_t evictable, int64_t golden_every) {
    assert_int_equal(lsa_score_counts_window(c, n, evictable, NULL), LSA_OK);
    for (int64_t i = 0; i < evictable; i++)
        lsa_score_counts_add(c, n, s[i], golden_every && i % golden_every == 0);
}

static int64_t above(const float *s, int64_t n, float t) {
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++) k += s[i] > t;
    return k;
}

/* 200 different scores, one window: every target that is a whole number of chunks is met exactly. */
static void exact(lsa_score_axis axis, float low, float step) {
    float s[200], t;
    const int64_t knot[] = {256};
    lsa_score_counts c = {.axis = axis};
    for (int i = 0; i < 200; i++) s[i] = low + step * (float)((i * 73) % 200);
    count(&c, 256, s, 200, 0);
    for (int k = 1; k < 200; k++) {
        assert_int_equal(lsa_find_thresholds(&t, &c, knot, 1, k / 200.0, false, NULL), LSA_OK);
        if (above(s, 200, t) != k)
            fail_msg("%lld of 200 above %g, expected %d", (long long)above(s, 200, t), (double)t, k);
    }
    lsa_score_counts_fini(&c);
}

static void test_exact(void **state) {
    (void)state;
    exact((lsa_score_axis){false, -10, 10}, -7.123f, 0.07f);
    exact((lsa_score_axis){true, -24, 24}, 0.001f, 0.0049f);
}

/* Half of the chunks share one value: the threshold never lands where none or all of them could be meant. */
static void test_ties(void **state) {
    (void)state;
    float s[100], t;
    const int64_t knot[] = {128};
    lsa_score_counts c = {.axis = {false, -4, 4}};
    for (int i = 0; i < 100; i++)
        s[i] = i < 50 ? 0.0f : i < 75 ? 1 + 0.01f * (float)i : -1 - 0.01f * (float)i;
    count(&c, 128, s, 100, 0);
    const double target[] = {0.10, 0.25, 0.50, 0.75, 0.90};
    const int64_t low[] = {10, 25, 25, 75, 90}, high[] = {10, 25, 75, 75, 90};
    for (int i = 0; i < 5; i++) {
        assert_int_equal(lsa_find_thresholds(&t, &c, knot, 1, target[i], false, NULL), LSA_OK);
        const int64_t k = above(s, 100, t);
        if (k != low[i] && k != high[i]) fail_msg("target %g keeps %lld", target[i], (long long)k);
    }
    lsa_score_counts_fini(&c);
}

static void test_golden(void **state) {
    (void)state;
    float s[400], t;
    const int64_t knot[] = {512};
    lsa_score_counts c = {.axis = {false, -1, 5}};
    for (int i = 0; i < 400; i++) s[i] = 0.01f * (float)i;
    count(&c, 512, s, 400, 4); /* golden: 0, 4, 8, ... */
    assert_int_equal(lsa_find_thresholds(&t, &c, knot, 1, 0.80, true, NULL), LSA_OK);
    int64_t kept = 0;
    for (int i = 0; i < 400; i += 4) kept += s[i] > t;
    assert_int_equal(kept, 80);
    lsa_score_counts_fini(&c);
}

/* Words of select.h, written again: linear in log2(n) between knots, constant outside; without knots the one
 * threshold. */
static void test_between_knots(void **state) {
    (void)state;
    lsa_select_rule r = {
        .threshold = 9, .n_knot = 3, .knot_length = {100, 400, 3200}, .knot_threshold = {1, 3, -3}};
    const struct {
        int64_t n;
        double want;
    } c[] = {{1, 1},     {100, 1},      {200, 2},
             {400, 3},   {800, 1},      {1600, -1},
             {3200, -3}, {1 << 30, -3}, {141, 1 + 2 * (log2(141) - log2(100)) / 2}};
    for (size_t i = 0; i < sizeof c / sizeof *c; i++) {
        const double t = (double)lsa_rule_threshold(&r, c[i].n);
        if (!(fabs(t - c[i].want) <= 1e-6))
            fail_msg("%lld chunks: %g, expected %g", (long long)c[i].n, t, c[i].want);
    }
    r.n_knot = 0;
    assert_true(lsa_rule_threshold(&r, 500) == 9.0f);
}

static void test_knots(void **state) {
    (void)state;
    int64_t k[LSA_SELECT_KNOTS];
    const int64_t want[] = {128, 181, 256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096};
    assert_int_equal(lsa_knots(k, 4080, 64), 11);
    assert_memory_equal(k, want, sizeof want);
    assert_int_equal(lsa_knots(k, 130, 64),
                     1); /* no longer than twice the tail: one knot, the longest there is */
    assert_int_equal(k[0], 128);
    assert_int_equal(lsa_knots(k, 20, 64), 1);
    assert_int_equal(lsa_knots(k, 70, 2048), 1);
    assert_int_equal(k[0], 64);
    const int32_t n = lsa_knots(k, INT64_C(1) << 30, 0);
    assert_int_equal(n, LSA_SELECT_KNOTS);
    for (int32_t i = 1; i < n; i++) assert_true(k[i] > k[i - 1]);
    assert_true(k[n - 1] == INT64_C(1) << 30);
}

/* Windows of 128 to 4,096 chunks whose scores rise with length: every window keeps its share, at the ends
 * too. */
static void test_drift(void **state) {
    (void)state;
    enum { W = 2000, END = 100 };
    int64_t knot[LSA_SELECT_KNOTS], length[W];
    float t[LSA_SELECT_KNOTS], *s[W];
    lsa_score_counts c = {.axis = {false, -20, 40}};
    lsa_select_rule r = {0};
    for (int w = 0; w < W; w++) {
        lsa_rng g = lsa_rng_make(5, (uint64_t)w);
        length[w] = 128 + (4096 - 128) * w / (W - 1);
        assert_int_equal(LSA_NEW(s[w], length[w], NULL), LSA_OK);
        for (int64_t i = 0; i < length[w]; i++) {
            float x = 0;
            for (int j = 0; j < 4; j++) x += lsa_rng_uniform(&g);
            s[w][i] = x + (float)log2((double)length[w]) * 2;
        }
        count(&c, length[w], s[w], length[w], 0);
    }
    const int32_t n = lsa_knots(knot, 4096, 0);
    for (int b = 0; b < 3; b++) {
        const double target = (double[]){0.05, 0.10, 0.20}[b];
        assert_int_equal(lsa_find_thresholds(t, &c, knot, n, target, false, NULL), LSA_OK);
        r.n_knot = n;
        memcpy(r.knot_length, knot, sizeof knot);
        memcpy(r.knot_threshold, t, sizeof t);
        double kept = 0, all = 0;
        for (int w = 0; w < W; w++) {
            const double k = (double)above(s[w], length[w], lsa_rule_threshold(&r, length[w]));
            kept += k, all += (double)length[w];
            if (w != 0 && w != W - 1) continue;
            double share = 0, total = 0; /* the first and the last hundred windows, together */
            for (int v = w < END ? 0 : W - END; v < (w < END ? END : W); v++)
                share += (double)above(s[v], length[v], lsa_rule_threshold(&r, length[v])),
                    total += (double)length[v];
            if (!(fabs(share / total / target - 1) < 0.06))
                fail_msg("windows of %lld chunks keep %g of %g", (long long)length[w], share / total, target);
        }
        if (!(fabs(kept / all / target - 1) < 0.01))
            fail_msg("all windows keep %g of %g", kept / all, target);
    }
    for (int w = 0; w < W; w++) lsa_free(s[w]);
    lsa_score_counts_fini(&c);
}

/* No chunk near a knot: it takes its neighbour's value; none at all: everything is kept. */
static void test_gaps(void **state) {
    (void)state;
    float s[100], t[3];
    const int64_t knot[] = {128, 256, 4096};
    lsa_score_counts c = {.axis = {false, -1, 2}};
    for (int i = 0; i < 100; i++) s[i] = 0.01f * (float)i;
    assert_int_equal(lsa_find_thresholds(t, &c, knot, 3, 0.1, false, NULL), LSA_OK);
    assert_true(t[0] <= -1 && t[1] <= -1 && t[2] <= -1);
    count(&c, 128, s, 100, 0);
    assert_int_equal(lsa_find_thresholds(t, &c, knot, 3, 0.1, false, NULL), LSA_OK);
    assert_int_equal(above(s, 100, t[0]), 10);
    assert_true(t[1] == t[0] && t[2] == t[0]);
    lsa_score_counts_fini(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_exact),  cmocka_unit_test(test_ties),
                                       cmocka_unit_test(test_golden), cmocka_unit_test(test_between_knots),
                                       cmocka_unit_test(test_knots),  cmocka_unit_test(test_drift),
                                       cmocka_unit_test(test_gaps)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
