/* Evaluation on the device: one block a window and score; what comes back is a few counts. Scores of a window
 * stay in shared memory if they fit, else they are recomputed from the layers' logits on every pass. */
#include <stdlib.h>

#include "kernels/cuda/step/step_state.h"

enum { THREADS = 1024 };
#include "kernels/cuda/choose.cuh"

struct eval_args {
    const lsa_gpu_row *row;
    const step_doc *doc;
    const float *z;
    int32_t L, m, n_cut; /* m: windows of a layer's block of z; the last cut is recall's K */
    int64_t n, k_top;
    double budget[LSA_GPU_MAX_BUDGET];
    float threshold;
    bool cached;
    int32_t reach;     /* of the continuation; its score is one more row */
    const float *cost; /* [reach] */
    lsa_gpu_eval_row *out;
};

static __device__ float sigmoid(float z) {
    return __fdividef(1.0f, 1.0f + __expf(-z));
}

struct score {
    float rank, prob;
};
static __device__ __forceinline__ float sum_at(const eval_args &a, const float *z) {
    float sum = 0;
    for (int l = 0; l < a.L; l++) sum += z[l * (int64_t)a.m * a.n];
    return sum;
}
static __device__ score score_at(const eval_args &a, int64_t row, int kind, int64_t j) {
    const float *const z = a.z + row * a.n + j;
    const int64_t layer = (int64_t)a.m * a.n;
    const int ensemble = kind - a.L - (a.reach > 0); /* -1: the sum before the continuation */
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
    if (ensemble == 2)
        for (int k = 1; k <= a.reach && k <= j; k++) {
            const float v = __fsub_rn(sum_at(a, z - k), a.cost[k - 1]);
            sum = v > sum ? v : sum;
        }
    s.rank = ensemble == 0 ? mean : ensemble == 1 ? top : sum;
    s.prob = ensemble == 0 || ensemble == 1 ? s.rank : sigmoid(sum);
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

enum { CUTS = LSA_GPU_MAX_BUDGET + 1 };

/* `choose` for several k at once over the words word_at(j), j < n: three passes in all instead of three a
 * cut. k[b] outside (0, n) is left alone. hist is [CUTS][BINS]. */
template <typename AT>
static __device__ void choose_cuts(const int64_t *k, cut *c, int n_cut, int32_t n, uint32_t *hist,
                                   AT word_at) {
    __shared__ uint32_t prefix[CUTS], left[CUTS], count[CUTS];
    const int t = threadIdx.x, shift[3] = {21, 10, 0}, bits[3] = {11, 11, 10};
    if (t < CUTS) {
        prefix[t] = 0;
        left[t] = t < n_cut && k[t] > 0 && k[t] < n ? (uint32_t)k[t] : 0; /* 0: not asked */
        count[t] = 0;
    }
    for (int pass = 0; pass < 3; pass++) {
        const int up = shift[pass] + bits[pass],
                  tables = pass == 0 ? 1 : n_cut; /* the first digit is counted once for all */
        const uint32_t mask = (1u << bits[pass]) - 1;
        __syncthreads();
        for (int b = t; b < tables * BINS; b += THREADS) hist[b] = 0;
        __syncthreads();
#pragma unroll 2
        for (int32_t j = t; j < n; j += THREADS) {
            const uint32_t w = word_at(j);
            if (pass == 0)
                atomicAdd(&hist[w >> 21], 1u);
            else
                for (int b = 0; b < n_cut; b++)
                    if (w >> up == prefix[b] && left[b])
                        atomicAdd(&hist[b * BINS + (w >> shift[pass] & mask)], 1u);
        }
        __syncthreads();
        for (int b = 0; b < n_cut; b++) {
            const uint32_t *const h = hist + (pass == 0 ? 0 : b * BINS), want = left[b];
            uint32_t mine[BINS / THREADS], sum = 0, all;
            for (int i = 0; i < BINS / THREADS; i++) sum += mine[i] = h[t * (BINS / THREADS) + i];
            uint32_t before =
                scan(sum, &all) - sum; /* its barriers also part the reads of left from the writes below */
            if (want && before < want && before + sum >= want)
                for (int i = 0; i < BINS / THREADS; i++) {
                    if (before + mine[i] >= want) {
                        prefix[b] = prefix[b] << bits[pass] | (uint32_t)(t * (BINS / THREADS) + i);
                        left[b] = want - before;
                        count[b] = mine[i];
                        break;
                    }
                    before += mine[i];
                }
        }
    }
    __syncthreads();
    for (int b = 0; b < n_cut; b++) {
        const bool asked = k[b] > 0 && k[b] < n;
        c[b].word = asked ? prefix[b] : 0xffffffffu;
        c[b].ties = asked ? left[b] : 0;
        c[b].all_ties = !asked || left[b] == count[b];
    }
    __syncthreads();
}

static __global__ void __launch_bounds__(THREADS) eval_k(const __grid_constant__ eval_args a) {
    extern __shared__ uint32_t dynamic[]; /* [CUTS][BINS], then the words of the window if they fit */
    uint32_t *const word = dynamic + CUTS * BINS;
    const int64_t i = blockIdx.x;
    const int kind = blockIdx.y, t = threadIdx.x;
    const lsa_gpu_row r = a.row[i];
    const step_doc d = a.doc[r.slot];
    const int32_t n = d.window[r.window].n_cand;
    const int64_t e0 = d.need_begin[r.window], e1 = d.need_begin[r.window + 1];
    const auto at = [&](int32_t j) { return a.cached ? word[j] : word_of(score_at(a, i, kind, j).rank); };
    uint32_t have = 0, tp = 0, pos = 0, n_have, n_tp, n_pos;
#pragma unroll 4
    for (int32_t j = t; j < n; j += THREADS) {
        const score s = score_at(a, i, kind, j);
        have += s.prob >= a.threshold;
        if (a.cached) word[j] = word_of(s.rank);
    }
    int64_t k[CUTS];
    cut c[CUTS];
    for (int b = 0; b < a.n_cut; b++) k[b] = b == a.n_cut - 1 ? a.k_top : budget_chunks(a.budget[b], n);
    choose_cuts(k, c, a.n_cut, n, dynamic, at);
    double mass = 0, got[CUTS] = {};
    uint32_t hit = 0, n_hit;
    for (int64_t e = e0 + t; e < e1; e += THREADS) {
        const int32_t ch = d.chunk[e];
        if (ch >= n) continue;
        const bool golden = d.weight[e] > 0.0f;
        const uint32_t w = at(ch);
        mass += (double)d.mass[e];
        pos += golden;
        if (golden) tp += score_at(a, i, kind, ch).prob >= a.threshold;
        for (int b = 0; b < a.n_cut; b++) {
            bool in = k[b] > 0 && (w < c[b].word || (w == c[b].word && c[b].all_ties));
            if (k[b] > 0 && w == c[b].word && !c[b].all_ties) { /* ties go to the lower chunk */
                uint32_t before = 0;
                for (int32_t j = 0; j < ch; j++) before += at(j) == w;
                in = before < c[b].ties;
            }
            if (!in) continue;
            got[b] += (double)d.mass[e];
            if (b == a.n_cut - 1) hit += golden;
        }
    }
    scan(have, &n_have);
    scan(tp, &n_tp);
    scan(pos, &n_pos);
    scan(hit, &n_hit);
    mass = block_total(mass);
    lsa_gpu_eval_row *const out = a.out + (int64_t)kind * a.m + i;
    for (int b = 0; b < a.n_cut - 1; b++) {
        const double x = block_total(got[b]);
        if (t == 0) out->captured[b] = (float)x;
    }
    if (t == 0) {
        out->n_cand = n;
        out->have = (int32_t)n_have;
        out->tp = (int32_t)n_tp;
        out->n_pos = (int32_t)n_pos;
        out->hit_k = (int32_t)n_hit;
        out->total_mass = (float)mass;
    }
}

/* The hard_k largest summed logits of a window among chunks that are no positives, hardest first. Words stay
 * in memory: -1 for those left out sorts last. */
struct mine_args {
    const lsa_gpu_row *row;
    const step_doc *doc;
    const float *z;
    uint32_t *word; /* [m, n] scratch */
    int32_t L, m, hard_k;
    bool kl;
    int64_t n;
    int32_t *hard; /* of the document's first window */
};

static __global__ void __launch_bounds__(THREADS) mine_k(const __grid_constant__ mine_args a) {
    extern __shared__ uint64_t best[]; /* [power of two >= hard_k] word and chunk */
    __shared__ uint32_t hist[BINS];
    const int64_t i = blockIdx.x;
    const int t = threadIdx.x;
    const lsa_gpu_row r = a.row[i];
    const step_doc d = a.doc[r.slot];
    const int32_t n = d.window[r.window].n_cand;
    uint32_t *const word = a.word + i * a.n;
    int32_t *const out = a.hard + (int64_t)r.window * a.hard_k;
    int room = 1;
    while (room < a.hard_k) room *= 2;
    for (int32_t j = t; j < n; j += THREADS) {
        float s = 0;
        for (int l = 0; l < a.L; l++) s += a.z[((int64_t)l * a.m + i) * a.n + j];
        word[j] = word_of(s);
    }
    __syncthreads();
    uint32_t out_of = 0, n_pos;
    for (int64_t e = d.need_begin[r.window] + t; e < d.need_begin[r.window + 1]; e += THREADS)
        if (d.chunk[e] < n && (a.kl ? d.mass[e] : d.weight[e]) > 0.0f) {
            word[d.chunk[e]] = 0xffffffffu;
            out_of++;
        }
    scan(out_of, &n_pos);
    const int32_t left = n - (int32_t)n_pos, k = left < a.hard_k ? left : a.hard_k;
    cut c;
    c.word = 0xfffffffeu, c.ties = 0, c.all_ties = true;
    if (k > 0 && k < left)
        c = choose((uint32_t)k, hist, [&](auto f) {
            for (int32_t j = t; j < n; j += THREADS)
                if (word[j] != 0xffffffffu) f(word[j]);
        });
    for (int j = t; j < room; j += THREADS) best[j] = ~0ull;
    uint32_t done = 0, ties = 0, total;
    __syncthreads();
    for (int32_t j0 = 0; j0 < n && k > 0;
         j0 += THREADS) { /* ascending chunks, so that ties are taken in order */
        const int32_t j = j0 + t;
        const uint32_t w = j < n ? word[j] : 0xffffffffu;
        const bool tie = w == c.word && w != 0xffffffffu;
        const uint32_t rank = ties + scan(tie, &total) - 1;
        ties += total;
        const bool in = w != 0xffffffffu && (w < c.word || (tie && (c.all_ties || rank < c.ties)));
        const uint32_t at = done + scan(in, &total) - 1;
        done += total;
        if (in) best[at] = (uint64_t)w << 32 | (uint32_t)j;
    }
    for (int size = 2; size <= room; size *= 2) /* bitonic: keys are unique, so the order is */
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int x = t; x < room; x += THREADS) {
                const int y = x ^ step;
                if (y > x && (best[x] > best[y]) == !(x & size)) {
                    const uint64_t v = best[x];
                    best[x] = best[y];
                    best[y] = v;
                }
            }
        }
    __syncthreads();
    for (int j = t; j < a.hard_k; j += THREADS) out[j] = j < k ? (int32_t)(uint32_t)best[j] : -1;
}

static __global__ void set_hard_k(step_doc *doc, const int32_t *hard) {
    doc->hard = hard;
}

extern "C" lsa_status lsa_gpu_mine(lsa_gpu_step *s, lsa_gpu_step *e, int32_t slot, lsa_err *err) {
    lsa_status st = LSA_OK;
    mine_args a = {};
    lsa_gpu_row *row = NULL;
    step_doc *const keep = e->doc;
    const int64_t W = slot >= 0 && slot < s->o.n_slot ? s->n_window[slot] : 0, K = s->o.hard_k,
                  most = e->o.micro;
    size_t room = 8;
    if (W == 0 || K < 1) LSA_RET_FAIL(LSA_E_ARG, "nothing to mine in slot %d", slot);
    while (room < 8 * (size_t)K) room *= 2;
    row = (lsa_gpu_row *)calloc((size_t)most, sizeof *row);
    if (!row) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    if (!s->hard[slot]) { /* of the pool's memory, as the document is */
        if (cudaMallocAsync((void **)&s->hard[slot], (size_t)(W * K) * 4, s->copy) != cudaSuccess ||
            cudaStreamSynchronize(s->copy) != cudaSuccess)
            LSA_FAIL(LSA_E_NOMEM, "hard negatives of %lld windows: %s", (long long)W,
                     cudaGetErrorString(cudaGetLastError()));
    }
    if (!e->word)
        LSA_TRY(lsa_ctx_alloc_(s->ctx, (void **)&e->word, most * e->o.columns, 4, "hard negatives", err));
    e->doc = s->doc; /* score the training documents with the evaluating step's memory */
    a.row = e->row, a.doc = s->doc, a.z = e->z, a.word = e->word, a.L = s->g.n_layer, a.m = (int32_t)most,
    a.hard_k = (int32_t)K;
    a.kl = s->o.loss == LSA_STEP_KL, a.n = e->o.columns, a.hard = s->hard[slot];
    for (int64_t w = 0; w < W && st == LSA_OK; w += most) {
        const int64_t m = W - w < most ? W - w : most;
        for (int64_t i = 0; i < m; i++) row[i].slot = slot, row[i].window = (int32_t)(w + i);
        if (cudaMemcpyAsync(e->row, row, (size_t)m * sizeof *row, cudaMemcpyHostToDevice, s->cs->stream) !=
                cudaSuccess ||
            cudaFuncSetAttribute(mine_k, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)room) !=
                cudaSuccess)
            st = lsa_err_set(err, LSA_E_DEVICE, __FILE__, __LINE__, "hard negatives: %s",
                             cudaGetErrorString(cudaGetLastError()));
        if (st == LSA_OK) st = step_prepare_eval(e, m, err);
        if (st == LSA_OK) st = step_query(e, 0, m, err);
        if (st == LSA_OK) st = step_score_z(e, 0, m, err);
        if (st == LSA_OK) mine_k<<<(unsigned)m, THREADS, room, s->cs->stream>>>(a);
    }
    e->doc = keep;
    if (st != LSA_OK) goto done;
    set_hard_k<<<1, 1, 0, s->cs->stream>>>(s->doc + slot, s->hard[slot]);
    if (cudaStreamSynchronize(s->cs->stream) != cudaSuccess)
        LSA_FAIL(LSA_E_DEVICE, "hard negatives: %s", cudaGetErrorString(cudaGetLastError()));
done:
    free(row);
    return st;
}

extern "C" int64_t lsa_gpu_rows(const lsa_gpu_step *s) {
    return s->o.micro;
}

extern "C" lsa_status lsa_gpu_eval(lsa_gpu_step *s, int64_t m, const lsa_gpu_row *row, float threshold,
                                   int64_t topk, int32_t n_budget, const double *budget,
                                   lsa_gpu_eval_row *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    eval_args a = {};
    const int32_t L = s->g.n_layer, rows = lsa_gpu_eval_rows(&s->g);
    const int64_t hist = CUTS * BINS * 4, cache = s->o.columns * 4;
    if (!s->eval_only || m < 0 || m > s->o.micro || n_budget > LSA_GPU_MAX_BUDGET)
        LSA_RET_FAIL(LSA_E_ARG, "evaluation of %lld windows by a step made for %lld", (long long)m,
                     (long long)s->o.micro);
    if (m == 0) return LSA_OK;
    LSA_CUDA(cudaMemcpyAsync(s->row, row, (size_t)m * sizeof *row, cudaMemcpyHostToDevice, s->cs->stream));
    LSA_TRY(step_prepare_eval(s, m, err));
    LSA_TRY(step_query(s, 0, m, err));
    LSA_TRY(step_score_z(s, 0, m, err));
    a.row = s->row, a.doc = s->doc, a.z = s->z, a.L = L, a.m = (int32_t)s->o.micro, a.n_cut = n_budget + 1,
    a.n = s->o.columns, a.reach = s->g.reach, a.cost = s->p + s->at_costs;
    a.k_top = topk, a.threshold = threshold, a.cached = hist + cache <= 220 * 1024, a.out = s->eval;
    for (int b = 0; b < n_budget; b++) a.budget[b] = budget[b];
    LSA_CUDA(cudaFuncSetAttribute(eval_k, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)(hist + (a.cached ? cache : 0))));
    eval_k<<<dim3((unsigned)m, (unsigned)rows), THREADS, (size_t)(hist + (a.cached ? cache : 0)),
             s->cs->stream>>>(a);
    LSA_CUDA(cudaGetLastError());
    for (int32_t k = 0; k < rows; k++)
        LSA_CUDA(cudaMemcpyAsync(out + k * m, s->eval + (int64_t)k * s->o.micro, (size_t)m * sizeof *out,
                                 cudaMemcpyDeviceToHost, s->cs->stream));
    LSA_CUDA(cudaStreamSynchronize(s->cs->stream));
done:
    return st;
}
