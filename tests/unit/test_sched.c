/* The learning rate of a step. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "trainer/step.h"

static lsa_recipe recipe(int64_t steps, int64_t warmup, double lr, double min_lr, int64_t schedule) {
    lsa_recipe r;
    memset(&r, 0, sizeof r);
    r.steps = steps, r.warmup = warmup, r.lr = lr, r.min_lr = min_lr, r.schedule = schedule;
    return r;
}

static void near_to(double a, double b) {
    if (!(fabs(a - b) <= 1e-15)) fail_msg("%.17g is not %.17g", a, b);
}

static void test_reference_cosine(void **s) { /* no warm-up: lr/2 * (1 + cos(pi step / steps)) */
    (void)s;
    const lsa_recipe r = recipe(200, 0, 1e-4, 0, LSA_SCHED_COSINE);
    for (int64_t i = 0; i < 200; i++)
        near_to(lsa_lr(&r, i), 0.5e-4 * (1 + cos(acos(-1.0) * (double)i / 200)));
    near_to(lsa_lr(&r, 0), 1e-4);
    assert_true(lsa_lr(&r, 199) > 0);
    near_to(lsa_lr(&r, 200), 0);
    near_to(lsa_lr(&r, 100000), 0);
}

static void test_warmup(void **s) {
    (void)s;
    const lsa_recipe r = recipe(100, 10, 1e-3, 1e-5, LSA_SCHED_COSINE);
    for (int64_t i = 0; i < 10; i++) near_to(lsa_lr(&r, i), 1e-3 * (double)(i + 1) / 10);
    near_to(lsa_lr(&r, 10), 1e-3);
    near_to(lsa_lr(&r, 55), 0.5 * (1e-3 + 1e-5));
    near_to(lsa_lr(&r, 100), 1e-5);
    for (int64_t i = 11; i < 100; i++) assert_true(lsa_lr(&r, i) < lsa_lr(&r, i - 1));
}

static void test_constant(void **s) {
    (void)s;
    const lsa_recipe r = recipe(100, 4, 1e-3, 0, LSA_SCHED_CONSTANT);
    near_to(lsa_lr(&r, 1), 5e-4);
    near_to(lsa_lr(&r, 4), 1e-3);
    near_to(lsa_lr(&r, 99), 1e-3);
}

static void test_warmup_longer_than_the_run(void **s) {
    (void)s;
    const lsa_recipe r = recipe(5, 10, 1e-3, 0, LSA_SCHED_COSINE);
    for (int64_t i = 0; i < 12; i++) assert_true(isfinite(lsa_lr(&r, i)) && lsa_lr(&r, i) <= 1e-3);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_reference_cosine), cmocka_unit_test(test_warmup),
                                       cmocka_unit_test(test_constant),
                                       cmocka_unit_test(test_warmup_longer_than_the_run)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
