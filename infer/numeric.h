/* Small vector arithmetic of the forward pass: norm, rotation, Hadamard, cache simulations. fp32. */
#ifndef LSA_INFER_NUMERIC_H
#define LSA_INFER_NUMERIC_H

#include <math.h>
#include <stdint.h>

#include "kernels/core/dtype.h"

static inline float lsa_dot(const float *a, const float *b, int64_t n) {
    float s = 0.0f;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

/* y = w * x / rms(x); w NULL means ones. In place allowed. */
static inline void lsa_rms(float *y, const float *x, const float *w, int64_t n, float eps) {
    float r = 1.0f / sqrtf(lsa_dot(x, x, n) / (float)n + eps);
    if (w)
        for (int64_t i = 0; i < n; i++) y[i] = w[i] * (x[i] * r);
    else
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * r;
}

/* cs[2i], cs[2i+1] = cos, sin of fl32(fl32(pos) * freq[i]). */
static inline void lsa_rope_angles(float *cs, const float *freq, int32_t half, int64_t pos) {
    float p = (float)pos;
    for (int32_t i = 0; i < half; i++) {
        float a = p * freq[i];
        cs[2 * i] = cosf(a);
        cs[2 * i + 1] = sinf(a);
    }
}

/* Rotates adjacent pairs of the last 2*half channels of x[n]; sign -1 is the inverse. */
static inline void lsa_rotate(float *x, int64_t n, const float *cs, int32_t half, float sign) {
    float *r = x + n - 2 * half;
    for (int32_t i = 0; i < half; i++) {
        float c = cs[2 * i], s = sign * cs[2 * i + 1], a = r[2 * i], b = r[2 * i + 1];
        r[2 * i] = a * c - b * s;
        r[2 * i + 1] = a * s + b * c;
    }
}

/* Sylvester Hadamard of a power-of-two length, divided by sqrt(n). */
static inline void lsa_hadamard(float *x, int32_t n) {
    for (int32_t h = 1; h < n; h *= 2)
        for (int32_t i = 0; i < n; i += 2 * h)
            for (int32_t j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    float f = 1.0f / sqrtf((float)n);
    for (int32_t i = 0; i < n; i++) x[i] *= f;
}

/* fp8 cache simulation in place: groups of 64, power-of-two scale (architecture notes 2.3). */
static inline void lsa_sim_fp8(float *x, int64_t n) {
    for (int64_t g = 0; g < n; g += 64) {
        int64_t e = g + 64 < n ? g + 64 : n;
        float amax = 1e-4f;
        for (int64_t i = g; i < e; i++) amax = fmaxf(amax, fabsf(x[i]));
        float s = lsa_pow2_ceil(amax * (1.0f / 448.0f));
        for (int64_t i = g; i < e; i++) x[i] = lsa_round_bf16(lsa_e4m3_table[lsa_f32_to_e4m3(x[i] / s)] * s);
    }
}

/* fp4 simulation in place: groups of 32 (2.4). */
static inline void lsa_sim_fp4(float *x, int64_t n) {
    for (int64_t g = 0; g < n; g += 32) {
        int64_t e = g + 32 < n ? g + 32 : n;
        float amax = 6.0f * 0x1p-126f;
        for (int64_t i = g; i < e; i++) amax = fmaxf(amax, fabsf(x[i]));
        float s = lsa_pow2_ceil(amax * (1.0f / 6.0f));
        for (int64_t i = g; i < e; i++) x[i] = lsa_round_bf16(lsa_e2m1_table[lsa_f32_to_e2m1(x[i] / s)] * s);
    }
}

#endif
