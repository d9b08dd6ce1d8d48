/* The bf16 layer on the card: a tiny geometry in every kind of layer, then V4-Flash's heads (64 of 512, 512
 * selected, window 128) over few channels, documents long enough that most chunks are left out. Skipped
 * without a GPU. */
#include <stdio.h>

#include "tests/testkit/judge_bf16.h"

int main(void) {
    lsa_ctx *ctx = NULL;
    lsa_err err = {0};
    if (lsa_ctx_create(&ctx, "cuda", &err) != LSA_OK) {
        printf("skipped: %s\n", err.msg);
        return 77;
    }
    lsa_gpu_teacher_geom g = {.hidden = 64,
                              .n_head = 4,
                              .head_dim = 128,
                              .rope_dim = 64,
                              .q_rank = 32,
                              .o_groups = 2,
                              .o_rank = 16,
                              .window = 16,
                              .index_n_head = 5,
                              .index_head_dim = 128,
                              .index_topk = 8,
                              .n_expert = 6,
                              .n_expert_tok = 2,
                              .moe_dim = 32,
                              .hc_mult = 4,
                              .hc_iters = 20,
                              .vocab = 50,
                              .hc_eps = 1e-6f,
                              .norm_eps = 1e-6f,
                              .route_scale = 1.5f,
                              .swiglu_limit = 1.0f};
    int bad = judge_bf16(ctx, &g, 4, 2, false, 900, 400, 3);
    bad += judge_bf16(ctx, &g, 16, 1, true, 700, 330, 3);
    bad += judge_bf16(ctx, &g, 0, 0, false, 400, 400, 3);
    g.sim_fp8_kv = g.sim_fp4_index = true;
    bad += judge_bf16(ctx, &g, 4, 2, true, 900, 900, 3);
    g.sim_fp8_kv = g.sim_fp4_index = false;
    g.n_head = 64, g.head_dim = 512, g.q_rank = 64, g.o_groups = 8, g.o_rank = 16, g.hidden = 128;
    g.window = 128, g.index_n_head = 64, g.index_topk = 512, g.n_expert = 16, g.n_expert_tok = 6;
    bad += judge_bf16(ctx, &g, 4, 2, false, 6000, 2500, 500);
    bad += judge_bf16(ctx, &g, 128, 1, false, 6000, 6000, 500);
    lsa_ctx_destroy(ctx);
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
