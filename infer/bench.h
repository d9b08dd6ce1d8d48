/* lsa-decode bench: what a decode step's attention path costs in time and GPU memory, full against Lookahead
 * Sparse Attention, at the geometry of a config.json, on synthetic caches (kernels/model/gpu_batch.h). */
#ifndef LSA_INFER_BENCH_H
#define LSA_INFER_BENCH_H

#include "data/teacher.h"
#include "kernels/ctx.h"

enum { LSA_BENCH_LIST = 8 };
typedef struct lsa_bench_opts {
    int64_t context[LSA_BENCH_LIST], batch[LSA_BENCH_LIST]; /* ascending */
    int32_t n_context, n_batch;
    double budget;  /* of all pages: resident, tail, sink and staging; in (0, 1] */
    double pool_gb; /* GPU memory for caches in the last part, in 10^9 bytes; 0: leave that part out */
    bool json;
} lsa_bench_opts;

/* Prints rows as it goes. Stops at the first result that its check on the host refuses (LSA_E_NUMERIC). */
LSA_NODISCARD lsa_status lsa_bench(lsa_ctx *ctx, const lsa_teacher_config *c, const lsa_bench_opts *o,
                                   lsa_err *err);

#endif
