/* Evaluation over all candidates of held-out documents: never more than one group of windows in memory. */
#ifndef LSA_TRAINER_EVAL_H
#define LSA_TRAINER_EVAL_H

#include "trainer/step.h"

enum { LSA_EVAL_BUDGETS = 3, LSA_EVAL_LENGTHS = 4 };
extern const double
    lsa_eval_budgets[LSA_EVAL_BUDGETS]; /* 0.05 0.10 0.20; the recipe's own budget comes on top */
extern const int64_t lsa_eval_lengths[LSA_EVAL_LENGTHS]; /* documents up to 16K, 64K, 256K, longer */

typedef struct lsa_scores {
    char name[16];                                      /* "c0" ..., "plain", "mean", "max", "sum" */
    int64_t n_window, n_cand, tp, fp, fn, hit_k, n_pos; /* micro counts at the threshold and in the top K */
    double macro_recall_k, macro_p, macro_r, macro_f1;  /* sums over the n_macro windows with a positive */
    int64_t n_macro;
    double captured[LSA_EVAL_BUDGETS + 1], total_mass; /* summed; last: the recipe's budget */
} lsa_scores;
/* One window under one score: golden chunks (n_pos), chunks at or above the threshold (have), both (tp),
 * golden ones in the top K. */
typedef struct lsa_window_scores {
    int64_t n_cand, n_pos, have, tp, hit_k;
    double captured[LSA_EVAL_BUDGETS + 1], total_mass;
} lsa_window_scores;
void lsa_scores_window(lsa_scores *s, const lsa_window_scores *w);
double lsa_precision(const lsa_scores *s);
double lsa_recall(const lsa_scores *s);
double lsa_f1(const lsa_scores *s);

typedef struct lsa_eval {
    int32_t n; /* rows: joint layers, then plain (only with a continuation or a prior), mean, max, sum */
    lsa_scores row[LSA_MAX_CSA + 4];        /* sum: with the prior, continued; plain: without both */
    lsa_scores by_length[LSA_EVAL_LENGTHS]; /* of the sum ensemble */
    bool has_mass;
    int32_t n_layer, reach;
    float cost[LSA_MAX_REACH]; /* of the continuation */
    bool prior;
    float prior_weight[LSA_PRIOR_WEIGHTS];
} lsa_eval;

double lsa_eval_budget(const lsa_recipe *r, int b); /* b of lsa_scores.captured */
void lsa_eval_begin(lsa_eval *e, const lsa_source *s,
                    const lsa_indexer_geom *g); /* rows named, nothing counted */
int lsa_eval_bin(int64_t n_token);              /* index of by_length */

/* All windows of one document, added to row [e->n]. */
typedef lsa_status lsa_eval_document(void *user, lsa_scores *row, const lsa_eval *e, int64_t doc,
                                     int64_t n_window, lsa_err *err);
/* Documents [first, last) of the source into a begun evaluation: dealt to the ranks of comm (NULL: one), and
 * their scores added in the documents' order, so that every number of ranks gives every rank the same bits.
 */
LSA_NODISCARD lsa_status lsa_eval_documents(lsa_eval *e, lsa_comm *comm, lsa_source *s, int64_t first,
                                            int64_t last, lsa_eval_document *score, void *user, lsa_err *err);

/* The same by a trainer. Candidates are the evictable chunks if the recipe excludes resident ones. */
LSA_NODISCARD lsa_status lsa_evaluate(lsa_eval *out, lsa_trainer *t, lsa_comm *comm, lsa_source *s,
                                      const lsa_recipe *r, const lsa_indexer_geom *g, int64_t first,
                                      int64_t last, lsa_err *err);
/* The number that picks the best checkpoint; larger is better. */
double lsa_eval_value(const lsa_eval *e, const lsa_recipe *r);
json_t *lsa_eval_json(const lsa_eval *e, const lsa_recipe *r);
void lsa_eval_print(const lsa_eval *e, const lsa_recipe *r);

#endif
