/* lsa_validate on a GPU against the CPU's: every policy, row by row. C and C++: the same judge runs on a GPU
 * and over emulated kernels. */
#ifndef LSA_TESTS_TESTKIT_JUDGE_VALIDATE_H
#define LSA_TESTS_TESTKIT_JUDGE_VALIDATE_H

#include <stdint.h>

#include "kernels/ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ctx: a CUDA context; dir: a model folder with index keys of 128 channels. One random document of n tokens
 * under all policies, learned ones with a random indexer; a quarter, and then all, of the evictable chunks
 * stay. Prints the largest differences; 0 if all are in bounds. */
int judge_validate(lsa_ctx *ctx, const char *dir, int64_t n, int64_t tau, int64_t tail);

#ifdef __cplusplus
}
#endif
#endif
