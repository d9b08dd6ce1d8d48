/* Matrix products: see gemm.h. OpenBLAS must stay on the calling thread; parallelism is ours.
 *
 * Its OpenMP build follows omp_get_max_threads() when it is called outside an active parallel region (a
 * region of one thread counts as outside), and openblas_set_num_threads() writes that same setting. So the
 * setting is 1 during a call and restored after. */
#include "kernels/cpu/gemm.h"

#ifdef LSA_HAVE_OPENBLAS
#include <cblas.h>
#include <omp.h>
#include <pthread.h>

static pthread_once_t g_once = PTHREAD_ONCE_INIT;

static void one_thread(void) {
    openblas_set_num_threads(1);
}

static void gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t m, int64_t n, int64_t k, float alpha,
                 const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c,
                 int64_t ldc) {
    if (m == 0 || n == 0) return;
    const int threads = omp_get_max_threads();
    pthread_once(&g_once, one_thread);
    omp_set_num_threads(1);
    cblas_sgemm(CblasRowMajor, ta, tb, (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b,
                (blasint)ldb, beta, c, (blasint)ldc);
    omp_set_num_threads(threads);
}

void lsa_gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc) {
    gemm(CblasNoTrans, CblasTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void lsa_gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc) {
    gemm(CblasNoTrans, CblasNoTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void lsa_gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc) {
    gemm(CblasTrans, CblasNoTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

#else /* plain loops, ordered so that the innermost one is contiguous */

static void scale_c(int64_t m, int64_t n, float beta, float *c, int64_t ldc) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) c[i * ldc + j] = beta == 0.0f ? 0.0f : beta * c[i * ldc + j];
}

void lsa_gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc) {
    scale_c(m, n, beta, c, ldc);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            float s = 0.0f;
            for (int64_t p = 0; p < k; p++) s += a[i * lda + p] * b[j * ldb + p];
            c[i * ldc + j] += alpha * s;
        }
}
void lsa_gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc) {
    scale_c(m, n, beta, c, ldc);
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++) {
            float f = alpha * a[i * lda + p];
            for (int64_t j = 0; j < n; j++) c[i * ldc + j] += f * b[p * ldb + j];
        }
}
void lsa_gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                 int64_t ldb, float beta, float *c, int64_t ldc) {
    scale_c(m, n, beta, c, ldc);
    for (int64_t p = 0; p < k; p++)
        for (int64_t i = 0; i < m; i++) {
            float f = alpha * a[p * lda + i];
            for (int64_t j = 0; j < n; j++) c[i * ldc + j] += f * b[p * ldb + j];
        }
}
#endif
