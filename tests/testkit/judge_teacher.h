/* The GPU teacher against the CPU's session on the mini teacher: selections, native logits, masses, hidden
 * vectors, keys, next-token logits. C and C++: the same judge runs on a GPU and over emulated kernels. */
#ifndef LSA_TESTS_TESTKIT_JUDGE_TEACHER_H
#define LSA_TESTS_TESTKIT_JUDGE_TEACHER_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ctx: a CUDA context. n random tokens, `chunk` at a time; sim: with both cache simulations. Prints the
 * largest differences; 0 if all are in bounds. */
int judge_teacher(lsa_ctx *ctx, const char *dir, int64_t n, int64_t chunk, bool sim);
/* What lsa-dump would store of a document of n random tokens, read by both. */
int judge_dump(lsa_ctx *ctx, const char *dir, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
