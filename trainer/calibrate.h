/* lsa-export calibrate: fits what turns an indexer's logits into chances and budgets, on documents it was not
 * trained on, and measures it. Three looks at every window: the logits (temperatures and offsets), the scores
 * (thresholds), and the rules themselves (what they keep). One thread calls. */
#ifndef LSA_TRAINER_CALIBRATE_H
#define LSA_TRAINER_CALIBRATE_H

#include "trainer/measure.h"

/* Fits and measures everything but the fold. Warnings (layers that could not be fitted, targets that ties put
 * out of reach) are logged. */
LSA_NODISCARD lsa_status lsa_calibrate(lsa_calibration *out, lsa_measure *m, const lsa_indexer_geom *g,
                                       lsa_err *err);

/* Makes the reference server's rule, max over layers of sigmoid(z + logit_offset) > 0.5, the calibrated MAX
 * rule for one budget at `chunks` visible chunks (0: the last knot), and calibrates again. f->params: head
 * weights of layer l are multiplied by scale[l] = |logit_offset / b_l|, where b_l is the logit above which
 * the MAX rule keeps a chunk in that layer; z' + logit_offset > 0 is then z > b_l. That needs all b_l of one
 * sign, because the weights have no bias: else LSA_E_UNSUPPORTED names them. f->ensemble becomes MAX and
 * f->threshold sigmoid(-logit_offset): the same rule for who adds no offset. LSA_E_ARG: not a budget of
 * lsa_calib_target. */
LSA_NODISCARD lsa_status lsa_calibrate_fold(lsa_calibration *c, lsa_measure *m, lsa_indexer_file *f,
                                            double budget, int64_t chunks, lsa_err *err);

/* The thresholds as they are, measured on these documents: the numbers of `at`, documents and windows are
 * replaced; the rest stays (reliabilities and the fold are of the documents it was calibrated on). */
LSA_NODISCARD lsa_status lsa_calibration_measure(lsa_calibration *c, lsa_measure *m, lsa_err *err);

/* Human table of one score. */
void lsa_calibration_print(const lsa_calibration *c, lsa_ensemble ensemble);

#endif
