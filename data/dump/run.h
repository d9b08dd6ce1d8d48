/* lsa-dump run and resume: documents through the teacher, sealed shards out. */
#ifndef LSA_DATA_DUMP_RUN_H
#define LSA_DATA_DUMP_RUN_H

#include "data/dump/options.h"
#include "data/manifest.h"

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

/* Plan only: no weights are loaded, config.json and the documents suffice. */
LSA_NODISCARD lsa_status lsa_dump_make_plan(lsa_dump_plan *plan, const lsa_dump_opts *o, const char *out,
                                            lsa_err *err);
void lsa_dump_print_plan(const lsa_dump_plan *p);

#endif
