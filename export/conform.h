/* Conformance of an engine, ours or another: its numbers against the golden vectors; faults are named by
 * diagnose.h. The mistake that would stay silent: a comparison that NaN passes. */
#ifndef LSA_EXPORT_CONFORM_H
#define LSA_EXPORT_CONFORM_H

#include "export/golden.h"

/* Our own kernels on `device` (host memory: cpu, ref): every stage, path and selection. LSA_E_FORMAT names
 * layer, stage, difference and the convention at fault. *worst: the largest difference on the f32 path. A
 * difference is |found - expected| / |expected| over the numbers of one query (Euclidean norms). */
LSA_NODISCARD lsa_status lsa_conform_kernels(const lsa_indexer_file *f, const char *dir, const char *device,
                                             double *worst, lsa_err *err);

/* Vectors that another engine computed from the golden inputs: a safetensors file with any tensors of the
 * golden file, in its shape or with all ranks and heads, F32, BF16, F16 or F64 (codes, masks and inputs as
 * there). *n: tensors compared. Unknown names are LSA_E_FORMAT. */
LSA_NODISCARD lsa_status lsa_conform_file(const lsa_indexer_file *f, const char *dir, const char *file,
                                          double *worst, int64_t *n, lsa_err *err);

#endif
