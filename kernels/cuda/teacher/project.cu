/* From a layer's input to queries, window rows, compressed rows and index keys (architecture notes 5 to 7).
 *
 * With two roles (CSA) the lo half of a token's channels serves the entry after its own, the hi half its own
 * entry: entry i pools lo of tokens 4i-4 .. 4i-1 and hi of 4i .. 4i+3. Swapping the halves stays fluent and
 * fails far away. */
#include "kernels/cuda/teacher/project.cuh"
#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

enum { THREADS = TEACHER_THREADS };

/* ---- cache simulations: groups of 64 (fp8) or 32 (fp4) with a power-of-two scale, notes 2.3 and 2.4 ---- */

static __device__ __forceinline__ float to_bf16(float x) {
    const uint32_t u = __float_as_uint(x);
    return __uint_as_float((u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u);
}
/* By one thread: v [n] in place. */
static __device__ void simulate(float *v, int n, int group, float least, float inverse_top, int mantissa,
                                int lowest, float top) {
    for (int g = 0; g < n; g += group) {
        float most = least;
        for (int i = g; i < min(g + group, n); i++) most = fmaxf(most, fabsf(v[i]));
        const float s = pow2_ceil(most * inverse_top);
        for (int i = g; i < min(g + group, n); i++)
            v[i] = to_bf16(to_small(v[i] / s, mantissa, lowest, top) * s);
    }
}
static __device__ __forceinline__ void simulate_fp8(float *v, int n) {
    simulate(v, n, 64, 1e-4f, 1.0f / 448.0f, 3, -6, 448.0f);
}
static __device__ __forceinline__ void simulate_fp4(float *v, int n) {
    simulate(v, n, 32, 6.0f * 1.17549435e-38f, 1.0f / 6.0f, 1, 0, 6.0f);
}

/* ---- a token's own rows ---- */

struct token_args {
    const float *xp, *q_norm, *kv_norm, *ape, *iape, *freq;
    float *qr, *win, *proj, *iproj, *iw;
    int64_t p;
    int nx, at_kv, at_cv, at_cg, at_iv, at_ig, at_iw, q_rank, D, rope, ratio, kc, ikc, Hi;
    float eps, iw_scale;
    bool fp8;
};

static __device__ void norm_into(float *y, const float *x, const float *w, int n, float eps) {
    float s = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) s += x[i] * x[i];
    const float r = 1.0f / sqrtf(block_sum(s) / (float)n + eps);
    for (int i = threadIdx.x; i < n; i += THREADS) y[i] = w ? w[i] * (x[i] * r) : x[i] * r;
    __syncthreads();
}

static __global__ void __launch_bounds__(THREADS) token_k(const __grid_constant__ token_args a) {
    const int64_t t = blockIdx.x, pos = a.p + t;
    const float *const xp = a.xp + t * a.nx;
    float *const kv = a.win + pos * a.D;
    norm_into(a.qr + t * a.q_rank, xp, a.q_norm, a.q_rank, a.eps);
    norm_into(kv, xp + a.at_kv, a.kv_norm, a.D, a.eps);
    for (int i = threadIdx.x; i < a.rope / 2; i += THREADS)
        rotate_pair(kv + a.D - a.rope + 2 * i, a.freq[i], (float)pos, 1.0f);
    if (a.fp8 && threadIdx.x == 0) simulate_fp8(kv, a.D - a.rope); /* channels before the rotated ones */
    if (a.at_cv >= 0) {
        float *const to = a.proj + pos * 2 * a.kc;
        const float *const ape = a.ape + pos % a.ratio * a.kc;
        compressor_row(to, xp + a.at_cv, xp + a.at_cg, ape, a.kc);
    }
    if (a.at_iv >= 0) {
        float *const to = a.iproj + pos * 2 * a.ikc;
        const float *const ape = a.iape + pos % LSA_CHUNK * a.ikc;
        compressor_row(to, xp + a.at_iv, xp + a.at_ig, ape, a.ikc);
        for (int i = threadIdx.x; i < a.Hi; i += THREADS) a.iw[t * a.Hi + i] = xp[a.at_iw + i] * a.iw_scale;
    }
}

/* Sylvester's Hadamard of a vector in shared memory, divided by sqrt(n). */
static __device__ void hadamard(float *v, int n) {
    for (int h = 1; h < n; h *= 2) {
        for (int i = threadIdx.x; i < n / 2; i += THREADS) {
            const int at = i / h * 2 * h + i % h;
            const float x = v[at], y = v[at + h];
            v[at] = x + y;
            v[at + h] = x - y;
        }
        __syncthreads();
    }
    const float f = 1.0f / sqrtf((float)n);
    for (int i = threadIdx.x; i < n; i += THREADS) v[i] *= f;
    __syncthreads();
}

struct query_args {
    const float *qq, *freq;
    float *q, *iq;
    int64_t p, m;
    int H, D, Hi, Di, rope;
    float eps;
    bool fp4, index;
};

/* A warp a token and head, N / 32 channels side by side a lane: attention queries are normed and rotated,
 * index queries rotated and transformed. index: heads a.H and on. */
template <int N>
static __global__ void __launch_bounds__(THREADS) query_k(const __grid_constant__ query_args a) {
    enum { K = N / 32 };
    const int lane = threadIdx.x & 31, heads = a.index ? a.Hi : a.H;
    const int64_t at = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, t = at / heads,
                  h = at % heads;
    const int nq = a.H * a.D + a.Hi * a.Di, c0 = lane * K;
    if (t >= a.m) return;
    const float *const from = a.qq + t * nq + (a.index ? a.H * a.D : 0) + h * N;
    float v[K];
#pragma unroll
    for (int i = 0; i < K; i++) v[i] = from[c0 + i];
    if (!a.index) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < K; i++) s += v[i] * v[i];
        for (int o = 16; o >= 1; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
        const float r = 1.0f / sqrtf(s / (float)N + a.eps);
#pragma unroll
        for (int i = 0; i < K; i++) v[i] *= r;
    }
#pragma unroll
    for (int i = 0; i < K; i += 2)
        if (c0 + i >= N - a.rope)
            rotate_pair(v + i, a.freq[(c0 + i - N + a.rope) / 2], (float)(a.p + t), 1.0f);
    if (a.index) {
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
        const float f = 1.0f / sqrtf((float)N);
#pragma unroll
        for (int i = 0; i < K; i++) v[i] *= f;
    }
    float *const to = (a.index ? a.iq : a.q) + (t * heads + h) * N;
#pragma unroll
    for (int i = 0; i < K; i++) to[c0 + i] = v[i];
    if (!a.index || !a.fp4) return;
    __syncwarp();
    if (lane == 0) simulate_fp4(to, N);
}

static lsa_status query(lsa_gpu_teacher *t, const query_args *a, lsa_err *err) {
    const int64_t vectors = a->m * (a->index ? a->Hi : a->H);
    const unsigned blocks = (unsigned)((vectors + THREADS / 32 - 1) / (THREADS / 32));
    const cudaStream_t s = t->cs->stream;
    switch (a->index ? a->Di : a->D) {
    case 64:
        query_k<64><<<blocks, THREADS, 0, s>>>(*a);
        break;
    case 128:
        query_k<128><<<blocks, THREADS, 0, s>>>(*a);
        break;
    case 256:
        query_k<256><<<blocks, THREADS, 0, s>>>(*a);
        break;
    case 512:
        query_k<512><<<blocks, THREADS, 0, s>>>(*a);
        break;
    default:
        query_k<1024><<<blocks, THREADS, 0, s>>>(*a);
    }
    LSA_LAUNCHED("query");
}

lsa_status teacher_project(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &t->g;
    const lsa_gpu_layer_weights *w = &l->w;
    const bool csa = w->roles == 2;
    const float *const freq = w->ratio ? t->table.freq_comp : t->table.freq_main;
    const int64_t nq = t->HD + (csa ? t->ID : 0);
    LSA_TRY(teacher_gemm(t, m, w->nx, g->hidden, t->x, w->wx, 0, t->xp, err));
    {
        const token_args a = {t->xp,
                              w->q_norm,
                              w->kv_norm,
                              w->ape,
                              w->iape,
                              freq,
                              t->qr,
                              t->win,
                              t->proj,
                              t->iproj,
                              t->iw,
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
        token_k<<<(unsigned)m, THREADS, 0, t->cs->stream>>>(a);
        LSA_CUDA(cudaGetLastError());
    }
    LSA_TRY(teacher_gemm(t, m, nq, g->q_rank, t->qr, w->wq, 0, t->qq, err));
    {
        query_args a = {t->qq,
                        freq,
                        t->q,
                        t->iq,
                        p,
                        m,
                        g->n_head,
                        g->head_dim,
                        csa ? g->index_n_head : 0,
                        g->index_head_dim,
                        g->rope_dim,
                        g->norm_eps,
                        g->sim_fp4_index,
                        false};
        LSA_TRY(query(t, &a, err));
        a.index = true;
        if (csa) LSA_TRY(query(t, &a, err));
    }
done:
    return st;
}

/* ---- compressed rows ---- */

struct compress_args {
    const float *proj, *norm, *freq;
    float *out;
    int64_t begin;
    int c, roles, ratio, rope;
    float eps;
    bool key, fp8, fp4;
};

/* A block an entry: per-channel softmax over the gates of its window, pooled, normed, rotated. */
static __global__ void __launch_bounds__(THREADS) compress_k(const __grid_constant__ compress_args a) {
    __shared__ float v[TEACHER_WIDTH];
    const int64_t i = a.begin + blockIdx.x, own = a.ratio * i, last = own + a.ratio,
                  first = a.roles == 2 && i > 0 ? own - a.ratio : own;
    const int c = a.c;
    for (int ch = threadIdx.x; ch < c; ch += THREADS) {
        v[ch] = pooled_channel(a.proj, first, own, last, c, a.roles, ch);
    }
    __syncthreads();
    norm_into(v, v, a.norm, c, a.eps);
    for (int k = threadIdx.x; k < a.rope / 2; k += THREADS)
        rotate_pair(v + c - a.rope + 2 * k, a.freq[k], (float)own, 1.0f);
    __syncthreads();
    if (a.key) hadamard(v, c);
    if (threadIdx.x == 0 && a.fp8) simulate_fp8(v, c - a.rope);
    if (threadIdx.x == 0 && a.fp4) simulate_fp4(v, c);
    __syncthreads();
    for (int k = threadIdx.x; k < c; k += THREADS) a.out[i * c + k] = v[k];
}

lsa_status teacher_compress(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t first, int64_t last,
                            lsa_err *err) {
    const lsa_gpu_teacher_geom *g = &t->g;
    const lsa_gpu_layer_weights *w = &l->w;
    const int64_t n = last - first;
    if (n <= 0) return LSA_OK;
    const compress_args row = {t->proj,  w->comp_norm, t->table.freq_comp, t->row,      first, g->head_dim,
                               w->roles, w->ratio,     g->rope_dim,        g->norm_eps, false, g->sim_fp8_kv,
                               false};
    compress_k<<<(unsigned)n, THREADS, 0, t->cs->stream>>>(row);
    if (w->roles == 2) {
        const compress_args key = {
            t->iproj, w->icomp_norm, t->table.freq_comp, t->key, first, g->index_head_dim, 2,
            w->ratio, g->rope_dim,   g->norm_eps,        true,   false, g->sim_fp4_index};
        compress_k<<<(unsigned)n, THREADS, 0, t->cs->stream>>>(key);
    }
    LSA_LAUNCHED("compress");
}
