/* Indexer scores and their gradient in fp32 on the ordinary cores: the first, straightforward path (sm_80 and
 * later).
 *
 * Forward: a block owns one query and a tile of 128 keys. Backward: a block owns one query and 8 heads and
 * walks over all key tiles, so dq and dw have one owner and one order (no atomics). Keys are decoded from fp8
 * while they are loaded; rows are padded by one float so that threads that read different keys hit different
 * banks. Floors and measurements: kernels/PERF.md. */
#include <cuda_fp8.h>

#include "kernels/core/lsa_ids.h"
#include "kernels/cuda/cuda_state.h"

enum { D = 128, TILE = 128, LD = D + 1, HEADS = 8 };

static __device__ float e4m3(unsigned char v) {
    __half_raw h = __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)v, __NV_E4M3);
    return __half2float(*(__half *)&h);
}

/* key[j][x] of candidates j0.. of query i; rows beyond n_cand become 0. 256 threads. */
static __device__ void load_tile(float *key, const unsigned char *keys, int64_t base, const int32_t *cand,
                                 int64_t n_key, int64_t j0, int64_t n_cand) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int j = warp; j < TILE; j += 8) {
        const int64_t at = j0 + j;
        if (at >= n_cand) {
            for (int x = lane; x < D; x += 32) key[j * LD + x] = 0.0f;
            continue;
        }
        int64_t r = base + (cand ? cand[at] : at);
        r = r < 0 ? 0 : r >= n_key ? n_key - 1 : r;
        const unsigned char *row = keys + r * LSA_KEY_BYTES; /* 4-byte aligned: 132 = 33 words */
        const float scale = *(const float *)(row + D);
        const unsigned word = *(const unsigned *)(row + 4 * lane);
        for (int b = 0; b < 4; b++)
            key[j * LD + 4 * lane + b] = e4m3((unsigned char)(word >> (8 * b))) * scale;
    }
}

static __global__ void score_fwd_k(const lsa_indexer_score_fwd_args a) {
    extern __shared__ float smem[];
    float *key = smem, *q = smem + TILE * LD, *part = q + HEADS * D; /* [2][TILE] */
    const int64_t i = blockIdx.y, j0 = (int64_t)blockIdx.x * TILE, n_cand = a.n_cand[i];
    const int j = threadIdx.x & (TILE - 1),
              half = threadIdx.x / TILE; /* two threads share a key: 4 heads each of a group of 8 */
    float z = 0.0f;
    if (j0 < n_cand) {
        load_tile(key, a.keys, a.key_base[i], a.cand ? a.cand + i * a.n : NULL, a.n_key, j0, n_cand);
        for (int64_t h0 = 0; h0 < a.n_head; h0 += HEADS) {
            __syncthreads();
            for (int x = threadIdx.x; x < HEADS * D; x += 256)
                q[x] = h0 + x / D < a.n_head ? a.q[(i * a.n_head + h0) * D + x] : 0.0f;
            __syncthreads();
            float p[4] = {0, 0, 0, 0};
            const float *qh = q + half * 4 * D, *k = key + j * LD;
            for (int x = 0; x < D; x++) {
                const float kv = k[x];
                for (int h = 0; h < 4; h++) p[h] += kv * qh[h * D + x];
            }
            for (int h = 0; h < 4; h++) {
                const int64_t head = h0 + half * 4 + h;
                if (head < a.n_head) z += a.w[i * a.n_head + head] * (p[h] < 0.0f ? 0.0f : p[h]);
            }
        }
    }
    part[half * TILE + j] = z;
    __syncthreads();
    if (half == 0 && j0 + j < a.n) {
        float *o = a.z + i * a.n + j0 + j;
        const float v = j0 + j < n_cand ? part[j] + part[TILE + j] : 0.0f;
        *o = a.accumulate ? *o + v : v;
    }
}

static __global__ void score_bwd_k(const lsa_indexer_score_bwd_args a) {
    extern __shared__ float smem[];
    float *key = smem, *q = key + TILE * LD, *g = q + HEADS * D /* [TILE][HEADS+1] */,
          *sum = g + TILE * (HEADS + 1) /* [2][TILE][4] */;
    const int64_t i = blockIdx.y, h0 = (int64_t)blockIdx.x * HEADS,
                  n_cand = a.n_cand[i] < a.n ? a.n_cand[i] : a.n;
    const int j = threadIdx.x & (TILE - 1), half = threadIdx.x / TILE;
    for (int x = threadIdx.x; x < HEADS * D; x += 256)
        q[x] = h0 + x / D < a.n_head ? a.q[(i * a.n_head + h0) * D + x] : 0.0f;
    float w[4], dw[4] = {0, 0, 0, 0}, dq[4] = {0, 0, 0, 0};
    for (int h = 0; h < 4; h++)
        w[h] = h0 + half * 4 + h < a.n_head ? a.w[i * a.n_head + h0 + half * 4 + h] : 0.0f;
    for (int64_t j0 = 0; j0 < n_cand; j0 += TILE) {
        __syncthreads();
        load_tile(key, a.keys, a.key_base[i], a.cand ? a.cand + i * a.n : NULL, a.n_key, j0, n_cand);
        __syncthreads();
        const float dz = j0 + j < n_cand ? a.dz[i * a.n + j0 + j] : 0.0f;
        float p[4] = {0, 0, 0, 0};
        const float *qh = q + half * 4 * D, *k = key + j * LD;
        for (int x = 0; x < D; x++) {
            const float kv = k[x];
            for (int h = 0; h < 4; h++) p[h] += kv * qh[h * D + x];
        }
        for (int h = 0; h < 4; h++) {
            dw[h] += dz * (p[h] < 0.0f ? 0.0f : p[h]);
            g[j * (HEADS + 1) + half * 4 + h] = p[h] > 0.0f ? dz * w[h] : 0.0f;
        }
        __syncthreads();
        /* thread owns channel j (= threadIdx mod 128) of 4 heads */
        for (int s = 0; s < TILE; s++) {
            const float kv = key[s * LD + j];
            for (int h = 0; h < 4; h++) dq[h] += g[s * (HEADS + 1) + half * 4 + h] * kv;
        }
    }
    for (int h = 0; h < 4; h++) {
        const int64_t head = h0 + half * 4 + h;
        if (head < a.n_head) a.dq[(i * a.n_head + head) * D + j] = dq[h];
        sum[(half * TILE + j) * 4 + h] = dw[h];
    }
    __syncthreads();
    for (int k = TILE / 2; k > 0; k >>= 1) {
        if (j < k)
            for (int h = 0; h < 4; h++) sum[(half * TILE + j) * 4 + h] += sum[(half * TILE + j + k) * 4 + h];
        __syncthreads();
    }
    if (j == 0)
        for (int h = 0; h < 4; h++)
            if (h0 + half * 4 + h < a.n_head)
                a.dw[i * a.n_head + h0 + half * 4 + h] = sum[half * TILE * 4 + h];
}

/* Queries go into grid.y, at most 65,535 a launch. */
static const int64_t MAX_Y = 65535;

lsa_status lsa_cuda_indexer_score_fwd(lsa_ctx *c, const lsa_indexer_score_fwd_args *a, lsa_err *err) {
    const int bytes = (TILE * LD + HEADS * D + 2 * TILE) * (int)sizeof(float);
    if (a->m == 0 || a->n == 0) return LSA_OK;
    LSA_CUDA(cudaFuncSetAttribute(score_fwd_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    for (int64_t i = 0; i < a->m; i += MAX_Y) {
        lsa_indexer_score_fwd_args b = *a;
        b.m = a->m - i < MAX_Y ? a->m - i : MAX_Y;
        b.q += i * a->n_head * D;
        b.w += i * a->n_head;
        b.key_base += i;
        b.n_cand += i;
        b.z += i * a->n;
        if (b.cand) b.cand += i * a->n;
        score_fwd_k<<<dim3((unsigned)((a->n + TILE - 1) / TILE), (unsigned)b.m), 256, bytes,
                      lsa_cuda(c)->stream>>>(b);
    }
    LSA_LAUNCHED("indexer_score_fwd");
}

lsa_status lsa_cuda_indexer_score_bwd(lsa_ctx *c, const lsa_indexer_score_bwd_args *a, lsa_err *err) {
    const int bytes = (TILE * LD + HEADS * D + TILE * (HEADS + 1) + 2 * TILE * 4) * (int)sizeof(float);
    if (a->m == 0 || a->n_head == 0) return LSA_OK;
    LSA_CUDA(cudaFuncSetAttribute(score_bwd_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    for (int64_t i = 0; i < a->m; i += MAX_Y) {
        lsa_indexer_score_bwd_args b = *a;
        b.m = a->m - i < MAX_Y ? a->m - i : MAX_Y;
        b.q += i * a->n_head * D;
        b.w += i * a->n_head;
        b.key_base += i;
        b.n_cand += i;
        b.dz += i * a->n;
        b.dq += i * a->n_head * D;
        b.dw += i * a->n_head;
        if (b.cand) b.cand += i * a->n;
        score_bwd_k<<<dim3((unsigned)((a->n_head + HEADS - 1) / HEADS), (unsigned)b.m), 256, bytes,
                      lsa_cuda(c)->stream>>>(b);
    }
    LSA_LAUNCHED("indexer_score_bwd");
}
