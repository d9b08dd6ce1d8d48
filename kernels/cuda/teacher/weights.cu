/* Weights that come and go. A layer's tensors wait in pinned memory as they are stored; a stream of their own
 * copies them over and writes f32 weights into one of two arenas, while the other one is computed with.
 * Dequantisation is exact (codes times a scale, one rounding at most), the same numbers as data/teacher.c.
 *
 * The mistake that would stay silent: overwriting an arena that a launch still reads; `used` is recorded
 * behind the last launch of a layer, and the copy waits for it. */
#include "kernels/cuda/teacher/stored.cuh"
#include "kernels/cuda/teacher/teacher_state.h"

enum { THREADS = TEACHER_THREADS };

struct lsa_gpu_weights {
    lsa_gpu_teacher *t;
    cudaStream_t stream;
    char *arena[2], *stored, *staging[2]; /* device, device, pinned */
    cudaEvent_t uploaded[2], ready[2], used[2];
    uint32_t *bad, *host_bad; /* [2] number of a tensor with a number that is not finite, plus 1; 0 */
};

static __device__ __forceinline__ float of_f16(uint32_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, e = h >> 10 & 31u, m = h & 0x3ffu;
    if (e == 31) return __uint_as_float(sign | 0x7f800000u | m << 13);
    if (e) return __uint_as_float(sign | (e + 112u) << 23 | m << 13);
    const float v = (float)m * 0x1p-24f;
    return sign ? -v : v;
}

struct expand_args {
    const unsigned char *values, *scales;
    float *out;
    int64_t rows, cols;
    int type;
    bool scale_f32;
    uint32_t number, *bad;
};

static __global__ void __launch_bounds__(THREADS) expand_k(const __grid_constant__ expand_args a) {
    const int64_t n = a.rows * a.cols;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        const int64_t row = i / a.cols, col = i % a.cols;
        float v = 0;
        int64_t scale = -1;
        switch (a.type) {
        case LSA_GPU_F32:
            v = ((const float *)a.values)[i];
            break;
        case LSA_GPU_BF16:
            v = __uint_as_float((uint32_t)((const uint16_t *)a.values)[i] << 16);
            break;
        case LSA_GPU_F16:
            v = of_f16(((const uint16_t *)a.values)[i]);
            break;
        case LSA_GPU_E4M3:
            v = of_e4m3(a.values[i]);
            scale = row / 128 * ((a.cols + 127) / 128) + col / 128;
            break;
        default:
            v = of_e2m1(a.values[i / 2] >> (i % 2 * 4) & 15u);
            scale = row * (a.cols / 32) + col / 32;
        }
        if (scale >= 0) v *= a.scale_f32 ? ((const float *)a.scales)[scale] : of_e8m0(a.scales[scale]);
        a.out[i] = v;
        if (!isfinite(v)) atomicMax(a.bad, a.number);
    }
}

extern "C" lsa_status lsa_gpu_weights_create(lsa_gpu_weights **out, lsa_gpu_teacher *t, int64_t arena,
                                             int64_t stored, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_weights *w = (lsa_gpu_weights *)calloc(1, sizeof *w);
    *out = NULL;
    if (!w) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    *out = w; /* the caller destroys it either way */
    w->t = t;
    LSA_CUDA(cudaStreamCreateWithFlags(&w->stream, cudaStreamNonBlocking));
    LSA_TRY(lsa_ctx_alloc_(t->ctx, (void **)&w->stored, stored, 1, "stored weights of a layer", err));
    LSA_TRY(lsa_ctx_alloc_(t->ctx, (void **)&w->bad, 2, sizeof *w->bad, "flags", err));
    LSA_CUDA(cudaHostAlloc((void **)&w->host_bad, 2 * sizeof *w->host_bad, cudaHostAllocDefault));
    for (int i = 0; i < 2; i++) {
        LSA_TRY(lsa_ctx_alloc_(t->ctx, (void **)&w->arena[i], arena, 1, "weights of a layer", err));
        LSA_CUDA(cudaHostAlloc((void **)&w->staging[i], (size_t)stored, cudaHostAllocDefault));
        LSA_CUDA(cudaEventCreateWithFlags(&w->uploaded[i], cudaEventDisableTiming));
        LSA_CUDA(cudaEventCreateWithFlags(&w->ready[i], cudaEventDisableTiming));
        LSA_CUDA(cudaEventCreateWithFlags(&w->used[i], cudaEventDisableTiming));
    }
    LSA_TRY(lsa_ctx_sync(t->ctx, err)); /* arenas are zeroed on the other stream */
done:
    return st;
}

extern "C" void lsa_gpu_weights_destroy(lsa_gpu_weights *w) {
    if (!w) return;
    if (w->stream) cudaStreamSynchronize(w->stream);
    cudaStreamSynchronize(w->t->cs->stream);
    lsa_ctx_free(w->t->ctx, w->stored);
    lsa_ctx_free(w->t->ctx, w->bad);
    cudaFreeHost(w->host_bad);
    for (int i = 0; i < 2; i++) {
        lsa_ctx_free(w->t->ctx, w->arena[i]);
        cudaFreeHost(w->staging[i]);
        if (w->uploaded[i]) cudaEventDestroy(w->uploaded[i]);
        if (w->ready[i]) cudaEventDestroy(w->ready[i]);
        if (w->used[i]) cudaEventDestroy(w->used[i]);
    }
    if (w->stream) cudaStreamDestroy(w->stream);
    free(w);
}

extern "C" char *lsa_gpu_weights_arena(const lsa_gpu_weights *w, int i) {
    return w->arena[i];
}
extern "C" char *lsa_gpu_weights_staging(const lsa_gpu_weights *w, int i) {
    return w->staging[i];
}

extern "C" lsa_status lsa_gpu_weights_upload(lsa_gpu_weights *w, int i, const lsa_gpu_tensor *tensor,
                                             int64_t n, int64_t bytes, lsa_err *err) {
    LSA_CUDA(cudaStreamWaitEvent(w->stream, w->used[i], 0));
    LSA_CUDA(cudaMemcpyAsync(w->stored, w->staging[i], (size_t)bytes, cudaMemcpyHostToDevice, w->stream));
    LSA_CUDA(cudaEventRecord(w->uploaded[i], w->stream));
    LSA_CUDA(cudaMemsetAsync(w->bad + i, 0, sizeof *w->bad, w->stream));
    for (int64_t k = 0; k < n; k++) {
        const lsa_gpu_tensor *const x = &tensor[k];
        const int64_t numbers = x->rows * x->cols;
        if (x->type == LSA_GPU_I64) {
            LSA_CUDA(cudaMemcpyAsync(x->dst, w->stored + x->at, (size_t)numbers * sizeof(int64_t),
                                     cudaMemcpyDeviceToDevice, w->stream));
            continue;
        }
        const expand_args a = {(const unsigned char *)w->stored + x->at,
                               (const unsigned char *)w->stored + x->scale_at,
                               (float *)x->dst,
                               x->rows,
                               x->cols,
                               (int)x->type,
                               x->scale_f32,
                               (uint32_t)(k + 1),
                               w->bad + i};
        const int64_t blocks = (numbers + 16 * THREADS - 1) / (16 * THREADS);
        expand_k<<<(unsigned)(blocks < 4096 ? blocks : 4096), THREADS, 0, w->stream>>>(a);
    }
    LSA_CUDA(cudaGetLastError());
    LSA_CUDA(cudaMemcpyAsync(w->host_bad + i, w->bad + i, sizeof *w->bad, cudaMemcpyDeviceToHost, w->stream));
    LSA_CUDA(cudaEventRecord(w->ready[i], w->stream));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_weights_wait_staging(lsa_gpu_weights *w, int i, lsa_err *err) {
    LSA_CUDA(cudaEventSynchronize(w->uploaded[i]));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_weights_begin(lsa_gpu_weights *w, int i, int64_t *bad, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(teacher_marks_begin(w->t, err));
    LSA_CUDA(cudaStreamWaitEvent(w->t->cs->stream, w->ready[i], 0));
    LSA_TRY(teacher_mark(w->t, LSA_GPU_WEIGHTS, err));
    LSA_CUDA(cudaEventSynchronize(w->ready[i]));
    *bad = (int64_t)w->host_bad[i] - 1;
done:
    return st;
}

extern "C" lsa_status lsa_gpu_weights_end(lsa_gpu_weights *w, int i, lsa_err *err) {
    LSA_CUDA(cudaEventRecord(w->used[i], w->t->cs->stream));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_layer_borrow(lsa_gpu_layer **out, lsa_gpu_teacher *t,
                                           const lsa_gpu_layer_weights *w, lsa_err *err) {
    lsa_gpu_layer *const l = (lsa_gpu_layer *)calloc(1, sizeof *l);
    *out = l;
    if (!l) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    l->ctx = t->ctx;
    l->w = *w;
    l->borrowed = true;
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_free_bytes(int64_t *out, lsa_ctx *, lsa_err *err) {
    size_t left = 0, all = 0;
    LSA_CUDA(cudaMemGetInfo(&left, &all));
    *out = (int64_t)left;
    return LSA_OK;
}
