/* Votes: the rule of one layer and token, against hand-made cases and an independent implementation by
 * repeated maxima. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "data/dump/votes.h"
#include "kernels/core/rng.h"

static void expect(const float *logit, int32_t n, double top_p, const int32_t *want, int32_t n_want) {
    int32_t pool[64], out[64];
    for (int32_t i = 0; i < n; i++) pool[i] = i;
    assert_int_equal(lsa_votes(pool, n, logit, top_p, out), n_want);
    assert_memory_equal(out, want, (size_t)n_want * sizeof *want);
}
#define EXPECT(logit, n, p, ...)                                                                             \
    expect(logit, n, p, (const int32_t[]){__VA_ARGS__},                                                      \
           sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))

static void test_by_hand(void **s) {
    (void)s;
    const float l[] = {-1.6094379f, -0.6931472f, -1.2039728f}; /* ln 0.2, ln 0.5, ln 0.3 */
    EXPECT(l, 3, 0.4, 1);
    EXPECT(l, 3, 0.6, 1, 2); /* the chunk that crosses the mass is taken too; the answer ascends by chunk */
    EXPECT(l, 3, 0.9, 0, 1, 2);
    EXPECT(l, 3, 1.0, 0, 1, 2);
    EXPECT(l, 1, 0.01, 0); /* rank 0 always votes */
    assert_int_equal(lsa_votes(NULL, 0, l, 0.6, NULL), 0);
}

static void test_ties(void **s) {
    (void)s;
    const float same[8] = {2, 2, 2, 2, 2, 2, 2, 2};
    EXPECT(same, 4, 0.5, 0, 1, 2); /* a sum of exactly 0.5 does not exceed 0.5: one more is taken */
    EXPECT(same, 4, 0.49, 0, 1);
    EXPECT(same, 8, 0.125, 0, 1);
    const float two[] = {1, 5, 0, 5, 5}; /* equal logits: the lower chunk first */
    EXPECT(two, 5, 0.5, 1, 3);
}

static void test_extremes(void **s) {
    (void)s;
    const float far[] = {-30000, 30000, 29999, 0}; /* the exponentials must not overflow */
    EXPECT(far, 4, 0.6, 1);
    EXPECT(far, 4, 0.9, 1, 2);
    const float zeros[] = {0, 0, 0};
    EXPECT(zeros, 3, 0.6, 0, 1);
}

/* The pool is a subset of the visible chunks: votes are chunk ids, not places in the pool. */
static void test_pool_only(void **s) {
    (void)s;
    const float l[] = {1, 1.5f, 0};
    const int32_t pool[] = {1, 3, 5};
    int32_t out[8];
    assert_int_equal(lsa_votes(pool, 3, l, 0.5, out), 1);
    assert_int_equal(out[0], 3);
    assert_int_equal(lsa_votes(pool, 3, l, 0.8, out), 2);
    assert_int_equal(out[0], 1);
    assert_int_equal(out[1], 3);
}

/* The same rule written differently: take the largest left until the mass is passed, then mark. */
static int32_t naive(const int32_t *pool, int32_t n, const float *logit, double top_p, bool *voted) {
    bool used[256] = {false};
    double z = 0, top = -(double)INFINITY, run = 0;
    for (int32_t i = 0; i < n; i++) top = fmax(top, (double)logit[pool[i]]);
    int32_t k = 0;
    for (int32_t i = 0; i < n; i++) z += exp((double)logit[pool[i]] - top);
    while (k < n && (k == 0 || run <= top_p * z)) {
        int32_t best = -1;
        for (int32_t i = 0; i < n; i++)
            if (!used[i] && (best < 0 || logit[pool[i]] > logit[pool[best]])) best = i;
        used[best] = true;
        voted[pool[best]] = true;
        run += exp((double)logit[pool[best]] - top);
        k++;
    }
    return k;
}

static void test_random(void **s) {
    (void)s;
    lsa_rng r = lsa_rng_make(20, 3);
    int64_t total = 0;
    for (int round = 0; round < 2000; round++) {
        const int32_t n_vis = 1 + (int32_t)lsa_rng_below(&r, 200);
        float logit[200];
        int32_t pool[200], out[200], n = 0;
        for (int32_t i = 0; i < n_vis; i++) {
            logit[i] = 6.0f * lsa_rng_uniform(&r) - 3.0f;
            if (round % 3 == 0) logit[i] = floorf(logit[i] * 2); /* many ties */
            if (lsa_rng_below(&r, 3)) pool[n++] = i;
        }
        const double p = 0.05 + 0.9 * (double)lsa_rng_uniform(&r);
        bool voted[200] = {false};
        float of_pool[200];
        for (int32_t i = 0; i < n; i++) of_pool[i] = logit[pool[i]];
        const int32_t want = n ? naive(pool, n, logit, p, voted) : 0,
                      got = lsa_votes(pool, n, of_pool, p, out);
        assert_int_equal(got, want);
        for (int32_t i = 0; i < got; i++) {
            assert_true(voted[out[i]]);
            assert_true(i == 0 || out[i] > out[i - 1]);
        }
        total += got;
    }
    assert_true(total > 10000); /* the cases were not empty */
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_by_hand), cmocka_unit_test(test_ties),
                                       cmocka_unit_test(test_extremes), cmocka_unit_test(test_pool_only),
                                       cmocka_unit_test(test_random)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
