/* Calibration <-> JSON: see calibration.h. Writer and reader share the names, list by list, so that they
 * cannot drift apart. The mistake that would stay silent: thresholds of one score read for another. */
#include "data/calibration.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/num.h"

#define FORMAT "lsa-calibration/1"

const double lsa_calib_target[LSA_CALIB_TARGETS] = {0.05, 0.10, 0.135, 0.20, 0.80, 0.90, 0.95};
static const char *const SCORE[LSA_CALIB_SCORES] = {"sum", "mean", "max"};

const char *lsa_calib_kind(int target) {
    return target < LSA_CALIB_BUDGETS ? "budget" : "recall";
}

void lsa_calib_rule(lsa_select_rule *r, const lsa_calibration *c, lsa_score_rule score, int target,
                    int64_t tail_chunks) {
    memset(r, 0, sizeof *r);
    r->mode = LSA_SELECT_THRESHOLD;
    r->score = score;
    r->n_layer = c->n_layer;
    r->tail = tail_chunks;
    r->n_knot = c->n_knot;
    memcpy(r->knot_length, c->knot, sizeof r->knot_length);
    memcpy(r->knot_threshold, c->entry[score][target].threshold, sizeof r->knot_threshold);
    memcpy(r->temperature, c->temperature, sizeof r->temperature);
    memcpy(r->offset, c->offset, sizeof r->offset);
}

/* ---- the numbers of a point, by name: one list for both directions ---- */

typedef struct field {
    const char *name;
    size_t at; /* of a double, or of an interval */
    bool interval;
} field;
static const field POINT[] = {{"kept", offsetof(lsa_calib_point, kept), false},
                              {"recall", offsetof(lsa_calib_point, recall), false},
                              {"captured", offsetof(lsa_calib_point, captured), false},
                              {"kept_ci", offsetof(lsa_calib_point, kept_ci), true},
                              {"recall_ci", offsetof(lsa_calib_point, recall_ci), true},
                              {"captured_ci", offsetof(lsa_calib_point, captured_ci), true},
                              {"kept_p10_p90", offsetof(lsa_calib_point, spread), true}};
enum { N_POINT = sizeof POINT / sizeof *POINT };

/* ---- writing ---- */

/* Shares to six digits: more would only be noise, and the file stays readable. NaN is null. */
static json_t *share(double x) {
    return isfinite(x) ? json_real(round(x * 1e6) / 1e6) : json_null();
}

static json_t *floats(const float *x, int32_t n) {
    json_t *a = json_array();
    for (int32_t i = 0; i < n; i++) json_array_append_new(a, json_real((double)x[i]));
    return a;
}
static json_t *doubles(const double *x, int32_t n) {
    json_t *a = json_array();
    for (int32_t i = 0; i < n; i++) json_array_append_new(a, json_real(x[i]));
    return a;
}
static json_t *integers(const int64_t *x, int32_t n) {
    json_t *a = json_array();
    for (int32_t i = 0; i < n; i++) json_array_append_new(a, json_integer((json_int_t)x[i]));
    return a;
}

static void put_points(json_t *o, const lsa_calib_point *p, int32_t n) {
    for (int f = 0; f < N_POINT; f++) {
        json_t *a = json_array();
        for (int32_t k = 0; k < n; k++) {
            const char *at = (const char *)&p[k] + POINT[f].at;
            if (POINT[f].interval) {
                const lsa_interval *v = (const lsa_interval *)(const void *)at;
                json_array_append_new(a, isfinite(v->low) ? json_pack("[o, o]", share(v->low), share(v->high))
                                                          : json_null());
            } else {
                json_array_append_new(a, share(*(const double *)(const void *)at));
            }
        }
        json_object_set_new(o, POINT[f].name, a);
    }
}

static json_t *reliability_json(const lsa_reliability *r) {
    return json_pack("{s:o, s:o, s:o}", "predicted", doubles(r->predicted, r->n), "observed",
                     doubles(r->observed, r->n), "chunks", integers(r->chunks, r->n));
}

static json_t *score_json(const lsa_calibration *c, int score) {
    json_t *o = json_pack("{s:[], s:[]}", "budget", "recall");
    for (int t = 0; t < LSA_CALIB_TARGETS; t++) {
        const lsa_calib_entry *e = &c->entry[score][t];
        json_t *x =
            json_pack("{s:f, s:o}", "target", e->target, "threshold", floats(e->threshold, c->n_knot));
        put_points(x, e->at, c->n_knot);
        json_array_append_new(json_object_get(o, lsa_calib_kind(t)), x);
    }
    if (c->score[score].n) json_object_set_new(o, "reliability", reliability_json(&c->score[score]));
    return o;
}

static json_t *fold_json(const lsa_calibration *c) {
    const lsa_calib_fold *f = &c->fold;
    json_t *o = json_pack("{s:f, s:I, s:f, s:o}", "budget", f->budget, "chunks", (json_int_t)f->chunks,
                          "logit_offset", f->logit_offset, "scale", doubles(f->scale, c->n_layer));
    const lsa_calib_point *p[] = {f->before, f->calibrated, f->after};
    static const char *const name[] = {"before", "calibrated", "after"};
    for (int i = 0; i < 3; i++) {
        json_t *x = json_object();
        put_points(x, p[i], c->n_knot);
        json_object_set_new(o, name[i], x);
    }
    return o;
}

lsa_status lsa_calibration_to_json(json_t **out, const lsa_calibration *c, lsa_err *err) {
    json_t *layers = json_array(), *scores = json_object();
    for (int32_t l = 0; l < c->n_layer; l++)
        json_array_append_new(layers, json_pack("{s:i, s:f, s:f, s:o}", "ordinal", c->ord[l].v, "temperature",
                                                (double)c->temperature[l], "offset", (double)c->offset[l],
                                                "reliability", reliability_json(&c->layer[l])));
    for (int s = 0; s < LSA_CALIB_SCORES; s++) json_object_set_new(scores, SCORE[s], score_json(c, s));
    *out = json_pack("{s:s, s:s, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o}", "format", FORMAT, "data_hash",
                     c->data_hash, "documents", (json_int_t)c->documents, "windows", (json_int_t)c->windows,
                     "longest", (json_int_t)c->longest, "layers", layers, "knots",
                     integers(c->knot, c->n_knot), "knot_documents", integers(c->knot_documents, c->n_knot),
                     "knot_windows", integers(c->knot_windows, c->n_knot), "ensembles", scores);
    if (!*out) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format the calibration");
    if (c->folded) json_object_set_new(*out, "fold", fold_json(c));
    return LSA_OK;
}

/* ---- reading ---- */

#define BAD(...)                                                                                             \
    LSA_RET_FAIL(LSA_E_FORMAT, "'%s': lsa.calibration: " __VA_ARGS__) /* needs `where` first in the list */

static lsa_status list(json_t **out, const json_t *o, const char *key, int64_t n, const char *where,
                       lsa_err *err) {
    const lsa_status st = lsa_json_array(out, o, key, where, err);
    if (st == LSA_OK && (int64_t)json_array_size(*out) != n)
        BAD("'%s' has %lld values, expected %lld", where, key, (long long)json_array_size(*out),
            (long long)n);
    return st;
}

static lsa_status get_integers(int64_t *out, int64_t n, const json_t *o, const char *key, const char *where,
                               lsa_err *err) {
    json_t *a;
    const lsa_status st = list(&a, o, key, n, where, err);
    for (int64_t i = 0; st == LSA_OK && i < n; i++) {
        if (!json_is_integer(json_array_get(a, (size_t)i)) ||
            json_integer_value(json_array_get(a, (size_t)i)) < 0)
            BAD("'%s' must hold integers from 0", where, key);
        out[i] = json_integer_value(json_array_get(a, (size_t)i));
    }
    return st;
}

static lsa_status get_doubles(double *out, int64_t n, const json_t *o, const char *key, const char *where,
                              lsa_err *err) {
    json_t *a;
    const lsa_status st = list(&a, o, key, n, where, err);
    for (int64_t i = 0; st == LSA_OK && i < n; i++) {
        if (!json_is_number(json_array_get(a, (size_t)i))) BAD("'%s' must hold numbers", where, key);
        out[i] = json_number_value(json_array_get(a, (size_t)i));
    }
    return st;
}

static bool get_share(double *out, const json_t *v) {
    *out = json_is_number(v) ? json_number_value(v) : (double)NAN;
    return json_is_null(v) || (*out >= 0 && *out <= 1);
}

static lsa_status get_points(lsa_calib_point *p, int32_t n, const json_t *o, const char *where,
                             lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int f = 0; f < N_POINT; f++) {
        json_t *a;
        LSA_TRY(list(&a, o, POINT[f].name, n, where, err));
        for (int32_t k = 0; k < n; k++) {
            char *at = (char *)&p[k] + POINT[f].at;
            const json_t *v = json_array_get(a, (size_t)k);
            bool ok;
            if (POINT[f].interval) {
                lsa_interval *i = (lsa_interval *)(void *)at;
                *i = (lsa_interval){(double)NAN, (double)NAN};
                ok =
                    json_is_null(v) || (json_array_size(v) == 2 && get_share(&i->low, json_array_get(v, 0)) &&
                                        get_share(&i->high, json_array_get(v, 1)));
            } else {
                ok = get_share((double *)(void *)at, v);
            }
            if (!ok)
                LSA_FAIL(LSA_E_FORMAT, "'%s': lsa.calibration: '%s' must hold shares between 0 and 1", where,
                         POINT[f].name);
        }
    }
done:
    return st;
}

static lsa_status get_reliability(lsa_reliability *r, const json_t *parent, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *o, *a;
    LSA_TRY(lsa_json_object(&o, parent, "reliability", where, err));
    LSA_TRY(lsa_json_array(&a, o, "chunks", where, err));
    r->n = (int32_t)lsa_min_i64(LSA_CALIB_BINS + 1, (int64_t)json_array_size(a));
    if (r->n > LSA_CALIB_BINS) BAD("'reliability' has more than %d bins", where, LSA_CALIB_BINS);
    LSA_TRY(get_integers(r->chunks, r->n, o, "chunks", where, err));
    LSA_TRY(get_doubles(r->predicted, r->n, o, "predicted", where, err));
    LSA_TRY(get_doubles(r->observed, r->n, o, "observed", where, err));
done:
    return st;
}

static lsa_status get_score(lsa_calibration *c, int s, const json_t *scores, const char *where,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *o, *a;
    LSA_TRY(lsa_json_object(&o, scores, SCORE[s], where, err));
    for (int t = 0; t < LSA_CALIB_TARGETS; t++) {
        const int first = t < LSA_CALIB_BUDGETS ? 0 : LSA_CALIB_BUDGETS;
        lsa_calib_entry *e = &c->entry[s][t];
        double x[LSA_SELECT_KNOTS];
        LSA_TRY(list(&a, o, lsa_calib_kind(t), first ? LSA_CALIB_RECALLS : LSA_CALIB_BUDGETS, where, err));
        const json_t *v = json_array_get(a, (size_t)(t - first));
        LSA_TRY(lsa_json_f64(&e->target, v, "target", where, err));
        if (e->target != lsa_calib_target[t])
            BAD("%s: target %g, expected %g", where, SCORE[s], e->target, lsa_calib_target[t]);
        LSA_TRY(get_doubles(x, c->n_knot, v, "threshold", where, err));
        for (int32_t k = 0; k < c->n_knot; k++) {
            e->threshold[k] = (float)x[k];
            if (!isfinite(e->threshold[k])) BAD("%s: threshold is not finite", where, SCORE[s]);
        }
        LSA_TRY(get_points(e->at, c->n_knot, v, where, err));
    }
    if (s != LSA_SCORE_SUM) LSA_TRY(get_reliability(&c->score[s], o, where, err));
done:
    return st;
}

static lsa_status get_fold(lsa_calibration *c, const json_t *o, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_calib_fold *f = &c->fold;
    lsa_calib_point *p[] = {f->before, f->calibrated, f->after};
    static const char *const name[] = {"before", "calibrated", "after"};
    LSA_TRY(lsa_json_f64(&f->budget, o, "budget", where, err));
    LSA_TRY(lsa_json_i64_in(&f->chunks, 1, INT64_C(1) << 40, o, "chunks", where, err));
    LSA_TRY(lsa_json_f64(&f->logit_offset, o, "logit_offset", where, err));
    LSA_TRY(get_doubles(f->scale, c->n_layer, o, "scale", where, err));
    for (int i = 0; i < 3; i++) {
        json_t *x;
        LSA_TRY(lsa_json_object(&x, o, name[i], where, err));
        LSA_TRY(get_points(p[i], c->n_knot, x, where, err));
    }
    c->folded = true;
done:
    return st;
}

static lsa_status get_layers(lsa_calibration *c, const json_t *o, const lsa_csa_ord *ord, int32_t n_layer,
                             const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *a;
    c->n_layer = n_layer;
    LSA_TRY(list(&a, o, "layers", n_layer, where, err));
    for (int32_t l = 0; l < n_layer; l++) {
        const json_t *v = json_array_get(a, (size_t)l);
        int64_t i;
        double t, b;
        LSA_TRY(lsa_json_i64(&i, v, "ordinal", where, err));
        LSA_TRY(lsa_json_f64(&t, v, "temperature", where, err));
        LSA_TRY(lsa_json_f64(&b, v, "offset", where, err));
        if (i != ord[l].v)
            BAD("layer %d is ordinal %lld, the indexer's is %d", where, l, (long long)i, ord[l].v);
        c->ord[l] = ord[l];
        c->temperature[l] = (float)t;
        c->offset[l] = (float)b;
        if (!(c->temperature[l] > 0) || !isfinite(c->temperature[l]) || !isfinite(c->offset[l]))
            BAD("layer c%d: temperature %g, offset %g", where, ord[l].v, t, b);
        LSA_TRY(get_reliability(&c->layer[l], v, where, err));
    }
done:
    return st;
}

lsa_status lsa_calibration_from_json(lsa_calibration *c, const json_t *o, const lsa_csa_ord *ord,
                                     int32_t n_layer, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    const char *text;
    json_t *a;
    memset(c, 0, sizeof *c);
    LSA_TRY(lsa_json_str(&text, o, "format", where, err));
    if (strcmp(text, FORMAT)) BAD("format '%.40s', this program reads %s", where, text, FORMAT);
    LSA_TRY(lsa_json_str(&text, o, "data_hash", where, err));
    snprintf(c->data_hash, sizeof c->data_hash, "%.16s", text);
    LSA_TRY(lsa_json_i64_in(&c->documents, 1, INT64_MAX, o, "documents", where, err));
    LSA_TRY(lsa_json_i64_in(&c->windows, 1, INT64_MAX, o, "windows", where, err));
    LSA_TRY(lsa_json_i64_in(&c->longest, 1, INT64_MAX, o, "longest", where, err));
    LSA_TRY(get_layers(c, o, ord, n_layer, where, err));
    LSA_TRY(lsa_json_array(&a, o, "knots", where, err));
    if (json_array_size(a) < 1 || json_array_size(a) > LSA_SELECT_KNOTS)
        BAD("%lld knots, expected 1 to %d", where, (long long)json_array_size(a), LSA_SELECT_KNOTS);
    c->n_knot = (int32_t)json_array_size(a);
    LSA_TRY(get_integers(c->knot, c->n_knot, o, "knots", where, err));
    for (int32_t k = 0; k < c->n_knot; k++)
        if (c->knot[k] <= (k ? c->knot[k - 1] : 0)) BAD("knots must ascend from 1", where);
    LSA_TRY(get_integers(c->knot_documents, c->n_knot, o, "knot_documents", where, err));
    LSA_TRY(get_integers(c->knot_windows, c->n_knot, o, "knot_windows", where, err));
    LSA_TRY(lsa_json_object(&a, o, "ensembles", where, err));
    for (int s = 0; s < LSA_CALIB_SCORES; s++) LSA_TRY(get_score(c, s, a, where, err));
    if (json_object_get(o, "fold")) {
        LSA_TRY(lsa_json_object(&a, o, "fold", where, err));
        LSA_TRY(get_fold(c, a, where, err));
    }
done:
    return st;
}
