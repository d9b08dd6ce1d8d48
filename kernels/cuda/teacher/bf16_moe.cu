/* Mixture of experts of the bf16 tier (architecture notes 9): router, tokens sorted by expert, two products
 * an expert on several streams, SwiGLU between them. The sum over a token's experts is in bf16_streams.cu.
 *
 * An expert's rows begin at multiples of BF16_ALIGN and are padded with zeros: cuBLASLt then sees few shapes,
 * so its choices can be kept, and its tiles are no emptier than they would be. The host waits once, for
 * `begin`. */
#include "kernels/cuda/teacher/bf16_state.h"

enum { THREADS = TEACHER_THREADS, MOST_EXPERTS = 512 };
#include "kernels/cuda/teacher/by_expert.cuh"

struct route_args {
    const float *score, *bias; /* [m, E] */
    const int64_t *tid2eid;
    const int32_t *token;
    float *weight;
    int32_t *expert;
    int64_t m;
    int E, k;
    float scale;
};

static __device__ float score_of(float z) {
    return sqrtf(z > 20.0f ? z : log1pf(expf(z)));
}

/* A warp a token: every lane holds E / 32 scores; the highest is chosen k times, ties to the lower expert. */
static __global__ void __launch_bounds__(THREADS) bf16_route_k(const __grid_constant__ route_args a) {
    const int64_t t = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x & 31;
    if (t >= a.m) return;
    const float *const z = a.score + t * a.E;
    float s[MOST_EXPERTS / 32];
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / 32; i++) {
        const int e = lane + 32 * i;
        s[i] = e < a.E && !a.tid2eid ? score_of(z[e]) + (a.bias ? a.bias[e] : 0.0f) : -INFINITY;
    }
    int32_t mine = -1; /* of lane j: the j-th choice */
    for (int j = 0; j < a.k; j++) {
        int32_t id = -1;
        if (a.tid2eid) {
            id = (int32_t)a.tid2eid[(int64_t)a.token[t] * a.k + j];
        } else {
            float most = -INFINITY;
#pragma unroll
            for (int i = 0; i < MOST_EXPERTS / 32; i++)
                if (s[i] > most) most = s[i], id = lane + 32 * i;
            for (int o = 16; o >= 1; o /= 2) {
                const float other = __shfl_xor_sync(0xffffffffu, most, o);
                const int32_t other_id = __shfl_xor_sync(0xffffffffu, id, o);
                if (other > most || (other == most && other_id >= 0 && (id < 0 || other_id < id)))
                    most = other, id = other_id;
            }
            if (id < 0) id = j; /* nothing compares: NaN */
#pragma unroll
            for (int i = 0; i < MOST_EXPERTS / 32; i++)
                if (id == lane + 32 * i) s[i] = -INFINITY;
        }
        if (lane == j) mine = id;
    }
    float w = lane < a.k ? score_of(z[mine]) : 0.0f, sum = 0;
    for (int j = 0; j < a.k; j++) sum += __shfl_sync(0xffffffffu, w, j);
    w = w / sum * a.scale;
    /* ascending by expert; an expert named twice gets both weights, its other place is empty */
    int rank = 0;
    float all = 0;
    bool later = false;
    for (int j = 0; j < a.k; j++) {
        const int32_t id = __shfl_sync(0xffffffffu, mine, j);
        const float v = __shfl_sync(0xffffffffu, w, j);
        if (lane >= a.k) continue;
        rank += id < mine || (id == mine && j < lane);
        if (id == mine) all += v, later = later || j > lane;
    }
    if (lane >= a.k) return;
    a.expert[t * a.k + rank] = later ? -1 : mine;
    a.weight[t * a.k + rank] = later ? 0.0f : all;
}

/* begin[e]: first row of expert e, a multiple of BF16_ALIGN; begin[E]: all rows. One block. */
static __global__ void __launch_bounds__(THREADS)
    bf16_count_k(const int32_t *expert, int64_t n, int E, int32_t *begin) {
    __shared__ int32_t count[MOST_EXPERTS];
    for (int e = threadIdx.x; e < E; e += THREADS) count[e] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += THREADS)
        if (expert[i] >= 0) atomicAdd(&count[expert[i]], 1);
    __syncthreads();
    if (threadIdx.x) return;
    int32_t at = 0;
    for (int e = 0; e < E; e++) {
        begin[e] = at;
        at += (count[e] + BF16_ALIGN - 1) / BF16_ALIGN * BF16_ALIGN;
    }
    begin[E] = at;
}

/* A block an expert: its entries (token k + choice) in the order of the tokens, then -1 up to the next
 * expert. */
static __global__ void __launch_bounds__(THREADS)
    bf16_sort_k(const int32_t *expert, int64_t n, const int32_t *begin, int32_t *list, int32_t *place) {
    const int e = blockIdx.x;
    const int32_t end = begin[e + 1];
    if (end == begin[e]) return;
    const int32_t at = place_entries(expert, n, e, begin[e], list, place);
    for (int32_t i = at + (int32_t)threadIdx.x; i < end; i += THREADS) list[i] = -1;
}

/* A block a row of the list; rows beyond the last expert's are left. */
static __global__ void __launch_bounds__(THREADS)
    bf16_gather_k(const uint16_t *x, const int32_t *list, const int32_t *end, int k, int d, uint16_t *out) {
    const int64_t r = blockIdx.x;
    if (r >= *end) return;
    const int32_t entry = list[r];
    const uint4 none = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < d / 8; i += THREADS)
        ((uint4 *)(out + r * d))[i] = entry < 0 ? none : ((const uint4 *)(x + (int64_t)(entry / k) * d))[i];
}

/* h [n, M] = weight silu(min(g, limit)) clamp(u) of rows [2 M]; list NULL: weight 1. */
static __global__ void __launch_bounds__(THREADS)
    bf16_swiglu_k(const uint16_t *h13, const int32_t *list, const float *weight, int64_t n, int M,
                  float limit, uint16_t *h) {
    const int64_t all = n * (M / 8);
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < all;
         i += (int64_t)gridDim.x * THREADS) {
        const int64_t r = i / (M / 8), c = i % (M / 8) * 8;
        const int32_t entry = list ? list[r] : 0;
        const float w = list ? entry < 0 ? 0.0f : weight[entry] : 1.0f;
        float g[8], u[8];
        bf16_read8(g, h13 + r * 2 * M + c);
        bf16_read8(u, h13 + r * 2 * M + M + c);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float x = fminf(g[k], limit), y = fminf(fmaxf(u[k], -limit), limit);
            u[k] = w * (x / (1.0f + __expf(-x)) * y);
        }
        bf16_write8(h + r * M + c, u);
    }
}

/* Rows [at, at + n) of xe through an expert's two products. */
static lsa_status expert(lsa_bf16 *b, const lsa_bf16_weights *w, int lane, int64_t e, const uint16_t *x,
                         int64_t at, int64_t n, const int32_t *list, uint16_t *y, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t d = b->g.hidden, M = b->g.moe_dim, blocks = (n * (M / 8) + THREADS - 1) / THREADS;
    const float limit = b->g.swiglu_limit > 0.0f ? b->g.swiglu_limit : INFINITY;
    uint16_t *const h13 = b->h13 + at * 2 * M, *const act = b->act + at * M;
    const bf16_product up = {n, 2 * M, d, x, w->w13 + e * 2 * M * d, d, d, h13, 2 * M, false},
                       down = {n, d, M, act, w->w2 + e * d * M, M, M, y, d, false};
    LSA_TRY(bf16_gemm(b, lane, &up, err));
    bf16_swiglu_k<<<(unsigned)(blocks < 2048 ? blocks : 2048), THREADS, 0, b->lane[lane]>>>(
        h13, list, b->weight, n, (int)M, limit, act);
    LSA_CUDA(cudaGetLastError());
    LSA_TRY(bf16_gemm(b, lane, &down, err));
done:
    return st;
}

lsa_status bf16_moe(lsa_bf16 *b, const lsa_bf16_weights *w, const int32_t *token, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &b->g;
    const cudaStream_t s = b->cs->stream;
    const int64_t d = g->hidden, E = g->n_expert, k = g->n_expert_tok, n = m * k;
    const bf16_product route = {m, E, d, b->x, w->gate, d, d, b->route, E, true};
    LSA_TRY(bf16_gemm(b, 0, &route, err));
    {
        const route_args a = {b->route, w->gate_bias, w->tid2eid, token,         b->weight, b->expert,
                              m,        (int)E,       (int)k,     g->route_scale};
        bf16_route_k<<<(unsigned)((m + THREADS / 32 - 1) / (THREADS / 32)), THREADS, 0, s>>>(a);
        bf16_count_k<<<1, THREADS, 0, s>>>(b->expert, n, (int)E, b->begin);
        LSA_CUDA(cudaMemcpyAsync(b->host_begin, b->begin, (size_t)(E + 1) * sizeof(int32_t),
                                 cudaMemcpyDeviceToHost, s));
        LSA_CUDA(cudaEventRecord(b->counted, s));
        bf16_sort_k<<<(unsigned)E, THREADS, 0, s>>>(b->expert, n, b->begin, b->list, b->place);
        bf16_gather_k<<<(unsigned)(n + E * BF16_ALIGN), THREADS, 0, s>>>(b->x, b->list, b->begin + E, (int)k,
                                                                         (int)d, b->xe);
        LSA_CUDA(cudaGetLastError());
    }
    LSA_CUDA(cudaEventRecord(b->fork, s));
    for (int i = 1; i < BF16_LANES; i++) LSA_CUDA(cudaStreamWaitEvent(b->lane[i], b->fork, 0));
    LSA_TRY(expert(b, w, 0, E, b->x, b->rows, m, NULL, b->ys, err)); /* the shared one */
    LSA_CUDA(cudaEventSynchronize(b->counted));
    for (int64_t e = 0; e < E; e++) {
        const int64_t at = b->host_begin[e], rows = b->host_begin[e + 1] - at;
        if (rows > 0)
            LSA_TRY(expert(b, w, (int)((e + 1) % BF16_LANES), e, b->xe + at * d, at, rows, b->list + at,
                           b->ye + at * d, err));
    }
    for (int i = 1; i < BF16_LANES; i++) {
        LSA_CUDA(cudaEventRecord(b->joined[i], b->lane[i]));
        LSA_CUDA(cudaStreamWaitEvent(s, b->joined[i], 0));
    }
done:
    return st;
}
