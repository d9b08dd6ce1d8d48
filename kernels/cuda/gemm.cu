/* Matrix products by cuBLASLt in fp32 (no TF32). Row-major C = op(A) op(B) is column-major C^T = op(B)^T
 * op(A)^T.
 *
 * Deterministic: no split-K with atomics is chosen because the heuristic's first result is used for a shape
 * every time, and cuBLASLt's split-K reduces in a fixed order through the workspace. */
#include "kernels/cuda/cuda_state.h"

static lsa_status run(lsa_ctx *c, const lsa_gemm_args *a, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t la,
                      cublasLtMatrixLayout_t lb, cublasLtMatrixLayout_t lc, cublasLtMatmulPreference_t pref,
                      lsa_err *err) {
    cuda_state *s = lsa_cuda(c);
    cublasLtMatmulHeuristicResult_t h;
    int found = 0;
    /* operands swapped: the first is B */
    if (cublasLtMatmulAlgoGetHeuristic(s->lt, op, lb, la, lc, lc, pref, 1, &h, &found) !=
            CUBLAS_STATUS_SUCCESS ||
        !found)
        LSA_RET_FAIL(LSA_E_DEVICE, "gemm [%lld,%lld,%lld]: cuBLASLt has no algorithm", (long long)a->m,
                     (long long)a->n, (long long)a->k);
    cublasStatus_t e = cublasLtMatmul(s->lt, op, &a->alpha, a->b, lb, a->a, la, &a->beta, a->c, lc, a->c, lc,
                                      &h.algo, s->gemm_workspace, s->gemm_bytes, s->stream);
    if (e != CUBLAS_STATUS_SUCCESS)
        LSA_RET_FAIL(LSA_E_DEVICE, "gemm [%lld,%lld,%lld]: cuBLASLt status %d", (long long)a->m,
                     (long long)a->n, (long long)a->k, (int)e);
    return LSA_OK;
}

lsa_status lsa_cuda_gemm(lsa_ctx *c, const lsa_gemm_args *a, lsa_err *err) {
    if (a->m == 0 || a->n == 0) return LSA_OK;
    if (a->k == 0) {
        if (a->beta == 0.0f)
            LSA_CUDA(cudaMemsetAsync(a->c, 0, (size_t)(a->m * a->n) * sizeof(float), lsa_cuda(c)->stream));
        return LSA_OK;
    }
    cublasLtMatmulDesc_t op = NULL;
    cublasLtMatrixLayout_t la = NULL, lb = NULL, lc = NULL;
    cublasLtMatmulPreference_t pref = NULL;
    const cublasOperation_t ta = a->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                            tb = a->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint64_t m = (uint64_t)a->m, n = (uint64_t)a->n, k = (uint64_t)a->k;
    /* a row-major [r, c] matrix is a column-major [c, r] one with leading dimension c */
    const uint64_t ar = a->trans_a ? k : m, ac = a->trans_a ? m : k, br = a->trans_b ? n : k,
                   bc = a->trans_b ? k : n;
    bool ok =
        cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F_PEDANTIC, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &tb, sizeof tb) ==
            CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSB, &ta, sizeof ta) ==
            CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&la, CUDA_R_32F, ac, ar, (int64_t)ac) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&lb, CUDA_R_32F, bc, br, (int64_t)bc) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&lc, CUDA_R_32F, n, m, (int64_t)n) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulPreferenceCreate(&pref) == CUBLAS_STATUS_SUCCESS;
    const size_t ws = lsa_cuda(c)->gemm_bytes;
    ok = ok && cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &ws,
                                                    sizeof ws) == CUBLAS_STATUS_SUCCESS;
    lsa_status st =
        ok ? run(c, a, op, la, lb, lc, pref, err)
           : lsa_err_set(err, LSA_E_DEVICE, __FILE__, __LINE__, "gemm: cuBLASLt refused the description");
    if (pref) cublasLtMatmulPreferenceDestroy(pref);
    if (lc) cublasLtMatrixLayoutDestroy(lc);
    if (lb) cublasLtMatrixLayoutDestroy(lb);
    if (la) cublasLtMatrixLayoutDestroy(la);
    if (op) cublasLtMatmulDescDestroy(op);
    return st;
}
