/* Selection: see select.h. Every chunk and page gets a 64-bit key whose order is the order of the rule
 * (score, then lower index), so that all keys differ and the k best are those not below one bound, whatever
 * the order in which they were found. The mistake that would stay silent: ties taken in the order of a sort.
 *
 * Floor of 131,072 chunks and 3 layers: 1.5 MB of logits, read once; the rest stays in the second-level cache
 * (tests/bench/test_select_speed.c). */
#include "kernels/model/select.h"

#include <math.h>
#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/continuation.h"
#include "kernels/prior.h"
#include "kernels/model/sigmoid.h"

enum { PAGE_BITS = 25 }; /* chunks have 31 bits */

typedef struct span { /* evictable chunks */
    int64_t begin, end;
} span;

static span evictable(const lsa_select_rule *r, int64_t n) {
    const int64_t sink = lsa_min_i64(r->sink, n), tail = lsa_min_i64(r->tail, n - sink);
    return (span){sink, n - tail};
}

static int64_t count_pages(int64_t n) {
    return lsa_ceil_div(n, LSA_PAGE_CHUNKS);
}
static bool forced_page(span e, int64_t n, int64_t page) {
    const int64_t a = page * LSA_PAGE_CHUNKS, b = lsa_min_i64(a + LSA_PAGE_CHUNKS, n);
    return a < e.begin || b > e.end;
}
static int64_t count_forced_pages(span e, int64_t n) {
    int64_t k = 0;
    for (int64_t p = 0; p < count_pages(n); p++) k += forced_page(e, n, p);
    return k;
}

int64_t lsa_select_room(const lsa_select_rule *r, int64_t n) {
    const span e = evictable(r, n);
    const int64_t can = e.end - e.begin, forced = n - can;
    switch (r->mode) {
    case LSA_SELECT_THRESHOLD:
        return forced + (r->cap > 0 ? lsa_min_i64(r->cap, can) : can);
    case LSA_SELECT_TOPK:
        return forced + lsa_min_i64(r->k, can);
    case LSA_SELECT_BUDGET:
        return forced + lsa_min_i64(lsa_budget_chunks(r->budget, can), can);
    case LSA_SELECT_PAGES:
        return lsa_min_i64(lsa_max_i64(r->k, count_forced_pages(e, n)), count_pages(n));
    }
    return n;
}

lsa_status lsa_select_check(const lsa_select_rule *r, lsa_err *err) {
    const struct {
        const char *name;
        int64_t v, lo, hi;
    } f[] = {{"mode", r->mode, LSA_SELECT_THRESHOLD, LSA_SELECT_PAGES},
             {"score rule", r->score, LSA_SCORE_SUM, LSA_SCORE_MAX},
             {"layers", r->n_layer, 1, LSA_MAX_CSA},
             {"k", r->k, 0, INT64_MAX},
             {"cap", r->cap, 0, INT64_MAX},
             {"sink", r->sink, 0, INT64_MAX},
             {"tail", r->tail, 0, INT64_MAX},
             {"knots", r->n_knot, 0, LSA_SELECT_KNOTS},
             {"reach of the continuation", r->reach, 0, LSA_MAX_REACH}};
    for (size_t i = 0; i < sizeof f / sizeof *f; i++)
        if (f[i].v < f[i].lo || f[i].v > f[i].hi)
            LSA_RET_FAIL(LSA_E_ARG, "select: %s must be in [%lld, %lld], found %lld", f[i].name,
                         (long long)f[i].lo, (long long)f[i].hi, (long long)f[i].v);
    if (r->mode == LSA_SELECT_BUDGET && !(r->budget >= 0 && r->budget <= 1))
        LSA_RET_FAIL(LSA_E_ARG, "select: budget must be in [0, 1], found %g", r->budget);
    const bool uses_t = r->mode == LSA_SELECT_THRESHOLD || r->mode == LSA_SELECT_PAGES;
    if (uses_t && !r->n_knot && isnan(r->threshold)) LSA_RET_FAIL(LSA_E_ARG, "select: the threshold is NaN");
    for (int32_t i = 0; i < r->n_knot; i++) {
        if (r->knot_length[i] < 1 || (i && r->knot_length[i] <= r->knot_length[i - 1]))
            LSA_RET_FAIL(LSA_E_ARG, "select: knot %d: lengths must be positive and ascending", i);
        if (!isfinite(r->knot_threshold[i]))
            LSA_RET_FAIL(LSA_E_ARG, "select: knot %d: the threshold is not finite", i);
    }
    if (r->reach && r->score != LSA_SCORE_SUM)
        LSA_RET_FAIL(LSA_E_ARG, "select: a continuation belongs to the sum of the logits");
    if (r->observed && r->score != LSA_SCORE_SUM)
        LSA_RET_FAIL(LSA_E_ARG, "select: observed masses belong to the sum of the logits");
    if (r->observed && (!isfinite(r->prior[0]) || !isfinite(r->prior[1])))
        LSA_RET_FAIL(LSA_E_ARG, "select: the weights of the prior must be finite");
    for (int32_t j = 0; j < r->reach; j++)
        if (!(r->cost[j] >= 0) || !isfinite(r->cost[j]))
            LSA_RET_FAIL(LSA_E_ARG, "select: cost %d of the continuation must be finite and at least 0",
                         j + 1);
    for (int32_t l = 0; r->score != LSA_SCORE_SUM && l < r->n_layer; l++)
        if (!(r->temperature[l] > 0) || !isfinite(r->temperature[l]) || !isfinite(r->offset[l]))
            LSA_RET_FAIL(LSA_E_ARG, "select: layer %d: temperature must be positive, offset finite", l);
    return LSA_OK;
}

static float threshold_at(const lsa_select_rule *r, int64_t n) {
    if (r->n_knot == 0) return r->threshold;
    int32_t i = 0;
    while (i < r->n_knot && r->knot_length[i] <= n) i++;
    if (i == 0) return r->knot_threshold[0];
    if (i == r->n_knot) return r->knot_threshold[i - 1];
    const double lo = log2((double)r->knot_length[i - 1]), hi = log2((double)r->knot_length[i]);
    const double u = (log2((double)n) - lo) / (hi - lo), a = (double)r->knot_threshold[i - 1];
    return (float)(a + u * ((double)r->knot_threshold[i] - a));
}

/* NUMERIC: layers in order, one operation at a time; nothing here may be fused or reordered by a compiler
 * (no product is added to anything). */
static void scores(float *restrict score, const lsa_select_rule *r, const float *restrict logit,
                   int64_t stride, int64_t n) {
    if (n > 0) memset(score, 0, (size_t)n * sizeof *score);
    for (int32_t l = 0; l < r->n_layer; l++) {
        const float *restrict z = logit + l * stride, scale = r->temperature[l], offset = r->offset[l];
        if (r->score == LSA_SCORE_SUM) {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) score[c] += z[c];
        } else if (r->score == LSA_SCORE_MEAN) {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) score[c] += lsa_sigmoid(z[c] / scale + offset);
        } else {
#pragma omp simd
            for (int64_t c = 0; c < n; c++) { /* a NaN comes in and stays */
                const float p = lsa_sigmoid(z[c] / scale + offset), s = score[c];
                score[c] = ((p > s) | (p != p)) ? p : s;
            }
        }
    }
    for (int64_t c = 0; r->score == LSA_SCORE_MEAN && c < n; c++) score[c] /= (float)r->n_layer;
}

void lsa_select_observe(float *state, int64_t ld, int64_t n, const int32_t *chunk, const float *mass) {
    lsa_prior_end_window(state, state + ld, ld);
    for (int64_t i = 0; i < n; i++) state[chunk[i]] = mass[i];
}

static void add_prior(float *restrict score, const lsa_select_rule *r, const float *restrict observed,
                      int64_t n) {
#pragma omp simd
    for (int64_t c = 0; c < n; c++)
        score[c] += lsa_prior_value(r->prior, lsa_prior_feature(observed[c]),
                                    lsa_prior_feature(observed[r->observed_ld + c]));
}

/* Larger floats have larger codes, -0 and 0 the same; NaN 0, below -infinity's. */
static inline uint32_t ordered(float x) {
    const uint32_t u = lsa_f32_bits(x + 0.0f), sign = 0u - (u >> 31); /* no branches: signs are random */
    return (u ^ (sign | 0x80000000u)) & (0u - (uint32_t)(x == x));
}

typedef struct items { /* what is chosen from: chunks begin..end-1, or pages */
    const float *score;
    bool pages;
    int64_t begin, end; /* chunks or pages */
    span e;
    int64_t n;
    float t;
} items;

/* 0: never chosen. */
static inline uint64_t chunk_key(const items *it, int64_t c) {
    const uint32_t o = ordered(it->score[c]);
    return o ? (uint64_t)o << 32 | (UINT32_MAX - (uint32_t)c) : 0;
}
static uint64_t page_key(const items *it, int64_t p) {
    const int64_t a = p * LSA_PAGE_CHUNKS, b = lsa_min_i64(a + LSA_PAGE_CHUNKS, it->n);
    uint32_t above = 0, best = 0;
    for (int64_t c = a; c < b; c++) {
        const uint32_t o = ordered(it->score[c]);
        above += it->score[c] > it->t;
        best = o > best ? o : best;
    }
    if (forced_page(it->e, it->n, p)) above = LSA_PAGE_CHUNKS + 1; /* more than any page can have */
    return ((uint64_t)above << (32 + PAGE_BITS) | (uint64_t)best << PAGE_BITS |
            ((UINT64_C(1) << PAGE_BITS) - 1 - (uint64_t)p));
}
static inline uint64_t key_of(const items *it, int64_t i) {
    return it->pages ? page_key(it, i) : chunk_key(it, i);
}

/* The k-th largest key, or a number above the next smaller one: 13 bits a pass, counting those that agree
 * with the bits found so far. There are at least k >= 1 keys above 0. */
static uint64_t bound_of(const items *it, int64_t k) {
    enum { DIGIT = 13, BINS = 1 << DIGIT };
    uint64_t found = 0;
    for (int shift = 64 - 12; shift >= 0; shift -= DIGIT) {
        uint32_t count[BINS] = {0};
        const int above = shift + DIGIT;
        for (int64_t i = it->begin; i < it->end; i++) {
            const uint64_t key = key_of(it, i);
            if (key && (above >= 64 || key >> above == found >> above)) count[key >> shift & (BINS - 1)]++;
        }
        int64_t b = BINS - 1;
        while (k > count[b]) k -= count[b--];
        found |= (uint64_t)b << shift;
        if (k == count[b]) break; /* the whole bin is taken: lower bits do not matter */
    }
    return found;
}

lsa_status lsa_select(int32_t *out, int64_t *n_out, float *score, const lsa_select_rule *r,
                      const float *logit, int64_t stride, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    float *own = NULL;
    int64_t m = 0;
    *n_out = 0;
    LSA_TRY(lsa_select_check(r, err));
    if (r->observed && r->observed[0] && r->observed_ld < n)
        LSA_FAIL(LSA_E_ARG, "select: observed masses of %lld chunks, %lld are visible",
                 (long long)r->observed_ld, (long long)n);
    if (n < 0 || n > INT32_MAX)
        LSA_FAIL(LSA_E_ARG, "select: chunks must be in [0, 2^31), found %lld", (long long)n);
    if (r->n_layer > 1 && stride < n)
        LSA_FAIL(LSA_E_ARG, "select: a row of %lld logits does not hold %lld chunks", (long long)stride,
                 (long long)n);
    if (!score) {
        LSA_TRY(LSA_NEW(own, n, err));
        score = own;
    }
    scores(score, r, logit, stride, n);
    if (r->observed && r->observed[0]) add_prior(score, r, r->observed[0], n);
    if (r->reach) lsa_continue(score, NULL, score, n, r->cost, r->reach);
    const span e = evictable(r, n);
    const bool pages = r->mode == LSA_SELECT_PAGES;
    const items it = {score, pages, pages ? 0 : e.begin, pages ? count_pages(n) : e.end,
                      e,     n,     threshold_at(r, n)};
    int64_t k = lsa_select_room(r, n) - (pages ? 0 : n - (e.end - e.begin)), can = 0;
    uint64_t bound = pages ? 0 : 1;
    if (r->mode == LSA_SELECT_THRESHOLD) bound = ((uint64_t)ordered(it.t) + 1) << 32;
    for (int64_t i = it.begin; i < it.end; i++) can += key_of(&it, i) >= bound;
    if (k > 0 && k < can) bound = bound_of(&it, k);
    k = lsa_min_i64(k, can);
    for (int64_t c = 0; c < e.begin && !pages; c++) out[m++] = (int32_t)c;
    for (int64_t i = it.begin, last = m + k; m < last && i < it.end; i++) {
        out[m] = (int32_t)i;
        m += key_of(&it, i) >= bound;
    }
    for (int64_t c = e.end; c < n && !pages; c++) out[m++] = (int32_t)c;
    *n_out = m;
done:
    lsa_free(own);
    return st;
}
