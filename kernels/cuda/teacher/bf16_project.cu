/* The bf16 tier from a layer's input to queries, window rows, compressed rows and index keys (architecture
 * notes 5 to 7), the roundings of tier B in between.
 *
 * With two roles (CSA) the lo half of a token's channels serves the entry after its own, the hi half its own
 * entry. Swapping the halves stays fluent and fails far away. */
#include <cuda_fp16.h>

#include "kernels/cuda/teacher/bf16_state.h"
#include "kernels/cuda/teacher/project.cuh"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

enum { THREADS = TEACHER_THREADS };

static __device__ __forceinline__ uint16_t half_of(float x) { /* what is beyond f16 stays finite */
    const __half h = __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
    uint16_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}

/* ---- cache simulations, notes 2.3 and 2.4 ---- */

static __device__ __forceinline__ float fp8_of(float x, float most) {
    const float s = pow2_ceil(fmaxf(most, 1e-4f) * (1.0f / 448.0f));
    return bf16_round(to_small(x / s, 3, -6, 448.0f) * s);
}
static __device__ __forceinline__ float fp4_of(float x, float most) {
    const float s = pow2_ceil(fmaxf(most, 6.0f * 1.17549435e-38f) * (1.0f / 6.0f));
    return bf16_round(to_small(x / s, 1, 0, 6.0f) * s);
}
/* v [n] in shared memory, in groups of 64 or 32, a warp a group. */
template <int GROUP> static __device__ void simulate(float *v, int n) {
    const int lane = threadIdx.x & 31;
    for (int g = (threadIdx.x >> 5) * GROUP; g < n; g += THREADS / 32 * GROUP) {
        float x[GROUP / 32], most = 0;
        for (int i = 0; i < GROUP / 32; i++) {
            x[i] = g + lane + 32 * i < n ? v[g + lane + 32 * i] : 0.0f;
            most = fmaxf(most, fabsf(x[i]));
        }
        for (int o = 16; o >= 1; o /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
        for (int i = 0; i < GROUP / 32; i++)
            if (g + lane + 32 * i < n)
                v[g + lane + 32 * i] = GROUP == 64 ? fp8_of(x[i], most) : fp4_of(x[i], most);
    }
    __syncthreads();
}

/* v [n] = bf16(w v / rms), in place. */
static __device__ void norm_in_place(float *v, const float *w, int n, float eps) {
    float s = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) s += v[i] * v[i];
    const float r = 1.0f / sqrtf(block_sum(s) / (float)n + eps);
    for (int i = threadIdx.x; i < n; i += THREADS) v[i] = bf16_round(w[i] * (v[i] * r));
    __syncthreads();
}
static __device__ void rotate_in_place(float *v, int c, int rope, const float *freq, float pos) {
    for (int i = threadIdx.x; i < rope / 2; i += THREADS) {
        float *const x = v + c - rope + 2 * i;
        rotate_pair(x, freq[i], pos, 1.0f);
        x[0] = bf16_round(x[0]);
        x[1] = bf16_round(x[1]);
    }
    __syncthreads();
}

/* ---- a token's own rows ---- */

struct token_args {
    const float *xp, *q_norm, *kv_norm, *ape, *iape, *freq;
    uint16_t *qr, *win;
    float *proj, *iproj, *iw;
    int64_t p;
    int nx, at_kv, at_cv, at_cg, at_iv, at_ig, at_iw, q_rank, D, rope, ratio, kc, ikc, Hi;
    float eps, iw_scale;
    bool fp8;
};

/* Shared: [max(q_rank, D)]. */
static __global__ void __launch_bounds__(THREADS) bf16_token_k(const __grid_constant__ token_args a) {
    extern __shared__ float4 shared4[];
    float *const v = (float *)shared4;
    const int64_t t = blockIdx.x, pos = a.p + t;
    const int tid = threadIdx.x;
    const float *const xp = a.xp + t * a.nx;
    for (int i = tid; i < a.q_rank; i += THREADS) v[i] = bf16_round(xp[i]);
    norm_in_place(v, a.q_norm, a.q_rank, a.eps);
    for (int i = tid; i < a.q_rank; i += THREADS) a.qr[t * a.q_rank + i] = bf16_of(v[i]);
    __syncthreads();
    for (int i = tid; i < a.D; i += THREADS) v[i] = bf16_round(xp[a.at_kv + i]);
    norm_in_place(v, a.kv_norm, a.D, a.eps);
    rotate_in_place(v, a.D, a.rope, a.freq, (float)pos);
    if (a.fp8) simulate<64>(v, a.D - a.rope);
    for (int i = tid; i < a.D; i += THREADS) a.win[pos * a.D + i] = half_of(v[i]);
    if (a.at_cv >= 0) {
        float *const to = a.proj + pos * 2 * a.kc;
        const float *const ape = a.ape + pos % a.ratio * a.kc;
        compressor_row(to, xp + a.at_cv, xp + a.at_cg, ape, a.kc);
    }
    if (a.at_iv >= 0) {
        float *const to = a.iproj + pos * 2 * a.ikc;
        const float *const ape = a.iape + pos % LSA_CHUNK * a.ikc;
        compressor_row(to, xp + a.at_iv, xp + a.at_ig, ape, a.ikc);
        for (int i = tid; i < a.Hi; i += THREADS)
            a.iw[t * a.Hi + i] = bf16_round(xp[a.at_iw + i]) * a.iw_scale;
    }
}

/* By a warp, K channels side by side a lane: v = H v / sqrt(32 K). */
template <int K> static __device__ __forceinline__ void hadamard(float *v, int lane) {
#pragma unroll
    for (int o = 1; o < K; o *= 2)
#pragma unroll
        for (int i = 0; i < K; i++)
            if (!(i & o)) {
                const float x = v[i], y = v[i + o];
                v[i] = x + y;
                v[i + o] = x - y;
            }
#pragma unroll
    for (int o = 1; o < 32; o *= 2)
#pragma unroll
        for (int i = 0; i < K; i++) {
            const float other = __shfl_xor_sync(0xffffffffu, v[i], o);
            v[i] = lane & o ? other - v[i] : v[i] + other;
        }
    const float f = 1.0f / sqrtf(32.0f * K);
#pragma unroll
    for (int i = 0; i < K; i++) v[i] = bf16_round(v[i] * f);
}

struct query_args {
    uint16_t *q; /* [m, ld]: bf16 products in, f16 queries out, in place */
    const float *freq;
    uint16_t *iq; /* f16 [m, heads, 128] */
    int64_t p, m, ld;
    int heads, rope;
    float eps;
    bool fp4;
};

/* A warp a token and head, N / 32 channels a lane. Attention queries are normed and rotated in place; index
 * queries (iq, 128 channels) are rotated and transformed. */
template <int N, bool INDEX>
static __global__ void __launch_bounds__(THREADS) bf16_query_k(const __grid_constant__ query_args a) {
    enum { K = N / 32, GROUP = 32 / K < 1 ? 1 : 32 / K }; /* lanes of a group of 32 channels */
    const int lane = threadIdx.x & 31;
    const int64_t at = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, t = at / a.heads,
                  h = at % a.heads;
    if (t >= a.m) return;
    uint16_t *const q = a.q + t * a.ld + h * N + lane * K;
    float v[K];
    union {
        uint16_t x[K];
        uint2 u[K / 4];
    } io;
#pragma unroll
    for (int i = 0; i < K / 4; i++) io.u[i] = ((const uint2 *)q)[i];
#pragma unroll
    for (int i = 0; i < K; i++) v[i] = bf16_value(io.x[i]);
    if (!INDEX) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < K; i++) s += v[i] * v[i];
        for (int o = 16; o >= 1; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
        const float r = 1.0f / sqrtf(s / (float)N + a.eps);
#pragma unroll
        for (int i = 0; i < K; i++) v[i] = bf16_round(v[i] * r);
    }
#pragma unroll
    for (int i = 0; i < K; i += 2)
        if (lane * K + i >= N - a.rope) {
            rotate_pair(v + i, a.freq[(lane * K + i - N + a.rope) / 2], (float)(a.p + t), 1.0f);
            v[i] = bf16_round(v[i]);
            v[i + 1] = bf16_round(v[i + 1]);
        }
    if (INDEX) {
        hadamard<K>(v, lane);
        if (a.fp4) {
            float most = 0;
#pragma unroll
            for (int i = 0; i < K; i++) most = fmaxf(most, fabsf(v[i]));
            for (int o = 1; o < GROUP; o *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
#pragma unroll
            for (int i = 0; i < K; i++) v[i] = fp4_of(v[i], most);
        }
    }
#pragma unroll
    for (int i = 0; i < K; i++) io.x[i] = half_of(v[i]);
    uint16_t *const to = INDEX ? a.iq + (t * a.heads + h) * N + lane * K : q;
#pragma unroll
    for (int i = 0; i < K / 4; i++) ((uint2 *)to)[i] = io.u[i];
}

static lsa_status query(lsa_bf16 *b, const query_args *a, bool index, lsa_err *err) {
    const unsigned blocks = (unsigned)((a->m * a->heads + THREADS / 32 - 1) / (THREADS / 32));
    const cudaStream_t s = b->cs->stream;
    if (index)
        bf16_query_k<128, true><<<blocks, THREADS, 0, s>>>(*a);
    else if (b->g.head_dim == 128)
        bf16_query_k<128, false><<<blocks, THREADS, 0, s>>>(*a);
    else if (b->g.head_dim == 256)
        bf16_query_k<256, false><<<blocks, THREADS, 0, s>>>(*a);
    else
        bf16_query_k<512, false><<<blocks, THREADS, 0, s>>>(*a);
    LSA_LAUNCHED("bf16 query");
}

lsa_status bf16_project(lsa_bf16 *b, const lsa_bf16_weights *w, int64_t p, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &b->g;
    const bool csa = w->roles == 2;
    const float *const freq = w->ratio ? b->freq_comp : b->freq_main;
    const int64_t d = g->hidden, nq = b->HD + (csa ? b->ID : 0);
    const int widest = g->q_rank > g->head_dim ? g->q_rank : g->head_dim;
    const bf16_product xp = {m, w->nx, d, b->x, w->wx, d, d, b->xp, w->nx, true};
    const bf16_product qq = {m, nq, g->q_rank, b->qr, w->wq, g->q_rank, g->q_rank, b->q, nq, false};
    LSA_TRY(bf16_gemm(b, 0, &xp, err));
    {
        const token_args a = {b->xp,
                              w->q_norm,
                              w->kv_norm,
                              w->ape,
                              w->iape,
                              freq,
                              b->qr,
                              b->win,
                              b->proj,
                              b->iproj,
                              b->iw,
                              p,
                              w->nx,
                              w->at_kv,
                              w->at_cv,
                              w->at_cg,
                              w->at_iv,
                              w->at_ig,
                              w->at_iw,
                              g->q_rank,
                              g->head_dim,
                              g->rope_dim,
                              w->ratio,
                              w->roles * g->head_dim,
                              2 * g->index_head_dim,
                              g->index_n_head,
                              g->norm_eps,
                              1.0f / sqrtf((float)(g->index_head_dim * g->index_n_head)),
                              g->sim_fp8_kv};
        bf16_token_k<<<(unsigned)m, THREADS, (size_t)widest * sizeof(float), b->cs->stream>>>(a);
        LSA_CUDA(cudaGetLastError());
    }
    LSA_TRY(bf16_gemm(b, 0, &qq, err));
    {
        const query_args q = {b->q, freq, NULL, p, m, nq, g->n_head, g->rope_dim, g->norm_eps, false},
                         iq = {b->q + b->HD, freq,        b->iq,           p, m, nq, g->index_n_head,
                               g->rope_dim,  g->norm_eps, g->sim_fp4_index};
        LSA_TRY(query(b, &q, false, err));
        if (csa) LSA_TRY(query(b, &iq, true, err));
    }
done:
    return st;
}

/* ---- compressed rows ---- */

struct compress_args {
    const float *proj, *norm, *freq;
    uint16_t *out;
    int64_t begin;
    int c, roles, ratio, rope;
    float eps;
    bool key, fp8, fp4;
};

/* A block an entry: per-channel softmax over the gates of its window, pooled, normed, rotated. Shared: [c].
 */
static __global__ void __launch_bounds__(THREADS) bf16_compress_k(const __grid_constant__ compress_args a) {
    extern __shared__ float4 shared4[];
    float *const v = (float *)shared4;
    const int64_t i = a.begin + blockIdx.x, own = a.ratio * i, last = own + a.ratio,
                  first = a.roles == 2 && i > 0 ? own - a.ratio : own;
    const int c = a.c;
    for (int ch = threadIdx.x; ch < c; ch += THREADS) {
        v[ch] = bf16_round(pooled_channel(a.proj, first, own, last, c, a.roles, ch));
    }
    __syncthreads();
    norm_in_place(v, a.norm, c, a.eps);
    rotate_in_place(v, c, a.rope, a.freq, (float)own);
    if (a.key) { /* 128 channels, by the first warp */
        if (threadIdx.x < 32) {
            float x[4];
            for (int k = 0; k < 4; k++) x[k] = v[threadIdx.x * 4 + k];
            hadamard<4>(x, threadIdx.x);
            for (int k = 0; k < 4; k++) v[threadIdx.x * 4 + k] = x[k];
        }
        __syncthreads();
    }
    if (a.fp8) simulate<64>(v, c - a.rope);
    if (a.fp4) simulate<32>(v, c);
    for (int k = threadIdx.x; k < c; k += THREADS) a.out[i * c + k] = half_of(v[k]);
}

lsa_status bf16_compress(lsa_bf16 *b, const lsa_bf16_weights *w, int64_t first, int64_t last, lsa_err *err) {
    const lsa_gpu_teacher_geom *g = &b->g;
    const int64_t n = last - first;
    const cudaStream_t s = b->cs->stream;
    if (n <= 0) return LSA_OK;
    const compress_args row = {b->proj,     w->comp_norm,  b->freq_comp, b->row,      first,
                               g->head_dim, w->roles,      w->ratio,     g->rope_dim, g->norm_eps,
                               false,       g->sim_fp8_kv, false};
    bf16_compress_k<<<(unsigned)n, THREADS, (size_t)g->head_dim * sizeof(float), s>>>(row);
    if (w->roles == 2) {
        const compress_args key = {b->iproj, w->icomp_norm, b->freq_comp, b->key, first, g->index_head_dim, 2,
                                   w->ratio, g->rope_dim,   g->norm_eps,  true,   false, g->sim_fp4_index};
        bf16_compress_k<<<(unsigned)n, THREADS, (size_t)g->index_head_dim * sizeof(float), s>>>(key);
    }
    LSA_LAUNCHED("bf16 compress");
}
