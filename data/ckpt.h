/* Checkpoints: directories ckpt/step_NNNNNNNN that are complete or absent. Format: data/CHECKPOINT_FORMAT.md.
 *
 * model.safetensors (fp32 masters, exported names, geometry in the metadata), optional optim.safetensors
 * (moments m and v, names "m.<tensor>", "v.<tensor>"), state.json, MANIFEST.json with sizes and XXH64.
 * DURABLE: written in a
 * "*.tmp" directory, files fsynced, read back and compared with the hashes, directory renamed, parent
 * fsynced. `latest` and `best` are small files that name a step directory, replaced atomically. */
#ifndef LSA_DATA_CKPT_H
#define LSA_DATA_CKPT_H

#include "kernels/core/file.h"
#include "kernels/core/json.h"
#include "kernels/core/lsa_status.h"
#include "kernels/model/indexer.h"

/* Saves RUN/ckpt/step_{step} and points RUN/ckpt/latest at it; set_best also RUN/ckpt/best. params, m, v are
 * host arrays in the flat order of the parameter table; m and v may be NULL (import). state: borrowed; keys
 * step, epoch, asked, ... Refuses non-finite parameters (LSA_E_NUMERIC). keep > 0 removes the oldest steps
 * beyond `keep` that neither file names, except multiples of milestone_every (0: none). */
LSA_NODISCARD lsa_status lsa_ckpt_save(const char *run, int64_t step, const lsa_indexer_geom *g,
                                       const float *params, const float *m, const float *v,
                                       const json_t *state, bool set_best, int64_t keep,
                                       int64_t milestone_every, lsa_err *err);

/* Removes what an interrupted save left ("*.tmp") and, if keep > 0, the oldest steps as lsa_ckpt_save does.
 * Call it under the run lock. A run without checkpoints is fine. */
LSA_NODISCARD lsa_status lsa_ckpt_clean(const char *run, int64_t keep, int64_t milestone_every, lsa_err *err);

/* dir = the step directory that `arg` means: a step directory, a latest/best file, or RUN (best, else
 * latest). */
LSA_NODISCARD lsa_status lsa_ckpt_resolve(char dir[LSA_PATH_MAX], const char *arg, lsa_err *err);

/* dir = the newest step directory of the run older than step directory `than`; "" if there is none. */
LSA_NODISCARD lsa_status lsa_ckpt_older(char dir[LSA_PATH_MAX], const char *run, const char *than,
                                        lsa_err *err);

typedef struct lsa_ckpt {
    char dir[LSA_PATH_MAX];
    int64_t step;
    lsa_indexer_geom geom;
    float *params; /* host, flat; owned */
    float *m, *v;  /* NULL without optimizer state; owned */
    json_t *state; /* owned */
} lsa_ckpt;

/* Opens what `arg` means, checks MANIFEST hashes, geometry, names, shapes, finiteness. with_optim: also the
 * moments (missing is LSA_E_FORMAT). */
LSA_NODISCARD lsa_status lsa_ckpt_load(lsa_ckpt *out, const char *arg, bool with_optim, lsa_err *err);
void lsa_ckpt_fini(lsa_ckpt *c);

#endif
