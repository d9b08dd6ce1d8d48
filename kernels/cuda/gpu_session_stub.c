/* Stands in for the GPU session in builds without nvcc. */
#include "kernels/model/gpu_session.h"

#define NO_CUDA LSA_RET_FAIL(LSA_E_UNSUPPORTED, "this build has no CUDA; configure with -DLSA_CUDA=ON")

lsa_status lsa_gpu_session_create(lsa_gpu_session **out, lsa_gpu_teacher *t, lsa_gpu_layer *const *layer,
                                  int32_t n_layer, const lsa_gpu_session_opts *o, lsa_err *err) {
    (void)t, (void)layer, (void)n_layer, (void)o;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_session_destroy(lsa_gpu_session *s) {
    (void)s;
}
void lsa_gpu_session_reset(lsa_gpu_session *s) {
    (void)s;
}
int64_t lsa_gpu_session_position(const lsa_gpu_session *s) {
    (void)s;
    return 0;
}
lsa_status lsa_gpu_session_set_resident(lsa_gpu_session *s, const uint8_t *resident, int64_t n_masked,
                                        lsa_err *err) {
    (void)s, (void)resident, (void)n_masked;
    NO_CUDA;
}
lsa_status lsa_gpu_session_prefetch(lsa_gpu_session *s, const uint8_t *resident, int64_t n_masked,
                                    lsa_err *err) {
    (void)s, (void)resident, (void)n_masked;
    NO_CUDA;
}
void lsa_gpu_session_count(const lsa_gpu_session *s, lsa_gpu_session_use *out) {
    (void)s;
    *out = (lsa_gpu_session_use){0};
}
lsa_status lsa_gpu_session_forward(lsa_gpu_session *s, const int32_t *token, int64_t m, float *logits,
                                   bool last_only, lsa_gpu_session_tap *tap, void *user, int64_t *n_miss,
                                   lsa_err *err) {
    (void)s, (void)token, (void)m, (void)logits, (void)last_only, (void)tap, (void)user, (void)n_miss;
    NO_CUDA;
}
lsa_status lsa_gpu_session_keys(lsa_gpu_session *s, int32_t layer, int64_t first, int64_t last, float *key,
                                lsa_err *err) {
    (void)s, (void)layer, (void)first, (void)last, (void)key;
    NO_CUDA;
}
lsa_status lsa_gpu_session_hidden(lsa_gpu_session *s, int32_t layer, float *hidden, lsa_err *err) {
    (void)s, (void)layer, (void)hidden;
    NO_CUDA;
}
