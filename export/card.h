/* The model card: a README.md beside the exported file, made from its metadata alone. */
#ifndef LSA_EXPORT_CARD_H
#define LSA_EXPORT_CARD_H

#include "data/indexer_file.h"

/* *out: Markdown, to be freed by lsa_free. */
LSA_NODISCARD lsa_status lsa_card_text(char **out, const lsa_indexer_file *f, lsa_err *err);

#endif
