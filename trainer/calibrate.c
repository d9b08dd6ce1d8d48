/* Calibration: see calibrate.h. The mistake that would stay silent: a threshold fitted to one definition of
 * the score and served with another; fitted and measured scores come from one function, and the last look
 * measures the very rules that are written. */
#include "trainer/calibrate.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "data/weights.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "trainer/platt.h"
#include "trainer/threshold.h"

/* Bins of logits: linear in asinh(z), 0.05 % of z or 0.0005 wide. */
enum { Z_BINS = 1 << 16 };
static const double Z_RANGE = 16;

static double z_value(int64_t bin) {
    return sinh(((double)bin + 0.5) / Z_BINS * 2 * Z_RANGE - Z_RANGE);
}
static int64_t z_bin(float z) {
    const double x = (asinh((double)z) + Z_RANGE) / (2 * Z_RANGE) * Z_BINS;
    return x > 0 ? (int64_t)fmin(x, Z_BINS - 1) : 0;
}

/* ---- first look: logits ---- */

typedef struct logits {
    int32_t n_layer;
    int64_t *golden, *other; /* [n_layer, Z_BINS] */
    double n, sum, sum2;     /* of the summed logits, observed mass added */
} logits;

static lsa_status look_logits(void *arg, void *row, const lsa_seen *w) {
    logits *x = arg;
    double *moments = row;
    for (int64_t c = 0; c < w->n; c++) {
        double sum = w->prior ? (double)w->prior[c] : 0;
        for (int32_t l = 0; l < x->n_layer; l++) {
            const float z = w->z[l * w->stride + c];
            int64_t *count = (w->votes[c] ? x->golden : x->other) + (int64_t)l * Z_BINS + z_bin(z);
#pragma omp atomic update
            (*count)++;
            sum += (double)z;
        }
        moments[0] += 1, moments[1] += sum, moments[2] += sum * sum;
    }
    return LSA_OK;
}

static void add_logits(void *arg, const void *row, const lsa_seen *w) {
    logits *x = arg;
    const double *moments = row;
    (void)w;
    x->n += moments[0], x->sum += moments[1], x->sum2 += moments[2];
}

/* ---- reliability ---- */

static int reliability_bin(double p) {
    const double b = floor(2 * (log(p) - log1p(-p)) + 16);
    return b > 0 ? (int)fmin(b, LSA_CALIB_BINS - 1) : 0;
}

/* golden and other chunks predicted with chance p: [n]. */
static void reliability(lsa_reliability *r, const double *p, const int64_t *golden, const int64_t *other,
                        int64_t n) {
    double predicted[LSA_CALIB_BINS] = {0}, observed[LSA_CALIB_BINS] = {0};
    int64_t chunks[LSA_CALIB_BINS] = {0};
    for (int64_t i = 0; i < n; i++) {
        const int b = reliability_bin(p[i]);
        const int64_t all = golden[i] + other[i];
        predicted[b] += p[i] * (double)all;
        observed[b] += (double)golden[i];
        chunks[b] += all;
    }
    r->n = 0;
    for (int b = 0; b < LSA_CALIB_BINS; b++)
        if (chunks[b]) {
            r->predicted[r->n] = predicted[b] / (double)chunks[b];
            r->observed[r->n] = observed[b] / (double)chunks[b];
            r->chunks[r->n++] = chunks[b];
        }
}

static lsa_status fit_layers(lsa_calibration *out, const logits *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    double *z = NULL, *p = NULL;
    LSA_TRY(LSA_NEW(z, Z_BINS, err));
    LSA_TRY(LSA_NEW(p, Z_BINS, err));
    for (int64_t b = 0; b < Z_BINS; b++) z[b] = z_value(b);
    for (int32_t l = 0; l < x->n_layer; l++) {
        const int64_t *golden = x->golden + (int64_t)l * Z_BINS, *other = x->other + (int64_t)l * Z_BINS;
        lsa_platt fit;
        LSA_TRY(lsa_platt_fit(&fit, z, golden, other, Z_BINS, err));
        if (fit.identity)
            lsa_warn("layer c%d: %s: its logits stay as they are (temperature 1, offset 0)", out->ord[l].v,
                     fit.identity);
        out->temperature[l] = fit.temperature;
        out->offset[l] = fit.offset;
        for (int64_t b = 0; b < Z_BINS; b++)
            p[b] = 1 / (1 + exp(-(z[b] / (double)fit.temperature + (double)fit.offset)));
        reliability(&out->layer[l], p, golden, other, Z_BINS);
    }
done:
    lsa_free(z);
    lsa_free(p);
    return st;
}

/* ---- second look: scores ---- */

typedef struct scores {
    lsa_select_rule rule[LSA_CALIB_SCORES]; /* thresholds not used */
    lsa_score_counts counts[LSA_CALIB_SCORES];
} scores;

static lsa_status begin_scores(void *arg, const lsa_seen *w, lsa_err *err) {
    scores *x = arg;
    lsa_status st = LSA_OK;
    for (int s = 0; s < LSA_CALIB_SCORES; s++)
        LSA_TRY(lsa_score_counts_window(&x->counts[s], w->visible, w->n, err));
done:
    return st;
}

static lsa_status look_scores(void *arg, void *row, const lsa_seen *w) {
    scores *x = arg;
    float *score = NULL;
    const lsa_status st = LSA_NEW(score, w->n, NULL);
    (void)row;
    for (int s = 0; st == LSA_OK && s < LSA_CALIB_SCORES; s++) {
        lsa_rule_score(score, &x->rule[s], w);
        for (int64_t c = 0; c < w->n; c++)
            lsa_score_counts_add(&x->counts[s], w->visible, score[c], w->votes[c] > 0);
    }
    lsa_free(score);
    return st;
}

/* The score's own reliability, over all lengths. */
static lsa_status score_reliability(lsa_reliability *r, const lsa_score_counts *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t *golden = NULL, *other = NULL;
    double *p = NULL;
    LSA_TRY(LSA_NEW(golden, LSA_SCORE_BINS, err));
    LSA_TRY(LSA_NEW(other, LSA_SCORE_BINS, err));
    LSA_TRY(LSA_NEW(p, LSA_SCORE_BINS, err));
    for (int b = 0; b < LSA_SCORE_BINS; b++) {
        const double u = c->axis.low + (b + 0.5) / LSA_SCORE_BINS * (c->axis.high - c->axis.low);
        p[b] = 1 / (1 + exp(-u));
        for (int i = 0; i < LSA_LENGTH_CELLS; i++)
            if (c->chunks[i]) {
                golden[b] += c->golden[i][b];
                other[b] += c->chunks[i][b] - c->golden[i][b];
            }
    }
    reliability(r, p, golden, other, LSA_SCORE_BINS);
done:
    lsa_free(golden);
    lsa_free(other);
    lsa_free(p);
    return st;
}

/* ---- the three looks ---- */

static lsa_status fit(lsa_calibration *out, lsa_measure *m, logits *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(LSA_NEW(x->golden, (int64_t)x->n_layer * Z_BINS, err));
    LSA_TRY(LSA_NEW(x->other, (int64_t)x->n_layer * Z_BINS, err));
    LSA_TRY(lsa_measure_walk(m, &(lsa_look){"logits", 3 * sizeof(double), x, NULL, look_logits, add_logits},
                             err));
    LSA_TRY(fit_layers(out, x, err));
done:
    return st;
}

static lsa_status find(lsa_calibration *out, lsa_measure *m, scores *x, const logits *z, lsa_err *err) {
    lsa_status st = LSA_OK;
    const double mean = z->sum / z->n, sd = sqrt(fmax(0, z->sum2 / z->n - mean * mean));
    const double reach =
        24 * sd + 1e-6 * (1 + fabs(mean)); /* beyond it lie under 0.2 % of any distribution */
    for (int s = 0; s < LSA_CALIB_SCORES; s++) {
        lsa_calib_rule(&x->rule[s], out, (lsa_score_rule)s, 0, 0);
        lsa_measure_continue(&x->rule[s], m);
        x->counts[s].axis = s == LSA_SCORE_SUM ? (lsa_score_axis){false, mean - reach, mean + reach}
                                               : (lsa_score_axis){true, -24, 24};
    }
    LSA_TRY(lsa_measure_walk(m, &(lsa_look){"scores", 1, x, begin_scores, look_scores, NULL}, err));
    for (int s = 0; s < LSA_CALIB_SCORES; s++) {
        for (int t = 0; t < LSA_CALIB_TARGETS; t++) {
            out->entry[s][t].target = lsa_calib_target[t];
            LSA_TRY(lsa_find_thresholds(out->entry[s][t].threshold, &x->counts[s], out->knot, out->n_knot,
                                        lsa_calib_target[t], t >= LSA_CALIB_BUDGETS, err));
        }
        if (s != LSA_SCORE_SUM) LSA_TRY(score_reliability(&out->score[s], &x->counts[s], err));
    }
done:
    return st;
}

/* Ties cannot be split, and few chunks cannot hold a small share: say so instead of promising. */
static void check_budgets(const lsa_calibration *c) {
    static const char *const name[] = {"sum", "mean", "max"};
    for (int s = 0; s < LSA_CALIB_SCORES; s++)
        for (int t = 0; t < LSA_CALIB_BUDGETS; t++)
            for (int32_t k = 0; k < c->n_knot; k++) {
                const lsa_calib_entry *e = &c->entry[s][t];
                if (!(fabs(e->at[k].kept / e->target - 1) < 0.15) && c->knot_windows[k] > 0)
                    lsa_warn(
                        "%s, budget %.4g %%, %lld chunks: no threshold keeps the target share; the nearest keeps %.2f %%",
                        name[s], 100 * e->target, (long long)c->knot[k], 100 * e->at[k].kept);
            }
}

lsa_status lsa_calibration_measure(lsa_calibration *c, lsa_measure *m, lsa_err *err) {
    enum { N_RULE = LSA_CALIB_SCORES * LSA_CALIB_TARGETS };
    lsa_status st = LSA_OK;
    lsa_select_rule *rule = NULL;
    lsa_calib_point *point = NULL;
    const lsa_measure_info info = lsa_measure_get_info(m);
    memcpy(c->data_hash, info.data_hash, sizeof c->data_hash);
    c->documents = info.documents;
    c->windows = info.windows;
    c->longest = info.longest_tokens;
    LSA_TRY(LSA_NEW(rule, N_RULE, err));
    LSA_TRY(LSA_NEW(point, N_RULE * (int64_t)c->n_knot, err));
    for (int i = 0; i < N_RULE; i++) {
        lsa_calib_rule(&rule[i], c, (lsa_score_rule)(i / LSA_CALIB_TARGETS), i % LSA_CALIB_TARGETS,
                       info.tail_chunks);
        lsa_measure_continue(&rule[i], m);
    }
    LSA_TRY(lsa_measure_rules(point, c->knot_documents, c->knot_windows, m, rule, N_RULE, c->knot, c->n_knot,
                              err));
    for (int i = 0; i < N_RULE; i++)
        memcpy(c->entry[i / LSA_CALIB_TARGETS][i % LSA_CALIB_TARGETS].at, point + i * c->n_knot,
               (size_t)c->n_knot * sizeof *point);
done:
    lsa_free(rule);
    lsa_free(point);
    return st;
}

lsa_status lsa_calibrate(lsa_calibration *out, lsa_measure *m, const lsa_indexer_geom *g, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_measure_info info = lsa_measure_get_info(m);
    logits z = {.n_layer = g->n_layer};
    scores *x = NULL;
    memset(out, 0, sizeof *out);
    out->n_layer = g->n_layer;
    memcpy(out->ord, g->ord, sizeof out->ord);
    out->n_knot = lsa_knots(out->knot, info.longest, info.tail_chunks);
    LSA_TRY(LSA_NEW(x, 1, err));
    LSA_TRY(fit(out, m, &z, err));
    LSA_TRY(find(out, m, x, &z, err));
    LSA_TRY(lsa_calibration_measure(out, m, err));
    check_budgets(out);
done:
    for (int s = 0; x && s < LSA_CALIB_SCORES; s++) lsa_score_counts_fini(&x->counts[s]);
    lsa_free(x);
    lsa_free(z.golden);
    lsa_free(z.other);
    return st;
}

/* ---- the fold ---- */

/* max over layers of sigmoid(z + offset) > 0.5. */
static lsa_select_rule reference_rule(const lsa_calibration *c, double offset, int64_t tail_chunks) {
    lsa_select_rule r = {.mode = LSA_SELECT_THRESHOLD,
                         .score = LSA_SCORE_MAX,
                         .n_layer = c->n_layer,
                         .tail = tail_chunks,
                         .threshold = 0.5f};
    for (int32_t l = 0; l < c->n_layer; l++) {
        r.temperature[l] = 1;
        r.offset[l] = (float)offset;
    }
    return r;
}

/* Scales and offset from the limits b on the layers' logits. The offset's size keeps the product of the
 * scales that of the inverse temperatures, so that the sigmoids stay about as steep as the fitted ones. */
static lsa_status fold_scales(lsa_calib_fold *f, const double *b, const lsa_calibration *c, lsa_err *err) {
    double size = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        if (!(b[l] * b[0] > 0)) {
            char text[512];
            size_t n = 0;
            for (int32_t i = 0; i < c->n_layer && n < sizeof text - 32; i++)
                n += (size_t)snprintf(text + n, sizeof text - n, " c%d %.3f", c->ord[i].v, b[i]);
            LSA_RET_FAIL(
                LSA_E_UNSUPPORTED,
                "cannot fold budget %.4g: the layers keep chunks above logits of different signs (%s), and weights "
                "without a bias cannot move them; choose another budget or length, or serve the thresholds",
                f->budget, text + 1);
        }
        size += log(fabs(b[l]) / (double)c->temperature[l]) / c->n_layer;
    }
    f->logit_offset = b[0] > 0 ? -exp(size) : exp(size);
    for (int32_t l = 0; l < c->n_layer; l++) f->scale[l] = fabs(f->logit_offset / b[l]);
    return LSA_OK;
}

static void scale_heads(lsa_indexer_file *f, const double *scale) {
    for (int32_t l = 0; l < f->geom.n_layer; l++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_at(&f->geom, l, LSA_W_PROJ);
        for (int64_t i = 0; i < t.n; i++)
            f->params[t.offset + i] = (float)((double)f->params[t.offset + i] * scale[l]);
    }
}

lsa_status lsa_calibrate_fold(lsa_calibration *c, lsa_measure *m, lsa_indexer_file *f, double budget,
                              int64_t chunks, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t tail = lsa_measure_get_info(m).tail_chunks;
    lsa_calib_fold fold = {.budget = budget, .chunks = chunks ? chunks : c->knot[c->n_knot - 1]};
    lsa_calib_point *point = NULL;
    lsa_select_rule rule[2];
    double b[LSA_MAX_CSA] = {0};
    int target = 0;
    if (f->geom.reach || f->geom.prior)
        LSA_FAIL(LSA_E_UNSUPPORTED,
                 "--fold: this indexer was trained with %s of the sum, which the "
                 "reference server's maximum of sigmoids would leave out",
                 f->geom.reach ? "a continuation" : "an observed-mass prior");
    while (target < LSA_CALIB_BUDGETS && fabs(lsa_calib_target[target] - budget) > 1e-9) target++;
    if (target == LSA_CALIB_BUDGETS)
        LSA_FAIL(LSA_E_ARG, "--fold %g: expected one of the budgets 0.05, 0.10, 0.135 and 0.20", budget);
    rule[0] = reference_rule(c, 0, tail);
    lsa_calib_rule(&rule[1], c, LSA_SCORE_MAX, target, tail);
    const double p = (double)lsa_rule_threshold(&rule[1], fold.chunks), u = log(p) - log1p(-p);
    for (int32_t l = 0; l < c->n_layer; l++) b[l] = (double)c->temperature[l] * (u - (double)c->offset[l]);
    LSA_TRY(fold_scales(&fold, b, c, err));
    LSA_TRY(LSA_NEW(point, 2 * (int64_t)c->n_knot, err));
    LSA_TRY(lsa_measure_rules(point, NULL, NULL, m, rule, 2, c->knot, c->n_knot, err));
    memcpy(fold.before, point, (size_t)c->n_knot * sizeof *point);
    memcpy(fold.calibrated, point + c->n_knot, (size_t)c->n_knot * sizeof *point);
    scale_heads(f, fold.scale);
    lsa_weights_round(f->params, &f->geom, f->dtype); /* what the file can hold */
    f->ensemble = LSA_ENSEMBLE_MAX;
    f->threshold = 1 / (1 + exp(fold.logit_offset));
    LSA_TRY(lsa_measure_params(m, f->params, err));
    LSA_TRY(lsa_calibrate(c, m, &f->geom, err));
    rule[0] = reference_rule(c, fold.logit_offset, tail);
    LSA_TRY(lsa_measure_rules(fold.after, NULL, NULL, m, rule, 1, c->knot, c->n_knot, err));
    c->folded = true;
    c->fold = fold;
done:
    lsa_free(point);
    return st;
}

/* ---- for people ---- */

static void print_share(double x) {
    if (isfinite(x))
        printf(" %8.4f", x);
    else
        printf(" %8s", "-");
}
static void print_interval(lsa_interval i) {
    if (isfinite(i.low))
        printf("  %6.4f to %6.4f", i.low, i.high);
    else
        printf("  %16s", "-");
}

static void print_fold(const lsa_calibration *c) {
    printf(
        "\nfolded for budget %.4g at %lld chunks: set the server's logit offset to %.6f (threshold 0.5), or its threshold to %.6f\n",
        c->fold.budget, (long long)c->fold.chunks, c->fold.logit_offset, 1 / (1 + exp(c->fold.logit_offset)));
    printf("%8s  %26s  %26s  %26s\n", "", "reference rule before", "calibrated maximum",
           "reference rule now");
    printf("%8s %s%s%s\n", "chunks", "     kept   recall captured ", "     kept   recall captured ",
           "     kept   recall captured");
    for (int32_t k = 0; k < c->n_knot; k++) {
        const lsa_calib_point *p[] = {&c->fold.before[k], &c->fold.calibrated[k], &c->fold.after[k]};
        printf("%8lld", (long long)c->knot[k]);
        for (int i = 0; i < 3; i++) {
            print_share(p[i]->kept);
            print_share(p[i]->recall);
            print_share(p[i]->captured);
            printf(" ");
        }
        printf("\n");
    }
}

void lsa_calibration_print(const lsa_calibration *c, lsa_ensemble ensemble) {
    const lsa_calib_entry *e = c->entry[ensemble];
    const int32_t last = c->n_knot - 1;
    printf("%lld windows of %lld documents of up to %lld tokens\n", (long long)c->windows,
           (long long)c->documents, (long long)c->longest);
    for (int32_t l = 0; l < c->n_layer; l++)
        printf("layer c%d: temperature %.5f, offset %.4f\n", c->ord[l].v, (double)c->temperature[l],
               (double)c->offset[l]);
    printf("\nthreshold of the %s score\n%8s %6s", lsa_ensemble_name(ensemble), "chunks", "docs");
    for (int t = 0; t < LSA_CALIB_TARGETS; t++)
        printf("  %s %4.3g", t < LSA_CALIB_BUDGETS ? "budget" : "recall", lsa_calib_target[t]);
    printf("\n");
    for (int32_t k = 0; k < c->n_knot; k++) {
        printf("%8lld %6lld", (long long)c->knot[k], (long long)c->knot_documents[k]);
        for (int t = 0; t < LSA_CALIB_TARGETS; t++) printf("  %11.5g", (double)e[t].threshold[k]);
        printf("\n");
    }
    printf(
        "\nwhat it keeps around %lld chunks, with 95 %% intervals over documents\n%-13s %8s  %16s %8s  %16s %8s  %16s  %s\n",
        (long long)c->knot[last], "target", "kept", "", "recall", "", "captured", "",
        "kept by windows, p10 to p90");
    for (int t = 0; t < LSA_CALIB_TARGETS; t++) {
        const lsa_calib_point *p = &e[t].at[last];
        printf("%s %-6.4g", lsa_calib_kind(t), e[t].target);
        print_share(p->kept);
        print_interval(p->kept_ci);
        print_share(p->recall);
        print_interval(p->recall_ci);
        print_share(p->captured);
        print_interval(p->captured_ci);
        print_interval(p->spread);
        printf("\n");
    }
    if (c->folded) print_fold(c);
}
