/* Weight dtypes: see weights.h. The mistake that would stay silent: a scale that is not a fixed point, so
 * that exporting an imported file moves every code of a row by one. */
#include "data/weights.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/num.h"

enum { BLOCK = 16384 };

const char *lsa_weight_dtype_name(lsa_dtype t) {
    return t == LSA_F8_E4M3 ? "fp8" : t == LSA_BF16 ? "bf16" : "f32";
}

lsa_status lsa_weight_dtype_parse(lsa_dtype *out, const char *s, lsa_err *err) {
    static const lsa_dtype all[] = {LSA_F32, LSA_BF16, LSA_F8_E4M3};
    for (int i = 0; i < 3; i++)
        if (!strcmp(s, lsa_weight_dtype_name(all[i]))) {
            *out = all[i];
            return LSA_OK;
        }
    LSA_RET_FAIL(LSA_E_ARG, "weight type '%.40s' is unknown; expected f32, bf16 or fp8", s);
}

/* Smallest power of two s in [2^-126, 2^120] with amax <= 464 s. */
static float row_scale(const float *x, int64_t cols) {
    float amax = 0;
    int e;
    for (int64_t i = 0; i < cols; i++) amax = fmaxf(amax, fabsf(x[i]));
    frexpf(amax, &e); /* amax < 2^e: 2^(e-9) holds 512, 2^(e-8) only if amax / 2^(e-9) > 464 */
    float s = ldexpf(1, e - 9 < -126 || amax == 0 ? -126 : e - 9);
    return amax / s > 464 ? s * 2 : s;
}

static void round_rows(float *x, int64_t rows, int64_t cols, lsa_dtype t) {
    for (int64_t r = 0; r < rows; r++, x += cols) {
        if (t == LSA_BF16)
            for (int64_t i = 0; i < cols; i++) x[i] = lsa_round_bf16(x[i]);
        if (t != LSA_F8_E4M3) continue;
        const float s = row_scale(x, cols);
        for (int64_t i = 0; i < cols; i++) x[i] = lsa_e4m3_to_f32(lsa_f32_to_e4m3(x[i] / s)) * s;
    }
}

void lsa_weights_round(float *params, const lsa_indexer_geom *g, lsa_dtype t) {
    for (int32_t l = 0; l < g->n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_at(g, l, (lsa_indexer_part)p);
            if (p != LSA_Q_NORM) round_rows(params + x.offset, x.shape[0], x.shape[1], t);
        }
}

/* ---- writing ---- */

static lsa_status emit_f32(const lsa_tensor_out *t, lsa_sink *to, lsa_err *err) {
    return lsa_sink_put(to, t->src, (size_t)lsa_tensor_out_bytes(t), err);
}

static lsa_status emit_bf16(const lsa_tensor_out *t, lsa_sink *to, lsa_err *err) {
    uint16_t buf[BLOCK];
    const float *x = t->src;
    const int64_t n = t->shape[0] * t->shape[1];
    lsa_status st = LSA_OK;
    for (int64_t at = 0; st == LSA_OK && at < n; at += BLOCK) {
        const int64_t m = lsa_min_i64(BLOCK, n - at);
        for (int64_t i = 0; i < m; i++) buf[i] = lsa_f32_to_bf16(x[at + i]);
        st = lsa_sink_put(to, buf, (size_t)m * sizeof *buf, err);
    }
    return st;
}

static lsa_status emit_e4m3(const lsa_tensor_out *t, lsa_sink *to, lsa_err *err) {
    uint8_t buf[BLOCK];
    const float *x = t->src;
    lsa_status st = LSA_OK;
    for (int64_t r = 0; r < t->shape[0]; r++, x += t->shape[1]) {
        const float s = row_scale(x, t->shape[1]);
        for (int64_t at = 0; st == LSA_OK && at < t->shape[1]; at += BLOCK) {
            const int64_t m = lsa_min_i64(BLOCK, t->shape[1] - at);
            for (int64_t i = 0; i < m; i++) buf[i] = lsa_f32_to_e4m3(x[at + i] / s);
            st = lsa_sink_put(to, buf, (size_t)m, err);
        }
    }
    return st;
}

static lsa_status emit_scale(const lsa_tensor_out *t, lsa_sink *to, lsa_err *err) {
    const float *x = t->src;
    lsa_status st = LSA_OK;
    for (int64_t r = 0; st == LSA_OK && r < t->shape[0]; r++) {
        const float s = row_scale(x + r * t->src_cols, t->src_cols);
        st = lsa_sink_put(to, &s, sizeof s, err);
    }
    return st;
}

lsa_tensor_out lsa_weight_out(const char *name, const float *params, const lsa_indexer_geom *g, int32_t l,
                              lsa_indexer_part p, lsa_dtype t) {
    const lsa_indexer_tensor x = lsa_indexer_tensor_at(g, l, p);
    if (p == LSA_Q_NORM) t = LSA_F32;
    lsa_tensor_out o = {.dtype = t,
                        .n_dim = x.n_dim,
                        .shape = {x.shape[0], x.shape[1]},
                        .emit = t == LSA_F32    ? emit_f32
                                : t == LSA_BF16 ? emit_bf16
                                                : emit_e4m3,
                        .src = params + x.offset};
    snprintf(o.name, sizeof o.name, "%s", name);
    return o;
}

lsa_tensor_out lsa_weight_scale_out(const char *name, const float *params, const lsa_indexer_geom *g,
                                    int32_t l, lsa_indexer_part p) {
    const lsa_indexer_tensor x = lsa_indexer_tensor_at(g, l, p);
    lsa_tensor_out o = {.dtype = LSA_F32,
                        .n_dim = 2,
                        .shape = {x.shape[0], 1},
                        .emit = emit_scale,
                        .src = params + x.offset,
                        .src_cols = x.shape[1]};
    snprintf(o.name, sizeof o.name, "%s_scale", name);
    return o;
}
