/* The products of all layers, batched, by cuBLASLt: bf16 operands, f32 accumulation. Plans are made once; the
 * algorithm is the heuristic's first for the shape, so two runs make the same choice. Row-major C = op(A)
 * op(B) is column-major C^T = op(B)^T op(A)^T. */
#include <math.h>

#include "kernels/cuda/step/step_state.h"

struct product { /* one layer, row-major: C [m,n] = op(A) op(B), k inner; strides between layers in elements
                  */
    bool trans_a, trans_b;
    int64_t m, n, k, stride_a, stride_b, stride_c;
    cudaDataType_t type_c;
    float alpha;
};

static bool layout(cublasLtMatrixLayout_t *out, cudaDataType_t type, int64_t rows, int64_t cols,
                   int64_t stride, int32_t layers) {
    return cublasLtMatrixLayoutCreate(out, type, (uint64_t)cols, (uint64_t)rows, cols) ==
               CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &layers,
                                            sizeof layers) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                            sizeof stride) == CUBLAS_STATUS_SUCCESS;
}

static lsa_status plan(lsa_gpu_step *s, step_gemm *out, const product *p, int32_t layers, bool add,
                       lsa_err *err) {
    const cublasOperation_t ta = p->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                            tb = p->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatmulPreference_t pref = NULL;
    cublasLtMatmulHeuristicResult_t h;
    const size_t ws = s->cs->gemm_bytes;
    const uint32_t align = 16;
    int found = 0;
    out->alpha = p->alpha;
    out->beta = add ? 1.0f : 0.0f;
    bool ok = cublasLtMatmulDescCreate(&out->op, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
              cublasLtMatmulDescSetAttribute(out->op, CUBLASLT_MATMUL_DESC_TRANSA, &tb, sizeof tb) ==
                  CUBLAS_STATUS_SUCCESS &&
              cublasLtMatmulDescSetAttribute(out->op, CUBLASLT_MATMUL_DESC_TRANSB, &ta, sizeof ta) ==
                  CUBLAS_STATUS_SUCCESS &&
              layout(&out->a, CUDA_R_16BF, p->trans_a ? p->k : p->m, p->trans_a ? p->m : p->k, p->stride_a,
                     layers) &&
              layout(&out->b, CUDA_R_16BF, p->trans_b ? p->n : p->k, p->trans_b ? p->k : p->n, p->stride_b,
                     layers) &&
              layout(&out->c, p->type_c, p->m, p->n, p->stride_c, layers) &&
              cublasLtMatmulPreferenceCreate(&pref) == CUBLAS_STATUS_SUCCESS &&
              cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &ws,
                                                   sizeof ws) == CUBLAS_STATUS_SUCCESS;
    const cublasLtMatmulPreferenceAttributes_t mins[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; ok && i < 4; i++)
        ok = cublasLtMatmulPreferenceSetAttribute(pref, mins[i], &align, sizeof align) ==
             CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatmulAlgoGetHeuristic(s->cs->lt, out->op, out->b, out->a, out->c, out->c, pref, 1, &h,
                                              &found) == CUBLAS_STATUS_SUCCESS;
    if (pref) cublasLtMatmulPreferenceDestroy(pref);
    if (!ok || !found)
        LSA_RET_FAIL(LSA_E_DEVICE, "projection [%lld,%lld,%lld]: cuBLASLt has no algorithm", (long long)p->m,
                     (long long)p->n, (long long)p->k);
    out->algo = h.algo;
    return LSA_OK;
}

lsa_status step_gemm_plan(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t m = s->o.micro, d = s->g.hidden, r = s->g.rank, H = s->g.n_head, q = H * 128,
                  P = s->layer_param;
    const float c = (float)(1.0 / sqrt((double)s->g.head_dim * (double)H));
    const cudaDataType_t grad = s->g16 ? CUDA_R_16BF : CUDA_R_32F;
    const product list[STEP_GEMMS] = {
        {false, true, m, r, d, m * d, P, m * r, CUDA_R_32F, 1},  /* A:   a = x Wa^T */
        {false, true, m, H, d, m * d, P, m * H, CUDA_R_32F, c},  /* W:   w = c x Ww^T */
        {false, true, m, q, r, m * r, P, m * q, CUDA_R_16BF, 1}, /* Q:   q = u Wb^T */
        {false, false, m, r, q, m * q, P, m * r, CUDA_R_32F, 1}, /* DU:  du = dq Wb */
        {true, false, q, r, m, m * q, m * r, P, grad, 1},        /* DWB: dWb = dq^T u */
        {true, false, r, d, m, m * r, m * d, P, grad, 1},        /* DWA: dWa = da^T x */
        {true, false, H, d, m, m * H, m * d, P, grad, c},        /* DWW: dWw = c dw^T x */
    };
    const int last = s->eval_only ? GEMM_Q : GEMM_DWW;
    for (int i = 0; i <= last; i++) {
        LSA_TRY(plan(s, &s->gemm[i], &list[i], s->g.n_layer, false, err));
        if (i >= GEMM_DWB && s->o.micro < s->o.batch)
            LSA_TRY(plan(s, &s->gemm_add[i], &list[i], s->g.n_layer, true, err));
    }
done:
    return st;
}

void step_gemm_drop(step_gemm *g) {
    if (g->op) cublasLtMatmulDescDestroy(g->op);
    if (g->a) cublasLtMatrixLayoutDestroy(g->a);
    if (g->b) cublasLtMatrixLayoutDestroy(g->b);
    if (g->c) cublasLtMatrixLayoutDestroy(g->c);
}
void step_gemm_free(lsa_gpu_step *s) {
    for (int i = 0; i < STEP_GEMMS; i++) {
        step_gemm_drop(&s->gemm[i]);
        step_gemm_drop(&s->gemm_add[i]);
    }
}

lsa_status step_gemm_on(lsa_gpu_step *s, const step_gemm *g, const void *a, const void *b, void *c,
                        lsa_err *err) {
    const cublasStatus_t e =
        cublasLtMatmul(s->cs->lt, g->op, &g->alpha, b, g->b, a, g->a, &g->beta, c, g->c, c, g->c, &g->algo,
                       s->cs->gemm_workspace, s->cs->gemm_bytes, s->cs->stream);
    if (e != CUBLAS_STATUS_SUCCESS) LSA_RET_FAIL(LSA_E_DEVICE, "projection: cuBLASLt status %d", (int)e);
    return LSA_OK;
}

lsa_status step_square_plan(lsa_gpu_step *s, step_gemm *out, int64_t n, lsa_err *err) {
    const product p = {false, true, n, n, n, n * n, n * n, n * n, CUDA_R_16BF, 1};
    return plan(s, out, &p, 1, false, err);
}

static __global__ void random_k(bf16 *x, int64_t n) { /* not zeros: they run faster than data */
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
        const uint32_t h = (uint32_t)i * 2654435761u;
        x[i] = __float2bfloat16((float)((int)(h >> 16 ^ (h & 0xffff)) - 32768) * (1.0f / 32768));
    }
}
void step_random_bf16(lsa_gpu_step *s, bf16 *x, int64_t n) {
    random_k<<<4096, 256, 0, s->cs->stream>>>(x, n);
}

static void *gradient_at(const lsa_gpu_step *s, int64_t at) {
    return s->g16 ? (void *)(s->g16 + at) : (void *)(s->grad + at);
}

lsa_status step_gemm_run(lsa_gpu_step *s, step_gemm_id id, bool add, lsa_err *err) {
    const step_gemm *const g = add ? &s->gemm_add[id] : &s->gemm[id];
    const void *a = NULL, *b = NULL;
    void *c = NULL;
    switch (id) {
    case GEMM_A:
        a = s->x, b = s->p16 + s->at_wa, c = s->a;
        break;
    case GEMM_W:
        a = s->x, b = s->p16 + s->at_ww, c = s->w;
        break;
    case GEMM_Q:
        a = s->u, b = s->p16 + s->at_wb, c = s->qlin;
        break;
    case GEMM_DU:
        a = s->dq, b = s->p16 + s->at_wb, c = s->du;
        break;
    case GEMM_DWB:
        a = s->dq, b = s->u, c = gradient_at(s, s->at_wb);
        break;
    case GEMM_DWA:
        a = s->da, b = s->x, c = gradient_at(s, s->at_wa);
        break;
    case GEMM_DWW:
        a = s->dw, b = s->x, c = gradient_at(s, s->at_ww);
        break;
    }
    return step_gemm_on(s, g, a, b, c, err);
}
