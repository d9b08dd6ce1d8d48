/* The GGUF sidecar by its bytes, and the weight types: rounding is a fixed point, codes times scales are the
 * values. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/weights.h"
#include "export/gguf.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/memory_sink.h"

static const lsa_indexer_geom g_geom = {.hidden = 24,
                                        .n_head = 2,
                                        .head_dim = 128,
                                        .rank = 5,
                                        .eps = 1e-6f,
                                        .rope = {64, 160000, 16, 65536, 32, 1},
                                        .n_layer = 2,
                                        .ord = {{1}, {3}},
                                        .id = {{4}, {8}}};

static float *make_params(void) {
    float *p = LSA_GEN_NEW(float, lsa_indexer_n_param(&g_geom));
    lsa_indexer_init_random(p, &g_geom, 5);
    return p;
}

static uint64_t get(const unsigned char **p, int width) {
    uint64_t v = 0;
    for (int i = width; i-- > 0;) v = v << 8 | (*p)[i];
    *p += width;
    return v;
}
static const char *get_string(const unsigned char **p, char *out, size_t cap) {
    const uint64_t n = get(p, 8);
    assert_true(n < cap);
    memcpy(out, *p, n);
    out[n] = 0;
    *p += n;
    return out;
}

static void test_gguf(void **state) {
    (void)state;
    float *params = make_params();
    lsa_memory m = {0}, again = {0};
    lsa_sink to = lsa_sink_memory(&m), to2 = lsa_sink_memory(&again);
    lsa_err err = {0};
    lsa_indexer_file f = {.geom = g_geom, .params = params, .tau = 64, .tail = 256, .threshold = 0.5};
    f.train = json_object();
    if (lsa_gguf_emit(&to, &f, &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_int_equal(lsa_gguf_emit(&to2, &f, &err), LSA_OK);
    assert_int_equal(m.n, again.n);
    assert_memory_equal(m.data, again.data, m.n);
    const unsigned char *p = m.data;
    char text[8192];
    assert_memory_equal(p, "GGUF", 4);
    p += 4;
    assert_int_equal(get(&p, 4), 3);
    assert_int_equal(get(&p, 8), 8);
    const uint64_t n_kv = get(&p, 8);
    bool seen = false;
    for (uint64_t i = 0; i < n_kv; i++) {
        char key[96];
        get_string(&p, key, sizeof key);
        const uint64_t type = get(&p, 4);
        assert_null(strstr(key, "calibration")); /* there is none */
        if (type == 8)
            get_string(&p, text, sizeof text);
        else if (type == 9) {
            assert_int_equal(get(&p, 4), 5);
            assert_int_equal(get(&p, 8), 2);
            const uint64_t a = get(&p, 4), b = get(&p, 4);
            if (!strcmp(key, "memidx.layers.ordinal")) seen = a == 1 && b == 3;
        } else
            get(&p, type == 12 ? 8 : 4);
    }
    assert_true(seen);
    uint64_t offset[8], elements[8];
    for (int i = 0; i < 8; i++) {
        get_string(&p, text, sizeof text);
        if (i == 0) assert_string_equal(text, "blk.4.memidx.wq_a.weight");
        if (i == 7) assert_string_equal(text, "blk.8.memidx.weights_proj.weight");
        const uint64_t n_dim = get(&p, 4);
        elements[i] = 1;
        for (uint64_t d = 0; d < n_dim; d++) {
            const uint64_t n = get(&p, 8);
            if (i == 0) assert_int_equal(n, d == 0 ? 24 : 5); /* the densest dimension first */
            elements[i] *= n;
        }
        assert_int_equal(get(&p, 4), 0);
        offset[i] = get(&p, 8);
        assert_int_equal(offset[i] % 32, 0);
    }
    const unsigned char *data = m.data + ((size_t)(p - m.data) + 31) / 32 * 32;
    for (int i = 0; i < 8; i++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_at(&g_geom, i / 4, (lsa_indexer_part)(i % 4));
        assert_int_equal(elements[i], t.n);
        assert_memory_equal(data + offset[i], params + t.offset, (size_t)t.n * 4);
    }
    assert_true(data + offset[7] + elements[7] * 4 <= m.data + m.n);
    json_decref(f.train);
    free(m.data), free(again.data), free(params);
}

/* Rounding twice is rounding once; bytes of the rounded values give the values back. */
static void test_weight_types(void **state) {
    (void)state;
    const int64_t n = lsa_indexer_n_param(&g_geom);
    float *x = make_params(), *y = LSA_GEN_NEW(float, n), *raw = LSA_GEN_NEW(float, n);
    const lsa_indexer_tensor a = lsa_indexer_tensor_at(&g_geom, 0, LSA_WQ_A);
    /* rows at the edges: zero, tiny, huge, a largest value just below and at the place where the scale
     * doubles */
    memset(x + a.offset, 0, 24 * sizeof *x);
    for (int i = 0; i < 24; i++) x[a.offset + 24 + i] = ldexpf(1, -149 + i);
    for (int i = 0; i < 24; i++) x[a.offset + 48 + i] = ldexpf(i % 2 ? -1.0f : 1.0f, 100 - 2 * i);
    x[a.offset + 72] = 464, x[a.offset + 96] = 465;
    memcpy(raw, x, (size_t)n * sizeof *x);
    for (int k = 0; k < 2; k++) {
        const lsa_dtype t = k ? LSA_F8_E4M3 : LSA_BF16;
        memcpy(x, raw, (size_t)n * sizeof *x);
        lsa_weights_round(x, &g_geom, t);
        memcpy(y, x, (size_t)n * sizeof *x);
        lsa_weights_round(y, &g_geom, t);
        assert_memory_equal(x, y, (size_t)n * sizeof *x);
        for (int l = 0; l < 2; l++)
            for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
                const lsa_indexer_tensor e = lsa_indexer_tensor_at(&g_geom, l, (lsa_indexer_part)p);
                lsa_memory m = {0}, s = {0};
                lsa_sink to = lsa_sink_memory(&m), to_scale = lsa_sink_memory(&s);
                const lsa_tensor_out o = lsa_weight_out("x", x, &g_geom, l, (lsa_indexer_part)p, t);
                assert_int_equal(o.emit(&o, &to, NULL), LSA_OK);
                assert_int_equal(m.n, lsa_tensor_out_bytes(&o));
                assert_int_equal(o.dtype, p == LSA_Q_NORM ? LSA_F32 : t);
                if (o.dtype == LSA_F8_E4M3) {
                    const lsa_tensor_out so = lsa_weight_scale_out("x", x, &g_geom, l, (lsa_indexer_part)p);
                    assert_string_equal(so.name, "x_scale");
                    assert_int_equal(so.emit(&so, &to_scale, NULL), LSA_OK);
                    assert_int_equal(s.n, e.shape[0] * 4);
                }
                double worst = 0;
                for (int64_t i = 0; i < e.n; i++) {
                    float v = 0, scale = 1;
                    if (s.n) memcpy(&scale, s.data + i / e.shape[1] * 4, 4);
                    uint16_t h = 0;
                    if (o.dtype == LSA_F32) memcpy(&v, m.data + i * 4, 4);
                    if (o.dtype == LSA_BF16) memcpy(&h, m.data + i * 2, 2), v = lsa_bf16_to_f32(h);
                    if (o.dtype == LSA_F8_E4M3) v = lsa_e4m3_to_f32(m.data[i]) * scale;
                    assert_true(v == x[e.offset + i]);
                    const double was = (double)raw[e.offset + i];
                    /* half a step of 3 or 7 bits, or of the smallest code, 2^-9 scale */
                    const double room = o.dtype == LSA_F32 ? 0
                                        : o.dtype == LSA_BF16
                                            ? fabs(was) * 0x1p-8 + 0x1p-134
                                            : fmax(fabs(was) * 0x1p-4, (double)scale * 0x1p-10);
                    assert_true(fabs((double)v - was) <= room);
                    if (s.n) worst = fmax(worst, fabs((double)v) / (double)scale);
                }
                /* the scale is the smallest that works: the largest code of a row is 240 or more, but for
                 * zero rows */
                if (s.n && e.offset != a.offset) assert_true(worst >= 240 && worst <= 448);
                free(m.data), free(s.data);
            }
    }
    lsa_dtype t;
    lsa_err err = {0};
    assert_int_equal(lsa_weight_dtype_parse(&t, "fp8", &err), LSA_OK);
    assert_int_equal(t, LSA_F8_E4M3);
    assert_int_equal(lsa_weight_dtype_parse(&t, "int8", &err), LSA_E_ARG);
    free(x), free(y), free(raw);
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_gguf), cmocka_unit_test(test_weight_types)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
