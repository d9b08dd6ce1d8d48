/* Attention over encoded rows on the tensor cores (architecture notes 5.4): a block has 16 heads of a request
 * and a part of its rows, 64 at a time; the last block of a request's parts joins them.
 *
 * A tile lies in shared memory as words {row 2p, row 2p + 1} of a channel. A thread of the first product
 * takes four channels of a pair of rows (16 bytes) and has both rows' operands by permuting bytes; one of the
 * second product takes the same 16 bytes as four operands with rows along the depth. Rows of the tile are 8
 * words more than D, so neither has bank conflicts; the first takes pairs in the order of `pair_of`.
 *
 * NUMERIC: rows and queries in f16, products summed in f32. A normalized row's code times its scale is exact
 * in f16 down to 2^-24. Probabilities are rounded to f16 for the product, their sum is not. */
#include "kernels/cuda/decode/codec.cuh"
#include "kernels/cuda/decode/step.h"
#include "kernels/cuda/mma.cuh"

enum { THREADS = 256, PAIRS = ATTEND_ROWS / 2, S_LD = ATTEND_ROWS + 1, P_LD = ATTEND_ROWS + 8 };

template <int D> struct layout {
    enum {
        plain = D - ATTEND_ROPE,
        scales = (plain / CODE_GROUP + 7) / 8 * 8,
        row = plain + 2 * ATTEND_ROPE + scales,
        v_ld = D + 8,  /* words */
        q_ld = D + 16, /* halves */
        q = PAIRS * v_ld * 4,
        s = q + ATTEND_HEADS * q_ld * 2,
        p = s + 2 * ATTEND_HEADS * S_LD * 4,
        bytes = p + ATTEND_HEADS * P_LD * 2
    };
};

static __device__ __forceinline__ uint32_t half2_bits(__half2 h) {
    return (uint32_t)__half_as_ushort(__low2half(h)) | (uint32_t)__half_as_ushort(__high2half(h)) << 16;
}
static __device__ __forceinline__ uint32_t two_codes(uint32_t codes, __half2 scale) {
    const __half2_raw r = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
    return half2_bits(__hmul2(__half2(r), scale));
}
static __device__ __forceinline__ __half2 scale_of(uint8_t e) {
    return __float2half2_rn(__uint_as_float((uint32_t)e << 23));
}
static __device__ __forceinline__ uint32_t two_bf16(uint32_t v) {
    return half2_bits(__floats2half2_rn(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)));
}

/* {a0 a1} {b0 b1} as {a0 b0} {a1 b1}. */
static __device__ __forceinline__ void weave(uint32_t a, uint32_t b, uint32_t *first, uint32_t *second) {
    *first = __byte_perm(a, b, 0x5410);
    *second = __byte_perm(a, b, 0x7632);
}

/* The entry of a request, or NULL beyond its last. */
template <int D>
static __device__ __forceinline__ const uint8_t *entry_at(const attend_args &a, int64_t i, int e, int n) {
    if (e >= n) return NULL;
    if (e < a.n_window) return a.window + i * a.window_stride + (int64_t)e * layout<D>::row;
    int64_t c = e - a.n_window;
    if (a.sel) c = a.sel[i * a.ld_sel + c];
    if (!a.slot) return a.rows + i * a.row_stride + c * layout<D>::row;
    return a.rows + a.slot[i * a.ld_slot + c / LSA_PAGE_CHUNKS] * a.page_stride +
           c % LSA_PAGE_CHUNKS * layout<D>::row;
}

/* 64 rows from memory into pairs. */
template <int D>
static __device__ __forceinline__ void decode_tile(uint32_t *tile, const uint8_t *const *row) {
    typedef layout<D> at;
    enum { EIGHTS = at::plain / 8, EACH = PAIRS * EIGHTS / THREADS, FOURS = ATTEND_ROPE / 4 };
    static_assert(PAIRS * EIGHTS % THREADS == 0 && PAIRS * FOURS % THREADS == 0, "no thread idles");
    uint2 va[EACH], vb[EACH];
    uint8_t sa[EACH], sb[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int w = threadIdx.x + k * THREADS, p = w / EIGHTS, c = w % EIGHTS;
        const uint8_t *const ra = row[2 * p], *const rb = row[2 * p + 1];
        const int scale = at::plain + 2 * ATTEND_ROPE + c * 8 / CODE_GROUP;
        va[k] = ra ? *(const uint2 *)(ra + 8 * c) : make_uint2(0, 0);
        vb[k] = rb ? *(const uint2 *)(rb + 8 * c) : make_uint2(0, 0);
        sa[k] = ra ? ra[scale] : 0;
        sb[k] = rb ? rb[scale] : 0;
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int w = threadIdx.x + k * THREADS, p = w / EIGHTS, c = w % EIGHTS;
        const __half2 fa = scale_of(sa[k]), fb = scale_of(sb[k]);
        uint32_t o[8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t x = (j < 2 ? va[k].x : va[k].y) >> 16 * (j & 1) & 0xffffu,
                           y = (j < 2 ? vb[k].x : vb[k].y) >> 16 * (j & 1) & 0xffffu;
            weave(two_codes(x, fa), two_codes(y, fb), &o[2 * j], &o[2 * j + 1]);
        }
        uint4 *const to = (uint4 *)(tile + p * at::v_ld + 8 * c);
        to[0] = make_uint4(o[0], o[1], o[2], o[3]);
        to[1] = make_uint4(o[4], o[5], o[6], o[7]);
    }
#pragma unroll
    for (int k = 0; k < PAIRS * FOURS / THREADS; k++) {
        const int w = threadIdx.x + k * THREADS, p = w / FOURS, c = w % FOURS;
        const uint8_t *const ra = row[2 * p], *const rb = row[2 * p + 1];
        const uint2 x = ra ? *(const uint2 *)(ra + at::plain + 8 * c) : make_uint2(0, 0),
                    y = rb ? *(const uint2 *)(rb + at::plain + 8 * c) : make_uint2(0, 0);
        uint32_t o[4];
        weave(two_bf16(x.x), two_bf16(y.x), &o[0], &o[1]);
        weave(two_bf16(x.y), two_bf16(y.y), &o[2], &o[3]);
        *(uint4 *)(tile + p * at::v_ld + at::plain + 4 * c) = make_uint4(o[0], o[1], o[2], o[3]);
    }
}

/* Column g of the first product. */
static __device__ __forceinline__ int pair_of(int g) {
    return (g & 4) | (g & 1) << 1 | (g & 2) >> 1;
}

/* Scores of 16 heads and 64 rows: warp w has 16 rows and half of the channels. */
template <int D>
static __device__ __forceinline__ void first_product(const uint32_t *tile, const __half *q, float *s) {
    typedef layout<D> at;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3,
              p0 = (warp & 3) * 8, half = warp >> 2;
    float even[4] = {}, odd[4] = {};
    const uint32_t *const mine = tile + (p0 + pair_of(g)) * at::v_ld + 4 * t;
#pragma unroll 4
    for (int k = half * (D / 32); k < (half + 1) * (D / 32); k++) {
        const uint4 v = *(const uint4 *)(mine + 16 * k);
        const uint2 lo = *(const uint2 *)(q + g * at::q_ld + 16 * k + 4 * t),
                    hi = *(const uint2 *)(q + (g + 8) * at::q_ld + 16 * k + 4 * t);
        uint32_t e0, e1, o0, o1;
        weave(v.x, v.y, &e0, &o0);
        weave(v.z, v.w, &e1, &o1);
        mma_f16(even, lo.x, hi.x, lo.y, hi.y, e0, e1);
        mma_f16(odd, lo.x, hi.x, lo.y, hi.y, o0, o1);
    }
    s += half * ATTEND_HEADS * S_LD;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int head = g + 8 * (j >> 1), row = 2 * (p0 + pair_of(2 * t + (j & 1)));
        s[head * S_LD + row] = even[j];
        s[head * S_LD + row + 1] = odd[j];
    }
}

template <int D>
static __global__ void __launch_bounds__(THREADS) attend_k(const __grid_constant__ attend_args a) {
    typedef layout<D> at;
    enum { GROUPS = (D / 32 + 7) / 8 }; /* of 32 channels, a warp */
    extern __shared__ uint4 dynamic[];
    __shared__ const uint8_t *row[ATTEND_ROWS];
    __shared__ float fade[ATTEND_HEADS], weight[ATTEND_HEADS][ATTEND_SPLITS];
    __shared__ uint32_t order;
    uint8_t *const base = (uint8_t *)dynamic;
    uint32_t *const tile = (uint32_t *)base;
    __half *const q = (__half *)(base + at::q), *const prob = (__half *)(base + at::p);
    float *const s = (float *)(base + at::s);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const int split = blockIdx.x, h0 = blockIdx.y * ATTEND_HEADS;
    const int64_t i = blockIdx.z, part = (i * gridDim.y + blockIdx.y) * a.splits;
    serve_wait();
    const int n = a.n_window + (a.n_sel ? a.n_sel[i] : a.n_row), tiles = (n + ATTEND_ROWS - 1) / ATTEND_ROWS,
              each = (tiles + a.splits - 1) / a.splits, first = split * each, last = min(first + each, tiles);
    enum {
        FOURS = ATTEND_HEADS * D / 4 / THREADS
    }; /* of a thread: asked for together, since each waits for memory */
    float4 ask[FOURS];
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const int h = (tid + k * THREADS) / (D / 4), c = (tid + k * THREADS) % (D / 4);
        ask[k] = h0 + h < a.H ? ((const float4 *)(a.q + (i * a.H + h0 + h) * D))[c] : make_float4(0, 0, 0, 0);
    }
    if (tid < ATTEND_ROWS) row[tid] = entry_at<D>(a, i, first * ATTEND_ROWS + tid, n);
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const int h = (tid + k * THREADS) / (D / 4), c = (tid + k * THREADS) % (D / 4);
        *(uint2 *)(q + h * at::q_ld + 4 * c) = make_uint2(half2_bits(__floats2half2_rn(ask[k].x, ask[k].y)),
                                                          half2_bits(__floats2half2_rn(ask[k].z, ask[k].w)));
    }
    float acc[GROUPS][4][4] = {}, most = -INFINITY, sum = 0; /* most, sum: of head tid / 16 */
    for (int k = first; k < last; k++) {
        __syncthreads(); /* the rows are known, and the tile before is no longer read */
        decode_tile<D>(tile, row);
        __syncthreads();
        if (tid < ATTEND_ROWS) row[tid] = entry_at<D>(a, i, (k + 1) * ATTEND_ROWS + tid, n);
        first_product<D>(tile, q, s);
        __syncthreads();
        {
            const int h = tid / 16, r0 = tid % 16;
            float z[4], here = -INFINITY;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int r = r0 + 16 * j;
                z[j] = k * ATTEND_ROWS + r < n
                           ? (s[h * S_LD + r] + s[(ATTEND_HEADS + h) * S_LD + r]) * a.scale
                           : -INFINITY;
                here = fmaxf(here, z[j]);
            }
            for (int o = 8; o >= 1; o /= 2) here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, o));
            const float top = fmaxf(most, here), less = __expf(most - top);
            float add = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float p = __expf(z[j] - top);
                add += p;
                prob[h * P_LD + r0 + 16 * j] = __float2half(p);
            }
            for (int o = 8; o >= 1; o /= 2) add += __shfl_xor_sync(0xffffffffu, add, o);
            sum = sum * less + add;
            most = top;
            if (r0 == 0) fade[h] = less;
        }
        __syncthreads();
        const float fade_lo = fade[g], fade_hi = fade[g + 8];
#pragma unroll
        for (int x = 0; x < GROUPS; x++) {
            const int c0 = (warp + 8 * x) * 32;
            if (c0 >= D) break;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                acc[x][j][0] *= fade_lo, acc[x][j][1] *= fade_lo;
                acc[x][j][2] *= fade_hi, acc[x][j][3] *= fade_hi;
            }
#pragma unroll
            for (int d = 0; d < ATTEND_ROWS / 16; d++) {
                const __half *const p = prob + g * P_LD + 16 * d + 2 * t;
                const uint32_t a0 = *(const uint32_t *)p, a1 = *(const uint32_t *)(p + 8 * P_LD),
                               a2 = *(const uint32_t *)(p + 8), a3 = *(const uint32_t *)(p + 8 * P_LD + 8);
                const uint4 v = *(const uint4 *)(tile + (8 * d + t) * at::v_ld + c0 + 4 * g),
                            w = *(const uint4 *)(tile + (8 * d + t + 4) * at::v_ld + c0 + 4 * g);
                mma_f16(acc[x][0], a0, a1, a2, a3, v.x, w.x);
                mma_f16(acc[x][1], a0, a1, a2, a3, v.y, w.y);
                mma_f16(acc[x][2], a0, a1, a2, a3, v.z, w.z);
                mma_f16(acc[x][3], a0, a1, a2, a3, v.w, w.w);
            }
        }
    }
    /* this part's sums; those of no rows are never read */
    float *const stat = a.stat + part * 2 * ATTEND_HEADS;
    if (tid % 16 == 0) {
        stat[split * 2 * ATTEND_HEADS + tid / 16] = most;
        stat[split * 2 * ATTEND_HEADS + ATTEND_HEADS + tid / 16] = sum;
    }
    if (first < last) {
        float *const mine = a.part + (part + split) * ATTEND_HEADS * D;
#pragma unroll
        for (int x = 0; x < GROUPS; x++) {
            const int c0 = (warp + 8 * x) * 32 + 8 * t;
            if ((warp + 8 * x) * 32 >= D) break;
#pragma unroll
            for (int j = 0; j < 4; j++) { /* rows g, g + 8; columns 2t, 2t + 1: channels 4 (2t), 4 (2t + 1) */
                float *const to = mine + (g + 8 * (j >> 1)) * D + c0 + 4 * (j & 1);
                *(float4 *)to = make_float4(acc[x][0][j], acc[x][1][j], acc[x][2][j], acc[x][3][j]);
            }
        }
    }
    __threadfence();
    __syncthreads();
    if (tid == 0) order = atomicAdd(&a.ticket[i * gridDim.y + blockIdx.y], 1u);
    __syncthreads();
    if (order != (uint32_t)a.splits - 1) return;
    __threadfence();
    if (tid == 0) a.ticket[i * gridDim.y + blockIdx.y] = 0;
    const int parts = min(a.splits, (tiles + each - 1) / max(each, 1));
    float *const stats = (float *)base; /* the tile's place */
    for (int k = tid; k < parts * 2 * ATTEND_HEADS; k += THREADS) stats[k] = __ldcg(stat + k);
    __syncthreads();
    if (tid < ATTEND_HEADS) {
        const float sink = h0 + tid < a.H ? a.sink[h0 + tid] : 0.0f;
        float top = sink;
        for (int k = 0; k < parts; k++) top = fmaxf(top, stats[k * 2 * ATTEND_HEADS + tid]);
        float z = __expf(sink - top);
        for (int k = 0; k < parts; k++) {
            weight[tid][k] = __expf(stats[k * 2 * ATTEND_HEADS + tid] - top);
            z += weight[tid][k] * stats[k * 2 * ATTEND_HEADS + ATTEND_HEADS + tid];
        }
        for (int k = 0; k < parts; k++) weight[tid][k] /= z;
    }
    __syncthreads();
    float4 v[FOURS];
#pragma unroll
    for (int k = 0; k < FOURS; k++) v[k] = make_float4(0, 0, 0, 0);
#pragma unroll 2
    for (int j = 0; j < parts; j++) {
        const float4 *const from = (const float4 *)(a.part + (part + j) * ATTEND_HEADS * D) + tid;
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            const float4 x = __ldcg(from + k * THREADS);
            const float w = weight[(tid + k * THREADS) / (D / 4)][j];
            v[k].x += w * x.x, v[k].y += w * x.y, v[k].z += w * x.z, v[k].w += w * x.w;
        }
    }
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        const int h = (tid + k * THREADS) / (D / 4), c = (tid + k * THREADS) % (D / 4);
        if (h0 + h < a.H) ((float4 *)(a.out + (i * a.H + h0 + h) * D))[c] = v[k];
    }
}

int32_t decode_splits(int32_t n_sm, int32_t m, int32_t H, int32_t n_row) {
    const int32_t groups = (H + ATTEND_HEADS - 1) / ATTEND_HEADS * m,
                  tiles = (n_row + ATTEND_ROWS - 1) / ATTEND_ROWS, fill = 2 * n_sm / groups;
    const int32_t want = fill < 1               ? 1
                         : fill < ATTEND_SPLITS ? fill
                                                : ATTEND_SPLITS,
                  each = (tiles + want - 1) / want;
    return each > 0 ? (tiles + each - 1) / each : 1;
}

template <int D>
static lsa_status launch(const lsa_gpu_retriever *x, const attend_args &a, cudaStream_t s, lsa_err *err) {
    return serve_launch(
        x, s, "attend", err, attend_k<D>,
        dim3((unsigned)a.splits, (unsigned)((a.H + ATTEND_HEADS - 1) / ATTEND_HEADS), (unsigned)a.m), THREADS,
        layout<D>::bytes, a);
}

static lsa_status check_size(int32_t D, lsa_err *err) {
    if (D != 128 && D != 512)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "attention over encoded rows: heads of 128 or 512, found %d", D);
    return LSA_OK;
}

lsa_status decode_prepare_attend(int32_t D, lsa_err *err) {
    const lsa_status st = check_size(D, err);
    if (st != LSA_OK) return st;
    if (D == 128)
        LSA_CUDA(cudaFuncSetAttribute(attend_k<128>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      layout<128>::bytes));
    else
        LSA_CUDA(cudaFuncSetAttribute(attend_k<512>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      layout<512>::bytes));
    return LSA_OK;
}

lsa_status decode_attend(const lsa_gpu_retriever *x, const attend_args *a, int32_t D, cudaStream_t s,
                         lsa_err *err) {
    const lsa_status st = check_size(D, err);
    if (st != LSA_OK || a->m == 0) return st;
    return D == 128 ? launch<128>(x, *a, s, err) : launch<512>(x, *a, s, err);
}
