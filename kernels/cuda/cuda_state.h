/* State and helpers of the CUDA backend. Internal to kernels/cuda. */
#ifndef LSA_KERNELS_CUDA_CUDA_STATE_H
#define LSA_KERNELS_CUDA_CUDA_STATE_H

#include <cuda_runtime.h>
#include <cublasLt.h>

extern "C" {
#include "kernels/backend.h"
}

struct gemm_plans; /* gemm.cu */

struct cuda_state {
    int device;
    cudaStream_t stream;
    cublasLtHandle_t lt;
    void *gemm_workspace; /* 32 MiB, for cuBLASLt */
    size_t gemm_bytes;
    gemm_plans *plans;
    double *partial; /* [LSA_CUDA_PARTIALS], for two-pass sums */
};
enum { LSA_CUDA_PARTIALS = 1024 };

void lsa_cuda_gemm_close(cuda_state *s);

static inline cuda_state *lsa_cuda(lsa_ctx *c) {
    return (cuda_state *)c->device;
}

/* Return LSA_E_DEVICE (or LSA_E_NOMEM) with the call's text; the recorded last error is cleared. */
#define LSA_CUDA(call)                                                                                       \
    do {                                                                                                     \
        cudaError_t e_ = (call);                                                                             \
        if (e_ != cudaSuccess) {                                                                             \
            cudaGetLastError();                                                                              \
            LSA_RET_FAIL(e_ == cudaErrorMemoryAllocation ? LSA_E_NOMEM : LSA_E_DEVICE, "%s: %s", #call,      \
                         cudaGetErrorString(e_));                                                            \
        }                                                                                                    \
    } while (0)
#define LSA_LAUNCHED(name)                                                                                   \
    do {                                                                                                     \
        cudaError_t e_ = cudaGetLastError();                                                                 \
        if (e_ != cudaSuccess) LSA_RET_FAIL(LSA_E_DEVICE, "kernel " name ": %s", cudaGetErrorString(e_));    \
        return LSA_OK;                                                                                       \
    } while (0)

#define LSA_OP(op) lsa_status lsa_cuda_##op(lsa_ctx *c, const lsa_##op##_args *a, lsa_err *err);
#include "kernels/ops.def"
#undef LSA_OP

/* Sum over a block of 256 threads in a fixed order; every thread gets it. */
static __device__ inline double lsa_block_sum(double v) {
    __shared__ double s[256];
    s[threadIdx.x] = v;
    __syncthreads();
    for (int k = 128; k > 0; k >>= 1) {
        if ((int)threadIdx.x < k) s[threadIdx.x] += s[threadIdx.x + k];
        __syncthreads();
    }
    const double r = s[0];
    __syncthreads();
    return r;
}

#endif
