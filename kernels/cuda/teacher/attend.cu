/* Softmax attention of a token over its window, and the selected or all compressed rows, with a sink per head
 * (architecture notes 5.4). One row serves as key and value of all heads.
 *
 * A block a token, four heads at a time. Each of four warps takes 8 rows at a time: its lanes hold 4 channels
 * of each 128, the 32 products of 8 rows and 4 heads are summed over the lanes by halving (31 exchanges), and
 * lane 4 r + h then has the score of row r and head h. Softmax goes along with the rows (running maximum,
 * sums rescaled), so a row is read once for all four heads, and any number of rows fits. */
#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

enum {
    THREADS = TEACHER_THREADS,
    WARPS = THREADS / 32,
    HEADS = 4,
    ATTEND = 128,
    PARTS = ATTEND / 32,
    ROWS = 8
};

struct attend_args {
    const float *q, *win, *row, *sink, *freq;
    const int32_t *sel, *n_sel; /* NULL: all rows before the token */
    float *o, *mass, *part;     /* o [G, m, width]; mass NULL: not wanted; part [2, m] */
    int64_t p, m, width;
    int H, D, window, ratio, top, rope;
};

/* Of four heads, by all parts of a block. */
struct attend_shared {
    float most[PARTS][HEADS], sum[PARTS][HEADS], inverse[HEADS], peak[HEADS];
};

/* v [32] summed over the lanes: lane i gets the sum of v[i]. The steps are written out, so that v stays in
 * registers. */
template <int O> static __device__ __forceinline__ void halve(float *v, int lane) {
#pragma unroll
    for (int i = 0; i < O; i++) {
        const float keep = lane & O ? v[i + O] : v[i], give = lane & O ? v[i] : v[i + O];
        v[i] = keep + __shfl_xor_sync(0xffffffffu, give, O);
    }
}
static __device__ __forceinline__ float sum_transposed(float *v, int lane) {
    halve<16>(v, lane);
    halve<8>(v, lane);
    halve<4>(v, lane);
    halve<2>(v, lane);
    halve<1>(v, lane);
    return v[0];
}

/* V: D / 128 rounded up; D a multiple of 4. Shared: accumulators [4 warps][4 heads][128 V], then with mass
 * the scores [4 heads][window + top]. */
template <int V>
static __global__ void __launch_bounds__(ATTEND, V == 1 ? 4 : 1)
    attend_k(const __grid_constant__ attend_args a) {
    extern __shared__ float4 shared4[];
    __shared__ attend_shared s;
    float *const acc = (float *)shared4, *const score = acc + PARTS * HEADS * 128 * V;
    const int64_t t = blockIdx.x, pos = a.p + t, n_win = min(pos + 1, (int64_t)a.window),
                  n_comp = !a.ratio ? 0
                           : a.sel  ? a.n_sel[t]
                                    : (pos + 1) / a.ratio,
                  n = n_win + n_comp;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, room = a.window + a.top;
    const float scale = 1.0f / sqrtf((float)a.D);
    const float4 zero = {0, 0, 0, 0};
    float window_sum = 0, sink_sum = 0; /* of warp 0 */
    for (int h0 = 0; h0 < a.H; h0 += HEADS) {
        float4 q[HEADS][V], o[HEADS][V];
        float most = -INFINITY, sum = 0; /* of head lane % 4 */
#pragma unroll
        for (int i = 0; i < HEADS * V; i++) {
            const int h = h0 + i / V, c = 4 * lane + 128 * (i % V);
            q[i / V][i % V] = h < a.H && c < a.D ? *(const float4 *)(a.q + (t * a.H + h) * a.D + c) : zero;
            o[i / V][i % V] = zero;
        }
        for (int64_t i0 = warp * ROWS; i0 < n; i0 += PARTS * ROWS) {
            int64_t from = -1; /* lanes 0 to 7: which row */
            if (lane < ROWS && i0 + lane < n) {
                const int64_t i = i0 + lane, k = i - n_win;
                from = i < n_win ? pos - n_win + 1 + i : a.sel ? a.sel[t * a.top + k] : k;
            }
            float4 x[V == 1 ? ROWS : 1]; /* wider rows are read again */
            const float *at[ROWS];
            float v[ROWS * HEADS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int64_t k = __shfl_sync(0xffffffffu, from, r);
                at[r] = k < 0 ? NULL : (i0 + r < n_win ? a.win : a.row) + k * a.D;
#pragma unroll
                for (int h = 0; h < HEADS; h++) v[r * HEADS + h] = 0;
#pragma unroll
                for (int j = 0; j < V; j++) {
                    const int c = 4 * lane + 128 * j;
                    const float4 y = at[r] && c < a.D ? *(const float4 *)(at[r] + c) : zero;
                    if (V == 1) x[r] = y;
#pragma unroll
                    for (int h = 0; h < HEADS; h++)
                        v[r * HEADS + h] +=
                            q[h][j].x * y.x + q[h][j].y * y.y + q[h][j].z * y.z + q[h][j].w * y.w;
                }
            }
            float z = sum_transposed(v, lane) * scale;
            const int r = lane / HEADS, h = lane % HEADS;
            if (i0 + r >= n) z = -INFINITY;
            if (a.mass && i0 + r < n) score[h * room + i0 + r] = z;
            float now = fmaxf(most, z);
#pragma unroll
            for (int k = HEADS; k < 32; k *= 2) now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, k));
            const float e = expf(z - now), fade = expf(most - now);
            float added = e;
#pragma unroll
            for (int k = HEADS; k < 32; k *= 2) added += __shfl_xor_sync(0xffffffffu, added, k);
            sum = sum * fade + added;
            most = now;
#pragma unroll
            for (int g = 0; g < HEADS; g++) {
                const float f = __shfl_sync(0xffffffffu, fade, g);
#pragma unroll
                for (int j = 0; j < V; j++) o[g][j].x *= f, o[g][j].y *= f, o[g][j].z *= f, o[g][j].w *= f;
            }
#pragma unroll
            for (int k = 0; k < ROWS; k++)
#pragma unroll
                for (int j = 0; j < V; j++) {
                    const int c = 4 * lane + 128 * j;
                    float4 y;
                    if (V == 1)
                        y = x[k];
                    else
                        y = at[k] && c < a.D ? *(const float4 *)(at[k] + c) : zero;
#pragma unroll
                    for (int g = 0; g < HEADS; g++) {
                        const float f = __shfl_sync(0xffffffffu, e, k * HEADS + g);
                        o[g][j].x += f * y.x, o[g][j].y += f * y.y, o[g][j].z += f * y.z,
                            o[g][j].w += f * y.w;
                    }
                }
        }
        if (lane < HEADS) s.most[warp][lane] = most, s.sum[warp][lane] = sum;
        __syncthreads();
        if (tid < HEADS) { /* the four warps and the sink */
            const float bias = h0 + tid < a.H ? a.sink[h0 + tid] : 0.0f;
            float peak = bias;
            for (int w = 0; w < PARTS; w++) peak = fmaxf(peak, s.most[w][tid]);
            float all = expf(bias - peak);
            for (int w = 0; w < PARTS; w++) all += s.sum[w][tid] * expf(s.most[w][tid] - peak);
            s.peak[tid] = peak;
            s.inverse[tid] = 1.0f / all;
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const float f = expf(s.most[warp][h] - s.peak[h]) * s.inverse[h];
#pragma unroll
            for (int j = 0; j < V; j++) {
                const float4 y = {o[h][j].x * f, o[h][j].y * f, o[h][j].z * f, o[h][j].w * f};
                *(float4 *)(acc + ((warp * HEADS + h) * V + j) * 128 + 4 * lane) = y;
            }
        }
        __syncthreads();
        for (int i = tid; i < HEADS * (a.D / 2); i += ATTEND) { /* a pair of channels */
            const int h = i / (a.D / 2), c = i % (a.D / 2) * 2;
            if (h0 + h >= a.H) continue;
            float y[2] = {0, 0};
            for (int w = 0; w < PARTS; w++)
                for (int k = 0; k < 2; k++) y[k] += acc[(w * HEADS + h) * V * 128 + c + k];
            if (c >= a.D - a.rope) /* back from the rotated frame */
                rotate_pair(y, a.freq[(c - a.D + a.rope) / 2], (float)pos, -1.0f);
            const int64_t to = (int64_t)(h0 + h) * a.D + c, group = to / a.width;
            float *const out = a.o + (group * a.m + t) * a.width + to % a.width;
            out[0] = y[0];
            out[1] = y[1];
        }
        if (!a.mass) continue;
        const int heads = min(HEADS, a.H - h0);
        const bool last = h0 + HEADS >= a.H;
        for (int64_t i = tid; i < n_comp; i += ATTEND) {
            float sum_h = h0 ? a.mass[t * a.top + i] : 0.0f;
            for (int h = 0; h < heads; h++)
                sum_h += expf(score[h * room + n_win + i] - s.peak[h]) * s.inverse[h];
            a.mass[t * a.top + i] = last ? sum_h * (1.0f / (float)a.H) : sum_h;
        }
        if (warp == 0) {
            for (int h = 0; h < heads; h++) {
                for (int64_t i = lane; i < n_win; i += 32)
                    window_sum += expf(score[h * room + i] - s.peak[h]) * s.inverse[h];
                if (lane == 0) sink_sum += expf(a.sink[h0 + h] - s.peak[h]) * s.inverse[h];
            }
        }
        __syncthreads(); /* before the scores of the next heads */
    }
    if (!a.mass || warp) return;
    for (int k = 16; k >= 1; k /= 2) window_sum += __shfl_xor_sync(0xffffffffu, window_sum, k);
    if (lane == 0) {
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

lsa_status teacher_dense(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t first, int64_t n,
                         float *out, lsa_err *err) {
    const lsa_gpu_teacher_geom *g = &t->g;
    const dense_args a = {t->q,
                          t->win,
                          t->row,
                          l->w.sink,
                          out,
                          p,
                          first,
                          t->dense_every,
                          t->max_tokens / LSA_CHUNK + 1,
                          g->n_head,
                          g->head_dim,
                          g->window,
                          l->w.ratio};
    if (n > 0) dense_k<<<(unsigned)n, THREADS, 0, t->cs->stream>>>(a);
    LSA_LAUNCHED("dense mass");
}

/* [G, m, R] -> [m, G R] */
static __global__ void __launch_bounds__(THREADS)
    gather_groups_k(const float *in, int G, int64_t m, int R, float *out) {
    const int64_t t = blockIdx.x;
    for (int i = threadIdx.x; i < G * R; i += THREADS) out[t * G * R + i] = in[(i / R * m + t) * R + i % R];
}

template <int V> static lsa_status attend(lsa_gpu_teacher *t, const attend_args *a, lsa_err *err) {
    const int bytes =
        (PARTS * HEADS * 128 * V + (a->mass ? HEADS * (a->window + a->top) : 0)) * (int)sizeof(float);
    LSA_CUDA(cudaFuncSetAttribute(attend_k<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    attend_k<V><<<(unsigned)a->m, ATTEND, bytes, t->cs->stream>>>(*a);
    LSA_LAUNCHED("attend");
}

lsa_status teacher_attend(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &t->g;
    const lsa_gpu_layer_weights *w = &l->w;
    const bool csa = w->roles == 2;
    const int64_t width = t->HD / g->o_groups, GR = (int64_t)g->o_groups * g->o_rank;
    const attend_args a = {t->q,
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
                           g->rope_dim};
    LSA_TRY(g->head_dim <= 128   ? attend<1>(t, &a, err)
            : g->head_dim <= 256 ? attend<2>(t, &a, err)
            : g->head_dim <= 512 ? attend<4>(t, &a, err)
                                 : attend<8>(t, &a, err));
    for (int64_t i = 0; i < g->o_groups; i++)
        LSA_TRY(teacher_gemm(t, m, g->o_rank, width, t->o + i * m * width, w->wo_a + i * g->o_rank * width, 0,
                             t->og + i * m * g->o_rank, err));
    gather_groups_k<<<(unsigned)m, THREADS, 0, t->cs->stream>>>(t->og, g->o_groups, m, g->o_rank, t->o2);
    LSA_CUDA(cudaGetLastError());
    LSA_TRY(teacher_gemm(t, m, g->hidden, GR, t->o2, w->wo_b, 0, t->y, err));
done:
    return st;
}
