/* The lightning indexer (architecture notes 7): logits of all visible chunks, and of those the k highest,
 * ties to the lower chunk, in ascending order.
 *
 * Screened in f16, decided in f32. screen_k computes every logit on tensor cores from f16 copies of queries
 * and keys; its distance from the f32 logit is at most
 *   bound = 1.1 2^-10 (sum_h |w_h| |q_h| K + 2^-10 sum_h |w_h| (K + |q_h|)),  K the longest key,
 * (rounding of both factors is 2^-11 each; the rest covers sums of up to 2^6 heads and subnormal numbers).
 * With A the k-th largest screened logit, k chunks have f32 logits of at least A - bound; so whatever belongs
 * to the k highest is screened at A - 2 bound or above. Only those, a few more than k, are computed in f32,
 * each by one thread in one order. The result is the f32 choice to the last bit, whatever f16 lost: a bound
 * that is not finite, or keys and queries beyond f16, make every chunk a candidate. */
#include <cuda_fp16.h>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

enum { THREADS = TEACHER_THREADS, HEADS = 8 /* at a time */ };
#include "kernels/cuda/choose.cuh"

/* lsa_visible, on the device. */
static __device__ __forceinline__ int64_t visible_to(int64_t position) {
    return (position + 1) / LSA_CHUNK;
}

/* ---- f16 copies ---- */

/* A warp a vector of 128: its f16 copy; *most: bits of the greatest length so far (a NaN is above all). */
static __global__ void __launch_bounds__(THREADS)
    halve_k(const float *x, int64_t n, __half *out, uint32_t *most) {
    const int64_t v = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x & 31;
    if (v >= n) return;
    float s = 0;
    for (int c = lane; c < TEACHER_SCREENED; c += 32) {
        const float y = x[v * TEACHER_SCREENED + c];
        out[v * TEACHER_SCREENED + c] = __float2half_rn(y);
        s += y * y;
    }
    for (int o = 16; o >= 1; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
    if (most && lane == 0) atomicMax(most, __float_as_uint(sqrtf(s)));
}

/* ---- screening ---- */

enum { KEYS = 256, TOKENS = 64, GROUP = 8 /* tokens at a time */, ROW = 20 /* uint4 of a row, padded */ };

struct screen_args {
    const __half *q, *key; /* [m, Hi, 128] [chunks, 128] */
    const float *iw;
    float *logit;
    int64_t p, ld; /* of the first token; of a row of logits */
    int m, Hi;
};

/* A block 256 keys x 64 tokens; a warp keeps 32 keys in registers and passes over the queries of 8 tokens and
 * 8 heads at a time. The depth is permuted so that a lane's factors are 16 bytes side by side. */
static __global__ void __launch_bounds__(THREADS, 2) screen_k(const __grid_constant__ screen_args a) {
    __shared__ uint4 q[HEADS * GROUP * ROW];
    __shared__ float w[HEADS * GROUP];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3,
              t0 = blockIdx.y * TOKENS, tokens = min(TOKENS, a.m - t0);
    const int64_t first = (int64_t)blockIdx.x * KEYS, k0 = first + warp * 32,
                  last = visible_to(a.p + t0 + tokens - 1);
    if (first >= last) return;
    const uint4 none = {0, 0, 0, 0};
    uint4 key[2][4][2]; /* [16 keys][32 channels][rows g and g + 8] */
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int64_t k = k0 + 16 * (i >> 3) + 8 * (i & 1) + g;
        key[i >> 3][i >> 1 & 3][i & 1] =
            k < last ? ((const uint4 *)(a.key + k * TEACHER_SCREENED))[(i >> 1 & 3) * 4 + t] : none;
    }
    const int groups = (tokens + GROUP - 1) / GROUP, parts = (a.Hi + HEADS - 1) / HEADS;
    uint4 next[4];
    float next_w = 0;
    const auto fetch =
        [&](int unit) { /* row of q: head * 8 + token */
                        const int tg = unit / parts * GROUP, h0 = unit % parts * HEADS;
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int row = (tid + i * THREADS) >> 4, part = tid & 15, token = tg + (row & 7),
                                      h = h0 + (row >> 3);
                            next[i] = token < tokens && h < a.Hi
                                          ? ((const uint4 *)(a.q + ((int64_t)(t0 + token) * a.Hi + h) *
                                                                       TEACHER_SCREENED))[part]
                                          : none;
                        }
                        if (tid < HEADS * GROUP) {
                            const int token = tg + (tid & 7), h = h0 + (tid >> 3);
                            next_w =
                                token < tokens && h < a.Hi ? a.iw[(int64_t)(t0 + token) * a.Hi + h] : 0.0f;
                        }
        };
    float sum[2][4] = {};
    fetch(0);
    for (int unit = 0; unit < groups * parts; unit++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) q[((tid + i * THREADS) >> 4) * ROW + (tid & 15)] = next[i];
        if (tid < HEADS * GROUP) w[tid] = next_w;
        __syncthreads();
        if (unit + 1 < groups * parts) fetch(unit + 1);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float c[2][4] = {};
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const uint4 b = q[(h * GROUP + g) * ROW + s * 4 + t];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma_f16(c[i], key[i][s][0].x, key[i][s][1].x, key[i][s][0].y, key[i][s][1].y, b.x, b.y);
                    mma_f16(c[i], key[i][s][0].z, key[i][s][1].z, key[i][s][0].w, key[i][s][1].w, b.z, b.w);
                }
            }
            const float w0 = w[h * GROUP + 2 * t], w1 = w[h * GROUP + 2 * t + 1];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                sum[i][0] += w0 * fmaxf(c[i][0], 0.0f);
                sum[i][1] += w1 * fmaxf(c[i][1], 0.0f);
                sum[i][2] += w0 * fmaxf(c[i][2], 0.0f);
                sum[i][3] += w1 * fmaxf(c[i][3], 0.0f);
            }
        }
        if ((unit + 1) % parts) continue;
        const int tg = unit / parts * GROUP;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int token = tg + 2 * t + (i & 1);
            const int64_t k = k0 + 16 * (i >> 2) + 8 * (i >> 1 & 1) + g;
            if (token < tokens && k < visible_to(a.p + t0 + token))
                a.logit[(int64_t)(t0 + token) * a.ld + k] = sum[i >> 2][i & 3];
            sum[i >> 2][i & 3] = 0;
        }
    }
}

/* ---- f32 logits ---- */

/* q [heads rounded up to 8, Di] and w in shared memory; heads beyond the last have weight 0. */
static __device__ void load_query(float *q, float *w, const float *iq, const float *iw, int Hi, int Di) {
    const int padded = (Hi + HEADS - 1) / HEADS * HEADS;
    for (int i = threadIdx.x; i < padded * Di; i += THREADS) q[i] = i < Hi * Di ? iq[i] : 0.0f;
    for (int h = threadIdx.x; h < padded; h += THREADS) w[h] = h < Hi ? iw[h] : 0.0f;
    __syncthreads();
}

/* sum_h w_h max(q_h k, 0), channels and heads one after the other. */
static __device__ float logit_of(const float *key, const float *q, const float *w, int Hi, int Di) {
    float sum = 0;
    for (int h0 = 0; h0 < Hi; h0 += HEADS) {
        float dot[HEADS] = {};
        for (int c = 0; c < Di; c += 4) {
            const float4 k = *(const float4 *)(key + c);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float4 v = *(const float4 *)(q + (h0 + h) * Di + c);
                dot[h] += v.x * k.x;
                dot[h] += v.y * k.y;
                dot[h] += v.z * k.z;
                dot[h] += v.w * k.w;
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) sum += w[h0 + h] * fmaxf(dot[h], 0.0f);
    }
    return sum;
}

/* Whole rows: a block 256 keys of a token (grid.y). */
static __global__ void __launch_bounds__(THREADS)
    logits_k(const float *iq, const float *iw, const float *key, int64_t p, int Hi, int Di, float *logit,
             int64_t ld) {
    extern __shared__ float4 shared4[];
    float *const q = (float *)shared4, *const w = q + (Hi + HEADS - 1) / HEADS * HEADS * Di;
    const int64_t t = blockIdx.y, k = (int64_t)blockIdx.x * THREADS + threadIdx.x, n = visible_to(p + t);
    if ((int64_t)blockIdx.x * THREADS >= n) return;
    load_query(q, w, iq + t * Hi * Di, iw + t * Hi, Hi, Di);
    if (k < n) logit[t * ld + k] = logit_of(key + k * Di, q, w, Hi, Di);
}

/* Larger logits have smaller words; a NaN has the largest. */
static __device__ __forceinline__ uint32_t word_of(float x) {
    const uint32_t u = __float_as_uint(x + 0.0f);
    return x == x ? ~(u ^ ((0u - (u >> 31)) | 0x80000000u)) : 0xffffffffu;
}
static __device__ __forceinline__ float of_word(uint32_t w) {
    const uint32_t u = ~w;
    return __uint_as_float(u & 0x80000000u ? u ^ 0x80000000u : ~u);
}

struct choose_args {
    float *logit;   /* [m, ld]; overwritten where it was screened */
    int32_t *chunk; /* [m, ld] */
    const float *iq, *iw, *key;
    const uint32_t *most; /* bits of the longest key; NULL: logits are f32 ones */
    int64_t p, ld;
    int k, Hi, Di;
    int32_t *sel, *n_sel;
    float *sel_logit;
};

/* What screening can be off by, for the query in shared memory. */
static __device__ float bound_of(const float *q, const float *w, int Hi, int Di, float longest) {
    __shared__ float part[THREADS / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float sum = 0;
    for (int h = warp; h < Hi; h += THREADS / 32) {
        float s = 0;
        for (int c = lane; c < Di; c += 32) s += q[h * Di + c] * q[h * Di + c];
        for (int o = 16; o >= 1; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
        const float length = sqrtf(s);
        if (!(length < 6e4f)) sum = INFINITY; /* beyond f16 */
        sum += fabsf(w[h]) * (length * longest + 0x1p-10f * (length + longest));
    }
    __syncthreads();
    if (lane == 0) part[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < THREADS / 32; i++) sum += part[i];
    return longest < 6e4f ? 1.1f * 0x1p-10f * sum : INFINITY;
}

/* The k-th largest of z [n], n > k. */
static __device__ float kth(const float *z, int64_t n, int k, uint32_t *bin) {
    const cut c = choose((uint32_t)k, bin, [&](auto visit) {
        for (int64_t i = threadIdx.x; i < n; i += THREADS) visit(word_of(z[i]));
    });
    return c.word == 0xffffffffu ? NAN : of_word(c.word);
}

/* A block a token: candidates are compacted in place, in order, with their f32 logits; then the k highest of
 * them. */
static __global__ void __launch_bounds__(THREADS) choose_k(const __grid_constant__ choose_args a) {
    extern __shared__ float4 shared4[];
    __shared__ uint32_t bin[BINS];
    __shared__ int32_t list[2 * THREADS];
    float *const q = (float *)shared4, *const w = q + (a.Hi + HEADS - 1) / HEADS * HEADS * a.Di;
    const int64_t t = blockIdx.x, n = visible_to(a.p + t);
    float *const z = a.logit + t * a.ld;
    int32_t *const chunk = a.chunk + t * a.ld;
    const int tid = threadIdx.x;
    float least = -INFINITY;
    if (a.most) load_query(q, w, a.iq + t * a.Hi * a.Di, a.iw + t * a.Hi, a.Hi, a.Di);
    if (n > a.k) {
        least = kth(z, n, a.k, bin);
        if (a.most) least -= 2 * bound_of(q, w, a.Hi, a.Di, __uint_as_float(*a.most));
    }
    int64_t found = 0;
    uint32_t have = 0, total;
    for (int64_t c0 = 0; c0 < n; c0 += THREADS) {
        const int64_t c = c0 + tid;
        const uint32_t in = c < n && !(z[c] < least); /* a NaN is in */
        const uint32_t at = have + scan(in, &total) - in;
        if (in) list[at] = (int32_t)c;
        have += total;
        __syncthreads();
        if (have < THREADS && c0 + THREADS < n) continue;
        do { /* places before c0 + THREADS have all been read into the list */
            const int32_t mine = tid < have ? list[tid] : -1, later = list[THREADS + tid];
            float v = 0;
            if (mine >= 0) v = a.most ? logit_of(a.key + (int64_t)mine * a.Di, q, w, a.Hi, a.Di) : z[mine];
            __syncthreads();
            if (mine >= 0) chunk[found + tid] = mine, z[found + tid] = v;
            const uint32_t done = min(have, (uint32_t)THREADS);
            found += done;
            have -= done;
            if (tid < have) list[tid] = later;
            __syncthreads();
        } while (have && c0 + THREADS >= n);
    }
    cut best = {0xffffffffu, 0, true}; /* all of them */
    if (found > a.k)
        best = choose((uint32_t)a.k, bin, [&](auto visit) {
            for (int64_t i = tid; i < found; i += THREADS) visit(word_of(z[i]));
        });
    uint32_t done = 0, ties = 0;
    for (int64_t i0 = 0; i0 < found; i0 += THREADS) {
        const int64_t i = i0 + tid;
        const uint32_t word = i < found ? word_of(z[i]) : 0xffffffffu;
        const uint32_t tie = i < found && word == best.word;
        const uint32_t rank = ties + scan(tie, &total) - tie;
        ties += total;
        const uint32_t in = i < found && (word < best.word || (tie && (best.all_ties || rank < best.ties)));
        const uint32_t at = done + scan(in, &total) - in;
        done += total;
        if (in) {
            a.sel[t * a.k + at] = chunk[i];
            a.sel_logit[t * a.k + at] = z[i];
        }
    }
    if (tid == 0) a.n_sel[t] = (int32_t)done;
}

/* Logits of rows i .. i + rows of the chunk: screened, or f32 where screening does not pay or does not fit.
 */
static lsa_status screen(lsa_gpu_teacher *t, int64_t p, int64_t rows, int64_t i, int64_t ld,
                         const uint32_t *most, lsa_err *err) {
    const lsa_gpu_teacher_geom *g = &t->g;
    const int64_t visible = lsa_visible(p + i + rows - 1);
    if (visible <= 0) return LSA_OK;
    const unsigned blocks = (unsigned)((visible + THREADS - 1) / THREADS);
    if (most) {
        const screen_args a = {(const __half *)t->iq16 + i * t->ID,
                               (const __half *)t->key16,
                               t->iw + i * g->index_n_head,
                               t->logit,
                               p + i,
                               ld,
                               (int)rows,
                               g->index_n_head};
        screen_k<<<dim3(blocks, (unsigned)((rows + TOKENS - 1) / TOKENS)), THREADS, 0, t->cs->stream>>>(a);
    } else {
        logits_k<<<dim3(blocks, (unsigned)rows), THREADS, teacher_query_bytes(g), t->cs->stream>>>(
            t->iq + i * t->ID, t->iw + i * g->index_n_head, t->key, p + i, g->index_n_head, g->index_head_dim,
            t->logit, ld);
    }
    LSA_LAUNCHED("index logits");
}

lsa_status teacher_select(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &t->g;
    const cudaStream_t s = t->cs->stream;
    const int64_t keys = lsa_visible(p + m - 1), queries = m * g->index_n_head,
                  ld = (keys + 32) / 32 * 32, /* no longer than needed: short contexts stay in the L2 cache */
        fit = t->logit_room / ld < 1 ? 1 : t->logit_room / ld;
    const int bytes = teacher_query_bytes(g);
    const bool screened = g->index_head_dim == TEACHER_SCREENED && m >= GROUP;
    uint32_t *const most = screened ? t->key_most : NULL;
    LSA_CUDA(cudaFuncSetAttribute(choose_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    LSA_CUDA(cudaFuncSetAttribute(logits_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (screened) {
        LSA_CUDA(cudaMemsetAsync(most, 0, sizeof *most, s));
        if (keys > 0)
            halve_k<<<(unsigned)((keys + THREADS / 32 - 1) / (THREADS / 32)), THREADS, 0, s>>>(
                t->key, keys, (__half *)t->key16, most);
        halve_k<<<(unsigned)((queries + THREADS / 32 - 1) / (THREADS / 32)), THREADS, 0, s>>>(
            t->iq, queries, (__half *)t->iq16, NULL);
    }
    for (int64_t i = 0; i < m; i += fit) {
        const int64_t rows = m - i < fit ? m - i : fit;
        LSA_TRY(screen(t, p, rows, i, ld, most, err));
        const choose_args b = {t->logit,
                               t->candidate,
                               t->iq + i * t->ID,
                               t->iw + i * g->index_n_head,
                               t->key,
                               most,
                               p + i,
                               ld,
                               (int)t->top,
                               g->index_n_head,
                               g->index_head_dim,
                               t->sel + i * t->top,
                               t->n_sel + i,
                               t->sel_logit + i * t->top};
        choose_k<<<(unsigned)rows, THREADS, bytes, s>>>(b);
        LSA_CUDA(cudaGetLastError());
    }
done:
    return st;
}

lsa_status teacher_index16(const teacher_index *a, cudaStream_t s, lsa_err *err) {
    const int64_t keys = lsa_visible(a->p + a->m - 1), ld = (keys + 32) / 32 * 32,
                  fit = a->room / ld < 1 ? 1 : a->room / ld;
    for (int64_t i = 0; i < a->m; i += fit) {
        const int64_t rows = a->m - i < fit ? a->m - i : fit, visible = lsa_visible(a->p + i + rows - 1);
        const screen_args z = {(const __half *)a->q + i * a->Hi * TEACHER_SCREENED,
                               (const __half *)a->key,
                               a->iw + i * a->Hi,
                               a->logit,
                               a->p + i,
                               ld,
                               (int)rows,
                               a->Hi};
        if (visible > 0)
            screen_k<<<dim3((unsigned)((visible + KEYS - 1) / KEYS),
                            (unsigned)((rows + TOKENS - 1) / TOKENS)),
                       THREADS, 0, s>>>(z);
        choose_args c = {};
        c.logit = a->logit, c.chunk = a->candidate;
        c.p = a->p + i, c.ld = ld;
        c.k = a->k, c.Hi = a->Hi, c.Di = TEACHER_SCREENED;
        c.sel = a->sel + i * a->k, c.n_sel = a->n_sel + i, c.sel_logit = a->sel_logit + i * a->k;
        choose_k<<<(unsigned)rows, THREADS, 0, s>>>(c);
        LSA_CUDA(cudaGetLastError());
    }
    return LSA_OK;
}

lsa_status teacher_probe(lsa_gpu_teacher *t, int64_t p, int64_t at, float *logit, lsa_err *err) {
    const lsa_gpu_teacher_geom *g = &t->g;
    const int64_t n = lsa_visible(p + at);
    const int bytes = teacher_query_bytes(g);
    if (n == 0) return LSA_OK;
    LSA_CUDA(cudaFuncSetAttribute(logits_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    logits_k<<<dim3((unsigned)((n + THREADS - 1) / THREADS), 1), THREADS, bytes, t->cs->stream>>>(
        t->iq + at * t->ID, t->iw + at * g->index_n_head, t->key, p + at, g->index_n_head, g->index_head_dim,
        logit, 0);
    LSA_LAUNCHED("probe");
}
