/* What `lsa-export calibrate` measured: the metadata `lsa.calibration` of an exported indexer as a struct.
 * Format and meaning of every number: export/EXPORT_FORMAT.md. Plain data of fixed size (100 KiB: allocate
 * it), except where said; pure functions, thread-safe. */
#ifndef LSA_DATA_CALIBRATION_H
#define LSA_DATA_CALIBRATION_H

#include <stdbool.h>

#include "kernels/core/json.h"
#include "kernels/model/select.h"

enum {
    LSA_CALIB_BUDGETS = 4,
    LSA_CALIB_RECALLS = 3,
    LSA_CALIB_TARGETS = LSA_CALIB_BUDGETS + LSA_CALIB_RECALLS,
    LSA_CALIB_SCORES = 3, /* lsa_score_rule */
    LSA_CALIB_BINS = 24   /* of a reliability curve: half units of logit from -8 to 4, the ends open */
};
/* Budgets 0.05 0.10 0.135 0.20, then shares of golden chunks 0.80 0.90 0.95. */
extern const double lsa_calib_target[LSA_CALIB_TARGETS];

typedef struct lsa_interval {
    double low, high; /* NaN: not known */
} lsa_interval;

/* What a rule does around one knot: shares of evictable chunks kept, of golden chunks kept and of native mass
 * kept (NaN: the shards hold none). */
typedef struct lsa_calib_point {
    double kept, recall, captured;
    lsa_interval kept_ci, recall_ci, captured_ci; /* 95 % over documents */
    lsa_interval spread;                          /* p10 and p90 over windows of the share kept */
} lsa_calib_point;

typedef struct lsa_calib_entry {
    double target;
    float threshold[LSA_SELECT_KNOTS];
    lsa_calib_point at[LSA_SELECT_KNOTS];
} lsa_calib_entry;

/* Chunks by predicted chance of being golden. Empty bins are left out. */
typedef struct lsa_reliability {
    int32_t n;
    double predicted[LSA_CALIB_BINS], observed[LSA_CALIB_BINS]; /* means of the bin */
    int64_t chunks[LSA_CALIB_BINS];
} lsa_reliability;

/* Weights changed so that the reference server's rule, max over layers of sigmoid(z + logit_offset) > 0.5,
 * keeps what the calibrated MAX rule keeps at one length. */
typedef struct lsa_calib_fold {
    double budget;
    int64_t chunks; /* visible chunks at which both rules agree */
    double logit_offset;
    double scale[LSA_MAX_CSA]; /* the head weights of a layer were multiplied by it */
    /* At every knot: the reference rule on the weights as they were, the calibrated MAX rule on them, and the
     * reference rule now. */
    lsa_calib_point before[LSA_SELECT_KNOTS], calibrated[LSA_SELECT_KNOTS], after[LSA_SELECT_KNOTS];
} lsa_calib_fold;

typedef struct lsa_calibration {
    char data_hash[17];
    int64_t documents, windows, longest; /* longest document, tokens */
    int32_t n_layer;
    lsa_csa_ord ord[LSA_MAX_CSA];
    float temperature[LSA_MAX_CSA], offset[LSA_MAX_CSA];
    lsa_reliability layer[LSA_MAX_CSA];
    int32_t n_knot;
    int64_t knot[LSA_SELECT_KNOTS], knot_documents[LSA_SELECT_KNOTS], knot_windows[LSA_SELECT_KNOTS];
    lsa_calib_entry entry[LSA_CALIB_SCORES][LSA_CALIB_TARGETS];
    lsa_reliability score[LSA_CALIB_SCORES]; /* MEAN and MAX; SUM is no probability: n = 0 */
    bool folded;
    lsa_calib_fold fold;
} lsa_calibration;

/* "budget" or "recall". */
const char *lsa_calib_kind(int target);
/* The threshold rule of one score and target (index of lsa_calib_target), with the knots. */
void lsa_calib_rule(lsa_select_rule *out, const lsa_calibration *c, lsa_score_rule score, int target,
                    int64_t tail_chunks);

/* *out: to be json_decref()ed. */
LSA_NODISCARD lsa_status lsa_calibration_to_json(json_t **out, const lsa_calibration *c, lsa_err *err);
/* Everything is checked (LSA_E_FORMAT): layers are those of `ord`, knots ascend, thresholds are finite,
 * shares lie in [0, 1]. */
LSA_NODISCARD lsa_status lsa_calibration_from_json(lsa_calibration *out, const json_t *o,
                                                   const lsa_csa_ord *ord, int32_t n_layer, const char *where,
                                                   lsa_err *err);

#endif
