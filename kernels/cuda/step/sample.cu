/* From descriptors of windows to samples: which chunks a window is scored against, their labels and weights,
 * and its hidden vector.
 *
 * A choice without replacement is a bottom-k: chunk c of a window has the random word philox(mix(mix(seed,
 * 202), epoch), c/4, mix(document, query))[c mod 4]; the k smallest words are chosen, ties by the lower
 * chunk. Hence no order of threads and no state: trainer/batch.c does the same on the CPU and gets the same
 * chunks. Chosen chunks come in ascending order. */
#include "kernels/core/rng.h"
#include "kernels/cuda/step/ranks.h"

enum { THREADS = 512 };
#include "kernels/cuda/choose.cuh"

static __global__ void prepare_k(const lsa_gpu_row *ring, size_t ring_rows, const step_control *control,
                                 bool from_ring, const step_doc *doc, const float *freq, int half,
                                 lsa_gpu_row *row, step_row *where, float2 *cs) {
    const int64_t i = blockIdx.x;
    const lsa_gpu_row r =
        from_ring ? ring[(control->launched % LSA_GPU_FLIGHT) * (int64_t)ring_rows + i] : row[i];
    const step_doc d = doc[r.slot];
    const float position = (float)d.window[r.window].query;
    for (int j = threadIdx.x; j < half; j += blockDim.x) {
        float s, c;
        sincosf(position * freq[j], &s, &c); /* NUMERIC: the product is rounded to f32 before sin and cos */
        cs[i * half + j] = make_float2(c, s);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        row[i] = r;
        step_row w;
        w.key = d.key;
        w.scale = d.scale;
        w.n_key = d.n_key;
        where[i] = w;
    }
}

static __global__ void gather_k(const lsa_gpu_row *row, const step_doc *doc, int64_t hidden, int m, bf16 *x) {
    const lsa_gpu_row r = row[blockIdx.x];
    const step_doc d = doc[r.slot];
    const uint4 *const src =
        (const uint4 *)(d.hidden +
                        ((int64_t)blockIdx.y * d.n_hidden + d.window[r.window].hidden_row) * hidden);
    uint4 *const dst = (uint4 *)(x + ((int64_t)blockIdx.y * m + blockIdx.x) * hidden);
    for (int64_t k = threadIdx.x; k < hidden / 8; k += blockDim.x) dst[k] = src[k];
}

/* ---- choice ---- */

struct stream {
    uint64_t key, hi;
};
static __device__ stream stream_of(uint64_t seed, const lsa_gpu_row &r, const step_doc &d) {
    stream s;
    s.key = lsa_mix64(lsa_mix64(seed, 202), (uint64_t)r.epoch);
    s.hi = lsa_mix64((uint64_t)d.doc, (uint64_t)d.window[r.window].query);
    return s;
}

struct sample_args {
    const lsa_gpu_row *row;
    const step_doc *doc;
    uint64_t seed;
    int64_t n, max_pos, max_neg;
    double neg_ratio, hard_share;
    int64_t hard_k;
    bool kl, by_mass, balance;
    int32_t *cand, *n_cand, *n_pos;
    float *y, *weight, *row_weight;
};

static __device__ bool positive(const sample_args &a, const step_doc &d, int64_t e, int32_t n_cand) {
    return d.chunk[e] < n_cand && (a.kl ? d.mass[e] : d.weight[e]) > 0.0f;
}

static __global__ void __launch_bounds__(THREADS) sample_k(const __grid_constant__ sample_args a) {
    extern __shared__ uint32_t taken[]; /* bitmap of chunks that are no negatives */
    __shared__ uint32_t hist[BINS];
    const int64_t i = blockIdx.x, at = i * a.n;
    const int t = threadIdx.x;
    const lsa_gpu_row r = a.row[i];
    const step_doc d = a.doc[r.slot];
    const int32_t n_all = d.window[r.window].n_cand;
    const int64_t e0 = d.need_begin[r.window], e1 = d.need_begin[r.window + 1];
    const stream rng = stream_of(a.seed, r, d);
    for (int k = t; k < (n_all + 31) / 32; k += THREADS) taken[k] = 0;
    __syncthreads();
    uint32_t count = 0, total;
    for (int64_t e = e0 + t; e < e1; e += THREADS)
        if (positive(a, d, e, n_all)) {
            atomicOr(&taken[d.chunk[e] >> 5], 1u << (d.chunk[e] & 31));
            count++;
        }
    scan(count, &total);
    const uint32_t all_pos = total, n_pos = (uint32_t)min((int64_t)all_pos, a.max_pos);
    const uint32_t all_neg = (uint32_t)n_all - all_pos;
    const uint32_t want =
        (uint32_t)min(min((int64_t)((double)n_pos * a.neg_ratio), a.max_neg), (int64_t)all_neg);

    cut c;
    c.word = 0xffffffffu, c.ties = 0, c.all_ties = true;
    if (n_pos < all_pos)
        c = choose(n_pos, hist, [&](auto f) {
            for (int64_t e = e0 + t; e < e1; e += THREADS)
                if (positive(a, d, e, n_all))
                    f(lsa_philox(rng.key, (uint64_t)d.chunk[e] >> 2, rng.hi).v[d.chunk[e] & 3]);
        });
    double mass = 0;
    uint32_t done = 0, ties_before = 0;
    for (int64_t b = e0; b < e1; b += THREADS) { /* entries ascend by chunk */
        const int64_t e = b + t;
        bool in = e < e1 && positive(a, d, e, n_all);
        if (n_pos < all_pos) {
            const uint32_t w =
                in ? lsa_philox(rng.key, (uint64_t)d.chunk[e] >> 2, rng.hi).v[d.chunk[e] & 3] : 0;
            const bool tie = in && w == c.word;
            if (!c.all_ties) {
                const uint32_t rank = ties_before + scan(tie, &total) - 1;
                ties_before += total;
                in = in && (w < c.word || (tie && rank < c.ties));
            } else {
                in = in && w <= c.word;
            }
        }
        const uint32_t k = done + scan(in, &total) - 1;
        done += total;
        if (in) {
            a.cand[at + k] = d.chunk[e];
            a.y[at + k] = a.kl ? d.mass[e] : 1.0f;
            if (a.weight) a.weight[at + k] = d.weight[e];
        }
    }
    if (a.kl) { /* the target is the share of the chosen mass */
        __syncthreads();
        for (uint32_t k = t; k < n_pos; k += THREADS) mass += (double)a.y[at + k];
        mass = block_total(mass);
        for (uint32_t k = t; k < n_pos; k += THREADS) a.y[at + k] = (float)((double)a.y[at + k] / mass);
        if (t == 0) a.row_weight[i] = mass > 0 ? a.by_mass ? (float)mass : 1.0f : 0.0f;
    }

    uint32_t n_hard = 0; /* the hardest first, then drawn ones */
    if (d.hard && a.hard_share > 0) {
        const int32_t *const hard = d.hard + (int64_t)r.window * a.hard_k;
        const uint32_t most = (uint32_t)min((int64_t)((double)want * a.hard_share), a.hard_k);
        count = 0;
        __syncthreads();
        for (uint32_t k = t; k < most; k += THREADS)
            if (hard[k] >= 0) {
                atomicOr(&taken[hard[k] >> 5], 1u << (hard[k] & 31));
                a.cand[at + n_pos + k] = hard[k];
                a.y[at + n_pos + k] = 0.0f;
                if (a.weight) a.weight[at + n_pos + k] = 1.0f;
                count++;
            }
        scan(count, &n_hard);
    }
    const uint32_t draw = want - n_hard;
    c.word = 0xffffffffu, c.ties = 0, c.all_ties = true;
    const int groups = (n_all + 3) / 4;
    if (draw > 0 && draw < all_neg - n_hard)
        c = choose(draw, hist, [&](auto f) {
            for (int g = t; g < groups; g += THREADS) {
                const lsa_u32x4 w = lsa_philox(rng.key, (uint64_t)g, rng.hi);
                for (int b = 0; b < 4; b++) {
                    const int ch = 4 * g + b;
                    if (ch < n_all && !(taken[ch >> 5] >> (ch & 31) & 1)) f(w.v[b]);
                }
            }
        });
    done = n_pos + n_hard;
    ties_before = 0;
    for (int g0 = 0; g0 < groups && draw > 0; g0 += THREADS) {
        const int g = g0 + t;
        uint32_t in = 0, tie = 0; /* bit b: chunk 4g + b */
        if (g < groups) {
            const lsa_u32x4 w = lsa_philox(rng.key, (uint64_t)g, rng.hi);
            for (int b = 0; b < 4; b++) {
                const int ch = 4 * g + b;
                if (ch >= n_all || taken[ch >> 5] >> (ch & 31) & 1) continue;
                if (w.v[b] < c.word || (c.all_ties && w.v[b] == c.word)) in |= 1u << b;
                if (w.v[b] == c.word) tie |= 1u << b;
            }
        }
        if (!c.all_ties) {
            const uint32_t n_tie = (uint32_t)__popc(tie);
            uint32_t rank = ties_before + scan(n_tie, &total) - n_tie;
            ties_before += total;
            for (int b = 0; b < 4; b++)
                if (tie >> b & 1)
                    if (rank++ < c.ties) in |= 1u << b;
        }
        const uint32_t n_in = (uint32_t)__popc(in);
        uint32_t k = done + scan(n_in, &total) - n_in;
        done += total;
        for (int b = 0; b < 4; b++)
            if (in >> b & 1) {
                a.cand[at + k] = 4 * g + b;
                a.y[at + k] = 0.0f;
                if (a.weight) a.weight[at + k] = 1.0f;
                k++;
            }
    }
    if (t == 0) {
        a.n_cand[i] = (int32_t)(n_pos + want);
        a.n_pos[i] = (int32_t)n_pos;
    }
}

/* All chunks of the window: dense labels, or the share of mass. */
static __global__ void __launch_bounds__(THREADS) dense_k(const __grid_constant__ sample_args a) {
    const int64_t i = blockIdx.x, at = i * a.n;
    const int t = threadIdx.x;
    const lsa_gpu_row r = a.row[i];
    const step_doc d = a.doc[r.slot];
    const int32_t n_all = d.window[r.window].n_cand;
    const int64_t e0 = d.need_begin[r.window], e1 = d.need_begin[r.window + 1];
    uint32_t count = 0, n_pos;
    double mass = 0;
    for (int64_t e = e0 + t; e < e1; e += THREADS)
        if (positive(a, d, e, n_all)) {
            count++;
            mass += a.kl ? (double)d.mass[e] : 0.0;
        }
    scan(count, &n_pos);
    mass = block_total(mass);
    const float other =
        a.balance
            ? n_all > (int32_t)n_pos ? (float)(a.neg_ratio * n_pos / (double)(n_all - (int32_t)n_pos)) : 0.0f
            : 1.0f;
    for (int32_t k = t; k < n_all; k += THREADS) {
        a.y[at + k] = 0.0f;
        if (a.weight) a.weight[at + k] = other;
    }
    __syncthreads();
    for (int64_t e = e0 + t; e < e1; e += THREADS)
        if (positive(a, d, e, n_all)) {
            a.y[at + d.chunk[e]] = a.kl ? (float)((double)d.mass[e] / mass) : 1.0f;
            if (a.weight) a.weight[at + d.chunk[e]] = d.weight[e];
        }
    if (t == 0) {
        a.n_cand[i] = n_all;
        a.n_pos[i] = (int32_t)n_pos;
        if (a.row_weight) a.row_weight[i] = mass > 0 ? a.by_mass ? (float)mass : 1.0f : 0.0f;
    }
}

/* The loss's denominator: this rank's windows. One block. */
static __global__ void __launch_bounds__(THREADS)
    totals_k(const int32_t *n_cand, const int32_t *n_pos, const float *row_weight, int64_t B,
             lsa_step_loss kind, double balance, double *total) {
    double s = 0;
    for (int64_t i = threadIdx.x; i < B; i += THREADS) {
        if (kind == LSA_STEP_KL)
            s += (double)row_weight[i];
        else if (kind == LSA_STEP_BPR || kind == LSA_STEP_MARGIN)
            s += (double)n_pos[i] * (double)(n_cand[i] - n_pos[i]);
        else
            s += balance > 0 ? (1.0 + balance) * (double)n_pos[i] : (double)n_cand[i];
    }
    s = block_total(s);
    if (threadIdx.x == 0) *total = s;
}
/* And of all ranks' windows. */
static __global__ void scale_k(const double *total, lsa_step_loss kind, double share, step_control *control) {
    const double s = *total;
    control->loss_scale = (float)(share / (kind == LSA_STEP_KL ? (s > 0 ? s : 1.0) : fmax(1.0, s)));
}

lsa_status step_prepare(lsa_gpu_step *s, lsa_err *err) {
    const lsa_gpu_opts *o = &s->o;
    const unsigned B = (unsigned)o->batch;
    cudaStream_t st = s->cs->stream;
    prepare_k<<<B, 64, 0, st>>>((const lsa_gpu_row *)(s->desc + LSA_GPU_FLIGHT * sizeof(step_desc)),
                                (size_t)B, s->control, true, s->doc, s->freq, s->g.rope.dim / 2, s->row,
                                s->where, s->cs_table);
    const bool kl = o->loss == LSA_STEP_KL;
    const sample_args a = {s->row,       s->doc,        o->seed,   o->columns, o->max_pos, o->max_neg,
                           o->neg_ratio, o->hard_share, o->hard_k, kl,         o->by_mass, o->balance,
                           s->cand,      s->n_cand,     s->n_pos,  s->y,       s->weight,  s->row_weight};
    if (o->sampled) {
        const int bytes = (int)((o->max_chunk + 31) / 32 * 4);
        LSA_CUDA(cudaFuncSetAttribute(sample_k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        sample_k<<<B, THREADS, bytes, st>>>(a);
    } else {
        dense_k<<<B, THREADS, 0, st>>>(a);
    }
    totals_k<<<1, THREADS, 0, st>>>(s->n_cand, s->n_pos, s->row_weight, o->batch, o->loss,
                                    o->balance ? o->neg_ratio : 0.0, s->total);
    const lsa_status added = step_ranks_add(s, s->total, 1, err);
    if (added != LSA_OK) return added;
    scale_k<<<1, 1, 0, st>>>(s->total, o->loss, o->on_sum ? 1.0 : 1.0 / s->g.n_layer, s->control);
    LSA_LAUNCHED("prepare");
}

lsa_status step_gather(lsa_gpu_step *s, int64_t first, int64_t m, lsa_err *err) {
    gather_k<<<dim3((unsigned)m, (unsigned)s->g.n_layer), 128, 0, s->cs->stream>>>(
        s->row + first, s->doc, s->g.hidden, (int)s->o.micro, s->x);
    LSA_LAUNCHED("gather");
}

static __global__ void all_chunks_k(const lsa_gpu_row *row, const step_doc *doc, int32_t *n_cand) {
    const lsa_gpu_row r = row[blockIdx.x];
    n_cand[blockIdx.x] = doc[r.slot].window[r.window].n_cand;
}
/* Rows that the host put into s->row, against all their chunks. */
lsa_status step_prepare_eval(lsa_gpu_step *s, int64_t m, lsa_err *err) {
    prepare_k<<<(unsigned)m, 64, 0, s->cs->stream>>>(NULL, 0, s->control, false, s->doc, s->freq,
                                                     s->g.rope.dim / 2, s->row, s->where, s->cs_table);
    all_chunks_k<<<(unsigned)m, 1, 0, s->cs->stream>>>(s->row, s->doc, s->n_cand);
    LSA_LAUNCHED("prepare_eval");
}
