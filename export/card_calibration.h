/* The sections of a model card that need a calibration. Not installed. */
#ifndef LSA_EXPORT_CARD_CALIBRATION_H
#define LSA_EXPORT_CARD_CALIBRATION_H

#include "data/calibration.h"
#include "data/indexer_file.h"
#include "kernels/core/page.h"

/* c NULL: not calibrated. */
void lsa_card_serving(page *p, const lsa_indexer_file *f, const lsa_calibration *c);
void lsa_card_calibration(page *p, const lsa_indexer_file *f, const lsa_calibration *c);

#endif
