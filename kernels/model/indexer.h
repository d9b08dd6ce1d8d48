/* The memory indexer: geometry, the one parameter table, initialisation, and its query path over the ops.
 *
 * One layer, hidden x (bf16 values in f32), position pos (notes 5.1): a = Wa x; u = g*a/rms(a); q = Wb u as
 * [H,128]; RoPE on the last rope channels; Hadamard/sqrt(128); w = Ww x * c with c = 128^-1/2 * H^-1/2; logit
 * z_s = sum_h w_h max(0, k_s . q_h). All layers live in one flat f32 buffer, then the costs of the
 * continuation (continuation.h) and the weights of the observed-mass prior (prior.h), which belong to the sum
 * of the layers' logits; the table says where. Readers of the table: trainer, checkpoint, export, infer. Pure
 * functions, thread-safe. */
#ifndef LSA_KERNELS_MODEL_INDEXER_H
#define LSA_KERNELS_MODEL_INDEXER_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/lsa_ids.h"
#include "kernels/core/lsa_status.h"
#include "kernels/ctx.h"
#include "kernels/model/rope.h"

typedef struct lsa_indexer_geom {
    int32_t hidden;   /* d: width of the hidden vectors it reads */
    int32_t n_head;   /* H, 1..128 */
    int32_t head_dim; /* 128 */
    int32_t rank;     /* r */
    float eps;        /* RMSNorm, 1e-6 */
    lsa_rope rope;
    int32_t n_layer; /* joint layers */
    lsa_csa_ord ord[LSA_MAX_CSA];
    lsa_layer_id id[LSA_MAX_CSA];
    int32_t reach; /* of the continuation on the sum of the logits, 0: none */
    bool prior;    /* observed mass is added to the sum of the logits */
} lsa_indexer_geom;

/* LSA_E_CONFIG names the field that is out of range. */
LSA_NODISCARD lsa_status lsa_indexer_geom_check(const lsa_indexer_geom *g, lsa_err *err);

typedef enum lsa_indexer_part {
    LSA_WQ_A = 0,
    LSA_WQ_B,
    LSA_Q_NORM,
    LSA_W_PROJ,
    LSA_INDEXER_PARTS
} lsa_indexer_part;

typedef struct lsa_indexer_tensor {
    char name[64];     /* "retrievers.l{ord}.wq_a.weight", ".wq_b.weight", ".q_norm_weight",
                          ".weights_proj.weight" */
    int32_t n_dim;     /* 2, or 1 for q_norm_weight */
    int64_t shape[2];  /* [r,d] [H*128,r] [r] [H,d] */
    int64_t offset, n; /* elements in the flat buffer */
} lsa_indexer_tensor;

lsa_indexer_tensor lsa_indexer_tensor_at(const lsa_indexer_geom *g, int32_t layer, lsa_indexer_part part);
int64_t lsa_indexer_n_param(const lsa_indexer_geom *g);      /* everything */
int64_t lsa_indexer_layer_params(const lsa_indexer_geom *g); /* one layer's */

/* Where the costs b_1 .. b_reach lie: [reach], after all layers; tensor "continuation" of a checkpoint. */
int64_t lsa_indexer_costs_at(const lsa_indexer_geom *g);
/* Where the weights of the prior lie: [LSA_PRIOR_WEIGHTS], after the costs; tensor "prior" of a checkpoint.
 */
int64_t lsa_indexer_prior_at(const lsa_indexer_geom *g);
/* Numbers behind all layers, at most LSA_MAX_EXTRA: costs and weights of the prior. */
int64_t lsa_indexer_n_extra(const lsa_indexer_geom *g);
enum { LSA_MAX_EXTRA = LSA_MAX_REACH + LSA_PRIOR_WEIGHTS };
/* All tensors in flat order, i < lsa_indexer_n_tensor(g): the layers' parts, then the costs if reach > 0,
 * then the prior's weights if there is a prior. */
int64_t lsa_indexer_n_tensor(const lsa_indexer_geom *g);
lsa_indexer_tensor lsa_indexer_tensor_no(const lsa_indexer_geom *g, int64_t i);

/* What costs start at: about the step between a score that matters and its neighbours', so that lending
 * neither hides what a layer has to learn (0: every chunk begins as the best of its last 17) nor waits until
 * scores have grown past it. */
#define LSA_COST_START 1.0f
/* What the prior's weights start at: what was read is worth a little from the first step on, so that the
 * layers learn what it does not say. */
#define LSA_PRIOR_START 0.5f
void lsa_indexer_start_extra(float *params, const lsa_indexer_geom *g);
/* LSA_E_FORMAT unless reach is in [0, LSA_MAX_REACH] and every cost finite and >= 0; `where` begins the
 * message. */
LSA_NODISCARD lsa_status lsa_indexer_costs_check(const float *cost, int64_t reach, const char *where,
                                                 lsa_err *err);
/* LSA_E_FORMAT unless both weights of the prior are finite. */
LSA_NODISCARD lsa_status lsa_indexer_prior_check(const float weight[LSA_PRIOR_WEIGHTS], const char *where,
                                                 lsa_err *err);

/* params (host, [n_param]): matrices uniform in +-1/sqrt(fan_in) from Philox(seed, tensor), q_norm 1, costs
 * at their start. */
void lsa_indexer_init_random(float *params, const lsa_indexer_geom *g, uint64_t seed);

/* Function-preserving widening (notes 6): copies `src` (same layers, hidden, head_dim; rank and heads not
 * larger) into dst: new Wa rows 0; old g divided by sqrt(r/r0); new g 1; Wb columns for new ranks random,
 * rows of new heads random; new Ww rows 0; old Ww rows times sqrt(H/H0). The wider indexer computes the same
 * logits. Costs are copied, those of a longer reach begin at their start. LSA_E_CONFIG if narrower: dropping
 * costs would be another score. */
LSA_NODISCARD lsa_status lsa_indexer_widen(float *dst, const lsa_indexer_geom *dst_g, const float *src,
                                           const lsa_indexer_geom *src_g, uint64_t seed, lsa_err *err);

/* Intermediate results of a batch of m queries of one layer, backend memory owned by the caller. */
typedef struct lsa_indexer_act {
    float *a;    /* [m,r] Wa x */
    float *rstd; /* [m] */
    float *u;    /* [m,r] */
    float *q;    /* [m,H,128] after RoPE and Hadamard */
    float *w;    /* [m,H] scaled */
} lsa_indexer_act;

/* Query path of layer index `layer` (0..n_layer-1): x [m,d], position i64 [m], freq [rope.dim/2], params =
 * whole flat buffer, all backend memory. */
LSA_NODISCARD lsa_status lsa_indexer_query(lsa_ctx *ctx, const lsa_indexer_geom *g, const float *params,
                                           int32_t layer, int64_t m, const float *x, const int64_t *position,
                                           const float *freq, const lsa_indexer_act *act, lsa_err *err);

/* The same up to q = Wb u, before RoPE: for the other numeric paths (query_path.h). */
LSA_NODISCARD lsa_status lsa_indexer_query_raw(lsa_ctx *ctx, const lsa_indexer_geom *g, const float *params,
                                               int32_t layer, int64_t m, const float *x,
                                               const lsa_indexer_act *act, lsa_err *err);

/* Backward of the query path: dq [m,H,128] (overwritten) and dw [m,H] give gradients into grad (flat,
 * accumulated if accumulate). du is scratch [m,r]. */
LSA_NODISCARD lsa_status lsa_indexer_query_bwd(lsa_ctx *ctx, const lsa_indexer_geom *g, const float *params,
                                               float *grad, int32_t layer, int64_t m, const float *x,
                                               const int64_t *position, const float *freq,
                                               const lsa_indexer_act *act, float *dq, const float *dw,
                                               float *du, bool accumulate, lsa_err *err);

#endif
