/* The GPU session against the CPU's on the mini teacher: prefill, windows of 64 under resident sets, single
 * tokens; with cache simulations too. A soak of 6,000 steps over 32 requests. Tiers against encoded rows all
 * on the GPU, bit for bit. Skipped without a GPU. */
#include <stdio.h>

#include "tests/testkit/judge_soak.h"
#include "tests/testkit/judge_tiers.h"

int main(void) {
    lsa_ctx *ctx = NULL;
    lsa_err err = {0};
    if (lsa_ctx_create(&ctx, "cuda", &err) != LSA_OK) {
        printf("skipped: %s\n", err.msg);
        return 77;
    }
    const judge_plan plain = {3000, 2048, 1024, 64, 30, 256, false},
                     sim = {1500, 1000, 333, 64, 10, 256, true};
    int bad = judge_session(ctx, "recipes/mini/teacher", &plain);
    bad += judge_session(ctx, "recipes/mini/teacher", &sim);
    const judge_plan tail = {1500, 1000, 512, 64, 10, 0, false};
    bad += judge_tiers(ctx, "recipes/mini/teacher", &plain, 64);
    bad += judge_tiers(ctx, "recipes/mini/teacher", &tail, 64);
    bad += judge_soak(ctx, "recipes/mini/teacher", 6000, 32, 8);
    lsa_ctx_destroy(ctx);
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
