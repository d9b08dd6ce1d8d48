/* lsa-dump run and resume: documents through the teacher, sealed shards out. */
#ifndef LSA_DATA_DUMP_RUN_H
#define LSA_DATA_DUMP_RUN_H

#include "data/dump/plan.h"
#include "data/manifest.h"
#include "infer/gpu_run.h"

/* Where the seconds of a run went, from its first document on. Merging and sealing, the taps and the GPU run
 * side by side: what comes near `seconds` binds. */
typedef struct lsa_dump_times {
    double seconds, merging, sealing;
    int64_t tokens;
    bool on_gpu;
    lsa_gpu_times gpu; /* if on_gpu */
} lsa_dump_times;
void lsa_dump_log_times(const lsa_dump_times *t);
LSA_NODISCARD lsa_status lsa_dump_print_times_json(const lsa_dump_times *t, lsa_err *err); /* one line */

/* Starts a dump in `out` (fresh or empty folder), or goes on with one (resume: opts is read from the
 * manifest). A dump that does not fit disk or host memory is refused before weights are loaded; dry_run
 * stops after the plan. LSA_E_INTERRUPTED after SIGINT/SIGTERM: sealed shards stay,
 * nothing partial is left. device: "cpu", "cuda" or "cuda:N"; a dump that began on one may end on another, in
 * other last bits. */
LSA_NODISCARD lsa_status lsa_dump_run(const lsa_dump_opts *o, const char *out, const char *device,
                                      bool dry_run, lsa_dump_plan *plan, lsa_dump_times *times, lsa_err *err);
LSA_NODISCARD lsa_status lsa_dump_resume(const char *out, const char *device, const lsa_dump_opts *how,
                                         lsa_err *err); /* how: what is not recorded (options.h) */

/* A folder that may be filled: LSA_E_ARG if it holds a manifest, or shards without one. */
LSA_NODISCARD lsa_status lsa_dump_check_fresh(const char *out, lsa_err *err);
/* Removes what a killed writer left in `out`: temporary files, and shards that the manifest does not name. */
LSA_NODISCARD lsa_status lsa_dump_clean(const lsa_manifest *m, const char *out, lsa_err *err);

#endif
