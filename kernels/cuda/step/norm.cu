/* RMSNorm of all layers at once (f32 in, bf16 out for the next product), and the conversion of weights to
 * bf16. Memory-bound and small: a row is one block. dg: thread a column, DG_PARTS row ranges, then one sum in
 * fixed order. */
#include "kernels/cuda/step/step_state.h"

enum { DG_PARTS = 16 };

static __device__ float block_sum(float v) { /* 256 threads, fixed order */
    __shared__ float s[8];
    for (int x = 16; x >= 1; x /= 2) v += __shfl_xor_sync(0xffffffffu, v, x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) s[threadIdx.x >> 5] = v;
    __syncthreads();
    float r = 0;
    for (int i = 0; i < 8; i++) r += s[i];
    return r;
}

static __global__ void fwd_k(const float *a, const float *p, int64_t layer_param, int64_t at_gn, int m, int r,
                             float eps, bf16 *u, float *rstd) {
    const int64_t i = (int64_t)blockIdx.y * m + blockIdx.x;
    const float *const x = a + i * r, *const g = p + blockIdx.y * layer_param + at_gn;
    float s = 0;
    for (int j = threadIdx.x; j < r; j += 256) s += x[j] * x[j];
    const float f = rsqrtf(block_sum(s) / (float)r + eps);
    if (threadIdx.x == 0) rstd[i] = f;
    for (int j = threadIdx.x; j < r; j += 256) u[i * r + j] = __float2bfloat16(g[j] * x[j] * f);
}

static __global__ void dx_k(const float *a, const float *du, const float *rstd, const float *p,
                            int64_t layer_param, int64_t at_gn, int m, int r, bf16 *da) {
    const int64_t i = (int64_t)blockIdx.y * m + blockIdx.x;
    const float *const x = a + i * r, *const dy = du + i * r, *const g = p + blockIdx.y * layer_param + at_gn,
                       f = rstd[i];
    float s = 0;
    for (int j = threadIdx.x; j < r; j += 256) s += g[j] * dy[j] * x[j] * f;
    const float mean = block_sum(s) / (float)r;
    for (int j = threadIdx.x; j < r; j += 256)
        da[i * r + j] = __float2bfloat16(f * (g[j] * dy[j] - x[j] * f * mean));
}

static __global__ void dg_part_k(const float *a, const float *du, const float *rstd, int m, int r,
                                 float *part) {
    const int j = blockIdx.x * 256 + threadIdx.x, l = blockIdx.z;
    if (j >= r) return;
    const int per = (m + DG_PARTS - 1) / DG_PARTS, i0 = blockIdx.y * per, i1 = min(m, i0 + per);
    float s = 0;
    for (int i = i0; i < i1; i++) {
        const int64_t at = ((int64_t)l * m + i) * r + j;
        s += du[at] * a[at] * rstd[(int64_t)l * m + i];
    }
    part[((int64_t)l * DG_PARTS + blockIdx.y) * r + j] = s;
}

static __global__ void dg_k(const float *part, int64_t layer_param, int64_t at_gn, int r, bool add,
                            float *grad) {
    const int j = blockIdx.x * 256 + threadIdx.x, l = blockIdx.y;
    if (j >= r) return;
    float *const out = grad + l * layer_param + at_gn + j;
    float s = add ? *out : 0.0f;
    for (int k = 0; k < DG_PARTS; k++) s += part[((int64_t)l * DG_PARTS + k) * r + j];
    *out = s;
}

lsa_status step_norm_fwd(lsa_gpu_step *s, lsa_err *err) {
    const int m = (int)s->o.micro, r = s->g.rank;
    fwd_k<<<dim3((unsigned)m, (unsigned)s->g.n_layer), 256, 0, s->cs->stream>>>(
        s->a, s->p, s->layer_param, s->at_gn, m, r, s->g.eps, s->u, s->rstd);
    LSA_LAUNCHED("norm_fwd");
}

lsa_status step_norm_bwd(lsa_gpu_step *s, bool add, lsa_err *err) {
    const int m = (int)s->o.micro, r = s->g.rank;
    const unsigned L = (unsigned)s->g.n_layer, cols = (unsigned)((r + 255) / 256);
    dx_k<<<dim3((unsigned)m, L), 256, 0, s->cs->stream>>>(s->a, s->du, s->rstd, s->p, s->layer_param,
                                                          s->at_gn, m, r, s->da);
    dg_part_k<<<dim3(cols, DG_PARTS, L), 256, 0, s->cs->stream>>>(s->a, s->du, s->rstd, m, r, s->dg_part);
    dg_k<<<dim3(cols, L), 256, 0, s->cs->stream>>>(s->dg_part, s->layer_param, s->at_gn, r, add, s->grad);
    LSA_LAUNCHED("norm_bwd");
}

static __global__ void shadow_k(const float *p, int64_t n, bf16 *p16) {
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256)
        p16[i] = __float2bfloat16(p[i]);
}
lsa_status step_shadow(lsa_gpu_step *s, lsa_err *err) {
    shadow_k<<<4096, 256, 0, s->cs->stream>>>(s->p, s->n_param, s->p16);
    LSA_LAUNCHED("shadow");
}
