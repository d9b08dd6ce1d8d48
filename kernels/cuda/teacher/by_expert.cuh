/* Entries (token k + choice) of one expert by a block. */
#ifndef LSA_KERNELS_CUDA_TEACHER_BY_EXPERT_CUH
#define LSA_KERNELS_CUDA_TEACHER_BY_EXPERT_CUH

#include <stdint.h>

/* Those of expert e among n, in the order of the tokens, into list from `at` on; place: where each went.
 * Where they end. THREADS: the including file's block size. */
static __device__ int32_t place_entries(const int32_t *expert, int64_t n, int e, int32_t at, int32_t *list,
                                        int32_t *place) {
    __shared__ int32_t before[THREADS / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int64_t i0 = 0; i0 < n; i0 += THREADS) {
        const int64_t i = i0 + threadIdx.x;
        const bool mine = i < n && expert[i] == e;
        const unsigned word = __ballot_sync(0xffffffffu, mine);
        __syncthreads();
        if (lane == 0) before[warp] = __popc(word);
        __syncthreads();
        int32_t to = at, all = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) to += before[w];
            all += before[w];
        }
        to += __popc(word & ((1u << lane) - 1));
        if (mine) {
            list[to] = (int32_t)i;
            place[i] = to;
        }
        at += all;
    }
    return at;
}

#endif
