/* The CUDA backend: one GPU, one stream. Memory is plain cudaMalloc; uploads come from pageable memory, which
 * cudaMemcpyAsync stages before it returns, so the source may be reused. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/cuda_state.h"

static lsa_status mem_alloc(lsa_ctx *c, void **out, size_t n, const char *what, lsa_err *err) {
    *out = NULL;
    cudaError_t e = cudaMalloc(out, n);
    if (e != cudaSuccess) {
        cudaGetLastError();
        LSA_RET_FAIL(LSA_E_NOMEM, "allocating %s: %.1f MiB of GPU memory refused (%s); lower train.batch",
                     what, (double)n / 1048576.0, cudaGetErrorString(e));
    }
    LSA_CUDA(cudaMemsetAsync(*out, 0, n, lsa_cuda(c)->stream));
    return LSA_OK;
}
static void mem_release(lsa_ctx *c, void *p) {
    (void)c;
    cudaFree(p);
}
static lsa_status mem_upload(lsa_ctx *c, void *dst, const void *src, size_t n, lsa_err *err) {
    LSA_CUDA(cudaMemcpyAsync(dst, src, n, cudaMemcpyHostToDevice, lsa_cuda(c)->stream));
    return LSA_OK;
}
static lsa_status mem_download(lsa_ctx *c, void *dst, const void *src, size_t n, lsa_err *err) {
    LSA_CUDA(cudaMemcpyAsync(dst, src, n, cudaMemcpyDeviceToHost, lsa_cuda(c)->stream));
    LSA_CUDA(cudaStreamSynchronize(lsa_cuda(c)->stream));
    return LSA_OK;
}
static lsa_status mem_zero(lsa_ctx *c, void *dst, size_t n, lsa_err *err) {
    LSA_CUDA(cudaMemsetAsync(dst, 0, n, lsa_cuda(c)->stream));
    return LSA_OK;
}
static lsa_status wait(lsa_ctx *c, lsa_err *err) {
    LSA_CUDA(cudaStreamSynchronize(lsa_cuda(c)->stream));
    return LSA_OK;
}
static void close_device(lsa_ctx *c) {
    cuda_state *s = lsa_cuda(c);
    if (!s) return;
    lsa_cuda_gemm_close(s);
    if (s->lt) cublasLtDestroy(s->lt);
    cudaFree(s->gemm_workspace);
    cudaFree(s->partial);
    if (s->stream) cudaStreamDestroy(s->stream);
    free(s);
    c->device = NULL;
}

static lsa_backend make_backend(void) {
    lsa_backend b = {};
    b.name = "cuda";
    b.alloc = mem_alloc;
    b.release = mem_release;
    b.upload = mem_upload;
    b.download = mem_download;
    b.zero = mem_zero;
    b.sync = wait;
    b.close = close_device;
#define LSA_OP(op) b.op = lsa_cuda_##op;
#include "kernels/ops.def"
#undef LSA_OP
    return b;
}

static const lsa_backend g_backend = make_backend();

static lsa_status open_device(lsa_ctx *c, cuda_state *s, int index, lsa_err *err) {
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0) {
        cudaGetLastError();
        LSA_RET_FAIL(LSA_E_DEVICE, "no usable GPU: %s; use --device cpu",
                     e != cudaSuccess ? cudaGetErrorString(e) : "none found");
    }
    if (index >= n) LSA_RET_FAIL(LSA_E_DEVICE, "GPU %d was asked for, this machine has %d", index, n);
    cudaDeviceProp p;
    LSA_CUDA(cudaSetDevice(index));
    LSA_CUDA(cudaGetDeviceProperties(&p, index));
    if (p.major < 8)
        LSA_RET_FAIL(LSA_E_DEVICE, "GPU %d (%s) is sm_%d%d; sm_80 or later is needed", index, p.name, p.major,
                     p.minor);
    LSA_CUDA(cudaStreamCreate(&s->stream));
    if (cublasLtCreate(&s->lt) != CUBLAS_STATUS_SUCCESS)
        LSA_RET_FAIL(LSA_E_DEVICE, "cuBLASLt could not be initialised on GPU %d", index);
    s->gemm_bytes = (size_t)32 << 20;
    LSA_CUDA(cudaMalloc(&s->gemm_workspace, s->gemm_bytes));
    LSA_CUDA(cudaMalloc((void **)&s->partial, LSA_CUDA_PARTIALS * sizeof(double)));
    snprintf(c->text, sizeof c->text, "cuda:%d %.64s, sm_%d%d, %.0f GiB", index, p.name, p.major, p.minor,
             (double)p.totalGlobalMem / 1073741824.0);
    return LSA_OK;
}

extern "C" lsa_status lsa_cuda_open(lsa_ctx *c, int index, lsa_err *err) {
    cuda_state *s = (cuda_state *)calloc(1, sizeof *s);
    if (!s) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    s->device = index;
    c->device = s;
    lsa_status st = open_device(c, s, index, err);
    if (st != LSA_OK) {
        close_device(c);
        return st;
    }
    c->kind = LSA_BACKEND_CUDA;
    c->b = &g_backend;
    return LSA_OK;
}
