/* RMSNorm and RoPE+Hadamard: small next to the scores, so plain: one block of 256 threads a row (or a head).
 */
#include "kernels/cuda/cuda_state.h"

static __global__ void rms_fwd_k(const lsa_rmsnorm_fwd_args a) {
    const int64_t i = blockIdx.x;
    const float *x = a.x + i * a.r;
    double s = 0;
    for (int64_t j = threadIdx.x; j < a.r; j += 256) s += (double)x[j] * (double)x[j];
    const double f = 1.0 / sqrt(lsa_block_sum(s) / (double)a.r + (double)a.eps);
    if (threadIdx.x == 0) a.rstd[i] = (float)f;
    for (int64_t j = threadIdx.x; j < a.r; j += 256)
        a.y[i * a.r + j] = (float)((double)a.g[j] * (double)x[j] * f);
}

static __global__ void rms_dx_k(const lsa_rmsnorm_bwd_args a) {
    const int64_t i = blockIdx.x;
    const float *x = a.x + i * a.r, *dy = a.dy + i * a.r;
    const double f = (double)a.rstd[i];
    double s = 0;
    for (int64_t j = threadIdx.x; j < a.r; j += 256) s += (double)a.g[j] * (double)dy[j] * (double)x[j] * f;
    const double mean = lsa_block_sum(s) / (double)a.r;
    for (int64_t j = threadIdx.x; j < a.r; j += 256)
        a.dx[i * a.r + j] = (float)(f * ((double)a.g[j] * (double)dy[j] - (double)x[j] * f * mean));
}

/* One thread a column: rows are added in order. */
static __global__ void rms_dg_k(const lsa_rmsnorm_bwd_args a) {
    const int64_t j = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (j >= a.r) return;
    double s = a.accumulate ? (double)a.dg[j] : 0;
    for (int64_t i = 0; i < a.m; i++)
        s += (double)a.dy[i * a.r + j] * (double)a.x[i * a.r + j] * (double)a.rstd[i];
    a.dg[j] = (float)s;
}

lsa_status lsa_cuda_rmsnorm_fwd(lsa_ctx *c, const lsa_rmsnorm_fwd_args *a, lsa_err *err) {
    if (a->m == 0) return LSA_OK;
    rms_fwd_k<<<(unsigned)a->m, 256, 0, lsa_cuda(c)->stream>>>(*a);
    LSA_LAUNCHED("rmsnorm_fwd");
}

lsa_status lsa_cuda_rmsnorm_bwd(lsa_ctx *c, const lsa_rmsnorm_bwd_args *a, lsa_err *err) {
    rms_dg_k<<<(unsigned)((a->r + 255) / 256), 256, 0, lsa_cuda(c)->stream>>>(
        *a); /* before dx, which may alias dy */
    if (a->m && a->dx) rms_dx_k<<<(unsigned)a->m, 256, 0, lsa_cuda(c)->stream>>>(*a);
    LSA_LAUNCHED("rmsnorm_bwd");
}

/* One block a (query, head); d <= 1024 values in shared memory. */
static __global__ void rope_hadamard_k(const lsa_rope_hadamard_args a) {
    __shared__ float x[1024];
    const int64_t i = blockIdx.x / a.n_head;
    float *q = a.q + (int64_t)blockIdx.x * a.d;
    const int half = (int)(a.rope_dim / 2), d = (int)a.d, t = (int)threadIdx.x, step = (int)blockDim.x;
    float *r = x + d - 2 * half;
    for (int j = t; j < d; j += step) x[j] = q[j];
    __syncthreads();
    for (int phase = 0; phase < 2; phase++) {
        if ((phase == 0) != a.inverse) {
            for (int p = t; p < half; p += step) {
                const float angle =
                    (float)a.position[i] * a.freq[p]; /* NUMERIC: rounded to fp32 before sin and cos */
                float sn, cs;
                sincosf(angle, &sn, &cs);
                if (a.inverse) sn = -sn;
                const float u = r[2 * p], v = r[2 * p + 1];
                r[2 * p] = u * cs - v * sn;
                r[2 * p + 1] = u * sn + v * cs;
            }
            __syncthreads();
        } else {
            for (int h = 1; h < d; h *= 2) {
                for (int k = t; k < d / 2; k += step) {
                    const int j = k / h * 2 * h + k % h;
                    const float u = x[j], v = x[j + h];
                    x[j] = u + v;
                    x[j + h] = u - v;
                }
                __syncthreads();
            }
            const float f = rsqrtf((float)d);
            for (int j = t; j < d; j += step) x[j] *= f;
            __syncthreads();
        }
    }
    for (int j = t; j < d; j += step) q[j] = x[j];
}

lsa_status lsa_cuda_rope_hadamard(lsa_ctx *c, const lsa_rope_hadamard_args *a, lsa_err *err) {
    if (a->m == 0 || a->n_head == 0) return LSA_OK;
    rope_hadamard_k<<<(unsigned)(a->m * a->n_head), 64, 0, lsa_cuda(c)->stream>>>(*a);
    LSA_LAUNCHED("rope_hadamard");
}
