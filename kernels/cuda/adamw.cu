/* AdamW and the sum of squares. */
#include <math.h>

#include "kernels/cuda/cuda_state.h"

static __global__ void adamw_k(const lsa_adamw_args a, float step, float c2, float decay) {
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= a.n) return;
    const float g = a.grad_scale * a.g[i], m = a.beta1 * a.m[i] + (1 - a.beta1) * g,
                v = a.beta2 * a.v[i] + (1 - a.beta2) * g * g;
    a.m[i] = m;
    a.v[i] = v;
    a.p[i] = a.p[i] * decay - step * m / (sqrtf(v) / c2 + a.eps);
}

lsa_status lsa_cuda_adamw(lsa_ctx *c, const lsa_adamw_args *a, lsa_err *err) {
    if (a->n == 0) return LSA_OK;
    const float c1 = (float)(1 - pow((double)a->beta1, (double)a->t)),
                c2 = (float)sqrt(1 - pow((double)a->beta2, (double)a->t));
    adamw_k<<<(unsigned)((a->n + 255) / 256), 256, 0, lsa_cuda(c)->stream>>>(*a, a->lr / c1, c2,
                                                                             1.0f - a->lr * a->weight_decay);
    LSA_LAUNCHED("adamw");
}

/* Two passes: block b sums elements b*256+t, + grid*256 ..., then one block sums the partial sums. */
static __global__ void sumsq_part_k(const float *x, int64_t n, double *part) {
    double s = 0;
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256)
        s += (double)x[i] * (double)x[i];
    s = lsa_block_sum(s);
    if (threadIdx.x == 0) part[blockIdx.x] = s;
}
static __global__ void sumsq_all_k(const double *part, int n, double *out) {
    double s = 0;
    for (int i = (int)threadIdx.x; i < n; i += 256) s += part[i];
    s = lsa_block_sum(s);
    if (threadIdx.x == 0) *out = s;
}

lsa_status lsa_cuda_sumsq(lsa_ctx *c, const lsa_sumsq_args *a, lsa_err *err) {
    cuda_state *s = lsa_cuda(c);
    sumsq_part_k<<<LSA_CUDA_PARTIALS, 256, 0, s->stream>>>(a->x, a->n, s->partial);
    sumsq_all_k<<<1, 256, 0, s->stream>>>(s->partial, LSA_CUDA_PARTIALS, a->out);
    LSA_LAUNCHED("sumsq");
}
