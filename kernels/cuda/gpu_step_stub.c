/* Stands in for the CUDA training step in builds without nvcc; a file of its own, so that a test can bring a
 * step of its own. */
#include "kernels/model/gpu_step.h"

#define NO_CUDA LSA_RET_FAIL(LSA_E_UNSUPPORTED, "this build has no CUDA; configure with -DLSA_CUDA=ON")

lsa_status lsa_gpu_create(lsa_gpu_step **out, lsa_ctx *ctx, const lsa_indexer_geom *g, const lsa_gpu_opts *o,
                          const float *params, const float *m, const float *v, int64_t updates,
                          lsa_err *err) {
    (void)ctx, (void)g, (void)o, (void)params, (void)m, (void)v, (void)updates;
    *out = NULL;
    NO_CUDA;
}
lsa_status lsa_gpu_create_eval(lsa_gpu_step **out, lsa_gpu_step *s, int64_t windows, int64_t columns,
                               int32_t n_slot, lsa_err *err) {
    (void)s, (void)windows, (void)columns, (void)n_slot;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_destroy(lsa_gpu_step *s) {
    (void)s;
}
lsa_status lsa_gpu_thread_begin(const lsa_gpu_step *s, lsa_err *err) {
    (void)s;
    NO_CUDA;
}
lsa_status lsa_gpu_pool_put(lsa_gpu_step *s, int32_t slot, const lsa_gpu_doc *d, const void *block,
                            lsa_err *err) {
    (void)s, (void)slot, (void)d, (void)block;
    NO_CUDA;
}
lsa_status lsa_gpu_pool_wait(lsa_gpu_step *s, lsa_err *err) {
    (void)s;
    NO_CUDA;
}
lsa_status lsa_gpu_host_alloc(void **out, int64_t bytes, lsa_err *err) {
    (void)bytes;
    *out = NULL;
    NO_CUDA;
}
void lsa_gpu_host_free(void *p) {
    (void)p;
}
lsa_status lsa_gpu_memory(const lsa_gpu_step *s, int64_t *free_bytes, int64_t *total, lsa_err *err) {
    (void)s, (void)free_bytes, (void)total;
    NO_CUDA;
}
lsa_status lsa_gpu_launch(lsa_gpu_step *s, const lsa_gpu_row *row, double lr, lsa_err *err) {
    (void)s, (void)row, (void)lr;
    NO_CUDA;
}
lsa_status lsa_gpu_result_take(lsa_gpu_step *s, lsa_gpu_result *out, lsa_err *err) {
    (void)s, (void)out;
    NO_CUDA;
}
lsa_status lsa_gpu_wait(lsa_gpu_step *s, lsa_err *err) {
    (void)s;
    NO_CUDA;
}
lsa_status lsa_gpu_share(lsa_gpu_step *s, lsa_err *err) {
    (void)s;
    NO_CUDA;
}
lsa_status lsa_gpu_hash(lsa_gpu_step *s, uint64_t *out, lsa_err *err) {
    (void)s, (void)out;
    NO_CUDA;
}
lsa_status lsa_gpu_snapshot(lsa_gpu_step *s, lsa_err *err) {
    (void)s;
    NO_CUDA;
}
lsa_status lsa_gpu_snapshot_get(const lsa_gpu_step *s, float *params, float *m, float *v, lsa_err *err) {
    (void)s, (void)params, (void)m, (void)v;
    NO_CUDA;
}
lsa_status lsa_gpu_peek(lsa_gpu_step *s, int32_t *n_cand, int32_t *n_pos, int32_t *cand, float *y,
                        float *weight, float *grad, lsa_err *err) {
    (void)s, (void)n_cand, (void)n_pos, (void)cand, (void)y, (void)weight, (void)grad;
    NO_CUDA;
}
int64_t lsa_gpu_rows(const lsa_gpu_step *s) {
    (void)s;
    return 0;
}
lsa_status lsa_gpu_eval(lsa_gpu_step *s, int64_t m, const lsa_gpu_row *row, float threshold, int64_t topk,
                        int32_t n_budget, const double *budget, lsa_gpu_eval_row *out, lsa_err *err) {
    (void)s, (void)m, (void)row, (void)threshold, (void)topk, (void)n_budget, (void)budget, (void)out;
    NO_CUDA;
}
lsa_status lsa_gpu_mine(lsa_gpu_step *s, lsa_gpu_step *eval, int32_t slot, lsa_err *err) {
    (void)s, (void)eval, (void)slot;
    NO_CUDA;
}
lsa_status lsa_gpu_guards(lsa_gpu_step *s, lsa_err *err) {
    (void)s;
    NO_CUDA;
}
lsa_status lsa_gpu_stage_times(lsa_gpu_step *s, int repeats, lsa_gpu_times *out, lsa_err *err) {
    (void)s, (void)repeats, (void)out;
    NO_CUDA;
}
lsa_status lsa_gpu_ceilings(lsa_gpu_step *s, double *copy_rate, double *flop_rate, lsa_err *err) {
    (void)s, (void)copy_rate, (void)flop_rate;
    NO_CUDA;
}
