/* Conversions that are too long for the header. The E4M3 table is built by hand-checkable arithmetic at
 * compile time of this file's initialiser macros; a unit test compares all 256 codes with the formula. */
#include "kernels/core/dtype.h"

/* One binade of E4M3: eight mantissas of exponent scale s (s = value of the unit). */
#define B8(s) (s) * 1.0f, (s)*1.125f, (s)*1.25f, (s)*1.375f, (s)*1.5f, (s)*1.625f, (s)*1.75f, (s)*1.875f
#define HALF(g)                                                                                              \
    (g) * 0.0f, (g)*0x1p-9f, (g)*0x2p-9f, (g)*0x3p-9f, (g)*0x4p-9f, (g)*0x5p-9f, (g)*0x6p-9f, (g)*0x7p-9f,   \
        B8((g)*0x1p-6f), B8((g)*0x1p-5f), B8((g)*0x1p-4f), B8((g)*0x1p-3f), B8((g)*0x1p-2f),                 \
        B8((g)*0x1p-1f), B8((g)*1.0f), B8((g)*2.0f), B8((g)*4.0f), B8((g)*8.0f), B8((g)*16.0f),              \
        B8((g)*32.0f), B8((g)*64.0f), B8((g)*128.0f), (g)*256.0f, (g)*288.0f, (g)*320.0f, (g)*352.0f,        \
        (g)*384.0f, (g)*416.0f, (g)*448.0f, NAN
const float lsa_e4m3_table[256] = {HALF(1.0f), HALF(-1.0f)};

const float lsa_e2m1_table[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                  -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

float lsa_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, m = h & 0x3ffu;
    if (e == 31) return lsa_bits_f32(sign | 0x7f800000u | (m << 13));
    if (e) return lsa_bits_f32(sign | ((e + 112u) << 23) | (m << 13));
    float v = (float)m * 0x1p-24f;
    return sign ? -v : v;
}

uint16_t lsa_f32_to_f16(float f) {
    uint32_t u = lsa_f32_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (a < 0x38800000u) {                                   /* below 2^-14: subnormal, unit 2^-24 */
        float r = rintf(lsa_bits_f32(a) * 0x1p24f);
        return (uint16_t)(sign | (uint32_t)r);
    }
    uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
    return (uint16_t)(sign | ((r - 0x38000000u) >> 13));
}

uint8_t lsa_f32_to_e4m3(float f) {
    uint32_t u = lsa_f32_bits(f), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return 0x7f;
    if (a >= 0x43e00000u) return (uint8_t)(sign | 0x7eu); /* 448 and above */
    if (a < 0x3c800000u) {                                /* below 2^-6: subnormal, unit 2^-9 */
        float r = rintf(lsa_bits_f32(a) * 512.0f);
        return (uint8_t)(sign | (uint32_t)r); /* r = 8 is the first normal code: same bits */
    }
    uint32_t r = a + 0x7ffffu + ((a >> 20) & 1u);
    uint32_t c = (r - 0x3c000000u) >> 20;
    return (uint8_t)(sign | (c > 0x7eu ? 0x7eu : c));
}

uint8_t lsa_f32_to_e2m1(float f) {
    uint8_t sign = signbit(f) ? 8 : 0;
    float a = fabsf(f);
    uint8_t c;
    if (a <= 0.25f)
        c = 0;
    else if (a < 0.75f)
        c = 1;
    else if (a <= 1.25f)
        c = 2;
    else if (a < 1.75f)
        c = 3;
    else if (a <= 2.5f)
        c = 4;
    else if (a < 3.5f)
        c = 5;
    else if (a <= 5.0f)
        c = 6;
    else
        c = 7;
    return (uint8_t)(sign | c);
}

size_t lsa_dtype_bytes(lsa_dtype t) {
    switch (t) {
    case LSA_F64:
    case LSA_I64:
    case LSA_C64:
        return 8;
    case LSA_F32:
    case LSA_I32:
        return 4;
    case LSA_F16:
    case LSA_BF16:
        return 2;
    case LSA_F8_E4M3:
    case LSA_F8_E8M0:
    case LSA_U8:
    case LSA_I8:
        return 1;
    case LSA_F4:
        return 0;
    }
    return 0;
}

const char *lsa_dtype_name(lsa_dtype t) {
    static const char *const n[] = {"F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "U8",
                                    "I8",  "I32", "I64",  "F64",     "C64",     "F4"};
    return (unsigned)t < sizeof n / sizeof *n ? n[t] : "?";
}

void lsa_key_encode(uint8_t out[132], const float row[128]) {
    float amax = 1e-4f;
    for (int i = 0; i < 128; i++) amax = fmaxf(amax, fabsf(row[i]));
    float scale = amax / 448.0f;
    for (int i = 0; i < 128; i++) out[i] = lsa_f32_to_e4m3(row[i] / scale);
    memcpy(out + 128, &scale, 4);
}

void lsa_key_decode(float row[128], const uint8_t in[132]) {
    float scale;
    memcpy(&scale, in + 128, 4);
    for (int i = 0; i < 128; i++) row[i] = lsa_e4m3_table[in[i]] * scale;
}
