/* The k highest logits of every request of a batch. A request of few chunks is one block's; of more, blocks
 * find the k best of segments, and one block the k best of those: the k best of all are among them, in the
 * same order, so ties fall alike. */
#include "kernels/cuda/decode/step.h"

enum { THREADS = 1024, WARPS = THREADS / 32 };
#include "kernels/cuda/choose.cuh"

/* Larger logits have smaller words; a NaN has the largest. */
static __device__ __forceinline__ uint32_t word_of(float x) {
    const uint32_t u = __float_as_uint(x + 0.0f);
    return x == x ? ~(u ^ ((0u - (u >> 31)) | 0x80000000u)) : 0xffffffffu;
}

struct block_args {
    const float *logit;
    const int32_t *at; /* positions of these; NULL: they are counted from 0 */
    const int64_t *n;
    int64_t ld, segment; /* segment 0: these are the segments' best */
    int32_t k;
    int32_t *sel, *n_sel; /* n_sel NULL: not the last word */
    float *best;
};

static __device__ __forceinline__ int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static __device__ __forceinline__ float value_of(uint32_t word) {
    const uint32_t u = ~word;
    return __uint_as_float(u & 0x80000000u ? u ^ 0x80000000u : ~u);
}

enum { CROWD = 1024 }; /* members of the last bin that are ranked by counting */

struct last_in { /* the worst that is chosen: word, then position */
    uint32_t word;
    int32_t at;
};

/* The k best of the block's members by two choices of `choose`: of words, then of positions among equal ones.
 */
template <typename EACH> static __device__ last_in by_words(uint32_t k, uint32_t *bin, EACH each) {
    const cut w = choose(k, bin, [&](auto visit) { each([&](uint32_t word, int32_t) { visit(word); }); });
    if (w.all_ties) return {w.word, INT32_MAX};
    const cut p = choose(w.ties, bin, [&](auto visit) {
        each([&](uint32_t word, int32_t at) {
            if (word == w.word) visit((uint32_t)at);
        });
    });
    return {w.word, (int32_t)p.word};
}

/* The same: a histogram over the range of the values, whose bins hold few, and the last bin ranked by
 * counting. Values that are not finite, and crowded bins, go by words. */
template <typename EACH> static __device__ last_in by_values(uint32_t k, uint32_t *bin, EACH each) {
    __shared__ float low_in_warp[WARPS], high_in_warp[WARPS];
    __shared__ uint32_t filled, crowd_word[CROWD];
    __shared__ int32_t crowd_at[CROWD];
    __shared__ last_in last;
    float low = INFINITY, high = -INFINITY;
    each([&](uint32_t word, int32_t) {
        const float x = value_of(word);
        low = fminf(low, fabsf(x) <= 3e38f ? x : -INFINITY), high = fmaxf(high, x);
    });
    for (int o = 16; o >= 1; o /= 2) {
        low = fminf(low, __shfl_xor_sync(0xffffffffu, low, o));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, o));
    }
    if (threadIdx.x % 32 == 0) low_in_warp[threadIdx.x / 32] = low, high_in_warp[threadIdx.x / 32] = high;
    for (int b = threadIdx.x; b < BINS; b += THREADS) bin[b] = 0;
    if (threadIdx.x == 0) filled = 0;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) low = fminf(low, low_in_warp[w]), high = fmaxf(high, high_in_warp[w]);
    const float scale = (float)BINS / (high - low);
    if (!(scale <= 3e38f && scale > 0)) return by_words(k, bin, each);
    /* subtraction and product round, and never turn an order around */
    const auto bin_of = [&](uint32_t word) {
        return min((int)((high - value_of(word)) * scale), (int)BINS - 1);
    };
    each([&](uint32_t word, int32_t) { atomicAdd(&bin[bin_of(word)], 1u); });
    __syncthreads();
    const crossing c = bin_of_kth(k, bin);
    if (c.count > CROWD) return by_words(k, bin, each);
    each([&](uint32_t word, int32_t at) {
        if (bin_of(word) != (int)c.bin) return;
        const uint32_t i = atomicAdd(&filled, 1u);
        crowd_word[i] = word, crowd_at[i] = at;
    });
    __syncthreads();
    if (threadIdx.x < c.count) {
        const uint32_t word = crowd_word[threadIdx.x];
        const int32_t at = crowd_at[threadIdx.x];
        uint32_t better = 0;
        for (uint32_t i = 0; i < c.count; i++)
            better += crowd_word[i] < word || (crowd_word[i] == word && crowd_at[i] < at);
        if (better == c.left - 1) last = {word, at};
    }
    __syncthreads();
    return last;
}

/* EACH: logits of a thread, kept in registers; 0: any number, read again each time. */
template <int EACH>
static __global__ void __launch_bounds__(THREADS) topk_k(const __grid_constant__ block_args a) {
    __shared__ uint32_t bin[BINS], in_warp[WARPS];
    serve_wait();
    const int64_t i = blockIdx.y;
    int64_t n = a.n[i];
    if (a.at) { /* k of every full segment, what there is of the last */
        const int64_t full = n / TOPK_SEGMENT;
        n = full * a.k + least(n - full * TOPK_SEGMENT, a.k);
    }
    const int64_t first = a.at ? 0 : blockIdx.x * a.segment;
    const int32_t len = (int32_t)(a.at ? n : least(n - first, a.segment));
    if (len <= 0) {
        if (a.n_sel && threadIdx.x == 0) a.n_sel[i] = 0;
        return;
    }
    const float *const z = a.logit + i * a.ld + first;
    /* a warp has neighbouring chunks, so that what is written ascends */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int32_t rounds = (len + THREADS - 1) / THREADS, c0 = warp * rounds * 32 + lane,
                  c1 = min(warp * rounds * 32 + rounds * 32, len);
    uint32_t word[EACH > 0 ? EACH : 1];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int32_t c = c0 + 32 * j;
        word[j] = j < rounds && c < c1 ? word_of(z[c]) : 0;
    }
    const auto each = [&](auto visit) {
        if constexpr (EACH > 0) {
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (j < rounds && c0 + 32 * j < c1) visit(word[j], c0 + 32 * j);
        } else {
            for (int32_t c = c0; c < c1; c += 32) visit(word_of(z[c]), c);
        }
    };
    last_in last = {0xffffffffu, INT32_MAX};
    if (len > a.k) last = EACH > 0 ? by_values((uint32_t)a.k, bin, each) : by_words((uint32_t)a.k, bin, each);
    const auto is_in = [&](uint32_t w, int32_t c) {
        return w < last.word || (w == last.word && c <= last.at);
    };
    uint32_t in = 0;
    each([&](uint32_t w, int32_t c) { in += is_in(w, c); });
    for (int o = 16; o >= 1; o /= 2) in += __shfl_xor_sync(0xffffffffu, in, o);
    if (lane == 0) in_warp[warp] = in;
    __syncthreads();
    int64_t to = (i * gridDim.x + blockIdx.x) * a.k;
    for (int w = 0; w < warp; w++) to += in_warp[w];
    const auto write = [&](bool here, uint32_t w, int32_t c) {
        const bool yes = here && is_in(w, c);
        const uint32_t taken = __ballot_sync(0xffffffffu, yes);
        if (yes) {
            const int64_t at = to + __popc(taken & ((1u << lane) - 1));
            a.sel[at] = a.at ? a.at[i * a.ld + c] : (int32_t)(first + c);
            if (a.best) a.best[at] = z[c];
        }
        to += __popc(taken);
    };
    if constexpr (EACH > 0) {
#pragma unroll
        for (int j = 0; j < EACH; j++) /* the same for all lanes: a ballot follows */
            if (j < rounds) write(c0 + 32 * j < c1, word[j], c0 + 32 * j);
    } else {
        for (int32_t j = 0; j < rounds; j++) {
            const int32_t c = c0 + 32 * j;
            write(c < c1, c < c1 ? word_of(z[c]) : 0, c);
        }
    }
    if (a.n_sel && threadIdx.x == 0) a.n_sel[i] = (int32_t)least(len, a.k);
}

/* One block over at most `most` chunks each. */
static lsa_status launch(const lsa_gpu_retriever *x, const char *what, int64_t blocks, int32_t m,
                         int64_t most, const block_args &a, cudaStream_t s, lsa_err *err) {
    const dim3 grid((unsigned)blocks, (unsigned)m);
    return most <= 8 * THREADS    ? serve_launch(x, s, what, err, topk_k<8>, grid, THREADS, 0, a)
           : most <= 16 * THREADS ? serve_launch(x, s, what, err, topk_k<16>, grid, THREADS, 0, a)
           : most <= 24 * THREADS ? serve_launch(x, s, what, err, topk_k<24>, grid, THREADS, 0, a)
                                  : serve_launch(x, s, what, err, topk_k<0>, grid, THREADS, 0, a);
}

lsa_status decode_topk(const lsa_gpu_retriever *x, const topk_args *a, cudaStream_t s, lsa_err *err) {
    if (a->k < 1 || a->k > TOPK_SEGMENT)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "top-k of %d chunks: from 1 to %d", a->k, TOPK_SEGMENT);
    if (a->most <= TOPK_ALONE) {
        const block_args all = {a->logit, NULL, a->n, a->ld, a->most, a->k, a->sel, a->n_sel, NULL};
        return launch(x, "top-k", 1, a->m, a->most, all, s, err);
    }
    const int64_t segments = (a->most + TOPK_SEGMENT - 1) / TOPK_SEGMENT;
    const block_args part = {a->logit, NULL, a->n, a->ld, TOPK_SEGMENT, a->k, a->best_at, NULL, a->best},
                     join = {a->best, a->best_at, a->n, segments * a->k, 0, a->k, a->sel, a->n_sel, NULL};
    const lsa_status st = launch(x, "top-k of segments", segments, a->m, TOPK_SEGMENT, part, s, err);
    return st == LSA_OK ? launch(x, "top-k", 1, a->m, segments * a->k, join, s, err) : st;
}
