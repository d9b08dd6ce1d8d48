/* Training on a GPU with documents resident there: the pool that reading threads fill ahead of the steps, the
 * steps, and the evaluation. Same windows, samples and rules as batch.h and step.h; the CPU computes in f32,
 * the GPU as kernels/model/gpu_step.h says.
 *
 * The pool holds two groups of documents of every virtual shard (order.h): one in use, one on its way; or all
 * documents, if they fit. Which windows a step asks depends on recipe and data alone, never on timing. */
#ifndef LSA_TRAINER_RESIDENT_H
#define LSA_TRAINER_RESIDENT_H

#include "kernels/model/gpu_step.h"
#include "trainer/eval.h"

enum { LSA_RESIDENT_READERS = 8 }; /* threads that read documents ahead */

typedef struct lsa_resident lsa_resident;

/* The GPU step's options of a recipe, for documents of at most `widest` chunks; one GPU. */
lsa_gpu_opts lsa_resident_options(const lsa_recipe *r, int64_t n_slot, int64_t widest);
/* Borrows source, order (NULL: evaluation only), recipe, context and comm. comm: one GPU a rank, on the
 * virtual shards that the order gives this rank; NULL or one process without a launcher: one GPU, no NCCL.
 * All functions but destroy, step, updates and snapshot_get are then collective. */
LSA_NODISCARD lsa_status lsa_resident_create(lsa_resident **out, lsa_ctx *ctx, lsa_comm *comm, lsa_source *s,
                                             lsa_order *o, const lsa_recipe *r, const lsa_indexer_geom *g,
                                             const float *params, const float *m, const float *v,
                                             int64_t updates, lsa_err *err);
void lsa_resident_destroy(lsa_resident *x); /* NULL allowed */

/* Starts the step of the next windows from *c, which moves on; at most LSA_GPU_FLIGHT steps may be without a
 * result. */
LSA_NODISCARD lsa_status lsa_resident_launch(lsa_resident *x, lsa_cursor *c, int64_t step, lsa_err *err);
/* Result of the oldest step without one. */
LSA_NODISCARD lsa_status lsa_resident_take(lsa_resident *x, lsa_step_result *out, lsa_err *err);
int64_t lsa_resident_updates(const lsa_resident *x); /* up to the last result taken */
lsa_gpu_step *lsa_resident_step(lsa_resident *x);    /* borrowed */
/* Of the parameters: the same on every rank. */
LSA_NODISCARD lsa_status lsa_resident_hash(lsa_resident *x, uint64_t *out, lsa_err *err);
/* Parameters and moments, copied on the GPU; rank 0 then brings them to the host, flat, in any thread and
 * while steps go on. */
LSA_NODISCARD lsa_status lsa_resident_snapshot(lsa_resident *x, lsa_err *err);
LSA_NODISCARD lsa_status lsa_resident_snapshot_get(const lsa_resident *x, float *params, float *m, float *v,
                                                   lsa_err *err);

/* As lsa_evaluate. */
LSA_NODISCARD lsa_status lsa_resident_evaluate(lsa_eval *e, lsa_resident *x, int64_t first, int64_t last,
                                               lsa_err *err);

#endif
