/* Which chunks stay, on the device: the same sets as kernels/model/select.c, by the same unique keys (score,
 * then lower index), so the order in which threads find them does not matter.
 *
 * Threshold: scores and marks in one pass, ids in a second. Pages: page keys in one pass, then one block a
 * request finds the k-th and writes. Top-k, budget, cap: the k-th key by 13 bits a pass over the scores, then
 * marks and ids. */
#include "kernels/cuda/serve/serve_state.h"

extern "C" {
#include "kernels/model/sigmoid.h"
#include "kernels/core/prior_math.h"
}

enum { THREADS = 256, EACH = SERVE_BLOCK / THREADS, PAGE_BITS = 25 };

struct select_args {
    lsa_select_rule rule;
    const float *logit;
    int64_t ld, layer_stride, most; /* most: chunks of a request, at most */
    const int64_t *n_chunk;
    int32_t *out, *n_out;
    int64_t ld_out, mask_stride, page_stride, count_stride;
    uint32_t *code, *mask, *count, *histogram;
    uint64_t *page_key;
    serve_bound *bound;
};

/* ---- the rule, as select.c has it ---- */

static __device__ __forceinline__ int64_t chunks_of(const select_args &a, int64_t i) {
    const int64_t n = a.n_chunk[i];
    return n < 0 ? 0 : n < a.most ? n : a.most;
}

struct span {
    int64_t begin, end;
};
static __device__ __forceinline__ span evictable(const lsa_select_rule &r, int64_t n) {
    const int64_t sink = min(r.sink, n), tail = min(r.tail, n - sink);
    return {sink, n - tail};
}

static __device__ float threshold_at(const lsa_select_rule &r, int64_t n) {
    if (r.n_knot == 0) return r.threshold;
    int i = 0;
    while (i < r.n_knot && r.knot_length[i] <= n) i++;
    if (i == 0) return r.knot_threshold[0];
    if (i == r.n_knot) return r.knot_threshold[i - 1];
    const double lo = log2((double)r.knot_length[i - 1]), hi = log2((double)r.knot_length[i]);
    const double u = (log2((double)n) - lo) / (hi - lo), x = (double)r.knot_threshold[i - 1];
    return (float)__dadd_rn(x, __dmul_rn(u, (double)r.knot_threshold[i] - x));
}

static __device__ __forceinline__ float combined(const select_args &a, int64_t i, int64_t c) {
    const lsa_select_rule &r = a.rule;
    float s = 0;
    for (int l = 0; l < r.n_layer; l++) {
        const float z = a.logit[l * a.layer_stride + i * a.ld + c];
        if (r.score == LSA_SCORE_SUM) {
            s += z;
        } else {
            const float p = lsa_sigmoid(__fadd_rn(__fdiv_rn(z, r.temperature[l]), r.offset[l]));
            s = r.score == LSA_SCORE_MEAN ? s + p : p > s || p != p ? p : s;
        }
    }
    const float *const seen = r.observed ? r.observed[i] : NULL;
    if (seen) {
        const float recent = lsa_prior_feature(seen[c]), memory = lsa_prior_feature(seen[r.observed_ld + c]);
        s = __fadd_rn(s, lsa_prior_value(r.prior, recent, memory));
    }
    return r.score == LSA_SCORE_MEAN ? __fdiv_rn(s, (float)r.n_layer) : s;
}

/* For a continuation: combined scores of chunks [first - reach, first + count) of n into tile, by `threads`
 * threads of which this one is the `me`-th. Without one there is no tile. */
static __device__ __forceinline__ void fill_tile(const select_args &a, int64_t i, int64_t first, int count,
                                                 int64_t n, float *tile, int me, int threads) {
    for (int k = me; k < count + a.rule.reach; k += threads) {
        const int64_t c = first - a.rule.reach + k;
        tile[k] = c >= 0 && c < n ? combined(a, i, c) : -INFINITY;
    }
}
/* The score of chunk c, the k-th of the tile's own. */
static __device__ __forceinline__ float score_of(const select_args &a, int64_t i, int64_t c,
                                                 const float *tile, int k) {
    if (a.rule.reach == 0) return combined(a, i, c);
    const float *const at = tile + a.rule.reach + k;
    float best = at[0];
    for (int j = 1; j <= a.rule.reach; j++) {
        const float v = __fsub_rn(at[-j], a.rule.cost[j - 1]);
        best = v > best ? v : best;
    }
    return best;
}

static __device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t u = __float_as_uint(x + 0.0f), sign = 0u - (u >> 31);
    return x == x ? u ^ (sign | 0x80000000u) : 0u;
}
static __device__ __forceinline__ uint64_t chunk_key(uint32_t code, int64_t c) {
    return code ? (uint64_t)code << 32 | (0xFFFFFFFFu - (uint32_t)c) : 0;
}

/* Chunks that may be kept beside the forced ones. */
static __device__ int64_t most_kept(const lsa_select_rule &r, span e) {
    const int64_t can = e.end - e.begin;
    if (r.mode == LSA_SELECT_TOPK) return min(r.k, can);
    if (r.mode == LSA_SELECT_THRESHOLD) return r.cap > 0 ? min(r.cap, can) : can;
    const double x = __dmul_rn(r.budget, (double)can); /* lsa_budget_chunks */
    const int64_t k = (int64_t)x;
    return min(x - (double)k > 1e-9 ? k + 1 : k, can);
}

/* ---- marks and ids ---- */

/* Marks of 32 neighbouring chunks by each warp; the block's number of them. */
static __device__ __forceinline__ void mark(const select_args &a, int64_t i, int64_t n, span e,
                                            const uint32_t (&code)[EACH], uint64_t bound) {
    __shared__ uint32_t total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    uint32_t mine = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int64_t c = (int64_t)blockIdx.x * SERVE_BLOCK + j * THREADS + threadIdx.x;
        const bool forced = c < e.begin || c >= e.end;
        const uint32_t word =
            __ballot_sync(0xffffffffu, c < n && (forced || (bound && chunk_key(code[j], c) >= bound)));
        if ((threadIdx.x & 31) == 0 && c < n) a.mask[i * a.mask_stride + c / 32] = word;
        mine += __popc(word);
    }
    if ((threadIdx.x & 31) == 0) atomicAdd(&total, mine);
    __syncthreads();
    if (threadIdx.x == 0) a.count[i * a.count_stride + blockIdx.x] = total;
}

/* Scores of a block's chunks; with `now`, a threshold without a cap, also their marks. */
static __global__ void __launch_bounds__(THREADS) score_k(const __grid_constant__ select_args a, bool now) {
    serve_wait();
    const int64_t i = blockIdx.y, n = chunks_of(a, i), first = (int64_t)blockIdx.x * SERVE_BLOCK;
    const span e = evictable(a.rule, n);
    if (first >= n && blockIdx.x > 0) return;
    __shared__ float tile[SERVE_BLOCK + LSA_MAX_REACH];
    if (a.rule.reach) {
        fill_tile(a, i, first, SERVE_BLOCK, n, tile, threadIdx.x, THREADS);
        __syncthreads();
    }
    uint32_t code[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int64_t c = first + j * THREADS + threadIdx.x;
        code[j] = c < n ? ordered(score_of(a, i, c, tile, j * THREADS + threadIdx.x)) : 0;
        if (!now && c < n) a.code[i * a.most + c] = code[j];
    }
    if (now) {
        mark(a, i, n, e, code, ((uint64_t)ordered(threshold_at(a.rule, n)) + 1) << 32);
    } else if (blockIdx.x == 0 && threadIdx.x == 0) {
        const int64_t k = most_kept(a.rule, e);
        a.bound[i] = {k > 0 ? 0 : ~(uint64_t)0, k, 64, k <= 0};
    }
}

/* Counts, for keys that agree with the bits found so far, the next 13 bits. */
static __global__ void __launch_bounds__(THREADS) histogram_k(const __grid_constant__ select_args a) {
    __shared__ uint32_t bin[SERVE_BINS];
    serve_wait();
    const int64_t i = blockIdx.y, n = chunks_of(a, i), first = (int64_t)blockIdx.x * SERVE_BLOCK;
    const serve_bound b = a.bound[i];
    const span e = evictable(a.rule, n);
    if (b.done || first >= n) return;
    const int above = b.shift, shift = b.shift == 64 ? 52 : b.shift - SERVE_DIGIT;
    for (int j = threadIdx.x; j < SERVE_BINS; j += THREADS) bin[j] = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int64_t c = first + j * THREADS + threadIdx.x;
        if (c < e.begin || c >= e.end) continue;
        const uint64_t key = chunk_key(a.code[i * a.most + c], c);
        if (key && (above == 64 || key >> above == b.found >> above))
            atomicAdd(&bin[key >> shift & (SERVE_BINS - 1)], 1u);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < SERVE_BINS; j += THREADS)
        if (bin[j]) atomicAdd(&a.histogram[i * SERVE_BINS + j], bin[j]);
}

/* The bin that holds the k-th largest key; the histogram is zero again afterwards. */
static __global__ void __launch_bounds__(1024) bin_k(const __grid_constant__ select_args a) {
    enum { OWN = SERVE_BINS / 1024 };
    __shared__ uint32_t warp_sum[32];
    serve_wait();
    const int64_t i = blockIdx.x;
    const int t = threadIdx.x, lane = t & 31, top = SERVE_BINS - 1 - t * OWN;
    serve_bound *const at = &a.bound[i];
    const serve_bound b = *at;
    if (b.done) return;
    uint32_t v[OWN], sum = 0;
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        uint32_t *const h = &a.histogram[i * SERVE_BINS + top - j];
        v[j] = *h;
        *h = 0;
        sum += v[j];
    }
    uint32_t upto = sum;
    for (int o = 1; o < 32; o *= 2) {
        const uint32_t x = __shfl_up_sync(0xffffffffu, upto, o);
        if (lane >= o) upto += x;
    }
    if (lane == 31) warp_sum[t >> 5] = upto;
    __syncthreads(); /* also: everyone has read *at */
    int64_t before = (int64_t)upto - sum, total = 0;
    for (int w = 0; w < 32; w++) {
        if (w < t >> 5) before += warp_sum[w];
        total += warp_sum[w];
    }
    const int shift = b.shift == 64 ? 52 : b.shift - SERVE_DIGIT;
    if (b.k > total) { /* fewer keys than asked for: all of them (only in the first pass) */
        if (t == 0) *at = {1, 0, shift, 1};
        return;
    }
    for (int j = 0; j < OWN; j++) {
        if (before < b.k && b.k <= before + v[j]) {
            const int64_t k = b.k - before;
            *at = {b.found | (uint64_t)(top - j) << shift, k, shift, k == v[j] || shift == 0};
        }
        before += v[j];
    }
}

static __global__ void __launch_bounds__(THREADS) mark_k(const __grid_constant__ select_args a) {
    serve_wait();
    const int64_t i = blockIdx.y, n = chunks_of(a, i), first = (int64_t)blockIdx.x * SERVE_BLOCK;
    if (first >= n && blockIdx.x > 0) return;
    uint64_t bound = a.bound[i].found;
    if (bound == 0) bound = 1; /* a NaN has key 0 */
    if (a.rule.mode == LSA_SELECT_THRESHOLD)
        bound = max(bound, ((uint64_t)ordered(threshold_at(a.rule, n)) + 1) << 32);
    uint32_t code[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int64_t c = first + j * THREADS + threadIdx.x;
        code[j] = c < n ? a.code[i * a.most + c] : 0;
    }
    mark(a, i, n, evictable(a.rule, n), code, bound);
}

/* Ids of a block's marks, after those of the blocks before. */
static __global__ void __launch_bounds__(THREADS) write_k(const __grid_constant__ select_args a) {
    __shared__ uint32_t part[THREADS / 32], offset[SERVE_BLOCK / 32];
    serve_wait();
    const int64_t i = blockIdx.y, n = chunks_of(a, i), first = (int64_t)blockIdx.x * SERVE_BLOCK;
    if (first >= n && blockIdx.x > 0) return;
    const int t = threadIdx.x, lane = t & 31;
    const uint32_t *const count = a.count + i * a.count_stride, *const mask = a.mask + i * a.mask_stride;
    uint32_t sum = 0;
    for (int b = t; b < (int)blockIdx.x; b += THREADS) sum += count[b];
    for (int o = 16; o >= 1; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (lane == 0) part[t >> 5] = sum;
    if (t < SERVE_BLOCK / 32) {
        const uint32_t word = first + t * 32 < n ? mask[first / 32 + t] : 0;
        uint32_t upto = __popc(word);
        for (int o = 1; o < 32; o *= 2) {
            const uint32_t x = __shfl_up_sync(0xffffffffu, upto, o);
            if (lane >= o) upto += x;
        }
        offset[t] = upto - __popc(word);
    }
    __syncthreads();
    int64_t before = 0;
    for (int w = 0; w < THREADS / 32; w++) before += part[w];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int at = j * THREADS + t;
        if (first + at >= n) continue;
        const uint32_t word = mask[first / 32 + at / 32];
        const int64_t to = before + offset[at / 32] + __popc(word & ((1u << lane) - 1));
        if (word >> lane & 1 && to < a.ld_out) a.out[i * a.ld_out + to] = (int32_t)(first + at);
    }
    if (t == 0 && first + SERVE_BLOCK >= n)
        a.n_out[i] = n > 0 ? (int32_t)min(before + (int64_t)count[blockIdx.x], a.ld_out) : 0;
}

/* ---- pages ---- */

/* A warp a page: how many of its chunks are above the threshold, then the highest score, then the lower page.
 */
static __global__ void __launch_bounds__(THREADS) page_key_k(const __grid_constant__ select_args a) {
    serve_wait();
    const int64_t i = blockIdx.y, n = chunks_of(a, i),
                  page = (int64_t)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    const int lane = threadIdx.x & 31;
    const int64_t c0 = page * LSA_PAGE_CHUNKS, c1 = min(c0 + LSA_PAGE_CHUNKS, n);
    const float t = threshold_at(a.rule, n);
    if (c0 >= n) return;
    __shared__ float tiles[THREADS / 32][LSA_PAGE_CHUNKS + LSA_MAX_REACH];
    float *const tile = tiles[threadIdx.x >> 5];
    if (a.rule.reach) {
        fill_tile(a, i, c0, LSA_PAGE_CHUNKS, n, tile, lane, 32);
        __syncwarp();
    }
    uint32_t above = 0, best = 0;
#pragma unroll
    for (int j = 0; j < LSA_PAGE_CHUNKS / 32; j++) {
        const int64_t c = c0 + j * 32 + lane;
        const float s = c < n ? score_of(a, i, c, tile, j * 32 + lane) : -INFINITY;
        above += __popc(__ballot_sync(0xffffffffu, c < n && s > t));
        best = max(best, c < n ? ordered(s) : 0u);
    }
    best = __reduce_max_sync(0xffffffffu, best);
    const span e = evictable(a.rule, n);
    if (c0 < e.begin || c1 > e.end) above = LSA_PAGE_CHUNKS + 1;
    if (lane == 0)
        a.page_key[i * a.page_stride + page] = (uint64_t)above << (32 + PAGE_BITS) |
                                               (uint64_t)best << PAGE_BITS |
                                               (((uint64_t)1 << PAGE_BITS) - 1 - (uint64_t)page);
}

/* Sum over the lanes up to this one. */
static __device__ __forceinline__ uint32_t warp_upto(uint32_t v) {
    const int lane = threadIdx.x & 31;
    for (int o = 1; o < 32; o *= 2) {
        const uint32_t x = __shfl_up_sync(0xffffffffu, v, o);
        if (lane >= o) v += x;
    }
    return v;
}

/* Sum over 1,024 threads of the values of those before. */
static __device__ uint32_t scan(uint32_t v) {
    __shared__ uint32_t part[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint32_t upto = warp_upto(v);
    __syncthreads();
    if (lane == 31) part[warp] = upto;
    __syncthreads();
    const uint32_t warps = warp_upto(part[lane]); /* every warp for itself */
    const uint32_t before = __shfl_sync(0xffffffffu, warps, warp > 0 ? warp - 1 : 0);
    return (warp > 0 ? before : 0) + upto - v;
}

/* bin[b]++ by some threads of a warp; those with the same bin, as most pages have at first, add once
 * together. */
static __device__ __forceinline__ void count_in(uint32_t *bin, uint32_t b) {
    const unsigned here = __activemask(), same = __match_any_sync(here, b);
    if ((threadIdx.x & 31) == (unsigned)__ffs((int)same) - 1) atomicAdd(&bin[b], (uint32_t)__popc(same));
}

/* Least and greatest over 1,024 threads. */
static __device__ void range_of(uint32_t *lo, uint32_t *hi) {
    __shared__ uint32_t least[32], most[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint32_t a = __reduce_min_sync(0xffffffffu, *lo), b = __reduce_max_sync(0xffffffffu, *hi);
    if (lane == 0) least[warp] = a, most[warp] = b;
    __syncthreads();
    *lo = __reduce_min_sync(0xffffffffu, least[lane]);
    *hi = __reduce_max_sync(0xffffffffu, most[lane]);
}

/* The k best pages of a request, ascending. The first histogram is by how many chunks are above the threshold
 * and, within that, by STEPS equal parts of the range that the highest scores have: the bin of the k-th page
 * then holds few pages, and their ranks are counted. Where it holds many, as with equal scores, histograms of
 * 11 bits of the key go on until it does not. Then one ordered walk. A thread keeps its first keys (all, up
 * to a million tokens) in registers. */
static __global__ void __launch_bounds__(1024) pages_k(const __grid_constant__ select_args a) {
    enum {
        DIGIT = 11,
        BINS = 1 << DIGIT,
        OWN = BINS / 1024,
        KEPT = 4,
        FEW = 128,
        STEPS = BINS / (LSA_PAGE_CHUNKS + 2)
    };
    __shared__ uint32_t bin[BINS];
    __shared__ uint64_t found_at, few[FEW];
    __shared__ int64_t k_at;
    __shared__ uint32_t in_bin, n_few, digit_at;
    const int t = threadIdx.x;
    for (int j = t; j < BINS; j += 1024) bin[j] = 0;
    serve_wait();
    const int64_t i = blockIdx.x, n = chunks_of(a, i), n_page = (n + LSA_PAGE_CHUNKS - 1) / LSA_PAGE_CHUNKS;
    const uint64_t *const key = a.page_key + i * a.page_stride;
    const span e = evictable(a.rule, n);
    int64_t forced = 0;
    if (n > 0) { /* pages that hold a chunk below begin or from end on */
        const int64_t head = (e.begin + LSA_PAGE_CHUNKS - 1) / LSA_PAGE_CHUNKS,
                      tail = e.end / LSA_PAGE_CHUNKS;
        forced = e.end == n ? head : min(n_page, head + n_page - max(tail, head));
    }
    const int64_t k0 = min(max(a.rule.k, forced), n_page);
    if (k0 <= 0) {
        if (t == 0) a.n_out[i] = 0;
        return;
    }
    uint64_t mine[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; j++) mine[j] = t + j * 1024 < n_page ? key[t + j * 1024] : 0;
    const auto each = [&](auto visit) {
#pragma unroll
        for (int j = 0; j < KEPT; j++)
            if (t + j * 1024 < n_page) visit(mine[j]);
        for (int64_t p = t + KEPT * 1024; p < n_page; p += 1024) visit(key[p]);
    };
    /* the bin of the k-th largest: what `set` is told, by one thread */
    const auto find = [&](int64_t k, auto set) {
        uint32_t v[OWN], sum = 0;
#pragma unroll
        for (int j = 0; j < OWN; j++) sum += v[j] = bin[BINS - 1 - t * OWN - j];
        uint32_t before = scan(sum);
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            if (before < k && k <= (int64_t)before + v[j]) {
                set((uint32_t)(BINS - 1 - t * OWN - j));
                k_at = k - before;
                in_bin = v[j];
            }
            before += v[j];
        }
        __syncthreads();
    };
    /* the pages that `in` names, at most FEW: the k_at-th of them */
    const auto rank = [&](auto in) {
        each([&](uint64_t x) {
            if (in(x)) few[atomicAdd(&n_few, 1u)] = x;
        });
        __syncthreads();
        const uint32_t which = (uint32_t)t / 8; /* eight threads a key */
        const uint64_t own = which < n_few ? few[which] : 0;
        int larger = 0;
        for (uint32_t j = t & 7; j < n_few; j += 8) larger += few[j] > own;
        for (int o = 1; o < 8; o *= 2) larger += __shfl_xor_sync(0xffffffffu, larger, o);
        if (which < n_few && larger == k_at - 1) found_at = own;
        __syncthreads();
    };
    const bool whole = k0 == n_page;
    if (t == 0) found_at = 0, in_bin = 0, n_few = 0;
    if (!whole) {
        uint32_t lo = ~0u, hi = 0;
        each([&](uint64_t x) {
            lo = min(lo, (uint32_t)(x >> PAGE_BITS)), hi = max(hi, (uint32_t)(x >> PAGE_BITS));
        });
        range_of(&lo, &hi);
        const uint32_t scale =
            (uint32_t)(((uint64_t)STEPS << 32) / max((uint64_t)hi - lo + 1, (uint64_t)STEPS + 1));
        const auto digit = [&](uint64_t x) {
            return (uint32_t)(x >> (32 + PAGE_BITS)) * STEPS +
                   __umulhi((uint32_t)(x >> PAGE_BITS) - lo, scale);
        };
        each([&](uint64_t x) { atomicAdd(&bin[digit(x)], 1u); });
        __syncthreads();
        find(k0, [&](uint32_t b) { digit_at = b; });
        if (in_bin <= FEW) {
            const uint32_t at = digit_at;
            rank([&](uint64_t x) { return digit(x) == at; });
        } else {
            if (t == 0) k_at = k0;
            int above = 64, shift = 64 - 9;
            for (bool first = true; first || in_bin > FEW; above = shift, shift -= DIGIT, first = false) {
                __syncthreads();
                const uint64_t found = found_at;
                const int64_t k = k_at;
                for (int j = t; j < BINS; j += 1024) bin[j] = 0;
                __syncthreads();
                each([&](uint64_t x) {
                    if (above == 64 || x >> above == found >> above)
                        count_in(bin, (uint32_t)(x >> shift) & (BINS - 1));
                });
                __syncthreads();
                find(k, [&](uint32_t b) { found_at = found | (uint64_t)b << shift; });
            }
            const uint64_t found = found_at; /* above: the bits of it that are known */
            rank([&](uint64_t x) { return x >> above == found >> above; });
        }
    }
    /* ids: KEPT times 1,024 pages at a time; entry j of a warp's counts precedes entry j + 1 of all */
    const uint64_t bound = found_at;
    const int lane = t & 31;
    int64_t written = 0;
    for (int64_t p0 = 0; p0 < n_page; p0 += KEPT * 1024) {
        uint32_t word[KEPT], *const first = bin, *const total = bin + KEPT * 32;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < KEPT; j++) {
            const int64_t p = p0 + j * 1024 + t;
            word[j] = __ballot_sync(0xffffffffu, p < n_page && (p0 ? key[p] : mine[j]) >= bound);
            if (lane == 0) first[j * 32 + (t >> 5)] = __popc(word[j]);
        }
        __syncthreads();
        if (t < KEPT * 32) { /* warp j: entries of the j-th keys */
            const uint32_t n = first[t], upto = warp_upto(n);
            first[t] = upto - n;
            if (lane == 31) total[t >> 5] = upto;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < KEPT; j++) {
            const int64_t to = written + first[j * 32 + (t >> 5)] + __popc(word[j] & ((1u << lane) - 1));
            if (word[j] >> lane & 1 && to < a.ld_out) a.out[i * a.ld_out + to] = (int32_t)(p0 + j * 1024 + t);
            written += total[j];
        }
    }
    if (t == 0) a.n_out[i] = (int32_t)min(written, a.ld_out);
}

/* ---- observed masses ---- */

static __global__ void __launch_bounds__(THREADS) end_window_k(float *state, int64_t ld) {
    serve_wait();
    const int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (c >= ld) return;
    state[ld + c] = fmaf(LSA_PRIOR_DECAY, state[ld + c], state[c]);
    state[c] = 0;
}
static __global__ void __launch_bounds__(THREADS)
    put_masses_k(float *state, int64_t ld, int64_t n, const int32_t *chunk, const float *mass) {
    serve_wait();
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n && chunk[i] >= 0 && chunk[i] < ld) state[chunk[i]] = mass[i];
}

extern "C" lsa_status lsa_gpu_retriever_observe(lsa_gpu_retriever *x, float *state, int64_t ld, int64_t n,
                                                const int32_t *chunk, const float *mass, void *stream,
                                                lsa_err *err) {
    lsa_status st = LSA_OK;
    const cudaStream_t s = (cudaStream_t)stream;
    LSA_CUDA(cudaSetDevice(x->cs->device));
    if (ld > 0)
        LSA_TRY(serve_launch(x, s, "window's end", err, end_window_k,
                             dim3((unsigned)((ld + THREADS - 1) / THREADS)), THREADS, 0, state, ld));
    if (n > 0)
        LSA_TRY(serve_launch(x, s, "masses", err, put_masses_k, dim3((unsigned)((n + THREADS - 1) / THREADS)),
                             THREADS, 0, state, ld, n, chunk, mass));
done:
    return st;
}

static select_args arguments(const lsa_gpu_retriever *x, int32_t m, const lsa_select_rule *rule,
                             const float *logit, int64_t ld, const int64_t *n_chunk, int32_t *out,
                             int64_t ld_out, int32_t *n_out) {
    select_args a = {};
    a.rule = *rule;
    a.logit = logit;
    a.ld = ld;
    a.layer_stride = (int64_t)m * ld;
    a.most = ld < x->max_chunks ? ld : x->max_chunks;
    a.n_chunk = n_chunk;
    a.out = out;
    a.n_out = n_out;
    a.ld_out = ld_out;
    a.mask_stride = (x->max_chunks + 31) / 32;
    a.page_stride = (x->max_chunks + LSA_PAGE_CHUNKS - 1) / LSA_PAGE_CHUNKS;
    a.count_stride = (x->max_chunks + SERVE_BLOCK - 1) / SERVE_BLOCK;
    a.code = x->code, a.mask = x->mask, a.count = x->count, a.histogram = x->histogram;
    a.page_key = x->page_key;
    a.bound = x->bound;
    return a;
}

extern "C" lsa_status lsa_gpu_retriever_select(lsa_gpu_retriever *x, int32_t m, const lsa_select_rule *rule,
                                               const float *logit, int64_t ld, const int64_t *n_chunk,
                                               int32_t *out, int64_t ld_out, int32_t *n_out, void *stream,
                                               lsa_err *err) {
    lsa_status st = lsa_select_check(rule, err);
    if (st != LSA_OK) return st;
    if (m < 0 || m > x->max_batch) LSA_RET_FAIL(LSA_E_ARG, "requests: at most %d, found %d", x->max_batch, m);
    if (m == 0) return LSA_OK;
    LSA_CUDA(cudaSetDevice(x->cs->device));
    const cudaStream_t s = (cudaStream_t)stream;
    select_args a = arguments(x, m, rule, logit, ld, n_chunk, out, ld_out, n_out);
    const dim3 blocks((unsigned)((a.most + SERVE_BLOCK - 1) / SERVE_BLOCK), (unsigned)m);
    const bool now = rule->mode == LSA_SELECT_THRESHOLD && rule->cap == 0;
    if (rule->mode == LSA_SELECT_PAGES) {
        const int64_t at_once = THREADS / 32, pages = (a.most + LSA_PAGE_CHUNKS - 1) / LSA_PAGE_CHUNKS;
        LSA_TRY(serve_launch(x, s, "page keys", err, page_key_k,
                             dim3((unsigned)((pages + at_once - 1) / at_once), (unsigned)m), THREADS, 0, a));
        return serve_launch(x, s, "pages", err, pages_k, dim3((unsigned)m), 1024, 0, a);
    }
    LSA_TRY(serve_launch(x, s, "scores", err, score_k, blocks, THREADS, 0, a, now));
    if (!now) {
        for (int bits = 64; bits > 0; bits -= bits == 64 ? 12 : SERVE_DIGIT) {
            LSA_TRY(serve_launch(x, s, "histogram", err, histogram_k, blocks, THREADS, 0, a));
            LSA_TRY(serve_launch(x, s, "bin", err, bin_k, dim3((unsigned)m), 1024, 0, a));
        }
        LSA_TRY(serve_launch(x, s, "marks", err, mark_k, blocks, THREADS, 0, a));
    }
    return serve_launch(x, s, "ids", err, write_k, blocks, THREADS, 0, a);
done:
    return st;
}
