/* Level 2 (architecture notes 7, with a resident set): logits of the native indexer, and of the chunks that
 * are resident the k highest, ties to the lower chunk, in ascending order. What the native top-k over all
 * visible chunks would have taken beside is counted as misses.
 *
 * A pair of token and chunk has the same logit whatever else is in the call or resident. The mistake that
 * would stay silent: counting misses among the resident choices, which has none. */
#include "kernels/cuda/decode/codec.cuh"
#include "kernels/cuda/decode/session_state.h"

enum { THREADS = TEACHER_THREADS, TOKENS = 16, KEYS = 64 };
#include "kernels/cuda/choose.cuh"

static __device__ __forceinline__ int64_t visible_to(int64_t position) {
    return (position + 1) / LSA_CHUNK;
}

/* How many chunks of `ids` a token may see; its own list is all visible. */
static __device__ __forceinline__ int64_t seen_at(const chunk_ids &ids, int64_t position) {
    return ids.n + visible_to(position) - ids.n_masked;
}

struct index_args {
    const float *iq, *iw, *key; /* key: f32, or NULL and encoded */
    row_source coded;
    chunk_ids ids;
    float *logit;
    int64_t p, ld; /* of the first token; of a row of logits */
    int m, Hi, Di;
};

/* 16 tokens x 64 keys a block: thread (x, y) has token y and keys x, x+16, x+32, x+48. Shared: keys
 * [64][Di+1], then a head's queries [16][Di+1]. */
static __global__ void __launch_bounds__(THREADS) index_k(const __grid_constant__ index_args a) {
    extern __shared__ float shared[];
    const int t0 = blockIdx.y * TOKENS, x = threadIdx.x % 16, y = threadIdx.x / 16, ld = a.Di + 1,
              rows = min(TOKENS, a.m - t0);
    const int64_t k0 = (int64_t)blockIdx.x * KEYS, visible = seen_at(a.ids, a.p + t0 + rows - 1);
    float *const key = shared, *const q = shared + KEYS * ld;
    if (k0 >= visible) return;
    for (int i = threadIdx.x; i < KEYS * a.Di; i += THREADS) {
        const int64_t k = k0 + i / a.Di;
        const int c = i % a.Di;
        float v = 0.0f;
        if (k < visible) {
            const int64_t chunk = chunk_at(a.ids, k);
            if (a.key) {
                v = a.key[chunk * a.Di + c];
            } else {
                const uint8_t *const from = row_at(a.coded, chunk);
                v = code_value(from[c]) * key_scale(from, a.Di);
            }
        }
        key[i / a.Di * ld + c] = v;
    }
    float sum[KEYS / 16] = {};
    for (int h = 0; h < a.Hi; h++) {
        __syncthreads();
        for (int i = threadIdx.x; i < rows * a.Di; i += THREADS)
            q[i / a.Di * ld + i % a.Di] = a.iq[((int64_t)(t0 + i / a.Di) * a.Hi + h) * a.Di + i % a.Di];
        __syncthreads();
        if (y >= rows) continue;
        float dot[KEYS / 16] = {};
        for (int c = 0; c < a.Di; c++) {
            const float v = q[y * ld + c];
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) dot[j] += v * key[(x + 16 * j) * ld + c];
        }
        const float w = a.iw[(int64_t)(t0 + y) * a.Hi + h];
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) sum[j] += w * fmaxf(dot[j], 0.0f);
    }
    if (y >= rows) return;
    for (int j = 0; j < KEYS / 16; j++) {
        const int64_t k = k0 + x + 16 * j;
        if (k < seen_at(a.ids, a.p + t0 + y)) a.logit[(int64_t)(t0 + y) * a.ld + k] = sum[j];
    }
}

/* Larger logits have smaller words; a NaN has the largest. */
static __device__ __forceinline__ uint32_t word_of(float x) {
    const uint32_t u = __float_as_uint(x + 0.0f);
    return x == x ? ~(u ^ ((0u - (u >> 31)) | 0x80000000u)) : 0xffffffffu;
}

struct choose_args {
    const float *logit;
    chunk_ids ids;
    const uint8_t *mask; /* NULL: everything is resident */
    int64_t n_masked, p, ld;
    int k;
    int32_t *sel, *n_sel, *miss;
    float *sel_logit;
    unsigned long long *all_miss;
};

/* The k highest of z [n] that `in` admits, into sel as chunks; every thread gets how many. */
template <typename IN>
static __device__ uint32_t take(const float *z, const chunk_ids &ids, int64_t n, int k, uint32_t *bin, IN in,
                                int32_t *sel, float *sel_logit) {
    uint32_t can = 0, total;
    for (int64_t c = threadIdx.x; c < n; c += THREADS) can += in(c) ? 1 : 0;
    scan(can, &total);
    cut best = {0xffffffffu, 0, true}; /* all of them */
    if (total > (uint32_t)k)
        best = choose((uint32_t)k, bin, [&](auto visit) {
            for (int64_t c = threadIdx.x; c < n; c += THREADS)
                if (in(c)) visit(word_of(z[c]));
        });
    uint32_t done = 0, ties = 0;
    for (int64_t c0 = 0; c0 < n; c0 += THREADS) {
        const int64_t c = c0 + threadIdx.x;
        const bool may = c < n && in(c);
        const uint32_t w = may ? word_of(z[c]) : 0xffffffffu, tie = may && w == best.word;
        const uint32_t rank = ties + scan(tie, &total) - tie;
        ties += total;
        const uint32_t yes = may && (w < best.word || (tie && (best.all_ties || rank < best.ties)));
        const uint32_t at = done + scan(yes, &total) - yes;
        done += total;
        if (yes) {
            sel[at] = chunk_at(ids, c);
            sel_logit[at] = z[c];
        }
    }
    __syncthreads();
    return done;
}

/* A block a token. */
static __global__ void __launch_bounds__(THREADS) choose_k(const __grid_constant__ choose_args a) {
    __shared__ uint32_t bin[BINS];
    const int64_t t = blockIdx.x, n = seen_at(a.ids, a.p + t);
    const float *const z = a.logit + t * a.ld;
    int32_t *const sel = a.sel + t * a.k;
    float *const sel_logit = a.sel_logit + t * a.k;
    uint32_t done = take(
                 z, a.ids, n, a.k, bin, [](int64_t) { return true; }, sel, sel_logit),
             miss = 0;
    if (a.mask) { /* then all chunks were scored */
        const auto resident = [&](int64_t c) { return c >= a.n_masked || a.mask[c]; };
        uint32_t mine = 0;
        for (uint32_t i = threadIdx.x; i < done; i += THREADS) mine += resident(sel[i]) ? 0 : 1;
        scan(mine, &miss);
        __syncthreads();
        if (miss) done = take(z, a.ids, n, a.k, bin, resident, sel, sel_logit);
    }
    if (threadIdx.x == 0) {
        a.n_sel[t] = (int32_t)done;
        a.miss[t] = (int32_t)miss;
        if (miss) atomicAdd(a.all_miss, (unsigned long long)miss);
    }
}

lsa_status decode_select(lsa_gpu_session *s, const decode_layer *layer, int64_t p, int64_t m, lsa_err *err) {
    lsa_gpu_teacher *const t = s->t;
    const lsa_gpu_teacher_geom *g = &t->g;
    const int64_t ld = s->max_chunk + 1;
    const int bytes = (KEYS + TOKENS) * (g->index_head_dim + 1) * (int)sizeof(float);
    LSA_CUDA(cudaFuncSetAttribute(index_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const chunk_ids ids = {reserve_only(s) ? s->store.list : NULL, reserve_only(s) ? s->store.n_list : 0,
                           reserve_only(s) ? s->n_masked : 0};
    row_source coded = {};
    if (!layer->key) {
        const lsa_status st = pages_keys(s, layer, lsa_visible(p + m - 1), &coded, err);
        if (st != LSA_OK) return st;
    }
    for (int64_t i = 0; i < m; i += s->logit_rows) {
        const int64_t rows = m - i < s->logit_rows ? m - i : s->logit_rows,
                      visible = ids.n + lsa_visible(p + i + rows - 1) - ids.n_masked;
        const index_args a = {t->iq + i * t->ID,
                              t->iw + i * g->index_n_head,
                              layer->key,
                              coded,
                              ids,
                              s->logit,
                              p + i,
                              ld,
                              (int)rows,
                              g->index_n_head,
                              g->index_head_dim};
        if (visible > 0)
            index_k<<<dim3((unsigned)((visible + KEYS - 1) / KEYS), (unsigned)((rows + TOKENS - 1) / TOKENS)),
                      THREADS, bytes, t->cs->stream>>>(a);
        const choose_args b = {s->logit,
                               ids,
                               s->masked && !reserve_only(s) ? s->mask : NULL,
                               s->n_masked,
                               p + i,
                               ld,
                               (int)t->top,
                               t->sel + i * t->top,
                               t->n_sel + i,
                               s->on.miss + i,
                               t->sel_logit + i * t->top,
                               s->all_miss};
        choose_k<<<(unsigned)rows, THREADS, 0, t->cs->stream>>>(b);
    }
    LSA_LAUNCHED("select");
}
