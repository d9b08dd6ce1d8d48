/* The exported folder INDEXER/: every file made from one lsa_indexer_file, put in place at once. */
#ifndef LSA_EXPORT_FOLDER_H
#define LSA_EXPORT_FOLDER_H

#include <stdbool.h>

#include "data/indexer_file.h"

typedef struct lsa_export_options {
    bool force;          /* replace an existing indexer */
    const char *licence; /* lsa_export_write: named in the model card; NULL: not stated */
} lsa_export_options;

/* LSA_E_ARG unless `out` is free, or an indexer and force is set. Any other existing folder is refused. */
LSA_NODISCARD lsa_status lsa_export_check_target(const char *out, bool force, lsa_err *err);

/* Writes `out` as a temporary folder, reads it back (against the checkpoint folder `ckpt` bit by bit, unless
 * NULL) and renames it. Equal inputs give equal bytes. */
LSA_NODISCARD lsa_status lsa_export_folder(const lsa_indexer_file *f, const char *out,
                                           const lsa_export_options *o, const char *ckpt, lsa_err *err);

#endif
