/* Numeric paths of a query: see query_path.h. */
#include "kernels/model/query_path.h"

#include <math.h>
#include <string.h>

#include "kernels/core/dtype.h"

static const char *const NAME[LSA_QUERY_PATHS] = {"f32", "bf16", "fp8"};

const char *lsa_query_path_name(lsa_query_path p) {
    return NAME[p];
}

lsa_status lsa_query_path_parse(lsa_query_path *out, const char *s, lsa_err *err) {
    for (int i = 0; i < LSA_QUERY_PATHS; i++)
        if (!strcmp(s, NAME[i])) {
            *out = (lsa_query_path)i;
            return LSA_OK;
        }
    LSA_RET_FAIL(LSA_E_ARG, "numeric path '%.40s' is unknown; expected f32, bf16 or fp8", s);
}

static void rotate(float *x, const lsa_rope *r, const float *freq, float position) {
    for (int32_t i = 0; i < r->dim / 2; i++) {
        const float angle = position * freq[i]; /* NUMERIC: rounded to f32 before sin and cos */
        const double c = cos((double)angle), s = sin((double)angle), u = (double)x[2 * i],
                     v = (double)x[2 * i + 1];
        x[2 * i] = (float)(u * c - v * s);
        x[2 * i + 1] = (float)(u * s + v * c);
    }
}

static void hadamard(float *q, const float *in) {
    double x[128];
    for (int i = 0; i < 128; i++) x[i] = (double)in[i];
    for (int h = 1; h < 128; h *= 2)
        for (int i = 0; i < 128; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                const double u = x[j], v = x[j + h];
                x[j] = u + v;
                x[j + h] = u - v;
            }
    for (int i = 0; i < 128; i++) q[i] = (float)(x[i] / sqrt(128.0));
}

static void round_all(float *x) {
    for (int i = 0; i < 128; i++) x[i] = lsa_round_bf16(x[i]);
}

void lsa_query_path_row(lsa_query_path p, const lsa_indexer_geom *g, const float *freq, int64_t position,
                        const float *raw, float *rope, float *q, uint8_t *code, float *scale) {
    for (int32_t h = 0; h < g->n_head; h++) {
        float x[128], *const out = q + (int64_t)h * 128;
        memcpy(x, raw + (int64_t)h * 128, sizeof x);
        if (p != LSA_PATH_F32) round_all(x);
        rotate(x + 128 - g->rope.dim, &g->rope, freq, (float)position);
        if (p != LSA_PATH_F32) round_all(x);
        if (rope) memcpy(rope + (int64_t)h * 128, x, sizeof x);
        hadamard(out, x);
        if (p != LSA_PATH_FP8) continue;
        float amax = 1e-4f;
        for (int i = 0; i < 128; i++) amax = fmaxf(amax, fabsf(out[i]));
        const float s = amax / 448.0f;
        if (scale) scale[h] = s;
        for (int i = 0; i < 128; i++) {
            const uint8_t c = lsa_f32_to_e4m3(out[i] / s);
            if (code) code[(int64_t)h * 128 + i] = c;
            out[i] = lsa_e4m3_to_f32(c) * s;
        }
    }
}
