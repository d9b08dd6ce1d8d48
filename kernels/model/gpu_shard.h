/* Which parameters of a layer a GPU updates when several train one indexer: of wq_a, wq_b and weights_proj a
 * slice each, in the order of the ranks; the norm gains (a few thousand) are every rank's. Slices lie where
 * reduce-scatter and all-gather of the whole tensor put them. Pure functions, thread-safe. */
#ifndef LSA_KERNELS_MODEL_GPU_SHARD_H
#define LSA_KERNELS_MODEL_GPU_SHARD_H

#include "kernels/model/indexer.h"

typedef struct lsa_gpu_piece {
    int64_t first, n; /* elements of a layer's parameters, multiples of 4 */
    int64_t at;       /* elements of the pieces before it */
    bool gain;
} lsa_gpu_piece;

typedef struct lsa_gpu_shard {
    int32_t n_piece;
    lsa_gpu_piece piece[LSA_INDEXER_PARTS];
    int64_t own; /* elements of all pieces */
} lsa_gpu_shard;

/* LSA_E_CONFIG if a tensor does not divide into `size` slices of whole fours; says how many ranks would. */
LSA_NODISCARD lsa_status lsa_gpu_shard_make(lsa_gpu_shard *out, const lsa_indexer_geom *g, int rank, int size,
                                            lsa_err *err);

#endif
