/* Codes of stored weights as numbers (architecture notes 2): FP8 E4M3, FP4 E2M1, scales E8M0. Exact. */
#ifndef LSA_KERNELS_CUDA_TEACHER_STORED_CUH
#define LSA_KERNELS_CUDA_TEACHER_STORED_CUH

#include <math.h>
#include <stdint.h>

static __device__ __forceinline__ float of_e4m3(uint32_t c) {
    const uint32_t e = c >> 3 & 15u, m = c & 7u;
    const float v = (c & 0x7fu) == 0x7fu ? NAN
                    : e                  ? __uint_as_float((e + 120u) << 23 | m << 20)
                                         : (float)m * 0x1p-9f;
    return c & 0x80u ? -v : v;
}
static __device__ __forceinline__ float of_e2m1(uint32_t c) {
    const uint32_t e = c >> 1 & 3u, m = c & 1u;
    const float v = e ? __uint_as_float((e + 126u) << 23 | m << 22) : 0.5f * (float)m;
    return c & 8u ? -v : v;
}
static __device__ __forceinline__ float of_e8m0(uint32_t b) {
    return b == 255 ? NAN : __uint_as_float(b ? b << 23 : 0x00400000u);
}

#endif
