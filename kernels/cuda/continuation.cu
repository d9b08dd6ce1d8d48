/* Continuation of scores: a thread an element, both ways; costs by one block each, added in a fixed order.
 * Formulas in ops.h. */
#include <math.h>

#include "kernels/cuda/cuda_state.h"

static __global__ void forward_k(const lsa_continuation_fwd_args a) {
    const int64_t i = blockIdx.y, c = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (c >= a.n) return;
    const float *z = a.z + i * a.n;
    const bool in = c < a.n_cand[i];
    float best = in ? z[c] : 0.0f;
    int from = 0;
    for (int j = 1; in && j <= a.reach && j <= c; j++) {
        const float v = __fsub_rn(z[c - j], a.cost[j - 1]);
        if (v > best) {
            best = v;
            from = j;
        }
    }
    a.out[i * a.n + c] = best;
    a.from[i * a.n + c] = (uint8_t)from;
}

static __global__ void dz_k(const lsa_continuation_bwd_args a) {
    const int64_t i = blockIdx.y, k = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (k >= a.n) return;
    const int64_t n = a.n_cand[i] < a.n ? a.n_cand[i] : a.n;
    float s = 0;
    for (int j = 0; j <= a.reach && k + j < n; j++)
        if (a.from[i * a.n + k + j] == j) s += a.dout[i * a.n + k + j];
    a.dz[i * a.n + k] = s;
}

static __global__ void dcost_k(const lsa_continuation_bwd_args a) {
    const int j = blockIdx.x + 1;
    double s = 0;
    for (int64_t i = 0; i < a.m; i++) {
        const int64_t n = a.n_cand[i] < a.n ? a.n_cand[i] : a.n;
        for (int64_t c = threadIdx.x; c < n; c += 256)
            if (a.from[i * a.n + c] == j) s += (double)a.dout[i * a.n + c];
    }
    s = lsa_block_sum(s);
    if (threadIdx.x == 0) a.dcost[j - 1] = (float)-s;
}

/* Rows go in the grid's second dimension, 65,535 at a time. */
static const int64_t ROWS = 65535;

lsa_status lsa_cuda_continuation_fwd(lsa_ctx *c, const lsa_continuation_fwd_args *a, lsa_err *err) {
    if (a->m == 0 || a->n == 0) return LSA_OK;
    for (int64_t first = 0; first < a->m; first += ROWS) {
        lsa_continuation_fwd_args b = *a;
        b.m = a->m - first < ROWS ? a->m - first : ROWS;
        b.z += first * a->n, b.n_cand += first, b.out += first * a->n, b.from += first * a->n;
        forward_k<<<dim3((unsigned)((a->n + 255) / 256), (unsigned)b.m), 256, 0, lsa_cuda(c)->stream>>>(b);
    }
    LSA_LAUNCHED("continuation_fwd");
}

lsa_status lsa_cuda_continuation_bwd(lsa_ctx *c, const lsa_continuation_bwd_args *a, lsa_err *err) {
    dcost_k<<<(unsigned)a->reach, 256, 0, lsa_cuda(c)->stream>>>(*a);
    for (int64_t first = 0; a->n > 0 && first < a->m; first += ROWS) {
        lsa_continuation_bwd_args b = *a;
        b.m = a->m - first < ROWS ? a->m - first : ROWS;
        b.from += first * a->n, b.dout += first * a->n, b.n_cand += first, b.dz += first * a->n;
        dz_k<<<dim3((unsigned)((a->n + 255) / 256), (unsigned)b.m), 256, 0, lsa_cuda(c)->stream>>>(b);
    }
    LSA_LAUNCHED("continuation_bwd");
}
