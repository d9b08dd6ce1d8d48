/* Small floating formats: bf16, f16, E4M3 (fn), E8M0, E2M1. Conversions to the small formats round to
 * nearest, ties to even. Source: OCP MX formats; rules and test values in the DeepSeek-V4 architecture
 * notes, 2.1 to 2.4. All functions are pure and thread-safe. */
#ifndef LSA_KERNELS_CORE_DTYPE_H
#define LSA_KERNELS_CORE_DTYPE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/core/lsa_status.h"

typedef enum lsa_dtype {
    LSA_F32 = 0,
    LSA_F16,
    LSA_BF16,
    LSA_F8_E4M3,
    LSA_F8_E8M0,
    LSA_U8,
    LSA_I8,
    LSA_I32,
    LSA_I64,
    LSA_F64,
    LSA_C64, /* complex64: two fp32 */
    LSA_F4   /* two E2M1 codes per byte, low nibble first */
} lsa_dtype;

static inline uint32_t lsa_f32_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
static inline float lsa_bits_f32(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline float lsa_bf16_to_f32(uint16_t b) {
    return lsa_bits_f32((uint32_t)b << 16);
}
static inline uint16_t lsa_f32_to_bf16(float f) {
    uint32_t u = lsa_f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u); /* quiet NaN */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static inline float lsa_round_bf16(float f) {
    return lsa_bf16_to_f32(lsa_f32_to_bf16(f));
}

float lsa_f16_to_f32(uint16_t h);
uint16_t lsa_f32_to_f16(float f); /* overflow gives infinity */

extern const float lsa_e4m3_table[256]; /* code -> value; 0x7f and 0xff are NaN */
static inline float lsa_e4m3_to_f32(uint8_t c) {
    return lsa_e4m3_table[c];
}
uint8_t lsa_f32_to_e4m3(float f); /* clamps to +-448 first; NaN gives 0x7f */

static inline float lsa_e8m0_to_f32(uint8_t b) {
    if (b == 255) return lsa_bits_f32(0x7fc00000u);
    return b == 0 ? lsa_bits_f32(0x00400000u) : lsa_bits_f32((uint32_t)b << 23);
}

extern const float lsa_e2m1_table[16];
uint8_t lsa_f32_to_e2m1(float f); /* clamps to +-6 first */

/* 2^ceil(log2 x) of a positive normal float, read from its bits. */
static inline float lsa_pow2_ceil(float x) {
    uint32_t u = lsa_f32_bits(x), e = u >> 23;
    if (u & 0x7fffffu) e++;
    return lsa_bits_f32(e << 23);
}

/* Bytes per element; 0 for LSA_F4 (half a byte: size it by rows). */
size_t lsa_dtype_bytes(lsa_dtype t);
const char *lsa_dtype_name(lsa_dtype t); /* safetensors spelling: F32, BF16, F8_E4M3 ... */

/* Index key codec `e4m3_f32`: 128 codes, then the fp32 scale, little-endian. scale = max(1e-4, amax)/448 as a
 * plain float (FlashMemory notes 3.4); `row` is the key after RoPE and Hadamard. */
void lsa_key_encode(uint8_t out[132], const float row[128]);
void lsa_key_decode(float row[128], const uint8_t in[132]);

#endif
