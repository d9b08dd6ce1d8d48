/* Stands in for the bf16 layer and its bench in builds without nvcc. */
#include "kernels/model/gpu_bench.h"

#define NO_CUDA LSA_RET_FAIL(LSA_E_UNSUPPORTED, "this build has no CUDA; configure with -DLSA_CUDA=ON")

lsa_status lsa_bf16_create(lsa_bf16 **out, lsa_ctx *ctx, const lsa_gpu_teacher_geom *g,
                           const float *freq_main, const float *freq_comp, int64_t max_tokens, int64_t chunk,
                           lsa_err *err) {
    (void)ctx, (void)g, (void)freq_main, (void)freq_comp, (void)max_tokens, (void)chunk;
    *out = NULL;
    NO_CUDA;
}
void lsa_bf16_destroy(lsa_bf16 *b) {
    (void)b;
}
int64_t lsa_bf16_bytes(const lsa_gpu_teacher_geom *g, int64_t max_tokens, int64_t chunk) {
    (void)g, (void)max_tokens, (void)chunk;
    return 0;
}
lsa_status lsa_bf16_layer(lsa_bf16 *b, const lsa_bf16_weights *w, uint16_t *X, const int32_t *token,
                          int64_t p, int64_t m, lsa_err *err) {
    (void)b, (void)w, (void)X, (void)token, (void)p, (void)m;
    NO_CUDA;
}
lsa_bf16_rows lsa_bf16_selected(const lsa_bf16 *b) {
    (void)b;
    return (lsa_bf16_rows){0};
}
void lsa_bf16_time(lsa_bf16 *b, bool on) {
    (void)b, (void)on;
}
void lsa_bf16_seconds(const lsa_bf16 *b, double out[LSA_BF16_STAGES]) {
    (void)b;
    for (int i = 0; i < LSA_BF16_STAGES; i++) out[i] = 0;
}

lsa_status lsa_layer_bench_create(lsa_layer_bench **out, int64_t *bytes, lsa_ctx *ctx,
                                  const lsa_gpu_teacher_geom *g, const float *freq_main,
                                  const float *freq_comp, int64_t max_tokens, int64_t chunk, int stores,
                                  lsa_err *err) {
    (void)ctx, (void)g, (void)freq_main, (void)freq_comp, (void)max_tokens, (void)chunk, (void)stores;
    if (out) *out = NULL;
    *bytes = 0;
    NO_CUDA;
}
void lsa_layer_bench_destroy(lsa_layer_bench *b) {
    (void)b;
}
lsa_status lsa_layer_bench_ceilings(lsa_layer_bench *b, double *flops, double *bandwidth, lsa_err *err) {
    (void)b, (void)flops, (void)bandwidth;
    NO_CUDA;
}
lsa_status lsa_layer_bench_weights(lsa_layer_bench *b, const lsa_layer_bench_layer *l, int64_t *stored,
                                   double *seconds, lsa_err *err) {
    (void)b, (void)l, (void)stored, (void)seconds;
    NO_CUDA;
}
lsa_status lsa_layer_bench_run(lsa_layer_bench *b, const lsa_layer_bench_layer *l, int64_t n, int runs,
                               double *seconds, double stage[LSA_BF16_STAGES], uint64_t *checksum,
                               lsa_err *err) {
    (void)b, (void)l, (void)n, (void)runs, (void)seconds, (void)stage, (void)checksum;
    NO_CUDA;
}
lsa_status lsa_layer_bench_stream(lsa_layer_bench *b, const lsa_layer_bench_layer *l, int layers,
                                  int64_t wave, int64_t document, double rate, lsa_layer_bench_wave *out,
                                  lsa_err *err) {
    (void)b, (void)l, (void)layers, (void)wave, (void)document, (void)rate, (void)out;
    NO_CUDA;
}
int64_t lsa_layer_bench_peak(const lsa_layer_bench *b) {
    (void)b;
    return 0;
}
