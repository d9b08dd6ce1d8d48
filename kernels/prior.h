/* Observed-mass prior: what level 2 gave a chunk in the window just decoded, and before it, is added to the
 * chunk's score with learned weights. What is in use now is often needed again, which a key cannot say.
 *
 * m(c): attention mass on chunk c, mean over all CSA layers, heads and tokens of the window just decoded.
 * M(c): a decayed memory of the windows before that one: when a window ends M becomes DECAY * M + m, then m
 * becomes the ended window's. Features f(x) = ln(1 + x / UNIT) of both (constants: lsa_ids.h); z'(c) = z(c) +
 * w_1 f(m) + w_2 f(M) with z the sum of the joint layers' logits, before any continuation (continuation.h),
 * so that observed use goes on into the chunks that follow. A chunk without mass adds exactly nothing.
 *
 * Pure, thread-safe. */
#ifndef LSA_KERNELS_PRIOR_H
#define LSA_KERNELS_PRIOR_H

#include <stdint.h>

#include "kernels/core/prior_math.h"

/* Windows that a memory made from records (trainer) adds up: an older one weighs less than DECAY^64 = 0.0012
 * and is left out; a memory kept by the rule above (decoder, servers) forgets it by itself. */
enum { LSA_PRIOR_WINDOWS = 64 };

/* A window ends: recent[n] (masses) goes into memory[n] and becomes 0. */
void lsa_prior_end_window(float *recent, float *memory, int64_t n);

/* p[n]: what is added to the scores, from masses. p may be one of them. */
void lsa_prior_values(float *p, const float *recent, const float *memory, const float w[LSA_PRIOR_WEIGHTS],
                      int64_t n);

#endif
