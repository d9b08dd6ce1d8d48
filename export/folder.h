/* The exported folder INDEXER/: every file made from one lsa_indexer_file, put in place at once. */
#ifndef LSA_EXPORT_FOLDER_H
#define LSA_EXPORT_FOLDER_H

#include <stdbool.h>
#include <stdint.h>

#include "data/indexer_file.h"

/* Which files a folder has beside indexer.safetensors, golden.safetensors and README.md (EXPORT_FORMAT.md).
 * The weight type is the indexer's own (lsa_indexer_file.dtype). */
typedef struct lsa_export_options {
    bool force;          /* replace an existing indexer */
    bool pt;             /* indexer.pt */
    int64_t pt_freqs;    /* its freqs_cis tables have so many positions; 0: none */
    bool per_layer;      /* layer_{id}.safetensors */
    bool gguf;           /* indexer.gguf */
    const char *licence; /* lsa_export_write: named in the model card; NULL: not stated */
} lsa_export_options;

#define LSA_PT_FREQS_MAX (INT64_C(1) << 24) /* positions that fp32 tells apart */

/* The files that the folder `dir` has (force is false), so that writing it again keeps them. */
LSA_NODISCARD lsa_status lsa_export_options_of(lsa_export_options *out, const char *dir, lsa_err *err);

/* Layer id of a file name layer_{id}.safetensors, -1 for any other. */
int32_t lsa_layer_file_id(const char *name);
/* Whether dir has such a file. */
LSA_NODISCARD lsa_status lsa_has_layer_files(bool *out, const char *dir, lsa_err *err);

/* LSA_E_ARG unless `out` is free, or an indexer and force is set. Any other existing folder is refused. */
LSA_NODISCARD lsa_status lsa_export_check_target(const char *out, bool force, lsa_err *err);

/* Writes `out` as a temporary folder, reads it back (against the checkpoint folder `ckpt` bit by bit, unless
 * NULL) and renames it; a failure leaves neither. Equal inputs give equal bytes. f->params must be exact in
 * f->dtype (lsa_weights_round); those of a loaded file are. */
LSA_NODISCARD lsa_status lsa_export_folder(const lsa_indexer_file *f, const char *out,
                                           const lsa_export_options *o, const char *ckpt, lsa_err *err);

#endif
