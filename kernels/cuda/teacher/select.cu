/* The lightning indexer (architecture notes 7): logits of all visible chunks for some tokens at a time, and
 * of those the k highest, ties to the lower chunk, in ascending order. */
#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

enum { THREADS = TEACHER_THREADS, TOKENS = 16, KEYS = 64 };
#include "kernels/cuda/choose.cuh"

/* lsa_visible, on the device. */
static __device__ __forceinline__ int64_t visible_to(int64_t position) {
    return (position + 1) / LSA_CHUNK;
}

struct index_args {
    const float *iq, *iw, *key;
    float *logit;
    int64_t p, ld; /* of the first token; of a row of logits */
    int m, Hi, Di;
};

/* 16 tokens x 64 keys a block: thread (x, y) has token y and keys x, x+16, x+32, x+48. Shared: keys
 * [64][Di+1], then a head's queries [16][Di+1]. */
static __global__ void __launch_bounds__(THREADS) index_k(const __grid_constant__ index_args a) {
    extern __shared__ float shared[];
    const int t0 = blockIdx.y * TOKENS, x = threadIdx.x % 16, y = threadIdx.x / 16, ld = a.Di + 1;
    const int64_t k0 = (int64_t)blockIdx.x * KEYS, visible = visible_to(a.p + min(t0 + TOKENS, a.m) - 1);
    float *const key = shared, *const q = shared + KEYS * ld;
    if (k0 >= visible) return;
    for (int i = threadIdx.x; i < KEYS * a.Di; i += THREADS) {
        const int64_t k = k0 + i / a.Di;
        key[i / a.Di * ld + i % a.Di] = k < visible ? a.key[k * a.Di + i % a.Di] : 0.0f;
    }
    float sum[KEYS / 16] = {};
    for (int h = 0; h < a.Hi; h++) {
        __syncthreads();
        for (int i = threadIdx.x; i < TOKENS * a.Di; i += THREADS) {
            const int t = t0 + i / a.Di;
            q[i / a.Di * ld + i % a.Di] = t < a.m ? a.iq[((int64_t)t * a.Hi + h) * a.Di + i % a.Di] : 0.0f;
        }
        __syncthreads();
        float dot[KEYS / 16] = {};
        for (int c = 0; c < a.Di; c++) {
            const float v = q[y * ld + c];
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) dot[j] += v * key[(x + 16 * j) * ld + c];
        }
        const float w = t0 + y < a.m ? a.iw[(int64_t)(t0 + y) * a.Hi + h] : 0.0f;
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) sum[j] += w * fmaxf(dot[j], 0.0f);
    }
    for (int j = 0; j < KEYS / 16; j++) {
        const int64_t k = k0 + x + 16 * j;
        if (t0 + y < a.m && k < visible_to(a.p + t0 + y)) a.logit[(int64_t)(t0 + y) * a.ld + k] = sum[j];
    }
}

/* Larger logits have smaller words; a NaN has the largest. */
static __device__ __forceinline__ uint32_t word_of(float x) {
    const uint32_t u = __float_as_uint(x + 0.0f);
    return x == x ? ~(u ^ ((0u - (u >> 31)) | 0x80000000u)) : 0xffffffffu;
}

struct choose_args {
    const float *logit;
    int64_t p, ld;
    int k;
    int32_t *sel, *n_sel;
    float *sel_logit;
};

/* A block a token: the k smallest words, then one ordered walk. */
static __global__ void __launch_bounds__(THREADS) choose_k(const __grid_constant__ choose_args a) {
    __shared__ uint32_t bin[BINS];
    const int64_t t = blockIdx.x, n = visible_to(a.p + t);
    const float *const z = a.logit + t * a.ld;
    const int tid = threadIdx.x;
    cut best = {0xffffffffu, 0, true}; /* all of them */
    if (n > a.k)
        best = choose((uint32_t)a.k, bin, [&](auto visit) {
            for (int64_t c = tid; c < n; c += THREADS) visit(word_of(z[c]));
        });
    uint32_t done = 0, ties = 0, total;
    for (int64_t c0 = 0; c0 < n; c0 += THREADS) {
        const int64_t c = c0 + tid;
        const uint32_t w = c < n ? word_of(z[c]) : 0xffffffffu;
        const uint32_t tie = c < n && w == best.word;
        const uint32_t rank = ties + scan(tie, &total) - tie;
        ties += total;
        const uint32_t in = c < n && (w < best.word || (tie && (best.all_ties || rank < best.ties)));
        const uint32_t at = done + scan(in, &total) - in;
        done += total;
        if (in) {
            a.sel[t * a.k + at] = (int32_t)c;
            a.sel_logit[t * a.k + at] = z[c];
        }
    }
    if (tid == 0) a.n_sel[t] = (int32_t)done;
}

lsa_status teacher_select(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err) {
    const lsa_gpu_teacher_geom *g = &t->g;
    const int64_t ld = t->max_tokens / LSA_CHUNK + 1;
    const int bytes = (KEYS + TOKENS) * (g->index_head_dim + 1) * (int)sizeof(float);
    LSA_CUDA(cudaFuncSetAttribute(index_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    for (int64_t i = 0; i < m; i += t->logit_rows) {
        const int64_t rows = m - i < t->logit_rows ? m - i : t->logit_rows,
                      visible = lsa_visible(p + i + rows - 1);
        const index_args a = {t->iq + i * t->ID,
                              t->iw + i * g->index_n_head,
                              t->key,
                              t->logit,
                              p + i,
                              ld,
                              (int)rows,
                              g->index_n_head,
                              g->index_head_dim};
        if (visible > 0)
            index_k<<<dim3((unsigned)((visible + KEYS - 1) / KEYS), (unsigned)((rows + TOKENS - 1) / TOKENS)),
                      THREADS, bytes, t->cs->stream>>>(a);
        for (int32_t k = 0; k < t->n_probe; k++) { /* the rows are overwritten by the next tokens */
            const int64_t at = t->probe[k] - p, chunks = t->max_tokens / LSA_CHUNK + 1;
            if (at < i || at >= i + rows) continue;
            float *const to = t->host_probe[k];
            LSA_CUDA(cudaMemcpyAsync(to, t->logit + (at - i) * ld,
                                     (size_t)lsa_visible(t->probe[k]) * sizeof *to, cudaMemcpyDeviceToHost,
                                     t->cs->stream));
            LSA_CUDA(cudaMemcpyAsync(to + chunks, t->iq + at * t->ID, (size_t)t->ID * sizeof *to,
                                     cudaMemcpyDeviceToHost, t->cs->stream));
            LSA_CUDA(cudaMemcpyAsync(to + chunks + t->ID, t->iw + at * g->index_n_head,
                                     (size_t)g->index_n_head * sizeof *to, cudaMemcpyDeviceToHost,
                                     t->cs->stream));
        }
        const choose_args b = {
            t->logit, p + i, ld, (int)t->top, t->sel + i * t->top, t->n_sel + i, t->sel_logit + i * t->top};
        choose_k<<<(unsigned)rows, THREADS, 0, t->cs->stream>>>(b);
    }
    LSA_LAUNCHED("select");
}
