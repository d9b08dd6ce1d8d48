/* Synthetic caches and queries of a decode step, the same on hosts and GPUs: every number is a function of
 * what it belongs to, so a host can recompute any of it. Encoded as servers do (architecture notes 13.1,
 * 13.2). Pure functions. */
#ifndef LSA_KERNELS_MODEL_SYNTHETIC_H
#define LSA_KERNELS_MODEL_SYNTHETIC_H

#include <stdint.h>

#include "kernels/core/host_device.h"

typedef enum lsa_synth_kind {
    LSA_SYNTH_ROW = 1, /* layer: CSA ordinal; entry: chunk */
    LSA_SYNTH_HCA,     /* layer: layer id; entry: HCA entry */
    LSA_SYNTH_WINDOW,  /* layer: layer id; entry: request * window + token */
    LSA_SYNTH_KEY,     /* layer: CSA ordinal; entry: page of 64 chunks */
    LSA_SYNTH_Q,       /* layer: request; entry: head; word: channel */
    LSA_SYNTH_INDEX_Q,
    LSA_SYNTH_INDEX_W, /* layer: request; entry: head */
    LSA_SYNTH_SINK,    /* entry: head */
    LSA_SYNTH_HIDDEN   /* layer: request; entry: cycle; word: channel */
} lsa_synth_kind;

LSA_HOST_DEVICE static inline uint32_t lsa_synth_word(lsa_synth_kind kind, uint32_t layer, uint32_t entry,
                                                      uint32_t word) {
    uint32_t h = (uint32_t)kind * 0x9E3779B1u + layer;
    h = (h ^ h >> 16) * 0x85EBCA6Bu + entry;
    h = (h ^ h >> 15) * 0xC2B2AE35u + word;
    h = (h ^ h >> 16) * 0x7FEB352Du;
    h = (h ^ h >> 15) * 0x846CA68Bu;
    return h ^ h >> 16;
}

/* In [-1, 1). */
LSA_HOST_DEVICE static inline float lsa_synth_real(lsa_synth_kind kind, uint32_t layer, uint32_t entry,
                                                   uint32_t word) {
    return (float)((int32_t)lsa_synth_word(kind, layer, entry, word) >> 8) * (1.0f / 8388608.0f);
}

/* Four E4M3 codes, none a NaN. */
LSA_HOST_DEVICE static inline uint32_t lsa_synth_codes(uint32_t h) {
    const uint32_t nan = h & 0x7f7f7f7fu; /* a byte of 0x7f becomes 0x7e */
    return h ^ ((nan + 0x01010101u) >> 7 & 0x01010101u);
}

/* Word `word` (4 bytes) of an encoded row: D - rope codes, rope bf16, E8M0 scales of 64 codes. */
LSA_HOST_DEVICE static inline uint32_t lsa_synth_row(lsa_synth_kind kind, uint32_t layer, uint32_t entry,
                                                     int32_t word, int32_t D, int32_t rope) {
    const uint32_t h = lsa_synth_word(kind, layer, entry, (uint32_t)word);
    if (word < (D - rope) / 4) return lsa_synth_codes(h);
    if (word < (D - rope) / 4 + rope / 2) return (h & 0x807f807fu) | 0x3f003f00u;
    return 0x75757575u + (h & 0x01010101u); /* 2^-10 or 2^-9 */
}

/* Word of a page of 64 index keys: 64 x 128 codes, then 64 f32 scales. */
LSA_HOST_DEVICE static inline uint32_t lsa_synth_key(uint32_t ord, uint32_t page, int32_t word) {
    const uint32_t h = lsa_synth_word(LSA_SYNTH_KEY, ord, page, (uint32_t)word);
    return word < 2048 ? lsa_synth_codes(h) : 0x3b000000u | (h & 0x7fffffu); /* 2^-9 to 2^-8 */
}

/* Code of an index query; its head's weight. */
LSA_HOST_DEVICE static inline uint8_t lsa_synth_index_q(uint32_t request, uint32_t head, uint32_t channel) {
    return (uint8_t)lsa_synth_codes(lsa_synth_word(LSA_SYNTH_INDEX_Q, request, head, channel));
}

#endif
