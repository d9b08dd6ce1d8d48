/* Losses on logits, the gradient's norm, the decision to update or skip, and AdamW. No value passes through
 * the host. */
#include <math.h>

#include "kernels/cuda/step/ranks.h"

enum { THREADS = 256 };

/* ---- losses that need more than one tile: KL, pairwise, and pointwise ones on the sum of layers ---- */

struct loss_args {
    int m, L; /* layers to add before the loss (1: each layer on its own, grid.y layers) */
    int64_t n, layer_stride;
    lsa_step_loss kind;
    float smoothing, margin;
    float *z; /* becomes dz (of the first of the added layers) */
    const float *y, *weight, *row_weight;
    const int32_t *n_cand;
    const float *scale;
    double *row_loss;
    float *copy;  /* pairwise: z as it was */
    float *bound; /* [layers, m] power of two not below the largest |dz|: the gradient kernel's f16 scale */
    /* continuation: reach 0 none; copy is then [m, n] */
    int reach;
    const float *cost;
    uint8_t *from;
    double *cost_part; /* [m, reach] */
};

static __device__ float block_max(float v) {
    __shared__ float s[THREADS];
    __syncthreads();
    s[threadIdx.x] = v;
    __syncthreads();
    for (int k = THREADS / 2; k > 0; k >>= 1) {
        if ((int)threadIdx.x < k && (s[threadIdx.x + k] > s[threadIdx.x] || isnan(s[threadIdx.x + k])))
            s[threadIdx.x] = s[threadIdx.x + k];
        __syncthreads();
    }
    return s[0];
}

static __device__ double pair_row(const loss_args &a, const float *z, const float *y, int64_t k, float *dz) {
    double loss = 0;
    for (int64_t j = threadIdx.x; j < k; j += THREADS) {
        float g = 0;
        for (int64_t o = 0; o < k; o++) {
            if (y[o] == y[j]) continue;
            const bool pos = y[j] > y[o];
            const float diff = pos ? z[j] - z[o] : z[o] - z[j];
            float dl, one;
            if (a.kind == LSA_STEP_MARGIN) {
                one = a.margin - diff;
                dl = one > 0 ? -1.0f : isnan(one) ? one : 0.0f;
                one = one < 0 ? 0.0f : one;
            } else {
                one = loss_point(diff, 1.0f, false, &dl);
            }
            if (pos) loss += (double)one;
            g += pos ? dl : -dl;
        }
        dz[j] = g;
    }
    return loss;
}

/* z'(c) = max over j of z(c - j) - b_j, ties to the smaller j; ops.h, continuation. */
static __device__ __forceinline__ float continued(const loss_args &a, const float *z, int64_t c,
                                                  uint8_t *from) {
    float best = z[c];
    int won = 0;
    for (int j = 1; j <= a.reach && j <= c; j++) {
        const float v = __fsub_rn(z[c - j], a.cost[j - 1]);
        if (v > best) best = v, won = j;
    }
    from[c] = (uint8_t)won;
    return best;
}

/* The gradient of the continued scores back to z, and of the costs: a warp a cost, in a fixed order. */
static __device__ void lend_back(const loss_args &a, int64_t row, int64_t k, const float *d,
                                 const uint8_t *from, float *z) {
    __syncthreads();
    for (int64_t c = threadIdx.x; c < k; c += THREADS) {
        float s = 0;
        for (int j = 0; j <= a.reach && c + j < k; j++)
            if (from[c + j] == j) s += d[c + j];
        z[c] = s;
    }
    for (int j = 1 + (int)(threadIdx.x >> 5); j <= a.reach; j += THREADS / 32) {
        double s = 0;
        for (int64_t c = threadIdx.x & 31; c < k; c += 32)
            if (from[c] == j) s += (double)d[c];
        for (int o = 16; o >= 1; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
        if ((threadIdx.x & 31) == 0) a.cost_part[row * a.reach + j - 1] = s;
    }
}

static __global__ void __launch_bounds__(THREADS) loss_k(const __grid_constant__ loss_args a) {
    const int64_t i = blockIdx.x, k = a.n_cand[i];
    float *const sum = a.z + (int64_t)blockIdx.y * a.layer_stride + i * a.n;
    float *const z = a.reach ? a.copy + i * a.n : sum; /* what the loss sees, then its gradient */
    uint8_t *const from = a.from + i * a.n;
    const float *const y = a.y + i * a.n;
    const float w = a.row_weight ? a.row_weight[i] : 1.0f;
    double *const out = a.row_loss + (int64_t)blockIdx.y * a.m + i;
    float top = -INFINITY;
    for (int64_t j = threadIdx.x; j < k; j += THREADS) {
        float s = sum[j];
        for (int l = 1; l < a.L; l++) s += sum[l * a.layer_stride + j];
        sum[j] = s;
        if (s > top || isnan(s)) top = s; /* lending makes no score higher than the highest */
    }
    if (a.reach) {
        __syncthreads();
        for (int64_t j = threadIdx.x; j < k; j += THREADS) z[j] = continued(a, sum, j, from);
    }
    double loss = 0;
    if (a.kind == LSA_STEP_KL) {
        top = block_max(top);
        double e = 0;
        for (int64_t j = threadIdx.x; j < k; j += THREADS) e += (double)__expf(z[j] - top);
        const float lse = top + (float)log(lsa_block_sum(e));
        for (int64_t j = threadIdx.x; j < k; j += THREADS) {
            const float ls = z[j] - lse, t = y[j];
            if (t > 0) loss += (double)(t * (logf(t) - ls));
            z[j] = w > 0.0f ? w * (__expf(ls) - t) : 0.0f;
        }
        loss = w > 0.0f ? loss * (double)w : 0.0;
    } else if (a.kind == LSA_STEP_BCE || a.kind == LSA_STEP_FOCAL) {
        for (int64_t j = threadIdx.x; j < k; j += THREADS) {
            float g;
            const float wt = a.weight[i * a.n + j];
            loss += (double)(wt * loss_point(z[j], y[j] * (1.0f - 2.0f * a.smoothing) + a.smoothing,
                                             a.kind == LSA_STEP_FOCAL, &g));
            z[j] = wt * g;
        }
    } else {
        float *const copy = a.copy + ((int64_t)blockIdx.y * a.m + i) * a.n;
        for (int64_t j = threadIdx.x; j < k; j += THREADS) copy[j] = z[j];
        __syncthreads();
        loss = pair_row(a, copy, y, k, z);
    }
    if (a.reach) lend_back(a, i, k, z, from, sum);
    float most = 0;
    for (int64_t j = threadIdx.x; j < k; j += THREADS) { /* a thread's own columns */
        const float g = fabsf(sum[j]);
        if (g > most || isnan(g)) most = g;
    }
    most = block_max(most);
    loss = lsa_block_sum(loss);
    if (threadIdx.x == 0) {
        *out = loss * (double)*a.scale;
        a.bound[(int64_t)blockIdx.y * a.m + i] =
            exp2f(ceilf(log2f(fmaxf(most, 1e-20f))) + (most - most)); /* NaN stays */
    }
}

lsa_status step_loss(lsa_gpu_step *s, int64_t first, lsa_err *err) {
    const lsa_gpu_opts *o = &s->o;
    const int64_t m = o->micro, n = o->columns;
    loss_args a = {};
    a.m = (int)m;
    a.L = o->on_sum ? s->g.n_layer : 1;
    a.n = n;
    a.layer_stride = m * n;
    a.kind = o->loss;
    a.smoothing = o->smoothing;
    a.margin = o->margin;
    a.z = s->z;
    a.y = s->y + first * n;
    a.weight = s->weight ? s->weight + first * n : NULL;
    a.row_weight = o->loss == LSA_STEP_KL ? s->row_weight + first : NULL;
    a.n_cand = s->n_cand + first;
    a.scale = &s->control->loss_scale;
    a.row_loss = s->row_loss + first * (o->on_sum ? 1 : s->g.n_layer);
    a.copy = s->zcopy;
    a.bound = s->bound;
    a.reach = s->g.reach;
    a.cost = s->p + s->at_costs;
    a.from = s->from;
    a.cost_part = s->cost_part + first * s->g.reach;
    loss_k<<<dim3((unsigned)m, o->on_sum ? 1u : (unsigned)s->g.n_layer), THREADS, 0, s->cs->stream>>>(a);
    LSA_LAUNCHED("loss");
}

/* ---- norm and control ---- */

/* Four elements; the norm gains' are always in f32. */
template <bool NARROW>
static __device__ __forceinline__ float4 load_gradient(const float *g, const bf16 *g16, int64_t at,
                                                       bool gain) {
    if (!NARROW || gain) return __ldcs((const float4 *)(g + at));
    const uint2 h = __ldcs((const uint2 *)(g16 + at));
    return make_float4(__uint_as_float(h.x << 16), __uint_as_float(h.x & 0xffff0000u),
                       __uint_as_float(h.y << 16), __uint_as_float(h.y & 0xffff0000u));
}

static __global__ void __launch_bounds__(THREADS) sumsq_k(const float4 *g, int64_t n4, double *part) {
    double total = 0;
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (; i + 3 * step < n4; i += 4 * step) {
        const float4 a = __ldcs(g + i), b = __ldcs(g + i + step), c = __ldcs(g + i + 2 * step),
                     d = __ldcs(g + i + 3 * step);
        total += (double)(a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z +
                          b.w * b.w + c.x * c.x + c.y * c.y + c.z * c.z + c.w * c.w + d.x * d.x + d.y * d.y +
                          d.z * d.z + d.w * d.w);
    }
    for (; i < n4; i += step) {
        const float4 a = g[i];
        total += (double)(a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w);
    }
    total = lsa_block_sum(total);
    if (threadIdx.x == 0) part[blockIdx.x] = total;
}

/* Without the norm gains, which all ranks hold and one counts. */
void step_drop_gain(lsa_gpu_shard *s) {
    lsa_gpu_shard kept = {};
    for (int i = 0; i < s->n_piece; i++) {
        lsa_gpu_piece p = s->piece[i];
        if (p.gain) continue;
        p.at = kept.own;
        kept.own += p.n;
        kept.piece[kept.n_piece++] = p;
    }
    *s = kept;
}

/* The same over this rank's pieces of the layers; NARROW: of the gradient exchanged in bf16. */
template <bool NARROW>
static __global__ void __launch_bounds__(THREADS)
    sumsq_own_k(const float *g, const bf16 *g16, int64_t layer_param, int64_t gain0, int64_t gain1,
                int64_t n_layer, const __grid_constant__ lsa_gpu_shard own, double *part) {
    double total = 0;
    const int64_t own4 = own.own / 4, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n_layer * own4; i += step) {
        const int64_t l = i / own4;
        const int64_t place = step_own_place(own, 4 * (i - l * own4));
        const float4 a =
            load_gradient<NARROW>(g, g16, l * layer_param + place, place >= gain0 && place < gain1);
        total += (double)(a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w);
    }
    total = lsa_block_sum(total);
    if (threadIdx.x == 0) part[blockIdx.x] = total;
}

/* Gradient of the costs: every window's part, in their order. */
static __global__ void __launch_bounds__(32)
    costs_grad_k(const double *part, int64_t B, int reach, float *grad) {
    for (int j = threadIdx.x; j < reach; j += 32) {
        double s = 0;
        for (int64_t i = 0; i < B; i++) s += part[i * reach + j];
        grad[j] = (float)-s;
    }
}
lsa_status step_costs_grad(lsa_gpu_step *s, lsa_err *err) {
    if (!s->g.reach) return LSA_OK;
    costs_grad_k<<<1, 32, 0, s->cs->stream>>>(s->cost_part, s->o.batch, s->g.reach, s->grad + s->at_costs);
    LSA_LAUNCHED("costs");
}

static __global__ void __launch_bounds__(THREADS)
    totals_k(const double *part, const double *row_loss, int64_t n_loss, const float *costs, int n_cost,
             double *total) {
    double s = 0, loss = 0;
    for (int i = threadIdx.x; i < n_cost; i += THREADS) s += (double)costs[i] * (double)costs[i];
    for (int i = threadIdx.x; i < STEP_PARTIALS; i += THREADS) s += part[i];
    for (int64_t i = threadIdx.x; i < n_loss; i += THREADS) loss += row_loss[i];
    s = lsa_block_sum(s);
    loss = lsa_block_sum(loss);
    if (threadIdx.x == 0) total[0] = s, total[1] = loss;
}

struct control_args {
    const double *total;
    const step_desc *desc;
    step_control *control;
    lsa_gpu_result *result;
    float beta1, beta2, weight_decay, clip;
};

static __global__ void control_k(const __grid_constant__ control_args a) {
    const double loss = a.total[1];
    step_control *const c = a.control;
    const int64_t slot = c->launched % LSA_GPU_FLIGHT;
    const float lr = a.desc[slot].lr;
    const double norm = sqrt(a.total[0]);
    c->skip = !isfinite(loss) || !isfinite(norm);
    if (!c->skip) c->updates++;
    const double t = (double)c->updates;
    c->grad_scale = a.clip > 0 && norm > (double)a.clip ? (float)((double)a.clip / (norm + 1e-6)) : 1.0f;
    c->step_size = (float)((double)lr / (1.0 - pow((double)a.beta1, t)));
    c->root_c2 = (float)(1.0 / sqrt(1.0 - pow((double)a.beta2, t)));
    c->decay = 1.0f - lr * a.weight_decay;
    lsa_gpu_result *const r = a.result + slot;
    r->loss = loss;
    r->grad_norm = norm;
    r->skipped = c->skip;
    r->updates = c->updates;
    c->launched++;
}

lsa_status step_norm_and_control(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_opts *o = &s->o;
    const cudaStream_t stream = s->cs->stream;
    if (!s->ranks)
        sumsq_k<<<STEP_PARTIALS, THREADS, 0, stream>>>((const float4 *)s->grad, s->at_costs / 4, s->partial);
    else if (s->g16)
        sumsq_own_k<true><<<STEP_PARTIALS, THREADS, 0, stream>>>(s->grad, s->g16, s->layer_param, s->at_gn,
                                                                 s->at_gn + s->g.rank, s->g.n_layer, s->norm,
                                                                 s->partial);
    else
        sumsq_own_k<false><<<STEP_PARTIALS, THREADS, 0, stream>>>(
            s->grad, NULL, s->layer_param, s->at_gn, s->at_gn + s->g.rank, s->g.n_layer, s->norm, s->partial);
    totals_k<<<1, THREADS, 0, stream>>>(s->partial, s->row_loss, o->batch * (o->on_sum ? 1 : s->g.n_layer),
                                        s->grad + s->at_costs, step_ranks_first(s) ? s->g.reach : 0,
                                        s->total + 1);
    LSA_TRY(step_ranks_add(s, s->total + 1, 2, err));
    control_k<<<1, 1, 0, stream>>>({s->total + 1, (const step_desc *)s->desc, s->control, s->result, o->beta1,
                                    o->beta2, o->weight_decay, o->clip});
    LSA_LAUNCHED("norm");
done:
    return st;
}

/* ---- AdamW over all tensors: one launch; grid.y is the layer ---- */

struct adamw_args {
    int64_t layer_param, gain0, gain1; /* the norm gains inside a layer: not decayed unless asked for */
    float beta1, beta2, eps;
    bool decay_gain;
    const float *g;
    const bf16 *g16;
    float *p, *m, *v;
    bf16 *m16, *v16, *p16;
    const step_control *control;
    lsa_gpu_shard own;
};

static __device__ __forceinline__ void adam(float &p, float g, float &m, float &v, const adamw_args &a,
                                            float scale, float step, float c2, float decay) {
    g *= scale;
    m = a.beta1 * m + (1.0f - a.beta1) * g;
    v = a.beta2 * v + (1.0f - a.beta2) * g * g;
    p = p * decay - step * m / (sqrtf(v) * c2 + a.eps);
}

/* f32 -> bf16 with the low half of r deciding: unbiased, so that small changes of the second moment are not
 * lost. */
static __device__ __forceinline__ bf16 round_random(float x, uint32_t r) {
    uint32_t u = __float_as_uint(x);
    if ((u & 0x7f800000u) != 0x7f800000u) u += r & 0xffffu;
    return __ushort_as_bfloat16((unsigned short)(u >> 16));
}
static __device__ __forceinline__ uint32_t mix32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* SHORT: bf16 moments; NARROW: the gradient was exchanged in bf16. */
template <bool SHORT, bool NARROW>
static __global__ void __launch_bounds__(THREADS) adamw_k(const __grid_constant__ adamw_args a) {
    const int64_t own = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
    const step_control c = *a.control;
    if (c.skip || own >= a.own.own) return;
    const int64_t i = step_own_place(a.own, own), at = (int64_t)blockIdx.y * a.layer_param + i,
                  moment = (int64_t)blockIdx.y * a.own.own + own;
    const bool gain = i >= a.gain0 && i < a.gain1;
    const float decay = gain && !a.decay_gain ? 1.0f : c.decay;
    const float4 g = load_gradient<NARROW>(a.g, a.g16, at, gain);
    float4 p = __ldcs((const float4 *)(a.p + at)), m, v;
    if (SHORT) {
        const uint2 hm = __ldcs((const uint2 *)(a.m16 + moment)),
                    hv = __ldcs((const uint2 *)(a.v16 + moment));
        m = make_float4(__uint_as_float(hm.x << 16), __uint_as_float(hm.x & 0xffff0000u),
                        __uint_as_float(hm.y << 16), __uint_as_float(hm.y & 0xffff0000u));
        v = make_float4(__uint_as_float(hv.x << 16), __uint_as_float(hv.x & 0xffff0000u),
                        __uint_as_float(hv.y << 16), __uint_as_float(hv.y & 0xffff0000u));
    } else {
        m = __ldcs((const float4 *)(a.m + moment));
        v = __ldcs((const float4 *)(a.v + moment));
    }
    adam(p.x, g.x, m.x, v.x, a, c.grad_scale, c.step_size, c.root_c2, decay);
    adam(p.y, g.y, m.y, v.y, a, c.grad_scale, c.step_size, c.root_c2, decay);
    adam(p.z, g.z, m.z, v.z, a, c.grad_scale, c.step_size, c.root_c2, decay);
    adam(p.w, g.w, m.w, v.w, a, c.grad_scale, c.step_size, c.root_c2, decay);
    __stcs((float4 *)(a.p + at), p);
    if (SHORT) {
        const uint32_t r0 = mix32((uint32_t)at ^ mix32((uint32_t)(at >> 32) ^ mix32((uint32_t)c.updates))),
                       r1 = mix32(r0 + 1), r2 = mix32(r0 + 2), r3 = mix32(r0 + 3);
        bf16 hm[4] = {round_random(m.x, r0), round_random(m.y, r1), round_random(m.z, r2),
                      round_random(m.w, r3)};
        bf16 hv[4] = {round_random(v.x, r0 >> 16), round_random(v.y, r1 >> 16), round_random(v.z, r2 >> 16),
                      round_random(v.w, r3 >> 16)};
        __stcs((uint2 *)(a.m16 + moment), *(uint2 *)hm);
        __stcs((uint2 *)(a.v16 + moment), *(uint2 *)hv);
    } else {
        __stcs((float4 *)(a.m + moment), m);
        __stcs((float4 *)(a.v + moment), v);
    }
    __nv_bfloat162 h[2] = {__floats2bfloat162_rn(p.x, p.y), __floats2bfloat162_rn(p.z, p.w)};
    *(uint2 *)(a.p16 + at) = *(uint2 *)h;
}

/* The costs of the continuation, which every rank updates: no decay, and never below 0 (trainer/step.h). */
template <bool SHORT>
static __global__ void __launch_bounds__(LSA_MAX_REACH)
    costs_k(const __grid_constant__ adamw_args a, int64_t at_costs, int64_t at_moment, int reach) {
    const step_control c = *a.control;
    const int j = threadIdx.x;
    if (c.skip || j >= reach) return;
    const int64_t k = at_moment + j;
    float p = a.p[at_costs + j], m = SHORT ? __bfloat162float(a.m16[k]) : a.m[k],
          v = SHORT ? __bfloat162float(a.v16[k]) : a.v[k];
    adam(p, a.g[at_costs + j], m, v, a, c.grad_scale, c.step_size, c.root_c2, 1.0f);
    a.p[at_costs + j] = fmaxf(p, 0.0f);
    if (SHORT) {
        const uint32_t r = mix32((uint32_t)(at_costs + j) ^ mix32((uint32_t)c.updates));
        a.m16[k] = round_random(m, r);
        a.v16[k] = round_random(v, r >> 16);
    } else {
        a.m[k] = m;
        a.v[k] = v;
    }
}

lsa_status step_update(lsa_gpu_step *s, lsa_err *err) {
    const lsa_gpu_opts *o = &s->o;
    const adamw_args a = {s->layer_param, s->at_gn, s->at_gn + s->g.rank,
                          o->beta1,       o->beta2, o->eps,
                          o->decay_norm,  s->grad,  s->g16,
                          s->p,           s->m,     s->v,
                          s->m16,         s->v16,   s->p16,
                          s->control,     s->shard};
    const dim3 grid((unsigned)((s->shard.own / 4 + THREADS - 1) / THREADS), (unsigned)s->g.n_layer);
    if (o->bf16_moments && s->g16)
        adamw_k<true, true><<<grid, THREADS, 0, s->cs->stream>>>(a);
    else if (o->bf16_moments)
        adamw_k<true, false><<<grid, THREADS, 0, s->cs->stream>>>(a);
    else if (s->g16)
        adamw_k<false, true><<<grid, THREADS, 0, s->cs->stream>>>(a);
    else
        adamw_k<false, false><<<grid, THREADS, 0, s->cs->stream>>>(a);
    const int64_t moment = s->g.n_layer * s->shard.own;
    if (s->g.reach && o->bf16_moments)
        costs_k<true><<<1, LSA_MAX_REACH, 0, s->cs->stream>>>(a, s->at_costs, moment, s->g.reach);
    else if (s->g.reach)
        costs_k<false><<<1, LSA_MAX_REACH, 0, s->cs->stream>>>(a, s->at_costs, moment, s->g.reach);
    LSA_LAUNCHED("adamw");
}
