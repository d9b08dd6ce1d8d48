/* Checkpoint -> exported indexer, and a teacher's own indexer -> checkpoint. */
#ifndef LSA_EXPORT_WRITE_H
#define LSA_EXPORT_WRITE_H

#include "data/indexer_file.h"
#include "export/folder.h"

/* Writes INDEXER/ from a checkpoint: see folder.h. */
LSA_NODISCARD lsa_status lsa_export_write(const char *ckpt, const char *out, lsa_ensemble ensemble,
                                          double threshold, const lsa_export_options *o, lsa_err *err);

/* Golden vectors (conform.h), names, shapes, finiteness; and against `ckpt` bit by bit unless NULL. *worst:
 * largest difference of a stage on the f32 path. */
LSA_NODISCARD lsa_status lsa_export_verify(const char *indexer, const char *ckpt, double *worst,
                                           lsa_err *err);

/* RUN/ckpt with the native indexer weights of a teacher: same heads and rank, every CSA layer or the listed
 * ordinals. */
LSA_NODISCARD lsa_status lsa_export_import(const char *teacher, const char *out, const char *layers,
                                           lsa_err *err);

#endif
