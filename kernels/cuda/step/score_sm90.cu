/* Scores, loss and query gradients on the tensor cores of sm_90: one block a window and layer, one producer
 * warpgroup that gathers and decodes key tiles, two (one for up to 64 heads) warpgroups that multiply.
 *
 * Gradient kernel: rows of the product are heads, so that the masked dz is already in the register layout of
 * the second product. Per tile: P = -Q K^T; while the query gradient of the tile before is still multiplied,
 * P becomes z (sum over heads through shared memory), loss, dz, and the mask of dP. The head weight and the
 * key scale are factors of rows and columns and leave the products: z_j = s_j sum_h w_h max(0, p_hj), dq_h =
 * w_h sum_j (dz_j s_j [p_hj > 0]) k_j. Forward kernel: rows are keys, so a thread's own sum over heads is the
 * logit; its two warpgroups never wait for each other.
 *
 * NUMERIC: queries f16 (11 bits), keys exact, products f32; dz_j s_j f16, times 1024 over a power of two that
 * bounds |dz|, so key scales up to 32 fit (real ones are below 1). Floors and attempts: kernels/PERF.md. */
#include "kernels/cuda/step/score_tile.cuh"

enum { MAX_WG = 2 };
#define DP_SCALE 1024.0f

/* Dynamic shared memory, 1,024-byte aligned; byte offsets for W consumer warpgroups. */
template <int W> struct grad_memory {
    enum {
        key = W * 64 * 256, /* the queries come first */
        raw = key + STAGES * KTILE,
        key_scale = raw + RAW * RAWTILE,
        raw_scale = key_scale + STAGES * TILE * 4,
        part = raw_scale + RAW * TILE * 4, /* [2][4W][TILE] f32 */
        dz = part + 2 * 4 * W * TILE * 4,  /* [W][2][TILE] f32 */
        bars = dz + W * 2 * TILE * 4,
        bytes = bars + 16 * STAGES + 1024
    };
};

template <int W, bool POINTWISE>
static __global__ void __launch_bounds__((W + 2) * 128, 1) grad_k(const __grid_constant__ score_args a) {
#ifdef LSA_WGMMA
    extern __shared__ uint8_t dynamic[];
    uint8_t *const base = (uint8_t *)(((uintptr_t)dynamic + 1023) & ~(uintptr_t)1023);
    const uint32_t at = smem_at(base);
    const tile_memory mem = {at + grad_memory<W>::key,       at + grad_memory<W>::raw,
                             at + grad_memory<W>::key_scale, at + grad_memory<W>::raw_scale,
                             at + grad_memory<W>::bars,      at + grad_memory<W>::bars + 8 * STAGES};
    const int tid = threadIdx.x, group = tid >> 7, t = tid & 127, lane = tid & 31, warp = t >> 5;
    const int64_t row = blockIdx.x;
    const int l = blockIdx.y, n_cand = a.n_cand[row], n_tile = (n_cand + TILE - 1) / TILE;
    if (tid == 0)
        for (int s = 0; s < STAGES; s++) {
            bar_init(mem.full + 8 * s, PRODUCERS);
            bar_init(mem.empty + 8 * s, W * 128);
        }
    __syncthreads();
    if (group >= W) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(W == 2 ? 48 : 72));
        const step_row r = a.where[row];
        produce(mem, r.key + (int64_t)l * r.n_key * 128, r.scale + (int64_t)l * r.n_key,
                a.cand ? a.cand + row * a.n : nullptr, n_cand, 0, n_tile, tid - W * 128);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(W == 2 ? 208 : 232));
    float *const part = (float *)(base + grad_memory<W>::part);
    float *const dzs = (float *)(base + grad_memory<W>::dz) + group * 2 * TILE;
    const float *const key_scale = (const float *)(base + grad_memory<W>::key_scale);
    const uint32_t query = at + (uint32_t)(group * 64 * 128), qhalf = W * 64 * 128;
    const int ra = group * 64 + warp * 16 + (lane >> 2), rb = ra + 8;
    const float2 qs = load_query(query, qhalf, a, row, l, group * 64, warp, lane);
    const float *const wrow = a.w + ((int64_t)l * a.m + row) * a.H;
    const float wa = ra < a.H ? wrow[ra] : 0.0f, wb = rb < a.H ? wrow[rb] : 0.0f;
    const float na = -wa * qs.x, nb = -wb * qs.y; /* P is minus the product */
    proxy_fence();
    named_sync(1 + group, 128);

    const float dp_scale = POINTWISE ? DP_SCALE : DP_SCALE / a.bound[(int64_t)l * a.bound_layer + row];
    float p[64], dq[64], dwa = 0, dwb = 0;
    uint32_t dp[32];
    double loss = 0;
#pragma unroll
    for (int i = 0; i < 64; i++) dq[i] = 0;
    const int64_t yrow = row * a.n, dzrow = (int64_t)l * a.dz_layer + row * a.n;
    for (int k = 0; k < n_tile; k++) {
        const int s = k % STAGES, j = k * TILE + t;
        float y = 0, wt = 1, dz = 0;
        if (j < n_cand) { /* loads start before the product */
            if (POINTWISE) {
                y = a.y[yrow + j];
                wt = a.weight[yrow + j];
            } else {
                dz = a.dz[dzrow + j];
            }
        }
        bar_wait(mem.full + 8 * s, (uint32_t)(k / STAGES & 1));
        const uint32_t key = mem.key + (uint32_t)s * KTILE;
        pin(p);
        mma_fence();
#pragma unroll
        for (int i = 0; i < 8; i++)
            mma_128(p, desc_rows(query + (uint32_t)(i >> 2) * qhalf + (i & 3) * 32),
                    desc_rows(key + (uint32_t)(i >> 2) * HALF + (i & 3) * 32), i > 0);
        mma_commit();
        if (k > 0) {
            const uint32_t old = mem.key + (uint32_t)((k - 1) % STAGES) * KTILE;
#pragma unroll
            for (int i = 0; i < 8; i++) mma_128_reg(dq, dp + 4 * i, desc_columns(old + (uint32_t)i * 2048));
            mma_commit();
            mma_wait<1>();
        } else {
            mma_wait<0>();
        }
        pin(p);
        float *const mine = dzs + (k & 1) * TILE;
        const float ks = key_scale[s * TILE + t];
#pragma unroll
        for (int i = 0; i < 64; i++) p[i] = below_zero(p[i]);
        if (POINTWISE) {
            float *const out = part + ((k & 1) * 4 * W + group * 4 + warp) * TILE;
#pragma unroll
            for (int b = 0; b < 4; b++) { /* 8 columns of this thread, summed over the warp's 16 heads */
                float v[8];
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int i = 4 * b + c;
                    v[2 * c] = na * p[4 * i] + nb * p[4 * i + 2];
                    v[2 * c + 1] = na * p[4 * i + 1] + nb * p[4 * i + 3];
                }
#pragma unroll
                for (int x = 4; x >= 1; x /= 2) { /* lane bits 4, 3, 2: keep one half, give the other */
                    const bool hi = lane & (4 * x);
#pragma unroll
                    for (int c = 0; c < x; c++) {
                        const float give = hi ? v[c] : v[c + x], keep = hi ? v[c + x] : v[c];
                        v[c] = keep + __shfl_xor_sync(0xffffffffu, give, 4 * x);
                    }
                }
                const int e = lane >> 2; /* bit 2: which half first, so e = 4 b4 + 2 b3 + b2 */
                out[32 * b + 8 * (e >> 1) + 2 * (lane & 3) + (e & 1)] = v[0];
            }
            named_sync(3, W * 128);
            float z = 0;
#pragma unroll
            for (int w = 0; w < 4 * W; w++) z += part[((k & 1) * 4 * W + w) * TILE + t];
            z *= ks;
            float one = loss_point(z, y * (1.0f - 2.0f * a.smoothing) + a.smoothing, a.focal, &dz);
            dz = j < n_cand ? dz * wt : 0.0f;
            if (j < n_cand) loss += (double)(wt * one);
        }
        mine[t] = dz * ks;
        named_sync(1 + group, 128);
        uint32_t gh[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 d = *(const float2 *)(mine + 8 * i + 2 * (lane & 3));
            dwa += d.x * p[4 * i] + d.y * p[4 * i + 1];
            dwb += d.x * p[4 * i + 2] + d.y * p[4 * i + 3];
            const __half2 h = __floats2half2_rn(d.x * dp_scale, d.y * dp_scale);
            gh[i] = *(const uint32_t *)&h;
        }
        mma_wait<0>();
        if (k > 0) {
            pin(dq);
            bar_arrive(mem.empty + 8 * ((k - 1) % STAGES));
        }
#pragma unroll
        for (int i = 0; i < 16; i++) { /* keep dz where the product was positive: P's sign bit is set */
            dp[2 * i] = gh[i] & signs(p[4 * i], p[4 * i + 1]);
            dp[2 * i + 1] = gh[i] & signs(p[4 * i + 2], p[4 * i + 3]);
        }
    }
    if (n_tile > 0) {
        const uint32_t old = mem.key + (uint32_t)((n_tile - 1) % STAGES) * KTILE;
        pin(dq);
        mma_fence();
#pragma unroll
        for (int i = 0; i < 8; i++) mma_128_reg(dq, dp + 4 * i, desc_columns(old + (uint32_t)i * 2048));
        mma_commit();
        mma_wait<0>();
        pin(dq);
    }
    const float scale = *a.scale, fa = wa * scale / dp_scale, fb = wb * scale / dp_scale;
#pragma unroll
    for (int i = 0; i < 64; i++) dq[i] *= i & 2 ? fb : fa;
    hadamard(dq, lane);
    rotate(dq, a.cs + row * (a.rope_dim / 2), a.rope_dim, -1.0f, lane);
    bf16 *const out = a.dq + ((int64_t)l * a.m + row) * a.H * 128;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int c = 8 * i + 2 * (lane & 3);
        if (ra < a.H)
            *(__nv_bfloat162 *)(out + (int64_t)ra * 128 + c) =
                __floats2bfloat162_rn(dq[4 * i], dq[4 * i + 1]);
        if (rb < a.H)
            *(__nv_bfloat162 *)(out + (int64_t)rb * 128 + c) =
                __floats2bfloat162_rn(dq[4 * i + 2], dq[4 * i + 3]);
    }
#pragma unroll
    for (int x = 1; x <= 2; x *= 2) {
        dwa += __shfl_xor_sync(0xffffffffu, dwa, x);
        dwb += __shfl_xor_sync(0xffffffffu, dwb, x);
    }
    if ((lane & 3) == 0) {
        bf16 *const dw = a.dw + ((int64_t)l * a.m + row) * a.H;
        if (ra < a.H) dw[ra] = __float2bfloat16(-dwa * qs.x * scale);
        if (rb < a.H) dw[rb] = __float2bfloat16(-dwb * qs.y * scale);
    }
    if (POINTWISE && group == 0) {
        double *const slot = (double *)dzs; /* [4]; part may still be read by the other group */
        for (int x = 16; x >= 1; x /= 2) loss += __shfl_xor_sync(0xffffffffu, loss, x);
        named_sync(1, 128); /* dzs of the last tile has been read */
        if (lane == 0) slot[warp] = loss;
        named_sync(1, 128);
        if (t == 0)
            a.row_loss[(int64_t)l * a.m + row] = (slot[0] + slot[1] + slot[2] + slot[3]) * (double)scale;
    }
#else
    (void)a;
    __trap();
#endif
}

/* ---- forward ---- */

template <int HP> struct z_memory { /* HP: heads padded to 64 or 128 */
    enum {
        key = HP * 256,
        raw = key + STAGES * KTILE,
        key_scale = raw + RAW * RAWTILE,
        raw_scale = key_scale + STAGES * TILE * 4,
        weight = raw_scale + RAW * TILE * 4,
        bars = weight + HP * 4,
        bytes = bars + 16 * STAGES + 1024
    };
};

template <int HP> static __global__ void __launch_bounds__(512, 1) z_k(const __grid_constant__ score_args a) {
#ifdef LSA_WGMMA
    extern __shared__ uint8_t dynamic[];
    uint8_t *const base = (uint8_t *)(((uintptr_t)dynamic + 1023) & ~(uintptr_t)1023);
    const uint32_t at = smem_at(base);
    const tile_memory mem = {at + z_memory<HP>::key,       at + z_memory<HP>::raw,
                             at + z_memory<HP>::key_scale, at + z_memory<HP>::raw_scale,
                             at + z_memory<HP>::bars,      at + z_memory<HP>::bars + 8 * STAGES};
    const int tid = threadIdx.x, group = tid >> 7, t = tid & 127, lane = tid & 31, warp = t >> 5;
    const int64_t row = blockIdx.x;
    const int l = blockIdx.y, n_cand = a.n_cand[row], n_tile = (n_cand + TILE - 1) / TILE;
    const int t0 = (int)((int64_t)n_tile * blockIdx.z / gridDim.z),
              t1 = (int)((int64_t)n_tile * (blockIdx.z + 1) / gridDim.z);
    if (t0 == t1) return;
    if (tid == 0)
        for (int s = 0; s < STAGES; s++) {
            bar_init(mem.full + 8 * s, PRODUCERS);
            bar_init(mem.empty + 8 * s, 256);
        }
    __syncthreads();
    if (group >= 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(88));
        const step_row r = a.where[row];
        produce(mem, r.key + (int64_t)l * r.n_key * 128, r.scale + (int64_t)l * r.n_key,
                a.cand ? a.cand + row * a.n : nullptr, n_cand, t0, t1, tid - 256);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(168));
    float *const weight = (float *)(base + z_memory<HP>::weight);
    const float *const key_scale = (const float *)(base + z_memory<HP>::key_scale);
    if (group * 64 < HP) {
        const int ra = group * 64 + warp * 16 + (lane >> 2), rb = ra + 8;
        const float2 qs =
            load_query(at + (uint32_t)(group * 64 * 128), HP * 128, a, row, l, group * 64, warp, lane);
        const float *const wrow = a.w + ((int64_t)l * a.m + row) * a.H;
        if ((lane & 3) == 0) {
            weight[ra] = ra < a.H ? -wrow[ra] * qs.x : 0.0f;
            weight[rb] = rb < a.H ? -wrow[rb] * qs.y : 0.0f;
        }
    }
    proxy_fence();
    named_sync(3, 256);
    float p[HP / 2];
    float *const out = a.z + ((int64_t)l * a.m + row) * a.n;
    for (int k = 0; k < t1 - t0; k++) {
        const int s = k % STAGES;
        bar_wait(mem.full + 8 * s, (uint32_t)(k / STAGES & 1));
        const uint32_t key = mem.key + (uint32_t)s * KTILE + group * 64 * 128;
        const int ja = warp * 16 + (lane >> 2);
        const float ka = key_scale[s * TILE + group * 64 + ja],
                    kb = key_scale[s * TILE + group * 64 + ja + 8];
        pin(p);
        mma_fence();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint64_t da = desc_rows(key + (uint32_t)(i >> 2) * HALF + (i & 3) * 32),
                           db = desc_rows(at + (uint32_t)(i >> 2) * (HP * 128) + (i & 3) * 32);
            if constexpr (HP == 128)
                mma_128(p, da, db, i > 0);
            else
                mma_64(p, da, db, i > 0);
        }
        mma_commit();
        mma_wait<0>();
        pin(p);
        bar_arrive(mem.empty + 8 * s);
        float za = 0, zb = 0;
#pragma unroll
        for (int i = 0; i < HP / 8; i++) {
            const float2 w = *(const float2 *)(weight + 8 * i + 2 * (lane & 3));
            za += w.x * below_zero(p[4 * i]) + w.y * below_zero(p[4 * i + 1]);
            zb += w.x * below_zero(p[4 * i + 2]) + w.y * below_zero(p[4 * i + 3]);
        }
#pragma unroll
        for (int x = 1; x <= 2; x *= 2) {
            za += __shfl_xor_sync(0xffffffffu, za, x);
            zb += __shfl_xor_sync(0xffffffffu, zb, x);
        }
        const int j = (t0 + k) * TILE + group * 64 + ja;
        if ((lane & 3) == 0) {
            if (j < n_cand) out[j] = za * ka;
            if (j + 8 < n_cand) out[j + 8] = zb * kb;
        }
    }
#else
    (void)a;
    __trap();
#endif
}

/* ---- launches ---- */

template <typename K>
static lsa_status launch(K *kernel, dim3 grid, int threads, int bytes, cudaStream_t stream,
                         const score_args &a, lsa_err *err) {
    LSA_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid, threads, bytes, stream>>>(a);
    LSA_LAUNCHED("score");
}

lsa_status score_z_sm90(lsa_gpu_step *s, const score_args *a, int splits, lsa_err *err) {
    const dim3 grid((unsigned)a->rows, (unsigned)a->L, (unsigned)splits);
    return a->H > 64 ? launch(z_k<128>, grid, 512, z_memory<128>::bytes, s->cs->stream, *a, err)
                     : launch(z_k<64>, grid, 512, z_memory<64>::bytes, s->cs->stream, *a, err);
}

lsa_status score_grad_sm90(lsa_gpu_step *s, const score_args *a, bool pointwise, lsa_err *err) {
    const dim3 grid((unsigned)a->rows, (unsigned)a->L);
    cudaStream_t st = s->cs->stream;
    if (a->H > 64)
        return pointwise ? launch(grad_k<2, true>, grid, 512, grad_memory<2>::bytes, st, *a, err)
                         : launch(grad_k<2, false>, grid, 512, grad_memory<2>::bytes, st, *a, err);
    return pointwise ? launch(grad_k<1, true>, grid, 384, grad_memory<1>::bytes, st, *a, err)
                     : launch(grad_k<1, false>, grid, 384, grad_memory<1>::bytes, st, *a, err);
}
