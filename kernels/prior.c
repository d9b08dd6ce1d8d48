/* The observed-mass prior on host rows: see prior.h. */
#include "kernels/prior.h"

void lsa_prior_end_window(float *recent, float *memory, int64_t n) {
    for (int64_t c = 0; c < n; c++) {
        memory[c] = fmaf(LSA_PRIOR_DECAY, memory[c], recent[c]);
        recent[c] = 0;
    }
}

void lsa_prior_values(float *p, const float *recent, const float *memory, const float w[LSA_PRIOR_WEIGHTS],
                      int64_t n) {
#pragma omp simd
    for (int64_t c = 0; c < n; c++)
        p[c] = lsa_prior_value(w, lsa_prior_feature(recent[c]), lsa_prior_feature(memory[c]));
}
