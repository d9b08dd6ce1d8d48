/* From the gradients of virtual shards to one gradient, and who holds which optimizer state.
 *
 * A rank computes the gradient of a layer once per virtual shard ("part"), so that the terms of a sum are the
 * same on any number of ranks; they are added in double in the order of the shards, bucket by bucket. A
 * bucket is cut into one slice a rank, at multiples of LSA_REDUCE_PIECE; a rank adds up its slices. Whole
 * state: the slices are gathered, every rank updates everything. Sharded (optim.zero1): a rank holds moments
 * of its slices only, updates those, and the parameters are gathered. Both give the same bits. Host memory;
 * collective. */
#ifndef LSA_TRAINER_REDUCE_H
#define LSA_TRAINER_REDUCE_H

#include "kernels/comm/comm.h"
#include "kernels/model/indexer.h"

enum { LSA_REDUCE_PIECE = 4096, LSA_REDUCE_BUCKET = 1 << 22 };

typedef struct lsa_reduce lsa_reduce;
/* Borrows comm. n_part: virtual shards of this rank. */
LSA_NODISCARD lsa_status lsa_reduce_create(lsa_reduce **out, lsa_comm *comm, const lsa_indexer_geom *g,
                                           int n_part, bool sharded, lsa_err *err);
void lsa_reduce_destroy(lsa_reduce *x); /* NULL allowed */

/* Where part p's gradient of the layer in work goes: the layer's parameters, from its first on. "Layer"
 * n_layer is what lies behind all layers (costs of the continuation, weights of the prior). */
float *lsa_reduce_part(lsa_reduce *x, int p);
/* Adds all parts of the layer into grad (flat): this rank's slices of it if sharded, else all of it. */
LSA_NODISCARD lsa_status lsa_reduce_layer(lsa_reduce *x, int32_t layer, float *grad, lsa_err *err);
/* Sum of squares of the whole gradient, and of the losses of all virtual shards, in their order; loss
 * [n_part]: this rank's. */
LSA_NODISCARD lsa_status lsa_reduce_totals(double *sumsq, double *total_loss, lsa_reduce *x,
                                           const float *grad, const double *loss, lsa_err *err);

/* This rank's slices, in flat order: elements [begin, end) of the parameters; `at`: elements of slices before
 * it, which is where its moments lie when sharded. */
typedef struct lsa_slice {
    int64_t begin, end, at;
} lsa_slice;
int64_t lsa_reduce_slices(const lsa_reduce *x, const lsa_slice **s);
int64_t lsa_reduce_owned(const lsa_reduce *x); /* elements of all of them */

/* params (flat): every rank gets every rank's slices. */
LSA_NODISCARD lsa_status lsa_reduce_share(lsa_reduce *x, float *params, lsa_err *err);
/* owned: this rank's slices, one after the other; rank 0 gets all in out (flat; NULL elsewhere). */
LSA_NODISCARD lsa_status lsa_reduce_collect(lsa_reduce *x, const float *owned, float *out, lsa_err *err);

#endif
