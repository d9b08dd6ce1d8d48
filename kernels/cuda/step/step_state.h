/* The GPU step's memory and kernels. Internal to kernels/cuda/step. See kernels/model/gpu_step.h.
 *
 * Sizes: L layers, m windows of a micro-batch, B of the batch, H heads, r rank, d hidden, n columns.
 * Everything of one kind holds all layers, layer-major. */
#ifndef LSA_KERNELS_CUDA_STEP_STEP_STATE_H
#define LSA_KERNELS_CUDA_STEP_STEP_STATE_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/cuda_state.h"

extern "C" {
#include "kernels/comm/comm.h"
#include "kernels/model/gpu_shard.h"
#include "kernels/model/gpu_step.h"
}

typedef __nv_bfloat16 bf16;

/* A resident document as kernels see it. */
struct step_doc {
    int64_t doc, n_key, n_hidden, n_window;
    const uint8_t *key;
    const float *scale;
    const bf16 *hidden;
    const lsa_gpu_window *window;
    const int64_t *need_begin;
    const int32_t *chunk;
    const float *weight, *mass;
    const int32_t *hard; /* [n_window, hard_k] hardest first, -1 beyond the last; NULL: none */
};

/* What a window of the batch needs later: where its keys are. */
struct step_row {
    const uint8_t *key; /* of layer 0; layer l is n_key*128 bytes further, n_key scales further */
    const float *scale;
    int64_t n_key;
};

/* Descriptor of a step, in host memory that the device reads; row follows. */
struct step_desc {
    float lr;
};

/* Device-side control: what the host never has to know inside a step. */
struct step_control {
    int64_t launched, updates;
    float loss_scale; /* 1/elements, 1/pairs or 1/row weights, with the layers' share */
    float grad_scale, step_size, root_c2, decay;
    int32_t skip;
};

enum { STEP_PARTIALS = 2048, STEP_GEMMS = 7, STEP_TILE = 128 };

struct step_gemm {
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
    float alpha, beta;
};

enum { STEP_GUARD = 4096, STEP_ARRAYS = 64 };
struct step_guarded { /* an array between two guard zones, all bytes 0xFF at first */
    uint8_t *base;
    size_t bytes; /* of the array */
    const char *name;
};

struct lsa_gpu_step {
    lsa_ctx *ctx;
    cuda_state *cs;
    lsa_indexer_geom g;
    lsa_gpu_opts o;
    int64_t n_param, layer_param;       /* all; of one layer */
    int64_t at_costs;                   /* of the continuation, [g.reach] behind all layers */
    int64_t at_wa, at_wb, at_gn, at_ww; /* offsets inside a layer */
    bool sm90, eval_only;               /* eval_only: p, p16 and freq are borrowed */
    int n_sm;
    /* weights; moments [L, shard.own], then of the costs */
    float *p, *grad, *m, *v; /* m, v: bf16 with bf16_moments */
    float *snapshot[3];      /* [n_param] parameters and moments, or NULL */
    struct step_way *way;    /* of snapshots to the host, or NULL */
    bf16 *p16, *m16, *v16;
    bf16 *g16; /* gradients of the projections, if exchanged in bf16 */
    /* several GPUs */
    struct step_ranks *ranks;
    lsa_gpu_shard shard, norm; /* what this rank updates; what it adds up for the norm */
    float *freq;
    /* pool */
    step_doc *doc;     /* [n_slot] */
    void **block;      /* host [n_slot]: their memory */
    int32_t **hard;    /* host [n_slot] */
    int64_t *n_window; /* host [n_slot] */
    cudaStream_t copy;
    /* batch [B] */
    lsa_gpu_row *row;
    step_row *where;
    float2 *cs_table;               /* [B, rope/2] cos and sin of every window */
    int32_t *n_cand, *n_pos, *cand; /* cand [B, n] if sampled */
    float *y, *weight, *row_weight; /* weight NULL for kl */
    /* micro-batch */
    bf16 *x, *u, *qlin, *dq, *da, *dw;      /* [L,m,d] [L,m,r] [L,m,H*128] same [L,m,r] [L,m,H] */
    float *a, *rstd, *w, *z, *du, *dg_part; /* [L,m,r] [L,m] [L,m,H] [L,m,n] [L,m,r] [L,16,r] */
    float *bound;                           /* [L,m] power of two not below the window's largest |dz| */
    float *zcopy;               /* as z: pairwise losses; [m,n] continued scores, their gradient */
    uint8_t *from;              /* [m,n] how far the best score came from; continuation only */
    double *cost_part;          /* [B, reach] gradient of the costs by window */
    double *row_loss, *partial; /* [B/m, L, m] [STEP_PARTIALS] */
    step_gemm gemm[STEP_GEMMS], gemm_add[STEP_GEMMS];
    step_guarded guarded[STEP_ARRAYS]; /* with poison */
    int n_guarded;
    /* control */
    step_control *control;
    double *total; /* [3] the loss's denominator; squares of the gradient, loss: of all ranks */
    unsigned long long *hash;
    uint8_t *desc_host, *desc; /* ring of LSA_GPU_FLIGHT descriptors: pinned, mapped */
    size_t desc_bytes;
    lsa_gpu_result *result_host, *result; /* ring */
    cudaEvent_t done[LSA_GPU_FLIGHT];
    int64_t launched, taken;
    cudaGraphExec_t graph;
    /* evaluation */
    lsa_gpu_eval_row *eval;
    uint32_t *word; /* [m,n] scratch of the mining */
};

enum step_gemm_id { GEMM_A, GEMM_W, GEMM_Q, GEMM_DU, GEMM_DWB, GEMM_DWA, GEMM_DWW };

/* Arguments of the score kernels; by value. dz as in z: columns n, layers dz_layer apart (0: one for all
 * layers). */
struct score_args {
    int32_t m, rows, L, H, rope_dim; /* rows of m are asked; layers are m rows apart */
    int64_t n;
    const bf16 *qlin;
    const float *w;
    const float2 *cs;
    const step_row *where;
    const int32_t *cand, *n_cand; /* cand NULL: all chunks */
    const float *y, *weight;
    float smoothing;
    bool focal, fp8;
    float *z;
    const float *dz;
    int64_t dz_layer;
    const float *bound; /* of |dz|; layers bound_layer apart */
    int32_t bound_layer;
    const float *scale;
    bf16 *dq, *dw;
    double *row_loss;
};

/* Launches; all on s->cs->stream. first: number of the first window of the micro-batch in the batch. */
lsa_status step_prepare(lsa_gpu_step *s, lsa_err *err);
lsa_status step_prepare_eval(lsa_gpu_step *s, int64_t m, lsa_err *err);
lsa_status step_gather(lsa_gpu_step *s, int64_t first, int64_t m, lsa_err *err);
lsa_status step_gemm_plan(lsa_gpu_step *s, lsa_err *err);
void step_gemm_free(lsa_gpu_step *s);
lsa_status step_gemm_run(lsa_gpu_step *s, step_gemm_id id, bool add, lsa_err *err);
/* a square bf16 product, for the ceiling */
lsa_status step_square_plan(lsa_gpu_step *s, step_gemm *out, int64_t n, lsa_err *err);
lsa_status step_gemm_on(lsa_gpu_step *s, const step_gemm *g, const void *a, const void *b, void *c,
                        lsa_err *err);
void step_gemm_drop(step_gemm *g);
void step_random_bf16(lsa_gpu_step *s, bf16 *x, int64_t n);
lsa_status step_norm_fwd(lsa_gpu_step *s, lsa_err *err);
lsa_status step_norm_bwd(lsa_gpu_step *s, bool add, lsa_err *err);
/* The same norms of all layers by cuDNN: median milliseconds, and the largest difference from ours. */
lsa_status step_cudnn_norm(lsa_gpu_step *s, bool backward, int repeats, double *ms, double *diff,
                           lsa_err *err);
lsa_status step_score_z(lsa_gpu_step *s, int64_t first, int64_t m, lsa_err *err);
lsa_status step_score_grad(lsa_gpu_step *s, int64_t first, bool pointwise, lsa_err *err);
lsa_status step_loss(lsa_gpu_step *s, int64_t first, lsa_err *err);
lsa_status step_costs_grad(lsa_gpu_step *s, lsa_err *err); /* once all micro-batches have been */
lsa_status step_norm_and_control(lsa_gpu_step *s, lsa_err *err);
lsa_status step_update(lsa_gpu_step *s, lsa_err *err);
void step_drop_gain(lsa_gpu_shard *s);
lsa_status step_shadow(lsa_gpu_step *s, lsa_err *err); /* p16 from p */
/* one micro-batch forward to the queries' projections */
lsa_status step_query(lsa_gpu_step *s, int64_t first, int64_t m, lsa_err *err);
bool step_pointwise(const lsa_gpu_step *s);

/* snapshot.cu */
struct step_way;
lsa_status step_way_open(step_way **out, lsa_err *err); /* *out to be closed also after an error */
void step_way_close(step_way *w);

/* score_sm90.cu, score_any.cu. splits: parts a window's tiles are cut into (forward only). */
lsa_status score_z_sm90(lsa_gpu_step *s, const score_args *a, int splits, lsa_err *err);
lsa_status score_grad_sm90(lsa_gpu_step *s, const score_args *a, bool pointwise, lsa_err *err);
lsa_status score_any(lsa_gpu_step *s, const score_args *a, int mode, lsa_err *err);
enum { SCORE_Z = 0, SCORE_GRAD, SCORE_POINTWISE };

/* Where element i of a rank's own lies in the layer. Pieces are whole fours, so four neighbours stay
 * together.
 */
static __device__ __forceinline__ int64_t step_own_place(const lsa_gpu_shard &s, int64_t i) {
    int k = 0;
    while (k + 1 < s.n_piece && i >= s.piece[k + 1].at) k++;
    return s.piece[k].first + (i - s.piece[k].at);
}

/* Loss and its derivative of one element, notes 7.3; y smoothed already. */
static __device__ __forceinline__ float loss_point(float z, float y, bool focal, float *dz) {
    const float e = __expf(-fabsf(z)), soft = log1pf(e); /* ln(1+e^-|z|) */
    const float inv = 1.0f / (1.0f + e), p = z >= 0.0f ? inv : e * inv;
    const float bce = (z > 0.0f ? z : 0.0f) - z * y + soft;
    if (!focal) {
        *dz = p - y;
        return z == z ? bce : z;
    }
    const float q = p * (1.0f - y) + (1.0f - p) * y;
    *dz = q * q * (p - y) - 2.0f * q * (2.0f * y - 1.0f) * p * (1.0f - p) * bce;
    return z == z ? q * q * bce : z;
}

#endif
