/* Which chunks stay resident: the policies that lsa-decode validate compares, and which tokens count for
 * which part of the loss.
 *
 * Pure functions of their arguments, thread-safe. Definitions: the design, 1 and 2. */
#ifndef LSA_INFER_POLICY_H
#define LSA_INFER_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "data/docs.h"
#include "kernels/core/lsa_status.h"

typedef enum lsa_policy {
    LSA_POLICY_FULL = 0, /* every chunk resident, native top-k: the teacher as it is */
    LSA_POLICY_DENSE,    /* attention over every visible chunk */
    LSA_POLICY_LSA,      /* the exported indexer */
    LSA_POLICY_ORACLE,   /* true mass of the window */
    LSA_POLICY_RECENCY,  /* the latest */
    LSA_POLICY_RANDOM,
    LSA_POLICY_UNTRAINED,   /* a random indexer of the same geometry */
    LSA_POLICY_LAST,        /* mass of the window before */
    LSA_POLICY_LAST_SPREAD, /* the same, each chunk lending its score (less 1e-3 a step) to the 16 that follow
                             */
    LSA_N_POLICY
} lsa_policy;

const char *lsa_policy_name(lsa_policy p);
bool lsa_policy_evicts(lsa_policy p);  /* false for full and dense: no budget */
bool lsa_policy_learned(lsa_policy p); /* lsa and untrained: ranked by a memory indexer */

/* Sets want[p] for every name in a list with commas. LSA_E_ARG names the unknown or empty word,
 * LSA_E_UNSUPPORTED for quest. */
LSA_NODISCARD lsa_status lsa_policy_parse(bool want[LSA_N_POLICY], const char *list, lsa_err *err);

/* What the policies without an indexer may look at for the window that starts at token s of document `doc`.
 */
typedef struct lsa_policy_inputs {
    const float *mass; /* [n] window mass, for oracle */
    const float *last; /* [n] mass of the window before, for last and last-spread */
    uint64_t seed;
    int64_t doc, s;
} lsa_policy_inputs;
/* score[n] of chunks 0..n-1: the highest are kept, ties to the lower index. Only policies that evict and are
 * not learned. */
void lsa_policy_score(float *score, lsa_policy p, const lsa_policy_inputs *in, int64_t n);

/* Parts of the loss: bits (1 << LSA_PART_*) of part[t] say what the prediction of token t counts for. Token 0
 * is never predicted; without needs there is only LSA_PART_ALL. */
enum { LSA_PART_ALL = 0, LSA_PART_ANSWER, LSA_PART_REPLAY, LSA_PART_OTHER, LSA_N_PART };
void lsa_token_parts(uint8_t *part, const lsa_doc *d);

#endif
