/* Hyper-connections: n residual streams collapsed into one input and expanded again (architecture notes 4),
 * and the norms that follow the collapse. One block a token.
 *
 * The mistake that would stay silent: applying C untransposed (the sum runs over its first index). */
#include "kernels/cuda/teacher/teacher_state.h"

enum { THREADS = TEACHER_THREADS, MAX = TEACHER_STREAMS };

static __global__ void embed_k(const int32_t *token, const float *embed, int s, int64_t d, float *X) {
    const int64_t t = blockIdx.x;
    for (int64_t i = threadIdx.x; i < s * d; i += THREADS) X[t * s * d + i] = embed[token[t] * d + i % d];
}

static __device__ float sigmoid(float v) {
    return 1.0f / (1.0f + expf(-v));
}

/* Row softmax, then alternating column and row normalisation, ending on columns. By one thread. */
static __device__ void sinkhorn(float *c, int n, int iters, float eps) {
    for (int j = 0; j < n; j++) {
        float m = c[j * n], s = 0.0f;
        for (int k = 1; k < n; k++) m = fmaxf(m, c[j * n + k]);
        for (int k = 0; k < n; k++) s += c[j * n + k] = expf(c[j * n + k] - m);
        for (int k = 0; k < n; k++) c[j * n + k] = c[j * n + k] / s + eps;
    }
    for (int it = 0; it < iters; it++) {
        for (int j = 0; it > 0 && j < n; j++) {
            float s = eps;
            for (int k = 0; k < n; k++) s += c[j * n + k];
            for (int k = 0; k < n; k++) c[j * n + k] /= s;
        }
        for (int k = 0; k < n; k++) {
            float s = eps;
            for (int j = 0; j < n; j++) s += c[j * n + k];
            for (int j = 0; j < n; j++) c[j * n + k] /= s;
        }
    }
}

struct collapse_args {
    const float *X, *z, *base, *scale, *norm;
    float *coef, *x; /* coef NULL: the head's, which has no expansion */
    int s, iters;
    int64_t d;
    float hc_eps, norm_eps;
};

static __global__ void __launch_bounds__(THREADS) collapse_k(const __grid_constant__ collapse_args a) {
    __shared__ float c[MAX * (MAX + 2)];
    const int64_t t = blockIdx.x, width = a.s * a.d;
    const int s = a.s, nz = a.coef ? s * (s + 2) : s;
    const float *const X = a.X + t * width;
    float sq = 0;
    for (int64_t i = threadIdx.x; i < width; i += THREADS) sq += X[i] * X[i];
    const float r = 1.0f / sqrtf(block_sum(sq) / (float)width + a.norm_eps);
    for (int i = threadIdx.x; i < nz; i += THREADS) {
        const float v = a.z[t * nz + i] * r * a.scale[i < s ? 0 : i < 2 * s ? 1 : 2] + a.base[i];
        c[i] = i < s ? sigmoid(v) + 1e-6f : i < 2 * s ? 2.0f * sigmoid(v) : v;
    }
    __syncthreads();
    if (threadIdx.x == 0 && a.coef) sinkhorn(c + 2 * s, s, a.iters, a.hc_eps);
    __syncthreads();
    for (int i = threadIdx.x; i < nz && a.coef; i += THREADS) a.coef[t * nz + i] = c[i];
    float *const x = a.x + t * a.d;
    sq = 0;
    for (int64_t i = threadIdx.x; i < a.d; i += THREADS) {
        float y = c[0] * X[i];
        for (int j = 1; j < s; j++) y += c[j] * X[j * a.d + i];
        x[i] = y;
        sq += y * y;
    }
    const float n = 1.0f / sqrtf(block_sum(sq) / (float)a.d + a.norm_eps);
    for (int64_t i = threadIdx.x; i < a.d; i += THREADS) x[i] = a.norm[i] * (x[i] * n);
}

static __global__ void __launch_bounds__(THREADS)
    expand_k(const float *coef, const float *y, int s, int64_t d, float *X) {
    const int64_t t = blockIdx.x;
    const float *const post = coef + t * s * (s + 2) + s, *const C = post + s;
    float *const Xt = X + t * s * d;
    for (int64_t i = threadIdx.x; i < d; i += THREADS) {
        float old[MAX];
        for (int j = 0; j < s; j++) old[j] = Xt[j * d + i];
        for (int k = 0; k < s; k++) {
            float v = post[k] * y[t * d + i];
            for (int j = 0; j < s; j++) v += C[j * s + k] * old[j];
            Xt[k * d + i] = v;
        }
    }
}

lsa_status teacher_embed(lsa_gpu_teacher *t, lsa_err *err) {
    embed_k<<<(unsigned)t->n, THREADS, 0, t->cs->stream>>>(t->token, t->table.embed, t->g.hc_mult,
                                                           t->g.hidden, t->X);
    LSA_LAUNCHED("embed");
}

static lsa_status collapse(lsa_gpu_teacher *t, int64_t p, int64_t m, int64_t nz, const float *fn,
                           const float *base, const float *scale, const float *norm, float *coef,
                           lsa_err *err) {
    const int64_t width = t->g.hc_mult * (int64_t)t->g.hidden;
    const float *const X = t->X + p * width;
    const lsa_status st = teacher_gemm(t, m, nz, width, X, fn, 0, t->z, err);
    if (st != LSA_OK) return st;
    const collapse_args a = {X,    t->z,         base,          scale,       norm,        coef,
                             t->x, t->g.hc_mult, t->g.hc_iters, t->g.hidden, t->g.hc_eps, t->g.norm_eps};
    collapse_k<<<(unsigned)m, THREADS, 0, t->cs->stream>>>(a);
    LSA_LAUNCHED("collapse");
}

lsa_status teacher_collapse(lsa_gpu_teacher *t, int64_t p, int64_t m, const float *fn, const float *base,
                            const float *scale, const float *norm, lsa_err *err) {
    return collapse(t, p, m, t->nz, fn, base, scale, norm, t->coef, err);
}

lsa_status teacher_head(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err) {
    return collapse(t, p, m, t->g.hc_mult, t->table.head_fn, t->table.head_base, t->table.head_scale,
                    t->table.norm, NULL, err);
}

lsa_status teacher_expand(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err) {
    expand_k<<<(unsigned)m, THREADS, 0, t->cs->stream>>>(t->coef, t->y, t->g.hc_mult, t->g.hidden,
                                                         t->X + p * t->g.hc_mult * (int64_t)t->g.hidden);
    LSA_LAUNCHED("expand");
}
