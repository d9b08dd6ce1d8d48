/* Calibration on hand-made shards: what rules keep is counted again here from the hand-made truth and the
 * logits alone; the result does not depend on threads; the fold keeps the very chunks of the calibrated rule
 * at its length; JSON comes back as it was, and damaged JSON is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "tests/testkit/hand_shards.h"
#include "trainer/calibrate.h"

static char g_dir[64];

#define COST(j) (0.004 * (double)(j)) /* of the continuation, about the spread of the sums */

static const double PRIOR[] = {0.02, -0.01}; /* likewise, of the observed mass */

static lsa_indexer_file make_file(int32_t reach, bool prior) {
    lsa_indexer_file f = {.geom = {.hidden = HAND_HIDDEN,
                                   .n_head = 16,
                                   .head_dim = 128,
                                   .rank = 4,
                                   .eps = 1e-6f,
                                   .n_layer = HAND_LAYERS,
                                   .reach = reach,
                                   .prior = prior},
                          .tau = 64,
                          .tail = 64};
    f.geom.rope = (lsa_rope){
        .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    for (int32_t l = 0; l < HAND_LAYERS; l++) f.geom.ord[l].v = l, f.geom.id[l].v = 2 * l + 1;
    assert_int_equal(LSA_NEW(f.params, lsa_indexer_n_param(&f.geom), NULL), LSA_OK);
    lsa_indexer_init_random(f.params, &f.geom, 5);
    for (int32_t j = 1; j <= reach; j++) f.params[lsa_indexer_costs_at(&f.geom) + j - 1] = (float)COST(j);
    for (int k = 0; prior && k < 2; k++) f.params[lsa_indexer_prior_at(&f.geom) + k] = (float)PRIOR[k];
    f.train = json_pack("{s:i}", "step", 1);
    return f;
}

static lsa_measure *open_all(const lsa_indexer_file *f) {
    lsa_measure *m = NULL;
    lsa_err err = {0};
    if (lsa_measure_open(&m, f, g_dir, NULL, "cpu", false, &err) != LSA_OK) fail_msg("%s", err.msg);
    return m;
}

static lsa_calibration *calibrated(lsa_measure *m, const lsa_indexer_file *f) {
    lsa_calibration *c = NULL;
    lsa_err err = {0};
    assert_int_equal(LSA_NEW(c, 1, NULL), LSA_OK);
    if (lsa_calibrate(c, m, &f->geom, &err) != LSA_OK) fail_msg("%s", err.msg);
    return c;
}

static char *text_of(const lsa_calibration *c) {
    json_t *o = NULL;
    assert_int_equal(lsa_calibration_to_json(&o, c, NULL), LSA_OK);
    char *text = json_dumps(o, JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    json_decref(o);
    return text;
}

/* ---- the slow count ---- */

/* The observed masses of a document as decoding at the recipe's budget sees them. */
typedef struct history {
    int64_t doc;
    double m[HAND_LONGEST], M[HAND_LONGEST], next_m[HAND_LONGEST];
} history;
enum { RULES = 3 };
typedef struct slow {
    lsa_select_rule rule[RULES];
    double kept[RULES][3], all[3]; /* chunks, golden, mass, around the second of two knots */
    int64_t windows;
    bool prior;
    history seen;
} slow;

static double slow_prior(const history *s, int64_t c) {
    return PRIOR[0] * log1p(s->m[c] / 1e-3) + PRIOR[1] * log1p(s->M[c] / 1e-3);
}
static void slow_observe(history *s, int64_t start, const double *score, int64_t n) {
    for (int64_t c = 0; c < HAND_LONGEST / 4; c++) {
        int64_t before = 0;
        for (int64_t j = 0; score && c < n && j < n; j++)
            before += score[j] > score[c] || (score[j] == score[c] && j < c);
        const bool seen = !score || c >= n || before < lsa_budget_chunks(0.1, n);
        s->next_m[c] = seen ? hand_mass(s->doc, start, start + 64, c) / (64 * HAND_LAYERS) : 0;
    }
    for (int64_t c = 0; c < HAND_LONGEST / 4; c++) {
        s->M[c] = 0.9 * s->M[c] + s->m[c];
        s->m[c] = s->next_m[c];
    }
}

static double slow_score(const lsa_select_rule *r, const lsa_seen *w, int64_t c, const history *seen) {
    double mean = 0, max = 0, best = -1e9;
    for (int64_t j = 0; j <= r->reach && j <= c; j++) {
        double z = seen ? slow_prior(seen, c - j) : 0;
        for (int l = 0; l < HAND_LAYERS; l++) z += (double)w->z[l * w->stride + c - j];
        best = fmax(best, z - (j ? COST(j) : 0));
    }
    for (int l = 0; l < HAND_LAYERS; l++) {
        const double z = (double)w->z[l * w->stride + c],
                     p = 1 / (1 + exp(-(z / (double)r->temperature[l] + (double)r->offset[l])));
        mean += p / HAND_LAYERS, max = fmax(max, p);
    }
    return r->score == LSA_SCORE_SUM ? best : r->score == LSA_SCORE_MEAN ? mean : max;
}

static lsa_status nothing(void *arg, void *row, const lsa_seen *w) {
    (void)arg, (void)row, (void)w;
    return LSA_OK;
}

/* Knots 50 and 150: weight (log2 n - log2 50) / log2 3 on the second. */
static void slow_window(void *arg, const void *row, const lsa_seen *w) {
    slow *s = arg;
    (void)row;
    const int64_t start = 4 * w->visible;
    const double f = fmin(1, fmax(0, (log2((double)w->visible) - log2(50)) / log2(3)));
    assert_int_equal(w->n, (start - 64) / 4);
    if (s->windows == 0 || s->seen.doc != w->doc) { /* before the first window nothing is evicted */
        memset(&s->seen, 0, sizeof s->seen);
        s->seen.doc = w->doc;
        for (int64_t b = 0; b < start; b += 64) slow_observe(&s->seen, b, NULL, 0);
    }
    s->windows++;
    for (int64_t c = 0; c < w->n; c++) {
        const double x[3] = {1, hand_votes(w->doc, start, start + 64, c, 2) > 0,
                             hand_mass(w->doc, start, start + 64, c)};
        for (int j = 0; j < 3; j++) s->all[j] += f * x[j];
        for (int i = 0; i < RULES; i++) {
            const double t =
                (double)s->rule[i].knot_threshold[0] * (1 - f) + (double)s->rule[i].knot_threshold[1] * f;
            if (slow_score(&s->rule[i], w, c, s->prior ? &s->seen : NULL) > t)
                for (int j = 0; j < 3; j++) s->kept[i][j] += f * x[j];
        }
    }
    double score[HAND_LONGEST];
    for (int64_t c = 0; s->prior && c < w->n; c++)
        score[c] = slow_score(&s->rule[LSA_SCORE_SUM], w, c, &s->seen);
    if (s->prior) slow_observe(&s->seen, start, score, w->n);
}

static void near_to(const char *what, double a, double b) {
    if (!(fabs(a - b) <= 1e-9 + 1e-6 * fabs(b))) fail_msg("%s: %.9g, counted %.9g", what, a, b);
}

static double against_slow_count(int32_t reach, bool prior) {
    lsa_indexer_file f = make_file(reach, prior);
    lsa_measure *m = open_all(&f);
    const int64_t knot[] = {50, 150};
    lsa_calib_point p[RULES * 2];
    int64_t documents[2], windows[2];
    static slow s;
    s = (slow){.prior = prior};
    for (int i = 0; i < RULES; i++) {
        lsa_select_rule *r = &s.rule[i];
        r->score = (lsa_score_rule)i;
        r->n_layer = HAND_LAYERS;
        r->n_knot = 2;
        r->knot_length[0] = 50, r->knot_length[1] = 150;
        for (int l = 0; l < HAND_LAYERS; l++)
            r->temperature[l] = 0.5f + (float)l, r->offset[l] = 0.3f * (float)l - 0.2f;
        r->knot_threshold[0] = i == LSA_SCORE_SUM ? 0.01f : 0.48f;
        r->knot_threshold[1] = i == LSA_SCORE_SUM ? -0.02f : 0.53f;
        lsa_measure_continue(r, m);
        assert_int_equal(r->reach, i == LSA_SCORE_SUM ? reach : 0);
    }
    assert_int_equal(lsa_measure_rules(p, documents, windows, m, s.rule, RULES, knot, 2, NULL), LSA_OK);
    assert_int_equal(lsa_measure_walk(m, &(lsa_look){"count", 1, &s, NULL, nothing, slow_window}, NULL),
                     LSA_OK);
    assert_int_equal(windows[0] + windows[1], s.windows);
    assert_int_equal(documents[1], 4);
    for (int i = 0; i < RULES; i++) {
        const lsa_calib_point *q = &p[i * 2 + 1];
        if (!(q->kept > 0.02 && q->kept < 0.98)) fail_msg("rule %d keeps %g: it tests nothing", i, q->kept);
        near_to("kept", q->kept, s.kept[i][0] / s.all[0]);
        near_to("recall", q->recall, s.kept[i][1] / s.all[1]);
        near_to("captured", q->captured, s.kept[i][2] / s.all[2]);
        assert_true(q->kept_ci.low <= q->kept && q->kept <= q->kept_ci.high &&
                    q->kept_ci.low < q->kept_ci.high);
        assert_true(q->recall_ci.low <= q->recall && q->recall <= q->recall_ci.high);
        assert_true(q->spread.low <= q->spread.high);
    }
    lsa_measure_close(m);
    lsa_indexer_file_fini(&f);
    return p[LSA_SCORE_SUM * 2 + 1].kept;
}

static void test_counts(void **state) {
    (void)state;
    const double plain = against_slow_count(0, false);
    assert_true(plain < against_slow_count(4, false)); /* a continuation lifts scores */
    assert_true(plain < against_slow_count(0, true));
    against_slow_count(4, true);
}

/* The thresholds of the continued sum hold their budgets; the reference server's rule has no continuation. */
static void test_continued(void **state) {
    (void)state;
    lsa_indexer_file f = make_file(4, true);
    lsa_measure *m = open_all(&f);
    lsa_calibration *c = calibrated(m, &f);
    lsa_err err = {0};
    for (int t = 0; t < LSA_CALIB_BUDGETS; t++)
        for (int32_t k = 0; k < c->n_knot; k++) {
            const lsa_calib_entry *e = &c->entry[LSA_SCORE_SUM][t];
            if (c->knot_windows[k] && !(fabs(e->at[k].kept / e->target - 1) < 0.15))
                fail_msg("budget %g, knot %d: %g", e->target, k, e->at[k].kept);
        }
    assert_int_equal(lsa_calibrate_fold(c, m, &f, 0.1, 0, &err), LSA_E_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "continuation"));
    lsa_free(c);
    lsa_measure_close(m);
    lsa_indexer_file_fini(&f);
}

static void test_threads(void **state) {
    (void)state;
    lsa_indexer_file f = make_file(0, false);
    char *text[2];
    for (int i = 0; i < 2; i++) {
        omp_set_num_threads(i ? 4 : 1);
        lsa_measure *m = open_all(&f);
        lsa_calibration *c = calibrated(m, &f);
        text[i] = text_of(c);
        lsa_free(c);
        lsa_measure_close(m);
    }
    assert_string_equal(text[0], text[1]);
    free(text[0]);
    free(text[1]);
    lsa_indexer_file_fini(&f);
}

/* ---- the fold ---- */

typedef struct folded {
    const lsa_calibration *c;
    double p; /* the calibrated threshold at the fold's length */
    int64_t kept, differ, other;
} folded;

/* z comes from the folded weights; the calibrated rule saw z / scale. */
static void compare_rules(void *arg, const void *row, const lsa_seen *w) {
    folded *x = arg;
    (void)row;
    for (int64_t c = 0; c < w->n; c++) {
        double old = 0, now = 0;
        for (int l = 0; l < HAND_LAYERS; l++) {
            const double z = (double)w->z[l * w->stride + c];
            now = fmax(now, 1 / (1 + exp(-(z + x->c->fold.logit_offset))));
            old = fmax(old, 1 / (1 + exp(-(z / x->c->fold.scale[l] / (double)x->c->temperature[l] +
                                           (double)x->c->offset[l]))));
        }
        x->kept += now > 0.5;
        x->differ += fabs(now - 0.5) > 1e-5 && (now > 0.5) != (old > x->p);
        x->other++;
    }
}

static void test_fold(void **state) {
    (void)state;
    lsa_indexer_file f = make_file(0, false);
    lsa_measure *m = open_all(&f);
    lsa_calibration *c = calibrated(m, &f);
    lsa_err err = {0};
    assert_int_equal(lsa_calibrate_fold(c, m, &f, 0.07, 0, NULL), LSA_E_ARG);
    /* layers that keep above logits of different signs cannot be folded, and nothing is changed */
    const float p = c->entry[LSA_SCORE_MAX][1].threshold[c->n_knot - 1];
    const float u = logf(p / (1 - p)), first = f.params[lsa_indexer_tensor_at(&f.geom, 0, LSA_W_PROJ).offset];
    c->temperature[0] = c->temperature[1] = 1;
    c->offset[0] = u - 0.05f; /* limits 0.05 and -0.05 */
    c->offset[1] = u + 0.05f;
    assert_int_equal(lsa_calibrate_fold(c, m, &f, 0.10, 0, &err), LSA_E_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "c1 -0.050"));
    assert_true(f.params[lsa_indexer_tensor_at(&f.geom, 0, LSA_W_PROJ).offset] == first);
    c->offset[1] = u - 0.02f;
    const lsa_calibration before = *c;
    if (lsa_calibrate_fold(c, m, &f, 0.10, 0, &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_true(c->folded && f.ensemble == LSA_ENSEMBLE_MAX);
    near_to("threshold", f.threshold, 1 / (1 + exp(c->fold.logit_offset)));
    near_to("first weight", (double)f.params[lsa_indexer_tensor_at(&f.geom, 0, LSA_W_PROJ).offset],
            (double)first * c->fold.scale[0]);
    lsa_calibration old = before;
    old.fold = c->fold;
    folded x = {.c = &old, .p = (double)p};
    assert_int_equal(lsa_measure_walk(m, &(lsa_look){"compare", 1, &x, NULL, nothing, compare_rules}, NULL),
                     LSA_OK);
    if (x.differ != 0 || x.kept == 0 || x.kept == x.other)
        fail_msg("%lld of %lld chunks differ, %lld kept", (long long)x.differ, (long long)x.other,
                 (long long)x.kept);
    lsa_free(c);
    lsa_measure_close(m);
    lsa_indexer_file_fini(&f);
}

/* ---- JSON ---- */

static void refuse(const json_t *good, const lsa_csa_ord *ord, const char *text) {
    lsa_calibration *c = NULL;
    lsa_err err = {0};
    assert_int_equal(LSA_NEW(c, 1, NULL), LSA_OK);
    assert_int_equal(lsa_calibration_from_json(c, good, ord, HAND_LAYERS, "x", &err), LSA_E_FORMAT);
    if (!strstr(err.msg, text)) fail_msg("'%s' does not hold '%s'", err.msg, text);
    lsa_free(c);
}

static void test_json(void **state) {
    (void)state;
    lsa_indexer_file f = make_file(0, false);
    lsa_measure *m = open_all(&f);
    lsa_calibration *c = calibrated(m, &f), *back = NULL;
    json_t *o = NULL;
    assert_int_equal(LSA_NEW(back, 1, NULL), LSA_OK);
    c->folded = true;
    c->fold = (lsa_calib_fold){.budget = 0.1, .chunks = 128, .logit_offset = -0.25, .scale = {2, 3}};
    assert_int_equal(lsa_calibration_to_json(&o, c, NULL), LSA_OK);
    assert_int_equal(lsa_calibration_from_json(back, o, f.geom.ord, HAND_LAYERS, "x", NULL), LSA_OK);
    char *a = text_of(c), *b = text_of(back);
    assert_string_equal(a, b);
    free(a);
    free(b);
    const lsa_csa_ord wrong[HAND_LAYERS] = {{1}, {0}};
    refuse(o, wrong, "ordinal");
    const struct {
        const char *path[4], *text;
        json_t *value;
    } damage[] = {{{"format"}, "format", json_string("lsa-calibration/2")},
                  {{"knots"}, "ascend", json_pack("[i, i, i]", 128, 128, 181)},
                  {{"knots"}, "knots", json_array()},
                  {{"documents"}, "documents", json_integer(0)},
                  {{"ensembles"}, "sum", json_object()},
                  {{"layers"}, "layers", json_array()},
                  {{"ensembles", "max", "budget"}, "budget", json_array()},
                  {{"ensembles", "mean", "reliability"}, "reliability", json_integer(1)},
                  {{"fold", "scale"}, "scale", json_array()},
                  {{"fold", "after", "kept"}, "kept", json_array()}};
    for (size_t i = 0; i < sizeof damage / sizeof *damage; i++) {
        json_t *bad = json_deep_copy(o), *at = bad;
        int d = 0;
        for (; damage[i].path[d + 1]; d++) at = json_object_get(at, damage[i].path[d]);
        json_object_set_new(at, damage[i].path[d], damage[i].value);
        refuse(bad, f.geom.ord, damage[i].text);
        json_decref(bad);
    }
    json_t *bad = json_deep_copy(o);
    json_t *e = json_array_get(
        json_object_get(json_object_get(json_object_get(bad, "ensembles"), "sum"), "budget"), 2);
    json_array_set_new(json_object_get(e, "kept"), 0, json_real(1.5));
    refuse(bad, f.geom.ord, "between 0 and 1");
    json_object_set_new(e, "target", json_real(0.13));
    refuse(bad, f.geom.ord, "target");
    json_decref(bad);
    bad = json_deep_copy(o);
    json_object_set_new(json_array_get(json_object_get(bad, "layers"), 0), "temperature", json_real(0));
    refuse(bad, f.geom.ord, "temperature");
    json_decref(bad);
    json_decref(o);
    lsa_free(c);
    lsa_free(back);
    lsa_measure_close(m);
    lsa_indexer_file_fini(&f);
}

static void test_not_finite(void **state) {
    (void)state;
    lsa_indexer_file f = make_file(0, false);
    f.params[lsa_indexer_tensor_at(&f.geom, 1, LSA_W_PROJ).offset] = NAN;
    lsa_measure *m = open_all(&f);
    lsa_calibration *c = NULL;
    lsa_err err = {0};
    assert_int_equal(LSA_NEW(c, 1, NULL), LSA_OK);
    assert_int_equal(lsa_calibrate(c, m, &f.geom, &err), LSA_E_NUMERIC);
    lsa_free(c);
    lsa_measure_close(m);
    lsa_indexer_file_fini(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_counts),  cmocka_unit_test(test_continued),
                                       cmocka_unit_test(test_threads), cmocka_unit_test(test_fold),
                                       cmocka_unit_test(test_json),    cmocka_unit_test(test_not_finite)};
    lsa_log_set_level(LSA_LOG_QUIET);
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-calibrate-XXXXXX");
    if (!mkdtemp(g_dir)) return 1;
    hand_shards(g_dir, 64);
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
