/* Queries of a few requests: matrix times few vectors, so the weights' bytes are the floor (f32: 4 bytes a
 * parameter, read once for eight requests). The reference server multiplies in f32 too; the roundings of the
 * path come after. HINT: 42.5 M parameters a layer at rank 2048 and 128 heads are 170 MB, 56 us at 3 TB/s,
 * once in tau steps. */
#include "kernels/cuda/serve/serve_state.h"

enum { WARPS = 4, ROWS = 2, AT_ONCE = 8 };

static __device__ float load1(const float *x, int64_t i) {
    return x[i];
}
static __device__ float load1(const uint16_t *x, int64_t i) {
    return __uint_as_float((uint32_t)x[i] << 16); /* bf16 */
}
static __device__ float4 load4(const float *x, int64_t i) {
    return *(const float4 *)(x + i);
}
static __device__ float4 load4(const uint16_t *x, int64_t i) {
    const uint2 v = *(const uint2 *)(x + i);
    return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000u),
                       __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xFFFF0000u));
}

/* y[i, row] = scale * W[row, :] . x[i, :]: a warp ROWS rows, N requests together (grid.y). Sums in a fixed
 * order. */
template <int N, typename T>
static __global__ void __launch_bounds__(WARPS * 32)
    times_k(const float *w, const T *x, int m, int rows, int k, float scale, float *y, int64_t ld_y) {
    const int row = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * ROWS, lane = threadIdx.x & 31,
              i0 = blockIdx.y * N;
    if (row >= rows) return;
    const float *const wr[ROWS] = {w + (int64_t)row * k, w + (int64_t)(row + 1 < rows ? row + 1 : row) * k};
    const T *xr[N]; /* requests beyond the last repeat it */
#pragma unroll
    for (int i = 0; i < N; i++) xr[i] = x + (int64_t)(i0 + i < m ? i0 + i : m - 1) * k;
    float sum[ROWS][N] = {};
    const bool wide = k % 4 == 0 && (uintptr_t)w % 16 == 0 && (uintptr_t)x % (4 * sizeof(T)) == 0;
    const int whole = wide ? k / 4 : 0;
    serve_wait();
#pragma unroll(N == 1 ? 8 : 2)
    for (int j = lane; j < whole; j += 32) {
        const float4 a = load4(wr[0], 4 * (int64_t)j), b = load4(wr[1], 4 * (int64_t)j);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float4 v = load4(xr[i], 4 * (int64_t)j);
            sum[0][i] += a.x * v.x + a.y * v.y + a.z * v.z + a.w * v.w;
            sum[1][i] += b.x * v.x + b.y * v.y + b.z * v.z + b.w * v.w;
        }
    }
    for (int j = 4 * whole + lane; j < k; j += 32)
#pragma unroll
        for (int i = 0; i < N; i++)
            for (int r = 0; r < ROWS; r++) sum[r][i] += wr[r][j] * load1(xr[i], j);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < N; i++) {
            float s = sum[r][i];
            for (int o = 16; o >= 1; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
            if (lane == 0 && i0 + i < m && row + r < rows) y[(int64_t)(i0 + i) * ld_y + row + r] = scale * s;
        }
}

template <typename T>
static lsa_status times(const lsa_gpu_retriever *x, cudaStream_t s, const float *w, const T *v, int m,
                        int rows, int k, float scale, float *y, int64_t ld_y, lsa_err *err) {
    const unsigned blocks = (unsigned)((rows + WARPS * ROWS - 1) / (WARPS * ROWS));
    if (m == 1)
        return serve_launch(x, s, "query", err, times_k<1, T>, dim3(blocks), WARPS * 32, 0, w, v, m, rows, k,
                            scale, y, ld_y);
    return serve_launch(x, s, "query", err, times_k<AT_ONCE, T>,
                        dim3(blocks, (unsigned)((m + AT_ONCE - 1) / AT_ONCE)), WARPS * 32, 0, w, v, m, rows,
                        k, scale, y, ld_y);
}

static __global__ void norm_k(const float *a, const float *g, int r, float eps, float *u) {
    const float *const x = a + (int64_t)blockIdx.x * r;
    double s = 0;
    serve_wait();
    for (int j = threadIdx.x; j < r; j += 256) s += (double)x[j] * (double)x[j];
    const float f = (float)(1.0 / sqrt(lsa_block_sum(s) / (double)r + (double)eps));
    for (int j = threadIdx.x; j < r; j += 256) u[(int64_t)blockIdx.x * r + j] = g[j] * x[j] * f;
}

/* One block of 128 threads a head (x) and request (y): path roundings, RoPE, Hadamard, and the form the score
 * kernel reads. w: the layer's [M, heads]. */
static __global__ void __launch_bounds__(128)
    finish_k(const float *raw, const float *freq, const int64_t *position, int n_head, int rope_dim,
             lsa_query_path path, serve_form form, int heads, void *q, float *w) {
    __shared__ float x[128], top[128];
    const int h = blockIdx.x, c = threadIdx.x, first = 128 - rope_dim;
    const bool round = path != LSA_PATH_F32;
    const int64_t i = blockIdx.y, at = (i * heads + h) * 128;
    serve_wait();
    float v = raw[(i * n_head + h) * 128 + c];
    if (round) v = __bfloat162float(__float2bfloat16_rn(v));
    x[c] = v;
    __syncthreads();
    if (c >= first) {
        float sn, cs;
        /* NUMERIC: the product is rounded to f32 before sin and cos */
        sincosf(__fmul_rn((float)position[i], freq[(c - first) / 2]), &sn, &cs);
        const float a = x[c & ~1], b = x[c | 1];
        v = c & 1 ? a * sn + b * cs : a * cs - b * sn;
        if (round) v = __bfloat162float(__float2bfloat16_rn(v));
    }
    __syncthreads();
    x[c] = v;
    __syncthreads();
    for (int s = 1; s < 128; s *= 2) {
        const float o = x[c ^ s];
        v = c & s ? o - v : v + o;
        __syncthreads();
        x[c] = v;
        __syncthreads();
    }
    v *= 0.08838834764831845f; /* 1/sqrt(128) */
    if (form == SERVE_F32 && path != LSA_PATH_FP8) {
        ((float *)q)[at + c] = v;
        return;
    }
    top[c] = fabsf(v);
    __syncthreads();
    for (int s = 64; s >= 1; s /= 2) {
        if (c < s) top[c] = fmaxf(top[c], top[c + s]);
        __syncthreads();
    }
    float *const weight = w + i * heads + h;
    if (form == SERVE_F16) { /* over a power of two, so that nothing overflows or vanishes */
        const float p = exp2f(ceilf(log2f(fmaxf(top[0], 1e-30f))));
        /* channel c is the operand's position k: 32 contiguous channels of a row belong to one thread */
        const int k = ((c >> 2) & 7) * 16 + (c >> 5) * 2 + (c & 1) + (c & 2) * 4;
        ((__half *)q)[at + k] = __float2half_rn(v / p);
        if (c == 0) *weight *= p;
        return;
    }
    const float scale = fmaxf(1e-4f, top[0]) / 448.0f;
    const __nv_fp8_storage_t code = __nv_cvt_float_to_fp8(v / scale, __NV_SATFINITE, __NV_E4M3);
    if (form == SERVE_FP8) {
        ((uint8_t *)q)[at + c] = code;
    } else {
        const __half_raw half = __nv_cvt_fp8_to_halfraw(code, __NV_E4M3);
        ((float *)q)[at + c] = __half2float(*(const __half *)&half);
    }
    if (c == 0) *weight *= scale;
}

lsa_status serve_query(lsa_gpu_retriever *x, int32_t layer, int32_t m, const uint16_t *hidden,
                       const int64_t *position, cudaStream_t s, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *const g = &x->g;
    const float *const p = x->weights->p;
    const int d = g->hidden, r = g->rank, H = g->n_head;
    const int64_t first = (int64_t)layer * x->max_batch * x->heads;
    float *const w = x->w + first;
    const size_t size = x->form == SERVE_F32 ? 4 : x->form == SERVE_F16 ? 2 : 1;
    const auto at = [&](lsa_indexer_part part) { return p + lsa_indexer_tensor_at(g, layer, part).offset; };
    LSA_TRY(times(x, s, at(LSA_WQ_A), hidden, m, r, d, 1.0f, x->a, r, err));
    LSA_TRY(times(x, s, at(LSA_W_PROJ), hidden, m, H, d, 1.0f / sqrtf(128.0f * (float)H), w, x->heads, err));
    LSA_TRY(serve_launch(x, s, "norm", err, norm_k, dim3((unsigned)m), 256, 0, x->a, at(LSA_Q_NORM), r,
                         g->eps, x->u));
    LSA_TRY(times(x, s, at(LSA_WQ_B), x->u, m, H * 128, r, 1.0f, x->raw, (int64_t)H * 128, err));
    LSA_TRY(serve_launch(x, s, "query", err, finish_k, dim3((unsigned)H, (unsigned)m), 128, 0, x->raw,
                         x->weights->freq, position, H, g->rope.dim, x->path, x->form, x->heads,
                         (uint8_t *)x->q + (size_t)first * 128 * size, w));
done:
    return st;
}
