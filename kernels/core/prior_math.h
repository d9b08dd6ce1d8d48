/* The arithmetic of the observed-mass prior (kernels/prior.h), which hosts and GPUs share: made of correctly
 * rounded operations only, as kernels/model/sigmoid.h, so that every compiler and GPU gives the same bits.
 * Error of the logarithm at most 2 float steps. NaN stays NaN. Pure. */
#ifndef LSA_KERNELS_CORE_PRIOR_MATH_H
#define LSA_KERNELS_CORE_PRIOR_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/core/host_device.h"
#include "kernels/core/lsa_ids.h"

/* ln(1 + mass / LSA_PRIOR_UNIT); 0 for what is no mass. */
LSA_HOST_DEVICE static inline float lsa_prior_feature(float mass) {
    const float y = fmaf(mass, 1.0f / LSA_PRIOR_UNIT, 1.0f); /* at least 1 */
    uint32_t bits;
    float t;
    memcpy(&bits, &y, 4);
    /* y = 2^e t, t in [sqrt(1/2), sqrt(2)) */
    const uint32_t up = bits - 0x3f3504f3u;
    const float e = (float)((int32_t)up >> 23);
    bits = (up & 0x007fffffu) + 0x3f3504f3u;
    memcpy(&t, &bits, 4);
    /* ln t = 2 atanh(s), s = (t - 1) / (t + 1), |s| < 0.172: the first term left out is 2 s^11 / 11 < 1e-9 */
    const float s = (t - 1.0f) / (t + 1.0f), s2 = s * s;
    float p = fmaf(s2, 2.0f / 9.0f, 2.0f / 7.0f);
    p = fmaf(s2, p, 2.0f / 5.0f);
    p = fmaf(s2, p, 2.0f / 3.0f);
    p = fmaf(s2, p, 2.0f);
    const float low = fmaf(s, p, e * -2.12194440e-4f); /* ln 2 in two parts, the first exact in 10 bits */
    const float f = fmaf(e, 0.693359375f, low);
    return y >= 1.0f && y <= 3e38f ? f : y - y; /* no logarithm of what is no mass: 0 or NaN */
}

/* What is added to a score, from the features. */
LSA_HOST_DEVICE static inline float lsa_prior_value(const float w[LSA_PRIOR_WEIGHTS], float recent,
                                                    float memory) {
    return fmaf(w[0], recent, w[1] * memory);
}

#endif
