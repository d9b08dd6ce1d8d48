/* Attention of the bf16 tier on tensor cores: a block takes a token at a time, 64 heads of it, over its
 * window rows and selected (CSA) or all visible (HCA) rows, with a sink per head (architecture notes 5.4).
 * One row is key and value of all heads, so a row is brought to shared memory once and used by 64 queries,
 * twice.
 *
 * Per 64 rows: scores [64, 64] by eight warps (2 x 2 parts of 32 x 32, each over half of the channels),
 * summed in shared memory; softmax with running maxima by four threads a head; then every warp adds weights
 * times rows for all heads and its eighth of the channels. The next 64 rows are copied meanwhile.
 *
 * Factors are f16, sums f32: bf16 numbers from 2^-14 to 65,504 are kept exactly, smaller ones to 2^-25; the
 * weights keep three more bits than tier B's bf16. Rows in shared memory are swizzled by 16 bytes: place c of
 * row r lies at c ^ (r & 7), so that eight rows of a matrix come from different banks. */
#include <cuda_fp16.h>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/teacher/bf16_state.h"

enum { THREADS = TEACHER_THREADS, HEADS = 64, ROWS = 64, ATTEND_STATIC = 2048 /* at most */ };

static __device__ __forceinline__ uint32_t half_pair(float x, float y) {
    const __half2 h = __floats2half2_rn(x, y);
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}
static __device__ __forceinline__ float2 floats_of(uint32_t pair) {
    __half2 h;
    memcpy(&h, &pair, sizeof h);
    return __half22float2(h);
}

/* Address of 16 bytes `c` of row r, rows of D numbers. */
template <int D> static __device__ __forceinline__ uint16_t *place(uint16_t *tile, int r, int c) {
    return tile + r * D + ((c ^ (r & 7)) << 3);
}
/* Scores: numbers col and col + 1, col even; and the weights that take the first half of the same row. */
static __device__ __forceinline__ float *score_at(float *s, int r, int col) {
    return s + r * ROWS + (col ^ ((r & 7) << 3));
}
static __device__ __forceinline__ uint16_t *weight_at(float *s, int r, int c) {
    return (uint16_t *)(s + r * ROWS) + ((c ^ (r & 7)) << 3);
}

struct softmax_state {
    float most[HEADS], sum[HEADS], fade[HEADS];
};

/* Which row is number `at` of the token's n; -1 beyond the last. */
static __device__ __forceinline__ int32_t row_of(const bf16_attend_args &a, int64_t t, int64_t at,
                                                 int64_t first, int64_t n_win, int64_t n) {
    return at >= n      ? -1
           : at < n_win ? (int32_t)(first + at)
           : a.sel      ? a.sel[t * a.top + at - n_win]
                        : (int32_t)(at - n_win);
}

/* 64 rows from i0 on; index: which they are, looked up a tile ahead, so that nothing here waits for memory.
 */
template <int D>
static __device__ __forceinline__ void fetch(const bf16_attend_args &a, uint16_t *tile, const int32_t *index,
                                             int64_t i0, int64_t n_win) {
    enum { PARTS = D / 8 };
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * PARTS; i += THREADS) {
        const int r = i / PARTS, c = i % PARTS;
        const int32_t at = index[r];
        copy_16(place<D>(tile, r, c), (i0 + r < n_win ? a.win : a.row) + (int64_t)max(at, 0) * D + c * 8,
                at >= 0);
    }
    copy_end();
}

/* s[half] [64, 64]: products of q and rows over half of the channels each. */
template <int D>
static __device__ __forceinline__ void scores(uint16_t *q, uint16_t *tile, float *s, int lane, int warp) {
    const int half = warp >> 2, m0 = (warp >> 1 & 1) * 32, n0 = (warp & 1) * 32, g = lane >> 2, t = lane & 3;
    float c[2][4][4] = {};
#pragma unroll 4
    for (int k = half * (D / 32); k < (half + 1) * (D / 32); k++) {
        uint32_t x[2][4], y[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            load_matrices(x[i], place<D>(q, m0 + 16 * i + (lane & 15), 2 * k + (lane >> 4)));
            load_matrices(
                y[i], place<D>(tile, n0 + 16 * i + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma_f16(c[i][j], x[i][0], x[i][1], x[i][2], x[i][3], y[j >> 1][2 * (j & 1)],
                        y[j >> 1][2 * (j & 1) + 1]);
    }
    float *const to = s + half * HEADS * ROWS;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int k = 0; k < 2; k++)
                *(float2 *)score_at(to, m0 + 16 * i + 8 * k + g, n0 + 8 * j + 2 * t) = {c[i][j][2 * k],
                                                                                        c[i][j][2 * k + 1]};
}

/* Weights exp(score - running maximum) in place of the scores; four threads a head, 16 rows each. kept: a
 * copy for the masses, [64, 64], with the maxima they refer to. */
static __device__ __forceinline__ void softmax(float *s, softmax_state *state, int rows, float scale,
                                               uint16_t *kept, float *kept_most) {
    const int h = threadIdx.x >> 2, part = threadIdx.x & 3;
    float z[16], most = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = i * 16 + part * 4;
        const float4 x = *(const float4 *)score_at(s, h, col),
                     y = *(const float4 *)score_at(s + HEADS * ROWS, h, col);
        const float v[4] = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            z[4 * i + k] = col + k < rows ? v[k] * scale : -INFINITY;
            most = fmaxf(most, z[4 * i + k]);
        }
    }
    for (int o = 1; o < 4; o *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
    const float before = state->most[h], now = fmaxf(before, most);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = i * 16 + part * 4;
#pragma unroll
        for (int k = 0; k < 4; k++) sum += z[4 * i + k] = __expf(z[4 * i + k] - now);
        const uint2 w = {half_pair(z[4 * i], z[4 * i + 1]), half_pair(z[4 * i + 2], z[4 * i + 3])};
        *(uint2 *)(weight_at(s, h, col >> 3) + (col & 7)) = w;
        if (kept) *(uint2 *)(kept + h * ROWS + col) = w;
    }
    for (int o = 1; o < 4; o *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (part == 0) {
        const float fade = __expf(before - now);
        state->most[h] = now;
        state->fade[h] = fade;
        state->sum[h] = state->sum[h] * fade + sum;
        if (kept) kept_most[h] = now;
    }
}

/* o [64, D / 8 of this warp] = o fade + weights rows */
template <int D>
static __device__ __forceinline__ void values(float (&o)[4][D / 64][4], float *s, uint16_t *tile,
                                              const softmax_state *state, int lane, int warp) {
    enum { N = D / 64 }; /* eights of channels */
    const int g = lane >> 2;
    float f[8];
    bool fades = false;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        f[i] = state->fade[i * 8 + g];
        fades = fades || f[i] != 1.0f;
    }
    if (__ballot_sync(0xffffffffu, fades)) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) o[i][j][k] *= f[2 * i + (k >> 1)];
    }
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++) {
        uint32_t x[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            load_matrices(x[i], weight_at(s, 16 * i + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            uint32_t y[4];
            load_transposed(y, place<D>(tile, 16 * k + (lane & 15), warp * N + j + (lane >> 4)));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma_f16(o[i][j], x[i][0], x[i][1], x[i][2], x[i][3], y[0], y[1]);
                mma_f16(o[i][j + 1], x[i][0], x[i][1], x[i][2], x[i][3], y[2], y[3]);
            }
        }
    }
}

/* Mean over heads of what each compressed row got, of the window's and of the sink's share. Of `heads` heads
 * from h0 on; `work` holds a factor per tile and head, then sums of four parts of the heads. */
static __device__ void masses(const bf16_attend_args &a, int64_t t, int h0, int heads, int64_t n_win,
                              int64_t n, const softmax_state *state, const uint16_t *kept,
                              const float *kept_most, float *work) {
    const int tid = threadIdx.x, tiles = (int)((n + ROWS - 1) / ROWS), eights = tiles * (ROWS / 8);
    float *const factor = work, *const sum = work + (a.tiles + 1) * HEADS;
    const float each = 1.0f / (float)a.H;
    for (int i = tid; i < tiles * HEADS; i += THREADS) {
        const int h = i % HEADS;
        factor[i] = h < heads ? __expf(kept_most[i] - state->most[h]) / state->sum[h] * each : 0.0f;
    }
    __syncthreads();
    for (int i = tid; i < 4 * eights; i += THREADS) {
        const int part = i / eights, at = i % eights, tile = at / 8;
        const uint16_t *const from = kept + tile * HEADS * ROWS + part * 16 * ROWS + at % 8 * 8;
        const float *const f = factor + tile * HEADS + part * 16;
        float v[8] = {};
#pragma unroll 8
        for (int h = 0; h < 16; h++) {
            const uint4 w = *(const uint4 *)(from + h * ROWS);
            const uint32_t pair[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float2 x = floats_of(pair[k]);
                v[2 * k] += x.x * f[h];
                v[2 * k + 1] += x.y * f[h];
            }
        }
        for (int k = 0; k < 8; k++) sum[part * a.tiles * ROWS + at * 8 + k] = v[k];
    }
    __syncthreads();
    const auto of = [&](int64_t i) {
        float v = 0;
        for (int part = 0; part < 4; part++) v += sum[part * a.tiles * ROWS + i];
        return v;
    };
    for (int64_t i = n_win + tid; i < n; i += THREADS) {
        float *const to = a.mass + t * a.top + i - n_win;
        *to = h0 ? *to + of(i) : of(i);
    }
    if (tid >= 32) return;
    float window = 0, sink = 0;
    for (int64_t i = tid; i < n_win; i += 32) window += of(i);
    for (int h = tid; h < heads; h += 32)
        sink += __expf(a.sink[h0 + h] - state->most[h]) / state->sum[h] * each;
    for (int o = 16; o >= 1; o /= 2) {
        window += __shfl_xor_sync(0xffffffffu, window, o);
        sink += __shfl_xor_sync(0xffffffffu, sink, o);
    }
    if (tid == 0) {
        a.part[t] = h0 ? a.part[t] + window : window;
        a.part[a.m + t] = h0 ? a.part[a.m + t] + sink : sink;
    }
}

/* Shared: q [64, D], two tiles of rows [64, D], scores 2 x [64, 64] f32. */
template <int D> static constexpr int attend_bytes(void) {
    return (HEADS * D + 2 * ROWS * D) * 2 + 2 * HEADS * ROWS * 4;
}

template <int D>
static __global__ void __launch_bounds__(THREADS, 1)
    bf16_attend_k(const __grid_constant__ bf16_attend_args a) {
    enum { N = D / 64 };
    extern __shared__ uint4 shared16[];
    __shared__ softmax_state state;
    __shared__ int32_t index[2][ROWS];
    uint16_t *const q = (uint16_t *)shared16, *const tile = q + HEADS * D;
    float *const s = (float *)(tile + 2 * ROWS * D);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t4 = lane & 3;
    const float scale = 1.0f / sqrtf((float)D);
    uint16_t *const kept = a.mass ? a.kept + (int64_t)blockIdx.x * a.tiles * HEADS * ROWS : NULL;
    float *const kept_most = a.mass ? a.kept_most + (int64_t)blockIdx.x * a.tiles * HEADS : NULL;
    for (int64_t t = blockIdx.x; t < a.m; t += gridDim.x) {
        const int64_t pos = a.p + t, n_win = min(pos + 1, (int64_t)a.window), first = pos + 1 - n_win,
                      n = n_win + (!a.ratio ? 0
                                   : a.sel  ? a.n_sel[t]
                                            : (pos + 1) / a.ratio);
        for (int h0 = 0; h0 < a.H; h0 += HEADS) {
            const int heads = min(HEADS, a.H - h0);
            float o[4][N][4] = {};
            __syncthreads(); /* the former heads' shared memory is free */
            for (int i = tid; i < HEADS * (D / 8); i += THREADS) {
                const int h = i / (D / 8), c = i % (D / 8);
                copy_16(place<D>(q, h, c), a.q + t * a.ldq + (h < heads ? (int64_t)(h0 + h) * D : 0) + c * 8,
                        h < heads);
            }
            if (tid < HEADS) state.most[tid] = -INFINITY, state.sum[tid] = 0;
            if (tid < 2 * ROWS) index[tid / ROWS][tid % ROWS] = row_of(a, t, tid, first, n_win, n);
            __syncthreads();
            fetch<D>(a, tile, index[0], 0, n_win);
            for (int64_t i0 = 0, k = 0; i0 < n; i0 += ROWS, k++) {
                uint16_t *const now = tile + (k & 1) * ROWS * D;
                copy_wait();
                __syncthreads();
                if (i0 + ROWS < n) fetch<D>(a, tile + (~k & 1) * ROWS * D, index[~k & 1], i0 + ROWS, n_win);
                int32_t next = -1; /* of the tile after that */
                if (tid < ROWS) next = row_of(a, t, i0 + 2 * ROWS + tid, first, n_win, n);
                scores<D>(q, now, s, lane, warp);
                __syncthreads();
                softmax(s, &state, (int)min((int64_t)ROWS, n - i0), scale,
                        kept ? kept + k * HEADS * ROWS : NULL, kept ? kept_most + k * HEADS : NULL);
                if (tid < ROWS) index[k & 1][tid] = next;
                __syncthreads();
                values<D>(o, s, now, &state, lane, warp);
            }
            __syncthreads();
            if (tid < HEADS) { /* the sink joins the sum; at least one row was there, so most is finite */
                const float bias = tid < heads ? a.sink[h0 + tid] : 0.0f, most = fmaxf(state.most[tid], bias);
                const float fade = __expf(state.most[tid] - most);
                state.fade[tid] = fade;
                state.most[tid] = most;
                state.sum[tid] = state.sum[tid] * fade + __expf(bias - most);
            }
            __syncthreads();
#pragma unroll
            for (int j = 0; j < N; j++) {
                const int c = (warp * N + j) * 8 + 2 * t4;
                float sn = 0, cs = 1;
                if (c >= D - a.rope) /* back from the rotated frame */
                    sincosf(__fmul_rn((float)pos, a.freq[(c - D + a.rope) / 2]), &sn, &cs);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int h = i * 8 + g;
                    const float f = state.fade[h] / state.sum[h], x = o[i >> 1][j][2 * (i & 1)] * f,
                                y = o[i >> 1][j][2 * (i & 1) + 1] * f;
                    if (h < heads)
                        *(uint32_t *)(a.o + t * a.ldo + (int64_t)(h0 + h) * D + c) =
                            bf16_pair(c >= D - a.rope ? bf16_round(x) * cs + bf16_round(y) * sn : x,
                                      c >= D - a.rope ? bf16_round(y) * cs - bf16_round(x) * sn : y);
                }
            }
            if (a.mass) masses(a, t, h0, heads, n_win, n, &state, kept, kept_most, (float *)tile);
        }
    }
}

template <int D> static lsa_status attend(const bf16_attend_args *a, cudaStream_t s, lsa_err *err) {
    const int64_t blocks = a->m < a->blocks ? a->m : a->blocks;
    int device, room;
    LSA_CUDA(cudaGetDevice(&device));
    LSA_CUDA(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (room < attend_bytes<D>() + ATTEND_STATIC)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "bf16 attention at heads of %d takes %d bytes of shared memory a block, this GPU has %d; use "
            "the fp32 tier or an sm_90 GPU",
            D, attend_bytes<D>() + ATTEND_STATIC, room);
    LSA_CUDA(cudaFuncSetAttribute(bf16_attend_k<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  attend_bytes<D>()));
    bf16_attend_k<D><<<(unsigned)blocks, THREADS, attend_bytes<D>(), s>>>(*a);
    LSA_LAUNCHED("bf16 attention");
}

lsa_status bf16_attend(const bf16_attend_args *a, int D, cudaStream_t s, lsa_err *err) {
    switch (D) {
    case 128:
        return attend<128>(a, s, err);
    case 256:
        return attend<256>(a, s, err);
    case 512:
        return attend<512>(a, s, err);
    default:
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "the bf16 tier takes heads of 128, 256 or 512 channels, found %d; use the fp32 tier", D);
    }
}
