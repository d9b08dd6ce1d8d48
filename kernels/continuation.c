/* Continuation: see continuation.h. Blocks run from the last to the first, so that in place a block still
 * finds the scores before it as they were. NUMERIC: one f32 subtraction and comparisons, nothing that a
 * compiler could fuse. */
#include "kernels/continuation.h"

#include <string.h>

#include "kernels/core/num.h"

enum { BLOCK = 512 };

/* Chunks [first, first + n) into best and won: the nearest j first, so that a later one must be higher. */
static void block(float *restrict best, int32_t *restrict won, const float *restrict z, int64_t first,
                  int64_t n, const float *restrict cost, int32_t reach) {
    memcpy(best, z + first, (size_t)n * sizeof *best);
    memset(won, 0, (size_t)n * sizeof *won);
    for (int32_t j = 1; j <= reach; j++) {
        const float b = cost[j - 1];
        const int64_t begin = lsa_max_i64(0, j - first);
#pragma omp simd
        for (int64_t c = begin; c < n; c++) {
            const float v = z[first + c - j] - b, s = best[c];
            best[c] = v > s ? v : s;
            won[c] = v > s ? j : won[c];
        }
    }
}

void lsa_continue(float *out, uint8_t *from, const float *z, int64_t n, const float *cost, int32_t reach) {
    float best[BLOCK];
    int32_t won[BLOCK];
    for (int64_t end = n; end > 0;) {
        const int64_t first = (end - 1) / BLOCK * BLOCK;
        block(best, won, z, first, end - first, cost, reach);
        memcpy(out + first, best, (size_t)(end - first) * sizeof *out);
        for (int64_t c = first; from && c < end; c++) from[c] = (uint8_t)won[c - first];
        end = first;
    }
}
