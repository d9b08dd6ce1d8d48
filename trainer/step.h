/* One training step on one context: forward, loss, backward, clip, update. The only hot path; the same code
 * for every backend.
 *
 * The costs of a continuation are trained with the rest: in the clipped norm, without weight decay (which
 * would pull towards lending for nothing), and set back to 0 where an update made them negative. Projection
 * and not a softplus, because 0 must be reachable, a checkpoint then holds the costs themselves, and the rate
 * at which they move does not depend on where they stand. The weights of the observed-mass prior are trained
 * likewise, without decay (towards ignoring what was read) and without a bound. */
#ifndef LSA_TRAINER_STEP_H
#define LSA_TRAINER_STEP_H

#include "kernels/comm/comm.h"
#include "kernels/ctx.h"
#include "kernels/model/indexer.h"
#include "trainer/batch.h"

typedef struct lsa_trainer lsa_trainer; /* parameters, gradients, moments and work arrays in backend memory */

/* params, and m and v unless NULL (then zeros): host, flat. comm: borrowed, NULL for one rank. n_shard:
 * virtual shards of this rank, whose gradients are formed apart and added in a fixed order (reduce.h); on a
 * GPU one rank adds them up at once. */
LSA_NODISCARD lsa_status lsa_trainer_create(lsa_trainer **out, lsa_ctx *ctx, lsa_comm *comm, int64_t n_shard,
                                            const lsa_recipe *r, const lsa_indexer_geom *g,
                                            const float *params, const float *m, const float *v,
                                            int64_t updates, lsa_err *err);
int64_t lsa_trainer_updates(const lsa_trainer *t); /* updates made so far: AdamW's t, without skipped steps */
void lsa_trainer_destroy(lsa_trainer *t);
/* Host copies, flat; any may be NULL. With optim.zero1 and several ranks m and v are collective: all ranks
 * call, rank 0 receives. */
LSA_NODISCARD lsa_status lsa_trainer_get(lsa_trainer *t, float *params, float *m, float *v, lsa_err *err);

/* XXH64 of the parameters; host backends. */
uint64_t lsa_trainer_hash(const lsa_trainer *t);

/* Weights of the observed-mass prior; nothing without one. */
LSA_NODISCARD lsa_status lsa_trainer_prior(lsa_trainer *t, float weight[LSA_PRIOR_WEIGHTS], lsa_err *err);

/* Costs of the continuation: geometry's reach of them. */
LSA_NODISCARD lsa_status lsa_trainer_costs(lsa_trainer *t, float costs[LSA_MAX_REACH], lsa_err *err);

/* The last step's gradient, host, flat. */
LSA_NODISCARD lsa_status lsa_trainer_grad(lsa_trainer *t, float *grad, lsa_err *err);

typedef struct lsa_step_result {
    double loss, grad_norm, lr;
    bool skipped; /* loss or norm not finite: nothing was updated */
} lsa_step_result;
/* step counts from 0; it sets the learning rate. b: this rank's rows. Collective; the result is the same on
 * every rank. */
LSA_NODISCARD lsa_status lsa_trainer_step(lsa_step_result *out, lsa_trainer *t, const lsa_batch *b,
                                          int64_t step, lsa_err *err);

/* Logits of every joint layer for a batch without labels: z (host) [n_layer, m, n]. Their sum has no prior
 * (lsa_prior_value of the batch's features with lsa_trainer_prior) and is not continued (lsa_continue with
 * lsa_trainer_costs). */
LSA_NODISCARD lsa_status lsa_trainer_score(lsa_trainer *t, const lsa_batch *b, float *z, lsa_err *err);

/* Learning rate of a step: linear warm-up, then cosine to min_lr over the steps left, or constant. */
double lsa_lr(const lsa_recipe *r, int64_t step);

#endif
