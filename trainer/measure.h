/* What selection rules do on documents: every window of the decoder's rhythm (starts at multiples of tau),
 * all its evictable chunks, streamed group by group. The results do not depend on the number of threads. One
 * thread calls; windows of a group are looked at in parallel. */
#ifndef LSA_TRAINER_MEASURE_H
#define LSA_TRAINER_MEASURE_H

#include "data/calibration.h"
#include "data/indexer_file.h"
#include "trainer/step.h"

/* ---- documents to look at ---- */

typedef struct lsa_measure lsa_measure;

/* Documents of the shards for an indexer: `documents` is "A:B" or NULL for all (for the data it was trained
 * on: the held-out ones). LSA_E_CONFIG: shards of another teacher; LSA_E_ARG: documents it was trained on,
 * unless force. f is borrowed; its parameters are copied. */
LSA_NODISCARD lsa_status lsa_measure_open(lsa_measure **out, const lsa_indexer_file *f, const char *data,
                                          const char *documents, const char *device, bool force,
                                          lsa_err *err);
void lsa_measure_close(lsa_measure *m); /* NULL allowed */
/* Other weights from now on. */
LSA_NODISCARD lsa_status lsa_measure_params(lsa_measure *m, const float *params, lsa_err *err);

typedef struct lsa_measure_info {
    char data_hash[17];
    int64_t range; /* documents looked at, */
    int64_t documents, windows,
        longest_tokens; /* those long enough for a window, their windows and longest */
    int64_t longest;    /* visible chunks at the last window */
    int64_t tail_chunks;
    bool has_mass; /* native masses are there: captured is known */
} lsa_measure_info;
lsa_measure_info lsa_measure_get_info(const lsa_measure *m);

/* ---- one look at every window ---- */

typedef struct lsa_seen {
    int64_t doc; /* 0, 1, ... among the documents looked at */
    int64_t visible, n;
    const float *z; /* logits of layer l: z + l * stride, n of them; finite */
    int64_t stride;
    const float *prior;   /* [n] what observed mass adds to the sum of the logits, or NULL */
    const uint8_t *votes; /* [n] golden where > 0 */
    const float *mass;    /* [n] native mass, or NULL */
} lsa_seen;

/* begin: serial, before; z, prior, votes and mass are not there yet. look: parallel, into a zeroed row of its
 * own. add: serial, in order. begin and add may be NULL. */
typedef struct lsa_look {
    const char *what; /* for the progress line */
    size_t row_bytes;
    void *arg;
    lsa_status (*begin)(void *arg, const lsa_seen *w, lsa_err *err);
    lsa_status (*look)(void *arg, void *row, const lsa_seen *w);
    void (*add)(void *arg, const void *row, const lsa_seen *w);
} lsa_look;
/* LSA_E_NUMERIC: a logit is not finite. LSA_E_INTERRUPTED after a signal. */
LSA_NODISCARD lsa_status lsa_measure_walk(lsa_measure *m, const lsa_look *how, lsa_err *err);

/* ---- rules ---- */

/* Gives a rule of the sum the continuation of the weights in use, if they have one. */
void lsa_measure_continue(lsa_select_rule *r, const lsa_measure *m);

/* Scores of the window's chunks as kernels/model/select.h defines them. */
void lsa_rule_score(float *score, const lsa_select_rule *r, const lsa_seen *w);

/* What n_rule threshold rules keep around every knot: point[rule * n_knot + knot]; a window counts for its
 * two knots by distance, as in threshold.h. Intervals: 95 % of 1,000 resamplings of the documents (fixed
 * seed); NaN around knots that fewer than two documents reach. knot_documents, knot_windows [n_knot]: what
 * counts at each knot at all; may be NULL. */
LSA_NODISCARD lsa_status lsa_measure_rules(lsa_calib_point *point, int64_t *knot_documents,
                                           int64_t *knot_windows, lsa_measure *m, const lsa_select_rule *rule,
                                           int n_rule, const int64_t *knot, int32_t n_knot, lsa_err *err);

#endif
