/* Checkpoints written off the critical path: the loop (or `fill`, in the thread) fills a snapshot, a thread
 * writes it. The loop waits
 * only where it wants the next snapshot while the last one is still being written. A write that failed is an
 * error of the run at the next call. One calling thread. */
#ifndef LSA_TRAINER_SAVER_H
#define LSA_TRAINER_SAVER_H

#include <stdbool.h>

#include "kernels/core/json.h"
#include "kernels/model/indexer.h"

typedef struct lsa_saver lsa_saver;
/* Borrows run (a folder) and g. last_step: of the checkpoint that is there already, -1 for none; for
 * messages. */
LSA_NODISCARD lsa_status lsa_saver_create(lsa_saver **out, const char *run, const lsa_indexer_geom *g,
                                          int64_t keep, int64_t milestone_every, int64_t last_step,
                                          lsa_err *err);
void lsa_saver_destroy(lsa_saver *s); /* NULL allowed; waits for the thread */

/* Host arrays, flat: what the next lsa_saver_begin writes. Not to be touched while a write runs. */
typedef struct lsa_snapshot {
    float *params, *m, *v;
} lsa_snapshot;
lsa_snapshot lsa_saver_snapshot(lsa_saver *s);

bool lsa_saver_busy(lsa_saver *s); /* a write is running */
/* Error of a write that ended; LSA_OK while one is running. */
LSA_NODISCARD lsa_status lsa_saver_poll(lsa_saver *s, lsa_err *err);
/* The same, after waiting for a running one. */
LSA_NODISCARD lsa_status lsa_saver_wait(lsa_saver *s, lsa_err *err);
/* Begins to write the snapshot; no write may be running. Takes `state`, which nobody else may hold. fill:
 * fills the snapshot first, in the writing thread; NULL where it is full. */
typedef lsa_status lsa_saver_fill(void *user, const lsa_snapshot *to, lsa_err *err);
LSA_NODISCARD lsa_status lsa_saver_begin(lsa_saver *s, int64_t step, json_t *state, bool best,
                                         lsa_saver_fill *fill, void *user, lsa_err *err);

#endif
