/* Pieces shared by the sm_90 score kernels of the step: the producer that gathers fp8
 * keys and turns them into f16 tiles, and the rotary + Hadamard transform of a head in registers.
 *
 * Tiles in shared memory: two halves of 64 channels; a half has rows of 128 bytes whose 16-byte pieces are
 * XORed with row mod 8 (the 128-byte swizzle of wgmma). The same key tile serves as [keys, channels] with
 * channels contiguous for the logits and as [channels, keys] (transposed operand) for the query gradient.
 *
 * HINT (sm_90): 4096 f16 FLOP a clock and SM; a tile of 128 keys and 128 heads is 1,024 clocks a product. */
#ifndef LSA_KERNELS_CUDA_STEP_SCORE_TILE_CUH
#define LSA_KERNELS_CUDA_STEP_SCORE_TILE_CUH

#include <cuda_fp8.h>

#include "kernels/cuda/step/step_state.h"
#include "kernels/cuda/wgmma.cuh"

enum {
    TILE = STEP_TILE,
    HALF = TILE * 128 /* bytes of half a key tile */,
    KTILE = 2 * HALF,
    RAWTILE = TILE * 128
};
enum { STAGES = 3, RAW = 4 };

#ifdef LSA_WGMMA
/* transposed key tile: the next 64 channels are half a tile away, the next 8 keys 1,024 bytes */
static __device__ __forceinline__ uint64_t desc_columns(uint32_t at) {
    return mma_desc(at, HALF, 1024);
}

/* ---- producers: two warpgroups ---- */

enum {
    PRODUCERS = 256,
    PIECES = TILE * 8 / PRODUCERS /* of 16 bytes, for each thread of a tile */,
    ROW_STEP = PRODUCERS / 8
};

struct tile_memory { /* addresses in shared memory */
    uint32_t key, raw, key_scale, raw_scale, full, empty;
};

/* Which keys this thread brings of a tile; -1 beyond n_cand. Loaded a tile ahead of the copies that need
 * them. */
struct tile_rows {
    int row[PIECES], scale;
};
static __device__ __forceinline__ tile_rows rows_of(const int32_t *cand, int n_cand, int t, int tid) {
    tile_rows r;
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        const int j = t * TILE + (tid >> 3) + ROW_STEP * k;
        r.row[k] = j >= n_cand ? -1 : cand ? __ldg(cand + j) : j;
    }
    const int j = t * TILE + (tid & (TILE - 1));
    r.scale = j >= n_cand || tid >= TILE ? -1 : cand ? __ldg(cand + j) : j;
    return r;
}

/* Starts the copies of a tile: thread tid brings piece tid mod 8 of rows tid/8, +ROW_STEP, ...; rows beyond
 * n_cand become zero. */
static __device__ __forceinline__ void start_tile(const tile_memory &s, const uint8_t *key,
                                                  const float *scale, const tile_rows &r, int slot, int tid) {
    const uint32_t raw = s.raw + (uint32_t)slot * RAWTILE;
    const int piece = tid & 7, r0 = tid >> 3;
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        const int at = r0 + ROW_STEP * k;
        cp_async16(raw + (uint32_t)(at * 128 + ((piece ^ (at & 7)) << 4)),
                   key + (int64_t)max(r.row[k], 0) * 128 + piece * 16, r.row[k] < 0 ? 0 : 16);
    }
    if (tid < TILE)
        cp_async4(s.raw_scale + (uint32_t)(slot * TILE + tid) * 4, scale + max(r.scale, 0),
                  r.scale < 0 ? 0 : 4);
}

/* Tiles [t0, t1): fp8 rows -> raw ring -> f16 tile in stage (t - t0) mod STAGES. */
static __device__ __forceinline__ void produce(const tile_memory &s, const uint8_t *key, const float *scale,
                                               const int32_t *cand, int n_cand, int t0, int t1, int tid) {
    const int piece = tid & 7, r0 = tid >> 3;
    tile_rows next = rows_of(cand, n_cand, t0, tid);
    for (int k = 0; k < RAW - 1; k++) {
        if (t0 + k < t1) start_tile(s, key, scale, next, k, tid);
        next = rows_of(cand, n_cand, t0 + k + 1, tid);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    int slot = 0, ahead = RAW - 1, stage = 0;
    uint32_t parity = 1;
    for (int t = t0; t < t1; t++) {
        if (t + RAW - 1 < t1) start_tile(s, key, scale, next, ahead, tid);
        next = rows_of(cand, n_cand, t + RAW, tid);
        asm volatile("cp.async.commit_group;" ::: "memory");
        asm volatile("cp.async.wait_group %0;" ::"n"(RAW - 1) : "memory");
        bar_wait(s.empty + 8 * stage, parity);
        const uint32_t raw = s.raw + (uint32_t)slot * RAWTILE, dst = s.key + (uint32_t)stage * KTILE;
        uint32_t v[PIECES][4], sc = 0;
#pragma unroll
        for (int j = 0; j < PIECES; j++) { /* a thread converts only what it copied itself */
            const int r = r0 + ROW_STEP * j;
            asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(v[j][0]), "=r"(v[j][1]), "=r"(v[j][2]), "=r"(v[j][3])
                         : "r"(raw + (uint32_t)(r * 128 + ((piece ^ (r & 7)) << 4))));
        }
        if (tid < TILE)
            asm volatile("ld.shared.u32 %0, [%1];"
                         : "=r"(sc)
                         : "r"(s.raw_scale + (uint32_t)(slot * TILE + tid) * 4));
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            const int r = r0 + ROW_STEP * j;
            uint32_t h[8];
#pragma unroll
            for (int b = 0; b < 4; b++) {
                h[2 * b] = half2_of(v[j][b] & 0xFFFF);
                h[2 * b + 1] = half2_of(v[j][b] >> 16);
            }
            /* the two halves of a tile meet the same banks: pieces 4..7 write their second part first */
            const uint32_t row = dst + (uint32_t)((piece >> 2) * HALF + r * 128);
            const int c = (piece & 3) * 2, late = piece >> 2;
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const bool second = part != late;
                asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(
                                 row + (uint32_t)(((c + second) ^ (r & 7)) << 4)),
                             "r"(second ? h[4] : h[0]), "r"(second ? h[5] : h[1]), "r"(second ? h[6] : h[2]),
                             "r"(second ? h[7] : h[3])
                             : "memory");
            }
        }
        if (tid < TILE)
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(s.key_scale + (uint32_t)(stage * TILE + tid) * 4),
                         "r"(sc)
                         : "memory");
        proxy_fence();
        bar_arrive(s.full + 8 * stage);
        slot = slot + 1 == RAW ? 0 : slot + 1;
        ahead = ahead + 1 == RAW ? 0 : ahead + 1;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
}

/* ---- a head in registers ----
 * Thread (warp, lane) of a warpgroup holds rows lane/4 and lane/4 + 8 of its warp's 16; of a row the channels
 * 8i + 2(lane mod 4)
 * + {0, 1}, i = 0..15, in v[4i], v[4i+1] (first row) and v[4i+2], v[4i+3] (second): the layout of a wgmma
 * accumulator. */

static __device__ __forceinline__ void hadamard(float (&v)[64], int lane) {
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
        const float a = v[i], b = v[i + 1];
        v[i] = a + b;
        v[i + 1] = a - b;
    }
#pragma unroll
    for (int x = 1; x <= 2; x *= 2)
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const float o = __shfl_xor_sync(0xffffffffu, v[i], x);
            v[i] = lane & x ? o - v[i] : v[i] + o;
        }
#pragma unroll
    for (int x = 1; x < 16; x *= 2)
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (!(i & x))
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float a = v[4 * i + k], b = v[4 * (i + x) + k];
                    v[4 * i + k] = a + b;
                    v[4 * (i + x) + k] = a - b;
                }
    const float f = 0.08838834764831845f; /* 1/sqrt(128) */
#pragma unroll
    for (int i = 0; i < 64; i++) v[i] *= f;
}

/* Rotates the last rope_dim channels by +angle (sign 1) or -angle (-1). */
static __device__ __forceinline__ void rotate(float (&v)[64], const float2 *cs, int rope_dim, float sign,
                                              int lane) {
    const int first = 128 - rope_dim;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int c = 8 * i + 2 * (lane & 3);
        if (c < first) continue;
        const float2 r = cs[(c - first) / 2];
        const float sn = r.y * sign;
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            const float a = v[4 * i + k], b = v[4 * i + k + 1];
            v[4 * i + k] = a * r.x - b * sn;
            v[4 * i + k + 1] = a * sn + b * r.x;
        }
    }
}

/* A warpgroup reads its 64 heads' projections (head h0 + row), rotates, transforms and stores MINUS the query
 * as f16 into its rows of the query tile at `q` whose halves are `half` bytes apart. Returns the two rows'
 * query scales (1 without fp8). */
static __device__ __forceinline__ float2 load_query(uint32_t q, uint32_t half, const score_args &a,
                                                    int64_t row, int l, int h0, int warp, int lane) {
    const int ra = h0 + warp * 16 + (lane >> 2), rb = ra + 8;
    const bf16 *src = a.qlin + ((int64_t)l * a.m + row) * a.H * 128;
    float v[64];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int c = 8 * i + 2 * (lane & 3);
        float2 x = {0, 0}, y = {0, 0};
        if (ra < a.H) x = __bfloat1622float2(*(const __nv_bfloat162 *)(src + (int64_t)ra * 128 + c));
        if (rb < a.H) y = __bfloat1622float2(*(const __nv_bfloat162 *)(src + (int64_t)rb * 128 + c));
        v[4 * i] = x.x;
        v[4 * i + 1] = x.y;
        v[4 * i + 2] = y.x;
        v[4 * i + 3] = y.y;
    }
    rotate(v, a.cs + row * (a.rope_dim / 2), a.rope_dim, 1.0f, lane);
    hadamard(v, lane);
    float2 s = {1.0f, 1.0f};
    if (a.fp8) {
        float ma = 0, mb = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            ma = fmaxf(ma, fmaxf(fabsf(v[4 * i]), fabsf(v[4 * i + 1])));
            mb = fmaxf(mb, fmaxf(fabsf(v[4 * i + 2]), fabsf(v[4 * i + 3])));
        }
#pragma unroll
        for (int x = 1; x <= 2; x *= 2) {
            ma = fmaxf(ma, __shfl_xor_sync(0xffffffffu, ma, x));
            mb = fmaxf(mb, __shfl_xor_sync(0xffffffffu, mb, x));
        }
        s.x = fmaxf(1e-4f, ma) / 448.0f;
        s.y = fmaxf(1e-4f, mb) / 448.0f;
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const __nv_fp8_storage_t e =
                __nv_cvt_float_to_fp8(v[i] / (i & 2 ? s.y : s.x), __NV_NOSAT, __NV_E4M3);
            const __half_raw hr = __nv_cvt_fp8_to_halfraw(e, __NV_E4M3);
            v[i] = __half2float(*(const __half *)&hr);
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int r = warp * 16 + (lane >> 2);
        const uint32_t at =
            q + (uint32_t)(i >> 3) * half + (uint32_t)(r * 128 + (((i & 7) ^ (r & 7)) << 4) + (lane & 3) * 4);
        const __half2 x = __floats2half2_rn(-v[4 * i], -v[4 * i + 1]),
                      y = __floats2half2_rn(-v[4 * i + 2], -v[4 * i + 3]);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(*(const uint32_t *)&x) : "memory");
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + 1024), "r"(*(const uint32_t *)&y)
                     : "memory"); /* 8 rows on */
    }
    return s;
}

/* Low half all ones if x is negative, high half if y is. (__byte_perm does not replicate signs, prmt does.)
 */
static __device__ __forceinline__ uint32_t signs(float x, float y) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, 0xFFBB;" : "=r"(r) : "r"(__float_as_uint(x)), "r"(__float_as_uint(y)));
    return r;
}

/* min(x, 0), NaN stays. */
static __device__ __forceinline__ float below_zero(float x) {
    float y;
    asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}
#endif /* LSA_WGMMA */

#endif
