/* Many requests of random lengths that join and leave on one GPU model, each with tiers of its own. C and
 * C++: the same judge runs on a GPU and over emulated kernels. */
#ifndef LSA_TESTS_TESTKIT_JUDGE_SOAK_H
#define LSA_TESTS_TESTKIT_JUDGE_SOAK_H

#include <stdint.h>

#include "kernels/ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ctx: a CUDA context. `steps` calls over up to `live` requests at a time; then every request that came to
 * its end alone: the same bits of all its logits. scale: prompts are up to 40 scale tokens, answers up to 24
 * scale, windows 8 scale. 0 if all is well. */
int judge_soak(lsa_ctx *ctx, const char *dir, int64_t steps, int32_t live, int32_t scale);

#ifdef __cplusplus
}
#endif
#endif
