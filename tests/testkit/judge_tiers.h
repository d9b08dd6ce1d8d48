/* The GPU session's tiers against the same rows all on the GPU, bit for bit; those against the CPU's session.
 * C and C++: the same judge runs on a GPU and over emulated kernels. */
#ifndef LSA_TESTS_TESTKIT_JUDGE_TIERS_H
#define LSA_TESTS_TESTKIT_JUDGE_TIERS_H

#include "tests/testkit/judge_session.h"

#ifdef __cplusplus
extern "C" {
#endif

/* As judge_session (tail at least tau). page: chunks a page in one of the runs; others have pages of one. */
int judge_tiers(lsa_ctx *ctx, const char *dir, const judge_plan *plan, int32_t page);

#ifdef __cplusplus
}
#endif
#endif
