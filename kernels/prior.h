/* Observed-mass prior: what level 2 gave a chunk in the window just decoded, and before it, is added to the
 * chunk's score with learned weights. What is in use now is often needed again, which a key cannot say.
 *
 * m(c): attention mass on chunk c, mean over all CSA layers, heads and tokens of the window just decoded.
 * M(c): a decayed memory of the windows before that one: when a window ends M becomes DECAY * M + m, then m
 * becomes the ended window's. Features f(x) = ln(1 + x / UNIT) of both (constants: lsa_ids.h); z'(c) = z(c) +
 * w_1 f(m) + w_2 f(M) with z the sum of the joint layers' logits, before any continuation (continuation.h),
 * so that observed use goes on into the chunks that follow. A chunk without mass adds exactly nothing.
 *
 * Made of correctly rounded operations only, as kernels/model/sigmoid.h: every compiler and GPU gives the
 * same bits. Error of the logarithm at most 2 float steps. NaN stays NaN. Pure, thread-safe. */
#ifndef LSA_KERNELS_PRIOR_H
#define LSA_KERNELS_PRIOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/core/host_device.h"
#include "kernels/core/lsa_ids.h"

/* Windows that a memory made from records (trainer) adds up: an older one weighs less than DECAY^64 = 0.0012
 * and is left out; a memory kept by the rule above (decoder, servers) forgets it by itself. */
enum { LSA_PRIOR_WINDOWS = 64 };

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

/* A window ends: recent[n] (masses) goes into memory[n] and becomes 0. */
void lsa_prior_end_window(float *recent, float *memory, int64_t n);

/* p[n]: what is added to the scores, from masses. p may be one of them. */
void lsa_prior_values(float *p, const float *recent, const float *memory, const float w[LSA_PRIOR_WEIGHTS],
                      int64_t n);

#endif
