/* Checkpoint -> exported indexer, and the proof that an exported indexer is what it says. */
#ifndef LSA_EXPORT_WRITE_H
#define LSA_EXPORT_WRITE_H

#include "data/indexer_file.h"
#include "export/folder.h"

/* What the file says beside the weights. NULL: as the export that the checkpoint was imported from said; else
 * sum of logits, 0.5, f32. */
typedef struct lsa_export_rule {
    const lsa_ensemble *ensemble;
    const double *threshold; /* on the sigmoid, uncalibrated */
    const lsa_dtype *dtype;
} lsa_export_rule;

/* Writes INDEXER/ from a checkpoint: see folder.h. Calibration of an imported export is kept if the weights
 * are (same dtype). */
LSA_NODISCARD lsa_status lsa_export_write(const char *ckpt, const char *out, const lsa_export_rule *rule,
                                          const lsa_export_options *o, lsa_err *err);

/* Golden vectors (conform.h), names, shapes, finiteness; the files beside it; and against `ckpt` bit by bit
 * unless NULL (rounded to the file's weight type). *worst: largest difference of a stage on the f32 path. */
LSA_NODISCARD lsa_status lsa_export_verify(const char *indexer, const char *ckpt, double *worst,
                                           lsa_err *err);

#endif
