/* What stays and what counts: keep rules with ties, policies, budget arithmetic and the parts of the loss, by
 * hand. */
#include <math.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "infer/policy.h"
#include "infer/recall.h"

static void keep(const float *score, int64_t n, lsa_keep_rule rule, bool is_logit, const char *want) {
    uint8_t kept[16];
    float scratch[16];
    int32_t sel[16];
    char got[17] = "";
    int64_t count = 0;
    const int64_t said = lsa_keep(kept, score, n, &rule, is_logit, scratch, sel);
    for (int64_t i = 0; i < n; i++) got[i] = kept[i] ? '1' : '0', count += kept[i], got[i + 1] = 0;
    assert_string_equal(got, want);
    assert_int_equal(said, count);
}

static void test_keep(void **s) {
    (void)s;
    const float z[] = {1, 5, 5, -1, 0, 5, 2, 0.5f};
    keep(z, 8, (lsa_keep_rule){.budget = 0.25, .threshold = -1}, true,
         "01100000"); /* ties to the lower index */
    keep(z, 8, (lsa_keep_rule){.budget = 0.26, .threshold = -1}, true, "01100100"); /* K = ceil */
    keep(z, 8, (lsa_keep_rule){.budget = 1e-9, .threshold = -1}, true, "01000000"); /* at least one */
    keep(z, 8, (lsa_keep_rule){.budget = 1, .threshold = -1}, true, "11111111");
    keep(z, 8, (lsa_keep_rule){.budget = -1, .threshold = -1, .top_k = 3}, true, "01100100");
    keep(z, 8, (lsa_keep_rule){.budget = -1, .threshold = -1, .top_k = 99}, true, "11111111");
    keep(z, 8, (lsa_keep_rule){.budget = -1, .threshold = 0.5}, true,
         "11100111"); /* sigmoid strictly above */
    keep(z, 8, (lsa_keep_rule){.budget = -1, .threshold = 0.5}, false,
         "11100110"); /* a probability already */
    keep(z, 8, (lsa_keep_rule){.budget = -1, .threshold = 1}, true, "00000000");
    keep(z, 8, (lsa_keep_rule){.budget = 0.25, .threshold = -1, .sink = 2}, true, "11100000");
    keep(z, 0, (lsa_keep_rule){.budget = 0.5, .threshold = -1}, true, "");
}

static void test_evictable(void **s) {
    (void)s;
    assert_int_equal(lsa_evictable(0, 256), 0);
    assert_int_equal(lsa_evictable(256, 256), 0);
    assert_int_equal(lsa_evictable(259, 256), 0);
    assert_int_equal(lsa_evictable(260, 256), 1);
    assert_int_equal(lsa_evictable(16320, 256), (16320 - 256) / 4);
    assert_int_equal(lsa_budget_chunks(0.1, 4016), 402);
    assert_int_equal(lsa_budget_chunks(0.1, 4010), 401); /* 401.00000000000006 in binary is still 401 */
    assert_int_equal(lsa_budget_chunks(1, 7), 7);
}

static void test_scores(void **s) {
    (void)s;
    enum { N = 40 };
    float mass[N] = {0}, last[N] = {0}, a[N], b[N];
    lsa_policy_inputs in = {mass, last, 7, 3, 640};
    mass[4] = 1;
    last[10] = 0.5f, last[12] = 0.499f;
    lsa_policy_score(a, LSA_POLICY_ORACLE, &in, N);
    assert_memory_equal(a, mass, sizeof a);
    lsa_policy_score(a, LSA_POLICY_RECENCY, &in, N);
    for (int i = 1; i < N; i++) assert_true(a[i] > a[i - 1]);
    lsa_policy_score(a, LSA_POLICY_LAST, &in, N);
    assert_memory_equal(a, last, sizeof a);
    lsa_policy_score(a, LSA_POLICY_LAST_SPREAD, &in, N);
    for (int i = 0; i < N; i++) {
        double want = 0;
        if (i >= 10 && i <= 26) want = 0.5 - 1e-3 * (i - 10);
        if (i >= 12 && i <= 28) want = fmax(want, 0.499 - 1e-3 * (i - 12));
        assert_true(fabs((double)a[i] - want) < 1e-6);
    }
    lsa_policy_score(a, LSA_POLICY_RANDOM, &in, N);
    lsa_policy_score(b, LSA_POLICY_RANDOM, &in, N);
    assert_memory_equal(a, b, sizeof a);
    in.s = 704;
    lsa_policy_score(b, LSA_POLICY_RANDOM, &in, N);
    assert_memory_not_equal(a, b, sizeof a);
}

static void test_parts(void **s) {
    (void)s;
    enum { N = 1400 };
    static uint8_t part[N];
    const lsa_fact fact[] = {{10, 40}, {100, 1280}}; /* near: no answer counted; far: it is */
    const lsa_replay replay[] = {{0, 1100, 80}};
    lsa_doc d = {.n_token = N, .has_needs = true, .n_fact = 2, .fact = fact, .n_replay = 1, .replay = replay};
    lsa_token_parts(part, &d);
    int64_t n[LSA_N_PART] = {0};
    for (int t = 0; t < N; t++)
        for (int p = 0; p < LSA_N_PART; p++) n[p] += part[t] >> p & 1;
    assert_int_equal(n[LSA_PART_ALL], N - 1);
    assert_int_equal(n[LSA_PART_ANSWER], 16);
    for (int t = 1288; t < 1304; t++) assert_true(part[t] >> LSA_PART_ANSWER & 1);
    assert_int_equal(n[LSA_PART_REPLAY], 64);
    assert_true(part[1116] >> LSA_PART_REPLAY & 1 && !(part[1115] >> LSA_PART_REPLAY & 1) &&
                !(part[1180] >> LSA_PART_REPLAY & 1));
    assert_int_equal(n[LSA_PART_OTHER],
                     700 - 80 - 25); /* second half, less the replay and the question with its answer */
    assert_true(part[1305] >> LSA_PART_OTHER & 1 && !(part[1304] >> LSA_PART_OTHER & 1) &&
                !(part[1280] >> LSA_PART_OTHER & 1));
    d.has_needs = false;
    lsa_token_parts(part, &d);
    for (int t = 0; t < N; t++) assert_int_equal(part[t], t ? 1 : 0);
}

static void test_parse(void **s) {
    (void)s;
    bool want[LSA_N_POLICY] = {false};
    lsa_err err = {0};
    assert_int_equal(lsa_policy_parse(want, "full,last-spread,random", &err), LSA_OK);
    for (int k = 0; k < LSA_N_POLICY; k++)
        assert_int_equal(want[k],
                         k == LSA_POLICY_FULL || k == LSA_POLICY_LAST_SPREAD || k == LSA_POLICY_RANDOM);
    assert_int_equal(lsa_policy_parse(want, "full,", &err), LSA_E_ARG);
    err = (lsa_err){0};
    assert_int_equal(lsa_policy_parse(want, "recent", &err), LSA_E_ARG);
    assert_non_null(strstr(err.msg, "recent"));
    err = (lsa_err){0};
    assert_int_equal(lsa_policy_parse(want, "quest", &err), LSA_E_UNSUPPORTED);
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_keep), cmocka_unit_test(test_evictable),
                                   cmocka_unit_test(test_scores), cmocka_unit_test(test_parts),
                                   cmocka_unit_test(test_parse)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
