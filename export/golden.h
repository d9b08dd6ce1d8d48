/* Conformance vectors: inputs and the value after every stage, so that any engine can find its own mistake.
 * Names and shapes: EXPORT_FORMAT.md. Computed by the reference column (double accumulation). */
#ifndef LSA_EXPORT_GOLDEN_H
#define LSA_EXPORT_GOLDEN_H

#include "data/indexer_file.h"

/* Writes dir/golden.safetensors. */
LSA_NODISCARD lsa_status lsa_golden_vectors_write(const lsa_indexer_file *f, const char *dir, lsa_err *err);
/* Recomputes every stage on `device` and compares; LSA_E_FORMAT names layer, stage, expected, found and a
 * likely cause. *worst: largest relative difference seen. */
LSA_NODISCARD lsa_status lsa_golden_vectors_check(const lsa_indexer_file *f, const char *dir,
                                                  const char *device, double *worst, lsa_err *err);

#endif
