/* A lane handles items in order, holds back who gives too much, and ends with the first failure; nothing is
 * lost and nothing handled twice. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <unistd.h>

#include "data/dump/lane.h"
#include "kernels/core/mem.h"

enum { ITEMS = 200 };

typedef struct seen {
    int n, order[ITEMS], fail_at;
} seen;
static int g_dropped[ITEMS];

static lsa_status handle(void *user, void *item, lsa_err *err) {
    seen *const s = user;
    const int i = *(const int *)item;
    if (i % 50 == 0) usleep(2000);
    if (i == s->fail_at) LSA_RET_FAIL(LSA_E_NOSPC, "item %d does not fit", i);
    s->order[s->n++] = i;
    return LSA_OK;
}
static void drop(void *item) {
    g_dropped[*(int *)item]++;
    free(item);
}

static int *made(int i) {
    int *const p = malloc(sizeof *p);
    assert_non_null(p);
    *p = i;
    return p;
}

static void test_order(void **state) {
    (void)state;
    lsa_lane *l;
    lsa_err err = {0};
    seen s = {.fail_at = -1};
    for (int i = 0; i < ITEMS; i++) g_dropped[i] = 0;
    assert_int_equal(lsa_lane_create(&l, "test", 10, handle, drop, &s, &err), LSA_OK);
    assert_true(lsa_lane_try(l, 1000)); /* more than the limit, but nothing else is there */
    assert_false(lsa_lane_try(l, 1));
    assert_int_equal(lsa_lane_give(l, made(0), 1000, &err), LSA_OK);
    for (int i = 1; i < ITEMS; i++) {
        assert_int_equal(lsa_lane_reserve(l, 3, &err), LSA_OK);
        assert_int_equal(lsa_lane_give(l, made(i), 3, &err), LSA_OK);
    }
    assert_int_equal(lsa_lane_finish(l, false, &err), LSA_OK);
    assert_int_equal(s.n, ITEMS);
    for (int i = 0; i < ITEMS; i++) {
        assert_int_equal(s.order[i], i);
        assert_int_equal(g_dropped[i], 1);
    }
    assert_true(lsa_lane_seconds(l) > 0);
    lsa_lane_destroy(l);
}

static void test_failure(void **state) {
    (void)state;
    lsa_lane *l;
    lsa_err err = {0};
    seen s = {.fail_at = 7};
    lsa_status st = LSA_OK;
    int given = 0;
    for (int i = 0; i < ITEMS; i++) g_dropped[i] = 0;
    assert_int_equal(lsa_lane_create(&l, "test", 5, handle, drop, &s, &err), LSA_OK);
    for (; given < ITEMS && st == LSA_OK; given++) {
        st = lsa_lane_reserve(l, 5, &err);
        if (st != LSA_OK) break;
        st = lsa_lane_give(l, made(given), 5, &err);
    }
    assert_int_equal(st, LSA_E_NOSPC);
    assert_string_equal(err.msg, "item 7 does not fit");
    err = (lsa_err){0};
    assert_int_equal(lsa_lane_finish(l, false, &err), LSA_E_NOSPC);
    lsa_lane_destroy(l);
    assert_int_equal(s.n, 7);
    for (int i = 0; i < given; i++) assert_int_equal(g_dropped[i], 1);
}

static void test_abandoned(void **state) {
    (void)state;
    lsa_lane *l;
    lsa_err err = {0};
    seen s = {.fail_at = -1};
    for (int i = 0; i < ITEMS; i++) g_dropped[i] = 0;
    assert_int_equal(lsa_lane_create(&l, "test", 1000, handle, drop, &s, &err), LSA_OK);
    for (int i = 0; i < 100; i++) assert_int_equal(lsa_lane_give(l, made(i), 0, &err), LSA_OK);
    lsa_lane_destroy(l);
    assert_true(s.n <= 100);
    for (int i = 0; i < 100; i++) assert_int_equal(g_dropped[i], 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_order), cmocka_unit_test(test_failure),
                                       cmocka_unit_test(test_abandoned)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
