/* Plans of dumps of the published geometries: closed forms against plain loops over tokens, and refusals
 * whose every advice fits while a little less of it does not. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/dump/plan.h"
#include "kernels/core/lsa_ids.h"

static lsa_teacher_config g_flash;

static int setup(void **state) {
    lsa_err err = {0};
    (void)state;
    if (lsa_teacher_config_load(&g_flash, "tests/fixtures/v4-flash/config.json", &err) != LSA_OK)
        fail_msg("%s", err.msg);
    return 0;
}

static lsa_dump_load load_of(const int64_t *length, int64_t n) {
    lsa_dump_load l = {
        .c = &g_flash, .shard_bytes = INT64_C(256) << 20, .length = length, .n = n, .threads = 2};
    l.rule =
        (lsa_dump_rule){.top_p = 0.6, .pool = 512, .hidden_stride = 64, .stats = true, .dense_min = 1e-4};
    for (int32_t o = 0; o < g_flash.n_csa; o++) l.rule.has_keys[o] = true;
    return l;
}

static lsa_dump_plan plan_of(const lsa_dump_load *l) {
    lsa_dump_plan p;
    lsa_err err = {0};
    if (lsa_dump_cost(&p, l, &err) != LSA_OK) fail_msg("%s", err.msg);
    return p;
}

/* Votes and dense masses token by token. */
static void test_closed_forms(void **state) {
    (void)state;
    static const int64_t length[] = {1, 3, 4, 5, 63, 1000, 5003, 40001};
    static const struct {
        int32_t pool;
        double top_p, dense_min;
        int64_t every;
    } opt[] = {{512, 0.6, 1e-4, 64}, {16, 1.0, 1e-2, 1}, {4096, 0.25, 1e-3, 7}, {64, 0.6, 0, 100}};
    for (size_t k = 0; k < sizeof opt / sizeof *opt; k++)
        for (size_t i = 0; i < sizeof length / sizeof *length; i++) {
            lsa_dump_load l = load_of(&length[i], 1);
            l.rule.pool = opt[k].pool;
            l.rule.top_p = opt[k].top_p;
            l.rule.dense_every = opt[k].every;
            l.rule.dense_min = opt[k].dense_min;
            const lsa_dump_plan p = plan_of(&l);
            int64_t votes = 0;
            double dense = 0, rows = 0;
            for (int64_t t = 0; t < length[i]; t++) {
                const int64_t v = (t + 1) / 4, pool = v < opt[k].pool ? v : opt[k].pool;
                int64_t most = (int64_t)(opt[k].top_p * (double)pool) + 2;
                most = 21 * (most < pool ? most : pool);
                votes += v < most ? v : most;
                if ((t + 1) % opt[k].every) continue;
                const double cap = opt[k].dense_min > 0 ? 1.001 / opt[k].dense_min : 1e18;
                dense += fmin((double)v, floor(cap)), rows++;
            }
            assert_int_equal(p.disk[LSA_DISK_VOTES], 5 * votes + 8 * length[i]);
            const double got = ((double)p.disk[LSA_DISK_DENSE] / 21 - 18 * rows) / 6;
            assert_true(got >= dense - 1 && got <= dense + rows + 1); /* whole chunks against quarters */
        }
}

/* Does the plan fit when exactly `limit` bytes of disk are free? */
static bool fits_disk(const lsa_dump_load *l, int64_t limit, char msg[768]) {
    static lsa_dump_plan base; /* its weights, measured once */
    lsa_err err = {0};
    if (!base.teacher.bytes) base = plan_of(l);
    lsa_dump_plan p = base;
    assert_int_equal(lsa_dump_bytes(&p, l, &err), LSA_OK);
    p.disk_free = limit;
    p.host_budget = INT64_MAX;
    const lsa_status st = lsa_dump_fits(&p, l, "here", &err);
    assert_true(st == LSA_OK || st == LSA_E_NOSPC);
    if (msg) snprintf(msg, 768, "%s", err.msg);
    return st == LSA_OK;
}

static int64_t number_after(const char *msg, const char *text) {
    const char *at = strstr(msg, text);
    return at ? strtoll(at + strlen(text), NULL, 10) : -1;
}

static void test_disk_advice(void **state) {
    (void)state;
    static int64_t length[40];
    char msg[768];
    for (int i = 0; i < 40; i++) length[i] = 4096 + 1024 * (i % 7);
    lsa_dump_load l = load_of(length, 40);
    l.rule.hidden_stride = 1;
    l.rule.dense_every = 2;
    const int64_t all = plan_of(&l).disk_bytes;
    int seen[5] = {0};
    assert_true(fits_disk(&l, all, NULL) && !fits_disk(&l, all - 1, NULL));
    for (int percent = 1; percent < 100; percent += 2) {
        const int64_t limit = all / 100 * percent;
        lsa_dump_load x = l;
        assert_false(fits_disk(&l, limit, msg));
        assert_non_null(strstr(msg, "another disk"));
        x.rule.stats = false;
        assert_true(fits_disk(&x, limit, NULL) == (strstr(msg, "--no-stats") != NULL));
        seen[0] += strstr(msg, "--no-stats") != NULL;
        x = l;
        x.rule.dense_every = 0;
        assert_true(fits_disk(&x, limit, NULL) == (strstr(msg, "--dense-every 0") != NULL));
        seen[1] += strstr(msg, "--dense-every 0") != NULL;
        const int64_t stride = number_after(msg, "--hidden-stride "),
                      layers = number_after(msg, "--layers with "), first = number_after(msg, "the first ");
        x = l;
        x.rule.hidden_stride = stride > 0 ? (int32_t)stride : 65536;
        assert_true(fits_disk(&x, limit, NULL) == (stride > 0));
        if (stride > 2) {
            x.rule.hidden_stride /= 2;
            assert_false(fits_disk(&x, limit, NULL));
        }
        seen[2] += stride > 0;
        x = l;
        for (int32_t o = 0; o < 21; o++) x.rule.has_keys[o] = o < (layers > 0 ? layers : 1);
        assert_true(fits_disk(&x, limit, NULL) == (layers > 0));
        if (layers > 0 && layers < 20) {
            x.rule.has_keys[layers] = true;
            assert_false(fits_disk(&x, limit, NULL));
        }
        seen[3] += layers > 0;
        x = l;
        x.n = first > 0 ? first : 1;
        assert_true(fits_disk(&x, limit, NULL) == (first > 0));
        x.n++;
        if (first > 0) assert_false(fits_disk(&x, limit, NULL));
        seen[4] += first > 0;
    }
    for (int i = 0; i < 5; i++) assert_true(seen[i] > 0 && seen[i] < 100);
}

static void test_host(void **state) {
    (void)state;
    static const int64_t length[] = {100000, 1 << 20, 5};
    lsa_dump_load l = load_of(length, 3);
    lsa_dump_plan p = plan_of(&l);
    lsa_err err = {0};
    assert_int_equal(p.longest, 1 << 20);
    assert_true(p.host[LSA_HOST_WEIGHTS] > (int64_t)(4 * 284.3e9));
    p.disk_free = INT64_MAX;
    p.host_budget = p.host_bytes;
    assert_int_equal(lsa_dump_fits(&p, &l, "here", &err), LSA_OK);
    p.host_budget--;
    assert_int_equal(lsa_dump_fits(&p, &l, "here", &err), LSA_E_NOMEM);
    assert_non_null(strstr(err.msg, "--no-stats"));
    assert_non_null(strstr(err.msg, "documents of at most 1048"));
    p.host_budget = p.host[LSA_HOST_WEIGHTS] - 1;
    err = (lsa_err){0};
    assert_int_equal(lsa_dump_fits(&p, &l, "here", &err), LSA_E_NOMEM);
    assert_non_null(strstr(err.msg, "the weights alone"));
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_closed_forms),
                                       cmocka_unit_test(test_disk_advice), cmocka_unit_test(test_host)};
    return cmocka_run_group_tests(tests, setup, NULL);
}
