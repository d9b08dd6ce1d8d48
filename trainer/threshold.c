/* Threshold search: see threshold.h. The mistake that would stay silent: searching every knot as if its
 * neighbours did not matter, which misses the target wherever the thresholds change with length; the knots
 * are solved together. */
#include "trainer/threshold.h"

#include <math.h>
#include <string.h>

#include "kernels/core/mem.h"

enum { B = LSA_SCORE_BINS };

/* ---- lengths ---- */

int32_t lsa_knots(int64_t knot[LSA_SELECT_KNOTS], int64_t longest, int64_t tail) {
    int32_t n = 0;
    for (int i = 12; i < 62; i++) { /* from 64 chunks */
        const int64_t k = (int64_t)llround(exp2(0.5 * i));
        const bool last = (double)k * 1.41421356237309515 > 1.1 * (double)longest;
        if (k < 2 * tail && !last) continue;
        if (n && (double)k > 1.1 * (double)longest) break;
        if (n == LSA_SELECT_KNOTS) { /* the shortest goes */
            memmove(knot, knot + 1, (size_t)--n * sizeof *knot);
        }
        knot[n++] = k;
    }
    return n;
}

void lsa_knot_weight(int32_t *k, double *f, const int64_t *knot, int32_t n_knot, double log2_length) {
    *k = 0;
    *f = 0;
    if (n_knot == 0 || log2_length <= log2((double)knot[0])) return;
    if (log2_length >= log2((double)knot[n_knot - 1])) {
        *k = n_knot - 1;
        return;
    }
    while (log2_length >= log2((double)knot[*k + 1])) ++*k;
    const double a = log2((double)knot[*k]), b = log2((double)knot[*k + 1]);
    *f = (log2_length - a) / (b - a);
}

float lsa_rule_threshold(const lsa_select_rule *r, int64_t n) {
    int32_t k;
    double f;
    if (r->n_knot == 0) return r->threshold;
    lsa_knot_weight(&k, &f, r->knot_length, r->n_knot, log2((double)n));
    const double a = (double)r->knot_threshold[k];
    return f > 0 ? (float)(a + f * ((double)r->knot_threshold[k + 1] - a)) : r->knot_threshold[k];
}

/* ---- counting ---- */

static int cell_of(int64_t n) {
    const int c = (int)floor(16 * log2((double)n));
    return c < 0 ? 0 : c >= LSA_LENGTH_CELLS ? LSA_LENGTH_CELLS - 1 : c;
}

/* Position of a score on the axis, in bins; clamped into it. */
static double position(const lsa_score_axis *a, double s) {
    const double v = a->logit ? log(s) - log1p(-s) : s; /* infinite at 0 and 1: the ends */
    const double x = (v - a->low) / (a->high - a->low) * B;
    return x > 0 ? fmin(x, B) : 0;
}
static double value_at(const lsa_score_axis *a, double x) {
    const double v = a->low + x / B * (a->high - a->low);
    return a->logit ? 1 / (1 + exp(-v)) : v;
}

lsa_status lsa_score_counts_window(lsa_score_counts *c, int64_t n, int64_t evictable, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int i = cell_of(n);
    if (!c->chunks[i]) LSA_TRY(LSA_NEW(c->chunks[i], B, err));
    if (!c->golden[i]) LSA_TRY(LSA_NEW(c->golden[i], B, err));
    c->n_chunk[i] += evictable;
    c->log2_sum[i] += (double)evictable * log2((double)n);
done:
    return st;
}

void lsa_score_counts_add(lsa_score_counts *c, int64_t n, float score, bool golden) {
    const int i = cell_of(n);
    const int64_t b = (int64_t)fmin(position(&c->axis, (double)score), B - 1);
#pragma omp atomic update
    c->chunks[i][b]++;
    if (golden) {
#pragma omp atomic update
        c->golden[i][b]++;
    }
}

void lsa_score_counts_fini(lsa_score_counts *c) {
    for (int i = 0; i < LSA_LENGTH_CELLS; i++) {
        lsa_free(c->chunks[i]);
        lsa_free(c->golden[i]);
    }
    memset(c, 0, sizeof *c);
}

double lsa_score_above(const lsa_score_counts *c, int cell, double t, bool golden) {
    const int64_t *count = golden ? c->golden[cell] : c->chunks[cell];
    const double x = position(&c->axis, t);
    const int b = (int)x;
    double above = 0;
    for (int i = B - 1; i > b; i--) above += (double)count[i];
    return b < B ? above + (double)count[b] * (1 - (x - b)) : above;
}

/* ---- the search ---- */

/* One cell of lengths, ready for many questions: above[b] = chunks in bins b and up. */
typedef struct column {
    int64_t above[B + 1];
    int32_t k;
    double f; /* its weights on knots k and k + 1 */
} column;

typedef struct search {
    const lsa_score_axis *axis;
    column *col;
    int n_col;
    double target;
    double t[LSA_SELECT_KNOTS];
} search;

static double above(const search *s, const column *c, double t) {
    const double x = position(s->axis, t);
    const int b = (int)x;
    if (b >= B) return 0;
    return (double)c->above[b + 1] + (double)(c->above[b] - c->above[b + 1]) * (1 - (x - b));
}

/* Chunks kept beyond the target around knot k, with its threshold at t. Falls as t rises. */
static double excess(const search *s, int32_t k, double t) {
    double sum = 0;
    for (int i = 0; i < s->n_col; i++) {
        const column *c = &s->col[i];
        if (c->k != k && !(c->k + 1 == k && c->f > 0)) continue;
        const double weight = c->k == k ? 1 - c->f : c->f;
        const double a = c->k == k ? t : s->t[c->k];
        const double b = c->f > 0 ? (c->k == k ? s->t[k + 1] : t) : a;
        sum += weight * (above(s, c, a + c->f * (b - a)) - s->target * (double)c->above[0]);
    }
    return sum;
}

static double solve(const search *s, int32_t k) {
    double low = value_at(s->axis, 0), high = value_at(s->axis, B);
    for (int i = 0; i < 60 && low < high; i++) {
        const double mid = low + (high - low) / 2;
        if (excess(s, k, mid) > 0)
            low = mid;
        else
            high = mid;
    }
    return high;
}

static void fill_columns(search *s, const lsa_score_counts *c, const int64_t *knot, int32_t n_knot,
                         bool golden) {
    for (int i = 0; i < LSA_LENGTH_CELLS; i++) {
        const int64_t *count = golden ? c->golden[i] : c->chunks[i];
        if (!count || c->n_chunk[i] == 0) continue;
        column *x = &s->col[s->n_col++];
        x->above[B] = 0;
        for (int b = B - 1; b >= 0; b--) x->above[b] = x->above[b + 1] + count[b];
        lsa_knot_weight(&x->k, &x->f, knot, n_knot, c->log2_sum[i] / (double)c->n_chunk[i]);
    }
}

lsa_status lsa_find_thresholds(float *threshold, const lsa_score_counts *c, const int64_t *knot,
                               int32_t n_knot, double target, bool golden, lsa_err *err) {
    lsa_status st = LSA_OK;
    search s = {.axis = &c->axis, .target = target};
    bool has[LSA_SELECT_KNOTS] = {false};
    LSA_TRY(LSA_NEW(s.col, LSA_LENGTH_CELLS, err));
    fill_columns(&s, c, knot, n_knot, golden);
    for (int i = 0; i < s.n_col; i++)
        if (s.col[i].above[0]) {
            has[s.col[i].k] = has[s.col[i].k] || s.col[i].f < 1;
            if (s.col[i].f > 0) has[s.col[i].k + 1] = true;
        }
    for (int32_t k = 0; k < n_knot; k++) s.t[k] = value_at(&c->axis, B / 2.0);
    const double range = value_at(&c->axis, B) - value_at(&c->axis, 0);
    for (int sweep = 0; sweep < 400; sweep++) { /* the loss is convex: knot after knot leads to its minimum */
        double change = 0;
        for (int32_t k = 0; k < n_knot; k++) {
            if (!has[k]) continue;
            const double t = solve(&s, k);
            change = fmax(change, fabs(t - s.t[k]));
            s.t[k] = t;
        }
        if (!(change > 1e-9 * range)) break;
    }
    for (int32_t k = 0; k < n_knot; k++) {
        int32_t from = k;
        for (int32_t d = 1; !has[from] && d < n_knot; d++)
            from = k >= d && has[k - d] ? k - d : k + d < n_knot && has[k + d] ? k + d : k;
        threshold[k] = has[from] ? (float)s.t[from] : (float)value_at(&c->axis, 0);
    }
done:
    lsa_free(s.col);
    return st;
}
