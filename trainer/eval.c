/* Evaluation: see eval.h. The mistake that would stay silent: counting chunks that are resident anyway, which
 * flatters every score; candidates are those of training. */
#include "trainer/eval.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/cpu/topk.h"
#include "kernels/continuation.h"
#include "kernels/prior.h"
#include "trainer/observer.h"

const double lsa_eval_budgets[LSA_EVAL_BUDGETS] = {0.05, 0.10, 0.20};
const int64_t lsa_eval_lengths[LSA_EVAL_LENGTHS] = {16384, 65536, 262144, INT64_MAX};
enum { GROUP = 64 };

double lsa_precision(const lsa_scores *s) {
    return s->tp + s->fp ? (double)s->tp / (double)(s->tp + s->fp) : 0;
}
double lsa_recall(const lsa_scores *s) {
    return s->tp + s->fn ? (double)s->tp / (double)(s->tp + s->fn) : 0;
}
double lsa_f1(const lsa_scores *s) {
    const double p = lsa_precision(s), r = lsa_recall(s);
    return p + r > 0 ? 2 * p * r / (p + r) : 0;
}

static float sigmoid(float z) {
    return 1.0f / (1.0f + expf(-z));
}

void lsa_scores_window(lsa_scores *s, const lsa_window_scores *w) {
    s->n_window++;
    s->n_cand += w->n_cand;
    s->tp += w->tp;
    s->fp += w->have - w->tp;
    s->fn += w->n_pos - w->tp;
    s->hit_k += w->hit_k;
    s->n_pos += w->n_pos;
    if (w->n_pos) {
        const double precision = w->have ? (double)w->tp / (double)w->have : 0,
                     recall = (double)w->tp / (double)w->n_pos;
        s->macro_recall_k += (double)w->hit_k / (double)w->n_pos;
        s->macro_p += precision;
        s->macro_r += recall;
        s->macro_f1 += w->tp ? 2 * precision * recall / (precision + recall) : 0;
        s->n_macro++;
    }
    s->total_mass += w->total_mass;
    for (int b = 0; b <= LSA_EVAL_BUDGETS; b++) s->captured[b] += w->captured[b];
}

double lsa_eval_budget(const lsa_recipe *r, int b) {
    return b < LSA_EVAL_BUDGETS ? lsa_eval_budgets[b] : r->budget;
}

/* Counts one window under one score. prob: compared with the threshold; rank: orders the top-k. */
static void count(lsa_scores *s, const float *prob, const float *rank, const uint8_t *votes,
                  const float *mass, int64_t n, const lsa_recipe *r, float *scratch, int32_t *sel) {
    lsa_window_scores w = {.n_cand = n};
    for (int64_t c = 0; c < n; c++) {
        const bool want = votes[c] > 0, have = prob[c] >= (float)r->threshold;
        w.n_pos += want;
        w.have += have;
        w.tp += want && have;
        if (mass) w.total_mass += (double)mass[c];
    }
    const int64_t k = lsa_topk(rank, n, r->topk, NULL, 0, scratch, sel);
    for (int64_t i = 0; i < k; i++) w.hit_k += votes[sel[i]] > 0;
    for (int b = 0; mass && b <= LSA_EVAL_BUDGETS; b++) {
        const int64_t kept =
            lsa_topk(rank, n, lsa_budget_chunks(lsa_eval_budget(r, b), n), NULL, 0, scratch, sel);
        for (int64_t i = 0; i < kept; i++) w.captured[b] += (double)mass[sel[i]];
    }
    lsa_scores_window(s, &w);
}

static void add(lsa_scores *a, const lsa_scores *b) {
    a->n_window += b->n_window, a->n_cand += b->n_cand, a->tp += b->tp, a->fp += b->fp, a->fn += b->fn;
    a->hit_k += b->hit_k, a->n_pos += b->n_pos, a->macro_recall_k += b->macro_recall_k,
        a->n_macro += b->n_macro;
    a->macro_p += b->macro_p, a->macro_r += b->macro_r, a->macro_f1 += b->macro_f1;
    a->total_mass += b->total_mass;
    for (int i = 0; i <= LSA_EVAL_BUDGETS; i++) a->captured[i] += b->captured[i];
}

/* All scores of one window from the layers' logits z[l], stride m*n; recent and memory: features of the
 * prior. */
static lsa_status window_scores(lsa_scores *row, const lsa_eval *e, const float *z, int64_t stride,
                                const float *recent, const float *memory, const uint8_t *votes,
                                const float *mass, int64_t n, const lsa_recipe *r, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int32_t L = e->n_layer, last = e->n - 1;
    float *p = NULL, *mean = NULL, *max = NULL, *sum = NULL, *scratch = NULL;
    int32_t *sel = NULL;
    LSA_TRY(LSA_NEW(p, n, err));
    LSA_TRY(LSA_NEW(mean, n, err));
    LSA_TRY(LSA_NEW(max, n, err));
    LSA_TRY(LSA_NEW(sum, n, err));
    LSA_TRY(LSA_NEW(scratch, n, err));
    LSA_TRY(LSA_NEW(sel, n, err));
    for (int32_t l = 0; l < L; l++) {
        const float *zl = z + l * stride;
        for (int64_t c = 0; c < n; c++) {
            p[c] = sigmoid(zl[c]);
            mean[c] += p[c] / (float)L;
            max[c] = fmaxf(max[c], p[c]);
            sum[c] += zl[c];
        }
        count(&row[l], p, zl, votes, mass, n, r, scratch, sel);
    }
    count(&row[last - 2], mean, mean, votes, mass, n, r, scratch, sel);
    count(&row[last - 1], max, max, votes, mass, n, r, scratch, sel);
    for (int whole = e->reach || e->prior ? 0 : 1; whole < 2; whole++) {
        for (int64_t c = 0; whole && e->prior && c < n; c++)
            sum[c] += lsa_prior_value(e->prior_weight, recent[c], memory[c]);
        if (whole) lsa_continue(sum, NULL, sum, n, e->cost, e->reach);
        for (int64_t c = 0; c < n; c++) p[c] = sigmoid(sum[c]);
        count(&row[whole ? last : L], p, sum, votes, mass, n, r, scratch, sel);
    }
done:
    lsa_free(p);
    lsa_free(mean);
    lsa_free(max);
    lsa_free(sum);
    lsa_free(scratch);
    lsa_free(sel);
    return st;
}

/* One group of windows (with a prior: observed already), added to row [e->n]; the windows run in parallel
 * into rows of their own and are added in order. */
static lsa_status group_scores(lsa_scores *row, const lsa_eval *e, const lsa_batch *b, const lsa_train_doc *d,
                               lsa_source *s, const lsa_recipe *r, int64_t first, const float *z,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_scores *rows = NULL;
    bool failed = false;
    LSA_TRY(LSA_NEW(rows, b->m * e->n, err));
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < b->m; i++) {
        float *mass = NULL;
        uint8_t *votes = NULL;
        lsa_window w;
        if (lsa_window_at(&w, s, d, first + i, NULL) != LSA_OK || LSA_NEW(votes, w.n_cand, NULL) != LSA_OK ||
            (e->has_mass && LSA_NEW(mass, w.n_cand, NULL) != LSA_OK)) {
#pragma omp atomic write
            failed = true;
        } else {
            lsa_window_needs(NULL, votes, s, d, &w);
            if (mass) lsa_window_native(mass, r->sharpen, d, &w);
            const float *recent = e->prior ? b->recent + i * b->n : NULL,
                        *memory = e->prior ? b->memory + i * b->n : NULL;
            if (window_scores(rows + i * e->n, e, z + i * b->n, b->m * b->n, recent, memory, votes, mass,
                              w.n_cand, r, NULL) != LSA_OK) {
#pragma omp atomic write
                failed = true;
            }
        }
        lsa_free(mass);
        lsa_free(votes);
    }
    if (failed) LSA_FAIL(LSA_E_NOMEM, "out of memory in the evaluation of document %lld", (long long)d->doc);
    for (int64_t i = 0; i < b->m; i++)
        for (int32_t k = 0; k < e->n; k++) add(&row[k], &rows[i * e->n + k]);
done:
    lsa_free(rows);
    return st;
}

void lsa_eval_begin(lsa_eval *e, const lsa_source *s, const lsa_indexer_geom *g) {
    memset(e, 0, sizeof *e);
    e->n_layer = g->n_layer;
    e->reach = g->reach;
    e->prior = g->prior;
    e->n = g->n_layer + 3 + (g->reach > 0 || g->prior);
    e->has_mass = lsa_shards_get_info(lsa_source_shards(s))->has_stats;
    for (int32_t l = 0; l < g->n_layer; l++)
        snprintf(e->row[l].name, sizeof e->row[l].name, "c%d", g->ord[l].v);
    if (g->reach || g->prior) snprintf(e->row[g->n_layer].name, 16, "plain");
    snprintf(e->row[e->n - 3].name, 16, "mean");
    snprintf(e->row[e->n - 2].name, 16, "max");
    snprintf(e->row[e->n - 1].name, 16, "sum");
}

int lsa_eval_bin(int64_t n_token) {
    int bin = 0;
    while (n_token > lsa_eval_lengths[bin]) bin++;
    return bin;
}

typedef struct scorer {
    lsa_trainer *t;
    lsa_comm *comm;
    lsa_source *s;
    const lsa_recipe *r;
    const lsa_indexer_geom *g;
} scorer;

static lsa_status score_document(void *user, lsa_scores *row, const lsa_eval *e, int64_t doc,
                                 int64_t n_window, lsa_err *err) {
    lsa_status st = LSA_OK;
    const scorer *const x = user;
    lsa_batch b = {0};
    lsa_observer o = {0};
    const lsa_train_doc *d;
    float *z = NULL;
    int64_t cap = 0;
    for (int64_t w = 0; w < n_window; w += GROUP) {
        const int64_t m = lsa_min_i64(GROUP, n_window - w);
        if (x->comm) lsa_comm_tick(x->comm, "evaluating");
        if (x->comm) LSA_TRY(lsa_comm_check(x->comm, err));
        LSA_TRY(lsa_batch_document(&b, x->s, doc, w, m, x->g, err));
        const int64_t need = x->g->n_layer * m * b.n;
        if (need > cap) {
            lsa_free(z);
            z = NULL;
            LSA_TRY(LSA_NEW(z, need, err));
            cap = need;
        }
        LSA_TRY(lsa_trainer_score(x->t, &b, z, err));
        if (e->prior)
            LSA_TRY(lsa_observe(
                &o, &b,
                &(lsa_observe_args){z, e->n_layer, m * b.n, x->r->budget, e->prior_weight, e->cost, e->reach},
                err));
        LSA_TRY(lsa_source_get(&d, x->s, doc, err));
        LSA_TRY(group_scores(row, e, &b, d, x->s, x->r, w, z, err));
    }
done:
    lsa_observer_fini(&o);
    lsa_batch_fini(&b);
    lsa_free(z);
    return st;
}

lsa_status lsa_eval_documents(lsa_eval *e, lsa_comm *comm, lsa_source *s, int64_t first, int64_t last,
                              lsa_eval_document *score, void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int rank = comm ? lsa_comm_rank(comm) : 0, size = comm ? lsa_comm_size(comm) : 1;
    const int64_t n_doc = last - first;
    int64_t *n_window = NULL, *next = NULL, block = 0, mine = 0;
    int32_t *to = NULL;
    lsa_scores *own = NULL, *all = NULL; /* [documents of a rank][e->n]; the same of every rank */
    LSA_TRY(LSA_NEW(n_window, n_doc, err));
    LSA_TRY(LSA_NEW(to, n_doc, err));
    LSA_TRY(LSA_NEW(next, size, err));
    for (int64_t i = 0; i < n_doc; i++) LSA_TRY(lsa_source_n_window(&n_window[i], s, first + i, err));
    LSA_TRY(lsa_deal(to, n_window, n_doc, size, err));
    for (int64_t i = 0; i < n_doc; i++) block = lsa_max_i64(block, ++next[to[i]]);
    LSA_TRY(LSA_NEW(own, block * e->n, err));
    LSA_TRY(LSA_NEW(all, size * block * e->n, err));
    for (int64_t i = 0; i < n_doc; i++)
        if (to[i] == rank) LSA_TRY(score(user, own + e->n * mine++, e, first + i, n_window[i], err));
    const int64_t bytes = block * e->n * (int64_t)sizeof *own;
    if (comm)
        LSA_TRY(lsa_comm_all_gather(comm, own, all, bytes, err));
    else if (bytes)
        memcpy(all, own, (size_t)bytes);
    memset(next, 0, (size_t)size * sizeof *next);
    for (int64_t i = 0; i < n_doc; i++) {
        const lsa_scores *row = all + (to[i] * block + next[to[i]]++) * e->n;
        const int bin = lsa_eval_bin(lsa_shards_get_doc(lsa_source_shards(s), first + i).n_token);
        for (int32_t k = 0; k < e->n; k++) add(&e->row[k], &row[k]);
        add(&e->by_length[bin], &row[e->n - 1]);
    }
done:
    lsa_free(n_window);
    lsa_free(next);
    lsa_free(to);
    lsa_free(own);
    lsa_free(all);
    return st;
}

lsa_status lsa_evaluate(lsa_eval *e, lsa_trainer *t, lsa_comm *comm, lsa_source *s, const lsa_recipe *r,
                        const lsa_indexer_geom *g, int64_t first, int64_t last, lsa_err *err) {
    lsa_status st = LSA_OK;
    scorer x = {t, comm, s, r, g};
    lsa_eval_begin(e, s, g);
    LSA_TRY(lsa_trainer_costs(t, e->cost, err));
    LSA_TRY(lsa_trainer_prior(t, e->prior_weight, err));
    LSA_TRY(lsa_eval_documents(e, comm, s, first, last, score_document, &x, err));
done:
    return st;
}

static double captured(const lsa_scores *s, int b) {
    return s->total_mass > 0 ? s->captured[b] / s->total_mass : 0;
}

double lsa_eval_value(const lsa_eval *e, const lsa_recipe *r) {
    const lsa_scores *mean = &e->row[e->n - 3], *sum = &e->row[e->n - 1];
    if (r->metric == LSA_METRIC_F1) return lsa_f1(mean);
    if (r->metric == LSA_METRIC_RECALL) return mean->n_pos ? (double)mean->hit_k / (double)mean->n_pos : 0;
    return captured(sum, LSA_EVAL_BUDGETS);
}

static json_t *scores_json(const lsa_scores *s, bool has_mass) {
    json_t *o =
        json_pack("{s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f}", "windows", (json_int_t)s->n_window,
                  "candidates", (json_int_t)s->n_cand, "precision", lsa_precision(s), "recall", lsa_recall(s),
                  "f1", lsa_f1(s), "kept", s->n_cand ? (double)(s->tp + s->fp) / (double)s->n_cand : 0.0,
                  "recall_at_k", s->n_pos ? (double)s->hit_k / (double)s->n_pos : 0.0, "macro_recall_at_k",
                  s->n_macro ? s->macro_recall_k / (double)s->n_macro : 0.0);
    const double n_macro = s->n_macro ? (double)s->n_macro : 1.0;
    json_object_set_new(o, "macro_precision", json_real(s->macro_p / n_macro));
    json_object_set_new(o, "macro_recall", json_real(s->macro_r / n_macro));
    json_object_set_new(o, "macro_f1", json_real(s->macro_f1 / n_macro));
    for (int b = 0; has_mass && b <= LSA_EVAL_BUDGETS; b++) {
        char key[32];
        if (b < LSA_EVAL_BUDGETS)
            snprintf(key, sizeof key, "captured_%.2f", lsa_eval_budgets[b]);
        else
            snprintf(key, sizeof key, "captured");
        json_object_set_new(o, key, json_real(captured(s, b)));
    }
    return o;
}

json_t *lsa_eval_json(const lsa_eval *e, const lsa_recipe *r) {
    json_t *o = json_object(), *len = json_object();
    for (int32_t i = 0; i < e->n; i++)
        json_object_set_new(o, e->row[i].name, scores_json(&e->row[i], e->has_mass));
    for (int i = 0; i < LSA_EVAL_LENGTHS; i++) {
        char key[32];
        if (e->by_length[i].n_window == 0) continue;
        if (i + 1 < LSA_EVAL_LENGTHS)
            snprintf(key, sizeof key, "up_to_%lld", (long long)lsa_eval_lengths[i]);
        else
            snprintf(key, sizeof key, "longer");
        json_object_set_new(len, key, scores_json(&e->by_length[i], e->has_mass));
    }
    json_object_set_new(o, "by_length", len);
    json_object_set_new(o, "k", json_integer(r->topk));
    json_object_set_new(o, "threshold", json_real(r->threshold));
    json_object_set_new(o, "budget", json_real(r->budget));
    return o;
}

static void print_row(const char *name, const lsa_scores *s, bool has_mass) {
    printf("%-14s %9.4f %9.4f %9.4f %9.4f %9.4f %9.4f", name, lsa_precision(s), lsa_recall(s), lsa_f1(s),
           s->n_macro ? s->macro_f1 / (double)s->n_macro : 0.0,
           s->n_cand ? (double)(s->tp + s->fp) / (double)s->n_cand : 0.0,
           s->n_pos ? (double)s->hit_k / (double)s->n_pos : 0.0);
    for (int b = 0; has_mass && b <= LSA_EVAL_BUDGETS; b++) printf("  %13.4f", captured(s, b));
    printf("\n");
}

void lsa_eval_print(const lsa_eval *e, const lsa_recipe *r) {
    printf("%-14s %9s %9s %9s %9s %9s %9s", "score", "precision", "recall", "F1", "macro F1", "kept",
           "recall@K");
    for (int b = 0; e->has_mass && b <= LSA_EVAL_BUDGETS; b++)
        printf("  captured %2.0f %%", 100 * (b < LSA_EVAL_BUDGETS ? lsa_eval_budgets[b] : r->budget));
    printf("\n");
    for (int32_t i = 0; i < e->n; i++) print_row(e->row[i].name, &e->row[i], e->has_mass);
    for (int i = 0; i < LSA_EVAL_LENGTHS; i++) {
        char name[32];
        if (e->by_length[i].n_window == 0) continue;
        if (i + 1 < LSA_EVAL_LENGTHS)
            snprintf(name, sizeof name, "sum, <= %lldK", (long long)lsa_eval_lengths[i] >> 10);
        else
            snprintf(name, sizeof name, "sum, > %lldK", (long long)lsa_eval_lengths[i - 1] >> 10);
        print_row(name, &e->by_length[i], e->has_mass);
    }
    printf("%lld windows, K = %lld, threshold %g; candidates are the chunks that %s\n",
           (long long)e->row[0].n_window, (long long)r->topk, r->threshold,
           r->exclude_resident && r->causal ? "can be evicted"
           : r->causal                      ? "are visible"
                                            : "exist in the document");
    char continued[48] = "";
    if (e->reach) snprintf(continued, sizeof continued, ", continued over %d chunks", e->reach);
    if (e->reach || e->prior)
        printf("sum: the summed logits%s%s; plain: without %s\n", e->prior ? ", observed mass added" : "",
               continued,
               e->reach && e->prior ? "both"
               : e->prior           ? "the observed mass"
                                    : "the continuation");
}
