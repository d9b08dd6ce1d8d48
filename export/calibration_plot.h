/* The drawing calibration.svg beside the model card. */
#ifndef LSA_EXPORT_CALIBRATION_PLOT_H
#define LSA_EXPORT_CALIBRATION_PLOT_H

#include "data/calibration.h"
#include "data/indexer_file.h"

/* *out: SVG, to be freed by lsa_free. Left: how often chunks predicted golden with some chance were golden,
 * for each layer and for the mean and maximum; right: thresholds of one score against length. */
LSA_NODISCARD lsa_status lsa_calibration_svg(char **out, const lsa_calibration *c, lsa_ensemble ensemble,
                                             lsa_err *err);

#endif
