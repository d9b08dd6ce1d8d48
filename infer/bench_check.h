/* A batched step's results (kernels/model/gpu_batch.h) against sums in double on the host, from the same
 * synthetic numbers. */
#ifndef LSA_INFER_BENCH_CHECK_H
#define LSA_INFER_BENCH_CHECK_H

#include "kernels/model/gpu_batch.h"

typedef struct lsa_bench_check {
    double logit_off;  /* largest difference of a sampled logit, over the root mean square of them */
    double out_off;    /* the same of the output channels of sampled heads */
    uint64_t checksum; /* XXH64 of the selections and outputs that were looked at */
} lsa_bench_check;

/* Runs the first and the last CSA layer, the last HCA layer and the first layer, and compares those of the
 * first and the last request. LSA_E_NUMERIC if something is off: logits by more than 1 % of their root mean
 * square, a selection that is not the exact top-k of the logits, outputs by more than 1 %. */
LSA_NODISCARD lsa_status lsa_bench_check_batch(lsa_bench_check *out, lsa_gpu_batch *b,
                                               const lsa_gpu_batch_opts *o, lsa_err *err);

#endif
