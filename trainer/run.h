/* lsa-train run, resume and eval. A run folder RUN/ holds run.json (data, recipe), recipe.yaml, ckpt/,
 * metrics.jsonl and tb/. All of it belongs to rank 0; the other ranks read the shards only. Every call is
 * collective over comm; the result does not depend on the number of ranks, nor does a checkpoint. */
#ifndef LSA_TRAINER_RUN_H
#define LSA_TRAINER_RUN_H

#include "trainer/eval.h"

/* Starts a run in a fresh folder. init: a checkpoint to start from (widened to the recipe's geometry), or
 * NULL for random. LSA_E_INTERRUPTED after SIGINT/SIGTERM with everything saved; LSA_E_NUMERIC after too many
 * non-finite steps. */
LSA_NODISCARD lsa_status lsa_train_run(const lsa_recipe *r, const char *data, const char *out,
                                       const char *init, const char *device, lsa_comm *comm, lsa_err *err);
/* Goes on from the latest checkpoint (or from the start if there is none yet), bit for bit. */
LSA_NODISCARD lsa_status lsa_train_resume(const char *run, const char *device, lsa_comm *comm, lsa_err *err);

/* Evaluates a checkpoint on all documents of a shard folder (or the held-out ones: val_only), by the
 * checkpoint's own recipe with `set` ("key=value") on top; r receives it. */
LSA_NODISCARD lsa_status lsa_train_eval(lsa_eval *out, lsa_recipe *r, const char *ckpt, const char *data,
                                        bool val_only, const char *device, const char *const *set, int n_set,
                                        lsa_comm *comm, lsa_err *err);

/* How much a shard folder gives a recipe to do. chunks: candidates of a window, on average over windows, as
 * if they were spread evenly over their documents (sample.candidates: all). */
typedef struct lsa_survey {
    int64_t n_layer, hidden, windows, chunks;
} lsa_survey;
LSA_NODISCARD lsa_status lsa_train_survey(lsa_survey *out, const lsa_recipe *r, const char *data,
                                          lsa_err *err);

#endif
