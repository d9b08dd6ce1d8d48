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

static __global__ void __launch_bounds__(THREADS) topk_k(const __grid_constant__ block_args a) {
    __shared__ uint32_t bin[BINS], in_warp[WARPS], ties_in_warp[WARPS];
    serve_wait();
    const int64_t i = blockIdx.y;
    int64_t n = a.n[i];
    if (a.at) { /* k of every full segment, what there is of the last */
        const int64_t full = n / TOPK_SEGMENT;
        n = full * a.k + least(n - full * TOPK_SEGMENT, a.k);
    }
    const int64_t first = a.at ? 0 : blockIdx.x * a.segment, len = a.at ? n : least(n - first, a.segment);
    if (len <= 0) {
        if (a.n_sel && threadIdx.x == 0) a.n_sel[i] = 0;
        return;
    }
    const float *const z = a.logit + i * a.ld + first;
    cut best = {0xffffffffu, 0, true};
    if (len > a.k)
        best = choose((uint32_t)a.k, bin, [&](auto visit) {
#pragma unroll 4
            for (int64_t c = threadIdx.x; c < len; c += THREADS) visit(word_of(z[c]));
        });
    /* ascending: a warp has neighbouring chunks */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int64_t each = (len + THREADS - 1) / THREADS * 32, c0 = warp * each, c1 = least(c0 + each, len);
    uint32_t in = 0, tie = 0;
#pragma unroll 4
    for (int64_t c = c0; c < c1; c += 32) {
        const uint32_t w = c + lane < c1 ? word_of(z[c + lane]) : 0;
        const bool here = c + lane < c1;
        in += __popc(__ballot_sync(0xffffffffu, here && w < best.word));
        tie += __popc(__ballot_sync(0xffffffffu, here && w == best.word));
    }
    if (lane == 0) in_warp[warp] = in, ties_in_warp[warp] = tie;
    __syncthreads();
    const uint32_t most = best.all_ties ? 0xffffffffu : best.ties;
    uint32_t before = 0, ties = 0;
    for (int w = 0; w < warp; w++) before += in_warp[w], ties += ties_in_warp[w];
    const int64_t out = (i * gridDim.x + blockIdx.x) * a.k;
    uint32_t to = before + min(ties, most);
    for (int64_t c = c0; c < c1; c += 32) {
        const bool here = c + lane < c1;
        const float v = here ? z[c + lane] : 0;
        const uint32_t w = word_of(v), below = (1u << lane) - 1,
                       tied = __ballot_sync(0xffffffffu, here && w == best.word);
        const bool yes = here && (w < best.word || (w == best.word && ties + __popc(tied & below) < most));
        const uint32_t taken = __ballot_sync(0xffffffffu, yes);
        if (yes) {
            const uint32_t at = to + __popc(taken & below);
            a.sel[out + at] = a.at ? a.at[i * a.ld + c + lane] : (int32_t)(first + c + lane);
            if (a.best) a.best[out + at] = v;
        }
        to += __popc(taken);
        ties += __popc(tied);
    }
    if (a.n_sel && threadIdx.x == 0) a.n_sel[i] = (int32_t)least(len, a.k);
}

lsa_status decode_topk(const lsa_gpu_retriever *x, const topk_args *a, cudaStream_t s, lsa_err *err) {
    if (a->k < 1 || a->k > TOPK_SEGMENT)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "top-k of %d chunks: from 1 to %d", a->k, TOPK_SEGMENT);
    if (a->most <= TOPK_ALONE) {
        const block_args all = {a->logit, NULL, a->n, a->ld, a->most, a->k, a->sel, a->n_sel, NULL};
        return serve_launch(x, s, "top-k", err, topk_k, dim3(1, (unsigned)a->m), THREADS, 0, all);
    }
    const int64_t segments = (a->most + TOPK_SEGMENT - 1) / TOPK_SEGMENT;
    const block_args part = {a->logit, NULL, a->n, a->ld, TOPK_SEGMENT, a->k, a->best_at, NULL, a->best},
                     join = {a->best, a->best_at, a->n, segments * a->k, 0, a->k, a->sel, a->n_sel, NULL};
    const lsa_status st = serve_launch(x, s, "top-k of segments", err, topk_k,
                                       dim3((unsigned)segments, (unsigned)a->m), THREADS, 0, part);
    if (st != LSA_OK) return st;
    return serve_launch(x, s, "top-k", err, topk_k, dim3(1, (unsigned)a->m), THREADS, 0, join);
}
