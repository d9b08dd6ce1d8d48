/* Losses on logits, the gradient's norm, the decision to update or skip, and AdamW. No value passes through
 * the host. */
#include <math.h>

#include "kernels/cuda/step/step_state.h"

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

static __global__ void __launch_bounds__(THREADS) loss_k(const __grid_constant__ loss_args a) {
    const int64_t i = blockIdx.x, k = a.n_cand[i];
    float *const z = a.z + (int64_t)blockIdx.y * a.layer_stride + i * a.n;
    const float *const y = a.y + i * a.n;
    const float w = a.row_weight ? a.row_weight[i] : 1.0f;
    double *const out = a.row_loss + (int64_t)blockIdx.y * a.m + i;
    float top = -INFINITY;
    for (int64_t j = threadIdx.x; j < k; j += THREADS) {
        float s = z[j];
        for (int l = 1; l < a.L; l++) s += z[l * a.layer_stride + j];
        z[j] = s;
        if (s > top || isnan(s)) top = s;
    }
    double loss = 0;
    if (a.kind == LSA_STEP_KL) {
        top = block_max(top);
        double e = 0;
        for (int64_t j = threadIdx.x; j < k; j += THREADS) e += (double)__expf(z[j] - top);
        const double sum = lsa_block_sum(e);
        const float lse = top + (float)log(sum);
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
    float most = 0;
    for (int64_t j = threadIdx.x; j < k; j += THREADS) { /* a thread's own columns */
        const float g = fabsf(z[j]);
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
    loss_k<<<dim3((unsigned)m, o->on_sum ? 1u : (unsigned)s->g.n_layer), THREADS, 0, s->cs->stream>>>(a);
    LSA_LAUNCHED("loss");
}

/* ---- norm and control ---- */

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

struct control_args {
    const double *part, *row_loss;
    int64_t n_loss;
    const step_desc *desc;
    step_control *control;
    lsa_gpu_result *result;
    float beta1, beta2, weight_decay, clip;
};

static __global__ void __launch_bounds__(THREADS) control_k(const __grid_constant__ control_args a) {
    double s = 0, loss = 0;
    for (int i = threadIdx.x; i < STEP_PARTIALS; i += THREADS) s += a.part[i];
    for (int64_t i = threadIdx.x; i < a.n_loss; i += THREADS) loss += a.row_loss[i];
    s = lsa_block_sum(s);
    loss = lsa_block_sum(loss);
    if (threadIdx.x != 0) return;
    step_control *const c = a.control;
    const int64_t slot = c->launched % LSA_GPU_FLIGHT;
    const float lr = a.desc[slot].lr;
    const double norm = sqrt(s);
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
    const lsa_gpu_opts *o = &s->o;
    sumsq_k<<<STEP_PARTIALS, THREADS, 0, s->cs->stream>>>((const float4 *)s->grad, s->n_param / 4,
                                                          s->partial);
    const control_args a = {s->partial,
                            s->row_loss,
                            o->batch * (o->on_sum ? 1 : s->g.n_layer),
                            (const step_desc *)s->desc,
                            s->control,
                            s->result,
                            o->beta1,
                            o->beta2,
                            o->weight_decay,
                            o->clip};
    control_k<<<1, THREADS, 0, s->cs->stream>>>(a);
    LSA_LAUNCHED("norm");
}

/* ---- AdamW over all tensors: one launch; grid.y is the layer ---- */

struct adamw_args {
    int64_t layer_param, gain0, gain1; /* the norm gains inside a layer: not decayed unless asked for */
    float beta1, beta2, eps;
    bool decay_gain;
    const float *g;
    float *p, *m, *v;
    bf16 *m16, *v16, *p16;
    const step_control *control;
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

template <bool SHORT>
static __global__ void __launch_bounds__(THREADS) adamw_k(const __grid_constant__ adamw_args a) {
    const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4,
                  at = (int64_t)blockIdx.y * a.layer_param + i;
    const step_control c = *a.control;
    if (c.skip || i >= a.layer_param) return;
    const float decay = i >= a.gain0 && i < a.gain1 && !a.decay_gain ? 1.0f : c.decay;
    const float4 g = __ldcs((const float4 *)(a.g + at));
    float4 p = __ldcs((const float4 *)(a.p + at)), m, v;
    if (SHORT) {
        const uint2 hm = __ldcs((const uint2 *)(a.m16 + at)), hv = __ldcs((const uint2 *)(a.v16 + at));
        m = make_float4(__uint_as_float(hm.x << 16), __uint_as_float(hm.x & 0xffff0000u),
                        __uint_as_float(hm.y << 16), __uint_as_float(hm.y & 0xffff0000u));
        v = make_float4(__uint_as_float(hv.x << 16), __uint_as_float(hv.x & 0xffff0000u),
                        __uint_as_float(hv.y << 16), __uint_as_float(hv.y & 0xffff0000u));
    } else {
        m = __ldcs((const float4 *)(a.m + at));
        v = __ldcs((const float4 *)(a.v + at));
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
        __stcs((uint2 *)(a.m16 + at), *(uint2 *)hm);
        __stcs((uint2 *)(a.v16 + at), *(uint2 *)hv);
    } else {
        __stcs((float4 *)(a.m + at), m);
        __stcs((float4 *)(a.v + at), v);
    }
    __nv_bfloat162 h[2] = {__floats2bfloat162_rn(p.x, p.y), __floats2bfloat162_rn(p.z, p.w)};
    *(uint2 *)(a.p16 + at) = *(uint2 *)h;
}

lsa_status step_update(lsa_gpu_step *s, lsa_err *err) {
    const lsa_gpu_opts *o = &s->o;
    const adamw_args a = {s->layer_param, s->at_gn, s->at_gn + s->g.rank,
                          o->beta1,       o->beta2, o->eps,
                          o->decay_norm,  s->grad,  s->p,
                          s->m,           s->v,     s->m16,
                          s->v16,         s->p16,   s->control};
    const dim3 grid((unsigned)((s->layer_param / 4 + THREADS - 1) / THREADS), (unsigned)s->g.n_layer);
    if (o->bf16_moments)
        adamw_k<true><<<grid, THREADS, 0, s->cs->stream>>>(a);
    else
        adamw_k<false><<<grid, THREADS, 0, s->cs->stream>>>(a);
    LSA_LAUNCHED("adamw");
}
