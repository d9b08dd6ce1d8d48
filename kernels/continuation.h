/* Continuation: a chunk's score is lent to the chunks that follow it, at a learned cost for each step of
 * distance. What the next window reads is often the continuation of what was read before, which no key of its
 * own announces.
 *
 * z'(c) = max over 0 <= j <= reach of z(c - j) - b_j, b_0 = 0, b_j >= 0; chunks before the first do not
 * exist. z is the sum of the joint layers' logits. The op of the trainer (ops.h) is the same formula with its
 * gradient. Pure, thread-safe, allocates nothing. */
#ifndef LSA_KERNELS_CONTINUATION_H
#define LSA_KERNELS_CONTINUATION_H

#include <stdint.h>

#include "kernels/core/lsa_ids.h"

/* out[n] from z[n]; out may be z itself, but not overlap it otherwise. cost[reach]: b_1 .. b_reach; reach 0
 * copies. from [n], NULL allowed: the j that won (ties: the smallest). A NaN stays
 * where it is and is not lent. */
void lsa_continue(float *out, uint8_t *from, const float *z, int64_t n, const float *cost, int32_t reach);

#endif
