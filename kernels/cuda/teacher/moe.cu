/* Mixture of experts (architecture notes 9): router, tokens sorted by expert, two grouped products, and the
 * sum of a token's experts in ascending id, then the shared expert.
 *
 * The routing weight is applied before w2, and the clamp is one-sided for the gate and two-sided for the up
 * projection. A hash table may name one expert twice: its weights add up. */
#include "kernels/cuda/teacher/teacher_state.h"

enum { THREADS = TEACHER_THREADS, ROWS = 64, COLS = 64, DEPTH = 16 };
#include "kernels/cuda/teacher/by_expert.cuh"

struct route_args {
    const float *score, *bias;
    const int64_t *tid2eid;
    const int32_t *token;
    float *weight;
    int32_t *expert;
    int E, k;
    float scale;
};

/* A thread a token: few experts are chosen, one after the other. */
static __global__ void __launch_bounds__(THREADS) route_k(const __grid_constant__ route_args a, int64_t m) {
    const int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (t >= m) return;
    const float *const z = a.score + t * a.E;
    int32_t *const id = a.expert + t * a.k;
    float *const w = a.weight + t * a.k;
    const auto score = [&](int e) { return sqrtf(z[e] > 20.0f ? z[e] : log1pf(expf(z[e]))); };
    for (int i = 0; i < a.k; i++) {
        if (a.tid2eid) {
            id[i] = (int32_t)a.tid2eid[(int64_t)a.token[t] * a.k + i];
            continue;
        }
        int best = -1;
        float most = 0;
        for (int e = 0; e < a.E; e++) {
            bool used = false;
            for (int j = 0; j < i; j++) used = used || id[j] == e;
            const float s = used ? 0 : score(e) + (a.bias ? a.bias[e] : 0.0f);
            if (!used && (best < 0 || s > most)) best = e, most = s;
        }
        id[i] = best;
    }
    float sum = 0;
    for (int i = 0; i < a.k; i++) sum += w[i] = score(id[i]);
    for (int i = 0; i < a.k; i++) w[i] = w[i] / sum * a.scale;
    for (int i = 1; i < a.k; i++) /* ascending, weights with them */
        for (int j = i; j > 0 && id[j] < id[j - 1]; j--) {
            const int32_t e = id[j];
            const float v = w[j];
            id[j] = id[j - 1], w[j] = w[j - 1];
            id[j - 1] = e, w[j - 1] = v;
        }
    for (int i = 1; i < a.k; i++)
        if (id[i] == id[i - 1]) { /* one row with both weights; the other place is empty */
            w[i] += w[i - 1];
            id[i - 1] = -1;
        }
}

/* begin[e]: entries of experts below e. One block. */
static __global__ void __launch_bounds__(THREADS)
    count_k(const int32_t *expert, int64_t n, int E, int32_t *begin) {
    extern __shared__ int32_t count[];
    for (int e = threadIdx.x; e <= E; e += THREADS) count[e] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += THREADS)
        if (expert[i] >= 0) atomicAdd(&count[expert[i] + 1], 1);
    __syncthreads();
    if (threadIdx.x == 0)
        for (int e = 0; e < E; e++) count[e + 1] += count[e];
    __syncthreads();
    for (int e = threadIdx.x; e <= E; e += THREADS) begin[e] = count[e];
}

/* A block an expert: its entries in the order of the tokens. list: number of the entry (token * k + choice).
 */
static __global__ void __launch_bounds__(THREADS)
    sort_k(const int32_t *expert, int64_t n, const int32_t *begin, int32_t *list, int32_t *place) {
    const int e = blockIdx.x;
    if (begin[e + 1] > begin[e]) place_entries(expert, n, e, begin[e], list, place);
}

struct expert_args {
    const float *in, *w, *weight; /* in: x [m, K] by token, or [entries, K] */
    const int32_t *begin, *list;
    float *out; /* [entries, N] */
    int64_t K, N, expert_stride;
    int k; /* up: entry / k is the token */
    float limit;
};

/* Rows of one expert, 64 at a time (grid.x: tiles of 64 columns, grid.y: tiles of 64 rows, grid.z: expert).
 * up: weight * silu(min(g, limit)) * clamp(u) from w1 and w3; else plain rows. A thread has 4 rows x 4
 * columns. */
template <bool UP>
static __global__ void __launch_bounds__(THREADS) expert_k(const __grid_constant__ expert_args a) {
    __shared__ float x[DEPTH][ROWS + 1], u[DEPTH][COLS + 1], v[UP ? DEPTH : 1][COLS + 1];
    const int e = blockIdx.z, r0 = a.begin[e] + blockIdx.y * ROWS, n = a.begin[e + 1] - r0,
              tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const int64_t c0 = (int64_t)blockIdx.x * COLS;
    if (n <= 0) return;
    const float *const w = a.w + e * a.expert_stride;
    float s[4][4] = {}, s2[4][4] = {};
    for (int64_t k0 = 0; k0 < a.K; k0 += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * DEPTH; i += THREADS) {
            const int r = i / DEPTH, c = i % DEPTH;
            const int64_t row = r < n ? UP ? a.list[r0 + r] / a.k : r0 + r : -1;
            x[c][r] = row >= 0 && k0 + c < a.K ? a.in[row * a.K + k0 + c] : 0.0f;
        }
        for (int i = threadIdx.x; i < COLS * DEPTH; i += THREADS) {
            const int j = i / DEPTH, c = i % DEPTH;
            const bool in = c0 + j < a.N && k0 + c < a.K;
            u[c][j] = in ? w[(c0 + j) * a.K + k0 + c] : 0.0f;
            if (UP) v[UP ? c : 0][j] = in ? w[(a.N + c0 + j) * a.K + k0 + c] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < DEPTH; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    s[i][j] += x[c][ty + 16 * i] * u[c][tx + 16 * j];
                    if (UP) s2[i][j] += x[c][ty + 16 * i] * v[UP ? c : 0][tx + 16 * j];
                }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            const int r = ty + 16 * i;
            const int64_t c = c0 + tx + 16 * j;
            if (r >= n || c >= a.N) continue;
            float out = s[i][j];
            if (UP) {
                const float g = fminf(out, a.limit), up = fminf(fmaxf(s2[i][j], -a.limit), a.limit);
                out = a.weight[a.list[r0 + r]] * (g / (1.0f + expf(-g)) * up);
            }
            a.out[(int64_t)(r0 + r) * a.N + c] = out;
        }
}

/* y [m, d]: the experts of a token in ascending id. */
static __global__ void __launch_bounds__(THREADS)
    combine_k(const float *ye, const int32_t *expert, const int32_t *place, int k, int64_t d, float *y) {
    const int64_t t = blockIdx.x;
    for (int64_t i = threadIdx.x; i < d; i += THREADS) {
        float s = 0;
        for (int j = 0; j < k; j++)
            if (expert[t * k + j] >= 0) s += ye[(int64_t)place[t * k + j] * d + i];
        y[t * d + i] = s;
    }
}

/* The shared expert between its products: h = silu(min(g, limit)) * clamp(u) of rows [2M]. */
static __global__ void __launch_bounds__(THREADS)
    shared_k(const float *h13, int64_t n, int64_t M, float limit, float *h) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        const float *const p = h13 + i / M * 2 * M + i % M;
        const float g = fminf(p[0], limit), u = fminf(fmaxf(p[M], -limit), limit);
        h[i] = g / (1.0f + expf(-g)) * u;
    }
}

lsa_status teacher_moe(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &t->g;
    const lsa_gpu_layer_weights *w = &l->w;
    const cudaStream_t s = t->cs->stream;
    const int64_t d = g->hidden, M = g->moe_dim, E = g->n_expert, k = g->n_expert_tok, n = m * k;
    const float limit = g->swiglu_limit > 0.0f ? g->swiglu_limit : INFINITY;
    LSA_TRY(teacher_gemm(t, m, E, d, t->x, w->gate, 0, t->route, err));
    {
        const route_args a = {t->route,  w->gate_bias, w->tid2eid, t->token + p,  t->weight,
                              t->expert, (int)E,       (int)k,     g->route_scale};
        route_k<<<(unsigned)((m + THREADS - 1) / THREADS), THREADS, 0, s>>>(a, m);
        count_k<<<1, THREADS, (size_t)(E + 1) * sizeof(int32_t), s>>>(t->expert, n, (int)E, t->begin);
        sort_k<<<(unsigned)E, THREADS, 0, s>>>(t->expert, n, t->begin, t->list, t->place);
        const unsigned tiles = (unsigned)((m + ROWS - 1) / ROWS); /* an expert may have every token */
        const expert_args up = {t->x, w->w13, t->weight, t->begin, t->list, t->act,
                                d,    M,      2 * M * d, (int)k,   limit};
        expert_k<true><<<dim3((unsigned)((M + COLS - 1) / COLS), tiles, (unsigned)E), THREADS, 0, s>>>(up);
        const expert_args down = {t->act, w->w2, NULL, t->begin, t->list, t->ye, M, d, d * M, (int)k, limit};
        expert_k<false><<<dim3((unsigned)((d + COLS - 1) / COLS), tiles, (unsigned)E), THREADS, 0, s>>>(down);
        combine_k<<<(unsigned)m, THREADS, 0, s>>>(t->ye, t->expert, t->place, (int)k, d, t->y);
        LSA_CUDA(cudaGetLastError());
    }
    LSA_TRY(teacher_gemm(t, m, 2 * M, d, t->x, w->w13 + E * 2 * M * d, 0, t->h13, err));
    {
        const int64_t blocks = (m * M + THREADS - 1) / THREADS;
        shared_k<<<(unsigned)(blocks < 1024 ? blocks : 1024), THREADS, 0, s>>>(t->h13, m * M, M, limit,
                                                                               t->act);
        LSA_CUDA(cudaGetLastError());
    }
    LSA_TRY(teacher_gemm(t, m, d, M, t->act, w->w2 + E * d * M, 1, t->y, err));
done:
    return st;
}
