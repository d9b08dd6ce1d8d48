/* Evaluation against a slow count: the logits come from the trainer, everything after them (thresholds, ranks
 * with ties to the lower chunk, masses, ensembles, sums over windows and documents) is counted again here
 * from the hand-made truth. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "tests/testkit/hand_shards.h"
#include "trainer/eval.h"

enum { ROWS = HAND_LAYERS + 4 };            /* without a continuation or a prior one row less */
#define COST(j) (0.004f * (float)(j))       /* of the continuation, about the spread of the sums */
static const float PRIOR[] = {0.8f, -0.4f}; /* of the observed mass, likewise */
static char g_dir[64];

typedef struct slow {
    double tp, fp, fn, hit, pos, cand, macro_p, macro_r, macro_f1, macro_hit, n_macro, total, kept_mass[4];
} slow;

/* Is chunk c among the k best of n by score, ties to the lower chunk? */
static bool in_top(const float *score, int64_t n, int64_t k, int64_t c) {
    int64_t before = 0;
    for (int64_t j = 0; j < n; j++) before += score[j] > score[c] || (score[j] == score[c] && j < c);
    return before < k;
}

static void count_window(slow *s, const float *prob, const float *rank, int64_t doc, int64_t start, int64_t n,
                         const lsa_recipe *r) {
    double tp = 0, fp = 0, fn = 0, hit = 0;
    const double budget[4] = {0.05, 0.10, 0.20, r->budget};
    for (int64_t c = 0; c < n; c++) {
        const bool want = hand_votes(doc, start, start + 64, c, r->min_layers) > 0,
                   have = prob[c] >= (float)r->threshold;
        const double mass = hand_mass(doc, start, start + 64, c);
        tp += want && have, fp += !want && have, fn += want && !have;
        hit += want && in_top(rank, n, r->topk, c);
        s->total += mass;
        for (int b = 0; b < 4; b++)
            if (in_top(rank, n, lsa_budget_chunks(budget[b], n), c)) s->kept_mass[b] += mass;
    }
    s->tp += tp, s->fp += fp, s->fn += fn, s->hit += hit, s->pos += tp + fn, s->cand += (double)n;
    if (tp + fn > 0) {
        const double p = tp + fp > 0 ? tp / (tp + fp) : 0, q = tp / (tp + fn);
        s->macro_p += p, s->macro_r += q, s->macro_f1 += tp > 0 ? 2 * p * q / (p + q) : 0,
            s->macro_hit += hit / (tp + fn), s->n_macro++;
    }
}

static float sigmoid(float z) {
    return 1.0f / (1.0f + expf(-z));
}

/* The observed masses of a document as decoding sees them. */
typedef struct history {
    double m[HAND_LONGEST], M[HAND_LONGEST];
} history;
static float slow_prior(const history *s, int64_t c) {
    return (float)((double)PRIOR[0] * log1p(s->m[c] / 1e-3) + (double)PRIOR[1] * log1p(s->M[c] / 1e-3));
}
/* The window at `start` ends; score [n]: what ranked its evictable chunks; NULL: nothing was evicted. */
static void slow_observe(history *s, int64_t doc, int64_t start, const float *score, int64_t n,
                         double budget) {
    for (int64_t c = 0; c < HAND_LONGEST / 4; c++) {
        const bool seen = !score || c >= n || in_top(score, n, lsa_budget_chunks(budget, n), c);
        s->M[c] = 0.9 * s->M[c] + s->m[c];
        s->m[c] = seen ? hand_mass(doc, start, start + 64, c) / (64 * HAND_LAYERS) : 0;
    }
}

static void slow_document(slow row[ROWS], lsa_trainer *t, lsa_source *s, const lsa_recipe *r,
                          const lsa_indexer_geom *g, int64_t doc) {
    lsa_batch b = {0};
    int64_t m;
    float *z = NULL;
    assert_int_equal(lsa_source_n_window(&m, s, doc, NULL), LSA_OK);
    if (m == 0) return;
    assert_int_equal(lsa_batch_document(&b, s, doc, 0, m, g, NULL), LSA_OK);
    assert_int_equal(LSA_NEW(z, HAND_LAYERS * m * b.n, NULL), LSA_OK);
    assert_int_equal(lsa_trainer_score(t, &b, z, NULL), LSA_OK);
    history seen = {{0}, {0}};
    for (int64_t w = 0; w < b.start[0]; w += 64) slow_observe(&seen, doc, w, NULL, 0, 0);
    for (int64_t i = 0; i < m; i++) {
        const int64_t n = b.n_cand[i];
        float p[HAND_LONGEST], mean[HAND_LONGEST], max[HAND_LONGEST], sum[HAND_LONGEST], psum[HAND_LONGEST];
        for (int64_t c = 0; c < n; c++) mean[c] = max[c] = sum[c] = 0;
        for (int l = 0; l < HAND_LAYERS; l++) {
            const float *zl = z + (l * m + i) * b.n;
            for (int64_t c = 0; c < n; c++) {
                p[c] = sigmoid(zl[c]);
                mean[c] += p[c] / (float)HAND_LAYERS, max[c] = p[c] > max[c] ? p[c] : max[c], sum[c] += zl[c];
            }
            count_window(&row[l], p, zl, doc, b.start[i], n, r);
        }
        for (int64_t c = 0; c < n; c++) psum[c] = sigmoid(sum[c]);
        slow *const joint = row + HAND_LAYERS + (g->reach > 0 || g->prior);
        count_window(&joint[0], mean, mean, doc, b.start[i], n, r);
        count_window(&joint[1], max, max, doc, b.start[i], n, r);
        if (g->reach || g->prior) count_window(&row[HAND_LAYERS], psum, sum, doc, b.start[i], n, r);
        for (int64_t c = 0; g->prior && c < n; c++) {
            sum[c] += slow_prior(&seen, c);
            psum[c] = sigmoid(sum[c]);
        }
        for (int64_t c = n - 1; g->reach && c >= 0;
             c--) { /* from the end: the chunks before are still plain */
            for (int64_t j = 1; j <= g->reach && j <= c; j++) sum[c] = fmaxf(sum[c], sum[c - j] - COST(j));
            psum[c] = sigmoid(sum[c]);
        }
        count_window(&joint[2], psum, sum, doc, b.start[i], n, r);
        slow_observe(&seen, doc, b.start[i], sum, n, r->budget);
    }
    lsa_free(z);
    lsa_batch_fini(&b);
}

static void near_to(const char *what, double a, double b) {
    if (!(fabs(a - b) <= 1e-9 + 1e-6 * fabs(b))) fail_msg("%s: %.9g, counted %.9g", what, a, b);
}

static void against_slow_count(int32_t reach, bool prior) {
    const bool more = reach > 0 || prior;
    const int rows = HAND_LAYERS + 3 + more;
    const char *set[] = {"window.tail=64",     "sample.min_layers=2",
                         "eval.topk=9",        "eval.budget=0.33",
                         "eval.threshold=0.5", prior ? "model.prior=true" : "model.prior=false"};
    lsa_recipe r;
    lsa_indexer_geom g = {.hidden = HAND_HIDDEN,
                          .n_head = 16,
                          .head_dim = 128,
                          .rank = 4,
                          .eps = 1e-6f,
                          .n_layer = HAND_LAYERS,
                          .reach = reach,
                          .prior = prior};
    lsa_ctx *ctx = NULL;
    lsa_source *s = NULL;
    lsa_trainer *t = NULL;
    lsa_eval e;
    lsa_err err = {0};
    float *p = NULL;
    slow row[ROWS] = {{0}};
    assert_int_equal(lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, NULL, set, 6, &err), LSA_OK);
    g.rope = (lsa_rope){
        .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    for (int32_t l = 0; l < HAND_LAYERS; l++) g.ord[l].v = l, g.id[l].v = 2 * l + 1;
    assert_int_equal(LSA_NEW(p, lsa_indexer_n_param(&g), NULL), LSA_OK);
    lsa_indexer_init_random(p, &g, 5);
    for (int32_t j = 1; j <= reach; j++) p[lsa_indexer_costs_at(&g) + j - 1] = COST(j);
    for (int k = 0; prior && k < 2; k++) p[lsa_indexer_prior_at(&g) + k] = PRIOR[k];
    assert_int_equal(lsa_ctx_create(&ctx, "cpu", &err), LSA_OK);
    if (lsa_source_open(&s, g_dir, &r, &g, true, &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_int_equal(lsa_trainer_create(&t, ctx, NULL, 1, &r, &g, p, NULL, NULL, 0, &err), LSA_OK);
    if (lsa_evaluate(&e, t, NULL, s, &r, &g, 1, HAND_DOCS, &err) != LSA_OK) fail_msg("%s", err.msg);
    for (int64_t doc = 1; doc < HAND_DOCS; doc++) slow_document(row, t, s, &r, &g, doc);
    json_t *o = lsa_eval_json(&e, &r);
    assert_int_equal(e.n, rows);
    for (int k = 0; k < rows; k++) {
        static const char *const names[2][ROWS] = {{"c0", "c1", "mean", "max", "sum"},
                                                   {"c0", "c1", "plain", "mean", "max", "sum"}};
        const char *const *name = names[more];
        const slow *w = &row[k];
        const json_t *j = json_object_get(o, name[k]);
        const double prec = w->tp / (w->tp + w->fp), rec = w->tp / (w->tp + w->fn);
        const struct {
            const char *key;
            double want;
        } c[] = {{"precision", prec},
                 {"recall", rec},
                 {"f1", 2 * prec * rec / (prec + rec)},
                 {"kept", (w->tp + w->fp) / w->cand},
                 {"recall_at_k", w->hit / w->pos},
                 {"macro_recall_at_k", w->macro_hit / w->n_macro},
                 {"macro_precision", w->macro_p / w->n_macro},
                 {"macro_recall", w->macro_r / w->n_macro},
                 {"macro_f1", w->macro_f1 / w->n_macro},
                 {"captured_0.05", w->kept_mass[0] / w->total},
                 {"captured_0.10", w->kept_mass[1] / w->total},
                 {"captured_0.20", w->kept_mass[2] / w->total},
                 {"captured", w->kept_mass[3] / w->total}};
        if (!(w->tp > 0 && w->fp > 0 && w->fn > 0)) fail_msg("%s: %g %g %g", name[k], w->tp, w->fp, w->fn);
        for (size_t i = 0; i < sizeof c / sizeof *c; i++)
            near_to(c[i].key, json_number_value(json_object_get(j, c[i].key)), c[i].want);
    }
    near_to("value", lsa_eval_value(&e, &r), row[rows - 1].kept_mass[3] / row[rows - 1].total);
    assert_non_null(json_object_get(json_object_get(o, "by_length"), "up_to_16384"));
    if (more) /* or the rows do not tell whether it was applied */
        assert_true(row[HAND_LAYERS].kept_mass[3] != row[rows - 1].kept_mass[3]);
    json_decref(o);
    lsa_trainer_destroy(t);
    lsa_source_close(s);
    lsa_ctx_destroy(ctx);
    lsa_free(p);
}

static void test_plain(void **state) {
    (void)state;
    against_slow_count(0, false);
}
static void test_continued(void **state) {
    (void)state;
    against_slow_count(3, false);
}
static void test_prior(void **state) {
    (void)state;
    against_slow_count(0, true);
    against_slow_count(3, true);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_plain), cmocka_unit_test(test_continued),
                                       cmocka_unit_test(test_prior)};
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-eval-XXXXXX");
    if (!mkdtemp(g_dir)) return 1;
    hand_shards(g_dir, 64);
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
