/* The GPU teacher's memory and kernels. Internal to kernels/cuda/teacher. See kernels/model/gpu_teacher.h.
 *
 * Sizes: T tokens of a document, m of a chunk, s streams, d hidden, H heads of D, Hi index heads of Di, G
 * groups of R, E experts, k of them a token, M moe width, nz = s (s + 2). */
#ifndef LSA_KERNELS_CUDA_TEACHER_TEACHER_STATE_H
#define LSA_KERNELS_CUDA_TEACHER_TEACHER_STATE_H

#include "kernels/cuda/cuda_state.h"

extern "C" {
#include "kernels/model/gpu_teacher.h"
}

enum { TEACHER_THREADS = 256, TEACHER_STREAMS = 8, TEACHER_WIDTH = 1024 /* D and Di at most */ };

struct lsa_gpu_layer {
    lsa_ctx *ctx;
    lsa_gpu_layer_weights w; /* the same pointers, on the device */
};

struct lsa_gpu_teacher {
    lsa_ctx *ctx;
    cuda_state *cs;
    lsa_gpu_teacher_geom g;
    int64_t max_tokens, chunk, n; /* n: tokens of the document */
    int64_t nz, HD, ID, nx, top;  /* nx: rows of wx there is room for; top: top-k */
    lsa_gpu_teacher_tables table; /* on the device */
    int32_t *token;
    float *X; /* [T, s, d] */
    /* of the layer in work, whole document */
    float *win, *proj, *iproj; /* [T, D] [T, 2 roles D] [T, 4 Di] */
    float *row, *key;          /* [T/ratio, D] [T/4, Di] */
    /* of the chunk */
    float *z, *coef, *x, *xp, *qr, *qq, *q, *iq,
        *iw;                /* [m,nz] same [m,d] [m,nx] [m,q_rank] [m,HD+ID] [m,HD] [m,ID] [m,Hi] */
    float *o, *og, *o2, *y; /* [G,m,HD/G] [G,m,R] [m,G R] [m,d] */
    float *logit;           /* [rows at a time, T/4] */
    int64_t logit_rows;
    float *route, *weight;   /* [m,E] [m,k] */
    int32_t *expert, *place; /* [m,k] chosen, ascending; where their rows are in the list */
    int32_t *begin, *list;   /* [E+1] [m k] tokens by expert */
    float *act, *ye, *h13;   /* [m k, M] [m k, d] [m, 2M] */
    /* statistics of the chunk, device and host */
    int32_t *sel, *n_sel, *host_sel, *host_n_sel;
    int64_t probe[LSA_GPU_MAX_PROBE];
    int32_t n_probe;
    int64_t dense_every, dense_room;      /* room: rows of the chunk that there is memory for */
    float *dense, *host_dense;            /* [room, T/4] */
    float *host_probe[LSA_GPU_MAX_PROBE]; /* [T/4] logits, [ID], [Hi] */
    float *sel_logit, *mass, *part, *host_sel_logit, *host_mass, *host_part,
        *host_hidden; /* part [2,m] window, sink */
};

/* Launches, all on the context's stream; p: position of the chunk's first token. */
lsa_status teacher_embed(lsa_gpu_teacher *t, lsa_err *err);
lsa_status teacher_collapse(lsa_gpu_teacher *t, int64_t p, int64_t m, const float *fn, const float *base,
                            const float *scale, const float *norm, lsa_err *err);
lsa_status teacher_expand(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err);
lsa_status teacher_head(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err); /* x: what the head reads */
lsa_status teacher_project(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err);
/* entries [first, last) */
lsa_status teacher_compress(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t first, int64_t last,
                            lsa_err *err);
lsa_status teacher_select(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err);
lsa_status teacher_attend(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err);
/* Dense mass of the wanted positions, into host_dense; *rows: how many. */
lsa_status teacher_dense(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, int64_t *rows,
                         lsa_err *err);
lsa_status teacher_moe(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err);
/* c [m,n] = a [m,k] b [n,k]^T (+ c) */
static inline lsa_status teacher_gemm(lsa_gpu_teacher *t, int64_t m, int64_t n, int64_t k, const float *a,
                                      const float *b, float beta, float *c, lsa_err *err) {
    const lsa_gemm_args args = {false, true, m, n, k, 1.0f, beta, a, b, c};
    return lsa_cuda_gemm(t->ctx, &args, err);
}

/* Sum over a block of TEACHER_THREADS; every thread gets it. */
static __device__ __forceinline__ float block_sum(float v) {
    __shared__ float part[TEACHER_THREADS / 32];
    for (int o = 16; o >= 1; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    float s = 0;
    for (int w = 0; w < TEACHER_THREADS / 32; w++) s += part[w];
    return s;
}

/* Rotation of the pair (i, i+1) of a vector's last rope channels; the angle's product is rounded before the
 * sine. */
static __device__ __forceinline__ void rotate_pair(float *x, float freq, float pos, float sign) {
    float sn, c;
    sincosf(__fmul_rn(pos, freq), &sn, &c);
    sn *= sign;
    const float a = x[0], b = x[1];
    x[0] = a * c - b * sn;
    x[1] = a * sn + b * c;
}

#endif
