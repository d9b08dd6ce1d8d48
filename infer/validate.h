/* lsa-decode validate: documents through the teacher, teacher-forced, under several policies of what stays
 * resident.
 *
 * Definitions (all of them in the design, 2): windows start at multiples of tau; evictable = chunks below
 * floor((s - tail)/4); K = ceil(budget x evictable) of them are kept; newer chunks are resident; one set for
 * all CSA layers. */
#ifndef LSA_INFER_VALIDATE_H
#define LSA_INFER_VALIDATE_H

#include "data/docs.h"
#include "data/indexer_file.h"
#include "infer/full_run.h"
#include "infer/recall.h"
#include "kernels/model/gpu_session.h"

enum { LSA_MAX_BUDGET = 16, LSA_MAX_HEAT = 3, LSA_HEAT_ROWS = 128, LSA_HEAT_COLS = 192 };

typedef struct lsa_validate_opts {
    bool policy[LSA_N_POLICY];
    double budget[LSA_MAX_BUDGET]; /* in (0, 1] */
    int n_budget;
    int64_t tau, tail, sink;
    int64_t top_k;    /* > 0 replaces the budgets for lsa and untrained: one row with budget < 0 each */
    double threshold; /* >= 0 likewise */
    uint64_t seed;
    int64_t
        logits_mib; /* memory for the full runs' log-probabilities; a document that does not fit has no KL */
    lsa_ctx *gpu;   /* NULL: on the CPU; else a CUDA context, borrowed: one document and policy at a time */
    lsa_gpu_storage storage; /* there: of the policies that evict; full has the same bytes, dense f32 */
    int32_t page;            /* tiered: chunks a page, at least 1 */
    const char *masks; /* NULL, or a file to be written: which chunks were kept, one JSON line per document,
                          row and window */
} lsa_validate_opts;

/* Where the resident chunks of the first document lie: rows of windows, columns of chunk position. 0: not
 * formed yet, else 1 + 254 x the resident share. */
typedef struct lsa_heat {
    lsa_policy policy;
    double budget;
    int rows, cols;
    uint8_t v[LSA_HEAT_ROWS][LSA_HEAT_COLS];
} lsa_heat;

typedef struct lsa_validation {
    lsa_result *row; /* n rows, policies in enum order, budgets in the given order; owned */
    int n;
    lsa_result full; /* the full run of the same documents, asked for or not */
    lsa_heat heat[LSA_MAX_HEAT];
    int n_heat;
    const lsa_doc *first; /* the document of the heat maps, borrowed from docs */
    double seconds;
} lsa_validation;

/* indexer may be NULL unless the lsa policy is asked for; an indexer that does not fit the teacher is
 * LSA_E_CONFIG before anything runs. After a signal: LSA_E_INTERRUPTED, and *out holds the documents that
 * were finished (full.documents says how many). */
LSA_NODISCARD lsa_status lsa_validate(lsa_validation *out, const lsa_engine *e, const lsa_docs *docs,
                                      const lsa_indexer_file *indexer, const lsa_validate_opts *o,
                                      lsa_err *err);
void lsa_validation_fini(lsa_validation *v);

#endif
