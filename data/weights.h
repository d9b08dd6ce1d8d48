/* Indexer weights in the dtypes of exported files: rounding and writing (reading: data/tensor_file.h).
 *
 * F32: as they are. BF16: nearest, ties to even. F8_E4M3: matrices as codes with one f32 scale a row, tensor
 * `<name>_scale` [rows, 1], value = code x scale. The scale is the smallest power of two >= 2^-126 that keeps
 * every code of the row at 448 or below (largest magnitude <= 464 x scale, which rounds to 448): multiplying
 * by it is exact in every format, and writing what was read gives the same codes and scales. q_norm stays F32
 * in every variant. Pure, thread-safe. */
#ifndef LSA_DATA_WEIGHTS_H
#define LSA_DATA_WEIGHTS_H

#include "data/sink.h"
#include "kernels/core/lsa_status.h"
#include "kernels/model/indexer.h"

/* "f32", "bf16", "fp8" as --dtype takes them. */
const char *lsa_weight_dtype_name(lsa_dtype t);
LSA_NODISCARD lsa_status lsa_weight_dtype_parse(lsa_dtype *out, const char *s, lsa_err *err);

/* params [lsa_indexer_n_param(g)] to the values that files of dtype t hold, in place. */
void lsa_weights_round(float *params, const lsa_indexer_geom *g, lsa_dtype t);

/* Entry for part p of layer l under `name`, whose values are exact in dtype t (lsa_weights_round). */
lsa_tensor_out lsa_weight_out(const char *name, const float *params, const lsa_indexer_geom *g, int32_t l,
                              lsa_indexer_part p, lsa_dtype t);
/* Its scales, entry `<name>_scale`; only for matrices in F8_E4M3. */
lsa_tensor_out lsa_weight_scale_out(const char *name, const float *params, const lsa_indexer_geom *g,
                                    int32_t l, lsa_indexer_part p);

#endif
