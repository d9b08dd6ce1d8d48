/* lsa-dump run and resume: documents through the teacher, sealed shards out. */
#ifndef LSA_DATA_DUMP_RUN_H
#define LSA_DATA_DUMP_RUN_H

#include "data/dump/tap.h"
#include "data/manifest.h"

typedef struct lsa_dump_opts {
    const char *teacher, *tokens, *needs, *documents; /* needs and documents may be NULL */
    const char *layers;                               /* "all" or ordinals "0,2" */
    double top_p, dense_min;
    int64_t pool; /* 0: the teacher's index_topk */
    int64_t hidden_stride, dense_every, shard_bytes;
    bool no_stats, sim_fp8, sim_fp4;
} lsa_dump_opts;
lsa_dump_opts lsa_dump_defaults(void);

/* What a dump will take, from the input alone. */
typedef struct lsa_dump_plan {
    int64_t documents, tokens, longest, disk_bytes, disk_free, host_bytes;
    double tokens_per_s, seconds; /* 0 when not measured */
} lsa_dump_plan;

/* Starts a dump in `out` (fresh or empty folder), or goes on with one (resume: opts is read from the
 * manifest). dry_run stops after the plan. LSA_E_INTERRUPTED after SIGINT/SIGTERM: sealed shards stay,
 * nothing partial is left. */
LSA_NODISCARD lsa_status lsa_dump_run(const lsa_dump_opts *o, const char *out, bool dry_run,
                                      lsa_dump_plan *plan, lsa_err *err);
LSA_NODISCARD lsa_status lsa_dump_resume(const char *out, lsa_err *err);

/* A folder that may be filled: LSA_E_ARG if it holds a manifest, or shards without one. */
LSA_NODISCARD lsa_status lsa_dump_check_fresh(const char *out, lsa_err *err);
/* Removes what a killed writer left in `out`: temporary files, and shards that the manifest does not name. */
LSA_NODISCARD lsa_status lsa_dump_clean(const lsa_manifest *m, const char *out, lsa_err *err);

/* Plan only: no weights are loaded, config.json and the documents suffice. */
LSA_NODISCARD lsa_status lsa_dump_make_plan(lsa_dump_plan *plan, const lsa_dump_opts *o, const char *out,
                                            lsa_err *err);
void lsa_dump_print_plan(const lsa_dump_plan *p);

#endif
