/* Pieces shared by the sm_90 score kernels: wgmma and barrier instructions, the producer that gathers fp8
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

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LSA_WGMMA 1
#endif

enum {
    TILE = STEP_TILE,
    HALF = TILE * 128 /* bytes of half a key tile */,
    KTILE = 2 * HALF,
    RAWTILE = TILE * 128
};
enum { STAGES = 3, RAW = 4 };

static __device__ __forceinline__ uint32_t smem_at(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

#ifdef LSA_WGMMA
static __device__ __forceinline__ void bar_init(uint32_t bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
static __device__ __forceinline__ void bar_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
static __device__ __forceinline__ void bar_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\n"
        "bra again;\ndone:\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
}
static __device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
static __device__ __forceinline__ void proxy_fence(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
static __device__ __forceinline__ void mma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void mma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> static __device__ __forceinline__ void mma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* The compiler must not move uses of an accumulator over a wait. */
template <int N> static __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

/* Descriptor of a swizzled operand: leading and stride byte offsets as wgmma defines them for its major-ness.
 */
static __device__ __forceinline__ uint64_t mma_desc(uint32_t at, uint32_t leading, uint32_t stride) {
    return (uint64_t)((at & 0x3FFFF) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           (uint64_t)1 << 62;
}
/* channels contiguous: row groups of 8 are 1,024 bytes apart */
static __device__ __forceinline__ uint64_t desc_rows(uint32_t at) {
    return mma_desc(at, 16, 1024);
}
/* transposed key tile: the next 64 channels are half a tile away, the next 8 keys 1,024 bytes */
static __device__ __forceinline__ uint64_t desc_columns(uint32_t at) {
    return mma_desc(at, HALF, 1024);
}

#define ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC32(i)                                                                                             \
    ACC4(i), ACC4(i + 4), ACC4(i + 8), ACC4(i + 12), ACC4(i + 16), ACC4(i + 20), ACC4(i + 24), ACC4(i + 28)

/* d (+)= A B, A [64, 16] and B [16, 128] in shared memory, both with 16 contiguous. */
static __device__ __forceinline__ void mma_128(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,"
        "%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,"
        "%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : ACC32(0), ACC32(32)
        : "l"(a), "l"(b), "r"(add));
}
static __device__ __forceinline__ void mma_64(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,"
        "%31}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : ACC32(0)
        : "l"(a), "l"(b), "r"(add));
}
/* d += A B, A [64, 16] in registers, B [16, 128] in shared memory with 128 contiguous. */
static __device__ __forceinline__ void mma_128_reg(float (&d)[64], const uint32_t *a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,"
        "%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,"
        "%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
        : ACC32(0), ACC32(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
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

static __device__ __forceinline__ void cp_async16(uint32_t dst, const void *src, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void cp_async4(uint32_t dst, const void *src, uint32_t bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

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

static __device__ __forceinline__ uint32_t half2_of(uint32_t e4m3x2) {
    uint32_t h;
    asm("{\n.reg .b16 x;\ncvt.u16.u32 x, %1;\ncvt.rn.f16x2.e4m3x2 %0, x;\n}" : "=r"(h) : "r"(e4m3x2));
    return h;
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
