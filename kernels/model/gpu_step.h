/* The training step on one GPU with its documents resident in GPU memory: bf16 projections for all layers at
 * once, a fused score-loss-gradient kernel, AdamW, all in one CUDA graph without host synchronisation. Judged
 * by the same step over the ops (trainer/step.c on `ref`). Formulas: FlashMemory-DeepSeek-V4 (arXiv
 * 2606.09079) as restated in the notes 5.1, 5.4, 7.3, 7.4.
 *
 * Numbers: master weights, moments, norms, losses f32 (sums in double); projections bf16 with f32
 * accumulation; queries and keys f16 on the tensor cores of sm_90 (f32 elsewhere); gradients of queries bf16.
 * Deterministic: same inputs, same bits. Errors: LSA_E_NOMEM, LSA_E_DEVICE, LSA_E_CONFIG (a shape this path
 * does not have), LSA_E_UNSUPPORTED in builds without CUDA (several GPUs: without NCCL), LSA_E_COMM with the
 * rank that is gone. One thread at a time, except where said.
 *
 * Several GPUs: gradients are added by NCCL inside the graph, those of wq_b while the rest of the backward
 * pass runs. The order of the sum is NCCL's: on another number of GPUs the last bits differ. */
#ifndef LSA_KERNELS_MODEL_GPU_STEP_H
#define LSA_KERNELS_MODEL_GPU_STEP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"
#include "kernels/ctx.h"
#include "kernels/model/indexer.h"

struct lsa_comm;

typedef enum lsa_step_loss {
    LSA_STEP_KL = 0,
    LSA_STEP_BCE,
    LSA_STEP_FOCAL,
    LSA_STEP_BPR,
    LSA_STEP_MARGIN
} lsa_step_loss;

typedef struct lsa_gpu_opts {
    int64_t batch;     /* windows of a step on this GPU */
    int64_t micro;     /* windows at a time (gradients of the parts are added); divides batch */
    int64_t columns;   /* most candidates of a window */
    int64_t max_chunk; /* most chunks a window may choose from */
    int32_t n_slot;    /* documents resident at once */
    /* sampling */
    bool sampled; /* positives and drawn negatives; else all chunks */
    int64_t max_pos, max_neg;
    double neg_ratio;
    double hard_share; /* of the negatives: taken from the mined ones, hardest first (lsa_gpu_mine) */
    int64_t hard_k;    /* mined chunks kept for a window */
    bool balance;      /* all candidates: a window's negatives weigh neg_ratio times its positives together */
    uint64_t seed;
    /* loss */
    lsa_step_loss loss;
    bool on_sum, by_mass; /* loss on the sum of the layers' logits, or the mean of the layers' losses */
    float smoothing, margin;
    /* optimiser */
    float beta1, beta2, eps, weight_decay, clip;
    bool decay_norm;
    bool bf16_moments;
    bool snapshots; /* memory for lsa_gpu_snapshot: 12 bytes a parameter */
    /* several GPUs: every rank has a step of the same options and windows of its own; losses, norms and
     * updates are those of all windows. NULL: this GPU alone */
    struct lsa_comm *comm; /* kernels/comm/comm.h; borrowed */
    bool sharded;          /* ZeRO-1: a rank holds and updates the moments of its slices (gpu_shard.h) */
    bool bf16_gradients;   /* exchanged in bf16; needs micro = batch */
    bool no_overlap;       /* exchange only when the backward pass is done: to measure what overlap saves */
    bool fp8_query;        /* queries rounded to e4m3 with one scale a head, as servers do */
    bool poison;   /* for tests: memory starts as NaN, with guard zones that lsa_gpu_guards looks at */
    bool portable; /* never the sm_90 kernels: for tests of the portable ones */
} lsa_gpu_opts;

/* A window that can be asked of a resident document. */
typedef struct lsa_gpu_window {
    int64_t query;      /* position of the token that asks */
    int32_t hidden_row; /* its row in hidden */
    int32_t n_cand;     /* candidates are chunks [0, n_cand) */
} lsa_gpu_window;

/* One document, laid out in one block of memory of `bytes` that starts 256-byte aligned; the fields are
 * offsets into it. Entries of window i are need_begin[i] .. need_begin[i+1]-1 of chunk (ascending), weight
 * and mass. */
typedef struct lsa_gpu_doc {
    int64_t doc; /* number in the data: part of the key of the random numbers */
    int64_t n_key, n_hidden, n_window, n_need;
    int64_t key;        /* u8 [L, n_key, 128] */
    int64_t scale;      /* f32 [L, n_key] */
    int64_t hidden;     /* bf16 [L, n_hidden, d] */
    int64_t window;     /* lsa_gpu_window [n_window] */
    int64_t need_begin; /* i64 [n_window+1] */
    int64_t chunk;      /* i32 [n_need] */
    int64_t weight;     /* f32 [n_need]: loss weight of a positive, 0 if it is none */
    int64_t mass;       /* f32 [n_need]: target mass (training), native mass (evaluation) */
    int64_t bytes;
} lsa_gpu_doc;
/* Fills the offsets and bytes from the sizes; layers L and width d. */
void lsa_gpu_doc_layout(lsa_gpu_doc *d, int32_t n_layer, int64_t hidden);

typedef struct lsa_gpu_step lsa_gpu_step;

/* ctx must be a CUDA context and outlive the step. params, and m and v unless NULL: host f32, flat
 * (indexer.h). */
LSA_NODISCARD lsa_status lsa_gpu_create(lsa_gpu_step **out, lsa_ctx *ctx, const lsa_indexer_geom *g,
                                        const lsa_gpu_opts *o, const float *params, const float *m,
                                        const float *v, int64_t updates, lsa_err *err);
/* For lsa_gpu_eval only: no gradients, moments or samples; the weights are those of `s`, which must outlive
 * it. */
LSA_NODISCARD lsa_status lsa_gpu_create_eval(lsa_gpu_step **out, lsa_gpu_step *s, int64_t windows,
                                             int64_t columns, int32_t n_slot, lsa_err *err);
void lsa_gpu_destroy(lsa_gpu_step *s);

/* Once in every other thread that calls put, wait or host_alloc: CUDA's current device is a thread's own. */
LSA_NODISCARD lsa_status lsa_gpu_thread_begin(const lsa_gpu_step *s, lsa_err *err);
/* Pool: put copies a host block (pinned memory for speed) into fresh device memory and makes it slot `slot`;
 * what the slot held before is released (d NULL: that only). It may return before the copy ends: the block
 * must stay until lsa_gpu_pool_wait. The caller sees to it that no step in flight uses the slot. put and wait
 * may be called from other threads than the steps', one at a time. */
LSA_NODISCARD lsa_status lsa_gpu_pool_put(lsa_gpu_step *s, int32_t slot, const lsa_gpu_doc *d,
                                          const void *block, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_pool_wait(lsa_gpu_step *s, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_host_alloc(void **out, int64_t bytes, lsa_err *err); /* pinned */
void lsa_gpu_host_free(void *p);
/* Free and total device memory now, bytes. */
LSA_NODISCARD lsa_status lsa_gpu_memory(const lsa_gpu_step *s, int64_t *free_bytes, int64_t *total,
                                        lsa_err *err);

typedef struct lsa_gpu_row { /* one window of a batch */
    int32_t slot, window;
    int64_t epoch;
} lsa_gpu_row;

typedef struct lsa_gpu_result {
    double loss, grad_norm;
    bool skipped; /* loss or norm not finite: nothing was updated */
    int64_t updates;
} lsa_gpu_result;

/* Starts a step on rows [batch] and returns; at most LSA_GPU_FLIGHT steps may be without a result taken. */
enum { LSA_GPU_FLIGHT = 4 };
LSA_NODISCARD lsa_status lsa_gpu_launch(lsa_gpu_step *s, const lsa_gpu_row *row, double lr, lsa_err *err);
/* Result of the oldest step not taken yet; waits for it. */
LSA_NODISCARD lsa_status lsa_gpu_result_take(lsa_gpu_step *s, lsa_gpu_result *out, lsa_err *err);

/* Waits for the steps in flight, whose results stay to be taken. */
LSA_NODISCARD lsa_status lsa_gpu_wait(lsa_gpu_step *s, lsa_err *err);
/* Parameters and moments after the steps launched so far, copied on the device: waits for that, about 5 ms
 * for 340 M parameters. Several GPUs: collective; those made without memory for it help the others to theirs.
 */
LSA_NODISCARD lsa_status lsa_gpu_snapshot(lsa_gpu_step *s, lsa_err *err);
/* The last snapshot to host arrays, flat. May run in another thread while steps go on; the next snapshot must
 * wait for its end. */
LSA_NODISCARD lsa_status lsa_gpu_snapshot_get(const lsa_gpu_step *s, float *params, float *m, float *v,
                                              lsa_err *err);

/* Several GPUs, sharded: after steps a GPU has the new bf16 weights of its own slices; this brings the
 * others. Collective, enqueued. Before lsa_gpu_eval; steps do it themselves. */
LSA_NODISCARD lsa_status lsa_gpu_share(lsa_gpu_step *s, lsa_err *err);
/* Of what all ranks must hold alike: the bf16 weights and the norm gains. */
LSA_NODISCARD lsa_status lsa_gpu_hash(lsa_gpu_step *s, uint64_t *out, lsa_err *err);

/* What the last step saw and made, for tests and traces: host arrays, any may be NULL. n_cand, n_pos [batch];
 * cand [batch, columns] (-1 where all chunks are candidates); y, weight [batch, columns]; grad [n_param]. */
LSA_NODISCARD lsa_status lsa_gpu_peek(lsa_gpu_step *s, int32_t *n_cand, int32_t *n_pos, int32_t *cand,
                                      float *y, float *weight, float *grad, lsa_err *err);

/* Evaluation of m windows (m <= batch) over all their chunks. Rows of the result: the layers, then (with a
 * continuation) the plain sum, then mean, max, sum (continued); budgets [n_budget] fractions in (0, 1], topk
 * > 0. */
enum { LSA_GPU_MAX_BUDGET = 4 };
typedef struct lsa_gpu_eval_row { /* one window under one score */
    int32_t n_cand, tp, have, n_pos, hit_k;
    float captured[LSA_GPU_MAX_BUDGET], total_mass;
} lsa_gpu_eval_row;
int64_t lsa_gpu_rows(const lsa_gpu_step *s); /* most windows at a time */
static inline int32_t lsa_gpu_eval_rows(const lsa_indexer_geom *g) {
    return g->n_layer + 3 + (g->reach > 0);
}
LSA_NODISCARD lsa_status lsa_gpu_eval(lsa_gpu_step *s, int64_t m, const lsa_gpu_row *row, float threshold,
                                      int64_t topk, int32_t n_budget, const double *budget,
                                      lsa_gpu_eval_row *out, lsa_err *err); /* [rows, m] */

/* Hard negatives of all windows of the document in slot `slot` of `s`: the hard_k chunks with the largest
 * summed logits that are not positives, under the weights of now; later steps draw from them. Scored by
 * `eval`, made from s by lsa_gpu_create_eval with enough columns. Waits for the steps in flight. A document
 * put anew has none until it is mined. */
LSA_NODISCARD lsa_status lsa_gpu_mine(lsa_gpu_step *s, lsa_gpu_step *eval, int32_t slot, lsa_err *err);

/* With opts.poison: LSA_E_NUMERIC if anything was written outside the step's arrays. */
LSA_NODISCARD lsa_status lsa_gpu_guards(lsa_gpu_step *s, lsa_err *err);

/* Median milliseconds of the parts of a step, launched one by one; for lsa-train bench. */
enum { LSA_GPU_STAGES = 11 };
typedef struct lsa_gpu_times {
    const char *name[LSA_GPU_STAGES];
    double ms[LSA_GPU_STAGES];
    int32_t n;
    int32_t exchange, share; /* several GPUs: which of them exchange gradients and bf16 weights, or -1 */
    /* RMSNorm of all layers by cuDNN, forward and backward: ms (-1: not to be had, cudnn_refused says why),
     * and the largest difference from ours relative to the largest value */
    double cudnn_ms[2], cudnn_difference[2];
    char cudnn_refused[256];
} lsa_gpu_times;
LSA_NODISCARD lsa_status lsa_gpu_stage_times(lsa_gpu_step *s, int repeats, lsa_gpu_times *out, lsa_err *err);
/* Ceilings of this card, measured now: bytes/s of a large device copy (read + written), FLOP/s of a large
 * bf16 product. */
LSA_NODISCARD lsa_status lsa_gpu_ceilings(lsa_gpu_step *s, double *copy_rate, double *flop_rate,
                                          lsa_err *err);

#endif
