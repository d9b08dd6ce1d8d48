/* What both tiers do between a layer's input and its rows (architecture notes 2.3, 2.4, 6). */
#ifndef LSA_KERNELS_CUDA_TEACHER_PROJECT_CUH
#define LSA_KERNELS_CUDA_TEACHER_PROJECT_CUH

#include <stdint.h>

/* Scale of a simulated group. */
static __device__ __forceinline__ float pow2_ceil(float x) {
    const uint32_t u = __float_as_uint(x), e = (u >> 23) + ((u & 0x7fffffu) != 0);
    return __uint_as_float(e << 23);
}
/* x to the nearest of 2^-mantissa steps of its binade, ties to even, at most `top`; steps end at 2^lowest. */
static __device__ __forceinline__ float to_small(float x, int mantissa, int lowest, float top) {
    const float v = fminf(fabsf(x), top);
    const int e = max((int)(__float_as_uint(v) >> 23) - 127, lowest);
    const float step = __uint_as_float((uint32_t)(e - mantissa + 127) << 23);
    return copysignf(fminf(rintf(v / step) * step, top), x);
}

/* A token's row for a compressor, by the block: n values, then their gates with the position's bias. */
static __device__ __forceinline__ void compressor_row(float *to, const float *value, const float *gate,
                                                      const float *ape, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        to[i] = value[i];
        to[n + i] = gate[i] + ape[i];
    }
}

/* Channel ch of an entry: values of rows [first, last) pooled by the softmax of their gates. With two roles,
 * rows from `own` on serve with their second half. */
static __device__ __forceinline__ float pooled_channel(const float *proj, int64_t first, int64_t own,
                                                       int64_t last, int c, int roles, int ch) {
    const int kc = roles * c;
    float most = -INFINITY, sum = 0, pooled = 0;
#pragma unroll 4
    for (int64_t r = first; r < last; r++)
        most = fmaxf(most, proj[r * 2 * kc + kc + (roles == 2 && r >= own ? c : 0) + ch]);
#pragma unroll 4
    for (int64_t r = first; r < last; r++) {
        const float *const x = proj + r * 2 * kc + (roles == 2 && r >= own ? c : 0) + ch;
        const float e = expf(x[kc] - most);
        sum += e;
        pooled += e * x[0];
    }
    return pooled / sum;
}

#endif
