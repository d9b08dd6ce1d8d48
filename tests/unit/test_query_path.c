/* The numeric paths of a query against an oracle of its own: rounding by arithmetic, RoPE in polar
 * coordinates, Hadamard by the parity of i & j, E4M3 by search over all values. Notes of FlashMemory 5.1
 * to 5.3. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "kernels/core/dtype.h"
#include "kernels/model/query_path.h"
#include "tests/testkit/compare.h"
#include "tests/testkit/gen.h"

enum { MAX_HEAD = 128, N = MAX_HEAD * 128 };

static const lsa_rope FLASH = {
    .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};

/* Eight significant bits, ties to even (nearbyint in the default rounding mode). */
static double to_bf16(double x) {
    int e;
    if (x == 0) return 0;
    frexp(x, &e);
    return ldexp(nearbyint(ldexp(x, 8 - e)), e - 8);
}

static double e4m3_value(int code) {
    const int e = code >> 3 & 15, m = code & 7;
    const double v = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
    return code & 128 ? -v : v;
}

/* Nearest of the 127 magnitudes, a tie to the even code. */
static int to_e4m3(double x) {
    int best = 0;
    for (int c = 0; c < 127; c++) {
        const double d = fabs(e4m3_value(c) - fabs(x)), b = fabs(e4m3_value(best) - fabs(x));
        if (d < b || (d == b && c % 2 == 0)) best = c;
    }
    return best | (x < 0 ? 128 : 0);
}

typedef struct oracle {
    float rope[N], q[N], scale[MAX_HEAD];
    uint8_t code[N];
} oracle;

static void compute(oracle *o, lsa_query_path p, int n_head, const lsa_rope *r, const float *freq,
                    int64_t position, const float *raw) {
    for (int h = 0; h < n_head; h++) {
        const float *in = raw + h * 128;
        float *x = o->rope + h * 128, *q = o->q + h * 128;
        for (int i = 0; i < 128; i++) x[i] = p == LSA_PATH_F32 ? in[i] : (float)to_bf16((double)in[i]);
        for (int i = 128 - r->dim; i < 128; i += 2) {
            volatile float angle = (float)position * freq[(i - 128 + r->dim) / 2]; /* rounded to f32 */
            const double len = hypot((double)x[i], (double)x[i + 1]),
                         to = atan2((double)x[i + 1], (double)x[i]) + (double)angle;
            x[i] = (float)(len * cos(to));
            x[i + 1] = (float)(len * sin(to));
        }
        if (p != LSA_PATH_F32)
            for (int i = 0; i < 128; i++) x[i] = (float)to_bf16((double)x[i]);
        double amax = 1e-4;
        for (int i = 0; i < 128; i++) {
            double s = 0;
            for (int j = 0; j < 128; j++)
                s += __builtin_parity((unsigned)(i & j)) ? -(double)x[j] : (double)x[j];
            q[i] = (float)(s * sqrt(1 / 128.0));
            amax = fmax(amax, fabs((double)q[i]));
        }
        if (p != LSA_PATH_FP8) continue;
        o->scale[h] = (float)amax / 448.0f;
        for (int i = 0; i < 128; i++) {
            o->code[h * 128 + i] = (uint8_t)to_e4m3((double)(q[i] / o->scale[h]));
            q[i] = (float)(e4m3_value(o->code[h * 128 + i]) * (double)o->scale[h]);
        }
    }
}

/* Equal but for the last bit of a double sum: a share of at most 0.1 % may be one rounding step off. */
static void close_to(const char *what, const float *a, const float *b, int n, double step) {
    int off = 0;
    for (int i = 0; i < n; i++)
        if (!(a[i] == b[i])) {
            off++;
            if (!(fabs((double)a[i] - (double)b[i]) <= step * fmax(fabs((double)b[i]), 1e-6)))
                fail_msg("%s[%d]: %.9g, expected %.9g", what, i, (double)a[i], (double)b[i]);
        }
    if (off > n / 1000 + 1) fail_msg("%s: %d of %d values differ", what, off, n);
}

static void test_paths(void **s) {
    (void)s;
    static float raw[N], rope[N], q[N];
    static oracle o;
    const lsa_rope rope_of[] = {
        FLASH,
        {.dim = 128, .base = 10000, .factor = 1, .original_len = 4096, .beta_fast = 32, .beta_slow = 1}};
    const int64_t position[] = {0, 61, 70003, 999983};
    const int heads[] = {1, 8, 128};
    lsa_rng r = lsa_rng_make(3, 5);
    for (int k = 0; k < 2; k++)
        for (int a = 0; a < 3; a++)
            for (int b = 0; b < 4; b++)
                for (int p = 0; p < LSA_QUERY_PATHS; p++) {
                    uint8_t code[N];
                    float freq[64], scale[MAX_HEAD];
                    const int n = heads[a] * 128;
                    const lsa_indexer_geom g = {.n_head = heads[a], .head_dim = 128, .rope = rope_of[k]};
                    lsa_rope_freqs(freq, &g.rope);
                    lsa_gen_fill(raw, n, 0.7f, &r);
                    if (heads[a] > 1) memset(raw + 128, 0, 128 * sizeof *raw); /* a silent head */
                    compute(&o, (lsa_query_path)p, heads[a], &g.rope, freq, position[b], raw);
                    lsa_query_path_row((lsa_query_path)p, &g, freq, position[b], raw, rope, q, code, scale);
                    const double step = p == LSA_PATH_F32 ? 0x1p-22 : 0x1p-7;
                    close_to("rope", rope, o.rope, n, step);
                    if (p == LSA_PATH_FP8) {
                        close_to("scale", scale, o.scale, heads[a], 0x1p-6);
                        int off = 0;
                        for (int i = 0; i < n; i++) off += code[i] != o.code[i];
                        assert_true(off <= n / 1000 + 1);
                        for (int i = 0; i < n; i++)
                            assert_true(q[i] == lsa_e4m3_to_f32(code[i]) * scale[i / 128]);
                        if (heads[a] > 1) assert_true(scale[1] == 1e-4f / 448);
                    } else
                        assert_true(lsa_compare_f32("q", q, o.q, n, (lsa_tol){1e-6, p ? 2e-3 : 1e-6, 0}));
                    /* q may be raw, and the rest is optional */
                    lsa_query_path_row((lsa_query_path)p, &g, freq, position[b], raw, NULL, raw, NULL, NULL);
                    assert_memory_equal(raw, q, (size_t)n * sizeof *q);
                }
}

/* What each rounding does to one value, by hand. */
static void test_rounding_points(void **s) {
    (void)s;
    float raw[128] = {0}, rope[128], q[128], scale, freq[32];
    uint8_t code[128];
    const lsa_indexer_geom g = {.n_head = 1, .head_dim = 128, .rope = FLASH};
    lsa_rope_freqs(freq, &g.rope);
    raw[0] = 1 + 0x1p-8f; /* halfway between two bf16 values: to the even one, 1 */
    raw[1] = 1 + 3 * 0x1p-8f;
    lsa_query_path_row(LSA_PATH_BF16, &g, freq, 1, raw, rope, q, NULL, NULL);
    assert_true(rope[0] == 1 && rope[1] == 1 + 0x1p-6f);
    lsa_query_path_row(LSA_PATH_F32, &g, freq, 1, raw, rope, q, NULL, NULL);
    assert_true(rope[0] == raw[0] && rope[1] == raw[1]);
    memset(raw, 0, sizeof raw);
    raw[64] = 1; /* the first rotated pair, frequency 1 */
    lsa_query_path_row(LSA_PATH_BF16, &g, freq, 1, raw, rope, q, NULL, NULL);
    assert_true(rope[64] == 0.5390625f && rope[65] == 0.83984375f); /* cos 1, sin 1 in bf16 */
    const float big = (0.5390625f + 0.83984375f) / sqrtf(128);
    assert_true(fabsf(q[0] - big) <= 0x1p-24f); /* not rounded again after Hadamard */
    lsa_query_path_row(LSA_PATH_FP8, &g, freq, 1, raw, rope, q, code, &scale);
    assert_true(fabsf(scale - big / 448) <= 0x1p-32f && code[0] == 0x7e);
    raw[5] = NAN;
    lsa_query_path_row(LSA_PATH_FP8, &g, freq, 1, raw, rope, q, code, &scale);
    for (int i = 0; i < 128; i++) assert_true(isnan(q[i])); /* never a number where one input is none */
}

static void test_names(void **s) {
    (void)s;
    lsa_query_path p;
    lsa_err err = {0};
    for (int i = 0; i < LSA_QUERY_PATHS; i++) {
        assert_int_equal(lsa_query_path_parse(&p, lsa_query_path_name((lsa_query_path)i), &err), LSA_OK);
        assert_int_equal(p, i);
    }
    assert_int_equal(lsa_query_path_parse(&p, "fp16", &err), LSA_E_ARG);
    assert_non_null(strstr(err.msg, "fp16"));
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_paths), cmocka_unit_test(test_rounding_points),
                                   cmocka_unit_test(test_names)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
