/* Stands in for the CUDA backend in builds without nvcc, so that callers need no #ifdef. */
#include "kernels/backend.h"

lsa_status lsa_cuda_open(lsa_ctx *c, int index, lsa_err *err) {
    (void)c;
    LSA_RET_FAIL(
        LSA_E_DEVICE,
        "GPU %d was asked for, but this build has no CUDA; configure with -DLSA_CUDA=ON or use --device cpu",
        index);
}
