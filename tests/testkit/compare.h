/* The one comparison of the project, written as a pass condition so that NaN fails.
 *
 * Three gates: NaN/Inf sit at the same places with the same sign; every element passes
 * |a-b| <= atol + rtol*max(|b|, rms(b)); 1-cos(a,b) <= ctol (skipped if ctol is 0 or b is all zero). Returns
 * true on success, else prints count, worst index, both values and the limit. `b` is the truth. */
#ifndef LSA_TESTS_TESTKIT_COMPARE_H
#define LSA_TESTS_TESTKIT_COMPARE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct lsa_tol {
    double atol, rtol, ctol;
} lsa_tol;

bool lsa_compare_f32(const char *what, const float *a, const float *b, int64_t n, lsa_tol tol);
bool lsa_compare_f64(const char *what, const double *a, const double *b, int64_t n, lsa_tol tol);
/* Largest |a-b|/max(|b|, rms(b)); NaN if any element is. For reporting headroom. */
double lsa_worst_rel_f32(const float *a, const float *b, int64_t n);

#endif
