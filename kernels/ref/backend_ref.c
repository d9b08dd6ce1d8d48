/* The truth column: scalar, double accumulation, one thread, never optimised. Judged by PyTorch fixtures and
 * finite differences; judges the cpu and cuda columns. */
#include <math.h>

#include "kernels/backend.h"
#include "kernels/core/dtype.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/host_memory.h"
#include "kernels/ref/rows.h"

static lsa_status gemm(lsa_ctx *c, const lsa_gemm_args *a, lsa_err *err) {
    (void)c, (void)err;
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t j = 0; j < a->n; j++) {
            double s = 0;
            for (int64_t p = 0; p < a->k; p++)
                s += (double)a->a[a->trans_a ? p * a->m + i : i * a->k + p] *
                     (double)a->b[a->trans_b ? j * a->k + p : p * a->n + j];
            s *= (double)a->alpha;
            float *o = a->c + i * a->n + j;
            *o = (float)(a->beta == 0.0f ? s : s + (double)*o);
        }
    return LSA_OK;
}

/* k . q of one candidate and head, in double. */
static double product(const float *key, const float *q, int64_t d) {
    double s = 0;
    for (int64_t i = 0; i < d; i++) s += (double)key[i] * (double)q[i];
    return s;
}

static double relu(double p) { /* NaN stays NaN */
    return p < 0 ? 0 : p;
}

static lsa_status indexer_score_fwd(lsa_ctx *c, const lsa_indexer_score_fwd_args *a, lsa_err *err) {
    (void)c, (void)err;
    float key[128];
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t j = 0; j < a->n; j++) {
            double z = 0;
            if (j < a->n_cand[i]) {
                lsa_key_decode(key, a->keys + lsa_key_row(a->key_base, a->cand, a->n, a->n_key, i, j) *
                                                  LSA_KEY_BYTES);
                for (int64_t h = 0; h < a->n_head; h++) {
                    const double p = product(key, a->q + (i * a->n_head + h) * a->d, a->d);
                    z += (double)a->w[i * a->n_head + h] * relu(p);
                }
            }
            float *o = a->z + i * a->n + j;
            *o = (float)(a->accumulate ? z + (double)*o : z);
        }
    return LSA_OK;
}

static lsa_status indexer_score_bwd(lsa_ctx *c, const lsa_indexer_score_bwd_args *a, lsa_err *err) {
    (void)c, (void)err;
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t h = 0; h < a->n_head; h++) {
            const float *q = a->q + (i * a->n_head + h) * a->d;
            double dw = 0, dq[128] = {0};
            float key[128];
            for (int64_t j = 0; j < a->n_cand[i] && j < a->n; j++) {
                lsa_key_decode(key, a->keys + lsa_key_row(a->key_base, a->cand, a->n, a->n_key, i, j) *
                                                  LSA_KEY_BYTES);
                const double p = product(key, q, a->d), g = (double)a->dz[i * a->n + j];
                dw += g * relu(p);
                if (!(p > 0)) continue; /* the slope at 0 is 0 */
                for (int64_t x = 0; x < a->d; x++) dq[x] += g * (double)key[x];
            }
            a->dw[i * a->n_head + h] = (float)dw;
            for (int64_t x = 0; x < a->d; x++)
                a->dq[(i * a->n_head + h) * a->d + x] = (float)((double)a->w[i * a->n_head + h] * dq[x]);
        }
    return LSA_OK;
}

#define ROWS(op, call)                                                                                       \
    static lsa_status op(lsa_ctx *c, const lsa_##op##_args *a, lsa_err *err) {                               \
        (void)c, (void)err;                                                                                  \
        for (int64_t i = 0; i < a->m; i++) call(a, i);                                                       \
        return LSA_OK;                                                                                       \
    }
ROWS(rmsnorm_fwd, lsa_row_rmsnorm_fwd)
ROWS(rope_hadamard, lsa_row_rope_hadamard)
ROWS(prior_fwd, lsa_row_prior_fwd)
ROWS(continuation_fwd, lsa_row_continuation_fwd)
ROWS(loss_pointwise, lsa_row_loss_pointwise)
ROWS(loss_pairwise, lsa_row_loss_pairwise)
ROWS(loss_kl, lsa_row_loss_kl)

static lsa_status prior_bwd(lsa_ctx *c, const lsa_prior_bwd_args *a, lsa_err *err) {
    (void)c, (void)err;
    for (int k = 0; k < LSA_PRIOR_WEIGHTS; k++) a->dweight[k] = lsa_col_prior_dweight(a, k);
    return LSA_OK;
}

static lsa_status continuation_bwd(lsa_ctx *c, const lsa_continuation_bwd_args *a, lsa_err *err) {
    (void)c, (void)err;
    for (int32_t j = 1; j <= a->reach; j++) {
        double s = 0;
        for (int64_t i = 0; i < a->m; i++)
            for (int64_t k = 0; k < a->n_cand[i] && k < a->n; k++)
                if (a->from[i * a->n + k] == j) s += (double)a->dout[i * a->n + k];
        a->dcost[j - 1] = (float)-s;
    }
    for (int64_t i = 0; i < a->m; i++) lsa_row_continuation_dz(a, i);
    return LSA_OK;
}

static lsa_status rmsnorm_bwd(lsa_ctx *c, const lsa_rmsnorm_bwd_args *a, lsa_err *err) {
    (void)c, (void)err;
    for (int64_t j = 0; j < a->r; j++) lsa_col_rmsnorm_dg(a, j); /* before dx: dx may alias dy */
    for (int64_t i = 0; a->dx && i < a->m; i++) lsa_row_rmsnorm_dx(a, i);
    return LSA_OK;
}

static lsa_status sumsq(lsa_ctx *c, const lsa_sumsq_args *a, lsa_err *err) {
    (void)c, (void)err;
    double s = 0;
    for (int64_t i = 0; i < a->n; i++) s += (double)a->x[i] * (double)a->x[i];
    *a->out = s;
    return LSA_OK;
}

static lsa_status adamw(lsa_ctx *c, const lsa_adamw_args *a, lsa_err *err) {
    (void)c, (void)err;
    const double b1 = (double)a->beta1, b2 = (double)a->beta2;
    const double c1 = 1 - pow(b1, (double)a->t), c2 = 1 - pow(b2, (double)a->t);
    for (int64_t i = 0; i < a->n; i++) {
        const double g = (double)a->grad_scale * (double)a->g[i];
        const double m = b1 * (double)a->m[i] + (1 - b1) * g, v = b2 * (double)a->v[i] + (1 - b2) * g * g;
        double p = (double)a->p[i] * (1 - (double)a->lr * (double)a->weight_decay);
        p -= (double)a->lr * (m / c1) / (sqrt(v / c2) + (double)a->eps);
        a->m[i] = (float)m;
        a->v[i] = (float)v;
        a->p[i] = (float)p;
    }
    return LSA_OK;
}

#define LSA_OP(op) .op = op,
const lsa_backend lsa_backend_ref = {
    .name = "ref",
    LSA_HOST_MEMORY,
#include "kernels/ops.def"
};
