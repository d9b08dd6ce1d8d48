/* The convention at fault where an engine's numbers differ from the golden vectors. check_indexer.py and
 * EXPORT_FORMAT.md have the same table in the same words. */
#ifndef LSA_EXPORT_DIAGNOSE_H
#define LSA_EXPORT_DIAGNOSE_H

#include "export/golden.h"

extern const double lsa_stage_limit[LSA_STAGES]; /* largest allowed difference of a conforming engine */

/* |got - want| / |want| (Euclidean norms) of the M queries with n/M numbers each: the largest, infinity where
 * a number is not finite. *at: its query. */
double lsa_gold_difference(const float *got, const float *want, int64_t n, int *at);

/* The stages of one layer that an engine gave (others NULL) against the truth. LSA_E_FORMAT names `who`, the
 * layer, the first stage that differs and the convention that gives the engine's numbers. *worst is raised to
 * the largest difference on the f32 path. ctx: cpu or ref. */
LSA_NODISCARD lsa_status lsa_judge_layer(const lsa_indexer_file *f, const lsa_golden *o, int32_t l,
                                         const lsa_stages *got, lsa_ctx *ctx, const char *who, double *worst,
                                         lsa_err *err);

#endif
