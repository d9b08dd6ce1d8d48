/* All arithmetic of the indexer and its training: argument structs and one entry point per operation.
 *
 * Every pointer is memory of the context's backend unless it says host. Tensors are dense, row-major, f32
 * unless said otherwise. `lsa_<op>(ctx, &args, err)` checks shapes and values once for all backends
 * (LSA_E_ARG names op, field, expected, found), then dispatches; a backend without the op is
 * LSA_E_UNSUPPORTED. Ops never allocate user memory, never synchronise. Outputs may not alias inputs unless
 * said. Deterministic: same inputs, same bits, whatever the number of threads. m = 0 is a valid no-op.
 *
 * Sources: FlashMemory-DeepSeek-V4 (arXiv 2606.09079) as restated in the notes 5.1, 5.4, 7.3, 7.4. */
#ifndef LSA_KERNELS_OPS_H
#define LSA_KERNELS_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"
#include "kernels/ctx.h"

/* C[m,n] = alpha * op(A) op(B) + beta * C. op(A) is [m,k], op(B) is [k,n]; trans_x: X is stored transposed.
 * A linear layer y = x W^T is {trans_b = true, a = x [m,k], b = W [n,k]}. beta is 0 or 1 (0: C need not be
 * set). */
typedef struct lsa_gemm_args {
    bool trans_a, trans_b;
    int64_t m, n, k;
    float alpha, beta;
    const float *a, *b;
    float *c;
} lsa_gemm_args;

/* y = g * x * rstd, rstd = (mean(x^2) + eps)^(-1/2), mean over the last dimension. */
typedef struct lsa_rmsnorm_fwd_args {
    int64_t m, r;
    float eps;
    const float *x; /* [m,r] */
    const float *g; /* [r] */
    float *y;       /* [m,r] */
    float *rstd;    /* [m], kept for the backward pass */
} lsa_rmsnorm_fwd_args;

/* dx = rstd * (g*dy - xhat * mean(g*dy*xhat)), dg (+)= sum over rows of dy*xhat, xhat = x*rstd. */
typedef struct lsa_rmsnorm_bwd_args {
    int64_t m, r;
    const float *x, *g, *rstd, *dy;
    float *dx;       /* [m,r], may alias dy; may be NULL */
    float *dg;       /* [r] */
    bool accumulate; /* add to dg instead of setting it */
} lsa_rmsnorm_bwd_args;

/* In place on q [m, n_head, d]: forward = RoPE on the last rope_dim channels (adjacent pairs, angle =
 * fl32(fl32(pos) * freq[i])), then Hadamard (Sylvester order) / sqrt(d). inverse = Hadamard / sqrt(d), then
 * RoPE by -angle: the exact transpose, used on gradients. d is a power of two in [2, 1024], rope_dim even and
 * <= d (0 = no rotation). */
typedef struct lsa_rope_hadamard_args {
    int64_t m, n_head, d, rope_dim;
    bool inverse;
    const int64_t *position; /* [m] */
    const float *freq;       /* [rope_dim/2] */
    float *q;
} lsa_rope_hadamard_args;

/* Candidates of query i: chunks cand[i*n + j], j < n_cand[i]; or, with cand == NULL, chunks 0 .. n_cand[i]-1.
 * The key of chunk c is row key_base[i] + c of keys. z[i,j] = sum_h w[i,h] * max(0, key . q[i,h]); columns j
 * >= n_cand[i] are written 0. */
typedef struct lsa_indexer_score_fwd_args {
    int64_t m, n_head, d, n; /* d must be 128; n = columns of z */
    int64_t n_key;           /* rows of keys */
    const float *q;          /* [m, n_head, d] */
    const float *w;          /* [m, n_head], already scaled */
    const uint8_t *keys;     /* [n_key, 132] codec e4m3_f32 */
    const int64_t *key_base; /* [m] */
    const int32_t *cand;   /* [m, n] or NULL; out-of-range rows are clamped on the device: callers validate */
    const int32_t *n_cand; /* [m], each in [0, n] */
    bool accumulate;       /* add to z instead of setting it (sum of layers) */
    float *z;              /* [m, n] */
} lsa_indexer_score_fwd_args;

/* dw[i,h] = sum_j dz[i,j] * max(0, key.q_h); dq[i,h] = w[i,h] * sum_j dz[i,j] * [key.q_h > 0] * key. Keys get
 * no gradient. Nothing of size [m, n, n_head] is stored. */
typedef struct lsa_indexer_score_bwd_args {
    int64_t m, n_head, d, n, n_key;
    const float *q, *w;
    const uint8_t *keys;
    const int64_t *key_base;
    const int32_t *cand, *n_cand;
    const float *dz; /* [m, n] */
    float *dq;       /* [m, n_head, d] */
    float *dw;       /* [m, n_head] */
} lsa_indexer_score_bwd_args;

/* Observed-mass prior: z[i,c] += fma(weight[0], recent[i,c], weight[1] * memory[i,c]) for c < n_cand[i], with
 * features recent and memory (kernels/prior.h). f32 in this order, so every backend gives the same bits. */
typedef struct lsa_prior_fwd_args {
    int64_t m, n;
    const float *recent, *memory; /* [m, n] */
    const float *weight;          /* [LSA_PRIOR_WEIGHTS] */
    const int32_t *n_cand;
    float *z; /* [m, n] */
} lsa_prior_fwd_args;

/* dweight = sums over i and c < n_cand[i] of dz[i,c] times each feature, in double, rows in order (set, also
 * for m = 0). */
typedef struct lsa_prior_bwd_args {
    int64_t m, n;
    const float *recent, *memory, *dz; /* [m, n] */
    const int32_t *n_cand;
    float *dweight; /* [LSA_PRIOR_WEIGHTS] */
} lsa_prior_bwd_args;

/* Continuation of scores along neighbouring chunks: out[i,c] = max over 0 <= j <= min(reach, c) of z[i,c-j] -
 * b[j], b[0] = 0, for c < n_cand[i]. f32, one subtraction an element, so every backend gives the same bits.
 * from[i,c] = the j that won, the smallest of equal ones. A NaN stays where it is and is not lent. Columns c
 * >= n_cand[i] are written 0 and are read by none. Candidates must be neighbours: column c is chunk c. */
typedef struct lsa_continuation_fwd_args {
    int64_t m, n;
    int32_t reach;     /* 1 .. LSA_MAX_REACH */
    const float *z;    /* [m, n] */
    const float *cost; /* [reach], cost[j-1] = b[j] */
    const int32_t *n_cand;
    float *out;    /* [m, n]; must not alias z */
    uint8_t *from; /* [m, n] */
} lsa_continuation_fwd_args;

/* The gradient goes where the score came from: dz[i,k] = sum over j of dout[i,k+j] where from[i,k+j] = j;
 * dcost[j-1] = - sum over i and c of dout[i,c] where from[i,c] = j (set, also for m = 0). dz of columns >=
 * n_cand[i] is 0. */
typedef struct lsa_continuation_bwd_args {
    int64_t m, n;
    int32_t reach;
    const uint8_t *from; /* [m, n], of the forward pass */
    const float *dout;   /* [m, n] */
    const int32_t *n_cand;
    float *dz;    /* [m, n]; must not alias dout */
    float *dcost; /* [reach] */
} lsa_continuation_bwd_args;

/* Pointwise loss of notes 7.3 from logits, stable. y in {0,1} (as float), smoothed to y' = y(1-2s)+s. BCE:
 * loss = weight*BCE. Focal: weight*(1-pt)^2*BCE, pt = p y' + (1-p)(1-y'), focal factor differentiated. Logs
 * are floored at -100 as the reference does only when ref_floor is set. dz and row_loss are multiplied by
 * scale (1/K). Columns j >= n_cand[i] contribute nothing and get dz = 0. */
typedef struct lsa_loss_pointwise_args {
    int64_t m, n;
    bool focal;
    float smoothing, scale;
    const float *z, *y;
    const float *weight; /* [m,n] or NULL for ones */
    const int32_t *n_cand;
    float *dz;        /* [m,n]; may alias z */
    double *row_loss; /* [m] */
} lsa_loss_pointwise_args;

/* Pairwise loss: over positives i (y=1) and negatives j (y=0) of a row: bpr -ln sigmoid(z_i-z_j), margin
 * max(0, margin-(z_i-z_j)); times scale (1/pairs of the batch). Weights are not used. */
typedef struct lsa_loss_pairwise_args {
    int64_t m, n;
    bool use_margin;
    float margin, scale;
    const float *z, *y;
    const int32_t *n_cand;
    float *dz; /* must not alias z */
    double *row_loss;
} lsa_loss_pairwise_args;

/* KL(target || softmax(z)) per row over its candidates; target rows sum to 1 (or are all 0: the row is
 * skipped). row_loss = scale * row_weight * sum_j t_j (ln t_j - log_softmax(z)_j), dz = scale * row_weight *
 * (softmax(z)_j - t_j). */
typedef struct lsa_loss_kl_args {
    int64_t m, n;
    float scale;
    const float *z, *target;
    const float *row_weight; /* [m] or NULL for ones */
    const int32_t *n_cand;
    float *dz; /* may alias z */
    double *row_loss;
} lsa_loss_kl_args;

/* out[0] = sum of x^2 in double, fixed order. */
typedef struct lsa_sumsq_args {
    int64_t n;
    const float *x;
    double *out;
} lsa_sumsq_args;

/* AdamW (decoupled decay): g' = grad_scale*g; m = b1 m + (1-b1) g'; v = b2 v + (1-b2) g'^2;
 * p -= lr*( m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + weight_decay*p ), in torch's order (decay first). */
typedef struct lsa_adamw_args {
    int64_t n, t; /* t = 1 at the first update */
    float lr, beta1, beta2, eps, weight_decay, grad_scale;
    const float *g;
    float *p, *m, *v;
} lsa_adamw_args;

#define LSA_OP(name)                                                                                         \
    LSA_NODISCARD lsa_status lsa_##name(lsa_ctx *ctx, const lsa_##name##_args *a, lsa_err *err);
#include "kernels/ops.def"
#undef LSA_OP

#endif
