/* Rules: see rule.h. The mistake that would stay silent: thresholds of one ensemble applied to the scores of
 * another; a budget outside the table is refused, not guessed. */
#include "export/abi/rule.h"

#include <math.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"

lsa_status lsa_idx_export_read(lsa_idx_export *e, const lsa_indexer_file *f, const char *where,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_calibration *c = NULL;
    memset(e, 0, sizeof *e);
    e->n_layer = f->geom.n_layer;
    e->ensemble = f->ensemble;
    e->tail = f->tail;
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) e->temperature[l] = 1.0f;
    e->reach = f->geom.reach;
    if (e->reach)
        memcpy(e->cost, f->params + lsa_indexer_costs_at(&f->geom), (size_t)e->reach * sizeof *e->cost);
    e->prior = f->geom.prior;
    if (e->prior) memcpy(e->prior_weight, f->params + lsa_indexer_prior_at(&f->geom), sizeof e->prior_weight);
    if (!f->calibration) goto done;
    LSA_TRY(LSA_NEW(c, 1, err));
    LSA_TRY(lsa_calibration_from_json(c, f->calibration, f->geom.ord, f->geom.n_layer, where, err));
    memcpy(e->temperature, c->temperature, (size_t)e->n_layer * sizeof *e->temperature);
    memcpy(e->offset, c->offset, (size_t)e->n_layer * sizeof *e->offset);
    e->n_knot = c->n_knot;
    memcpy(e->knot, c->knot, sizeof e->knot);
    for (int s = 0; s < LSA_CALIB_SCORES; s++)
        for (int i = 0; i < LSA_CALIB_BUDGETS; i++)
            memcpy(e->threshold[s][i], c->entry[s][i].threshold, sizeof e->threshold[s][i]);
    e->calibrated = true;
done:
    lsa_free(c);
    return st;
}

static lsa_status calibrated_threshold(lsa_select_rule *r, const lsa_idx_export *e, double budget,
                                       lsa_err *err) {
    const int s = (int)r->score;
    if (!e->calibrated)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "this export is not calibrated: run 'lsa-export calibrate' on it, give a threshold, or choose by budget or count");
    enum { n = LSA_CALIB_BUDGETS };
    const double *t = lsa_calib_target; /* the budgets come first */
    const double slack = 1e-9;          /* 0.1 + 0.2 is still 0.3 */
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
    if (e->reach && r->score != LSA_SCORE_SUM)
        LSA_FAIL(LSA_E_CONFIG,
                 "rule: this export's score is the sum of the logits with a continuation, which ensemble %s "
                 "would leave out; use the sum, or LSA_IDX_EXPORTED",
                 lsa_ensemble_name((lsa_ensemble)r->score));
    if (e->prior && r->score != LSA_SCORE_SUM)
        LSA_FAIL(LSA_E_CONFIG,
                 "rule: this export's score is the sum of the logits with observed masses, which ensemble %s "
                 "would leave out; use the sum, or LSA_IDX_EXPORTED",
                 lsa_ensemble_name((lsa_ensemble)r->score));
    memcpy(r->prior, e->prior_weight, sizeof r->prior);
    r->reach = e->reach;
    memcpy(r->cost, e->cost, sizeof r->cost);
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
