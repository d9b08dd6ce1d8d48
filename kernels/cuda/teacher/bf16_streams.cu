/* Hyper-connections over bf16 streams (architecture notes 4). Products with fn are taken on tensor cores: fn
 * is the sum of three bf16 matrices, so bf16 streams times fn is exact up to the order of f32 sums. Eight
 * numbers at a time; a block a token.
 *
 * The mistake that would stay silent: applying C untransposed (the sum runs over its first index). */
#include "kernels/cuda/teacher/bf16_state.h"

enum { THREADS = TEACHER_THREADS, MAX = TEACHER_STREAMS };

static __device__ float sigmoid(float v) {
    return 1.0f / (1.0f + expf(-v));
}

/* By a warp, lane j n + k with element (j, k), n of 1, 2 or 4 (lanes from n n on repeat). Row softmax, then
 * column and row normalisation in turn, ending on columns. */
static __device__ float sinkhorn(float c, int n, int iters, float eps) {
    const auto over = [&](float v, int from, int to, bool most) {
        for (int o = from; o < to; o *= 2) {
            const float w = __shfl_xor_sync(0xffffffffu, v, o);
            v = most ? fmaxf(v, w) : v + w;
        }
        return v;
    };
    c = expf(c - over(c, 1, n, true));
    c = c / over(c, 1, n, false) + eps;
    for (int i = 0; i < iters; i++) {
        if (i > 0) c /= over(c, 1, n, false) + eps;
        c /= over(c, n, n * n, false) + eps;
    }
    return c;
}

struct collapse_args {
    const uint16_t *X;
    const float *z, *base, *scale, *norm; /* z [m, 3 nz] */
    float *coef;
    uint16_t *x;
    int s, iters, d;
    float hc_eps, norm_eps;
};

/* Shared: the collapsed vector [d]. */
static __global__ void __launch_bounds__(THREADS) bf16_collapse_k(const __grid_constant__ collapse_args a) {
    extern __shared__ float4 shared4[];
    __shared__ float c[4 * 6];
    float *const y = (float *)shared4;
    const int64_t t = blockIdx.x, width = (int64_t)a.s * a.d;
    const int s = a.s, nz = s * (s + 2), tid = threadIdx.x;
    const uint16_t *const X = a.X + t * width;
    float sq = 0, v[8];
    for (int64_t i = 8 * tid; i < width; i += 8 * THREADS) {
        bf16_read8(v, X + i);
#pragma unroll
        for (int k = 0; k < 8; k++) sq += v[k] * v[k];
    }
    const float r = 1.0f / sqrtf(block_sum(sq) / (float)width + a.norm_eps);
    if (tid < 32) {
        const float *const z = a.z + t * 3 * nz;
        const auto of = [&](int i) {
            return (z[i] + z[nz + i] + z[2 * nz + i]) * r *
                       a.scale[i < s       ? 0
                               : i < 2 * s ? 1
                                           : 2] +
                   a.base[i];
        };
        const int k = tid % (s * s);
        const float C = sinkhorn(of(2 * s + k), s, a.iters, a.hc_eps);
        if (tid < s) c[tid] = sigmoid(of(tid)) + 1e-6f;
        if (tid < s) c[s + tid] = 2.0f * sigmoid(of(s + tid));
        if (tid < s * s) c[2 * s + tid] = C;
    }
    __syncthreads();
    if (tid < nz) a.coef[t * nz + tid] = c[tid];
    sq = 0;
    for (int i = 8 * tid; i < a.d; i += 8 * THREADS) {
        float sum[8] = {};
        for (int j = 0; j < s; j++) {
            bf16_read8(v, X + (int64_t)j * a.d + i);
#pragma unroll
            for (int k = 0; k < 8; k++) sum[k] += c[j] * v[k];
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float w = bf16_round(sum[k]);
            y[i + k] = w;
            sq += w * w;
        }
    }
    const float n = 1.0f / sqrtf(block_sum(sq) / (float)a.d + a.norm_eps);
    for (int i = 8 * tid; i < a.d; i += 8 * THREADS) {
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = a.norm[i + k] * (y[i + k] * n);
        bf16_write8(a.x + t * a.d + i, v);
    }
}

struct expand_args {
    uint16_t *X;
    const float *coef;
    const uint16_t *y, *ye, *ys; /* y, or rows of a token's experts and of the shared one */
    const int32_t *expert, *place;
    int s, d, k;
};

/* A block a token; MOE: what is added is the sum of its experts, in f32, rounded once. */
template <bool MOE>
static __global__ void __launch_bounds__(THREADS) bf16_expand_k(const __grid_constant__ expand_args a) {
    enum { CHOICES = 16 };
    __shared__ float c[4 * 6];
    __shared__ int64_t from[CHOICES];
    const int64_t t = blockIdx.x;
    const int s = a.s, tid = threadIdx.x;
    if (tid < s * (s + 2)) c[tid] = a.coef[t * s * (s + 2) + tid];
    if (MOE && tid < a.k)
        from[tid] = a.expert[t * a.k + tid] < 0 ? -1 : (int64_t)a.place[t * a.k + tid] * a.d;
    __syncthreads();
    const float *const post = c + s, *const C = post + s;
    uint16_t *const X = a.X + t * s * a.d;
    for (int i = 8 * tid; i < a.d; i += 8 * THREADS) {
        float y[8], v[8], sum[4][8];
        bf16_read8(y, (MOE ? a.ys : a.y) + t * a.d + i);
        if (MOE) {
            float all[8] = {};
            for (int j = 0; j < a.k; j++) {
                if (from[j] < 0) continue;
                bf16_read8(v, a.ye + from[j] + i);
#pragma unroll
                for (int k = 0; k < 8; k++) all[k] += v[k];
            }
#pragma unroll
            for (int k = 0; k < 8; k++) y[k] = bf16_round(all[k] + y[k]);
        }
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int k = 0; k < 8; k++) sum[n][k] = n < s ? post[n] * y[k] : 0.0f;
        for (int j = 0; j < s; j++) {
            bf16_read8(v, X + (int64_t)j * a.d + i);
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int k = 0; k < 8; k++) sum[n][k] += n < s ? C[j * s + n] * v[k] : 0.0f;
        }
#pragma unroll
        for (int n = 0; n < 4; n++)
            if (n < s) bf16_write8(X + (int64_t)n * a.d + i, sum[n]);
    }
}

lsa_status bf16_collapse(lsa_bf16 *b, const uint16_t *X, int64_t m, const uint16_t *fn, const float *base,
                         const float *scale, const float *norm, lsa_err *err) {
    const int64_t d = b->g.hidden, width = b->g.hc_mult * d;
    const bf16_product p = {m, 3 * b->nz, width, X, fn, width, width, b->z, 3 * b->nz, true};
    const lsa_status st = bf16_gemm(b, 0, &p, err);
    if (st != LSA_OK) return st;
    const collapse_args a = {X,    b->z,         base,          scale,  norm,        b->coef,
                             b->x, b->g.hc_mult, b->g.hc_iters, (int)d, b->g.hc_eps, b->g.norm_eps};
    bf16_collapse_k<<<(unsigned)m, THREADS, (size_t)d * sizeof(float), b->cs->stream>>>(a);
    LSA_LAUNCHED("bf16 collapse");
}

lsa_status bf16_expand(lsa_bf16 *b, uint16_t *X, int64_t m, bool moe, lsa_err *err) {
    const expand_args a = {X,         b->coef,  b->y,         b->ye,       b->ys,
                           b->expert, b->place, b->g.hc_mult, b->g.hidden, b->g.n_expert_tok};
    if (moe)
        bf16_expand_k<true><<<(unsigned)m, THREADS, 0, b->cs->stream>>>(a);
    else
        bf16_expand_k<false><<<(unsigned)m, THREADS, 0, b->cs->stream>>>(a);
    LSA_LAUNCHED("bf16 expand");
}
