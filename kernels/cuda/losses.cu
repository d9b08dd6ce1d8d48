/* Losses: one block of 256 threads a row, sums in double and in a fixed order. Formulas in ops.h. */
#include <math.h>

#include "kernels/cuda/cuda_state.h"

static __device__ double softplus(double x) {
    return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

static __global__ void pointwise_k(const lsa_loss_pointwise_args a) {
    const int64_t i = blockIdx.x, k = a.n_cand[i];
    double loss = 0;
    for (int64_t j = threadIdx.x; j < a.n; j += 256) {
        const int64_t at = i * a.n + j;
        if (j >= k) {
            a.dz[at] = 0.0f;
            continue;
        }
        const double z = (double)a.z[at], w = a.weight ? (double)a.weight[at] : 1.0, s = (double)a.smoothing;
        const double y = (double)a.y[at] * (1 - 2 * s) + s, p = 1.0 / (1.0 + exp(-z));
        const double bce = y * softplus(-z) + (1 - y) * softplus(z);
        double l = bce, g = p - y;
        if (a.focal) {
            const double q = p * (1 - y) + (1 - p) * y;
            l = q * q * bce;
            g = q * q * (p - y) - 2 * q * (2 * y - 1) * p * (1 - p) * bce;
        }
        loss += w * l;
        a.dz[at] = (float)(w * g * (double)a.scale);
    }
    loss = lsa_block_sum(loss);
    if (threadIdx.x == 0) a.row_loss[i] = loss * (double)a.scale;
}

static __global__ void pairwise_k(const lsa_loss_pairwise_args a) {
    const int64_t i = blockIdx.x, k = a.n_cand[i];
    const float *z = a.z + i * a.n, *y = a.y + i * a.n;
    double loss = 0;
    for (int64_t j = threadIdx.x; j < a.n; j += 256) {
        double g = 0;
        for (int64_t o = 0; j < k && o < k; o++) {
            if (y[o] == y[j]) continue;
            const bool pos = y[j] > y[o];
            const double diff = pos ? (double)z[j] - (double)z[o] : (double)z[o] - (double)z[j];
            double dl;
            if (a.use_margin) {
                const double l = (double)a.margin - diff;
                dl = l > 0 ? -1 : 0;
                if (pos && l > 0) loss += l;
                if (isnan(l)) loss = dl = l;
            } else {
                dl = -1.0 / (1.0 + exp(diff));
                if (pos) loss += softplus(-diff);
            }
            g += pos ? dl : -dl;
        }
        a.dz[i * a.n + j] = (float)(g * (double)a.scale);
    }
    loss = lsa_block_sum(loss);
    if (threadIdx.x == 0) a.row_loss[i] = loss * (double)a.scale;
}

static __global__ void kl_k(const lsa_loss_kl_args a) {
    __shared__ float top[256];
    const int64_t i = blockIdx.x, k = a.n_cand[i];
    const float *z = a.z + i * a.n, *t = a.target + i * a.n;
    float *dz = a.dz + i * a.n;
    const double w = (a.row_weight ? (double)a.row_weight[i] : 1.0) * (double)a.scale;
    double sum_t = 0, s = 0, loss = 0;
    float m = -INFINITY;
    for (int64_t j = threadIdx.x; j < k; j += 256) {
        sum_t += (double)t[j];
        if (z[j] > m || isnan(z[j])) m = z[j];
    }
    sum_t = lsa_block_sum(sum_t);
    top[threadIdx.x] = m;
    __syncthreads();
    for (int h = 128; h > 0; h >>= 1) {
        if ((int)threadIdx.x < h && (top[threadIdx.x + h] > top[threadIdx.x] || isnan(top[threadIdx.x + h])))
            top[threadIdx.x] = top[threadIdx.x + h];
        __syncthreads();
    }
    m = top[0];
    __syncthreads();
    if (sum_t == 0 || w == 0) {
        for (int64_t j = threadIdx.x; j < a.n; j += 256) dz[j] = 0.0f;
        if (threadIdx.x == 0) a.row_loss[i] = 0;
        return;
    }
    for (int64_t j = threadIdx.x; j < k; j += 256) s += (double)expf(z[j] - m);
    const double lse = (double)m + log(lsa_block_sum(s));
    for (int64_t j = threadIdx.x; j < a.n; j += 256) {
        if (j >= k) {
            dz[j] = 0.0f;
            continue;
        }
        const double ls = (double)z[j] - lse, tj = (double)t[j];
        if (tj > 0) loss += tj * (log(tj) - ls);
        dz[j] = (float)(w * (exp(ls) - tj));
    }
    loss = lsa_block_sum(loss);
    if (threadIdx.x == 0) a.row_loss[i] = w * loss;
}

lsa_status lsa_cuda_loss_pointwise(lsa_ctx *c, const lsa_loss_pointwise_args *a, lsa_err *err) {
    if (a->m == 0) return LSA_OK;
    pointwise_k<<<(unsigned)a->m, 256, 0, lsa_cuda(c)->stream>>>(*a);
    LSA_LAUNCHED("loss_pointwise");
}
lsa_status lsa_cuda_loss_pairwise(lsa_ctx *c, const lsa_loss_pairwise_args *a, lsa_err *err) {
    if (a->m == 0) return LSA_OK;
    pairwise_k<<<(unsigned)a->m, 256, 0, lsa_cuda(c)->stream>>>(*a);
    LSA_LAUNCHED("loss_pairwise");
}
lsa_status lsa_cuda_loss_kl(lsa_ctx *c, const lsa_loss_kl_args *a, lsa_err *err) {
    if (a->m == 0) return LSA_OK;
    kl_k<<<(unsigned)a->m, 256, 0, lsa_cuda(c)->stream>>>(*a);
    LSA_LAUNCHED("loss_kl");
}
