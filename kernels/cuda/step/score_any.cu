/* The score kernels for every GPU from sm_80: the same results in f32 on the ordinary cores, without tricks.
 * One block of 256 threads a window and layer; tiles of 32 keys. Nothing of size [windows, candidates, heads]
 * leaves the block. */
#include <cuda_fp8.h>

#include "kernels/cuda/step/step_state.h"

enum { KEYS = 32, LD = 129 };

static __device__ float e4m3(uint8_t v) {
    const __half_raw h = __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)v, __NV_E4M3);
    return __half2float(*(const __half *)&h);
}

/* Hadamard / sqrt(128) of rows x[n][LD], in place; ends with a barrier. */
static __device__ void hadamard_rows(float *x, int n) {
    for (int h = 1; h < 128; h *= 2) {
        __syncthreads();
        for (int k = threadIdx.x; k < n * 64; k += 256) {
            const int r = k >> 6, i = k & 63, j = i / h * 2 * h + i % h;
            const float a = x[r * LD + j], b = x[r * LD + j + h];
            x[r * LD + j] = a + b;
            x[r * LD + j + h] = a - b;
        }
    }
    __syncthreads();
    for (int k = threadIdx.x; k < n * 128; k += 256) x[(k >> 7) * LD + (k & 127)] *= 0.08838834764831845f;
    __syncthreads();
}

static __device__ void rotate_rows(float *x, int n, const float2 *cs, int rope_dim, float sign) {
    const int half = rope_dim / 2;
    __syncthreads();
    for (int k = threadIdx.x; k < n * half; k += 256) {
        const int r = k / half, i = k % half;
        float *const v = x + r * LD + 128 - rope_dim + 2 * i;
        const float a = v[0], b = v[1], c = cs[i].x, s = cs[i].y * sign;
        v[0] = a * c - b * s;
        v[1] = a * s + b * c;
    }
    __syncthreads();
}

template <int MODE>
static __global__ void __launch_bounds__(256) any_k(const __grid_constant__ score_args a) {
    extern __shared__ float smem[];
    const int H = a.H, t = threadIdx.x;
    float *const q = smem, *const key = q + 128 * LD, *const p = key + KEYS * LD /* [128][KEYS+1] */,
                 *const w = p + 128 * (KEYS + 1), *const qs = w + 128, *const g = qs + 128,
                 *const ks = g + KEYS;
    const int64_t row = blockIdx.x;
    const int l = blockIdx.y, n_cand = a.n_cand[row];
    const step_row src = a.where[row];
    const bf16 *const ql = a.qlin + ((int64_t)l * a.m + row) * H * 128;
    for (int k = t; k < H * 128; k += 256) q[(k >> 7) * LD + (k & 127)] = __bfloat162float(ql[k]);
    rotate_rows(q, H, a.cs + row * (a.rope_dim / 2), a.rope_dim, 1.0f);
    hadamard_rows(q, H);
    for (int h = t; h < H; h += 256) {
        float s = 1.0f;
        if (a.fp8) {
            float top = 0;
            for (int c = 0; c < 128; c++) top = fmaxf(top, fabsf(q[h * LD + c]));
            s = fmaxf(1e-4f, top) / 448.0f;
            for (int c = 0; c < 128; c++)
                q[h * LD + c] =
                    e4m3((uint8_t)__nv_cvt_float_to_fp8(q[h * LD + c] / s, __NV_NOSAT, __NV_E4M3));
        }
        qs[h] = s;
        w[h] = a.w[((int64_t)l * a.m + row) * H + h];
    }
    float dq[64] = {}, dw = 0; /* thread: channel t mod 128 of heads t/128, +2, ...; dw of head t */
    double loss = 0;
    for (int j0 = 0; j0 < n_cand; j0 += KEYS) {
        __syncthreads();
        for (int k = t; k < KEYS * 128; k += 256) {
            const int r = k >> 7, c = k & 127, j = j0 + r;
            float v = 0;
            if (j < n_cand) {
                const int64_t at = a.cand ? a.cand[row * a.n + j] : j;
                v = e4m3(src.key[((int64_t)l * src.n_key + at) * 128 + c]);
                if (c == 0) ks[r] = src.scale[(int64_t)l * src.n_key + at];
            } else if (c == 0) {
                ks[r] = 0;
            }
            key[r * LD + c] = v;
        }
        __syncthreads();
        for (int k = t; k < H * KEYS; k += 256) {
            const int h = k / KEYS, r = k % KEYS;
            float s = 0;
            for (int c = 0; c < 128; c++) s += q[h * LD + c] * key[r * LD + c];
            p[h * (KEYS + 1) + r] = s < 0.0f ? 0.0f : s;
        }
        __syncthreads();
        if (t < KEYS) {
            const int j = j0 + t;
            float dz = 0;
            if (MODE != SCORE_GRAD && j < n_cand) {
                float z = 0;
                for (int h = 0; h < H; h++) z += w[h] * qs[h] * p[h * (KEYS + 1) + t];
                z *= ks[t];
                if (MODE == SCORE_Z) {
                    a.z[((int64_t)l * a.m + row) * a.n + j] = z;
                } else {
                    const float wt = a.weight[row * a.n + j];
                    loss +=
                        (double)(wt *
                                 loss_point(z, a.y[row * a.n + j] * (1.0f - 2.0f * a.smoothing) + a.smoothing,
                                            a.focal, &dz));
                    dz *= wt;
                }
            }
            if (MODE == SCORE_GRAD && j < n_cand) dz = a.dz[(int64_t)l * a.dz_layer + row * a.n + j];
            g[t] = dz * ks[t];
        }
        if (MODE == SCORE_Z) continue;
        __syncthreads();
        if (t < H)
            for (int r = 0; r < KEYS; r++) dw += g[r] * p[t * (KEYS + 1) + r];
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const int h = (t >> 7) + 2 * i;
            if (h < H)
                for (int r = 0; r < KEYS; r++)
                    dq[i] += p[h * (KEYS + 1) + r] > 0.0f ? g[r] * key[r * LD + (t & 127)] : 0.0f;
        }
    }
    if (MODE == SCORE_Z) return;
    const float scale = *a.scale;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int h = (t >> 7) + 2 * i;
        if (h < H) q[h * LD + (t & 127)] = dq[i] * w[h] * scale;
    }
    hadamard_rows(q, H);
    rotate_rows(q, H, a.cs + row * (a.rope_dim / 2), a.rope_dim, -1.0f);
    bf16 *const out = a.dq + ((int64_t)l * a.m + row) * H * 128;
    for (int k = t; k < H * 128; k += 256) out[k] = __float2bfloat16(q[(k >> 7) * LD + (k & 127)]);
    if (t < H) a.dw[((int64_t)l * a.m + row) * H + t] = __float2bfloat16(dw * qs[t] * scale);
    if (MODE == SCORE_POINTWISE && t < 32) {
        for (int x = 16; x >= 1; x /= 2) loss += __shfl_xor_sync(0xffffffffu, loss, x);
        if (t == 0) a.row_loss[(int64_t)l * a.m + row] = loss * (double)scale;
    }
}

lsa_status score_any(lsa_gpu_step *s, const score_args *a, int mode, lsa_err *err) {
    const int bytes = (128 * LD + KEYS * LD + 128 * (KEYS + 1) + 256 + 2 * KEYS) * 4;
    void (*const kernel)(const score_args) = mode == SCORE_Z      ? any_k<SCORE_Z>
                                             : mode == SCORE_GRAD ? any_k<SCORE_GRAD>
                                                                  : any_k<SCORE_POINTWISE>;
    LSA_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<dim3((unsigned)a->rows, (unsigned)a->L), 256, bytes, s->cs->stream>>>(*a);
    LSA_LAUNCHED("score_any");
}
