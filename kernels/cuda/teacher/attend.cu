/* Softmax attention of a token over its window, and the selected or all compressed rows, with a sink per head
 * (architecture notes 5.4). One row serves as key and value of all heads. A block a token. */
#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

enum {
    THREADS = TEACHER_THREADS,
    WARPS = THREADS / 32,
    SCORES = 40960 /* floats of shared memory for scores */
};

struct attend_args {
    const float *q, *win, *row, *sink, *freq;
    const int32_t *sel, *n_sel; /* NULL: all rows before the token */
    float *o, *mass, *part;     /* o [G, m, width]; mass NULL: not wanted; part [2, m] */
    int64_t p, m, width;
    int H, D, window, ratio, top, rope, heads; /* heads at a time */
};

static __global__ void __launch_bounds__(THREADS) attend_k(const __grid_constant__ attend_args a) {
    extern __shared__ float score[]; /* [heads, n] */
    __shared__ float sink_sum, window_sum;
    const int64_t t = blockIdx.x, pos = a.p + t, n_win = min(pos + 1, (int64_t)a.window),
                  n_comp = !a.ratio ? 0
                           : a.sel  ? a.n_sel[t]
                                    : (pos + 1) / a.ratio,
                  n = n_win + n_comp;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const float f = 1.0f / sqrtf((float)a.D);
    const auto row = [&](int64_t i) {
        if (i < n_win) return a.win + (pos - n_win + 1 + i) * a.D;
        const int64_t k = i - n_win;
        return a.row + (a.sel ? a.sel[t * a.top + k] : k) * a.D;
    };
    if (tid == 0) sink_sum = window_sum = 0;
    for (int64_t i = tid; a.mass && i < n_comp; i += THREADS) a.mass[t * a.top + i] = 0;
    for (int h0 = 0; h0 < a.H; h0 += a.heads) {
        const int nh = min(a.heads, a.H - h0);
        __syncthreads();
        for (int64_t i = warp; i < n; i += WARPS) {
            const float *const r = row(i);
            for (int h = 0; h < nh; h++) {
                const float *const q = a.q + (t * a.H + h0 + h) * a.D;
                float s = 0;
                for (int c = lane; c < a.D; c += 32) s += q[c] * r[c];
                for (int o = 16; o >= 1; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
                if (lane == 0) score[h * n + i] = s * f;
            }
        }
        __syncthreads();
        for (int h = warp; h < nh; h += WARPS) {
            float *const s = score + h * n, bias = a.sink[h0 + h];
            float most = bias, sum = 0;
            for (int64_t i = lane; i < n; i += 32) most = fmaxf(most, s[i]);
            for (int o = 16; o >= 1; o /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
            for (int64_t i = lane; i < n; i += 32) sum += s[i] = expf(s[i] - most);
            for (int o = 16; o >= 1; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            const float sunk = expf(bias - most), inverse = 1.0f / (sum + sunk);
            for (int64_t i = lane; i < n; i += 32) s[i] *= inverse;
            if (lane == 0) score[nh * n + h] = sunk * inverse;
        }
        __syncthreads();
        for (int c = tid; c < nh * a.D; c += THREADS) {
            const int h = c / a.D, j = c % a.D, head = h0 + h;
            const float *const s = score + h * n;
            float sum = 0;
            for (int64_t i = 0; i < n; i++) sum += s[i] * row(i)[j];
            const int64_t at = (int64_t)head * a.D + j, group = at / a.width;
            a.o[(group * a.m + t) * a.width + at % a.width] = sum;
        }
        if (a.mass) {
            for (int64_t i = n_win + tid; i < n; i += THREADS) {
                float sum = a.mass[t * a.top + i - n_win];
                for (int h = 0; h < nh; h++) sum += score[h * n + i];
                a.mass[t * a.top + i - n_win] = sum;
            }
            if (tid == 0) { /* in the order of the rows: the same bits every time */
                for (int h = 0; h < nh; h++) {
                    for (int64_t i = 0; i < n_win; i++) window_sum += score[h * n + i];
                    sink_sum += score[nh * n + h];
                }
            }
        }
    }
    __syncthreads();
    /* back from the rotated frame */
    for (int i = tid; i < a.H * (a.rope / 2); i += THREADS) {
        const int head = i / (a.rope / 2), c = i % (a.rope / 2);
        const int64_t at = (int64_t)head * a.D + a.D - a.rope + 2 * c, group = at / a.width;
        rotate_pair(a.o + (group * a.m + t) * a.width + at % a.width, a.freq[c], (float)pos, -1.0f);
    }
    if (!a.mass) return;
    for (int64_t i = tid; i < n_comp; i += THREADS) a.mass[t * a.top + i] *= 1.0f / (float)a.H;
    if (tid == 0) {
        a.part[t] = window_sum / (float)a.H;
        a.part[a.m + t] = sink_sum / (float)a.H;
    }
}

/* ---- dense mass: what each visible chunk would get if all were attended (notes 15.1), mean of heads ---- */

struct dense_args {
    const float *q, *win, *row, *sink;
    float *out;
    int64_t p, first, every, ld; /* first: position of the first wanted token */
    int H, D, window, ratio;
};

/* A block a wanted token. Scores are computed twice rather than kept: there may be a hundred thousand. */
static __global__ void __launch_bounds__(THREADS) dense_k(const __grid_constant__ dense_args a) {
    __shared__ float most_of[WARPS], sum_of[WARPS];
    const int64_t pos = a.first + (int64_t)blockIdx.x * a.every, t = pos - a.p,
                  n_win = min(pos + 1, (int64_t)a.window), n = (pos + 1) / a.ratio;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const float f = 1.0f / sqrtf((float)a.D);
    float *const out = a.out + (int64_t)blockIdx.x * a.ld;
    for (int64_t i = tid; i < n; i += THREADS) out[i] = 0;
    for (int h = 0; h < a.H; h++) {
        const float *const q = a.q + (t * a.H + h) * a.D;
        const auto score = [&](const float *r) { /* of a warp */
                                                 float s = 0;
                                                 for (int c = lane; c < a.D; c += 32) s += q[c] * r[c];
                                                 for (int o = 16; o >= 1; o /= 2)
                                                     s += __shfl_xor_sync(0xffffffffu, s, o);
                                                 return s * f;
        };
        float most = a.sink[h], sum = 0;
        for (int64_t i = warp; i < n; i += WARPS) most = fmaxf(most, score(a.row + i * a.D));
        __syncthreads();
        if (lane == 0) most_of[warp] = most;
        __syncthreads();
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, most_of[w]);
        for (int64_t i = warp; i < n_win; i += WARPS)
            sum += expf(score(a.win + (pos - n_win + 1 + i) * a.D) - most);
        for (int64_t i = warp; i < n; i += WARPS) sum += expf(score(a.row + i * a.D) - most);
        if (lane == 0) sum_of[warp] = sum;
        __syncthreads();
        float z = expf(a.sink[h] - most);
        for (int w = 0; w < WARPS; w++) z += sum_of[w];
        const float share = 1.0f / (z * (float)a.H);
        for (int64_t i = warp; i < n; i += WARPS) {
            const float s = score(a.row + i * a.D);
            if (lane == 0) out[i] += expf(s - most) * share;
        }
    }
}

lsa_status teacher_dense(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, int64_t *rows,
                         lsa_err *err) {
    const lsa_gpu_teacher_geom *g = &t->g;
    const int64_t e = t->dense_every, first = e ? (p + e) / e * e - 1 : 0, ld = t->max_tokens / LSA_CHUNK + 1;
    *rows = e && first < p + m ? (p + m - 1 - first) / e + 1 : 0;
    if (*rows == 0) return LSA_OK;
    const dense_args a = {t->q, t->win, t->row,    l->w.sink,   t->dense,  p,         first,
                          e,    ld,     g->n_head, g->head_dim, g->window, l->w.ratio};
    dense_k<<<(unsigned)*rows, THREADS, 0, t->cs->stream>>>(a);
    LSA_CUDA(cudaGetLastError());
    LSA_CUDA(cudaMemcpyAsync(t->host_dense, t->dense, (size_t)(*rows * ld) * sizeof(float),
                             cudaMemcpyDeviceToHost, t->cs->stream));
    return LSA_OK;
}

/* [G, m, R] -> [m, G R] */
static __global__ void __launch_bounds__(THREADS)
    gather_groups_k(const float *in, int G, int64_t m, int R, float *out) {
    const int64_t t = blockIdx.x;
    for (int i = threadIdx.x; i < G * R; i += THREADS) out[t * G * R + i] = in[(i / R * m + t) * R + i % R];
}

lsa_status teacher_attend(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &t->g;
    const lsa_gpu_layer_weights *w = &l->w;
    const bool csa = w->roles == 2;
    const int64_t width = t->HD / g->o_groups, GR = (int64_t)g->o_groups * g->o_rank,
                  most = g->window + (!w->ratio ? 0
                                      : csa     ? t->top
                                                : (p + m) / w->ratio);
    const int heads = (int)(SCORES / (most + 1) < g->n_head ? SCORES / (most + 1) : g->n_head);
    if (heads < 1)
        LSA_RET_FAIL(LSA_E_CONFIG, "attention over %lld rows at once: this path takes at most %d",
                     (long long)most, SCORES - 1);
    attend_args a = {t->q,
                     t->win,
                     t->row,
                     w->sink,
                     w->ratio ? t->table.freq_comp : t->table.freq_main,
                     csa ? t->sel : NULL,
                     csa ? t->n_sel : NULL,
                     t->o,
                     csa ? t->mass : NULL,
                     t->part,
                     p,
                     m,
                     width,
                     g->n_head,
                     g->head_dim,
                     g->window,
                     w->ratio,
                     (int)t->top,
                     g->rope_dim,
                     heads};
    const int bytes = (int)(heads * (most + 1) * (int64_t)sizeof(float));
    LSA_CUDA(cudaFuncSetAttribute(attend_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    attend_k<<<(unsigned)m, THREADS, bytes, t->cs->stream>>>(a);
    LSA_CUDA(cudaGetLastError());
    for (int64_t i = 0; i < g->o_groups; i++)
        LSA_TRY(teacher_gemm(t, m, g->o_rank, width, t->o + i * m * width, w->wo_a + i * g->o_rank * width, 0,
                             t->og + i * m * g->o_rank, err));
    gather_groups_k<<<(unsigned)m, THREADS, 0, t->cs->stream>>>(t->og, g->o_groups, m, g->o_rank, t->o2);
    LSA_CUDA(cudaGetLastError());
    LSA_TRY(teacher_gemm(t, m, g->hidden, GR, t->o2, w->wo_b, 0, t->y, err));
done:
    return st;
}
