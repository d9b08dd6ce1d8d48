/* Stands in for batched decode steps in builds without nvcc. */
#include "kernels/model/gpu_batch.h"

#define NO_CUDA LSA_RET_FAIL(LSA_E_UNSUPPORTED, "this build has no CUDA; configure with -DLSA_CUDA=ON")

lsa_status lsa_gpu_pages_create(lsa_gpu_pages **out, lsa_ctx *ctx, const lsa_gpu_batch_opts *o,
                                lsa_err *err) {
    (void)ctx, (void)o;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_pages_destroy(lsa_gpu_pages *p) {
    (void)p;
}
int64_t lsa_gpu_pages_bytes(const lsa_gpu_pages *p) {
    (void)p;
    return 0;
}
lsa_status lsa_gpu_batch_create(lsa_gpu_batch **out, lsa_ctx *ctx, const lsa_gpu_batch_opts *o,
                                lsa_err *err) {
    (void)ctx, (void)o;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_batch_destroy(lsa_gpu_batch *b) {
    (void)b;
}
const lsa_gpu_batch_use *lsa_gpu_batch_count(const lsa_gpu_batch *b) {
    static const lsa_gpu_batch_use none;
    (void)b;
    return &none;
}
int64_t lsa_gpu_batch_resident(const lsa_gpu_batch *b) {
    (void)b;
    return 0;
}
lsa_status lsa_gpu_batch_launch(lsa_gpu_batch *b, lsa_gpu_batch_part part, lsa_err *err) {
    (void)b, (void)part;
    NO_CUDA;
}
lsa_status lsa_gpu_batch_layer(lsa_gpu_batch *b, int32_t layer, lsa_err *err) {
    (void)b, (void)layer;
    NO_CUDA;
}
lsa_status lsa_gpu_batch_time(lsa_gpu_batch *b, lsa_gpu_batch_part part, int32_t n, int64_t flush,
                              double *seconds, lsa_err *err) {
    (void)b, (void)part, (void)n, (void)flush, (void)seconds;
    NO_CUDA;
}
lsa_status lsa_gpu_batch_steps(lsa_gpu_batch *b, int32_t n, double *seconds, lsa_err *err) {
    (void)b, (void)n, (void)seconds;
    NO_CUDA;
}
lsa_status lsa_gpu_batch_level1(lsa_gpu_batch *b, lsa_gpu_retriever *x, int32_t hidden, int32_t cycle,
                                const int32_t **page, int64_t *ld, const int32_t **n, double *seconds,
                                lsa_err *err) {
    (void)b, (void)x, (void)hidden, (void)cycle, (void)page, (void)ld, (void)n, (void)seconds;
    NO_CUDA;
}
lsa_status lsa_gpu_batch_swap(lsa_gpu_batch *b, const lsa_gpu_pages *from, const int32_t *page, int64_t ld,
                              const int32_t *n, int64_t *moved, lsa_err *err) {
    (void)b, (void)from, (void)page, (void)ld, (void)n, (void)moved;
    NO_CUDA;
}
lsa_status lsa_gpu_batch_publish(lsa_gpu_batch *b, double *seconds, lsa_err *err) {
    (void)b, (void)seconds;
    NO_CUDA;
}
lsa_status lsa_gpu_batch_see(lsa_gpu_batch *b, int32_t request, lsa_gpu_batch_view *v, lsa_err *err) {
    (void)b, (void)request, (void)v;
    NO_CUDA;
}
