/* Memory of a GPU session, counted as it is allocated. */
#include "kernels/cuda/decode/session_state.h"

lsa_status decode_alloc(lsa_gpu_session *s, void **out, int64_t n, size_t size, int64_t *counter,
                        const char *name, lsa_err *err) {
    const lsa_status st = lsa_ctx_alloc_(s->t->ctx, out, n, size, name, err);
    if (st == LSA_OK) *counter += n * (int64_t)size;
    return st;
}

lsa_status decode_pinned(lsa_gpu_session *s, void **out, int64_t n, size_t size, lsa_err *err) {
    *out = NULL;
    const cudaError_t e = cudaHostAlloc(out, (size_t)n * size, cudaHostAllocMapped | cudaHostAllocPortable);
    if (e != cudaSuccess) {
        cudaGetLastError();
        *out = NULL;
        LSA_RET_FAIL(
            LSA_E_NOMEM,
            "%.1f MiB of pinned host memory refused (%s): lower max_tokens or raise the limit on locked "
            "memory",
            (double)n * (double)size / 1048576.0, cudaGetErrorString(e));
    }
    s->use.host += n * (int64_t)size;
    return LSA_OK;
}
