/* lsa-dump import and its resume: documents recorded by others into sealed shards. What can be imported:
 * data/IMPORT_FORMAT.md. */
#ifndef LSA_DATA_DUMP_IMPORT_H
#define LSA_DATA_DUMP_IMPORT_H

#include <stdbool.h>

#include "kernels/core/cli.h"
#include "kernels/core/lsa_status.h"

typedef struct lsa_import_opts {
    lsa_multi from;      /* folders of doc_*.pkl, single .pkl files, .jsonl files */
    const char *teacher; /* folder with config.json; with weights, their hash becomes the shards' */
    double top_p;        /* label rule of recorded votes, as the recorder used it */
    int64_t pool;        /* the same; 0: index_topk */
    int64_t min_votes;   /* the same: chunks with fewer votes were not recorded */
    int64_t hidden_stride, shard_bytes;
    bool skip_bad; /* leave out documents that fail a check */
} lsa_import_opts;
lsa_import_opts lsa_import_defaults(void);

/* Fills `out` (fresh or empty). Documents in the order of `from`, files of a folder by name; nothing is
 * written before the first shard is whole. The first bad document ends it (LSA_E_FORMAT) unless skip_bad:
 * shards sealed before it stay and resume goes on. LSA_E_INTERRUPTED after SIGINT or SIGTERM. */
LSA_NODISCARD lsa_status lsa_import_run(const lsa_import_opts *o, const char *out, lsa_err *err);
LSA_NODISCARD lsa_status lsa_import_resume(const char *out, lsa_err *err);

/* Was the folder made by an import? */
LSA_NODISCARD lsa_status lsa_import_made(bool *yes, const char *out, lsa_err *err);

#endif
