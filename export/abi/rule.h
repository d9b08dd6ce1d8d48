/* From a caller's rule to the one that selects: the export's ensemble, tail and calibrated thresholds filled
 * in. Pure, thread-safe. */
#ifndef LSA_EXPORT_ABI_RULE_H
#define LSA_EXPORT_ABI_RULE_H

#include <stdbool.h>

#include "data/calibration.h"
#include "data/indexer_file.h"
#include "export/abi/lsa_indexer.h"
#include "kernels/model/select.h"

/* What an export says about selection. */
typedef struct lsa_idx_export {
    int32_t n_layer;
    lsa_ensemble ensemble;
    int64_t tail; /* tokens */
    bool calibrated;
    float temperature[LSA_MAX_CSA], offset[LSA_MAX_CSA]; /* 1 and 0 unless calibrated */
    int32_t n_knot;
    int64_t knot[LSA_SELECT_KNOTS];
    int32_t reach; /* of the continuation */
    float cost[LSA_MAX_REACH];
    bool prior; /* observed masses are added */
    float prior_weight[LSA_PRIOR_WEIGHTS];
    float threshold[LSA_CALIB_SCORES][LSA_CALIB_BUDGETS]
                   [LSA_SELECT_KNOTS]; /* at lsa_calib_target's budgets */
} lsa_idx_export;

/* LSA_E_FORMAT names what is wrong with the calibration of `f`, which `where` holds. */
LSA_NODISCARD lsa_status lsa_idx_export_read(lsa_idx_export *out, const lsa_indexer_file *f,
                                             const char *where, lsa_err *err);

/* LSA_E_ARG: a field out of range; LSA_E_CONFIG: the export has no calibration, or none for this budget.
 * Between two budgets of the table a threshold is linear in log(budget): exact for scores whose upper tail is
 * exponential. */
LSA_NODISCARD lsa_status lsa_idx_resolve(lsa_select_rule *out, const lsa_idx_export *e,
                                         const lsa_idx_rule *rule, lsa_err *err);

#endif
