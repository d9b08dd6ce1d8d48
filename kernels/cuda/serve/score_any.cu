/* Logits on any architecture, and of f32 queries on all: a thread a key in registers, heads from shared
 * memory. */
#include "kernels/cuda/serve/serve_state.h"

enum { THREADS = 128, HEADS_AT_ONCE = 32 };

static __device__ void load_key(float (&k)[128], float *scale, const lsa_gpu_keys &keys, int64_t c) {
    const uint8_t *row, *tail;
    if (keys.page) {
        const uint8_t *const page =
            keys.data + (int64_t)keys.page[c / LSA_PAGE_CHUNKS] * (132 * LSA_PAGE_CHUNKS);
        row = page + c % LSA_PAGE_CHUNKS * 128;
        tail = page + 128 * LSA_PAGE_CHUNKS + c % LSA_PAGE_CHUNKS * 4;
    } else {
        row = keys.data + c * 132;
        tail = row + 128;
    }
    *scale = *(const float *)tail;
#pragma unroll
    for (int j = 0; j < 32; j++) {
        const uint32_t v = *(const uint32_t *)(row + 4 * j);
#pragma unroll
        for (int b = 0; b < 4; b++) {
            const __half_raw h = __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)(v >> (8 * b)), __NV_E4M3);
            k[4 * j + b] = __half2float(*(const __half *)&h);
        }
    }
}

static __global__ void __launch_bounds__(THREADS)
    score_k(const lsa_gpu_keys *keys, const float *q, const float *w, int n_head, int64_t most, float *logit,
            int64_t ld) {
    __shared__ __align__(16) float qs[HEADS_AT_ONCE * 128];
    __shared__ float ws[HEADS_AT_ONCE];
    const int64_t i = blockIdx.y;
    serve_wait();
    const lsa_gpu_keys mine = keys[i];
    const int64_t n = mine.n_chunk < most ? mine.n_chunk : most;
    for (int64_t first = (int64_t)blockIdx.x * THREADS; first < n; first += (int64_t)gridDim.x * THREADS) {
        const int64_t c = first + threadIdx.x;
        float k[128], scale = 0, z = 0;
        load_key(k, &scale, mine, c < n ? c : n - 1);
        for (int h0 = 0; h0 < n_head; h0 += HEADS_AT_ONCE) {
            const int here = n_head - h0 < HEADS_AT_ONCE ? n_head - h0 : HEADS_AT_ONCE;
            __syncthreads();
            for (int j = threadIdx.x; j < here * 128; j += THREADS) qs[j] = q[(i * n_head + h0) * 128 + j];
            if ((int)threadIdx.x < here) ws[threadIdx.x] = w[i * n_head + h0 + threadIdx.x];
            __syncthreads();
            for (int h = 0; h < here; h++) {
                float p[4] = {};
#pragma unroll
                for (int j = 0; j < 32; j++) {
                    const float4 v = ((const float4 *)(qs + h * 128))[j];
                    p[0] += v.x * k[4 * j];
                    p[1] += v.y * k[4 * j + 1];
                    p[2] += v.z * k[4 * j + 2];
                    p[3] += v.w * k[4 * j + 3];
                }
                const float s = (p[0] + p[1]) + (p[2] + p[3]);
                z += ws[h] * (s > 0 || s != s ? s : 0.0f); /* NaN stays */
            }
        }
        if (c < n) logit[i * ld + c] = z * scale;
    }
}

lsa_status serve_score_any(lsa_gpu_retriever *x, int32_t layer, int32_t m, const lsa_gpu_keys *keys,
                           float *logit, int64_t ld, cudaStream_t s, lsa_err *err) {
    const int64_t most = ld < x->max_chunks ? ld : x->max_chunks,
                  first = (int64_t)layer * x->max_batch * x->heads, tiles = (most + THREADS - 1) / THREADS,
                  fill = 16 * (int64_t)x->n_sm / m + 1;
    return serve_launch(x, s, "score", err, score_k,
                        dim3((unsigned)(tiles < fill ? tiles : fill), (unsigned)m), THREADS, 0, keys,
                        (const float *)x->q + first * 128, x->w + first, x->g.n_head, most, logit, ld);
}
