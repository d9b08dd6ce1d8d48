/* A snapshot on its way to the host, while steps go on: through two pinned pieces, so that one is copied
 * while the other is emptied. All is taken at the start, because taking and releasing pinned memory waits for
 * the GPU. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/step/step_state.h"

enum { PIECE = 1 << 24 };

struct step_way {
    char *piece[2];
    cudaStream_t stream;
    cudaEvent_t full[2];
};

lsa_status step_way_open(step_way **out, lsa_err *err) {
    step_way *const w = *out = (step_way *)calloc(1, sizeof *w);
    if (!w) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    LSA_CUDA(cudaStreamCreateWithFlags(&w->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; i++) {
        LSA_CUDA(cudaHostAlloc((void **)&w->piece[i], PIECE, cudaHostAllocDefault));
        LSA_CUDA(cudaEventCreateWithFlags(&w->full[i], cudaEventDisableTiming));
    }
    return LSA_OK;
}

void step_way_close(step_way *w) {
    if (!w) return;
    for (int i = 0; i < 2; i++) {
        if (w->full[i]) cudaEventDestroy(w->full[i]);
        cudaFreeHost(w->piece[i]);
    }
    if (w->stream) cudaStreamDestroy(w->stream);
    free(w);
}

/* Piece i is asked for, then piece i - 1 is moved on. */
static lsa_status bring(const step_way *w, char *to, const char *from, size_t bytes, lsa_err *err) {
    const size_t n = (bytes + PIECE - 1) / PIECE;
    const auto size = [&](size_t i) { return i + 1 < n ? (size_t)PIECE : bytes - i * PIECE; };
    for (size_t i = 0; i <= n; i++) {
        if (i < n) {
            LSA_CUDA(cudaMemcpyAsync(w->piece[i % 2], from + i * PIECE, size(i), cudaMemcpyDeviceToHost,
                                     w->stream));
            LSA_CUDA(cudaEventRecord(w->full[i % 2], w->stream));
        }
        if (i == 0) continue;
        LSA_CUDA(cudaEventSynchronize(w->full[(i - 1) % 2]));
        memcpy(to + (i - 1) * PIECE, w->piece[(i - 1) % 2], size(i - 1));
    }
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_snapshot_get(const lsa_gpu_step *s, float *params, float *m, float *v,
                                           lsa_err *err) {
    lsa_status st = LSA_OK;
    float *const to[3] = {params, m, v};
    if (!s->way) LSA_RET_FAIL(LSA_E_ARG, "this step was made without memory for snapshots");
    LSA_TRY(lsa_gpu_thread_begin(s, err));
    for (int i = 0; i < 3; i++)
        LSA_TRY(bring(s->way, (char *)to[i], (const char *)s->snapshot[i], (size_t)s->n_param * sizeof(float),
                      err));
done:
    return st;
}
