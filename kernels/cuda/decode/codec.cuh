/* The server's codecs of compressed rows and index keys (architecture notes 13.1, 13.2; E4M3 2.1,
 * scales 2.3). NUMERIC: a row that the fp8 simulation has been through comes back as it was. */
#ifndef LSA_KERNELS_CUDA_DECODE_CODEC_CUH
#define LSA_KERNELS_CUDA_DECODE_CODEC_CUH

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <stdint.h>

enum { CODE_GROUP = 64 }; /* codes that share a scale */

static __device__ __forceinline__ float code_value(uint8_t code) {
    const __half_raw h = __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3);
    return __half2float(__half(h));
}
static __device__ __forceinline__ uint8_t value_code(float v) {
    return (uint8_t)__nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
}

static inline int32_t encoded_row_bytes(int32_t D, int32_t rope) {
    const int32_t scales = (D - rope + CODE_GROUP - 1) / CODE_GROUP;
    return D - rope + 2 * rope + (scales + 7) / 8 * 8;
}

/* Channel c of an encoded row. */
static __device__ __forceinline__ float row_value(const uint8_t *row, int c, int D, int rope) {
    const int plain = D - rope;
    if (c >= plain) {
        const uint8_t *const h = row + plain + 2 * (c - plain);
        return __uint_as_float((uint32_t)h[0] << 16 | (uint32_t)h[1] << 24);
    }
    const uint8_t scale = row[plain + 2 * rope + c / CODE_GROUP];
    return code_value(row[c]) * __uint_as_float((uint32_t)scale << 23);
}

/* A row by warp `warp` of `warps`; to: shared memory. */
static __device__ void encode_row(uint8_t *to, const float *v, int D, int rope, int warp, int warps) {
    const int plain = D - rope, lane = threadIdx.x & 31, groups = (plain + CODE_GROUP - 1) / CODE_GROUP;
    for (int g = warp; g < groups; g += warps) {
        const int end = min((g + 1) * CODE_GROUP, plain);
        float most = 1e-4f;
        for (int i = g * CODE_GROUP + lane; i < end; i += 32) most = fmaxf(most, fabsf(v[i]));
        for (int o = 16; o >= 1; o /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
        const uint32_t u = __float_as_uint(most * (1.0f / 448.0f)), e = (u >> 23) + ((u & 0x7fffffu) != 0);
        const float scale = __uint_as_float(e << 23);
        for (int i = g * CODE_GROUP + lane; i < end; i += 32) to[i] = value_code(v[i] / scale);
        if (lane == 0) to[plain + 2 * rope + g] = (uint8_t)e;
    }
    const int tid = warp * 32 + lane, all = warps * 32;
    for (int i = groups + tid; i < (groups + 7) / 8 * 8; i += all) to[plain + 2 * rope + i] = 0;
    for (int i = tid; i < rope; i += all) {
        const uint32_t u = __float_as_uint(v[plain + i]), h = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
        to[plain + 2 * i] = (uint8_t)h;
        to[plain + 2 * i + 1] = (uint8_t)(h >> 8);
    }
}

/* A key by one warp; to: shared memory. */
static __device__ void encode_key(uint8_t *to, const float *v, int n) {
    const int lane = threadIdx.x & 31;
    float most = 1e-4f;
    for (int i = lane; i < n; i += 32) most = fmaxf(most, fabsf(v[i]));
    for (int o = 16; o >= 1; o /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    const float scale = most / 448.0f;
    for (int i = lane; i < n; i += 32) to[i] = value_code(v[i] / scale);
    if (lane < 4) to[n + lane] = (uint8_t)(__float_as_uint(scale) >> (8 * lane));
}
static __device__ __forceinline__ float key_scale(const uint8_t *key, int n) {
    return __uint_as_float((uint32_t)key[n] | (uint32_t)key[n + 1] << 8 | (uint32_t)key[n + 2] << 16 |
                           (uint32_t)key[n + 3] << 24);
}

#endif
