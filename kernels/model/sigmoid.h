/* The sigmoid of scores, made of correctly rounded operations only (fused multiply-add, addition, division),
 * so that every compiler, vector width and GPU gives the same bits: a selection is then the same set on every
 * device. The mistake that would stay silent: a library expf, which moves a chunk across a threshold.
 *
 * Error at most 2 float steps; exp(-|x|) is taken as exp(-87) beyond 87. NaN stays NaN. Pure. */
#ifndef LSA_KERNELS_MODEL_SIGMOID_H
#define LSA_KERNELS_MODEL_SIGMOID_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/core/host_device.h"

LSA_HOST_DEVICE static inline float lsa_sigmoid(float x) {
    const float round = 12582912.0f; /* 1.5 x 2^23: adding it leaves the nearest integer in the low bits */
    float a = fabsf(x);
    a = a > 87.0f ? 87.0f : a;
    /* exp(-a) = 2^n exp(r), |r| <= ln(2)/2 */
    const float t = fmaf(a, -1.44269504f, round), n = t - round;
    float r = fmaf(n, -0.693359375f, -a); /* ln 2 in two parts, the first exact in 10 bits */
    r = fmaf(n, 2.12194440e-4f, r);
    float y = 1.0f / 5040.0f; /* Taylor: the first term left out is r^8/40320 < 6e-9 */
    y = fmaf(y, r, 1.0f / 720.0f);
    y = fmaf(y, r, 1.0f / 120.0f);
    y = fmaf(y, r, 1.0f / 24.0f);
    y = fmaf(y, r, 1.0f / 6.0f);
    y = fmaf(y, r, 0.5f);
    y = fmaf(y, r, 1.0f);
    y = fmaf(y, r, 1.0f);
    uint32_t bits;
    float power;
    memcpy(&bits, &t, 4);
    bits = (bits - 0x4b400000u + 127u) << 23; /* 2^n; no trap for NaN */
    memcpy(&power, &bits, 4);
    const float e = y * power; /* exact: a power of two, above the subnormals */
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

#endif
