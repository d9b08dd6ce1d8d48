/* The fast CPU column: fixed partitions over OpenMP, matrix products through gemm.h. Same bits for any number
 * of threads.
 *
 * Rows that are cheap next to the products run the truth's own row functions in parallel. */
#include <math.h>
#include <string.h>

#include "kernels/backend.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/score.h"
#include "kernels/host_memory.h"
#include "kernels/continuation.h"
#include "kernels/prior.h"
#include "kernels/ref/rows.h"

enum { ROWS_PER_BLOCK = 32, BLOCK = 65536 };

static lsa_status gemm(lsa_ctx *c, const lsa_gemm_args *a, lsa_err *err) {
    (void)c, (void)err;
    const int64_t nb = lsa_ceil_div(a->m, ROWS_PER_BLOCK);
#pragma omp parallel for schedule(dynamic, 1) if (nb > 1)
    for (int64_t b = 0; b < nb; b++) {
        const int64_t i = b * ROWS_PER_BLOCK, m = lsa_min_i64(ROWS_PER_BLOCK, a->m - i);
        float *o = a->c + i * a->n;
        if (a->k == 0) {
            if (a->beta == 0.0f) memset(o, 0, (size_t)(m * a->n) * sizeof *o);
        } else if (a->trans_a) {
            /* A is [k, m]: the block is a column range, transposed inside the product */
            if (a->trans_b) {
                for (int64_t r = 0; r < m; r++)
                    for (int64_t j = 0; j < a->n; j++) {
                        float s = 0.0f;
                        for (int64_t p = 0; p < a->k; p++) s += a->a[p * a->m + i + r] * a->b[j * a->k + p];
                        o[r * a->n + j] = a->alpha * s + (a->beta == 0.0f ? 0.0f : o[r * a->n + j]);
                    }
            } else {
                lsa_gemm_tn(m, a->n, a->k, a->alpha, a->a + i, a->m, a->b, a->n, a->beta, o, a->n);
            }
        } else if (a->trans_b) {
            lsa_gemm_nt(m, a->n, a->k, a->alpha, a->a + i * a->k, a->k, a->b, a->k, a->beta, o, a->n);
        } else {
            lsa_gemm_nn(m, a->n, a->k, a->alpha, a->a + i * a->k, a->k, a->b, a->n, a->beta, o, a->n);
        }
    }
    return LSA_OK;
}

#define ROWS(op, call)                                                                                       \
    static lsa_status op(lsa_ctx *c, const lsa_##op##_args *a, lsa_err *err) {                               \
        (void)c, (void)err;                                                                                  \
        _Pragma("omp parallel for schedule(dynamic, 4) if (a->m > 1)") for (int64_t i = 0; i < a->m; i++)    \
            call(a, i);                                                                                      \
        return LSA_OK;                                                                                       \
    }
ROWS(rmsnorm_fwd, lsa_row_rmsnorm_fwd)
ROWS(rope_hadamard, lsa_row_rope_hadamard)
ROWS(loss_pointwise, lsa_row_loss_pointwise)
ROWS(loss_pairwise, lsa_row_loss_pairwise)
ROWS(loss_kl, lsa_row_loss_kl)

static lsa_status rmsnorm_bwd(lsa_ctx *c, const lsa_rmsnorm_bwd_args *a, lsa_err *err) {
    (void)c, (void)err;
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < a->r; j++) lsa_col_rmsnorm_dg(a, j);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < (a->dx ? a->m : 0); i++) lsa_row_rmsnorm_dx(a, i);
    return LSA_OK;
}

static lsa_status indexer_score_fwd(lsa_ctx *c, const lsa_indexer_score_fwd_args *a, lsa_err *err) {
    (void)c;
    return lsa_cpu_score_fwd(a, err);
}
static lsa_status indexer_score_bwd(lsa_ctx *c, const lsa_indexer_score_bwd_args *a, lsa_err *err) {
    (void)c;
    return lsa_cpu_score_bwd(a, err);
}

static lsa_status prior_fwd(lsa_ctx *c, const lsa_prior_fwd_args *a, lsa_err *err) {
    (void)c, (void)err;
#pragma omp parallel for schedule(static) if (a->m > 1)
    for (int64_t i = 0; i < a->m; i++) {
        float *z = a->z + i * a->n;
        const float *recent = a->recent + i * a->n, *memory = a->memory + i * a->n;
        for (int64_t j = 0; j < a->n_cand[i] && j < a->n; j++)
            z[j] += lsa_prior_value(a->weight, recent[j], memory[j]);
    }
    return LSA_OK;
}

static lsa_status prior_bwd(lsa_ctx *c, const lsa_prior_bwd_args *a, lsa_err *err) {
    (void)c;
    lsa_status st = LSA_OK;
    double *sum = NULL; /* [m, 2] */
    LSA_TRY(LSA_NEW(sum, a->m * LSA_PRIOR_WEIGHTS, err));
#pragma omp parallel for schedule(static) if (a->m > 1)
    for (int64_t i = 0; i < a->m; i++) {
        double s0 = 0, s1 = 0;
        for (int64_t j = i * a->n, end = j + lsa_min_i64(a->n_cand[i], a->n); j < end; j++) {
            s0 += (double)a->dz[j] * (double)a->recent[j];
            s1 += (double)a->dz[j] * (double)a->memory[j];
        }
        sum[i * LSA_PRIOR_WEIGHTS] = s0, sum[i * LSA_PRIOR_WEIGHTS + 1] = s1;
    }
    for (int k = 0; k < LSA_PRIOR_WEIGHTS; k++) {
        double s = 0;
        for (int64_t i = 0; i < a->m; i++) s += sum[i * LSA_PRIOR_WEIGHTS + k];
        a->dweight[k] = (float)s;
    }
done:
    lsa_free(sum);
    return st;
}

static lsa_status continuation_fwd(lsa_ctx *c, const lsa_continuation_fwd_args *a, lsa_err *err) {
    (void)c, (void)err;
#pragma omp parallel for schedule(dynamic, 4) if (a->m > 1)
    for (int64_t i = 0; i < a->m; i++) {
        const int64_t n = lsa_min_i64(a->n_cand[i], a->n), rest = a->n - n;
        float *out = a->out + i * a->n;
        uint8_t *from = a->from + i * a->n;
        lsa_continue(out, from, a->z + i * a->n, n, a->cost, a->reach);
        if (rest > 0) memset(out + n, 0, (size_t)rest * sizeof *out);
        if (rest > 0) memset(from + n, 0, (size_t)rest);
    }
    return LSA_OK;
}

/* dz of one row; minus dcost of the row into sum [reach + 1] (entry 0: what stayed in place). */
static void continuation_row(const lsa_continuation_bwd_args *a, int64_t i, double *sum) {
    const uint8_t *from = a->from + i * a->n;
    const float *dout = a->dout + i * a->n;
    float *dz = a->dz + i * a->n;
    if (a->n > 0) memset(dz, 0, (size_t)a->n * sizeof *dz);
    for (int64_t c = 0; c < a->n_cand[i] && c < a->n; c++) {
        dz[c - from[c]] += dout[c];
        sum[from[c]] += (double)dout[c];
    }
}

static lsa_status continuation_bwd(lsa_ctx *c, const lsa_continuation_bwd_args *a, lsa_err *err) {
    (void)c;
    lsa_status st = LSA_OK;
    const int64_t ld = a->reach + 1;
    double *sum = NULL;
    LSA_TRY(LSA_NEW(sum, a->m * ld, err));
#pragma omp parallel for schedule(dynamic, 4) if (a->m > 1)
    for (int64_t i = 0; i < a->m; i++) continuation_row(a, i, sum + i * ld);
    for (int32_t j = 1; j <= a->reach; j++) {
        double s = 0;
        for (int64_t i = 0; i < a->m; i++) s += sum[i * ld + j];
        a->dcost[j - 1] = (float)-s;
    }
done:
    lsa_free(sum);
    return st;
}

static lsa_status sumsq(lsa_ctx *c, const lsa_sumsq_args *a, lsa_err *err) {
    (void)c;
    const int64_t nb = lsa_ceil_div(a->n, BLOCK);
    double *part = NULL, s = 0;
    lsa_status st = LSA_NEW(part, nb, err);
    if (st != LSA_OK) return st;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < nb; b++) {
        double p = 0;
        const int64_t end = lsa_min_i64(a->n, (b + 1) * BLOCK);
#pragma omp simd reduction(+ : p)
        for (int64_t i = b * BLOCK; i < end; i++) p += (double)a->x[i] * (double)a->x[i];
        part[b] = p;
    }
    for (int64_t b = 0; b < nb; b++) s += part[b];
    *a->out = s;
    lsa_free(part);
    return LSA_OK;
}

static lsa_status adamw(lsa_ctx *c, const lsa_adamw_args *a, lsa_err *err) {
    (void)c, (void)err;
    const float b1 = a->beta1, b2 = a->beta2, decay = 1.0f - a->lr * a->weight_decay;
    const float c1 = (float)(1 - pow((double)b1, (double)a->t)),
                c2 = (float)sqrt(1 - pow((double)b2, (double)a->t));
    const float step = a->lr / c1;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < a->n; i++) {
        const float g = a->grad_scale * a->g[i], m = b1 * a->m[i] + (1 - b1) * g,
                    v = b2 * a->v[i] + (1 - b2) * g * g;
        a->m[i] = m;
        a->v[i] = v;
        a->p[i] = a->p[i] * decay - step * m / (sqrtf(v) / c2 + a->eps);
    }
    return LSA_OK;
}

#define LSA_OP(op) .op = op,
const lsa_backend lsa_backend_cpu = {
    .name = "cpu",
    LSA_HOST_MEMORY,
#include "kernels/ops.def"
};
