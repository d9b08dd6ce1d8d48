/* A batch's parts as CUDA graphs, and their times. */
#include <stdlib.h>

#include "kernels/cuda/decode/batch_state.h"

void graphs_free(lsa_gpu_batch *b) {
    for (int p = 0; p < LSA_BATCH_PARTS; p++)
        if (b->graph[p]) cudaGraphExecDestroy(b->graph[p]);
}

static lsa_status capture(lsa_gpu_batch *b, lsa_gpu_batch_part part, lsa_err *err) {
    cudaGraph_t g = NULL;
    if (b->graph[part]) return LSA_OK;
    LSA_CUDA(cudaStreamBeginCapture(b->cs->stream, cudaStreamCaptureModeThreadLocal));
    const lsa_status st = lsa_gpu_batch_launch(b, part, err);
    LSA_CUDA(cudaStreamEndCapture(b->cs->stream, &g));
    const cudaError_t e = st == LSA_OK ? cudaGraphInstantiate(&b->graph[part], g, 0) : cudaSuccess;
    cudaGraphDestroy(g);
    if (e != cudaSuccess) {
        cudaGetLastError();
        LSA_RET_FAIL(LSA_E_DEVICE, "CUDA graph of a step: %s", cudaGetErrorString(e));
    }
    return st;
}

static int by_size(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

extern "C" lsa_status lsa_gpu_batch_time(lsa_gpu_batch *b, lsa_gpu_batch_part part, int32_t n, int64_t flush,
                                         double *seconds, lsa_err *err) {
    enum { MOST = 64 };
    lsa_status st = LSA_OK;
    float ms[MOST];
    n = n < 1 ? 1 : n > MOST ? MOST : n;
    LSA_TRY(capture(b, part, err));
    if (flush > b->flush_bytes) {
        lsa_ctx_free(b->ctx, b->flush);
        b->flush = NULL, b->flush_bytes = 0;
        BATCH_NEW(b->flush, flush, work);
        b->flush_bytes = flush;
    }
    for (int32_t i = -1; i < n; i++) { /* once before */
        if (flush) LSA_CUDA(cudaMemsetAsync(b->flush, i, (size_t)flush, b->cs->stream));
        LSA_CUDA(cudaEventRecord(b->begin, b->cs->stream));
        LSA_CUDA(cudaGraphLaunch(b->graph[part], b->cs->stream));
        LSA_CUDA(cudaEventRecord(b->end, b->cs->stream));
        LSA_CUDA(cudaEventSynchronize(b->end));
        if (i >= 0) LSA_CUDA(cudaEventElapsedTime(&ms[i], b->begin, b->end));
    }
    qsort(ms, (size_t)n, sizeof *ms, by_size);
    *seconds = ms[n / 2] * 1e-3;
done:
    return st;
}

extern "C" lsa_status lsa_gpu_batch_steps(lsa_gpu_batch *b, int32_t n, double *seconds, lsa_err *err) {
    const lsa_status st = capture(b, LSA_BATCH_STEP, err);
    float ms = 0;
    if (st != LSA_OK) return st;
    LSA_CUDA(cudaEventRecord(b->begin, b->cs->stream));
    for (int32_t i = 0; i < n; i++) LSA_CUDA(cudaGraphLaunch(b->graph[LSA_BATCH_STEP], b->cs->stream));
    LSA_CUDA(cudaEventRecord(b->end, b->cs->stream));
    if (!seconds) return LSA_OK;
    LSA_CUDA(cudaEventSynchronize(b->end));
    LSA_CUDA(cudaEventElapsedTime(&ms, b->begin, b->end));
    *seconds = ms * 1e-3;
    return LSA_OK;
}
