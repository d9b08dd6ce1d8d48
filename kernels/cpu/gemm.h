/* Single-precision matrix products on the CPU: OpenBLAS where the build has it, plain loops otherwise.
 *
 * All matrices are row-major with leading dimensions in elements; C = alpha*op(A)*op(B) + beta*C. The product
 * runs on the calling thread: callers parallelise over fixed blocks themselves (par.h), so results do not
 * depend on the number of threads. Thread-safe. Leaf: may be included by infer as well as by the cpu column.
 */
#ifndef LSA_KERNELS_CPU_GEMM_H
#define LSA_KERNELS_CPU_GEMM_H

#include <stdint.h>

/* C[m,n] = alpha * A[m,k] B[n,k]^T + beta * C: a linear layer with B = weight [out, in]. */
void lsa_gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc);
/* C[m,n] = alpha * A[m,k] B[k,n] + beta * C. */
void lsa_gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc);
/* C[m,n] = alpha * A[k,m]^T B[k,n] + beta * C. */
void lsa_gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc);

#endif
