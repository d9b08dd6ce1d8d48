/* Evaluation on the device: one block a window and score; what comes back is a few counts. Scores of a window
 * stay in shared memory if they fit, else they are recomputed from the layers' logits on every pass. */
#include <stdlib.h>

#include "kernels/cuda/step/choose.cuh"
#include "kernels/cuda/step/step_state.h"

struct eval_args {
    const lsa_gpu_row *row;
    const step_doc *doc;
    const float *z;
    int32_t L, m, n_cut; /* m: windows of a layer's block of z; the last cut is recall's K */
    int64_t n, k_top;
    double budget[LSA_GPU_MAX_BUDGET];
    float threshold;
    bool cached;
    lsa_gpu_eval_row *out;
};

static __device__ float sigmoid(float z) {
    return 1.0f / (1.0f + __expf(-z));
}

struct score {
    float rank, prob;
};
static __device__ score score_at(const eval_args &a, int64_t row, int kind, int64_t j) {
    const float *const z = a.z + row * a.n + j;
    const int64_t layer = (int64_t)a.m * a.n;
    score s;
    if (kind < a.L) {
        s.rank = z[kind * layer];
        s.prob = sigmoid(s.rank);
        return s;
    }
    float sum = 0, mean = 0, top = 0;
    for (int l = 0; l < a.L; l++) {
        const float v = z[l * layer], p = sigmoid(v);
        sum += v;
        mean += p / (float)a.L;
        top = fmaxf(top, p);
    }
    s.rank = kind == a.L ? mean : kind == a.L + 1 ? top : sum;
    s.prob = kind == a.L + 2 ? sigmoid(sum) : s.rank;
    return s;
}

/* The larger the score the smaller the word. */
static __device__ uint32_t word_of(float x) {
    const uint32_t u = __float_as_uint(x);
    return u >> 31 ? u : ~(u | 0x80000000u);
}

/* As lsa_budget_chunks. */
static __device__ int64_t budget_chunks(double budget, int64_t n) {
    const double x = budget * (double)n;
    const int64_t k = (int64_t)x;
    return x - (double)k > 1e-9 ? k + 1 : k;
}

static __global__ void __launch_bounds__(THREADS) eval_k(const __grid_constant__ eval_args a) {
    extern __shared__ uint32_t word[];
    __shared__ uint32_t hist[BINS];
    const int64_t i = blockIdx.x;
    const int kind = blockIdx.y, t = threadIdx.x;
    const lsa_gpu_row r = a.row[i];
    const step_doc d = a.doc[r.slot];
    const int32_t n = d.window[r.window].n_cand;
    const int64_t e0 = d.need_begin[r.window], e1 = d.need_begin[r.window + 1];
    const auto at = [&](int32_t j) { return a.cached ? word[j] : word_of(score_at(a, i, kind, j).rank); };
    uint32_t have = 0, tp = 0, pos = 0, n_have, n_tp, n_pos;
    for (int32_t j = t; j < n; j += THREADS) {
        const score s = score_at(a, i, kind, j);
        have += s.prob >= a.threshold;
        if (a.cached) word[j] = word_of(s.rank);
    }
    double mass = 0;
    for (int64_t e = e0 + t; e < e1; e += THREADS) {
        if (d.chunk[e] >= n) continue;
        mass += (double)d.mass[e];
        if (!(d.weight[e] > 0.0f)) continue;
        pos++;
        tp += score_at(a, i, kind, d.chunk[e]).prob >= a.threshold;
    }
    scan(have, &n_have);
    scan(tp, &n_tp);
    scan(pos, &n_pos);
    mass = block_total(mass);
    lsa_gpu_eval_row *const out = a.out + (int64_t)kind * a.m + i;
    if (t == 0) {
        out->n_cand = n;
        out->have = (int32_t)n_have;
        out->tp = (int32_t)n_tp;
        out->n_pos = (int32_t)n_pos;
        out->total_mass = (float)mass;
    }
    for (int b = 0; b < a.n_cut; b++) {
        const bool recall = b == a.n_cut - 1;
        int64_t k = recall ? a.k_top : budget_chunks(a.budget[b], n);
        k = k < n ? k : n;
        cut c;
        c.word = 0xffffffffu, c.ties = 0, c.all_ties = true;
        if (k > 0 && k < n)
            c = choose((uint32_t)k, hist, [&](auto f) {
                for (int32_t j = t; j < n; j += THREADS) f(at(j));
            });
        double got = 0;
        uint32_t hit = 0, n_hit;
        for (int64_t e = e0 + t; e < e1 && k > 0; e += THREADS) {
            const int32_t ch = d.chunk[e];
            if (ch >= n) continue;
            const uint32_t w = at(ch);
            bool in = w < c.word || (w == c.word && c.all_ties);
            if (w == c.word && !c.all_ties) { /* ties go to the lower chunk */
                uint32_t before = 0;
                for (int32_t j = 0; j < ch; j++) before += at(j) == c.word;
                in = before < c.ties;
            }
            if (!in) continue;
            got += (double)d.mass[e];
            hit += d.weight[e] > 0.0f;
        }
        got = block_total(got);
        scan(hit, &n_hit);
        if (t == 0) {
            if (recall)
                out->hit_k = (int32_t)n_hit;
            else
                out->captured[b] = (float)got;
        }
    }
}

extern "C" int64_t lsa_gpu_rows(const lsa_gpu_step *s) {
    return s->o.micro;
}

extern "C" lsa_status lsa_gpu_eval(lsa_gpu_step *s, int64_t m, const lsa_gpu_row *row, float threshold,
                                   int64_t topk, int32_t n_budget, const double *budget,
                                   lsa_gpu_eval_row *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    eval_args a = {};
    const int32_t L = s->g.n_layer;
    const int64_t cache = s->o.columns * 4;
    if (!s->eval_only || m < 0 || m > s->o.micro || n_budget > LSA_GPU_MAX_BUDGET)
        LSA_RET_FAIL(LSA_E_ARG, "evaluation of %lld windows by a step made for %lld", (long long)m,
                     (long long)s->o.micro);
    if (m == 0) return LSA_OK;
    LSA_CUDA(cudaMemcpyAsync(s->row, row, (size_t)m * sizeof *row, cudaMemcpyHostToDevice, s->cs->stream));
    LSA_TRY(step_prepare_eval(s, m, err));
    LSA_TRY(step_query(s, 0, m, err));
    LSA_TRY(step_score_z(s, 0, m, err));
    a.row = s->row, a.doc = s->doc, a.z = s->z, a.L = L, a.m = (int32_t)s->o.micro, a.n_cut = n_budget + 1,
    a.n = s->o.columns;
    a.k_top = topk, a.threshold = threshold, a.cached = cache <= 200 * 1024, a.out = s->eval;
    for (int b = 0; b < n_budget; b++) a.budget[b] = budget[b];
    LSA_CUDA(
        cudaFuncSetAttribute(eval_k, cudaFuncAttributeMaxDynamicSharedMemorySize, a.cached ? (int)cache : 0));
    eval_k<<<dim3((unsigned)m, (unsigned)(L + 3)), THREADS, a.cached ? (size_t)cache : 0, s->cs->stream>>>(a);
    LSA_CUDA(cudaGetLastError());
    for (int32_t k = 0; k < L + 3; k++)
        LSA_CUDA(cudaMemcpyAsync(out + k * m, s->eval + (int64_t)k * s->o.micro, (size_t)m * sizeof *out,
                                 cudaMemcpyDeviceToHost, s->cs->stream));
    LSA_CUDA(cudaStreamSynchronize(s->cs->stream));
done:
    return st;
}
