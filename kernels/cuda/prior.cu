/* Observed-mass prior: a thread an element; the weights' gradient by one block each, added in a fixed order.
 * Formulas in ops.h. */
#include "kernels/cuda/cuda_state.h"
#include "kernels/prior.h"

static __global__ void forward_k(const lsa_prior_fwd_args a) {
    const int64_t i = blockIdx.y, c = (int64_t)blockIdx.x * 256 + threadIdx.x, k = i * a.n + c;
    if (c >= a.n || c >= a.n_cand[i]) return;
    a.z[k] = __fadd_rn(a.z[k], lsa_prior_value(a.weight, a.recent[k], a.memory[k]));
}

static __global__ void dweight_k(const lsa_prior_bwd_args a) {
    const float *const f = blockIdx.x ? a.memory : a.recent;
    double s = 0;
    for (int64_t i = 0; i < a.m; i++) {
        const int64_t n = a.n_cand[i] < a.n ? a.n_cand[i] : a.n;
        for (int64_t c = threadIdx.x; c < n; c += 256)
            s += (double)a.dz[i * a.n + c] * (double)f[i * a.n + c];
    }
    s = lsa_block_sum(s);
    if (threadIdx.x == 0) a.dweight[blockIdx.x] = (float)s;
}

/* Rows go in the grid's second dimension, 65,535 at a time. */
static const int64_t ROWS = 65535;

lsa_status lsa_cuda_prior_fwd(lsa_ctx *c, const lsa_prior_fwd_args *a, lsa_err *err) {
    if (a->m == 0 || a->n == 0) return LSA_OK;
    for (int64_t first = 0; first < a->m; first += ROWS) {
        lsa_prior_fwd_args b = *a;
        b.m = a->m - first < ROWS ? a->m - first : ROWS;
        b.recent += first * a->n, b.memory += first * a->n, b.n_cand += first, b.z += first * a->n;
        forward_k<<<dim3((unsigned)((a->n + 255) / 256), (unsigned)b.m), 256, 0, lsa_cuda(c)->stream>>>(b);
    }
    LSA_LAUNCHED("prior_fwd");
}

lsa_status lsa_cuda_prior_bwd(lsa_ctx *c, const lsa_prior_bwd_args *a, lsa_err *err) {
    dweight_k<<<LSA_PRIOR_WEIGHTS, 256, 0, lsa_cuda(c)->stream>>>(*a);
    LSA_LAUNCHED("prior_bwd");
}
