/* Level 1 of a batch: the memory indexer's queries and logits over all chunks, and the pages that it keeps.
 */
#include <string.h>

#include "kernels/cuda/decode/batch_state.h"

void level1_free(lsa_gpu_batch *b) {
    level1_state *const l = &b->l1;
    if (l->stream) cudaStreamSynchronize(l->stream);
    void *const p[] = {l->keys, l->page, l->n, l->position, l->hidden, l->logit, l->out, l->n_out};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(b->ctx, p[i]);
    cudaFreeHost(l->host_out);
    cudaFreeHost(l->host_n);
    if (l->begin) cudaEventDestroy(l->begin);
    if (l->end) cudaEventDestroy(l->end);
    if (l->stream) cudaStreamDestroy(l->stream);
}

static lsa_status make(lsa_gpu_batch *b, int32_t hidden, lsa_err *err) {
    lsa_status st = LSA_OK;
    level1_state *const l = &b->l1;
    const int64_t B = b->o.batch, P = b->n_page, F = b->o.n_memory;
    lsa_gpu_keys *keys = NULL;
    int32_t *page = NULL;
    int64_t *n = NULL;
    LSA_TRY(batch_pinned((void **)&keys, F * B, sizeof *keys, err));
    LSA_TRY(batch_pinned((void **)&page, B * P, sizeof *page, err));
    LSA_TRY(batch_pinned((void **)&n, 2 * B, sizeof *n, err));
    BATCH_NEW(l->keys, F * B, tables);
    BATCH_NEW(l->page, B * P, tables);
    BATCH_NEW(l->n, B, tables);
    BATCH_NEW(l->position, B, tables);
    BATCH_NEW(l->hidden, B * hidden, work);
    BATCH_NEW(l->logit, F * B * P * LSA_PAGE_CHUNKS, work);
    BATCH_NEW(l->out, B * P, work);
    BATCH_NEW(l->n_out, B, work);
    BATCH_PINNED(l->host_out, B * P);
    BATCH_PINNED(l->host_n, B);
    for (int64_t i = 0; i < B; i++) {
        n[i] = P * LSA_PAGE_CHUNKS, n[B + i] = b->o.tokens - 1;
        for (int64_t p = 0; p < P; p++) page[i * P + p] = (int32_t)((i * P + p) * b->n_full);
        for (int64_t j = 0; j < F; j++)
            keys[j * B + i] = {b->all_keys + b->full_at[b->o.memory[j]] * (int64_t)KEY_PAGE, l->page + i * P,
                               n[i]};
    }
    LSA_TRY(lsa_ctx_upload(b->ctx, l->keys, keys, (size_t)(F * B) * sizeof *keys, err));
    LSA_TRY(lsa_ctx_upload(b->ctx, l->page, page, (size_t)(B * P) * sizeof *page, err));
    LSA_TRY(lsa_ctx_upload(b->ctx, l->n, n, (size_t)B * sizeof *n, err));
    LSA_TRY(lsa_ctx_upload(b->ctx, l->position, n + B, (size_t)B * sizeof *n, err));
    LSA_TRY(lsa_ctx_sync(b->ctx, err));
    LSA_CUDA(cudaEventCreate(&l->begin));
    LSA_CUDA(cudaEventCreate(&l->end));
    LSA_CUDA(cudaStreamCreateWithFlags(&l->stream, cudaStreamNonBlocking));
    l->n_hidden = hidden;
done:
    cudaFreeHost(keys);
    cudaFreeHost(page);
    cudaFreeHost(n);
    return st;
}

extern "C" lsa_status lsa_gpu_batch_level1(lsa_gpu_batch *b, lsa_gpu_retriever *x, int32_t hidden,
                                           int32_t cycle, const int32_t **page, int64_t *ld,
                                           const int32_t **n, double *seconds, lsa_err *err) {
    lsa_status st = LSA_OK;
    level1_state *const l = &b->l1;
    const int32_t B = b->o.batch;
    const int64_t P = b->n_page, chunks = P * LSA_PAGE_CHUNKS;
    lsa_select_rule rule;
    float ms = 0;
    if (b->o.n_memory < 1) LSA_FAIL(LSA_E_ARG, "level 1 has no layers");
    if (!l->n_hidden) LSA_TRY(make(b, hidden, err));
    if (hidden != l->n_hidden) LSA_FAIL(LSA_E_ARG, "hidden vectors of %d, before of %d", hidden, l->n_hidden);
    memset(&rule, 0, sizeof rule);
    rule.mode = LSA_SELECT_PAGES, rule.n_layer = b->o.n_memory, rule.k = b->active;
    rule.sink = LSA_PAGE_CHUNKS, rule.tail = LSA_PAGE_CHUNKS;
    LSA_TRY(synth_hidden(l->hidden, B, hidden, cycle, l->stream, err));
    LSA_CUDA(cudaEventRecord(l->begin, l->stream));
    for (int32_t j = 0; j < b->o.n_memory; j++) {
        LSA_TRY(lsa_gpu_retriever_query(x, j, B, l->hidden, l->position, l->stream, err));
        LSA_TRY(lsa_gpu_retriever_score(x, j, B, l->keys + (int64_t)j * B, l->logit + j * B * chunks, chunks,
                                        l->stream, err));
    }
    LSA_TRY(
        lsa_gpu_retriever_select(x, B, &rule, l->logit, chunks, l->n, l->out, P, l->n_out, l->stream, err));
    LSA_CUDA(cudaMemcpyAsync(l->host_out, l->out, (size_t)(B * P) * sizeof *l->out, cudaMemcpyDeviceToHost,
                             l->stream));
    LSA_CUDA(cudaMemcpyAsync(l->host_n, l->n_out, (size_t)B * sizeof *l->n_out, cudaMemcpyDeviceToHost,
                             l->stream));
    LSA_CUDA(cudaEventRecord(l->end, l->stream));
    LSA_CUDA(cudaEventSynchronize(l->end));
    LSA_CUDA(cudaEventElapsedTime(&ms, l->begin, l->end));
    *page = l->host_out, *n = l->host_n, *ld = P;
    if (seconds) *seconds = ms * 1e-3;
done:
    return st;
}
