/* Stands in for the CUDA backend in builds without nvcc, so that callers need no #ifdef. */
#include "kernels/backend.h"
#include "kernels/model/gpu_retrieve.h"

lsa_status lsa_cuda_open(lsa_ctx *c, int index, lsa_err *err) {
    (void)c;
    LSA_RET_FAIL(
        LSA_E_DEVICE,
        "GPU %d was asked for, but this build has no CUDA; configure with -DLSA_CUDA=ON or use --device cpu",
        index);
}

#define NO_CUDA LSA_RET_FAIL(LSA_E_UNSUPPORTED, "this build has no CUDA; configure with -DLSA_CUDA=ON")

lsa_status lsa_gpu_retriever_create(lsa_gpu_retriever **out, lsa_ctx *ctx, const lsa_indexer_geom *g,
                                    const float *params, lsa_query_path path, int32_t max_batch,
                                    int64_t max_chunks, bool portable, lsa_err *err) {
    (void)ctx, (void)g, (void)params, (void)path, (void)max_batch, (void)max_chunks, (void)portable;
    *out = NULL;
    NO_CUDA;
}
lsa_status lsa_gpu_retriever_clone(lsa_gpu_retriever **out, const lsa_gpu_retriever *x, lsa_err *err) {
    (void)x;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_retriever_destroy(lsa_gpu_retriever *x) {
    (void)x;
}
int64_t lsa_gpu_retriever_bytes(const lsa_gpu_retriever *x) {
    (void)x;
    return 0;
}
lsa_status lsa_gpu_retriever_query(lsa_gpu_retriever *x, int32_t layer, int32_t m, const uint16_t *hidden,
                                   const int64_t *position, void *stream, lsa_err *err) {
    (void)x, (void)layer, (void)m, (void)hidden, (void)position, (void)stream;
    NO_CUDA;
}
lsa_status lsa_gpu_retriever_score(lsa_gpu_retriever *x, int32_t layer, int32_t m, const lsa_gpu_keys *keys,
                                   float *logit, int64_t ld, void *stream, lsa_err *err) {
    (void)x, (void)layer, (void)m, (void)keys, (void)logit, (void)ld, (void)stream;
    NO_CUDA;
}
lsa_status lsa_gpu_retriever_observe(lsa_gpu_retriever *x, float *state, int64_t ld, int64_t n,
                                     const int32_t *chunk, const float *mass, void *stream, lsa_err *err) {
    (void)x, (void)state, (void)ld, (void)n, (void)chunk, (void)mass, (void)stream;
    NO_CUDA;
}
lsa_status lsa_gpu_retriever_select(lsa_gpu_retriever *x, int32_t m, const lsa_select_rule *rule,
                                    const float *logit, int64_t ld, const int64_t *n_chunk, int32_t *out,
                                    int64_t ld_out, int32_t *n_out, void *stream, lsa_err *err) {
    (void)x, (void)m, (void)rule, (void)logit, (void)ld, (void)n_chunk, (void)out, (void)ld_out, (void)n_out;
    (void)stream;
    NO_CUDA;
}
