/* The GPU retriever's memory and kernels. Internal to kernels/cuda/serve. See kernels/model/gpu_retrieve.h.
 *
 * Sizes: L layers, M most requests, H heads, r rank, d hidden, N most chunks. */
#ifndef LSA_KERNELS_CUDA_SERVE_SERVE_STATE_H
#define LSA_KERNELS_CUDA_SERVE_SERVE_STATE_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/cuda_state.h"

extern "C" {
#include "kernels/model/gpu_retrieve.h"
}

/* How queries are kept, by path and architecture. */
typedef enum serve_form {
    SERVE_F32 = 0, /* portable kernel: f32 [L, M, H, 128] */
    SERVE_F16, /* sm_90: f16 [L, M, heads, 128], channels in the order of score_sm90.cu, over a power of two
                */
    SERVE_FP8  /* sm_90: e4m3 [L, M, heads, 128] */
} serve_form;

struct serve_weights { /* shared by clones */
    int users;
    int64_t bytes;
    float *p, *freq;
};

struct lsa_gpu_retriever {
    cuda_state *cs;
    lsa_ctx *ctx;
    lsa_indexer_geom g;
    lsa_query_path path;
    serve_form form;
    bool chained; /* kernels may start while the one before ends (sm_90 and later): serve_wait */
    int32_t max_batch, heads, n_sm; /* heads: H rounded up to what the kernel multiplies (64 or 128) */
    int64_t max_chunks, bytes;      /* bytes: of the work memory */
    serve_weights *weights;
    float *a, *u, *raw; /* [M, r] [M, r] [M, H, 128] */
    void *q;            /* by form; heads beyond H are zero */
    float *w;           /* [L, M, heads] head weights, query scales folded in */
    /* selection */
    uint32_t *code, *mask;     /* [M, N] ordered scores; [M, N/32] chosen */
    uint64_t *page_key;        /* [M, N/64] */
    uint32_t *count;           /* [M, blocks] chosen in each block of chunks */
    uint32_t *histogram;       /* [M, SERVE_BINS] */
    struct serve_bound *bound; /* [M] */
};

enum { SERVE_DIGIT = 13, SERVE_BINS = 1 << SERVE_DIGIT, SERVE_BLOCK = 1024 /* chunks */ };

struct serve_bound { /* where the search for the k-th largest key stands */
    uint64_t found;
    int64_t k;     /* rank inside the bin found so far */
    int32_t shift; /* bits above it are known; 64: none */
    int32_t done;
};

lsa_status serve_query(lsa_gpu_retriever *x, int32_t layer, int32_t m, const uint16_t *hidden,
                       const int64_t *position, cudaStream_t s, lsa_err *err);
lsa_status serve_score_any(lsa_gpu_retriever *x, int32_t layer, int32_t m, const lsa_gpu_keys *keys,
                           float *logit, int64_t ld, cudaStream_t s, lsa_err *err);
lsa_status serve_score_sm90(lsa_gpu_retriever *x, int32_t layer, int32_t m, const lsa_gpu_keys *keys,
                            float *logit, int64_t ld, cudaStream_t s, lsa_err *err);
/* More shared memory than 48 KiB is allowed once, at create. */
lsa_status serve_prepare_sm90(lsa_gpu_retriever *x, lsa_err *err);

/* Kernels here are short: the start of the next one hides behind the end of the one before. Every kernel
 * calls serve_wait before it touches memory: what came before is then complete and visible. */
static __device__ __forceinline__ void serve_wait(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename... PARAMETERS, typename... VALUES>
static lsa_status serve_launch(const lsa_gpu_retriever *x, cudaStream_t s, const char *name, lsa_err *err,
                               void (*kernel)(PARAMETERS...), dim3 grid, unsigned threads, size_t shared,
                               VALUES... values) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t c = {};
    c.gridDim = grid;
    c.blockDim = dim3(threads);
    c.dynamicSmemBytes = shared;
    c.stream = s;
    c.attrs = &early;
    c.numAttrs = x->chained ? 1 : 0;
    const cudaError_t e = cudaLaunchKernelEx(&c, kernel, (PARAMETERS)values...);
    if (e != cudaSuccess) {
        cudaGetLastError();
        LSA_RET_FAIL(LSA_E_DEVICE, "kernel %s: %s", name, cudaGetErrorString(e));
    }
    return LSA_OK;
}

#endif
