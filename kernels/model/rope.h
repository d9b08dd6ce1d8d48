/* Rotary frequencies with the static YaRN blend of DeepSeek-V4 (architecture notes 2.7). Used by the teacher
 * and by the memory indexer; the blend is applied at every position and has no magnitude correction. */
#ifndef LSA_KERNELS_MODEL_ROPE_H
#define LSA_KERNELS_MODEL_ROPE_H

#include <stdint.h>

typedef struct lsa_rope {
    int32_t dim;          /* rotary channels, even */
    double base;          /* 160000 on compressed layers */
    double factor;        /* YaRN factor; 1 = plain RoPE */
    int64_t original_len; /* YaRN original context length */
    double beta_fast, beta_slow;
} lsa_rope;

/* freq[dim/2], fp32. Angles are formed as fl32(fl32(position) * freq[i]) before sin/cos. */
void lsa_rope_freqs(float *freq, const lsa_rope *r);

#endif
