/* The GPU teacher against the CPU's session: one chunk, many chunks, with cache simulations, and a document
 * long enough that selections leave out most chunks. Skipped without a GPU. */
#include <stdio.h>

#include "tests/testkit/judge_teacher.h"

int main(void) {
    lsa_ctx *ctx = NULL;
    lsa_err err = {0};
    if (lsa_ctx_create(&ctx, "cuda", &err) != LSA_OK) {
        printf("skipped: %s\n", err.msg);
        return 77;
    }
    int bad = judge_teacher(ctx, "recipes/mini/teacher", 1000, 1000, false);
    bad += judge_teacher(ctx, "recipes/mini/teacher", 4000, 512, false);
    bad += judge_teacher(ctx, "recipes/mini/teacher", 2000, 333, true);
    bad += judge_dump(ctx, "recipes/mini/teacher", 3000);
    lsa_ctx_destroy(ctx);
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
