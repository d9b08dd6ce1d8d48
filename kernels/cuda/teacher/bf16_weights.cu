/* Stored weights to what the bf16 tier computes with, without loss: a code of FP8 or FP4 times a power of two
 * has few bits. A thread takes 16 stored bytes: they share one scale. */
#include <string.h>

#include "kernels/cuda/teacher/bf16_weights.h"
#include "kernels/cuda/teacher/stored.cuh"

enum { THREADS = TEACHER_THREADS };

struct decode_args {
    const unsigned char *values, *scales;
    void *out;
    int64_t n, cols;
};

/* cols a multiple of 16 (FP8) or 32 (FP4): so are a row's bytes. */
static __global__ void __launch_bounds__(THREADS) decode_e4m3_k(const __grid_constant__ decode_args a) {
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 16; i < a.n;
         i += (int64_t)gridDim.x * THREADS * 16) {
        const int64_t row = i / a.cols, col = i % a.cols;
        const float scale = of_e8m0(a.scales[row / 128 * ((a.cols + 127) / 128) + col / 128]);
        const uint4 u = *(const uint4 *)(a.values + i);
        const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float v[8];
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = of_e4m3(w[2 * k + j / 4] >> (j % 4 * 8) & 255u) * scale;
            bf16_write8((uint16_t *)a.out + i + 8 * k, v);
        }
    }
}
static __global__ void __launch_bounds__(THREADS) decode_e2m1_k(const __grid_constant__ decode_args a) {
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 32; i < a.n;
         i += (int64_t)gridDim.x * THREADS * 32) {
        const float scale = of_e8m0(a.scales[i / 32]);
        const uint4 u = *(const uint4 *)(a.values + i / 2);
        const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float v[8];
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = of_e2m1(w[k] >> (4 * j) & 15u) * scale;
            bf16_write8((uint16_t *)a.out + i + 8 * k, v);
        }
    }
}
/* bf16 to f32, f32 to f32, f32 to three bf16 matrices. */
static __global__ void __launch_bounds__(THREADS) widen_k(const __grid_constant__ decode_args a) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.n; i += (int64_t)gridDim.x * THREADS)
        ((float *)a.out)[i] = bf16_value(((const uint16_t *)a.values)[i]);
}
static __global__ void __launch_bounds__(THREADS) parts_k(const __grid_constant__ decode_args a) {
    uint16_t *const out = (uint16_t *)a.out;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.n;
         i += (int64_t)gridDim.x * THREADS) {
        float left = ((const float *)a.values)[i];
        for (int k = 0; k < 3; k++) {
            out[k * a.n + i] = bf16_of(left);
            left -= bf16_value(out[k * a.n + i]);
        }
    }
}

/* ---- made-up weights ---- */

static __device__ __forceinline__ uint32_t hash(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}
static __device__ __forceinline__ float uniform(uint32_t h) { /* [-1, 1) */
    return (float)(h >> 8) * 0x1p-23f - 1.0f;
}

struct invent_args {
    unsigned char *values, *scales;
    int64_t n, scales_n;
    int type, below; /* below: of I64 */
    uint32_t seed, scale;
    float mean, spread;
};

static __global__ void __launch_bounds__(THREADS) invent_k(const __grid_constant__ invent_args a) {
    const int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = first; i < a.scales_n; i += step)
        a.scales[i] = (unsigned char)(a.scale + (hash((uint32_t)i ^ ~a.seed) & 1u));
    for (int64_t i = first; i < a.n; i += step) {
        const uint32_t h = hash((uint32_t)i * 0x9e3779b9u ^ (uint32_t)(i >> 32) ^ a.seed);
        switch (a.type) {
        case LSA_GPU_E2M1: /* 4 bytes at once */
            ((uint32_t *)a.values)[i] = h;
            break;
        case LSA_GPU_E4M3: /* 4 codes below 2: no NaN */
            ((uint32_t *)a.values)[i] = h & ~0x40404040u;
            break;
        case LSA_GPU_I64:
            ((int64_t *)a.values)[i] = h % (uint32_t)a.below;
            break;
        case LSA_GPU_BF16:
            ((uint16_t *)a.values)[i] = bf16_of(a.mean + a.spread * uniform(h));
            break;
        default:
            ((float *)a.values)[i] = a.mean + a.spread * uniform(h);
        }
    }
}

/* ---- what a layer consists of ---- */

static int64_t room(int64_t *at, int64_t bytes) {
    const int64_t r = *at;
    *at += (bytes + 255) / 256 * 256;
    return r;
}
static int64_t value_bytes(lsa_gpu_stored type, int64_t n) {
    return type == LSA_GPU_I64    ? 8 * n
           : type == LSA_GPU_F32  ? 4 * n
           : type == LSA_GPU_E4M3 ? n
           : type == LSA_GPU_E2M1 ? n / 2
                                  : 2 * n;
}
static int64_t scale_count(const lsa_gpu_tensor *t) {
    return t->type == LSA_GPU_E4M3   ? (t->rows + 127) / 128 * ((t->cols + 127) / 128)
           : t->type == LSA_GPU_E2M1 ? t->rows * (t->cols / 32)
                                     : 0;
}

struct builder {
    bf16_layout *o;
    char *base;
    bool full;
};

/* One stored tensor whose numbers go to `to`. */
static void put(builder *b, void *to, lsa_gpu_stored type, bf16_form form, int64_t rows, int64_t cols,
                float mean, float spread) {
    bf16_layout *const o = b->o;
    if (o->n == BF16_TENSORS) {
        b->full = true;
        return;
    }
    bf16_tensor *const t = &o->tensor[o->n++];
    *t = {};
    t->t.type = type;
    t->t.rows = rows, t->t.cols = cols;
    t->t.at = room(&o->stored, value_bytes(type, rows * cols));
    t->t.scale_at = room(&o->stored, scale_count(&t->t));
    t->t.dst = to;
    t->form = form;
    t->mean = mean, t->spread = spread;
}
static uint16_t *matrix(builder *b, int64_t rows, int64_t cols) {
    return (uint16_t *)(b->base + room(&b->o->arena, rows * cols * 2));
}
static const float *vector(builder *b, lsa_gpu_stored type, int64_t rows, int64_t cols, float mean,
                           float spread) {
    float *const to = (float *)(b->base + room(&b->o->arena, rows * cols * 4));
    put(b, to, type, FORM_F32, rows, cols, mean, spread);
    return to;
}
/* Weights of a product of K terms: results about as large as inputs. */
static void weights(builder *b, uint16_t *to, lsa_gpu_stored type, int64_t rows, int64_t cols) {
    put(b, to, type, FORM_BF16, rows, cols, 0, 1.7f / sqrtf((float)cols));
}
static const uint16_t *parts(builder *b, int64_t rows, int64_t cols) {
    uint16_t *const to = matrix(b, 3 * rows, cols);
    put(b, to, LSA_GPU_F32, FORM_PARTS, rows, cols, 0, 1.7f / sqrtf((float)cols));
    return to;
}

lsa_status bf16_layout_make(bf16_layout *o, const lsa_gpu_teacher_geom *g, int ratio, int roles, bool hashed,
                            char *base, lsa_err *err) {
    memset(o, 0, sizeof *o);
    builder made = {o, base, false}, *const b = &made;
    lsa_bf16_weights *const w = &o->w;
    const int64_t d = g->hidden, s = g->hc_mult, nz = s * (s + 2), D = g->head_dim, Di = g->index_head_dim,
                  Hi = g->index_n_head, HD = g->n_head * D, M = g->moe_dim, E = g->n_expert,
                  GR = (int64_t)g->o_groups * g->o_rank, c = roles * D;
    const bool csa = roles == 2;
    w->ratio = ratio, w->roles = ratio ? roles : 0;
    w->attn_fn = parts(b, nz, s * d);
    w->ffn_fn = parts(b, nz, s * d);
    w->attn_base = vector(b, LSA_GPU_F32, 1, nz, 0, 0.5f);
    w->ffn_base = vector(b, LSA_GPU_F32, 1, nz, 0, 0.5f);
    w->attn_scale = vector(b, LSA_GPU_F32, 1, 3, 0.5f, 0);
    w->ffn_scale = vector(b, LSA_GPU_F32, 1, 3, 0.5f, 0);
    w->attn_norm = vector(b, LSA_GPU_BF16, 1, d, 1, 0.1f);
    w->ffn_norm = vector(b, LSA_GPU_BF16, 1, d, 1, 0.1f);
    w->q_norm = vector(b, LSA_GPU_BF16, 1, g->q_rank, 1, 0.1f);
    w->kv_norm = vector(b, LSA_GPU_BF16, 1, D, 1, 0.1f);
    w->sink = vector(b, LSA_GPU_F32, 1, g->n_head, 0, 1);
    w->at_kv = g->q_rank;
    w->at_cv = ratio ? w->at_kv + (int32_t)D : -1;
    w->at_cg = ratio ? w->at_cv + (int32_t)c : -1;
    w->at_iv = csa ? w->at_cg + (int32_t)c : -1;
    w->at_ig = csa ? w->at_iv + 2 * (int32_t)Di : -1;
    w->at_iw = csa ? w->at_ig + 2 * (int32_t)Di : -1;
    w->nx = (int32_t)(g->q_rank + D + (ratio ? 2 * c : 0) + (csa ? 4 * Di + Hi : 0));
    uint16_t *const wx = matrix(b, w->nx, d);
    w->wx = wx;
    weights(b, wx, LSA_GPU_E4M3, g->q_rank, d);
    weights(b, wx + w->at_kv * d, LSA_GPU_E4M3, D, d);
    if (ratio) {
        weights(b, wx + w->at_cv * d, LSA_GPU_BF16, c, d);
        weights(b, wx + w->at_cg * d, LSA_GPU_BF16, c, d);
        w->ape = vector(b, LSA_GPU_F32, ratio, c, 0, 1);
        w->comp_norm = vector(b, LSA_GPU_BF16, 1, D, 1, 0.1f);
    }
    if (csa) {
        weights(b, wx + w->at_iv * d, LSA_GPU_BF16, 2 * Di, d);
        weights(b, wx + w->at_ig * d, LSA_GPU_BF16, 2 * Di, d);
        weights(b, wx + w->at_iw * d, LSA_GPU_BF16, Hi, d);
        w->iape = vector(b, LSA_GPU_F32, 4, 2 * Di, 0, 1);
        w->icomp_norm = vector(b, LSA_GPU_BF16, 1, Di, 1, 0.1f);
    }
    uint16_t *const wq = matrix(b, HD + (csa ? Hi * Di : 0), g->q_rank);
    w->wq = wq;
    weights(b, wq, LSA_GPU_E4M3, HD, g->q_rank);
    if (csa) weights(b, wq + HD * g->q_rank, LSA_GPU_E4M3, Hi * Di, g->q_rank);
    uint16_t *const wo_a = matrix(b, GR, HD / g->o_groups), *const wo_b = matrix(b, d, GR),
                    *const gate = matrix(b, E, d), *const w13 = matrix(b, (E + 1) * 2 * M, d),
                    *const w2 = matrix(b, (E + 1) * d, M);
    w->wo_a = wo_a, w->wo_b = wo_b, w->gate = gate, w->w13 = w13, w->w2 = w2;
    weights(b, wo_a, LSA_GPU_E4M3, GR, HD / g->o_groups);
    weights(b, wo_b, LSA_GPU_E4M3, d, GR);
    weights(b, gate, LSA_GPU_BF16, E, d);
    if (hashed) {
        int64_t *const ids = (int64_t *)(base + room(&o->arena, (int64_t)g->vocab * g->n_expert_tok *
                                                                    (int64_t)sizeof(int64_t)));
        w->tid2eid = ids;
        put(b, ids, LSA_GPU_I64, FORM_I64, g->vocab, g->n_expert_tok, 0, (float)E);
    } else {
        w->gate_bias = vector(b, LSA_GPU_F32, 1, E, 0, 0.02f);
    }
    for (int64_t e = 0; e <= E; e++) {
        const lsa_gpu_stored type = e < E ? LSA_GPU_E2M1 : LSA_GPU_E4M3;
        weights(b, w13 + e * 2 * M * d, type, M, d);
        weights(b, w13 + (e * 2 + 1) * M * d, type, M, d);
        weights(b, w2 + e * d * M, type, d, M);
    }
    if (made.full)
        LSA_RET_FAIL(LSA_E_CONFIG, "a layer of %d experts has more than %d tensors", g->n_expert,
                     BF16_TENSORS);
    return LSA_OK;
}

static unsigned blocks_for(int64_t n) {
    const int64_t blocks = (n + THREADS - 1) / THREADS;
    return (unsigned)(blocks < 8192 ? blocks : 8192);
}

lsa_status bf16_layout_invent(const bf16_layout *o, char *stored, uint32_t seed, cudaStream_t s,
                              lsa_err *err) {
    for (int i = 0; i < o->n; i++) {
        const bf16_tensor *const t = &o->tensor[i];
        const int64_t n = t->t.rows * t->t.cols, scales = scale_count(&t->t);
        /* rms of random codes: about 3 of E2M1; about 0.6 of the E4M3 codes below 2 that are drawn */
        const float rms = t->t.type == LSA_GPU_E2M1 ? 3.0f : 0.6f;
        const uint32_t scale = (uint32_t)(127 + (int)floorf(log2f(t->spread / 1.7f / rms)));
        const invent_args a = {(unsigned char *)stored + t->t.at,
                               (unsigned char *)stored + t->t.scale_at,
                               t->t.type == LSA_GPU_E2M1   ? n / 8
                               : t->t.type == LSA_GPU_E4M3 ? n / 4
                                                           : n,
                               scales,
                               (int)t->t.type,
                               (int)t->spread,
                               seed * 0x01000193u + (uint32_t)i,
                               scale,
                               t->mean,
                               t->spread};
        invent_k<<<blocks_for(a.n), THREADS, 0, s>>>(a);
    }
    LSA_LAUNCHED("made-up weights");
}

lsa_status bf16_layout_decode(const bf16_layout *o, const char *stored, cudaStream_t s, lsa_err *err) {
    for (int i = 0; i < o->n; i++) {
        const bf16_tensor *const t = &o->tensor[i];
        const int64_t n = t->t.rows * t->t.cols;
        const decode_args a = {(const unsigned char *)stored + t->t.at,
                               (const unsigned char *)stored + t->t.scale_at, t->t.dst, n, t->t.cols};
        if (t->form == FORM_PARTS)
            parts_k<<<blocks_for(n), THREADS, 0, s>>>(a);
        else if (t->t.type == LSA_GPU_E2M1)
            decode_e2m1_k<<<blocks_for(n / 32), THREADS, 0, s>>>(a);
        else if (t->t.type == LSA_GPU_E4M3)
            decode_e4m3_k<<<blocks_for(n / 16), THREADS, 0, s>>>(a);
        else if (t->form == FORM_F32 && t->t.type == LSA_GPU_BF16)
            widen_k<<<blocks_for(n), THREADS, 0, s>>>(a);
        else /* as stored */
            LSA_CUDA(cudaMemcpyAsync(t->t.dst, stored + t->t.at, (size_t)value_bytes(t->t.type, n),
                                     cudaMemcpyDeviceToDevice, s));
    }
    LSA_LAUNCHED("decoding of weights");
}
