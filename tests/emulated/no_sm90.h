/* In the place of serve/score_sm90.cu and decode/graph.cu, which do not run on a CPU: tensor cores of sm_90,
 * graphs. For one source of a test. */
#ifndef LSA_TESTS_EMULATED_NO_SM90_H
#define LSA_TESTS_EMULATED_NO_SM90_H

#include "kernels/cuda/decode/batch_state.h"

lsa_status serve_prepare_sm90(lsa_gpu_retriever *, lsa_err *) {
    return LSA_E_BUG;
}
lsa_status serve_score_sm90(lsa_gpu_retriever *, int32_t, int32_t, const lsa_gpu_keys *, float *, int64_t,
                            cudaStream_t, lsa_err *) {
    return LSA_E_BUG;
}
void graphs_free(lsa_gpu_batch *) {}

#endif
