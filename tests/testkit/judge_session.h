/* The GPU session against the CPU's, call by call, with and without resident sets: selections, misses, native
 * logits, masses, hidden vectors, keys, next-token logits. C and C++: the same judge runs on a GPU and over
 * emulated kernels. */
#ifndef LSA_TESTS_TESTKIT_JUDGE_SESSION_H
#define LSA_TESTS_TESTKIT_JUDGE_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ctx: a CUDA context; dir: a model folder. n random tokens: `prefill` of them in calls of `chunk`, then
 * windows of `tau`, then the last ones singly. Prints the largest differences; 0 if all are in bounds. */
typedef struct judge_plan {
    int64_t n, prefill, chunk, tau, single, tail;
    bool sim; /* both cache simulations */
} judge_plan;
int judge_session(lsa_ctx *ctx, const char *dir, const judge_plan *plan);

#ifdef __cplusplus
}
#endif
#endif
