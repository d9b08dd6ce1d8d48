/* The server ABI on the CPU against plain double-precision loops written here from the notes 5.1; rules and
 * their calibrated thresholds; every refused argument. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "export/abi/lsa_indexer.h"
#include "export/abi/rule.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "kernels/model/query_path.h"
#include "tests/testkit/compare.h"
#include "tests/testkit/export_fixture.h"
#include "tests/testkit/gen.h"

enum { M = 3, N = 700, D = 48, H = 8, LAYERS = 3, LD = 720, PAGES = 11 };

static char g_dir[] = "/tmp/lsa-abi-XXXXXX", g_plain[] = "/tmp/lsa-abi-XXXXXX";
static lsa_indexer_file g_file;

static lsa_idx *open_at(const char *dir, int32_t path) {
    char error[LSA_IDX_ERROR];
    lsa_idx *x = NULL;
    const lsa_idx_options o = {"cpu", path, 4, 4096};
    if (lsa_idx_open(&x, LSA_IDX_ABI, dir, &o, error) != LSA_IDX_OK) fail_msg("%s", error);
    assert_string_equal(error, "");
    return x;
}

typedef struct step { /* requests of one decision, in both key layouts */
    uint16_t hidden[LAYERS][M * D];
    int64_t position[M], n_chunk[M];
    uint8_t *row[M];
    uint8_t *pool;
    int32_t table[M][PAGES];
    lsa_idx_keys rows[M], pages[M];
} step;

static step *make_step(uint64_t seed) {
    step *s = LSA_GEN_NEW(step, 1);
    lsa_rng g = lsa_rng_make(seed, 9);
    static const int64_t chunks[M] = {N, 1, 321};
    int32_t used = 0;
    s->pool = LSA_GEN_NEW(uint8_t, M * PAGES * 8448);
    memset(s->pool, 0x7f, M * PAGES * 8448); /* NaN wherever no chunk is */
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < M * D; i++) s->hidden[l][i] = lsa_f32_to_bf16(lsa_gen_normal(&g));
    for (int i = 0; i < M; i++) {
        s->n_chunk[i] = chunks[i];
        s->position[i] = 4 * chunks[i] + 2;
        s->row[i] = LSA_GEN_NEW(uint8_t, N * 132);
        lsa_gen_keys(s->row[i], N, &g);
        for (int p = 0; p < PAGES; p++) s->table[i][p] = (used++ * 7) % (M * PAGES); /* scattered */
        for (int64_t c = 0; c < chunks[i]; c++) {
            uint8_t *page = s->pool + (int64_t)s->table[i][c / 64] * 8448;
            memcpy(page + c % 64 * 128, s->row[i] + c * 132, 128);
            memcpy(page + 8192 + c % 64 * 4, s->row[i] + c * 132 + 128, 4);
        }
        s->rows[i] = (lsa_idx_keys){s->row[i], NULL, chunks[i]};
        s->pages[i] = (lsa_idx_keys){s->pool, s->table[i], chunks[i]};
    }
    return s;
}
static void free_step(step *s) {
    for (int i = 0; i < M; i++) lsa_free(s->row[i]);
    lsa_free(s->pool);
    lsa_free(s);
}

static double dot(const float *w, const double *x, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += (double)w[i] * x[i];
    return s;
}

/* Logits of request i in layer l. */
static void oracle(float *z, const step *s, int l, int i, int path) {
    const lsa_indexer_geom *g = &g_file.geom;
    const float *part[4];
    double x[D], a[64], q[H][128], w[H], ms = 0;
    float freq[64], raw[H * 128], rounded[H * 128];
    for (int p = 0; p < 4; p++)
        part[p] = g_file.params + lsa_indexer_tensor_at(g, l, (lsa_indexer_part)p).offset;
    for (int k = 0; k < D; k++) x[k] = (double)lsa_bf16_to_f32(s->hidden[l][i * D + k]);
    for (int k = 0; k < g->rank; k++) a[k] = dot(part[0] + k * D, x, D), ms += a[k] * a[k] / g->rank;
    for (int k = 0; k < g->rank; k++) a[k] *= (double)part[2][k] / sqrt(ms + (double)g->eps);
    lsa_rope_freqs(freq, &g->rope);
    for (int h = 0; h < H; h++) {
        double r[128];
        w[h] = dot(part[3] + h * D, x, D) / sqrt(128.0 * H);
        for (int k = 0; k < 128; k++) {
            r[k] = dot(part[1] + (h * 128 + k) * g->rank, a, g->rank);
            raw[h * 128 + k] = (float)r[k];
        }
        for (int k = 0; k < 32; k++) { /* adjacent pairs of the last 64 */
            const double t = (double)((float)s->position[i] * freq[k]), u = r[64 + 2 * k], v = r[65 + 2 * k];
            r[64 + 2 * k] = u * cos(t) - v * sin(t);
            r[65 + 2 * k] = u * sin(t) + v * cos(t);
        }
        for (int k = 0; k < 128; k++) {
            q[h][k] = 0;
            for (int j = 0; j < 128; j++)
                q[h][k] += (__builtin_popcount((unsigned)(k & j)) % 2 ? -1 : 1) * r[j] / sqrt(128.0);
        }
    }
    if (path != LSA_IDX_F32) { /* these have an oracle of their own: tests/unit/test_query_path.c */
        lsa_query_path_row((lsa_query_path)path, g, freq, s->position[i], raw, NULL, rounded, NULL, NULL);
        for (int k = 0; k < H * 128; k++) q[k / 128][k % 128] = (double)rounded[k];
    }
    for (int64_t c = 0; c < s->n_chunk[i]; c++) {
        float key[128];
        double sum = 0;
        lsa_key_decode(key, s->row[i] + c * 132);
        for (int h = 0; h < H; h++) sum += w[h] * fmax(0, dot(key, q[h], 128));
        z[c] = (float)sum;
    }
}

static void run_layer(lsa_idx *x, int l, const step *s, const lsa_idx_keys *keys, float *z) {
    char error[LSA_IDX_ERROR];
    if (lsa_idx_query(x, l, M, s->hidden[l], s->position, NULL, error) ||
        lsa_idx_score(x, l, M, keys, z, LD, NULL, error))
        fail_msg("%s", error);
}

static void test_logits(void **state) {
    (void)state;
    /* 1.5e-6 seen on all; on the others a value near a rounding's midpoint may fall on either side */
    static const double rtol[] = {4e-6, 2e-3, 1e-2};
    step *s = make_step(1);
    float *z = LSA_GEN_NEW(float, M *LD), *want = LSA_GEN_NEW(float, N), *f32 = LSA_GEN_NEW(float, M *LD),
          *paged = LSA_GEN_NEW(float, M *LD);
    for (int path = 0; path < 3; path++) {
        lsa_idx *x = open_at(g_dir, path);
        for (int l = 0; l < LAYERS; l++) {
            for (int64_t i = 0; i < M * LD; i++) z[i] = paged[i] = -777;
            run_layer(x, l, s, s->rows, z);
            run_layer(x, l, s, s->pages, paged);
            assert_memory_equal(z, paged, M * LD * sizeof *z);
            double worst = 0;
            for (int i = 0; i < M; i++) {
                oracle(want, s, l, i, path);
                assert_true(lsa_compare_f32("logits", z + i * LD, want, s->n_chunk[i],
                                            (lsa_tol){1e-37, rtol[path], 0}));
                worst = fmax(worst, lsa_worst_rel_f32(z + i * LD, want, s->n_chunk[i]));
                for (int64_t c = s->n_chunk[i]; c < LD; c++) assert_true(z[i * LD + c] == -777);
            }
            printf("path %d layer %d: worst relative error %.2g\n", path, l, worst);
            if (path == 0 && l == 0) memcpy(f32, z, M * LD * sizeof *z);
            if (path > 0 && l == 0) assert_true(lsa_worst_rel_f32(z, f32, N) > 1e-4); /* it does something */
        }
        lsa_idx_close(x);
    }
    lsa_free(z), lsa_free(want), lsa_free(f32), lsa_free(paged);
    free_step(s);
}

/* Fewer visible chunks, rows of one: the same bits. */
static void test_prefix(void **state) {
    (void)state;
    step *s = make_step(2);
    lsa_idx *x = open_at(g_dir, LSA_IDX_FP8);
    float *z = LSA_GEN_NEW(float, M *LD), one[N];
    run_layer(x, 1, s, s->rows, z);
    for (int64_t n = 0; n <= N; n += n < 130 ? 13 : 57) {
        const lsa_idx_keys k = {s->pool, s->table[0], n};
        assert_int_equal(lsa_idx_score(x, 1, 1, &k, one, N, NULL, NULL), LSA_IDX_OK);
        assert_memory_equal(one, z, (size_t)n * sizeof *z);
    }
    lsa_idx_close(x);
    lsa_free(z);
    free_step(s);
}

static void test_not_finite(void **state) {
    (void)state;
    step *s = make_step(3);
    float *z = LSA_GEN_NEW(float, LAYERS *M *LD);
    int32_t id[M * LD], n_id[M];
    lsa_idx_rule r = {.mode = LSA_IDX_TOPK, .ensemble = LSA_IDX_EXPORTED, .k = 50, .sink = 2, .tail = 3};
    for (int path = 0; path < 3; path++) {
        static const uint16_t bad[] = {0x7fc0, 0x7f80, 0xff80}; /* NaN, +-infinity */
        lsa_idx *x = open_at(g_dir, path);
        for (int b = 0; b < 3; b++) {
            s->hidden[0][2 * D + 5] = bad[b];
            for (int l = 0; l < LAYERS; l++) run_layer(x, l, s, s->rows, z + l * M * LD);
            for (int64_t c = 0; c < s->n_chunk[2]; c++) assert_true(isnan(z[2 * LD + c]));
            for (int64_t c = 0; c < s->n_chunk[0]; c++) assert_true(isfinite(z[c]));
            assert_int_equal(lsa_idx_select(x, M, &r, z, LD, s->n_chunk, id, LD, n_id, NULL, NULL),
                             LSA_IDX_OK);
            assert_int_equal(n_id[0], 55);
            assert_int_equal(n_id[1], 1);
            assert_int_equal(n_id[2], 5);
            assert_int_equal(id[2 * LD + 4], s->n_chunk[2] - 1);
        }
        lsa_idx_close(x);
    }
    lsa_free(z);
    free_step(s);
}

static void test_info(void **state) {
    (void)state;
    lsa_idx *x = open_at(g_dir, LSA_IDX_F32), *y = open_at(g_plain, LSA_IDX_F32);
    lsa_idx_info i;
    lsa_idx_get_info(x, &i);
    assert_true(i.hidden == D && i.n_head == H && i.head_dim == 128 && i.rank == 16 && i.n_layer == LAYERS);
    assert_true(i.ordinal[1] == 2 && i.layer_id[2] == 8 && i.ensemble == LSA_IDX_MEAN && i.calibrated == 1);
    assert_true(i.tau == 64 && i.tail == 256 && i.trained_length == 16384 && i.device_bytes == 0);
    assert_true(i.host_bytes > 4 * lsa_indexer_n_param(&g_file.geom));
    lsa_idx_get_info(y, &i);
    assert_int_equal(i.calibrated, 0);
    lsa_idx_get_info(NULL, &i);
    assert_int_equal(i.n_layer, 0);
    lsa_idx_close(x);
    lsa_idx_close(y);
    lsa_idx_close(NULL);
}

/* ---- rules ---- */

static lsa_select_rule resolved(const lsa_idx_export *e, const lsa_idx_rule *r) {
    lsa_select_rule s;
    lsa_err err = {0};
    if (lsa_idx_resolve(&s, e, r, &err) != LSA_OK) fail_msg("%s", err.msg);
    return s;
}

static void test_rules(void **state) {
    (void)state;
    lsa_idx_export e, p;
    lsa_select_rule s;
    json_t *keep = g_file.calibration;
    assert_int_equal(lsa_idx_export_read(&e, &g_file, "test", NULL), LSA_OK);
    g_file.calibration = NULL;
    assert_int_equal(lsa_idx_export_read(&p, &g_file, "test", NULL), LSA_OK);
    g_file.calibration = keep;
    lsa_idx_rule r = {
        .mode = LSA_IDX_CALIBRATED, .ensemble = LSA_IDX_EXPORTED, .budget = 0.1, .tail = -1, .cap = 9};
    s = resolved(&e, &r);
    assert_true(s.mode == LSA_SELECT_THRESHOLD && s.score == LSA_SCORE_MEAN && s.n_layer == LAYERS);
    assert_true(s.tail == 64 && s.cap == 9 && s.n_knot == 3 && s.knot_length[1] == 1024);
    assert_true(s.temperature[1] == 1.5f && s.offset[2] == 0.25f);
    for (int k = 0; k < 3; k++) assert_true(s.knot_threshold[k] == (float)((1 - 0.2 * 1 + 0.1 * k) * 0.8));
    r.ensemble = LSA_IDX_SUM;
    r.budget = 0.2;
    s = resolved(&e, &r);
    assert_true(s.score == LSA_SCORE_SUM && s.knot_threshold[2] == (float)((1 - 0.2 * 3 + 0.1 * 2) * 10));
    r.budget = 0.05 * sqrt(2); /* half way between 0.05 and 0.1 in the logarithm */
    s = resolved(&e, &r);
    assert_true(fabs((double)s.knot_threshold[0] - 9) < 1e-6);
    r.budget = 0.1 + 0.1; /* as written or as computed, an end of the table is inside */
    assert_true(resolved(&e, &r).knot_threshold[0] == 4);
    r = (lsa_idx_rule){
        .mode = LSA_IDX_PAGES, .ensemble = LSA_IDX_MAX, .k = 5, .threshold = NAN, .budget = 0.05};
    s = resolved(&e, &r);
    assert_true(s.mode == LSA_SELECT_PAGES && s.k == 5 && s.tail == 0 && s.knot_threshold[0] == 0.8f);
    r.threshold = 0.25f;
    s = resolved(&p, &r);
    assert_true(s.n_knot == 0 && s.threshold == 0.25f && s.temperature[1] == 1 && s.offset[2] == 0);
    static const struct {
        int32_t mode, ensemble;
        double budget;
        float threshold;
        int64_t tail, k;
        bool plain;
        lsa_status code;
        const char *text;
    } bad[] = {
        {LSA_IDX_CALIBRATED, 0, 0.04, 0, 0, 0, false, LSA_E_CONFIG, "0.05 to 0.2"},
        {LSA_IDX_CALIBRATED, 0, 0.21, 0, 0, 0, false, LSA_E_CONFIG, "0.05 to 0.2"},
        {LSA_IDX_CALIBRATED, 0, (double)NAN, 0, 0, 0, false, LSA_E_CONFIG, "0.05 to 0.2"},
        {LSA_IDX_CALIBRATED, 0, 0.1, 0, 0, 0, true, LSA_E_CONFIG, "lsa-export calibrate"},
        {LSA_IDX_PAGES, 0, 0.1, NAN, 0, 1, true, LSA_E_CONFIG, "lsa-export calibrate"},
        {LSA_IDX_THRESHOLD, 0, 0, NAN, 0, 0, false, LSA_E_ARG, "NaN"},
        {LSA_IDX_BUDGET, 0, 1.5, 0, 0, 0, false, LSA_E_ARG, "budget"},
        {LSA_IDX_TOPK, 0, 0, 0, 0, -1, false, LSA_E_ARG, "k must"},
        {LSA_IDX_TOPK, 3, 0, 0, 0, 1, false, LSA_E_ARG, "ensemble 3"},
        {LSA_IDX_TOPK, -2, 0, 0, 0, 1, false, LSA_E_ARG, "ensemble -2"},
        {5, 0, 0, 0, 0, 1, false, LSA_E_ARG, "mode 5"},
        {-1, 0, 0, 0, 0, 1, false, LSA_E_ARG, "mode -1"},
        {LSA_IDX_TOPK, 0, 0, 0, -2, 1, false, LSA_E_ARG, "tail"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        lsa_err err = {0};
        const lsa_idx_rule b = {.mode = bad[i].mode,
                                .ensemble = bad[i].ensemble,
                                .budget = bad[i].budget,
                                .threshold = bad[i].threshold,
                                .tail = bad[i].tail,
                                .k = bad[i].k};
        assert_int_equal(lsa_idx_resolve(&s, bad[i].plain ? &p : &e, &b, &err), bad[i].code);
        if (!strstr(err.msg, bad[i].text)) fail_msg("case %zu: %s", i, err.msg);
    }
}

/* Damaged calibrations are refused when the export is opened. */
static void test_bad_calibration(void **state) {
    (void)state;
    static const struct {
        const char *path, *value; /* the JSON pointer's keys by '/', and what is put there */
    } bad[] = {{"format", "\"lsa-calibration/2\""},
               {"layers", "[]"},
               {"layers/0/ordinal", "1"},
               {"layers/1/temperature", "0"},
               {"layers/1/temperature", "1e39"},
               {"layers/2/offset", "\"x\""},
               {"knots", "[]"},
               {"knots/1", "256"},
               {"knots/0", "0.5"},
               {"knots/0", "-1"},
               {"ensembles/max", "null"},
               {"ensembles/sum/budget", "[]"},
               {"ensembles/sum/budget/0/target", "0"},
               {"ensembles/sum/budget/1/target", "0.05"},
               {"ensembles/sum/budget/2/target", "1.01"},
               {"ensembles/mean/budget/1/threshold", "[1, 2]"},
               {"ensembles/mean/budget/1/threshold/2", "null"},
               {"ensembles/max/budget/0/threshold/0", "-1e39"}};
    json_t *keep = g_file.calibration;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char path[64], *part, *next;
        lsa_idx_export e;
        lsa_err err = {0};
        json_t *o = json_deep_copy(keep), *at = o;
        snprintf(path, sizeof path, "%s", bad[i].path);
        for (part = path; (next = strchr(part, '/')); part = next + 1) {
            *next = 0;
            at = json_is_array(at) ? json_array_get(at, (size_t)atoi(part)) : json_object_get(at, part);
        }
        json_t *v = json_loads(bad[i].value, JSON_DECODE_ANY, NULL);
        assert_int_equal(json_is_array(at) ? json_array_set_new(at, (size_t)atoi(part), v)
                                           : json_object_set_new(at, part, v),
                         0);
        g_file.calibration = o;
        if (lsa_idx_export_read(&e, &g_file, "test", &err) != LSA_E_FORMAT || !err.msg[0])
            fail_msg("%s = %s was not refused", bad[i].path, bad[i].value);
        json_decref(o);
    }
    g_file.calibration = keep;
}

static void test_select(void **state) {
    (void)state;
    enum { CHUNKS = 400 };
    lsa_idx *x = open_at(g_dir, LSA_IDX_F32), *y = NULL;
    float z[LAYERS][2][CHUNKS];
    int64_t n[2] = {CHUNKS, 37};
    int32_t id[2 * CHUNKS], n_id[2] = {-1, -1};
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < 2; i++)
            for (int c = 0; c < CHUNKS; c++)
                z[l][i][c] = (float)((c * 37 + i * 11) % CHUNKS); /* a permutation */
    lsa_idx_rule r = {.mode = LSA_IDX_BUDGET, .ensemble = LSA_IDX_SUM, .budget = 0.1, .sink = 4, .tail = 16};
    assert_int_equal(lsa_idx_clone(&y, x, NULL), LSA_IDX_OK);
    lsa_idx_close(x); /* the clone holds the weights */
    assert_int_equal(lsa_idx_select(y, 2, &r, &z[0][0][0], CHUNKS, n, id, CHUNKS, n_id, NULL, NULL),
                     LSA_IDX_OK);
    assert_int_equal(n_id[0], 4 + 38 + 16);
    assert_int_equal(n_id[1], 4 + 2 + 16);
    for (int i = 0; i < 2; i++)
        for (int j = 1; j < n_id[i]; j++) assert_true(id[i * CHUNKS + j] > id[i * CHUNKS + j - 1]);
    int32_t few[2 * 5] = {0}; /* too little room: the lowest ids, and no more than there is room for */
    assert_int_equal(lsa_idx_select(y, 2, &r, &z[0][0][0], CHUNKS, n, few, 5, n_id, NULL, NULL), LSA_IDX_OK);
    assert_true(n_id[0] == 5 && n_id[1] == 5);
    assert_memory_equal(few, id, 5 * sizeof *few);
    assert_memory_equal(few + 5, id + CHUNKS, 5 * sizeof *few);
    lsa_idx_close(y);
}

/* An export with a continuation: select ranks by it and knows no other score. */
static void test_continued(void **state) {
    (void)state;
    enum { CHUNKS = 300, K = 40 };
    const float cost[] = {0.5f, 0.25f, 1.5f, 0};
    char dir[] = "/tmp/lsa-abi-XXXXXX", error[LSA_IDX_ERROR];
    lsa_indexer_file f = g_file;
    lsa_err err = {0};
    static float z[LAYERS][CHUNKS];
    float score[CHUNKS];
    int32_t id[CHUNKS], n_id, n = 0;
    const int64_t chunks = CHUNKS;
    lsa_rng g = lsa_rng_make(8, 8);
    const int64_t layers = lsa_indexer_n_param(&g_file.geom);
    f.geom.reach = 4;
    f.ensemble = LSA_ENSEMBLE_SUM;
    f.params = LSA_GEN_NEW(float, layers + 4);
    memcpy(f.params, g_file.params, (size_t)layers * sizeof *f.params);
    memcpy(f.params + layers, cost, sizeof cost);
    assert_non_null(mkdtemp(dir));
    assert_int_equal(lsa_indexer_file_save(&f, dir, &err), LSA_OK);
    lsa_idx *x = open_at(dir, LSA_IDX_F32);
    for (int l = 0; l < LAYERS; l++) lsa_gen_fill(z[l], CHUNKS, 2, &g);
    for (int c = CHUNKS - 1; c >= 0; c--) {
        score[c] = -INFINITY;
        for (int j = 0; j <= 4 && j <= c; j++) {
            const float v = ((z[0][c - j] + z[1][c - j]) + z[2][c - j]) - (j ? cost[j - 1] : 0);
            score[c] = fmaxf(score[c], v);
        }
    }
    lsa_idx_rule r = {.mode = LSA_IDX_TOPK, .ensemble = LSA_IDX_EXPORTED, .k = K};
    assert_int_equal(lsa_idx_select(x, 1, &r, &z[0][0], CHUNKS, &chunks, id, CHUNKS, &n_id, NULL, error), 0);
    assert_int_equal(n_id, K);
    for (int c = 0; c < CHUNKS; c++) {
        int before = 0;
        for (int o = 0; o < CHUNKS; o++) before += score[o] > score[c] || (score[o] == score[c] && o < c);
        if (before < K) assert_int_equal(id[n++], c);
    }
    for (r.ensemble = LSA_IDX_MEAN; r.ensemble <= LSA_IDX_MAX; r.ensemble++) {
        assert_int_equal(lsa_idx_select(x, 1, &r, &z[0][0], CHUNKS, &chunks, id, CHUNKS, &n_id, NULL, error),
                         LSA_IDX_E_CONFIG);
        assert_non_null(strstr(error, "continuation"));
    }
    lsa_idx_close(x);
    lsa_free(f.params);
    assert_int_equal(lsa_remove_tree(dir, &err), LSA_OK);
}

/* An export with a prior and a continuation: two requests, one that observed two windows and one that
 * observed none; select alone leaves the masses out; misuse is refused. */
static void test_observed(void **state) {
    (void)state;
    enum { CHUNKS = 300, K = 40 };
    static const float cost[] = {0.5f, 0.25f}, weight[] = {1.5f, -0.75f};
    static const int32_t chunk[2][3] = {{7, 120, 299}, {7, 8, 200}};
    static const float mass[2][3] = {{0.02f, 0.5f, 0.001f}, {0.3f, 0.004f, 0.01f}};
    char dir[] = "/tmp/lsa-abi-XXXXXX", error[LSA_IDX_ERROR];
    lsa_indexer_file f = g_file;
    lsa_err err = {0};
    static float z[LAYERS][2][CHUNKS], seen[2][CHUNKS];
    static int32_t id[3][2][CHUNKS];
    int32_t n_id[2];
    const int64_t chunks[2] = {CHUNKS, CHUNKS}, layers = lsa_indexer_n_param(&g_file.geom);
    const float *const states[2] = {&seen[0][0], NULL};
    lsa_rng g = lsa_rng_make(8, 9);
    f.geom.reach = 2;
    f.geom.prior = true;
    f.ensemble = LSA_ENSEMBLE_SUM;
    f.params = LSA_GEN_NEW(float, layers + 4);
    memcpy(f.params, g_file.params, (size_t)layers * sizeof *f.params);
    memcpy(f.params + layers, cost, sizeof cost);
    memcpy(f.params + layers + 2, weight, sizeof weight);
    assert_non_null(mkdtemp(dir));
    assert_int_equal(lsa_indexer_file_save(&f, dir, &err), LSA_OK);
    lsa_idx *x = open_at(dir, LSA_IDX_F32);
    assert_int_equal(lsa_idx_has_prior(x), 1);
    for (int l = 0; l < LAYERS; l++) lsa_gen_fill(&z[l][0][0], 2 * CHUNKS, 2, &g);
    memset(seen, 0, sizeof seen);
    for (int w = 0; w < 2; w++)
        assert_int_equal(lsa_idx_observe(x, &seen[0][0], CHUNKS, 3, chunk[w], mass[w], NULL, error), 0);
    lsa_idx_rule r = {.mode = LSA_IDX_TOPK, .ensemble = LSA_IDX_EXPORTED, .k = K};
    assert_int_equal(lsa_idx_select_observed(x, 2, &r, &z[0][0][0], CHUNKS, chunks, states, CHUNKS,
                                             &id[0][0][0], CHUNKS, n_id, NULL, error),
                     0);
    assert_int_equal(
        lsa_idx_select(x, 2, &r, &z[0][0][0], CHUNKS, chunks, &id[1][0][0], CHUNKS, n_id, NULL, error), 0);
    for (int i = 0; i < 2; i++) {
        double sum[CHUNKS], score[CHUNKS];
        int n = 0;
        for (int c = 0; c < CHUNKS; c++) {
            double m = 0, older = 0; /* the last window; the one before, which has decayed no window yet */
            for (int e = 0; i == 0 && e < 3; e++) {
                if (chunk[1][e] == c) m = (double)mass[1][e];
                if (chunk[0][e] == c) older = (double)mass[0][e];
            }
            sum[c] = (double)z[0][i][c] + (double)z[1][i][c] + (double)z[2][i][c] + 1.5 * log1p(m / 1e-3) -
                     0.75 * log1p(older / 1e-3);
        }
        for (int c = 0; c < CHUNKS; c++) {
            score[c] = sum[c];
            for (int j = 1; j <= 2 && j <= c; j++)
                score[c] = fmax(score[c], sum[c - j] - (double)cost[j - 1]);
        }
        for (int c = 0; c < CHUNKS; c++) {
            int before = 0;
            for (int o = 0; o < CHUNKS; o++) before += score[o] > score[c] || (score[o] == score[c] && o < c);
            if (before < K) assert_int_equal(id[0][i][n++], c);
        }
        assert_int_equal(memcmp(id[0][i], id[1][i], K * sizeof(int32_t)) != 0, i == 0);
    }
    const int32_t outside = CHUNKS;
    const float nan = NAN;
    static float before[2][CHUNKS];
    memcpy(before, seen, sizeof seen);
    assert_int_equal(lsa_idx_observe(x, &seen[0][0], CHUNKS, 1, &outside, mass[0], NULL, error),
                     LSA_IDX_E_ARG);
    assert_non_null(strstr(error, "chunk 300"));
    assert_int_equal(lsa_idx_observe(x, &seen[0][0], CHUNKS, 1, chunk[0], &nan, NULL, error), LSA_IDX_E_ARG);
    assert_int_equal(lsa_idx_observe(x, NULL, CHUNKS, 1, chunk[0], mass[0], NULL, error), LSA_IDX_E_ARG);
    assert_memory_equal(before, seen, sizeof seen); /* what is refused leaves the state alone */
    assert_int_equal(lsa_idx_select_observed(x, 2, &r, &z[0][0][0], CHUNKS, chunks, states, CHUNKS - 1,
                                             &id[2][0][0], CHUNKS, n_id, NULL, error),
                     LSA_IDX_E_ARG);
    r.ensemble = LSA_IDX_MAX;
    assert_int_equal(lsa_idx_select_observed(x, 2, &r, &z[0][0][0], CHUNKS, chunks, states, CHUNKS,
                                             &id[2][0][0], CHUNKS, n_id, NULL, error),
                     LSA_IDX_E_CONFIG);
    lsa_idx_close(x);
    lsa_free(f.params);
    assert_int_equal(lsa_remove_tree(dir, &err), LSA_OK);
}

/* ---- what is refused ---- */

static void test_open_refused(void **state) {
    (void)state;
    static const struct {
        lsa_idx_options o;
        int32_t abi;
        const char *folder;
        int code;
        const char *text;
    } bad[] = {
        {{"cpu", 0, 1, 1}, LSA_IDX_ABI + 1, g_dir, LSA_IDX_E_UNSUPPORTED, "interface"},
        {{"cpu", 0, 1, 1}, LSA_IDX_ABI, NULL, LSA_IDX_E_ARG, "folder"},
        {{"cpu", 0, 1, 1}, LSA_IDX_ABI, "/nonexistent", LSA_IDX_E_IO, "/nonexistent"},
        {{NULL, 0, 1, 1}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "device"},
        {{"auto", 0, 1, 1}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "auto"},
        {{"ref", 0, 1, 1}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "ref"},
        {{"cuda:x", 0, 1, 1}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "cuda:x"},
        {{"cpu", 3, 1, 1}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "path 3"},
        {{"cpu", -1, 1, 1}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "path -1"},
        {{"cpu", 0, 0, 1}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "max_batch"},
        {{"cpu", 0, 4097, 1}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "max_batch"},
        {{"cpu", 0, 1, 0}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "max_chunks"},
        {{"cpu", 0, 1, INT64_MAX}, LSA_IDX_ABI, g_dir, LSA_IDX_E_ARG, "max_chunks"},
    };
    char error[LSA_IDX_ERROR];
    int dummy;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        lsa_idx *x = (lsa_idx *)(void *)&dummy;
        assert_int_equal(lsa_idx_open(&x, bad[i].abi, bad[i].folder, &bad[i].o, error), bad[i].code);
        assert_null(x);
        if (!strstr(error, bad[i].text)) fail_msg("case %zu: %s", i, error);
        assert_int_equal(lsa_idx_open(&x, bad[i].abi, bad[i].folder, &bad[i].o, NULL), bad[i].code);
    }
    lsa_idx *x;
    assert_int_equal(lsa_idx_open(NULL, LSA_IDX_ABI, g_dir, &bad[0].o, error), LSA_IDX_E_ARG);
    assert_int_equal(lsa_idx_open(&x, LSA_IDX_ABI, g_dir, NULL, error), LSA_IDX_E_ARG);
    assert_int_equal(lsa_idx_clone(&x, NULL, error), LSA_IDX_E_ARG);
    assert_null(x);
}

static void test_calls_refused(void **state) {
    (void)state;
    step *s = make_step(4);
    lsa_idx *x = open_at(g_dir, LSA_IDX_F32);
    char error[LSA_IDX_ERROR];
    float *z = LSA_GEN_NEW(float, LAYERS *M *LD);
    int32_t id[M * LD], n_id[M];
    lsa_idx_rule r = {.mode = LSA_IDX_TOPK, .k = 3};
    const uint16_t *h = s->hidden[0];
#define ODD(p) ((void *)((char *)(uintptr_t)(p) + 1))
#define BAD(text, call)                                                                                      \
    do {                                                                                                     \
        assert_int_equal(call, LSA_IDX_E_ARG);                                                               \
        if (!strstr(error, text)) fail_msg("%s: %s", #call, error);                                          \
    } while (0)
#define QUERY(x, l, m, h, p) lsa_idx_query(x, l, m, h, p, NULL, error)
    BAD("NULL", QUERY(NULL, 0, M, h, s->position));
    BAD("layer 3", QUERY(x, LAYERS, M, h, s->position));
    BAD("layer -1", QUERY(x, -1, M, h, s->position));
    BAD("at most 4", QUERY(x, 0, 5, h, s->position));
    BAD("-1 requests", QUERY(x, 0, -1, h, s->position));
    BAD("hidden", QUERY(x, 0, M, NULL, s->position));
    BAD("hidden", QUERY(x, 0, M, ODD(h), s->position));
    BAD("position", QUERY(x, 0, M, h, NULL));
    BAD("position", QUERY(x, 0, M, h, ODD(s->position)));
    assert_int_equal(QUERY(x, 0, 0, NULL, NULL), LSA_IDX_OK);
    s->position[1] = -1;
    BAD("request 1", QUERY(x, 0, M, h, s->position));
    s->position[1] = 6;
#define SCORE(l, m, k, z, ld) lsa_idx_score(x, l, m, k, z, ld, NULL, error)
    BAD("latest query of layer 0 was of 0", SCORE(0, M, s->rows, z, LD));
    assert_int_equal(QUERY(x, 0, 2, h, s->position), LSA_IDX_OK);
    BAD("was of 2", SCORE(0, M, s->rows, z, LD));
    assert_int_equal(QUERY(x, 0, M, h, s->position), LSA_IDX_OK);
    BAD("layer 1 was of 0", SCORE(1, M, s->rows, z, LD));
    BAD("keys", SCORE(0, M, NULL, z, LD));
    BAD("keys", SCORE(0, M, ODD(s->rows), z, LD));
    BAD("logit", SCORE(0, M, s->rows, NULL, LD));
    BAD("logit", SCORE(0, M, s->rows, ODD(z), LD));
    BAD("columns", SCORE(0, M, s->rows, z, 0));
    BAD("columns", SCORE(0, M, s->rows, z, INT64_MAX));
    BAD("request 0 has 700 chunks", SCORE(0, M, s->rows, z, N - 1));
    assert_int_equal(SCORE(0, 0, NULL, NULL, 0), LSA_IDX_OK);
    lsa_idx_keys k = {s->row[0], NULL, -1};
    BAD("-1 chunks", SCORE(0, 1, &k, z, LD));
    k.n_chunk = 4097;
    BAD("4097 chunks", SCORE(0, 1, &k, z, 9999));
    k = (lsa_idx_keys){s->row[0] + 2, NULL, 5};
    BAD("4 bytes", SCORE(0, 1, &k, z, LD));
    k = (lsa_idx_keys){NULL, NULL, 5};
    BAD("NULL", SCORE(0, 1, &k, z, LD));
    k.n_chunk = 0;
    assert_int_equal(SCORE(0, 1, &k, z, LD), LSA_IDX_OK);
    k = (lsa_idx_keys){s->pool + 4, s->table[0], 5};
    BAD("16 bytes", SCORE(0, 1, &k, z, LD));
    k = (lsa_idx_keys){s->pool, ODD(s->table[0]), 5};
    BAD("page table", SCORE(0, 1, &k, z, LD));
    k = (lsa_idx_keys){s->pool, s->table[0], 128};
    s->table[0][1] = -3;
    BAD("entry 1 of its page table is -3", SCORE(0, 1, &k, z, LD));
#define SELECT(r, z, ld, n, o, lo, no) lsa_idx_select(x, M, r, z, ld, n, o, lo, no, NULL, error)
    BAD("rule", SELECT(NULL, z, LD, s->n_chunk, id, LD, n_id));
    BAD("logit", SELECT(&r, NULL, LD, s->n_chunk, id, LD, n_id));
    BAD("columns", SELECT(&r, z, 0, s->n_chunk, id, LD, n_id));
    BAD("n_chunk", SELECT(&r, z, LD, NULL, id, LD, n_id));
    BAD("n_chunk", SELECT(&r, z, LD, ODD(s->n_chunk), id, LD, n_id));
    BAD("out", SELECT(&r, z, LD, s->n_chunk, NULL, LD, n_id));
    BAD("out", SELECT(&r, z, LD, s->n_chunk, id, 0, n_id));
    BAD("n_out", SELECT(&r, z, LD, s->n_chunk, id, LD, NULL));
    BAD("700 chunks", SELECT(&r, z, 699, s->n_chunk, id, LD, n_id));
    r.k = -1;
    BAD("k must", SELECT(&r, z, LD, s->n_chunk, id, LD, n_id));
    BAD("handle", lsa_idx_select(NULL, M, &r, z, LD, s->n_chunk, id, LD, n_id, NULL, error));
    BAD("at most 4", lsa_idx_select(x, 5, &r, z, LD, s->n_chunk, id, LD, n_id, NULL, error));
    lsa_idx_close(x);
    lsa_free(z);
    free_step(s);
}

static void test_no_gpu(void **state) {
    (void)state;
    char error[LSA_IDX_ERROR];
    lsa_idx *x = NULL;
    const lsa_idx_options o = {"cuda:99", LSA_IDX_FP8, 1, 64};
    assert_int_equal(lsa_idx_open(&x, LSA_IDX_ABI, g_dir, &o, error), LSA_IDX_E_DEVICE);
    assert_null(x);
    assert_true(error[0]);
}

static int setup(void **state) {
    (void)state;
    lsa_fixture_export(g_dir, 5, true);
    lsa_fixture_export(g_plain, 6, false);
    return lsa_indexer_file_load(&g_file, g_dir, NULL) == LSA_OK ? 0 : -1;
}
static int teardown(void **state) {
    (void)state;
    lsa_indexer_file_fini(&g_file);
    return lsa_remove_tree(g_dir, NULL) == LSA_OK && lsa_remove_tree(g_plain, NULL) == LSA_OK ? 0 : -1;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits),        cmocka_unit_test(test_prefix),
        cmocka_unit_test(test_not_finite),    cmocka_unit_test(test_info),
        cmocka_unit_test(test_rules),         cmocka_unit_test(test_bad_calibration),
        cmocka_unit_test(test_select),        cmocka_unit_test(test_continued),
        cmocka_unit_test(test_observed),      cmocka_unit_test(test_open_refused),
        cmocka_unit_test(test_calls_refused), cmocka_unit_test(test_no_gpu)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
