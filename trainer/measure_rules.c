/* Measuring rules: see measure.h. Numbers are added window by window in order, so that they are the same for
 * any number of threads. The mistake that would stay silent: intervals over windows, which repeat each other
 * inside a document, instead of over documents. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/rng.h"
#include "kernels/continuation.h"
#include "trainer/measure.h"
#include "trainer/threshold.h"

enum { SHARES = 3, RESAMPLES = 1000, STEPS = 1000 }; /* kept, recall, captured; of a share in spreads */

static float chance(float z, float temperature, float offset) {
    return 1.0f / (1.0f + expf(-(z / temperature + offset)));
}

void lsa_rule_score(float *score, const lsa_select_rule *r, const lsa_seen *w) {
    const int64_t n = w->n;
    for (int64_t c = 0; c < n; c++) score[c] = 0;
    for (int32_t l = 0; l < r->n_layer; l++) {
        const float *zl = w->z + l * w->stride, t = r->temperature[l], o = r->offset[l];
        for (int64_t c = 0; c < n; c++) switch (r->score) {
            case LSA_SCORE_SUM:
                score[c] += zl[c];
                break;
            case LSA_SCORE_MEAN:
                score[c] += chance(zl[c], t, o) / (float)r->n_layer;
                break;
            case LSA_SCORE_MAX:
                score[c] = fmaxf(score[c], chance(zl[c], t, o));
            }
    }
    for (int64_t c = 0; w->prior && r->score == LSA_SCORE_SUM && c < n; c++) score[c] += w->prior[c];
    if (r->reach) lsa_continue(score, NULL, score, n, r->cost, r->reach);
}

/* What can be kept (all) and what a rule keeps: chunks, golden chunks, mass. */
typedef struct amounts {
    double v[SHARES];
} amounts;

typedef struct table {
    const lsa_select_rule *rule;
    int n_rule;
    const int64_t *knot;
    int32_t n_knot;
    int64_t n_doc;
    amounts *all;    /* [n_doc, n_knot] */
    amounts *kept;   /* [n_doc, n_knot, n_rule] */
    int64_t *spread; /* [n_knot, n_rule, STEPS + 1]: windows by the share they keep */
    int64_t *windows;
} table;

static bool same_score(const lsa_select_rule *a, const lsa_select_rule *b) {
    return a->score == b->score &&
           (a->score == LSA_SCORE_SUM || (!memcmp(a->temperature, b->temperature, sizeof a->temperature) &&
                                          !memcmp(a->offset, b->offset, sizeof a->offset)));
}

/* row: amounts of everything, then of each rule. */
static lsa_status look(void *arg, void *row, const lsa_seen *w) {
    const table *t = arg;
    amounts *all = row, *kept = all + 1;
    float *score = NULL;
    const lsa_status st = LSA_NEW(score, w->n, NULL);
    if (st != LSA_OK) return st;
    for (int64_t c = 0; c < w->n; c++) {
        all->v[0] += 1;
        all->v[1] += w->votes[c] > 0;
        all->v[2] += w->mass ? (double)w->mass[c] : 0;
    }
    for (int i = 0; i < t->n_rule; i++) {
        const float limit = lsa_rule_threshold(&t->rule[i], w->visible);
        if (i == 0 || !same_score(&t->rule[i], &t->rule[i - 1])) lsa_rule_score(score, &t->rule[i], w);
        for (int64_t c = 0; c < w->n; c++) {
            if (!(score[c] > limit)) continue;
            kept[i].v[0] += 1;
            kept[i].v[1] += w->votes[c] > 0;
            kept[i].v[2] += w->mass ? (double)w->mass[c] : 0;
        }
    }
    lsa_free(score);
    return LSA_OK;
}

static void weigh(amounts *sum, double weight, const amounts *a) {
    for (int s = 0; s < SHARES; s++) sum->v[s] += weight * a->v[s];
}

static void add(void *arg, const void *row, const lsa_seen *w) {
    table *t = arg;
    const amounts *all = row, *kept = all + 1;
    int32_t first;
    double f;
    lsa_knot_weight(&first, &f, t->knot, t->n_knot, log2((double)w->visible));
    const int32_t nearest = first + (f > 0.5);
    for (int32_t k = first; k <= first + (f > 0); k++) {
        const double weight = k == first ? 1 - f : f;
        weigh(&t->all[w->doc * t->n_knot + k], weight, all);
        for (int i = 0; i < t->n_rule; i++)
            weigh(&t->kept[(w->doc * t->n_knot + k) * t->n_rule + i], weight, &kept[i]);
    }
    t->windows[nearest]++;
    for (int i = 0; i < t->n_rule; i++)
        t->spread[(nearest * t->n_rule + i) * (STEPS + 1) + lround(STEPS * kept[i].v[0] / all->v[0])]++;
}

/* Shares of one knot and rule over documents taken times[doc] times each. */
static void shares(double out[SHARES], const table *t, int32_t k, int i, const int32_t *times) {
    amounts all = {{0}}, kept = {{0}};
    for (int64_t d = 0; d < t->n_doc; d++) {
        const double n = times ? times[d] : 1;
        if (n == 0) continue;
        weigh(&all, n, &t->all[d * t->n_knot + k]);
        weigh(&kept, n, &t->kept[(d * t->n_knot + k) * t->n_rule + i]);
    }
    for (int s = 0; s < SHARES; s++) out[s] = all.v[s] > 0 ? kept.v[s] / all.v[s] : (double)NAN;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* The middle 95 % of the resamples that have a value (those without golden chunks have no recall). */
static lsa_interval interval(double *x) {
    int n = 0;
    for (int b = 0; b < RESAMPLES; b++)
        if (isfinite(x[b])) x[n++] = x[b];
    if (n < RESAMPLES / 2) return (lsa_interval){(double)NAN, (double)NAN};
    qsort(x, (size_t)n, sizeof *x, by_value);
    return (lsa_interval){x[(int)(0.025 * n)], x[(int)ceil(0.975 * n) - 1]};
}

static lsa_interval spread(const int64_t *count) {
    int64_t n = 0, below = 0;
    lsa_interval out = {(double)NAN, (double)NAN};
    for (int s = 0; s <= STEPS; s++) n += count[s];
    for (int s = 0; s <= STEPS && n > 0; s++) {
        if (below * 10 < n && (below + count[s]) * 10 >= n) out.low = (double)s / STEPS;
        if (below * 10 < 9 * n && (below + count[s]) * 10 >= 9 * n) out.high = (double)s / STEPS;
        below += count[s];
    }
    return out;
}

static int64_t documents_at(const table *t, int32_t k) {
    int64_t n = 0;
    for (int64_t d = 0; d < t->n_doc; d++) n += t->all[d * t->n_knot + k].v[0] > 0;
    return n;
}

/* Intervals of one knot: the same resamples for every rule. */
static lsa_status intervals(lsa_calib_point *p, const table *t, int32_t k, const int32_t *times,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    double *x = NULL;
    LSA_TRY(LSA_NEW(x, SHARES * RESAMPLES, err));
    for (int i = 0; i < t->n_rule; i++) {
        lsa_calib_point *q = &p[i * t->n_knot + k];
#pragma omp parallel for
        for (int b = 0; b < RESAMPLES; b++) {
            double s[SHARES];
            shares(s, t, k, i, times + (int64_t)b * t->n_doc);
            for (int j = 0; j < SHARES; j++) x[j * RESAMPLES + b] = s[j];
        }
        q->kept_ci = interval(x);
        q->recall_ci = interval(x + RESAMPLES);
        q->captured_ci = interval(x + 2 * RESAMPLES);
    }
done:
    lsa_free(x);
    return st;
}

/* times[b, doc]: how often resample b took a document. */
static lsa_status resample(int32_t **out, int64_t n_doc, lsa_err *err) {
    const lsa_status st = LSA_NEW(*out, RESAMPLES * n_doc, err);
    for (int64_t b = 0; st == LSA_OK && b < RESAMPLES; b++) {
        lsa_rng r = lsa_rng_make(20260609, (uint64_t)b);
        for (int64_t d = 0; d < n_doc; d++) (*out)[b * n_doc + (int64_t)lsa_rng_below(&r, (uint64_t)n_doc)]++;
    }
    return st;
}

static lsa_status summarise(lsa_calib_point *point, const table *t, bool has_mass, lsa_err *err) {
    lsa_status st = LSA_OK;
    int32_t *times = NULL;
    LSA_TRY(resample(&times, t->n_doc, err));
    for (int32_t k = 0; k < t->n_knot; k++) {
        for (int i = 0; i < t->n_rule; i++) {
            lsa_calib_point *p = &point[i * t->n_knot + k];
            double s[SHARES];
            shares(s, t, k, i, NULL);
            const lsa_interval none = {(double)NAN, (double)NAN};
            *p = (lsa_calib_point){.kept = s[0],
                                   .recall = s[1],
                                   .captured = has_mass ? s[2] : (double)NAN,
                                   .kept_ci = none,
                                   .recall_ci = none,
                                   .captured_ci = none,
                                   .spread = spread(t->spread + (k * t->n_rule + i) * (STEPS + 1))};
        }
        if (documents_at(t, k) > 1) LSA_TRY(intervals(point, t, k, times, err));
        for (int i = 0; !has_mass && i < t->n_rule; i++)
            point[i * t->n_knot + k].captured_ci = (lsa_interval){(double)NAN, (double)NAN};
    }
done:
    lsa_free(times);
    return st;
}

lsa_status lsa_measure_rules(lsa_calib_point *point, int64_t *knot_documents, int64_t *knot_windows,
                             lsa_measure *m, const lsa_select_rule *rule, int n_rule, const int64_t *knot,
                             int32_t n_knot, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_measure_info info = lsa_measure_get_info(m);
    table t = {.rule = rule, .n_rule = n_rule, .knot = knot, .n_knot = n_knot, .n_doc = info.range};
    LSA_TRY(LSA_NEW(t.all, t.n_doc * n_knot, err));
    LSA_TRY(LSA_NEW(t.kept, t.n_doc * n_knot * n_rule, err));
    LSA_TRY(LSA_NEW(t.spread, (int64_t)n_knot * n_rule * (STEPS + 1), err));
    LSA_TRY(LSA_NEW(t.windows, n_knot, err));
    LSA_TRY(lsa_measure_walk(
        m, &(lsa_look){"measure", (size_t)(1 + n_rule) * sizeof(amounts), &t, NULL, look, add}, err));
    LSA_TRY(summarise(point, &t, info.has_mass, err));
    for (int32_t k = 0; k < n_knot; k++) {
        if (knot_documents) knot_documents[k] = documents_at(&t, k);
        if (knot_windows) knot_windows[k] = t.windows[k];
    }
done:
    lsa_free(t.all);
    lsa_free(t.kept);
    lsa_free(t.spread);
    lsa_free(t.windows);
    return st;
}
