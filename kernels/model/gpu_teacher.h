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

/* Weights that come and go, for models larger than the GPU's memory. Two places take turns: while the layer
 * in one is computed, the next one's tensors, as they are stored, are copied from pinned memory and written
 * as f32 into the other, exactly. arena: bytes of the largest layer in f32; stored: as stored. create leaves
 * *out to destroy also when it fails. upload(i)        staging i is full: queue its copy, behind the last use
 * of arena i wait_staging(i)  until staging i may be filled again; from any thread begin(i)         launches
 * from here on read arena i; waits for it; *bad: a tensor that holds a number that is not finite, or -1
 *   end(i)           the last of them was queued */
typedef enum lsa_gpu_stored {
    LSA_GPU_F32 = 0,
    LSA_GPU_BF16,
    LSA_GPU_F16,
    LSA_GPU_E4M3, /* a scale per block of 128 x 128 */
    LSA_GPU_E2M1, /* two a byte, low half first; a scale per row and 32 columns */
    LSA_GPU_I64
} lsa_gpu_stored;
typedef struct lsa_gpu_tensor {
    lsa_gpu_stored type;
    bool scale_f32; /* else E8M0 */
    int64_t rows, cols;
    int64_t at, scale_at; /* in the staging, multiples of 16 */
    void *dst;            /* in the arena */
} lsa_gpu_tensor;
typedef struct lsa_gpu_weights lsa_gpu_weights;
LSA_NODISCARD lsa_status lsa_gpu_weights_create(lsa_gpu_weights **out, lsa_gpu_teacher *t, int64_t arena,
                                                int64_t stored, lsa_err *err);
void lsa_gpu_weights_destroy(lsa_gpu_weights *w); /* before the teacher; NULL allowed */
char *lsa_gpu_weights_arena(const lsa_gpu_weights *w, int i);
char *lsa_gpu_weights_staging(const lsa_gpu_weights *w, int i);
LSA_NODISCARD lsa_status lsa_gpu_weights_upload(lsa_gpu_weights *w, int i, const lsa_gpu_tensor *tensor,
                                                int64_t n, int64_t bytes, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_weights_wait_staging(lsa_gpu_weights *w, int i, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_weights_begin(lsa_gpu_weights *w, int i, int64_t *bad, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_weights_end(lsa_gpu_weights *w, int i, lsa_err *err);
/* A layer whose weights are device pointers of somebody else. */
LSA_NODISCARD lsa_status lsa_gpu_layer_borrow(lsa_gpu_layer **out, lsa_gpu_teacher *t,
                                              const lsa_gpu_layer_weights *w, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_free_bytes(int64_t *out, lsa_ctx *ctx, lsa_err *err);
/* Pinned host memory. */
LSA_NODISCARD lsa_status lsa_gpu_pin(void **out, int64_t bytes, lsa_err *err);
void lsa_gpu_unpin(void *p);
/* What documents parked before this call may be loaded by those that begin after it: between two layers. */
LSA_NODISCARD lsa_status lsa_gpu_teacher_turn(lsa_gpu_teacher *t, lsa_err *err);

/* A document begins: its streams are the embeddings of token [n], ids inside the vocabulary, or what it
 * parked after the layer before (from, pinned [n, streams, d]); with `to` (may be from) they are parked after
 * the layer that follows; both are copied while others are computed and must stay until the teacher is
 * destroyed or lsa_ctx_sync was called after a later layer. half: parked as bf16, else f32. probe [n_probe],
 * ascending, at most LSA_GPU_MAX_PROBE: positions whose whole rows of native logits are wanted. hidden_stride
 * > 0: hidden vectors of positions with (position + 1) mod hidden_stride = 0 are wanted; dense_every > 0: the
 * dense mass (notes 15.1) of such positions. */
enum { LSA_GPU_MAX_PROBE = 4 };
typedef struct lsa_gpu_teacher_doc {
    const int32_t *token; /* read during the call */
    int64_t n;
    const int64_t *probe;
    int32_t n_probe;
    int64_t hidden_stride, dense_every;
    const void *from; /* or NULL */
    void *to;         /* or NULL */
    bool half;
} lsa_gpu_teacher_doc;
LSA_NODISCARD lsa_status lsa_gpu_teacher_begin(lsa_gpu_teacher *t, const lsa_gpu_teacher_doc *doc,
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
    const float *key; /* index keys [n_key, Di] of the chunks that these tokens complete */
    int64_t first_key, n_key;
    const float
        *hidden; /* attention input after its norm of the wanted positions among these tokens, [., d] */
    int64_t hidden_stride;
    const lsa_gpu_probe *probe; /* [n_probe] those of these tokens */
    int32_t n_probe;
    const float *dense; /* rows [visible chunks] of the wanted positions among these tokens, dense_ld apart */
    int64_t dense_every, dense_ld;
} lsa_gpu_csa_rows;
typedef void lsa_gpu_csa_tap(void *user, const lsa_gpu_csa_rows *rows);

/* Queues all tokens of the document through a layer. tap, NULL allowed: for CSA layers, once a chunk of
 * tokens, in order, during this or a later call up to lsa_gpu_teacher_drain: rows travel while the GPU goes
 * on, and a later document may begin before they arrive. `user` must stay valid until then. */
LSA_NODISCARD lsa_status lsa_gpu_teacher_layer(lsa_gpu_teacher *t, const lsa_gpu_layer *l,
                                               lsa_gpu_csa_tap *tap, void *user, lsa_err *err);
/* Waits until every tap was called. */
LSA_NODISCARD lsa_status lsa_gpu_teacher_drain(lsa_gpu_teacher *t, lsa_err *err);
/* After all layers: logits of tokens [first, first + m), m at most the chunk: host [m, vocab]. */
LSA_NODISCARD lsa_status lsa_gpu_teacher_logits(lsa_gpu_teacher *t, int64_t first, int64_t m, float *logits,
                                                lsa_err *err);

/* GPU seconds of each stage so far, by events between launches; copies to the host run beside the others. */
typedef enum lsa_gpu_stage {
    LSA_GPU_STREAMS = 0, /* embeddings, collapse, expand */
    LSA_GPU_PROJECT,
    LSA_GPU_COMPRESS,
    LSA_GPU_INDEX,
    LSA_GPU_ATTEND, /* and output projections */
    LSA_GPU_MOE,
    LSA_GPU_WEIGHTS,    /* waiting for them */
    LSA_GPU_STATISTICS, /* dense masses, probes, gathering for the copies */
    LSA_GPU_COPIES,
    LSA_GPU_STAGES
} lsa_gpu_stage;
LSA_NODISCARD lsa_status lsa_gpu_teacher_seconds(lsa_gpu_teacher *t, double out[LSA_GPU_STAGES],
                                                 lsa_err *err);
const char *lsa_gpu_stage_name(lsa_gpu_stage stage);

#endif
