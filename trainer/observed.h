/* What level 2 read in the windows of a document, from the native masses of its rows: where the features of
 * the observed-mass prior (kernels/prior.h) come from in training. */
#ifndef LSA_TRAINER_OBSERVED_H
#define LSA_TRAINER_OBSERVED_H

#include "data/lsa_shard.h"

typedef struct lsa_observed {
    int64_t tau, n_window; /* window k: tokens [k tau, (k+1) tau) */
    int64_t n_key;         /* chunks of the document */
    int64_t *begin;        /* [n_window+1] */
    int32_t *chunk;        /* [begin[n_window]], ascending in a window */
    float *mass;           /* mean over CSA layers and the window's tokens (those that have rows) */
} lsa_observed;

/* native [n_csa]: one row for each of the tokens first .. first + n_row - 1. n_key: chunks of the document.
 */
LSA_NODISCARD lsa_status lsa_observed_build(lsa_observed *o, const lsa_csr *native, int32_t n_csa,
                                            int64_t first, int64_t n_row, int64_t n_key, int64_t tau,
                                            lsa_err *err);
void lsa_observed_fini(lsa_observed *o);
int64_t lsa_observed_bytes(const lsa_observed *o);

/* Masses recent[n_key] and memory[n_key] (kernels/prior.h) before the window that starts at token `start`, a
 * multiple of tau, if every chunk was resident: from the windows that end at or before it, and from no other.
 * Pure, thread-safe. */
void lsa_observed_masses(float *recent, float *memory, const lsa_observed *o, int64_t start);

#endif
