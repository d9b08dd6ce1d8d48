/* The retriever's life: see kernels/model/gpu_retrieve.h. */
#include <stdlib.h>

#include "kernels/cuda/serve/serve_state.h"

#define NEW(p, n, bytes)                                                                                     \
    do {                                                                                                     \
        void *x_ = NULL;                                                                                     \
        LSA_TRY(lsa_ctx_alloc_(x->ctx, &x_, (int64_t)(n), sizeof *(p), #p, err));                            \
        *(void **)&(p) = x_;                                                                                 \
        (bytes) += (int64_t)(n) * (int64_t)sizeof *(p);                                                      \
    } while (0)

static lsa_status work_memory(lsa_gpu_retriever *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t L = x->g.n_layer, M = x->max_batch, N = x->max_chunks, heads = x->heads;
    const int64_t q_bytes = x->form == SERVE_F32 ? 4 : x->form == SERVE_F16 ? 2 : 1;
    uint8_t *q = NULL;
    NEW(x->a, M * x->g.rank, x->bytes);
    NEW(x->u, M * x->g.rank, x->bytes);
    NEW(x->raw, M * x->g.n_head * 128, x->bytes);
    NEW(q, L * M * heads * 128 * q_bytes, x->bytes);
    x->q = q;
    NEW(x->w, L * M * heads, x->bytes);
    NEW(x->code, M * N, x->bytes);
    NEW(x->mask, M * ((N + 31) / 32), x->bytes);
    NEW(x->page_key, M * ((N + LSA_PAGE_CHUNKS - 1) / LSA_PAGE_CHUNKS), x->bytes);
    NEW(x->count, M * ((N + SERVE_BLOCK - 1) / SERVE_BLOCK), x->bytes);
    NEW(x->histogram, M * SERVE_BINS, x->bytes);
    NEW(x->bound, M, x->bytes);
    LSA_TRY(lsa_ctx_sync(x->ctx, err)); /* zeroed before another stream uses it */
done:
    return st;
}

extern "C" void lsa_gpu_retriever_destroy(lsa_gpu_retriever *x) {
    if (!x) return;
    void *p[] = {x->a,    x->u,        x->raw,   x->q,         x->w,    x->code,
                 x->mask, x->page_key, x->count, x->histogram, x->bound};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(x->ctx, p[i]);
    if (x->weights && --x->weights->users == 0) {
        lsa_ctx_free(x->ctx, x->weights->p);
        lsa_ctx_free(x->ctx, x->weights->freq);
        free(x->weights);
    }
    free(x);
}

extern "C" lsa_status lsa_gpu_retriever_create(lsa_gpu_retriever **out, lsa_ctx *ctx,
                                               const lsa_indexer_geom *g, const float *params,
                                               lsa_query_path path, int32_t max_batch, int64_t max_chunks,
                                               bool portable, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_retriever *x = NULL;
    cudaDeviceProp prop;
    float freq[64];
    bool sm90;
    *out = NULL;
    if (lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA) LSA_FAIL(LSA_E_ARG, "a retriever needs a CUDA context");
    LSA_TRY(lsa_indexer_geom_check(g, err));
    if (max_batch < 1 || max_batch > 4096)
        LSA_FAIL(LSA_E_ARG, "max_batch must be in [1, 4096], found %d", max_batch);
    if (max_chunks < 1 || max_chunks > (int64_t)1 << 30)
        LSA_FAIL(LSA_E_ARG, "max_chunks must be in [1, 2^30], found %lld", (long long)max_chunks);
    x = (lsa_gpu_retriever *)calloc(1, sizeof *x);
    if (!x) LSA_FAIL(LSA_E_NOMEM, "out of host memory for a retriever");
    x->ctx = ctx;
    x->cs = lsa_cuda(ctx);
    x->g = *g;
    x->path = path;
    x->max_batch = max_batch;
    x->max_chunks = max_chunks;
    LSA_CUDA(cudaGetDeviceProperties(&prop, x->cs->device));
    x->n_sm = prop.multiProcessorCount;
    x->chained = prop.major >= 9;
    sm90 = prop.major == 9 && prop.minor == 0 && !portable;
    x->form = !sm90 || path == LSA_PATH_F32 ? SERVE_F32 : path == LSA_PATH_FP8 ? SERVE_FP8 : SERVE_F16;
    x->heads = x->form == SERVE_F32 ? g->n_head : g->n_head <= 64 ? 64 : 128;
    x->weights = (serve_weights *)calloc(1, sizeof *x->weights);
    if (!x->weights) LSA_FAIL(LSA_E_NOMEM, "out of host memory for a retriever");
    x->weights->users = 1;
    NEW(x->weights->p, lsa_indexer_n_param(g), x->weights->bytes);
    NEW(x->weights->freq, 64, x->weights->bytes);
    lsa_rope_freqs(freq, &g->rope);
    LSA_TRY(lsa_ctx_upload(ctx, x->weights->p, params, (size_t)lsa_indexer_n_param(g) * sizeof(float), err));
    LSA_TRY(lsa_ctx_upload(ctx, x->weights->freq, freq, (size_t)(g->rope.dim / 2) * sizeof(float), err));
    if (x->form != SERVE_F32) LSA_TRY(serve_prepare_sm90(x, err));
    LSA_TRY(work_memory(x, err));
    *out = x;
    x = NULL;
done:
    lsa_gpu_retriever_destroy(x);
    return st;
}

extern "C" lsa_status lsa_gpu_retriever_clone(lsa_gpu_retriever **out, const lsa_gpu_retriever *from,
                                              lsa_err *err) {
    lsa_status st = LSA_OK;
    *out = NULL;
    lsa_gpu_retriever *x = (lsa_gpu_retriever *)calloc(1, sizeof *x);
    if (!x) LSA_FAIL(LSA_E_NOMEM, "out of host memory for a retriever");
    x->ctx = from->ctx, x->cs = from->cs, x->g = from->g, x->path = from->path, x->form = from->form;
    x->chained = from->chained, x->max_batch = from->max_batch, x->heads = from->heads, x->n_sm = from->n_sm;
    x->max_chunks = from->max_chunks;
    x->weights = from->weights;
    x->weights->users++;
    LSA_TRY(work_memory(x, err));
    *out = x;
    x = NULL;
done:
    lsa_gpu_retriever_destroy(x);
    return st;
}

extern "C" int64_t lsa_gpu_retriever_bytes(const lsa_gpu_retriever *x) {
    return x->bytes + x->weights->bytes;
}

static lsa_status check_call(const lsa_gpu_retriever *x, int32_t layer, int32_t m, lsa_err *err) {
    if (layer < 0 || layer >= x->g.n_layer)
        LSA_RET_FAIL(LSA_E_ARG, "layer must be in [0, %d), found %d", x->g.n_layer, layer);
    if (m < 0 || m > x->max_batch) LSA_RET_FAIL(LSA_E_ARG, "requests: at most %d, found %d", x->max_batch, m);
    LSA_CUDA(cudaSetDevice(x->cs->device));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_retriever_query(lsa_gpu_retriever *x, int32_t layer, int32_t m,
                                              const uint16_t *hidden, const int64_t *position, void *stream,
                                              lsa_err *err) {
    const lsa_status st = check_call(x, layer, m, err);
    if (st != LSA_OK || m == 0) return st;
    return serve_query(x, layer, m, hidden, position, (cudaStream_t)stream, err);
}

extern "C" lsa_status lsa_gpu_retriever_score(lsa_gpu_retriever *x, int32_t layer, int32_t m,
                                              const lsa_gpu_keys *keys, float *logit, int64_t ld,
                                              void *stream, lsa_err *err) {
    const lsa_status st = check_call(x, layer, m, err);
    if (st != LSA_OK || m == 0) return st;
    return x->form == SERVE_F32 ? serve_score_any(x, layer, m, keys, logit, ld, (cudaStream_t)stream, err)
                                : serve_score_sm90(x, layer, m, keys, logit, ld, (cudaStream_t)stream, err);
}
