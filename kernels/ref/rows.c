/* Row functions of the truth column: see rows.h and the formulas in ops.h. */
#include "kernels/ref/rows.h"

#include <math.h>
#include <string.h>

void lsa_row_rmsnorm_fwd(const lsa_rmsnorm_fwd_args *a, int64_t i) {
    const float *x = a->x + i * a->r;
    double s = 0;
    for (int64_t j = 0; j < a->r; j++) s += (double)x[j] * (double)x[j];
    double f = 1.0 / sqrt(s / (double)a->r + (double)a->eps);
    a->rstd[i] = (float)f;
    for (int64_t j = 0; j < a->r; j++) a->y[i * a->r + j] = (float)((double)a->g[j] * (double)x[j] * f);
}

void lsa_row_rmsnorm_dx(const lsa_rmsnorm_bwd_args *a, int64_t i) {
    const float *x = a->x + i * a->r, *dy = a->dy + i * a->r;
    const double f = (double)a->rstd[i];
    double mean = 0;
    for (int64_t j = 0; j < a->r; j++) mean += (double)a->g[j] * (double)dy[j] * (double)x[j] * f;
    mean /= (double)a->r;
    for (int64_t j = 0; j < a->r; j++)
        a->dx[i * a->r + j] = (float)(f * ((double)a->g[j] * (double)dy[j] - (double)x[j] * f * mean));
}

void lsa_col_rmsnorm_dg(const lsa_rmsnorm_bwd_args *a, int64_t j) {
    double s = a->accumulate ? (double)a->dg[j] : 0;
    for (int64_t i = 0; i < a->m; i++)
        s += (double)a->dy[i * a->r + j] * (double)a->x[i * a->r + j] * (double)a->rstd[i];
    a->dg[j] = (float)s;
}

static void rotate(const lsa_rope_hadamard_args *a, int64_t i, float *q, double sign) {
    const float pos = (float)a->position[i];
    for (int64_t p = 0; p < a->rope_dim / 2; p++) {
        const float angle = pos * a->freq[p]; /* NUMERIC: the product is rounded to fp32 before sin and cos */
        const double c = cos((double)angle), s = sign * sin((double)angle);
        float *x = q + a->d - a->rope_dim + 2 * p;
        const double u = (double)x[0], v = (double)x[1];
        x[0] = (float)(u * c - v * s);
        x[1] = (float)(u * s + v * c);
    }
}

static void hadamard(float *q, int64_t d) {
    double x[1024];
    for (int64_t i = 0; i < d; i++) x[i] = (double)q[i];
    for (int64_t h = 1; h < d; h *= 2)
        for (int64_t i = 0; i < d; i += 2 * h)
            for (int64_t j = i; j < i + h; j++) {
                const double u = x[j], v = x[j + h];
                x[j] = u + v;
                x[j + h] = u - v;
            }
    const double f = 1.0 / sqrt((double)d);
    for (int64_t i = 0; i < d; i++) q[i] = (float)(x[i] * f);
}

void lsa_row_rope_hadamard(const lsa_rope_hadamard_args *a, int64_t i) {
    for (int64_t h = 0; h < a->n_head; h++) {
        float *q = a->q + (i * a->n_head + h) * a->d;
        if (!a->inverse) rotate(a, i, q, 1.0);
        hadamard(q, a->d);
        if (a->inverse) rotate(a, i, q, -1.0);
    }
}

void lsa_row_prior_fwd(const lsa_prior_fwd_args *a, int64_t i) {
    for (int64_t c = 0; c < a->n && c < a->n_cand[i]; c++) {
        const int64_t k = i * a->n + c;
        const float older = a->weight[1] * a->memory[k];
        a->z[k] += fmaf(a->weight[0], a->recent[k], older);
    }
}

float lsa_col_prior_dweight(const lsa_prior_bwd_args *a, int k) {
    const float *f = k ? a->memory : a->recent;
    double s = 0;
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t c = i * a->n; c < i * a->n + a->n && c < i * a->n + a->n_cand[i]; c++)
            s += (double)a->dz[c] * (double)f[c];
    return (float)s;
}

void lsa_row_continuation_fwd(const lsa_continuation_fwd_args *a, int64_t i) {
    const float *z = a->z + i * a->n;
    for (int64_t c = 0; c < a->n; c++) {
        float best = c < a->n_cand[i] ? z[c] : 0.0f;
        int32_t from = 0;
        for (int32_t j = 1; j <= a->reach && j <= c && c < a->n_cand[i]; j++) {
            const float v = z[c - j] - a->cost[j - 1];
            if (!(v > best)) continue;
            best = v;
            from = j;
        }
        a->out[i * a->n + c] = best;
        a->from[i * a->n + c] = (uint8_t)from;
    }
}

void lsa_row_continuation_dz(const lsa_continuation_bwd_args *a, int64_t i) {
    const uint8_t *from = a->from + i * a->n;
    const float *dout = a->dout + i * a->n;
    for (int64_t k = 0; k < a->n; k++) {
        double s = 0;
        for (int32_t j = 0; j <= a->reach && k + j < a->n_cand[i]; j++)
            if (from[k + j] == j) s += (double)dout[k + j];
        a->dz[i * a->n + k] = (float)s;
    }
}

static double softplus(double x) { /* ln(1 + e^x) */
    return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

void lsa_row_loss_pointwise(const lsa_loss_pointwise_args *a, int64_t i) {
    double loss = 0;
    const int64_t k = a->n_cand[i];
    for (int64_t j = 0; j < a->n; j++) {
        const int64_t at = i * a->n + j;
        if (j >= k) {
            a->dz[at] = 0.0f;
            continue;
        }
        const double z = (double)a->z[at], w = a->weight ? (double)a->weight[at] : 1.0,
                     s = (double)a->smoothing;
        const double y = (double)a->y[at] * (1 - 2 * s) + s, p = 1.0 / (1.0 + exp(-z));
        /* -ln p = softplus(-z), -ln(1-p) = softplus(z) */
        const double bce = y * softplus(-z) + (1 - y) * softplus(z);
        double l = bce, g = p - y;
        if (a->focal) {
            const double q = p * (1 - y) + (1 - p) * y; /* 1 - pt, without cancellation */
            l = q * q * bce;
            g = q * q * (p - y) - 2 * q * (2 * y - 1) * p * (1 - p) * bce;
        }
        loss += w * l;
        a->dz[at] = (float)(w * g * (double)a->scale);
    }
    a->row_loss[i] = loss * (double)a->scale;
}

void lsa_row_loss_pairwise(const lsa_loss_pairwise_args *a, int64_t i) {
    const int64_t k = a->n_cand[i];
    const float *z = a->z + i * a->n, *y = a->y + i * a->n;
    float *dz = a->dz + i * a->n;
    double loss = 0;
    for (int64_t j = 0; j < a->n; j++) {
        double g = 0;
        for (int64_t o = 0; j < k && o < k; o++) {
            if (y[o] == y[j]) continue;
            const bool pos = y[j] > y[o];
            const double diff =
                pos ? (double)z[j] - (double)z[o] : (double)z[o] - (double)z[j]; /* positive minus negative */
            double dl;                                                           /* derivative by diff */
            if (a->use_margin) {
                const double l = (double)a->margin - diff;
                dl = l > 0 ? -1 : 0;
                if (pos && l > 0) loss += l;
                if (isnan(l)) loss = dl = l;
            } else {
                dl = -1.0 / (1.0 + exp(diff));
                if (pos) loss += softplus(-diff);
            }
            g += pos ? dl : -dl;
        }
        dz[j] = (float)(g * (double)a->scale);
    }
    a->row_loss[i] = loss * (double)a->scale;
}

void lsa_row_loss_kl(const lsa_loss_kl_args *a, int64_t i) {
    const int64_t k = a->n_cand[i];
    const float *z = a->z + i * a->n, *t = a->target + i * a->n;
    float *dz = a->dz + i * a->n;
    const double w = (a->row_weight ? (double)a->row_weight[i] : 1.0) * (double)a->scale;
    double sum_t = 0, m = -(double)INFINITY, s = 0, loss = 0;
    for (int64_t j = 0; j < k; j++) {
        sum_t += (double)t[j];
        if ((double)z[j] > m || isnan(z[j])) m = (double)z[j];
    }
    if (sum_t == 0 || w == 0) {
        memset(dz, 0, (size_t)a->n * sizeof *dz);
        a->row_loss[i] = 0;
        return;
    }
    for (int64_t j = 0; j < k; j++) s += exp((double)z[j] - m);
    const double lse = m + log(s);
    for (int64_t j = 0; j < a->n; j++) {
        if (j >= k) {
            dz[j] = 0.0f;
            continue;
        }
        const double ls = (double)z[j] - lse, tj = (double)t[j];
        if (tj > 0) loss += tj * (log(tj) - ls);
        dz[j] = (float)(w * (exp(ls) - tj));
    }
    a->row_loss[i] = w * loss;
}
