/* The GPU's bf16 layer against the same formulas in double precision with tier B's roundings. C and C++. */
#ifndef LSA_TESTS_TESTKIT_JUDGE_BF16_H
#define LSA_TESTS_TESTKIT_JUDGE_BF16_H

#include "kernels/model/gpu_bf16.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A document of n tokens, `chunk` at a time, through a layer of made-up weights; every `every`th token is
 * computed again on the host and compared: streams (rms), which chunks were selected, their masses. 0 if they
 * agree. */
int judge_bf16(lsa_ctx *ctx, const lsa_gpu_teacher_geom *g, int32_t ratio, int32_t roles, bool hash,
               int64_t n, int64_t chunk, int64_t every);

#ifdef __cplusplus
}
#endif
#endif
