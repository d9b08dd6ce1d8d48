/* Sums over a block of THREADS threads and the choice of the k smallest words of a set: integer counts only,
 * so the order of threads does not matter. */
#ifndef LSA_KERNELS_CUDA_CHOOSE_CUH
#define LSA_KERNELS_CUDA_CHOOSE_CUH

#include <stdint.h>

enum { BINS = 2048 }; /* THREADS: the including file's block size, which divides BINS */

/* Inclusive sum over the block; *total is the sum of all. */
static __device__ uint32_t scan(uint32_t v, uint32_t *total) {
    __shared__ uint32_t warp_sum[THREADS / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int x = 1; x < 32; x *= 2) {
        const uint32_t o = __shfl_up_sync(0xffffffffu, v, x);
        if (lane >= x) v += o;
    }
    __syncthreads();
    if (lane == 31) warp_sum[warp] = v;
    __syncthreads();
    uint32_t before = 0, all = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w < warp) before += warp_sum[w];
        all += warp_sum[w];
    }
    *total = all;
    return before + v;
}

static __device__ double block_total(double v) { /* fixed order; every thread gets it */
    __shared__ double s[THREADS];
    __syncthreads();
    s[threadIdx.x] = v;
    __syncthreads();
    for (int k = THREADS / 2; k > 0; k >>= 1) {
        if ((int)threadIdx.x < k) s[threadIdx.x] += s[threadIdx.x + k];
        __syncthreads();
    }
    return s[0];
}

struct cut { /* words below `word` are in, and the first `ties` of those equal to it */
    uint32_t word, ties;
    bool all_ties;
};

struct crossing { /* bin that holds the k-th member: how many of it are wanted, how many it has */
    uint32_t bin, left, count;
};

/* Where a histogram of BINS counts, complete and visible to the block, reaches k, 0 < k <= its sum. */
static __device__ crossing bin_of_kth(uint32_t k, const uint32_t *hist) {
    __shared__ crossing c;
    uint32_t mine[BINS / THREADS], sum = 0, all;
    for (int b = 0; b < BINS / THREADS; b++) sum += mine[b] = hist[threadIdx.x * (BINS / THREADS) + b];
    uint32_t before = scan(sum, &all) - sum;
    if (before < k && before + sum >= k)
        for (int b = 0; b < BINS / THREADS; b++) {
            if (before + mine[b] >= k) {
                c = {(uint32_t)(threadIdx.x * (BINS / THREADS) + b), k - before, mine[b]};
                break;
            }
            before += mine[b];
        }
    __syncthreads();
    return c;
}

/* The k smallest words of a set, 0 < k < its size. each(f): calls f(word) for every member of this thread's
 * share. */
template <typename EACH> static __device__ cut choose(uint32_t k, uint32_t *hist, EACH each) {
    crossing c = {};
    uint32_t prefix = 0;
    const int shift[3] = {21, 10, 0}, bits[3] = {11, 11, 10};
    for (int pass = 0; pass < 3; pass++) {
        __syncthreads();
        for (int b = threadIdx.x; b < BINS; b += THREADS) hist[b] = 0;
        __syncthreads();
        const int sh = shift[pass], up = shift[pass] + bits[pass];
        each([&](uint32_t w) {
            if (pass == 0 || w >> up == prefix) atomicAdd(&hist[w >> sh & ((1u << bits[pass]) - 1)], 1u);
        });
        __syncthreads();
        c = bin_of_kth(k, hist);
        prefix = prefix << bits[pass] | c.bin;
        k = c.left;
    }
    __syncthreads();
    return {prefix, c.left, c.left == c.count};
}

#endif
