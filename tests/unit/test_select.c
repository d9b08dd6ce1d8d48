/* Selection against a brute force that ranks every chunk and page by counting better ones; the sigmoid
 * against double precision and, bit by bit, against itself under other compilers. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "kernels/core/dtype.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/model/select.h"
#include "kernels/model/sigmoid.h"
#include "tests/testkit/gen.h"

enum { N = 700, LAYERS = 3 };

/* ---- the brute force ---- */

static bool better(float a, int64_t i, float b, int64_t j) { /* numbers only */
    return a > b || (a == b && i < j);
}

static int64_t oracle(int32_t *out, const lsa_select_rule *r, const float *score, float t, int64_t n) {
    bool forced[N] = {0}, keep[N] = {0};
    int64_t m = 0, can = 0, k = r->k;
    for (int64_t c = 0; c < n; c++) forced[c] = c < r->sink || c >= n - r->tail;
    for (int64_t c = 0; c < n; c++) can += !forced[c];
    if (r->mode == LSA_SELECT_PAGES) {
        const int64_t pages = (n + 63) / 64;
        int64_t above[N] = {0}, n_forced = 0;
        double top[N];
        bool need[N] = {0};
        for (int64_t p = 0; p < pages; p++) {
            top[p] = -(double)INFINITY;
            for (int64_t c = 64 * p; c < 64 * p + 64 && c < n; c++) {
                need[p] = need[p] || forced[c];
                above[p] += score[c] > t;
                if (!isnan(score[c]) && (double)score[c] > top[p]) top[p] = (double)score[c];
            }
            n_forced += need[p];
        }
        if (k < n_forced) k = n_forced;
        for (int64_t p = 0; p < pages; p++) {
            int64_t rank = need[p] ? 0 : n_forced;
            for (int64_t q = 0; q < pages && !need[p]; q++)
                rank +=
                    !need[q] && (above[q] > above[p] ||
                                 (above[q] == above[p] && (top[q] > top[p] || (top[q] == top[p] && q < p))));
            if (rank < k) out[m++] = (int32_t)p;
        }
        return m;
    }
    if (r->mode == LSA_SELECT_BUDGET) k = (int64_t)ceil(r->budget * (double)can - 1e-9);
    for (int64_t c = 0; c < n; c++) {
        int64_t rank = 0;
        if (forced[c] || isnan(score[c])) continue;
        for (int64_t j = 0; j < n; j++) rank += !forced[j] && better(score[j], j, score[c], c);
        keep[c] = r->mode == LSA_SELECT_THRESHOLD ? score[c] > t && (r->cap == 0 || rank < r->cap) : rank < k;
    }
    for (int64_t c = 0; c < n; c++)
        if (forced[c] || keep[c]) out[m++] = (int32_t)c;
    return m;
}

/* ---- cases ---- */

static lsa_select_rule plain(lsa_select_mode mode) {
    lsa_select_rule r = {.mode = mode, .n_layer = 1};
    for (int i = 0; i < LSA_MAX_CSA; i++) r.temperature[i] = 1;
    return r;
}

/* Runs the rule with and without a score array, within exactly the promised room. */
static void check(const lsa_select_rule *r, const float *logit, int64_t stride, int64_t n) {
    const int64_t room = lsa_select_room(r, n);
    int32_t want[N + 1], got[N + 1];
    float score[N + 1];
    int64_t n_got, n_want;
    lsa_err err = {0};
    memset(got, 0xa5, sizeof got);
    score[n] = 7;
    assert_int_equal(lsa_select(got, &n_got, score, r, logit, stride, n, &err), LSA_OK);
    assert_true(n_got >= 0 && n_got <= room && score[n] == 7);
    assert_int_equal((uint32_t)got[room], 0xa5a5a5a5u);
    n_want = oracle(want, r, score, r->threshold, n);
    assert_int_equal(n_got, n_want);
    assert_memory_equal(got, want, (size_t)n_want * sizeof *want);
    assert_int_equal(lsa_select(got, &n_got, NULL, r, logit, stride, n, &err), LSA_OK);
    assert_int_equal(n_got, n_want);
    assert_memory_equal(got, want, (size_t)n_want * sizeof *want);
}

static float draw(lsa_rng *g, int kind) {
    static const float few[] = {-0.0f, 0.0f, 1.0f, -2.0f, 1.0f + 0x1p-23f};
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 1e-42f, 0.5f};
    switch (kind) {
    case 0:
        return lsa_gen_normal(g);
    case 1:
        return few[lsa_gen_range(g, 0, 4)]; /* ties, both zeros */
    case 2:
        return odd[lsa_gen_range(g, 0, 6)];
    case 3:
        return NAN;
    case 4:
        return -INFINITY;
    case 5:
        return 2.5f;
    default:
        return lsa_gen_range(g, 0, 9) ? few[lsa_gen_range(g, 0, 4)] : odd[lsa_gen_range(g, 0, 6)];
    }
}

static void test_random(void **state) {
    (void)state;
    static float z[LAYERS * N];
    static const int64_t size[] = {0, 1, 2, 63, 64, 65, 127, 128, 129, 200, 640, N};
    static const double budget[] = {0, 1e-9, 0.1, 0.135, 0.5, 1};
    static const float threshold[] = {0.0f, -0.0f, 0.5f, 1.0f, -2.0f, INFINITY, -INFINITY};
    lsa_rng g = lsa_rng_make(13, 1);
    for (int i = 0; i < 6000; i++) {
        lsa_select_rule r = plain((lsa_select_mode)lsa_gen_range(&g, 0, 3));
        const int64_t n = lsa_gen_range(&g, 0, 3) ? size[lsa_gen_range(&g, 0, 11)] : lsa_gen_range(&g, 0, N);
        const int kind = (int)lsa_gen_range(&g, 0, 6);
        r.score = (lsa_score_rule)lsa_gen_range(&g, 0, 2);
        r.n_layer = (int32_t)lsa_gen_range(&g, 1, LAYERS);
        r.k = lsa_gen_range(&g, 0, 4) ? lsa_gen_range(&g, 0, r.mode == LSA_SELECT_PAGES ? 12 : N) : 0;
        if (!lsa_gen_range(&g, 0, 19)) r.k = INT64_MAX;
        r.cap = lsa_gen_range(&g, 0, 1) ? lsa_gen_range(&g, 0, N / 4) : 0;
        r.sink = lsa_gen_range(&g, 0, 2) ? 0 : lsa_gen_range(&g, 0, N + 9);
        r.tail = lsa_gen_range(&g, 0, 2) ? lsa_gen_range(&g, 0, 130) : lsa_gen_range(&g, 0, N + 9);
        r.budget = budget[lsa_gen_range(&g, 0, 5)];
        r.threshold = threshold[lsa_gen_range(&g, 0, 6)];
        for (int l = 0; l < LAYERS; l++) r.temperature[l] = 0.5f + (float)l, r.offset[l] = 0.1f * (float)l;
        for (int64_t c = 0; c < LAYERS * N; c++) z[c] = draw(&g, kind);
        check(&r, z, N, n);
    }
}

/* By hand, so that the brute force is not the only witness. */
static void expect(const lsa_select_rule *r, const float *z, int64_t n, const char *want) {
    int32_t id[N];
    int64_t m;
    char text[200] = "";
    assert_int_equal(lsa_select(id, &m, NULL, r, z, n, n, NULL), LSA_OK);
    for (int64_t i = 0; i < m; i++) snprintf(text + strlen(text), 16, "%s%d", i ? " " : "", id[i]);
    assert_string_equal(text, want);
}
static void test_by_hand(void **state) {
    (void)state;
    const float z[] = {1, 5, NAN, 5, -1, 0, 5, 2};
    lsa_select_rule r = plain(LSA_SELECT_TOPK);
    r.k = 2;
    expect(&r, z, 8, "1 3");
    r.k = 99;
    expect(&r, z, 8, "0 1 3 4 5 6 7");
    r.k = 1, r.sink = 2, r.tail = 1;
    expect(&r, z, 8, "0 1 3 7");
    r.sink = 3; /* the NaN chunk is forced */
    expect(&r, z, 8, "0 1 2 3 7");
    r = plain(LSA_SELECT_THRESHOLD);
    r.threshold = 1;
    expect(&r, z, 8, "1 3 6 7"); /* strictly above */
    r.cap = 2;
    expect(&r, z, 8, "1 3");
    r = plain(LSA_SELECT_BUDGET);
    r.budget = 0.26; /* ceil(2.08) */
    expect(&r, z, 8, "1 3 6");
    r.budget = 0.25;
    expect(&r, z, 8, "1 3");

    static float p[300]; /* pages 0..4, the last of 44 chunks */
    for (int c = 0; c < 300; c++) p[c] = -1;
    p[70] = 3, p[71] = 3;   /* page 1: two above */
    p[130] = 9;             /* page 2: one, the highest */
    p[200] = 4, p[299] = 4; /* pages 3 and 4: one each, equal */
    r = plain(LSA_SELECT_PAGES);
    r.k = 1;
    expect(&r, p, 300, "1");
    r.k = 3;
    expect(&r, p, 300, "1 2 3");
    r.k = 0, r.sink = 1, r.tail = 45; /* the tail reaches into page 3 */
    expect(&r, p, 300, "0 3 4");
    r.k = 4;
    expect(&r, p, 300, "0 1 3 4");

    const float two[] = {0, 0, 0, /* layer 0 */ 2, -2, NAN};
    r = plain(LSA_SELECT_TOPK);
    r.n_layer = 2, r.k = 1, r.score = LSA_SCORE_MAX;
    expect(&r, two, 3, "0");
    r.temperature[1] = 1000, r.offset[1] = -5; /* layer 1 says little: a tie at layer 0's one half */
    expect(&r, two, 3, "0");
    r.k = 3;
    expect(&r, two, 3, "0 1"); /* NaN in one layer */
}

/* The sum is continued before anything is chosen; forced chunks lend too. */
static void test_continued(void **state) {
    (void)state;
    const float z[] = {9, 1, 0, 0, 4, 1, 3, 0, 0, 0};
    lsa_select_rule r = plain(LSA_SELECT_TOPK);
    r.k = 3;
    expect(&r, z, 10, "0 4 6");
    r.reach = 2, r.cost[0] = 1, r.cost[1] = 7.5f; /* 9 8 1.5 0 4 3 3 2 0 0 */
    expect(&r, z, 10, "0 1 4");
    r.sink = 1;
    expect(&r, z, 10, "0 1 4 5");
    r.mode = LSA_SELECT_THRESHOLD, r.threshold = 1.5f, r.sink = 0, r.tail = 4;
    expect(&r, z, 10, "0 1 4 5 6 7 8 9");
    r.tail = 0;
    expect(&r, z, 10, "0 1 4 5 6 7");
    float two[2 * 5] = {1, 0, 0, 5, 0, /* of the sum, not of each layer */ 1, 0, 0, -5, 0};
    int32_t id[5];
    int64_t m;
    r.n_layer = 2, r.mode = LSA_SELECT_TOPK, r.k = 2, r.cost[0] = 0.5f;
    assert_int_equal(lsa_select(id, &m, NULL, &r, two, 5, 5, NULL), LSA_OK);
    assert_true(m == 2 && id[0] == 0 && id[1] == 1);
}

static void test_scores(void **state) {
    (void)state;
    enum { M = 500 };
    static float z[LAYERS * M], score[M];
    lsa_rng g = lsa_rng_make(13, 2);
    lsa_gen_fill(z, LAYERS * M, 4, &g);
    lsa_select_rule r = plain(LSA_SELECT_TOPK);
    int32_t id[M];
    int64_t m;
    double worst = 0;
    r.n_layer = LAYERS;
    for (int l = 0; l < LAYERS; l++) r.temperature[l] = 1 + 0.5f * (float)l, r.offset[l] = 0.25f * (float)l;
    for (int rule = 0; rule < 3; rule++) {
        r.score = (lsa_score_rule)rule;
        assert_int_equal(lsa_select(id, &m, score, &r, z, M, M, NULL), LSA_OK);
        for (int c = 0; c < M; c++) {
            double sum = 0, mean = 0, max = 0;
            for (int l = 0; l < LAYERS; l++) {
                const double x = (double)z[l * M + c], p = 1 / (1 + exp(-(x / (1 + 0.5 * l) + 0.25 * l)));
                sum += x, mean += p / LAYERS, max = p > max ? p : max;
            }
            const double want = rule == 0 ? sum : rule == 1 ? mean : max;
            const double d = fabs((double)score[c] - want) / (rule == 0 ? 12 : want);
            assert_true(d <= 2e-6); /* an input of 12 rounded to f32 moves its sigmoid by 5e-7 */
            worst = fmax(worst, d);
        }
    }
    printf("scores: worst relative error %.3g\n", worst);
}

static void test_knots(void **state) {
    (void)state;
    static float z[4096];
    int32_t id[4096];
    int64_t m;
    lsa_select_rule r = plain(LSA_SELECT_THRESHOLD);
    r.n_knot = 3, r.threshold = NAN;
    for (int i = 0; i < 3; i++)
        r.knot_length[i] = (int64_t[]){256, 1024, 2048}[i], r.knot_threshold[i] = (float[]){1, 3, -1}[i];
    const struct {
        int64_t n;
        float t;
    } want[] = {{1, 1}, {255, 1}, {256, 1}, {512, 2}, {1024, 3}, {2048, -1}, {4096, -1}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        for (int64_t c = 0; c < want[i].n; c++) z[c] = want[i].t;
        z[0] = want[i].t + 1e-6f;
        assert_int_equal(lsa_select(id, &m, NULL, &r, z, 0, want[i].n, NULL), LSA_OK);
        assert_int_equal(m, 1);
    }
}

static void refused(lsa_select_rule r, int64_t stride, int64_t n, const char *text) {
    static const float z[64] = {0};
    int32_t id[64];
    int64_t m = -1;
    lsa_err err = {0};
    assert_int_equal(lsa_select(id, &m, NULL, &r, z, stride, n, &err), LSA_E_ARG);
    assert_int_equal(m, 0);
    assert_non_null(strstr(err.msg, text));
}
static void test_refused(void **state) {
    (void)state;
    const lsa_select_rule ok = plain(LSA_SELECT_THRESHOLD);
    lsa_select_rule r;
#define BAD(text, ...) (r = ok, __VA_ARGS__, refused(r, 32, 32, text))
    BAD("mode", r.mode = (lsa_select_mode)9);
    BAD("score rule", r.score = (lsa_score_rule)3);
    BAD("layers", r.n_layer = 0);
    BAD("layers", r.n_layer = LSA_MAX_CSA + 1);
    BAD("k must", r.k = -1);
    BAD("cap", r.cap = -1);
    BAD("sink", r.sink = -1);
    BAD("tail", r.tail = -1);
    BAD("budget", r.mode = LSA_SELECT_BUDGET, r.budget = (double)NAN);
    BAD("budget", r.mode = LSA_SELECT_BUDGET, r.budget = 1.01);
    BAD("NaN", r.threshold = NAN);
    BAD("knots", r.n_knot = LSA_SELECT_KNOTS + 1);
    BAD("ascending", r.n_knot = 2, r.knot_length[0] = r.knot_length[1] = 5);
    BAD("ascending", r.n_knot = 1);
    BAD("not finite", r.n_knot = 1, r.knot_length[0] = 5, r.knot_threshold[0] = NAN);
    BAD("temperature", r.score = LSA_SCORE_MAX, r.temperature[0] = 0);
    BAD("offset", r.score = LSA_SCORE_MEAN, r.offset[0] = INFINITY);
    BAD("reach", r.reach = LSA_MAX_REACH + 1);
    BAD("cost 2", r.reach = 2, r.cost[1] = -0.5f);
    BAD("cost 1", r.reach = 2, r.cost[0] = NAN);
    BAD("belongs to the sum", r.reach = 2, r.score = LSA_SCORE_MEAN);
    refused(ok, 32, -1, "chunks");
    refused(ok, 32, INT64_C(1) << 31, "chunks");
    r = ok, r.n_layer = 2;
    refused(r, 31, 32, "row of 31");
}

static void test_sigmoid(void **state) {
    (void)state;
    enum { COUNT = 1 << 20 };
    float *y = LSA_GEN_NEW(float, COUNT);
    double worst = 0;
    float before = 0;
    for (int i = 0; i < COUNT; i++) {
        const float x = ((float)i - COUNT / 2) * (100.0f / (COUNT / 2)), v = lsa_sigmoid(x);
        const double want = 1 / (1 + exp(-fmax(-87, (double)x)));
        const double d = fabs((double)v - want) / want;
        assert_true(d <= 2.4e-7); /* two steps */
        worst = fmax(worst, d);
        assert_true(v >= before); /* a larger logit never scores less */
        y[i] = before = v;
    }
    printf("sigmoid: worst relative error %.3g (a float step is at most 1.2e-7)\n", worst);
    assert_true(lsa_sigmoid(0) == 0.5f && lsa_sigmoid(INFINITY) == 1 && lsa_sigmoid(-INFINITY) > 0);
    assert_true(lsa_sigmoid(-INFINITY) == lsa_sigmoid(-88) && isnan(lsa_sigmoid(NAN)));
    /* the same bits from every compiler and vector width */
    assert_int_equal(lsa_xxh64(y, COUNT * sizeof *y), UINT64_C(0x516408aab0202957));
    lsa_free(y);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_by_hand),   cmocka_unit_test(test_random),
                                       cmocka_unit_test(test_continued), cmocka_unit_test(test_scores),
                                       cmocka_unit_test(test_knots),     cmocka_unit_test(test_refused),
                                       cmocka_unit_test(test_sigmoid)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
