/* Philox 4x32-10 (Salmon et al., SC 2011): a counter-based generator, so that any element of any stream can
 * be drawn without state and gives the same number on CPU and GPU. Pure functions, thread-safe. */
#ifndef LSA_KERNELS_CORE_RNG_H
#define LSA_KERNELS_CORE_RNG_H

#include <stdint.h>

#ifdef __CUDACC__
#define LSA_HD __host__ __device__
#else
#define LSA_HD
#endif

typedef struct lsa_u32x4 {
    uint32_t v[4];
} lsa_u32x4;

/* One block of four random words for a 128-bit counter (c0, c1 as two 64-bit halves) under a 64-bit key. */
static inline LSA_HD lsa_u32x4 lsa_philox(uint64_t key, uint64_t c0, uint64_t c1) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t x0 = (uint32_t)c0, x1 = (uint32_t)(c0 >> 32), x2 = (uint32_t)c1, x3 = (uint32_t)(c1 >> 32);
    for (int r = 0; r < 10; r++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * x0, p1 = (uint64_t)0xCD9E8D57u * x2;
        uint32_t y0 = (uint32_t)(p1 >> 32) ^ x1 ^ k0, y2 = (uint32_t)(p0 >> 32) ^ x3 ^ k1;
        x1 = (uint32_t)p1;
        x3 = (uint32_t)p0;
        x0 = y0;
        x2 = y2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    lsa_u32x4 o;
    o.v[0] = x0;
    o.v[1] = x1;
    o.v[2] = x2;
    o.v[3] = x3;
    return o;
}

/* A stream of words: element i of stream (key, hi). */
typedef struct lsa_rng {
    uint64_t key, hi, lo;
    lsa_u32x4 block;
    int left;
} lsa_rng;

static inline LSA_HD lsa_rng lsa_rng_make(uint64_t key, uint64_t hi) {
    lsa_rng r;
    r.key = key;
    r.hi = hi;
    r.lo = 0;
    r.left = 0;
    for (int i = 0; i < 4; i++) r.block.v[i] = 0;
    return r;
}
static inline LSA_HD uint32_t lsa_rng_u32(lsa_rng *r) {
    if (r->left == 0) {
        r->block = lsa_philox(r->key, r->lo++, r->hi);
        r->left = 4;
    }
    return r->block.v[4 - r->left--];
}
static inline LSA_HD uint64_t lsa_rng_u64(lsa_rng *r) {
    uint64_t a = lsa_rng_u32(r);
    return a << 32 | lsa_rng_u32(r);
}
/* Uniform in [0, n), without bias (rejection); n > 0. */
static inline LSA_HD uint64_t lsa_rng_below(lsa_rng *r, uint64_t n) {
    uint64_t limit = UINT64_MAX - UINT64_MAX % n, x;
    do x = lsa_rng_u64(r);
    while (x >= limit);
    return x % n;
}
/* Uniform in [0, 1), 24 bits. */
static inline LSA_HD float lsa_rng_uniform(lsa_rng *r) {
    return (float)(lsa_rng_u32(r) >> 8) * 0x1p-24f;
}
/* Mixes words into one key (splitmix64 finaliser over a running sum). */
static inline LSA_HD uint64_t lsa_mix64(uint64_t a, uint64_t b) {
    uint64_t y = a + 0x9E3779B97F4A7C15u * (b + 1);
    y = (y ^ (y >> 30)) * 0xBF58476D1CE4E5B9u;
    y = (y ^ (y >> 27)) * 0x94D049BB133111EBu;
    return y ^ (y >> 31);
}

#endif
