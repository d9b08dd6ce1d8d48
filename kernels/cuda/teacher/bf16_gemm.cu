/* Products of the bf16 tier by cuBLASLt: bf16 factors, f32 sums, bf16 or f32 results. Row-major C = A B^T is
 * column-major C^T = B A^T. Choices are kept by shape, as in gemm.cu; each stream has a workspace of its own.
 */
#include <stdlib.h>

#include "kernels/cuda/teacher/bf16_state.h"

enum { PLANS = 256, WORKSPACE = 32 << 20 };

struct bf16_plan {
    int64_t m, n, k, lda, ldb, ldc;
    bool c_f32;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t la, lb, lc;
    cublasLtMatmulAlgo_t algo;
};
struct bf16_plans {
    bf16_plan plan[PLANS];
    int n, next; /* next: which is replaced once all are taken */
};

static void forget(bf16_plan *p) {
    if (p->lc) cublasLtMatrixLayoutDestroy(p->lc);
    if (p->lb) cublasLtMatrixLayoutDestroy(p->lb);
    if (p->la) cublasLtMatrixLayoutDestroy(p->la);
    if (p->op) cublasLtMatmulDescDestroy(p->op);
    *p = {};
}

void bf16_gemm_close(lsa_bf16 *b) {
    for (int i = 0; b->plans && i < b->plans->n; i++) forget(&b->plans->plan[i]);
    free(b->plans);
    b->plans = NULL;
}

static lsa_status make(lsa_bf16 *b, const bf16_product *g, bf16_plan *p, lsa_err *err) {
    *p = {g->m, g->n, g->k, g->lda, g->ldb, g->ldc, g->c_f32, NULL, NULL, NULL, NULL, {}};
    const cublasOperation_t t = CUBLAS_OP_T, n = CUBLAS_OP_N;
    const uint64_t M = (uint64_t)g->m, N = (uint64_t)g->n, K = (uint64_t)g->k;
    const size_t room = WORKSPACE;
    cublasLtMatmulPreference_t pref = NULL;
    cublasLtMatmulHeuristicResult_t h;
    int found = 0;
    const bool ok =
        cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t) ==
            CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &n, sizeof n) ==
            CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&p->la, CUDA_R_16BF, K, M, g->lda) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&p->lb, CUDA_R_16BF, K, N, g->ldb) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatrixLayoutCreate(&p->lc, g->c_f32 ? CUDA_R_32F : CUDA_R_16BF, N, M, g->ldc) ==
            CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulPreferenceCreate(&pref) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room,
                                             sizeof room) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulAlgoGetHeuristic(b->cs->lt, p->op, p->lb, p->la, p->lc, p->lc, pref, 1, &h, &found) ==
            CUBLAS_STATUS_SUCCESS &&
        found;
    if (pref) cublasLtMatmulPreferenceDestroy(pref);
    if (!ok) {
        forget(p);
        LSA_RET_FAIL(LSA_E_DEVICE, "bf16 product [%lld,%lld,%lld]: cuBLASLt has no algorithm",
                     (long long)g->m, (long long)g->n, (long long)g->k);
    }
    p->algo = h.algo;
    return LSA_OK;
}

static lsa_status plan_for(lsa_bf16 *b, const bf16_product *g, bf16_plan **out, lsa_err *err) {
    if (!b->plans) b->plans = (bf16_plans *)calloc(1, sizeof *b->plans);
    if (!b->plans) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    bf16_plans *const all = b->plans;
    for (int i = 0; i < all->n; i++) {
        bf16_plan *const p = &all->plan[i];
        if (p->m == g->m && p->n == g->n && p->k == g->k && p->lda == g->lda && p->ldb == g->ldb &&
            p->ldc == g->ldc && p->c_f32 == g->c_f32 && p->op) {
            *out = p;
            return LSA_OK;
        }
    }
    bf16_plan *p;
    if (all->n < PLANS) {
        p = &all->plan[all->n++];
    } else {
        p = &all->plan[all->next];
        all->next = (all->next + 1) % PLANS;
        forget(p);
    }
    *out = p;
    return make(b, g, p, err);
}

lsa_status bf16_gemm(lsa_bf16 *b, int lane, const bf16_product *g, lsa_err *err) {
    bf16_plan *p = NULL;
    const float one = 1.0f, zero = 0.0f;
    const lsa_status st = plan_for(b, g, &p, err);
    if (st != LSA_OK) return st;
    const cublasStatus_t e =
        cublasLtMatmul(b->cs->lt, p->op, &one, g->b, p->lb, g->a, p->la, &zero, g->c, p->lc, g->c, p->lc,
                       &p->algo, b->workspace[lane], WORKSPACE, b->lane[lane]);
    if (e != CUBLAS_STATUS_SUCCESS)
        LSA_RET_FAIL(LSA_E_DEVICE, "bf16 product [%lld,%lld,%lld]: cuBLASLt status %d", (long long)g->m,
                     (long long)g->n, (long long)g->k, (int)e);
    return LSA_OK;
}
