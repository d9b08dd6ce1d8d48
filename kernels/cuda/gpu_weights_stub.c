/* Stands in for the GPU teacher's streamed weights and logits in builds without nvcc; apart from the
 * teacher's stub, for a teacher made up by a test has no use for them. */
#include "kernels/model/gpu_teacher.h"

#define NO_CUDA LSA_RET_FAIL(LSA_E_UNSUPPORTED, "this build has no CUDA; configure with -DLSA_CUDA=ON")

lsa_status lsa_gpu_teacher_logits(lsa_gpu_teacher *t, int64_t first, int64_t m, float *logits, lsa_err *err) {
    (void)t, (void)first, (void)m, (void)logits;
    NO_CUDA;
}
lsa_status lsa_gpu_weights_create(lsa_gpu_weights **out, lsa_gpu_teacher *t, int64_t arena, int64_t stored,
                                  lsa_err *err) {
    (void)t, (void)arena, (void)stored;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_weights_destroy(lsa_gpu_weights *w) {
    (void)w;
}
char *lsa_gpu_weights_arena(const lsa_gpu_weights *w, int i) {
    (void)w, (void)i;
    return NULL;
}
char *lsa_gpu_weights_staging(const lsa_gpu_weights *w, int i) {
    (void)w, (void)i;
    return NULL;
}
lsa_status lsa_gpu_weights_upload(lsa_gpu_weights *w, int i, const lsa_gpu_tensor *tensor, int64_t n,
                                  int64_t bytes, lsa_err *err) {
    (void)w, (void)i, (void)tensor, (void)n, (void)bytes;
    NO_CUDA;
}
lsa_status lsa_gpu_weights_wait_staging(lsa_gpu_weights *w, int i, lsa_err *err) {
    (void)w, (void)i;
    NO_CUDA;
}
lsa_status lsa_gpu_weights_begin(lsa_gpu_weights *w, int i, int64_t *bad, lsa_err *err) {
    (void)w, (void)i, (void)bad;
    NO_CUDA;
}
lsa_status lsa_gpu_weights_end(lsa_gpu_weights *w, int i, lsa_err *err) {
    (void)w, (void)i;
    NO_CUDA;
}
lsa_status lsa_gpu_layer_borrow(lsa_gpu_layer **out, lsa_gpu_teacher *t, const lsa_gpu_layer_weights *w,
                                lsa_err *err) {
    (void)t, (void)w;
    *out = NULL;
    NO_CUDA;
}
lsa_status lsa_gpu_pin(void **out, int64_t bytes, lsa_err *err) {
    (void)bytes;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_unpin(void *p) {
    (void)p;
}
lsa_status lsa_gpu_teacher_turn(lsa_gpu_teacher *t, lsa_err *err) {
    (void)t;
    NO_CUDA;
}
