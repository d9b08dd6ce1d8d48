/* Logits on the tensor cores of sm_90: one block an SM, four warps that bring tiles of 64 keys (a page) into
 * a ring, two or three warpgroups that multiply a tile each with all heads and add over them. Keys are read
 * once: their 132 bytes a chunk are the floor; the product of 128 heads is half of that time in fp8.
 *
 * A tile in shared memory has rows of 128 bytes whose 16-byte pieces are XORed with row mod 8 (the 128-byte
 * swizzle of wgmma). fp8 multiplies it as it is. f16 turns a thread's share into registers: of a row, thread
 * lane mod 4 takes 32 contiguous channels, and query.cu stores queries in the order that this makes of k.
 *
 * NUMERIC: fp8 products are added inside the tensor core with fewer than 24 bits, as in every Hopper kernel.
 */
#include "kernels/cuda/serve/serve_state.h"
#include "kernels/cuda/wgmma.cuh"

enum {
    KEYS = LSA_PAGE_CHUNKS,
    KEY_BYTES = KEYS * 128,
    PAGE_BYTES = KEYS * 132,
    PRODUCERS = 128,
    RING = 12,
    LAG = 8 /* tiles on their way before the first is awaited; below RING */
};

template <int HEADS, bool FP8> struct layout {
    enum {
        groups = FP8 ? 3 : 2,
        threads = PRODUCERS + groups * 128,
        row = FP8 ? 128 : 256, /* bytes of a head's query */
        key = HEADS * row,     /* the query comes first */
        scale = key + RING * KEY_BYTES,
        bars = scale + RING * KEYS * 4,
        bytes = bars + 16 * RING + 1024
    };
};

struct score_args {
    const lsa_gpu_keys *keys;
    const uint8_t *q; /* [m, HEADS, row] */
    const float *w;   /* [m, HEADS] */
    int32_t m;
    int64_t most, ld;
    float *logit;
};

#ifdef LSA_WGMMA
static __device__ __forceinline__ int tiles_of(const score_args &a, int i) {
    if (i >= a.m) return 0;
    const int64_t n = a.keys[i].n_chunk;
    return (int)(((n < a.most ? n : a.most) + KEYS - 1) / KEYS);
}

/* The block's tiles are a contiguous part of all requests' tiles, one after the other. run(i, t0, t1, k0):
 * tiles [t0, t1) of request i, the block's k0-th and following. Every warp walks by itself and sees the same.
 */
template <typename RUN>
static __device__ __forceinline__ void each_part(const score_args &a, int lane, RUN run) {
    int64_t total = 0;
    for (int base = 0; base < a.m; base += 32) {
        int v = tiles_of(a, base + lane);
        for (int o = 16; o >= 1; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
        total += v;
    }
    const int64_t g0 = total * blockIdx.x / gridDim.x, g1 = total * (blockIdx.x + 1) / gridDim.x;
    int64_t before = 0;
    for (int base = 0; base < a.m && before < g1; base += 32) {
        const int v = tiles_of(a, base + lane);
        int upto = v;
        for (int o = 1; o < 32; o *= 2) {
            const int x = __shfl_up_sync(0xffffffffu, upto, o);
            if (lane >= o) upto += x;
        }
        const int64_t b = before + upto - v, e = before + upto;
        for (unsigned hit = __ballot_sync(0xffffffffu, v > 0 && b < g1 && e > g0); hit; hit &= hit - 1) {
            const int j = __ffs((int)hit) - 1;
            const int64_t bj = __shfl_sync(0xffffffffu, b, j), ej = __shfl_sync(0xffffffffu, e, j);
            const int64_t from = bj > g0 ? bj : g0, to = ej < g1 ? ej : g1;
            run(base + j, (int)(from - bj), (int)(to - bj), (int)(from - g0));
        }
        before += __shfl_sync(0xffffffffu, (int64_t)upto, 31);
    }
}

/* Copies of one tile into ring slot `slot`, by 128 threads. */
static __device__ __forceinline__ void bring(uint32_t key, uint32_t scale, int slot, const lsa_gpu_keys &keys,
                                             int page, int tile, int64_t n, int tid) {
    const uint32_t dst = key + (uint32_t)slot * KEY_BYTES, sdst = scale + (uint32_t)slot * KEYS * 4;
    if (keys.page) {
        const uint8_t *const src = keys.data + (int64_t)page * PAGE_BYTES;
#pragma unroll
        for (int k = 0; k < KEY_BYTES / 16 / PRODUCERS; k++) {
            const int at = tid + k * PRODUCERS, r = at >> 3, piece = at & 7;
            cp_async16(dst + (uint32_t)(r * 128 + ((piece ^ (r & 7)) << 4)), src + at * 16, 16);
        }
        if (tid < KEYS / 4) cp_async16(sdst + tid * 16, src + KEY_BYTES + tid * 16, 16);
        return;
    }
    const uint8_t *const src = keys.data + (int64_t)tile * PAGE_BYTES; /* rows of 132 bytes: 4 at a time */
    const int words = (int)((n - (int64_t)tile * KEYS < KEYS ? n - (int64_t)tile * KEYS : KEYS) * 33);
    for (int at = tid; at < KEYS * 33; at += PRODUCERS) {
        const int r = at / 33, word = at % 33;
        const uint32_t to = word == 32
                                ? sdst + r * 4
                                : dst + (uint32_t)(r * 128 + (((word >> 2) ^ (r & 7)) << 4) + (word & 3) * 4);
        cp_async4(to, at < words ? src + at * 4 : src, at < words ? 4 : 0);
    }
}

template <int N> static __device__ __forceinline__ void await_copies(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

static __device__ __forceinline__ void produce(const score_args &a, uint32_t key, uint32_t scale,
                                               uint32_t full, uint32_t empty, int tid) {
    const int lane = tid & 31;
    int done = 0, started = 0;
    each_part(a, lane, [&](int i, int t0, int t1, int) {
        const lsa_gpu_keys keys = a.keys[i];
        const int64_t n = keys.n_chunk < a.most ? keys.n_chunk : a.most;
        int pages = 0;
        for (int t = t0; t < t1; t++, started++) {
            if (keys.page && ((t - t0) & 31) == 0) pages = t + lane < t1 ? keys.page[t + lane] : 0;
            const int page = __shfl_sync(0xffffffffu, pages, (t - t0) & 31);
            bar_wait(empty + 8 * (started % RING), (uint32_t)(started / RING & 1) ^ 1);
            bring(key, scale, started % RING, keys, page, t, n, tid);
            asm volatile("cp.async.commit_group;" ::: "memory");
            if (started >= LAG) {
                await_copies<LAG>();
                proxy_fence(); /* the products read through another path than the copies wrote */
                bar_arrive(full + 8 * (done++ % RING));
            }
        }
    });
    asm volatile("cp.async.wait_all;" ::: "memory");
    proxy_fence();
    while (done < started) bar_arrive(full + 8 * (done++ % RING));
}

/* max(x, 0); NaN stays. */
static __device__ __forceinline__ float positive(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

/* The query of a request into shared memory, in the swizzle of its product. */
template <int HEADS, bool FP8>
static __device__ __forceinline__ void load_query(uint8_t *to, const uint8_t *q, int t) {
    enum { PIECES = layout<HEADS, FP8>::row / 16, THREADS = layout<HEADS, FP8>::groups * 128 };
    for (int at = t; at < HEADS * PIECES; at += THREADS) {
        const int h = at / PIECES, piece = at % PIECES;
        *(uint4 *)(to + (piece >> 3) * HEADS * 128 + h * 128 + (((piece & 7) ^ (h & 7)) << 4)) =
            ((const uint4 *)q)[at];
    }
}

template <int HEADS, bool FP8>
static __device__ __forceinline__ void multiply(float (&d)[HEADS / 2], uint32_t q, uint32_t key, int warp,
                                                int lane) {
    if (FP8) {
        mma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) mma_fp8(d, desc_rows(key + i * 32), desc_rows(q + i * 32), i > 0);
    } else {
        uint32_t v[2][8], a[32];
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int row = warp * 16 + (lane >> 2) + 8 * r, piece = 2 * (lane & 3) + j;
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                             : "=r"(v[r][4 * j]), "=r"(v[r][4 * j + 1]), "=r"(v[r][4 * j + 2]),
                               "=r"(v[r][4 * j + 3])
                             : "r"(key + (uint32_t)(row * 128 + ((piece ^ (row & 7)) << 4))));
            }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            a[4 * i] = half2_of(v[0][i] & 0xFFFF);
            a[4 * i + 1] = half2_of(v[1][i] & 0xFFFF);
            a[4 * i + 2] = half2_of(v[0][i] >> 16);
            a[4 * i + 3] = half2_of(v[1][i] >> 16);
        }
        mma_fence();
#pragma unroll
        for (int i = 0; i < 8; i++)
            mma_f16_reg(d, a + 4 * i, desc_rows(q + (uint32_t)(i >> 2) * HEADS * 128 + (i & 3) * 32), i > 0);
    }
    mma_commit();
    mma_wait<0>();
}
#endif

template <int HEADS, bool FP8>
static __global__ void __launch_bounds__(layout<HEADS, FP8>::threads, 1)
    score_k(const __grid_constant__ score_args a) {
#ifdef LSA_WGMMA
    typedef layout<HEADS, FP8> at;
    extern __shared__ uint8_t dynamic[];
    uint8_t *const base = (uint8_t *)(((uintptr_t)dynamic + 1023) & ~(uintptr_t)1023);
    const uint32_t s = smem_at(base), full = s + at::bars, empty = full + 8 * RING;
    const int tid = threadIdx.x, lane = tid & 31;
    if (tid == 0)
        for (int k = 0; k < RING; k++) {
            bar_init(full + 8 * k, PRODUCERS);
            bar_init(empty + 8 * k, 128); /* one warpgroup empties a tile */
        }
    __syncthreads();
    serve_wait();
    if (tid >= at::groups * 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FP8 ? 56 : 96));
        produce(a, s + at::key, s + at::scale, full, empty, tid - at::groups * 128);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(FP8 ? 152 : 200));
    const int group = tid >> 7, warp = (tid & 127) >> 5, r = warp * 16 + (lane >> 2);
    const float *const scales = (const float *)(base + at::scale);
    each_part(a, lane, [&](int i, int t0, int t1, int k0) {
        float d[HEADS / 2], w[HEADS / 4];
        const int64_t n = min(a.keys[i].n_chunk, a.most);
        named_sync(1, at::groups * 128); /* the query before is no longer read */
        load_query<HEADS, FP8>(base, a.q + (int64_t)i * HEADS * at::row, tid);
#pragma unroll
        for (int j = 0; j < HEADS / 8; j++) {
            const float2 v = *(const float2 *)(a.w + (int64_t)i * HEADS + 8 * j + 2 * (lane & 3));
            w[2 * j] = v.x;
            w[2 * j + 1] = v.y;
        }
        proxy_fence();
        named_sync(1, at::groups * 128);
        float *const out = a.logit + (int64_t)i * a.ld;
        for (int t = t0; t < t1; t++) {
            const int k = k0 + t - t0, slot = k % RING;
            if (k % at::groups != group) continue;
            bar_wait(full + 8 * slot, (uint32_t)(k / RING & 1));
            pin(d);
            multiply<HEADS, FP8>(d, s, s + at::key + (uint32_t)slot * KEY_BYTES, warp, lane);
            pin(d);
            const float sa = scales[slot * KEYS + r], sb = scales[slot * KEYS + r + 8];
            bar_arrive(empty + 8 * slot);
            float za = 0, zb = 0;
#pragma unroll
            for (int j = 0; j < HEADS / 8; j++) {
                za += w[2 * j] * positive(d[4 * j]);
                zb += w[2 * j] * positive(d[4 * j + 2]);
                za += w[2 * j + 1] * positive(d[4 * j + 1]);
                zb += w[2 * j + 1] * positive(d[4 * j + 3]);
            }
#pragma unroll
            for (int o = 1; o <= 2; o *= 2) {
                za += __shfl_xor_sync(0xffffffffu, za, o);
                zb += __shfl_xor_sync(0xffffffffu, zb, o);
            }
            const int64_t c = (int64_t)t * KEYS + r;
            if ((lane & 3) == 0) {
                if (c < n) out[c] = za * sa;
                if (c + 8 < n) out[c + 8] = zb * sb;
            }
        }
    });
#endif
}

template <int HEADS, bool FP8>
static lsa_status run(const lsa_gpu_retriever *x, const score_args &a, cudaStream_t s, lsa_err *err) {
    typedef layout<HEADS, FP8> at;
    return serve_launch(x, s, "score", err, score_k<HEADS, FP8>, dim3((unsigned)x->n_sm), at::threads,
                        at::bytes, a);
}

template <int HEADS, bool FP8> static lsa_status prepare(lsa_err *err) {
    LSA_CUDA(cudaFuncSetAttribute(score_k<HEADS, FP8>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  layout<HEADS, FP8>::bytes));
    return LSA_OK;
}

#define PICK(call)                                                                                           \
    x->form == SERVE_FP8 ? (x->heads == 64 ? call(64, true) : call(128, true))                               \
                         : (x->heads == 64 ? call(64, false) : call(128, false))

lsa_status serve_prepare_sm90(lsa_gpu_retriever *x, lsa_err *err) {
#define PREPARE(heads, fp8) prepare<heads, fp8>(err)
    return PICK(PREPARE);
}

lsa_status serve_score_sm90(lsa_gpu_retriever *x, int32_t layer, int32_t m, const lsa_gpu_keys *keys,
                            float *logit, int64_t ld, cudaStream_t s, lsa_err *err) {
    const int64_t first = (int64_t)layer * x->max_batch * x->heads;
    const size_t size = x->form == SERVE_F16 ? 2 : 1;
    const score_args a = {keys,
                          (const uint8_t *)x->q + (size_t)first * 128 * size,
                          x->w + first,
                          m,
                          ld < x->max_chunks ? ld : x->max_chunks,
                          ld,
                          logit};
#define RUN(heads, fp8) run<heads, fp8>(x, a, s, err)
    return PICK(RUN);
}
