/* lsa-dump verify --recheck: documents through the teacher once more, against what the shards hold. Finds
 * what hashes cannot: shards whose values were wrong, or changed, before they were hashed. */
#ifndef LSA_DATA_DUMP_RECHECK_H
#define LSA_DATA_DUMP_RECHECK_H

#include <stdint.h>

#include "kernels/core/lsa_status.h"

typedef struct lsa_recheck_opts {
    const char *device; /* where the teacher runs: that of the dump, or last bits differ; NULL: cpu */
    const char *teacher, *tokens, *needs; /* NULL: where the manifest says they were */
    int64_t n;                            /* documents, drawn without repetition */
    int64_t seed;
} lsa_recheck_opts;

/* The tokens of every sealed document against its hash, then the statistics of n of them recomputed with the
 * options of the dump and compared bit for bit: keys, hidden vectors, votes, selections, logits, masses. Each
 * difference is logged as a warning with its place, its count and the largest difference. LSA_E_FORMAT if
 * anything differs. *values: how many numbers were compared. The same build on the same kind of CPU gives the
 * same bits; another one rounds differently. */
LSA_NODISCARD lsa_status lsa_dump_recheck(int64_t *values, const char *dir, const lsa_recheck_opts *o,
                                          lsa_err *err);

#endif
