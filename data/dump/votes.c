/* Votes: see votes.h. NUMERIC: the running sum is in double, so that the prefix does not depend on vector
 * width. */
#include "data/dump/votes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_POOL 4096

typedef struct ranked {
    float logit;
    int32_t chunk;
} ranked;

static int by_rank(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return (x->chunk > y->chunk) - (x->chunk < y->chunk);
}
static int ascending(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

int32_t lsa_votes(const int32_t *pool, int32_t n, const float *logit, double top_p, int32_t *out) {
    ranked r[MAX_POOL];
    if (n > MAX_POOL) n = MAX_POOL;
    if (n == 0) return 0;
    for (int32_t i = 0; i < n; i++) r[i] = (ranked){logit[i], pool[i]};
    qsort(r, (size_t)n, sizeof *r, by_rank);
    double p[MAX_POOL], z = 0, run = 0;
    for (int32_t i = 0; i < n; i++) z += p[i] = exp((double)r[i].logit - (double)r[0].logit);
    int32_t k = 0;
    while (k < n) { /* the element that crosses top_p is taken too */
        run += p[k] / z;
        out[k] = r[k].chunk;
        k++;
        if (run > top_p) break;
    }
    qsort(out, (size_t)k, sizeof *out, ascending);
    return k;
}
