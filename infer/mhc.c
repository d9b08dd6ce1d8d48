/* Manifold-constrained hyper-connections (architecture notes 4): n residual streams are collapsed into one
 * input by learned weights and expanded again by a doubly-stochastic matrix C.
 *
 * The mistake that would stay silent: applying C untransposed (the sum runs over its first index). */
#include <string.h>

#include "infer/engine.h"
#include "infer/numeric.h"
#include "kernels/cpu/gemm.h"

#define MAX_STREAMS 16

static float sigmoid(float v) {
    return 1.0f / (1.0f + expf(-v));
}

/* Row softmax, then alternating column and row normalisation, ending on columns. c is n x n, row-major, in
 * place. */
static void sinkhorn(float *c, int32_t n, int32_t iters, float eps) {
    for (int32_t j = 0; j < n; j++) {
        float m = c[j * n], s = 0.0f;
        for (int32_t k = 1; k < n; k++) m = fmaxf(m, c[j * n + k]);
        for (int32_t k = 0; k < n; k++) s += c[j * n + k] = expf(c[j * n + k] - m);
        for (int32_t k = 0; k < n; k++) c[j * n + k] = c[j * n + k] / s + eps;
    }
    for (int32_t it = 0; it < iters; it++) {
        if (it > 0)
            for (int32_t j = 0; j < n; j++) {
                float s = eps;
                for (int32_t k = 0; k < n; k++) s += c[j * n + k];
                for (int32_t k = 0; k < n; k++) c[j * n + k] /= s;
            }
        for (int32_t k = 0; k < n; k++) {
            float s = eps;
            for (int32_t j = 0; j < n; j++) s += c[j * n + k];
            for (int32_t j = 0; j < n; j++) c[j * n + k] /= s;
        }
    }
}

static float stream_rms(const lsa_engine *e, const float *v, int64_t n) {
    return 1.0f / sqrtf(lsa_dot(v, v, n) / (float)n + e->c.norm_eps);
}

static void mix(const float *pre, const float *X, int32_t n, int64_t d, float *y) {
    for (int64_t i = 0; i < d; i++) y[i] = pre[0] * X[i];
    for (int32_t j = 1; j < n; j++)
        for (int64_t i = 0; i < d; i++) y[i] += pre[j] * X[j * d + i];
}

void lsa_mhc_collapse(const lsa_engine *e, const mhc_weights *w, const float *X, int64_t n, float *z,
                      float *coef, float *out) {
    const int32_t s = e->c.hc_mult, nz = s * (s + 2);
    const int64_t d = e->c.hidden;
    lsa_gemm_nt(n, nz, s * d, 1.0f, X, s * d, w->fn, s * d, 0.0f, z, nz);
    for (int64_t t = 0; t < n; t++) {
        float r = stream_rms(e, X + t * s * d, s * d), *zt = z + t * nz, *ct = coef + t * nz;
        for (int32_t i = 0; i < nz; i++) {
            float scale = w->scale[i < s ? 0 : i < 2 * s ? 1 : 2];
            float v = zt[i] * r * scale + w->base[i];
            ct[i] = i < s ? sigmoid(v) + 1e-6f : i < 2 * s ? 2.0f * sigmoid(v) : v;
        }
        sinkhorn(ct + 2 * s, s, e->c.hc_iters, e->c.hc_eps);
        mix(ct, X + t * s * d, s, d, out + t * d);
    }
}

void lsa_mhc_expand(const lsa_engine *e, const float *coef, const float *o, int64_t n, float *X) {
    const int32_t s = e->c.hc_mult, nz = s * (s + 2);
    const int64_t d = e->c.hidden;
    for (int64_t t = 0; t < n; t++) {
        const float *post = coef + t * nz + s, *C = coef + t * nz + 2 * s, *ot = o + t * d;
        float *Xt = X + t * s * d;
        for (int64_t i = 0; i < d; i++) {
            float old[MAX_STREAMS];
            for (int32_t j = 0; j < s; j++) old[j] = Xt[j * d + i];
            for (int32_t k = 0; k < s; k++) {
                float v = post[k] * ot[i];
                for (int32_t j = 0; j < s; j++) v += C[j * s + k] * old[j];
                Xt[k * d + i] = v;
            }
        }
    }
}

void lsa_mhc_head(const lsa_engine *e, const float *X, int64_t n, float *z, float *out) {
    const int32_t s = e->c.hc_mult;
    const int64_t d = e->c.hidden;
    lsa_gemm_nt(n, s, s * d, 1.0f, X, s * d, e->hc_head_fn, s * d, 0.0f, z, s);
    for (int64_t t = 0; t < n; t++) {
        float r = stream_rms(e, X + t * s * d, s * d), pre[MAX_STREAMS];
        for (int32_t j = 0; j < s; j++)
            pre[j] = sigmoid(z[t * s + j] * r * e->hc_head_scale[0] + e->hc_head_base[j]) + 1e-6f;
        mix(pre, X + t * s * d, s, d, out + t * d);
    }
}
