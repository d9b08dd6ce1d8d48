/* Stands in for the GPU teacher in builds without nvcc. */
#include "kernels/model/gpu_teacher.h"

#define NO_CUDA LSA_RET_FAIL(LSA_E_UNSUPPORTED, "this build has no CUDA; configure with -DLSA_CUDA=ON")

lsa_status lsa_gpu_teacher_create(lsa_gpu_teacher **out, lsa_ctx *ctx, const lsa_gpu_teacher_geom *g,
                                  const lsa_gpu_teacher_tables *w, int64_t max_tokens, int64_t chunk,
                                  lsa_err *err) {
    (void)ctx, (void)g, (void)w, (void)max_tokens, (void)chunk;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_teacher_destroy(lsa_gpu_teacher *t) {
    (void)t;
}
lsa_status lsa_gpu_layer_put(lsa_gpu_layer **out, lsa_gpu_teacher *t, const lsa_gpu_layer_weights *w,
                             lsa_err *err) {
    (void)t, (void)w;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_layer_drop(lsa_gpu_layer *l) {
    (void)l;
}
lsa_status lsa_gpu_teacher_begin(lsa_gpu_teacher *t, const lsa_gpu_teacher_doc *doc, lsa_err *err) {
    (void)t, (void)doc;
    NO_CUDA;
}
lsa_status lsa_gpu_teacher_layer(lsa_gpu_teacher *t, const lsa_gpu_layer *l, lsa_gpu_csa_tap *tap, void *user,
                                 lsa_err *err) {
    (void)t, (void)l, (void)tap, (void)user;
    NO_CUDA;
}
lsa_status lsa_gpu_teacher_drain(lsa_gpu_teacher *t, lsa_err *err) {
    (void)t;
    NO_CUDA;
}
lsa_status lsa_gpu_teacher_seconds(lsa_gpu_teacher *t, double out[LSA_GPU_STAGES], lsa_err *err) {
    (void)t, (void)out;
    NO_CUDA;
}
lsa_status lsa_gpu_free_bytes(int64_t *out, lsa_ctx *ctx, lsa_err *err) {
    (void)ctx;
    *out = 0;
    NO_CUDA;
}
