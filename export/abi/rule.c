/* Rules: see rule.h. The mistake that would stay silent: thresholds of one ensemble applied to the scores of
 * another; a budget outside the table is refused, not guessed. */
#include "export/abi/rule.h"

#include <math.h>
#include <string.h>

#include "kernels/core/num.h"

#define FORMAT "lsa-calibration/1"

static lsa_status number_in(double *out, const json_t *v, const char *what, const char *where, lsa_err *err) {
    *out = json_number_value(v);
    if (!json_is_number(v) || !isfinite((float)*out))
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: calibration: %s must be a finite number", where, what);
    return LSA_OK;
}

static lsa_status read_layers(lsa_idx_export *e, const lsa_indexer_geom *g, const json_t *o,
                              const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *a;
    LSA_TRY(lsa_json_array(&a, o, "layers", where, err));
    if ((int64_t)json_array_size(a) != g->n_layer)
        LSA_FAIL(LSA_E_FORMAT, "%s: calibration of %zu layers, the indexer has %d", where, json_array_size(a),
                 g->n_layer);
    for (int32_t l = 0; l < g->n_layer; l++) {
        const json_t *v = json_array_get(a, (size_t)l);
        int64_t ord;
        double t, b;
        LSA_TRY(lsa_json_i64(&ord, v, "ordinal", where, err));
        LSA_TRY(number_in(&t, json_object_get(v, "temperature"), "temperature", where, err));
        LSA_TRY(number_in(&b, json_object_get(v, "offset"), "offset", where, err));
        if (ord != g->ord[l].v || !((float)t > 0))
            LSA_FAIL(LSA_E_FORMAT,
                     "%s: calibration: layer %d: ordinal %lld (expected %d), temperature %g (expected > 0)",
                     where, l, (long long)ord, g->ord[l].v, t);
        e->temperature[l] = (float)t;
        e->offset[l] = (float)b;
    }
done:
    return st;
}

static lsa_status read_knots(lsa_idx_export *e, const json_t *o, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *a;
    LSA_TRY(lsa_json_array(&a, o, "knots", where, err));
    const size_t n = json_array_size(a);
    if (n < 1 || n > LSA_SELECT_KNOTS)
        LSA_FAIL(LSA_E_FORMAT, "%s: calibration: 1 to %d knots expected, found %zu", where, LSA_SELECT_KNOTS,
                 n);
    e->n_knot = (int32_t)n;
    for (size_t k = 0; k < n; k++) {
        const json_t *v = json_array_get(a, k);
        e->knot[k] = json_integer_value(v);
        if (!json_is_integer(v) || e->knot[k] <= (k ? e->knot[k - 1] : 0))
            LSA_FAIL(LSA_E_FORMAT, "%s: calibration: knots must be ascending positive integers", where);
    }
done:
    return st;
}

static lsa_status read_budgets(lsa_idx_export *e, int s, const json_t *o, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *a;
    double x;
    LSA_TRY(lsa_json_array(&a, o, "budget", where, err));
    const size_t n = json_array_size(a);
    if (n < 1 || n > LSA_IDX_TARGETS)
        LSA_FAIL(LSA_E_FORMAT, "%s: calibration: 1 to %d budgets expected, found %zu", where, LSA_IDX_TARGETS,
                 n);
    e->n_target[s] = (int32_t)n;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(a, i);
        json_t *t;
        LSA_TRY(number_in(&x, json_object_get(v, "target"), "target", where, err));
        e->target[s][i] = x;
        if (!(x > (i ? e->target[s][i - 1] : 0)) || x > 1)
            LSA_FAIL(LSA_E_FORMAT, "%s: calibration: budgets must ascend in (0, 1], found %g", where, x);
        LSA_TRY(lsa_json_array(&t, v, "threshold", where, err));
        if ((int64_t)json_array_size(t) != e->n_knot)
            LSA_FAIL(LSA_E_FORMAT, "%s: calibration: %zu thresholds for %d knots", where, json_array_size(t),
                     e->n_knot);
        for (int32_t k = 0; k < e->n_knot; k++) {
            LSA_TRY(number_in(&x, json_array_get(t, (size_t)k), "threshold", where, err));
            e->threshold[s][i][k] = (float)x;
        }
    }
done:
    return st;
}

lsa_status lsa_idx_export_read(lsa_idx_export *e, const lsa_indexer_file *f, const char *where,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    const json_t *o = f->calibration;
    const char *format;
    json_t *all;
    memset(e, 0, sizeof *e);
    e->n_layer = f->geom.n_layer;
    e->ensemble = f->ensemble;
    e->tail = f->tail;
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) e->temperature[l] = 1.0f;
    if (!o) goto done;
    LSA_TRY(lsa_json_str(&format, o, "format", where, err));
    if (strcmp(format, FORMAT))
        LSA_FAIL(LSA_E_FORMAT, "%s: calibration format is '%.40s', this library reads %s", where, format,
                 FORMAT);
    LSA_TRY(read_layers(e, &f->geom, o, where, err));
    LSA_TRY(read_knots(e, o, where, err));
    LSA_TRY(lsa_json_object(&all, o, "ensembles", where, err));
    for (int s = 0; s < 3; s++) {
        json_t *one;
        LSA_TRY(lsa_json_object(&one, all, lsa_ensemble_name((lsa_ensemble)s), where, err));
        LSA_TRY(read_budgets(e, s, one, where, err));
    }
    e->calibrated = true;
done:
    return st;
}

static lsa_status calibrated_threshold(lsa_select_rule *r, const lsa_idx_export *e, double budget,
                                       lsa_err *err) {
    const int s = (int)r->score;
    if (!e->calibrated)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "this export is not calibrated: run 'lsa-export calibrate' on it, give a threshold, or choose by budget or count");
    const int32_t n = e->n_target[s];
    const double *t = e->target[s];
    const double slack = 1e-9; /* 0.1 + 0.2 is still 0.3 */
    if (!(budget >= t[0] - slack && budget <= t[n - 1] + slack))
        LSA_RET_FAIL(LSA_E_CONFIG, "budget %g is outside the calibrated range %g to %g of ensemble %s",
                     budget, t[0], t[n - 1], lsa_ensemble_name((lsa_ensemble)s));
    int32_t i = 0;
    while (i + 1 < n && t[i + 1] <= budget + slack) i++;
    double u = 0;
    if (i + 1 < n && budget > t[i] + slack) u = log(budget / t[i]) / log(t[i + 1] / t[i]);
    r->n_knot = e->n_knot;
    for (int32_t k = 0; k < e->n_knot; k++) {
        const double a = (double)e->threshold[s][i][k], b = (double)e->threshold[s][u > 0 ? i + 1 : i][k];
        r->knot_length[k] = e->knot[k];
        r->knot_threshold[k] = (float)(a + u * (b - a));
    }
    return LSA_OK;
}

lsa_status lsa_idx_resolve(lsa_select_rule *r, const lsa_idx_export *e, const lsa_idx_rule *rule,
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    static const lsa_select_mode mode[] = {[LSA_IDX_THRESHOLD] = LSA_SELECT_THRESHOLD,
                                           [LSA_IDX_TOPK] = LSA_SELECT_TOPK,
                                           [LSA_IDX_BUDGET] = LSA_SELECT_BUDGET,
                                           [LSA_IDX_PAGES] = LSA_SELECT_PAGES,
                                           [LSA_IDX_CALIBRATED] = LSA_SELECT_THRESHOLD};
    memset(r, 0, sizeof *r);
    if (rule->mode < 0 || rule->mode > LSA_IDX_CALIBRATED)
        LSA_FAIL(LSA_E_ARG, "rule: mode %d is unknown", rule->mode);
    if (rule->ensemble < LSA_IDX_EXPORTED || rule->ensemble > LSA_IDX_MAX)
        LSA_FAIL(LSA_E_ARG, "rule: ensemble %d is unknown", rule->ensemble);
    if (rule->tail < -1)
        LSA_FAIL(LSA_E_ARG, "rule: tail must be -1 or at least 0, found %lld", (long long)rule->tail);
    r->mode = mode[rule->mode];
    r->score = (lsa_score_rule)(rule->ensemble == LSA_IDX_EXPORTED ? (int)e->ensemble : rule->ensemble);
    r->n_layer = e->n_layer;
    if (rule->mode == LSA_IDX_TOPK || rule->mode == LSA_IDX_PAGES) r->k = rule->k;
    if (rule->mode == LSA_IDX_THRESHOLD || rule->mode == LSA_IDX_CALIBRATED) r->cap = rule->cap;
    if (rule->mode == LSA_IDX_BUDGET) r->budget = rule->budget;
    r->sink = rule->sink;
    r->tail = rule->tail == -1 ? lsa_ceil_div(e->tail, LSA_CHUNK) : rule->tail;
    r->threshold = rule->threshold;
    memcpy(r->temperature, e->temperature, sizeof r->temperature);
    memcpy(r->offset, e->offset, sizeof r->offset);
    if (rule->mode == LSA_IDX_CALIBRATED || (rule->mode == LSA_IDX_PAGES && isnan(rule->threshold)))
        LSA_TRY(calibrated_threshold(r, e, rule->budget, err));
    LSA_TRY(lsa_select_check(r, err));
done:
    return st;
}
