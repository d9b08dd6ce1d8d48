/* The truth, row by row: scalar, double accumulation, one thread. The ref backend loops over rows; the cpu
 * backend runs the same functions on its fixed partition where a row is cheap. Pure functions. */
#ifndef LSA_KERNELS_REF_ROWS_H
#define LSA_KERNELS_REF_ROWS_H

#include "kernels/ops.h"

void lsa_row_rmsnorm_fwd(const lsa_rmsnorm_fwd_args *a, int64_t i);
/* dx of row i; dg of column j over all rows. */
void lsa_row_rmsnorm_dx(const lsa_rmsnorm_bwd_args *a, int64_t i);
void lsa_col_rmsnorm_dg(const lsa_rmsnorm_bwd_args *a, int64_t j);
void lsa_row_rope_hadamard(const lsa_rope_hadamard_args *a, int64_t i);
void lsa_row_prior_fwd(const lsa_prior_fwd_args *a, int64_t i);
/* The gradient of weight k over all rows. */
float lsa_col_prior_dweight(const lsa_prior_bwd_args *a, int k);
void lsa_row_continuation_fwd(const lsa_continuation_fwd_args *a, int64_t i);
void lsa_row_continuation_dz(const lsa_continuation_bwd_args *a, int64_t i);
void lsa_row_loss_pointwise(const lsa_loss_pointwise_args *a, int64_t i);
void lsa_row_loss_pairwise(const lsa_loss_pairwise_args *a, int64_t i);
void lsa_row_loss_kl(const lsa_loss_kl_args *a, int64_t i);

/* Key row of candidate j of query i, clamped into the pool. */
static inline int64_t lsa_key_row(const int64_t *key_base, const int32_t *cand, int64_t n, int64_t n_key,
                                  int64_t i, int64_t j) {
    int64_t r = key_base[i] + (cand ? cand[i * n + j] : j);
    return r < 0 ? 0 : r >= n_key ? n_key - 1 : r;
}

#endif
