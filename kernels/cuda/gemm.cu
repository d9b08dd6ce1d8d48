/* Matrix products by cuBLASLt in fp32 (no TF32). Row-major C = op(A) op(B) is column-major C^T = op(B)^T
 * op(A)^T.
 *
 * Deterministic: no split-K with atomics is chosen because the heuristic's first result is used for a shape
 * every time, and cuBLASLt's split-K reduces in a fixed order through the workspace. The choice is kept with
 * its descriptors: asking costs as much as a small product. */
#include <stdlib.h>

#include "kernels/cuda/cuda_state.h"

enum { PLANS = 128 };

struct gemm_plan {
    bool trans_a, trans_b;
    int64_t m, n, k;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t la, lb, lc;
    cublasLtMatmulAlgo_t algo;
};
struct gemm_plans {
    gemm_plan plan[PLANS];
    int n, next; /* next: which is replaced once all are taken */
};

static void forget(gemm_plan *p) {
    if (p->lc) cublasLtMatrixLayoutDestroy(p->lc);
    if (p->lb) cublasLtMatrixLayoutDestroy(p->lb);
    if (p->la) cublasLtMatrixLayoutDestroy(p->la);
    if (p->op) cublasLtMatmulDescDestroy(p->op);
    *p = {};
}

void lsa_cuda_gemm_close(cuda_state *s) {
    for (int i = 0; s->plans && i < s->plans->n; i++) forget(&s->plans->plan[i]);
    free(s->plans);
    s->plans = NULL;
}

static lsa_status choose(cuda_state *s, const lsa_gemm_args *a, gemm_plan *p, cublasLtMatmulPreference_t pref,
                         lsa_err *err) {
    cublasLtMatmulHeuristicResult_t h;
    int found = 0;
    /* operands swapped: the first is B */
    if (cublasLtMatmulAlgoGetHeuristic(s->lt, p->op, p->lb, p->la, p->lc, p->lc, pref, 1, &h, &found) !=
            CUBLAS_STATUS_SUCCESS ||
        !found)
        LSA_RET_FAIL(LSA_E_DEVICE, "gemm [%lld,%lld,%lld]: cuBLASLt has no algorithm", (long long)a->m,
                     (long long)a->n, (long long)a->k);
    p->algo = h.algo;
    return LSA_OK;
}

static lsa_status make(cuda_state *s, const lsa_gemm_args *a, gemm_plan *p, lsa_err *err) {
    *p = {a->trans_a, a->trans_b, a->m, a->n, a->k, NULL, NULL, NULL, NULL, {}};
    cublasLtMatmulPreference_t pref = NULL;
    const cublasOperation_t ta = a->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                            tb = a->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint64_t m = (uint64_t)a->m, n = (uint64_t)a->n, k = (uint64_t)a->k;
    /* a row-major [r, c] matrix is a column-major [c, r] one with leading dimension c */
    const uint64_t ar = a->trans_a ? k : m, ac = a->trans_a ? m : k, br = a->trans_b ? n : k,
                   bc = a->trans_b ? k : n;
    bool ok =
        cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F_PEDANTIC, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &tb, sizeof tb) ==
            CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &ta, sizeof ta) ==
            CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&p->la, CUDA_R_32F, ac, ar, (int64_t)ac) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&p->lb, CUDA_R_32F, bc, br, (int64_t)bc) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&p->lc, CUDA_R_32F, n, m, (int64_t)n) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulPreferenceCreate(&pref) == CUBLAS_STATUS_SUCCESS;
    const size_t ws = s->gemm_bytes;
    ok = ok && cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &ws,
                                                    sizeof ws) == CUBLAS_STATUS_SUCCESS;
    const lsa_status st =
        ok ? choose(s, a, p, pref, err)
           : lsa_err_set(err, LSA_E_DEVICE, __FILE__, __LINE__, "gemm: cuBLASLt refused the description");
    if (pref) cublasLtMatmulPreferenceDestroy(pref);
    if (st != LSA_OK) forget(p);
    return st;
}

static lsa_status plan_for(cuda_state *s, const lsa_gemm_args *a, gemm_plan **out, lsa_err *err) {
    if (!s->plans) s->plans = (gemm_plans *)calloc(1, sizeof *s->plans);
    if (!s->plans) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    gemm_plans *const all = s->plans;
    for (int i = 0; i < all->n; i++) {
        gemm_plan *const p = &all->plan[i];
        if (p->m == a->m && p->n == a->n && p->k == a->k && p->trans_a == a->trans_a &&
            p->trans_b == a->trans_b && p->op) {
            *out = p;
            return LSA_OK;
        }
    }
    gemm_plan *p = NULL;
    if (all->n < PLANS) {
        p = &all->plan[all->n++];
    } else {
        p = &all->plan[all->next];
        all->next = (all->next + 1) % PLANS;
        forget(p);
    }
    *out = p;
    return make(s, a, p, err);
}

lsa_status lsa_cuda_gemm(lsa_ctx *c, const lsa_gemm_args *a, lsa_err *err) {
    cuda_state *const s = lsa_cuda(c);
    if (a->m == 0 || a->n == 0) return LSA_OK;
    if (a->k == 0) {
        if (a->beta == 0.0f)
            LSA_CUDA(cudaMemsetAsync(a->c, 0, (size_t)(a->m * a->n) * sizeof(float), s->stream));
        return LSA_OK;
    }
    gemm_plan *p = NULL;
    const lsa_status st = plan_for(s, a, &p, err);
    if (st != LSA_OK) return st;
    const cublasStatus_t e =
        cublasLtMatmul(s->lt, p->op, &a->alpha, a->b, p->lb, a->a, p->la, &a->beta, a->c, p->lc, a->c, p->lc,
                       &p->algo, s->gemm_workspace, s->gemm_bytes, s->stream);
    if (e != CUBLAS_STATUS_SUCCESS)
        LSA_RET_FAIL(LSA_E_DEVICE, "gemm [%lld,%lld,%lld]: cuBLASLt status %d", (long long)a->m,
                     (long long)a->n, (long long)a->k, (int)e);
    return LSA_OK;
}
