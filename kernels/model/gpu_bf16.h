/* A teacher layer at bf16 on tensor cores: what a V4-Flash or V4-Pro size pass needs. Tier B of the
 * architecture notes without the fp8 quantisation of a product's input: bf16 between operators, f32 inside,
 * weights in bf16 (FP8, FP4 and bf16 storage is exact in it), the cache and index simulations by the
 * geometry's flags. Index logits are f32 sums of f16 products of bf16-rounded vectors and are the logits that
 * selection goes by.
 *
 * Errors: LSA_E_NOMEM, LSA_E_DEVICE, LSA_E_CONFIG (a geometry that this path does not have). One thread.
 * Deterministic: the same inputs give the same bits. */
#ifndef LSA_KERNELS_MODEL_GPU_BF16_H
#define LSA_KERNELS_MODEL_GPU_BF16_H

#include "kernels/model/gpu_teacher.h"

/* Device pointers, row-major, 16-byte aligned. bf16 as uint16_t. fn: its three bf16 parts (high, middle, low,
 * whose sum is the f32 matrix), one above the other. Otherwise as lsa_gpu_layer_weights. */
typedef struct lsa_bf16_weights {
    int32_t ratio, roles;
    int32_t nx, at_kv, at_cv, at_cg, at_iv, at_ig, at_iw;
    const uint16_t *attn_fn, *ffn_fn; /* [3 n(n+2), n d] */
    const float *attn_base, *attn_scale, *ffn_base, *ffn_scale;
    const float *attn_norm, *ffn_norm, *q_norm, *kv_norm, *sink;
    const uint16_t *wx, *wq, *wo_a, *wo_b;
    const float *ape, *comp_norm, *iape, *icomp_norm;
    const uint16_t *gate;
    const float *gate_bias;
    const int64_t *tid2eid;
    const uint16_t *w13, *w2; /* [E+1, 2 moe, d] [E+1, d, moe] */
} lsa_bf16_weights;

typedef enum lsa_bf16_stage {
    LSA_BF16_STREAMS_IN = 0, /* collapse before attention */
    LSA_BF16_PROJECT,
    LSA_BF16_COMPRESS,
    LSA_BF16_INDEX,
    LSA_BF16_ATTEND,
    LSA_BF16_OUTPUT,
    LSA_BF16_STREAMS_MID, /* expand, collapse before the experts */
    LSA_BF16_MOE,
    LSA_BF16_STREAMS_OUT,
    LSA_BF16_STAGES
} lsa_bf16_stage;
const char *lsa_bf16_stage_name(lsa_bf16_stage stage);

typedef struct lsa_bf16 lsa_bf16;
/* Room for documents of max_tokens, `chunk` at a time. freq: host [rope_dim/2]. */
LSA_NODISCARD lsa_status lsa_bf16_create(lsa_bf16 **out, lsa_ctx *ctx, const lsa_gpu_teacher_geom *g,
                                         const float *freq_main, const float *freq_comp, int64_t max_tokens,
                                         int64_t chunk, lsa_err *err);
void lsa_bf16_destroy(lsa_bf16 *b); /* NULL allowed */
/* Device bytes that create would allocate. */
int64_t lsa_bf16_bytes(const lsa_gpu_teacher_geom *g, int64_t max_tokens, int64_t chunk);

/* Tokens [p, p + m) of a document through a layer, m at most the chunk, p where the last call ended: X device
 * [m, streams, d] bf16, in place; token device [m]. Queued; the host waits once, for the experts' row counts.
 */
LSA_NODISCARD lsa_status lsa_bf16_layer(lsa_bf16 *b, const lsa_bf16_weights *w, uint16_t *X,
                                        const int32_t *token, int64_t p, int64_t m, lsa_err *err);

/* Of the last call in a CSA layer, on the device: sel [m, top] ascending, n_sel [m] of them count, their
 * logits and masses (mean of heads), part [2, m] window and sink mass. */
typedef struct lsa_bf16_rows {
    const int32_t *sel, *n_sel;
    const float *sel_logit, *mass, *part;
} lsa_bf16_rows;
lsa_bf16_rows lsa_bf16_selected(const lsa_bf16 *b);

/* While on, every call waits for the GPU and adds its seconds by stage. */
void lsa_bf16_time(lsa_bf16 *b, bool on);
void lsa_bf16_seconds(const lsa_bf16 *b, double out[LSA_BF16_STAGES]);

#endif
