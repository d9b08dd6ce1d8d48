/* One warp's f16 tensor-core product, sm_80 and later: c [16, 8] += a [16, 16] b [16, 8], f32 sums.
 *
 * With g = lane / 4 and t = lane % 4, a lane holds of a the pairs (row g, depth 2t), (g + 8, 2t), (g, 2t +
 * 8), (g + 8, 2t + 8), of b the pairs (depth 2t, column g), (2t + 8, g), of c (g, 2t), (g, 2t + 1), (g + 8,
 * 2t), (g + 8, 2t + 1). Depth may be permuted, for a and b alike. tests/emulated/emu stands in for it. */
#ifndef LSA_KERNELS_CUDA_MMA_CUH
#define LSA_KERNELS_CUDA_MMA_CUH

#include <stdint.h>

static __device__ __forceinline__ void mma_f16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#endif
