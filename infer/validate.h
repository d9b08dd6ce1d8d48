/* lsa-decode validate: documents through the teacher, teacher-forced, under several policies of what stays resident.
 *
 * Definitions (all of them in the design, 2): windows start at multiples of tau; evictable = chunks below floor((s - tail)/4);
 * K = ceil(budget x evictable) of them are kept; newer chunks are resident; one set for all CSA layers. */
#ifndef LSA_INFER_VALIDATE_H
#define LSA_INFER_VALIDATE_H

#include "data/docs.h"
#include "data/indexer_file.h"
#include "infer/lsa_infer.h"
#include "infer/recall.h"

typedef enum lsa_policy {
    LSA_POLICY_FULL = 0, /* every chunk resident, native top-k: the teacher as it is */
    LSA_POLICY_DENSE,    /* attention over every visible chunk */
    LSA_POLICY_LSA,      /* the exported indexer */
    LSA_POLICY_ORACLE,   /* true mass of the window */
    LSA_POLICY_RECENCY,  /* the latest */
    LSA_POLICY_RANDOM,
    LSA_POLICY_UNTRAINED, /* a random indexer of the same geometry */
    LSA_POLICY_LAST,      /* mass of the window before */
    LSA_POLICY_LAST_SPREAD,
    LSA_N_POLICY
} lsa_policy;
const char *lsa_policy_name(lsa_policy p);

enum { LSA_MAX_BUDGET = 16, LSA_HEAT_ROWS = 128, LSA_HEAT_COLS = 192 };

typedef struct lsa_validate_opts {
    bool policy[LSA_N_POLICY];
    double budget[LSA_MAX_BUDGET];
    int n_budget;
    int64_t tau, tail, sink, top_k; /* top_k > 0 replaces the budgets for lsa and untrained */
    double threshold;               /* >= 0 likewise */
    uint64_t seed;
    int64_t logits_mib;             /* keep the full run's logits (for KL) up to this size a document */
} lsa_validate_opts;

/* Which tokens count for which part; see the design for the offsets. */
enum { LSA_PART_ALL = 0, LSA_PART_ANSWER, LSA_PART_REPLAY, LSA_PART_OTHER, LSA_N_PART };

typedef struct lsa_result {
    lsa_policy policy;
    double budget; /* < 0: not applicable */
    int64_t documents, tokens, windows;
    double nll[LSA_N_PART]; /* sums */
    int64_t n[LSA_N_PART];
    int64_t recalled, agree, n_kl, misses, kept, evictable;
    double kl, captured, total_mass, gpu_bytes; /* sums (gpu_bytes over windows) */
    bool has_needs;
} lsa_result;

/* Where the resident chunks of the first document lie: rows of windows, columns of chunk position, 0..255. */
typedef struct lsa_heat {
    lsa_policy policy;
    double budget;
    int rows, cols;
    uint8_t v[LSA_HEAT_ROWS][LSA_HEAT_COLS];
} lsa_heat;

typedef struct lsa_validation {
    lsa_result *row; /* n rows, policies in enum order, budgets in the given order; owned */
    int n;
    lsa_heat heat[4];
    int n_heat;
    double seconds;
} lsa_validation;

/* indexer may be NULL unless the lsa policy is asked for. LSA_E_INTERRUPTED after a signal. */
LSA_NODISCARD lsa_status lsa_validate(lsa_validation *out, const lsa_engine *e, const lsa_docs *docs, const lsa_indexer_file *indexer,
                                      const lsa_validate_opts *o, lsa_err *err);
void lsa_validation_fini(lsa_validation *v);

/* part[t] = bits (1 << LSA_PART_*) of predicted token t of a document; t = 0 is never predicted. */
void lsa_token_parts(uint8_t *part, const lsa_doc *d);

#endif
