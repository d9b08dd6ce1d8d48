/* Continuation: a chunk's score is lent to the chunks that follow it, at a learned cost for each step of
 * distance. What the next window reads is often the continuation of what was read before, which no key of its
 * own announces.
 *
 * z'(c) = max over 0 <= j <= reach of z(c - j) - b_j, b_0 = 0, b_j >= 0; chunks before the first do not
 * exist. z is the sum of the joint layers' logits. The op of the trainer (ops.h) is the same formula with its
 * gradient. Pure, thread-safe, allocates nothing. */
#ifndef LSA_KERNELS_MODEL_CONTINUATION_H
#define LSA_KERNELS_MODEL_CONTINUATION_H

#include <stdint.h>

#include "kernels/core/lsa_ids.h"
#include "kernels/core/lsa_status.h"

/* What costs start at in training. With 0 every chunk would start as the best of its last 17 and the layers
 * learn nothing finer than that; LSA_COST_START TODO */
#define LSA_COST_START 1.0f

/* out[n] from z[n]; out may be z itself, but not overlap it otherwise. cost[reach]: b_1 .. b_reach; reach 0
 * copies. from [n], NULL allowed: the j that won (ties: the smallest). A NaN stays
 * where it is and is not lent. */
void lsa_continue(float *out, uint8_t *from, const float *z, int64_t n, const float *cost, int32_t reach);

/* LSA_E_FORMAT unless reach is in [0, LSA_MAX_REACH] and every cost finite and >= 0; `where` begins the
 * message. */
LSA_NODISCARD lsa_status lsa_continuation_check(const float *cost, int64_t reach, const char *where,
                                                lsa_err *err);

#endif
