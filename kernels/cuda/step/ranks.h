/* Several GPUs in one step. Internal to kernels/cuda/step; s->ranks is NULL with one GPU and every call then
 * does nothing. */
#ifndef LSA_KERNELS_CUDA_STEP_RANKS_H
#define LSA_KERNELS_CUDA_STEP_RANKS_H

#include "kernels/cuda/step/step_state.h"

enum step_grad_part { STEP_WQ_B, STEP_OTHERS };

/* Collective. */
lsa_status step_ranks_open(lsa_gpu_step *s, lsa_err *err);
void step_ranks_close(lsa_gpu_step *s);
bool step_ranks_first(const lsa_gpu_step *s); /* the rank that counts what all hold alike */
/* Every exchange of the step once, before there is a graph: NCCL connects the GPUs at the first use of each.
 * What the arrays hold is lost, but equal weights stay. Waits for its end. */
lsa_status step_ranks_rehearse(lsa_gpu_step *s, lsa_err *err);
/* Enqueued, part of the graph. Adds n doubles of all ranks, in place. */
lsa_status step_ranks_add(lsa_gpu_step *s, double *x, int64_t n, lsa_err *err);
/* Adds the gradients of a part, which the stream has formed by now; beside what is enqueued next. */
lsa_status step_ranks_reduce(lsa_gpu_step *s, step_grad_part part, lsa_err *err);
lsa_status step_ranks_join(lsa_gpu_step *s, lsa_err *err); /* until all parts are added */
/* All of it with nothing beside it: to measure. */
lsa_status step_ranks_exchange(lsa_gpu_step *s, lsa_err *err);
/* Sharded: the bf16 weights of every rank's slices. share: now. share_early: what the step before updated,
 * beside what is enqueued next, until join; share_late: at the step's end, where early does not do (mined
 * negatives need the weights between steps). One of the two does nothing. */
lsa_status step_ranks_share(lsa_gpu_step *s, lsa_err *err);
lsa_status step_ranks_share_early(lsa_gpu_step *s, lsa_err *err);
lsa_status step_ranks_share_late(lsa_gpu_step *s, lsa_err *err);
/* x [n_param] f32, of which a rank has formed its slices: all of it. Not captured. */
lsa_status step_ranks_gather(lsa_gpu_step *s, float *x, lsa_err *err);
/* Waits for the event, or for all of the stream (NULL), unless a rank or the exchange fails; the exchange is
 * then aborted. */
lsa_status step_ranks_await(lsa_gpu_step *s, cudaEvent_t e, const char *what, lsa_err *err);

#endif
