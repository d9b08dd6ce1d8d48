/* The bf16 tier's layer: memory and launches. Internal to kernels/cuda/teacher. See kernels/model/gpu_bf16.h.
 *
 * Numbers of 16 bits travel as uint16_t: bf16 between operators, f16 where tensor cores compare queries with
 * rows and keys (values there were rounded to bf16 before). Sizes as in teacher_state.h; nq = H D + Hi Di. */
#ifndef LSA_KERNELS_CUDA_TEACHER_BF16_STATE_H
#define LSA_KERNELS_CUDA_TEACHER_BF16_STATE_H

#include <cuda_bf16.h>

#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/model/gpu_bf16.h"
}

enum {
    BF16_LANES = 4, /* streams that products of experts are spread over: one alone does not fill the GPU */
    BF16_ALIGN =
        128 /* rows of an expert begin at multiples: products then have few shapes, none wastes a tile */
};

struct bf16_plans; /* bf16_gemm.cu */

struct lsa_bf16 {
    lsa_ctx *ctx;
    cuda_state *cs;
    lsa_gpu_teacher_geom g;
    int64_t max_tokens, chunk, bytes;          /* bytes: allocated by create */
    int64_t nz, HD, ID, nx, top, rows, chunks; /* rows: of entries sorted by expert */
    int blocks;                                /* multiprocessors */
    float *freq_main, *freq_comp;              /* [rope/2] */
    /* of the layer in work, whole document */
    uint16_t *win, *row, *key; /* f16 [T, D] [T/ratio, D] [T/4, Di] */
    float *proj, *iproj;       /* [T, 2 roles D] [T, 4 Di] */
    /* of the chunk */
    float *z, *coef, *xp, *iw;              /* [m, 3 nz] [m, nz] [m, nx] [m, Hi] */
    uint16_t *x, *qr, *q, *iq, *o, *og, *y; /* [m,d] [m,q_rank] [m,nq] [m,ID] [m,HD] [m,G R] [m,d] */
    float *logit;
    int32_t *candidate;
    int64_t logit_room;
    float *route, *weight;              /* [m,E] [m,k] */
    int32_t *expert, *place;            /* [m,k] */
    int32_t *begin, *list, *host_begin; /* [E+1] [rows] entry or -1; pinned [E+1] */
    uint16_t *xe, *h13, *act, *ye, *ys; /* [rows,d] [rows,2M] [rows,M] [rows,d] [m,d] */
    uint16_t *kept;                     /* f16 [blocks][tiles][64, 64] */
    float *kept_most;
    int tiles;
    int32_t *sel, *n_sel; /* [m, top] [m] */
    float *sel_logit, *mass, *part;
    cudaStream_t lane[BF16_LANES];
    cudaEvent_t fork, counted, joined[BF16_LANES];
    void *workspace[BF16_LANES];
    bf16_plans *plans;
    cudaEvent_t event[LSA_BF16_STAGES + 1];
    double seconds[LSA_BF16_STAGES];
    bool timed;
};

/* c [m,n] = a [m,k] b [n,k]^T: bf16 factors, f32 sums, c bf16 or f32; ld: numbers from row to row. lane:
 * which stream, 0 is the context's. */
struct bf16_product {
    int64_t m, n, k;
    const uint16_t *a, *b;
    int64_t lda, ldb;
    void *c;
    int64_t ldc;
    bool c_f32;
};
lsa_status bf16_gemm(lsa_bf16 *b, int lane, const bf16_product *p, lsa_err *err);
void bf16_gemm_close(lsa_bf16 *b);

struct bf16_attend_args {
    const uint16_t *q, *win, *row; /* f16: queries of a token ldq apart */
    const float *sink, *freq;
    const int32_t *sel, *n_sel; /* [m, top] [m]; NULL: all rows before the token */
    uint16_t *o;                /* bf16, rows of H D, ldo apart */
    float *mass, *part;         /* [m, top], [2, m]; mass NULL: not wanted */
    uint16_t *kept;             /* with mass: [blocks][tiles][64, 64] */
    float *kept_most;           /* [blocks][tiles][64] */
    int64_t p, m, ldq, ldo;
    int H, window, ratio, top, rope, tiles, blocks;
};
lsa_status bf16_attend(const bf16_attend_args *a, int D, cudaStream_t s, lsa_err *err);

lsa_status bf16_collapse(lsa_bf16 *b, const uint16_t *X, int64_t m, const uint16_t *fn, const float *base,
                         const float *scale, const float *norm, lsa_err *err);
/* X += y [m, d] through the coefficients; moe: the sum of a token's experts and the shared one instead. */
lsa_status bf16_expand(lsa_bf16 *b, uint16_t *X, int64_t m, bool moe, lsa_err *err);
lsa_status bf16_project(lsa_bf16 *b, const lsa_bf16_weights *w, int64_t p, int64_t m, lsa_err *err);
lsa_status bf16_compress(lsa_bf16 *b, const lsa_bf16_weights *w, int64_t first, int64_t last, lsa_err *err);
lsa_status bf16_select(lsa_bf16 *b, int64_t p, int64_t m, lsa_err *err);
lsa_status bf16_output(lsa_bf16 *b, const lsa_bf16_weights *w, int64_t m, lsa_err *err);
lsa_status bf16_moe(lsa_bf16 *b, const lsa_bf16_weights *w, const int32_t *token, int64_t m, lsa_err *err);

static __device__ __forceinline__ float bf16_value(uint16_t x) {
    return __uint_as_float((uint32_t)x << 16);
}
static __device__ __forceinline__ uint16_t bf16_of(float x) {
    const __nv_bfloat16 v = __float2bfloat16_rn(x);
    uint16_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}
static __device__ __forceinline__ float bf16_round(float x) {
    return bf16_value(bf16_of(x));
}
static __device__ __forceinline__ uint32_t bf16_pair(float x, float y) {
    return bf16_of(x) | (uint32_t)bf16_of(y) << 16;
}
/* Eight numbers, 16 bytes. */
static __device__ __forceinline__ void bf16_read8(float *v, const uint16_t *from) {
    const uint4 u = *(const uint4 *)from;
    const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = __uint_as_float(w[i] << 16);
        v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
}
static __device__ __forceinline__ void bf16_write8(uint16_t *to, const float *v) {
    const uint4 u = {bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]),
                     bf16_pair(v[6], v[7])};
    *(uint4 *)to = u;
}

#endif
