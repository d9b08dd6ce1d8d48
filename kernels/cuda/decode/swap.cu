/* Pages from pinned host memory into a reserve: all that a cycle moves, for all requests and layers, by one
 * launch of few blocks, so that the step beside it keeps its multiprocessors. A page's layers lie together on
 * both sides. */
#include "kernels/cuda/decode/step.h"

enum { THREADS = 512, BLOCKS = 16, AHEAD = 8 };

static __global__ void __launch_bounds__(THREADS) swap_k(const __grid_constant__ swap_args a) {
    for (int j = 0; j < 2; j++) {
        const swap_part p = a.part[j];
        const int64_t pieces = p.bytes / 16;
        for (int64_t m = blockIdx.x; m < a.n; m += gridDim.x) {
            const int2 move = a.move[m];
            const uint4 *const from = (const uint4 *)(p.from + move.x * p.from_bytes);
            uint4 *const to = (uint4 *)(p.to + move.y * p.to_bytes);
            for (int64_t k = threadIdx.x; k < pieces; k += THREADS * AHEAD) {
                uint4 v[AHEAD];
#pragma unroll
                for (int d = 0; d < AHEAD; d++)
                    if (k + d * THREADS < pieces) v[d] = from[k + d * THREADS];
#pragma unroll
                for (int d = 0; d < AHEAD; d++)
                    if (k + d * THREADS < pieces) to[k + d * THREADS] = v[d];
            }
        }
    }
}

lsa_status decode_swap(const swap_args *a, cudaStream_t s, lsa_err *err) {
    if (a->n == 0) return LSA_OK;
    swap_k<<<BLOCKS, THREADS, 0, s>>>(*a);
    LSA_LAUNCHED("swap");
}
