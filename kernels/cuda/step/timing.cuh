/* Timing of a part of the step by device events. Internal to kernels/cuda/step. */
#ifndef LSA_KERNELS_CUDA_STEP_TIMING_CUH
#define LSA_KERNELS_CUDA_STEP_TIMING_CUH

#include <stdlib.h>

#include "kernels/cuda/step/step_state.h"

static int step_ascending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median milliseconds of repeated runs of one part. */
template <typename RUN>
static lsa_status step_time_part(lsa_gpu_step *s, int repeats, double *ms, lsa_err *err, RUN run) {
    lsa_status st = LSA_OK;
    cudaEvent_t a, b;
    float t[64];
    const int n = repeats < 1 ? 1 : repeats > 64 ? 64 : repeats;
    LSA_CUDA(cudaEventCreate(&a));
    LSA_CUDA(cudaEventCreate(&b));
    for (int i = -2; i < n && st == LSA_OK; i++) {
        LSA_CUDA(cudaEventRecord(a, s->cs->stream));
        st = run();
        LSA_CUDA(cudaEventRecord(b, s->cs->stream));
        LSA_CUDA(cudaEventSynchronize(b));
        if (i >= 0) LSA_CUDA(cudaEventElapsedTime(&t[i], a, b));
    }
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    qsort(t, (size_t)n, sizeof *t, step_ascending);
    *ms = t[n / 2];
    return st;
}

#endif
