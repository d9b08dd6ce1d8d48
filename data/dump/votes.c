/* Votes: see votes.h. NUMERIC: the running sum is in double, so that the prefix does not depend on vector
 * width. */
#include "data/dump/votes.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/core/dtype.h"

#define RUN 8

/* Ascending, all different. */
static void sort_words(uint64_t *a, uint64_t *other, int32_t n) {
    for (int32_t b = 0; b < n; b += RUN)
        for (int32_t i = b + 1; i < n && i < b + RUN; i++) {
            const uint64_t v = a[i];
            int32_t j = i;
            for (; j > b && a[j - 1] > v; j--) a[j] = a[j - 1];
            a[j] = v;
        }
    uint64_t *from = a, *to = other;
    for (int32_t w = RUN; w < n; w *= 2) {
        for (int32_t b = 0; b < n; b += 2 * w) {
            const int32_t mid = b + w < n ? b + w : n, end = b + 2 * w < n ? b + 2 * w : n;
            int32_t i = b, j = mid;
            for (int32_t k = b; k < end; k++) {
                const bool left = j >= end || (i < mid && from[i] < from[j]);
                to[k] = left ? from[i] : from[j];
                i += left;
                j += !left;
            }
        }
        uint64_t *const t = from;
        from = to;
        to = t;
    }
    if (from != a) memcpy(a, from, (size_t)n * sizeof *a);
}

/* Greater logits first, ties by place: one word. */
static uint64_t rank_of(float logit, int32_t i) {
    const uint32_t u = lsa_f32_bits(logit + 0.0f);
    return (uint64_t)(~(u ^ ((0u - (u >> 31)) | 0x80000000u))) << 32 | (uint32_t)i;
}

int32_t lsa_votes(const int32_t *pool, int32_t n, const float *logit, double top_p, int32_t *out) {
    uint64_t r[LSA_MAX_POOL], other[LSA_MAX_POOL];
    double p[LSA_MAX_POOL], z = 0, run = 0;
    bool voted[LSA_MAX_POOL];
    if (n > LSA_MAX_POOL) n = LSA_MAX_POOL;
    if (n <= 0) return 0;
    for (int32_t i = 0; i < n; i++) r[i] = rank_of(logit[i], i);
    sort_words(r, other, n);
    const double most = (double)logit[(uint32_t)r[0]];
    for (int32_t i = 0; i < n; i++) z += p[i] = exp((double)logit[(uint32_t)r[i]] - most);
    memset(voted, 0, (size_t)n * sizeof *voted);
    for (int32_t i = 0; i < n; i++) { /* the element that crosses top_p is taken too */
        run += p[i] / z;
        voted[(uint32_t)r[i]] = true;
        if (run > top_p) break;
    }
    int32_t k = 0;
    for (int32_t i = 0; i < n; i++)
        if (voted[i]) out[k++] = pool[i];
    return k;
}
