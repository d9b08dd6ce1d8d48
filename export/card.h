/* The model card: README.md and, once calibrated, calibration.svg beside the exported file, made from its
 * metadata alone. */
#ifndef LSA_EXPORT_CARD_H
#define LSA_EXPORT_CARD_H

#include "data/indexer_file.h"

/* *out: Markdown, to be freed by lsa_free. LSA_E_FORMAT: a calibration that EXPORT_FORMAT.md does not allow.
 */
LSA_NODISCARD lsa_status lsa_card_text(char **out, const lsa_indexer_file *f, lsa_err *err);
/* *out: SVG, to be freed by lsa_free; NULL without a calibration. */
LSA_NODISCARD lsa_status lsa_card_plot(char **out, const lsa_indexer_file *f, lsa_err *err);

#endif
