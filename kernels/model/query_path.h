/* The numeric paths on which servers form a query, after q = Wb u: which roundings happen between RoPE,
 * Hadamard and the dot products. Source: notes of FlashMemory 5.3.
 *
 * F32: none. BF16: q is rounded to bf16 before RoPE and again after it; Hadamard in f32. FP8: as BF16, then
 * one scale a head, max(1e-4, amax)/448, and e4m3 codes; a server folds the scale into the head weight. Host,
 * scalar, double sums; pure and thread-safe. */
#ifndef LSA_KERNELS_MODEL_QUERY_PATH_H
#define LSA_KERNELS_MODEL_QUERY_PATH_H

#include "kernels/model/indexer.h"

typedef enum lsa_query_path { LSA_PATH_F32 = 0, LSA_PATH_BF16, LSA_PATH_FP8, LSA_QUERY_PATHS } lsa_query_path;

const char *lsa_query_path_name(lsa_query_path p); /* "f32", "bf16", "fp8" */
/* LSA_E_ARG names the unknown word. */
LSA_NODISCARD lsa_status lsa_query_path_parse(lsa_query_path *out, const char *s, lsa_err *err);

/* One query: raw [n_head,128] = Wb u; position and freq as in lsa_indexer_query. rope [n_head,128]: after
 * RoPE, NULL to skip. q [n_head,128]: what is multiplied with keys, may alias raw. FP8 only, NULL otherwise:
 * code [n_head,128], scale [n_head]; then q = code * scale. */
void lsa_query_path_row(lsa_query_path p, const lsa_indexer_geom *g, const float *freq, int64_t position,
                        const float *raw, float *rope, float *q, uint8_t *code, float *scale);

#endif
