/* Thresholds by context length: for each knot the value that, interpolated in log2(visible chunks) as
 * kernels/model/select.h says, keeps a target share of the chunks (or of the golden ones) around every knot.
 *
 * The thresholds minimise the pinball loss of a piecewise linear quantile regression, weighted by chunks: at
 * its minimum, for each knot, the share kept equals the target over all windows, each weighted by its
 * distance to the knot (1 on it, 0 on its neighbours). Source: Koenker and Bassett, Regression quantiles,
 * 1978.
 *
 * Scores are counted in LSA_SCORE_BINS bins (linear in the score, or in its logit for scores in (0, 1)) for
 * every sixteenth of an octave of length, so memory does not grow with the data. Inside a bin chunks count as
 * spread evenly. */
#ifndef LSA_TRAINER_THRESHOLD_H
#define LSA_TRAINER_THRESHOLD_H

#include <stdbool.h>

#include "kernels/model/select.h"

enum { LSA_SCORE_BINS = 4096, LSA_LENGTH_CELLS = 16 * 32 };

/* ---- lengths ---- */

/* Knots for windows of up to `longest` visible chunks, `tail` of which are never evicted: rounded
 * powers of the square root of two, from twice the tail (if longest reaches it) to 1.1 times longest; at
 * least one. */
int32_t lsa_knots(int64_t knot[LSA_SELECT_KNOTS], int64_t longest, int64_t tail);
/* Weights of a length on its knots: *k and *k + 1 get 1 - *f and *f (0 where there is no next knot or the
 * length lies outside). */
void lsa_knot_weight(int32_t *k, double *f, const int64_t *knot, int32_t n_knot, double log2_length);
/* The threshold of a rule for n visible chunks: `threshold`, or interpolated. */
float lsa_rule_threshold(const lsa_select_rule *r, int64_t n);

/* ---- counting ---- */

typedef struct lsa_score_axis {
    bool logit; /* bins are linear in log(s / (1 - s)) */
    double low, high;
} lsa_score_axis;

typedef struct lsa_score_counts {
    lsa_score_axis axis;
    int64_t *chunks[LSA_LENGTH_CELLS],
        *golden[LSA_LENGTH_CELLS]; /* [LSA_SCORE_BINS] each, or NULL: no window */
    int64_t n_chunk[LSA_LENGTH_CELLS];
    double log2_sum[LSA_LENGTH_CELLS]; /* of log2(visible chunks), once for each chunk counted */
} lsa_score_counts;

/* Makes room for windows of n visible chunks, `evictable` of which will be counted. Not thread-safe. */
LSA_NODISCARD lsa_status lsa_score_counts_window(lsa_score_counts *c, int64_t n, int64_t evictable,
                                                 lsa_err *err);
/* Counts one chunk of a window of n visible chunks. Thread-safe; the result does not depend on the order. */
void lsa_score_counts_add(lsa_score_counts *c, int64_t n, float score, bool golden);
void lsa_score_counts_fini(lsa_score_counts *c);
/* Chunks (golden: golden ones) of a cell with a score above t. */
double lsa_score_above(const lsa_score_counts *c, int cell, double t, bool golden);

/* ---- the search ---- */

/* threshold[n_knot]: share `target` of the chunks (golden: of the golden ones) lies above. Where there is
 * nothing to count around a knot, it takes the value of the nearest knot that has something; without anything
 * at all the lowest value of the axis. */
LSA_NODISCARD lsa_status lsa_find_thresholds(float *threshold, const lsa_score_counts *c, const int64_t *knot,
                                             int32_t n_knot, double target, bool golden, lsa_err *err);

#endif
