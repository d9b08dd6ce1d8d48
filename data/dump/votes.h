/* The vote of one CSA layer for one token (FlashMemory notes 3.2): softmax over the pool of the highest
 * native logits, then the smallest prefix, in descending order, whose mass exceeds top_p; rank 0 always
 * votes. Pure, thread-safe. */
#ifndef LSA_DATA_DUMP_VOTES_H
#define LSA_DATA_DUMP_VOTES_H

#include <stdint.h>

#define LSA_MAX_POOL 4096

/* pool[n]: chunk ids ascending, logit[n]: their native logits. Writes the voted chunks, ascending, to out;
 * returns how many. */
int32_t lsa_votes(const int32_t *pool, int32_t n, const float *logit, double top_p, int32_t *out);

#endif
