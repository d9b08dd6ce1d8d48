/* The fit of a logistic curve: a known curve is found again, the optimum is one (both sums of residuals
 * vanish), and where there is no maximum nothing is invented. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "tests/testkit/compare.h"
#include "trainer/platt.h"

enum { N = 400 };

static void curve(double *z, int64_t *golden, int64_t *other, double temperature, double offset,
                  double shift) {
    for (int i = 0; i < N; i++) {
        z[i] = shift + 6.0 * (i - N / 2) / N;
        const double p = 1 / (1 + exp(-(z[i] / temperature + offset)));
        golden[i] = llround(1e9 * p);
        other[i] = llround(1e9 * (1 - p));
    }
}

static void known(double temperature, double offset, double shift) {
    double z[N];
    int64_t golden[N], other[N];
    lsa_platt f;
    curve(z, golden, other, temperature, offset, shift);
    assert_int_equal(lsa_platt_fit(&f, z, golden, other, N, NULL), LSA_OK);
    assert_null(f.identity);
    const double got[] = {(double)f.temperature, (double)f.offset}, want[] = {temperature, offset};
    assert_true(lsa_compare_f64("temperature and offset", got, want, 2, (lsa_tol){1e-5, 1e-5, 0}));
}

static void test_known_curves(void **state) {
    (void)state;
    known(1, 0, 0);
    known(0.5, -4, 0);
    known(3, 1.5, 0);
    known(0.25, -3, 0.5);
    known(2, 40, -80); /* far from zero: the shift must not cost digits */
}

/* Four points by hand: at z = 0 one in four is golden, at z = 1 three in four: logit -log 3 and log 3. */
static void test_closed_form(void **state) {
    (void)state;
    const double z[] = {0, 1};
    const int64_t golden[] = {1, 3}, other[] = {3, 1};
    lsa_platt f;
    assert_int_equal(lsa_platt_fit(&f, z, golden, other, 2, NULL), LSA_OK);
    const double got[] = {(double)f.temperature, (double)f.offset}, want[] = {1 / (2 * log(3)), -log(3)};
    assert_true(lsa_compare_f64("closed form", got, want, 2, (lsa_tol){0, 1e-6, 0}));
}

static void identity(const double *z, const int64_t *golden, const int64_t *other, int64_t n,
                     const char *why) {
    lsa_platt f;
    assert_int_equal(lsa_platt_fit(&f, z, golden, other, n, NULL), LSA_OK);
    if (!f.identity || !strstr(f.identity, why))
        fail_msg("'%s', expected '%s'", f.identity ? f.identity : "fitted", why);
    assert_true(f.temperature == 1 && f.offset == 0);
}

static void test_degenerate(void **state) {
    (void)state;
    const double z[] = {-2, -1, 1, 2};
    const int64_t none[] = {0, 0, 0, 0}, some[] = {5, 6, 7, 8}, low[] = {3, 4, 0, 0}, high[] = {0, 0, 4, 3},
                  falls[] = {9, 6, 3, 1}, rises[] = {1, 3, 6, 9};
    identity(z, none, some, 4, "no chunk is golden");
    identity(z, some, none, 4, "every chunk is golden");
    identity(z, none, none, 4, "no chunk is golden");
    identity(z, high, low, 4, "separates");
    identity(z, low, high, 4, "separates");
    identity(z, falls, rises, 4, "does not rise");
    const double one[] = {3, 3, 3, 3};
    identity(one, some, some, 4, "separates"); /* a single value says nothing about the slope */
    identity(z, none, none, 0, "no chunk is golden");
}

static void test_not_finite(void **state) {
    (void)state;
    const int64_t count[] = {1, 2};
    lsa_platt f;
    const double nan[] = {0, (double)NAN}, inf[] = {0, (double)INFINITY};
    assert_int_equal(lsa_platt_fit(&f, nan, count, count, 2, NULL), LSA_E_NUMERIC);
    assert_int_equal(lsa_platt_fit(&f, inf, count, count, 2, NULL), LSA_E_NUMERIC);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_known_curves),
                                       cmocka_unit_test(test_closed_form), cmocka_unit_test(test_degenerate),
                                       cmocka_unit_test(test_not_finite)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
