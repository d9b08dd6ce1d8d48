/* The teacher's forward pass on one GPU, a document at a time, layer after layer: DeepSeek-V4 in fp32 (tier
 * A), the arithmetic of infer/session.c. Weights of a layer are a handle of their own, so that they can stay
 * or come and go. Formulas: architecture notes of DeepSeek-V4, sections 2 to 9 and 15.
 *
 * NUMERIC: f32 products without TF32; sums of a product in cuBLASLt's order, all others fixed: the same
 * inputs give the same bits. Selections among equal logits go to the lower chunk. Errors: LSA_E_NOMEM,
 * LSA_E_DEVICE, LSA_E_CONFIG (a geometry that this path does not have), LSA_E_UNSUPPORTED in builds without
 * CUDA. One thread. */
#ifndef LSA_KERNELS_MODEL_GPU_TEACHER_H
#define LSA_KERNELS_MODEL_GPU_TEACHER_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"
#include "kernels/ctx.h"

typedef struct lsa_gpu_teacher_geom {
    int32_t hidden, n_head, head_dim, rope_dim, q_rank, o_groups, o_rank, window;
    int32_t index_n_head, index_head_dim, index_topk;
    int32_t n_expert, n_expert_tok, moe_dim, hc_mult, hc_iters, vocab;
    float hc_eps, norm_eps, route_scale, swiglu_limit; /* swiglu_limit 0: none */
    bool sim_fp8_kv, sim_fp4_index;
} lsa_gpu_teacher_geom;

/* One layer's weights in host memory, f32, row-major; see infer/engine.h for what is stacked. ratio 0: window
 * only; roles 2: CSA (with an indexer), 1: HCA. */
typedef struct lsa_gpu_layer_weights {
    int32_t ratio, roles;
    int32_t nx, at_kv, at_cv, at_cg, at_iv, at_ig, at_iw; /* rows of wx; -1: absent */
    const float *attn_fn, *attn_base, *attn_scale;        /* mHC: [n(n+2), n d] [n(n+2)] [3] */
    const float *ffn_fn, *ffn_base, *ffn_scale;
    const float *attn_norm, *ffn_norm, *q_norm, *kv_norm, *sink; /* [d] [d] [q_rank] [D] [H] */
    const float *wx, *wq;                                        /* [nx, d] [H D (+ Hi Di), q_rank] */
    const float *wo_a, *wo_b;                                    /* [G R, H D / G] [d, G R] */
    const float *ape, *comp_norm, *iape, *icomp_norm; /* [ratio, roles D] [D] [4, 2 Di] [Di]; or NULL */
    const float *gate, *gate_bias;                    /* [E, d] [E] or NULL */
    const int64_t *tid2eid;                           /* [vocab, k] or NULL */
    const float *w13, *w2;                            /* [E+1, 2 moe, d] [E+1, d, moe]; the last: shared */
} lsa_gpu_layer_weights;

typedef struct lsa_gpu_teacher lsa_gpu_teacher;
typedef struct lsa_gpu_layer lsa_gpu_layer;

/* Room for documents of max_tokens tokens, computed `chunk` tokens at a time; max_tokens 0: no documents, for
 * sessions only (gpu_session.h). freq_main, freq_comp: host
 * [rope_dim/2]. embed, head: host [vocab, d]; norm [d]; head_fn [n, n d], head_base [n], head_scale [1]. */
typedef struct lsa_gpu_teacher_tables {
    const float *freq_main, *freq_comp, *embed, *head, *norm, *head_fn, *head_base, *head_scale;
} lsa_gpu_teacher_tables;
LSA_NODISCARD lsa_status lsa_gpu_teacher_create(lsa_gpu_teacher **out, lsa_ctx *ctx,
                                                const lsa_gpu_teacher_geom *g,
                                                const lsa_gpu_teacher_tables *w, int64_t max_tokens,
                                                int64_t chunk, lsa_err *err);
void lsa_gpu_teacher_destroy(lsa_gpu_teacher *t); /* NULL allowed */

LSA_NODISCARD lsa_status lsa_gpu_layer_put(lsa_gpu_layer **out, lsa_gpu_teacher *t,
                                           const lsa_gpu_layer_weights *w, lsa_err *err);
void lsa_gpu_layer_drop(lsa_gpu_layer *l); /* NULL allowed; before the teacher */

/* A document begins: its streams are the embeddings of token [n], ids inside the vocabulary. probe [n_probe],
 * ascending, at most LSA_GPU_MAX_PROBE: positions whose whole rows of native logits are wanted. dense_every >
 * 0: the dense mass (notes 15.1) of positions with (position + 1) mod dense_every = 0 is wanted. */
enum { LSA_GPU_MAX_PROBE = 4 };
LSA_NODISCARD lsa_status lsa_gpu_teacher_begin(lsa_gpu_teacher *t, const int32_t *token, int64_t n,
                                               const int64_t *probe, int32_t n_probe, int64_t dense_every,
                                               lsa_err *err);

/* What a CSA layer did for tokens [first, first + m) of the document: host arrays of the teacher, valid
 * during the call. Rows of sel, logit and mass are top-k long, n_sel [m] entries of them count, ascending by
 * chunk. */
typedef struct lsa_gpu_probe {
    int64_t position;
    const float *logit, *iq, *iw; /* [visible chunks] [Hi, Di] [Hi] scaled */
} lsa_gpu_probe;
typedef struct lsa_gpu_csa_rows {
    int64_t first, m, top_k;
    const int32_t *sel, *n_sel;
    const float *logit, *mass; /* native logits of the selected entries; attention mass, mean of heads */
    const float *window_mass, *sink_mass; /* [m] */
    const float *hidden;                  /* [m, d] attention input after its norm */
    const lsa_gpu_probe *probe;           /* [n_probe] those of these tokens */
    int32_t n_probe;
    const float *
        dense; /* rows [visible chunks] of the wanted positions among these tokens, dense_ld apart; or NULL */
    int64_t dense_every, dense_ld;
} lsa_gpu_csa_rows;
typedef void lsa_gpu_csa_tap(void *user, const lsa_gpu_csa_rows *rows);

/* All tokens of the document through a layer. tap, NULL allowed: for CSA layers, once a chunk of tokens. */
LSA_NODISCARD lsa_status lsa_gpu_teacher_layer(lsa_gpu_teacher *t, const lsa_gpu_layer *l,
                                               lsa_gpu_csa_tap *tap, void *user, lsa_err *err);
/* Index keys of the last layer run (CSA): host [n/4, Di], after RoPE and Hadamard. */
LSA_NODISCARD lsa_status lsa_gpu_teacher_keys(lsa_gpu_teacher *t, float *key, lsa_err *err);
/* After all layers: logits of tokens [first, first + m), m at most the chunk: host [m, vocab]. */
LSA_NODISCARD lsa_status lsa_gpu_teacher_logits(lsa_gpu_teacher *t, int64_t first, int64_t m, float *logits,
                                                lsa_err *err);

#endif
