/* Every tolerance of the op tests, beside its reason. Loosening one needs a CHANGELOG line and a decision
 * record.
 *
 * rtol is relative to max(|truth|, rms of the truth): see compare.h. U is half a float step. Headroom: the
 * largest error seen on the CPU column (2026-11, AVX-512 machine) as a share of the bound; the GPU's is
 * printed by the same tests. */
#ifndef LSA_TESTS_TESTKIT_TOL_H
#define LSA_TESTS_TESTKIT_TOL_H

#include <math.h>

#include "tests/testkit/compare.h"

#define LSA_U 0x1p-24

/* Copies, indices, masks, zeroing. */
static inline lsa_tol lsa_tol_exact(void) {
    return (lsa_tol){0, 0, 0};
}
/* Elementwise f32: a few roundings of the same formula (4 steps). */
static inline lsa_tol lsa_tol_elem(void) {
    return (lsa_tol){1e-37, 8 * LSA_U, 1e-11};
}
/* f32 sums of n terms in any order: errors of random sign grow like sqrt(n); 8 for the tail of many outputs.
 */
static inline lsa_tol lsa_tol_sum(double n) {
    return (lsa_tol){1e-37, 8 * LSA_U * sqrt(n < 1 ? 1 : n), 1e-10};
}
/* Scores: a product of 128 terms, then a signed sum over heads; both bounds add. */
static inline lsa_tol lsa_tol_score(double n_head) {
    return (lsa_tol){1e-37, lsa_tol_sum(128).rtol + lsa_tol_sum(n_head).rtol, 1e-10};
}
/* Score gradients: the products of lsa_tol_score, then a sum over the candidates. */
static inline lsa_tol lsa_tol_score_grad(double n_cand) {
    return (lsa_tol){1e-37, lsa_tol_sum(128).rtol + lsa_tol_sum(n_cand).rtol, 1e-10};
}
/* RoPE and Hadamard: sin and cos within 2 steps, one rotation, log2(d) additions. */
static inline lsa_tol lsa_tol_rope(double d) {
    return (lsa_tol){1e-37, LSA_U * (12 + 2 * log2(d)), 1e-10};
}
/* Losses and their gradients: computed in double on every backend, rounded once. */
static inline lsa_tol lsa_tol_loss(void) {
    return (lsa_tol){1e-37, 4 * LSA_U, 1e-12};
}
/* Row losses (double). 1e-7: a backend may use single precision exp inside a row. */
static inline lsa_tol lsa_tol_row_loss(void) {
    return (lsa_tol){1e-300, 2e-7, 0};
}
/* A chain of four products and a norm: the query path and its backward. */
static inline lsa_tol lsa_tol_chain(double longest) {
    return (lsa_tol){1e-37, 4 * lsa_tol_sum(longest).rtol, 1e-9};
}
/* `ref` against PyTorch autograd in float64: `ref` keeps intermediate tensors in f32. */
static inline lsa_tol lsa_tol_oracle(void) {
    return (lsa_tol){1e-37, 1e-5, 1e-10};
}

#endif
