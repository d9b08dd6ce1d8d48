/* One warp's f16 tensor-core product, sm_80 and later: c [16, 8] += a [16, 16] b [16, 8], f32 sums; and what
 * brings its factors: matrices from shared memory, copies to shared memory in the background.
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

/* Four 8 x 8 matrices of 16-bit numbers: lane 8 i + r names row r of matrix i, 16 bytes in shared memory;
 * r[i] gets numbers 2t and 2t + 1 of row g of matrix i; transposed: number g of rows 2t and 2t + 1. */
static __device__ __forceinline__ void load_matrices(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)));
}
static __device__ __forceinline__ void load_transposed(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)));
}

/* 16 bytes to shared memory, zeros unless `there` (from is then not read, but has to be an address); a batch
 * ends with copy_end and has arrived after copy_wait and a barrier. */
static __device__ __forceinline__ void copy_16(void *to, const void *from, bool there) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
        "l"(from), "r"(there ? 16 : 0)
        : "memory");
}
static __device__ __forceinline__ void copy_end(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
static __device__ __forceinline__ void copy_wait(void) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

#endif
