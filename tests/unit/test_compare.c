/* The checker must fail where it should: NaN, Inf, one element off by 4x, all off by 1 %, shifted by one row.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "tests/testkit/compare.h"

static const lsa_tol T = {1e-6, 1e-3, 1e-6};
#define N 64

static void fill(float *b) {
    for (int i = 0; i < N; i++) b[i] = (float)(i % 7) - 2.5f;
}

static void test_passes_equal(void **s) {
    (void)s;
    float a[N], b[N];
    fill(b);
    memcpy(a, b, sizeof a);
    assert_true(lsa_compare_f32("equal", a, b, N, T));
    a[3] = b[3] = NAN;
    assert_true(lsa_compare_f32("same NaN", a, b, N, T));
}

static void test_must_fail(void **s) {
    (void)s;
    float a[N], b[N];
    fill(b);
    memcpy(a, b, sizeof a);
    for (int i = 0; i < N; i++) a[i] = NAN;
    assert_false(lsa_compare_f32("all NaN", a, b, N, T));
    memcpy(a, b, sizeof a);
    a[5] = INFINITY;
    assert_false(lsa_compare_f32("Inf", a, b, N, T));
    memcpy(a, b, sizeof a);
    a[9] *= 4;
    assert_false(lsa_compare_f32("4x", a, b, N, T));
    for (int i = 0; i < N; i++) a[i] = b[i] * 1.01f;
    assert_false(lsa_compare_f32("1 %", a, b, N, T));
    for (int i = 0; i < N; i++) a[i] = b[(i + 8) % N];
    assert_false(lsa_compare_f32("shifted", a, b, N, T));
    memcpy(a, b, sizeof a);
    b[2] = NAN;
    assert_false(lsa_compare_f32("missing NaN", a, b, N, T));
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_passes_equal), cmocka_unit_test(test_must_fail)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
