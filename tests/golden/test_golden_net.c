/* The golden net: logits, argmax, selections and masses of an implementation that shares no code with ours,
 * in prefill, token by token and in odd chunks; and the same through every storage the loader knows. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "infer/lsa_infer.h"
#include "kernels/core/file.h"
#include "tests/testkit/golden_net.h"

#define N 100
#define V 64

static char g_dir[64] = "/tmp/lsa-golden.XXXXXX";

static const struct {
    int t;
    double l0, l1, l2, l63, sum;
} LOGIT[] = {{0, 0.505953, -0.476486, 0.250277, -0.432770, 19.6118},
             {1, 0.860419, -0.001227, 0.691790, -2.247533, 0.6851},
             {3, 0.811179, -0.082074, -1.287655, 0.007865, -3.9311},
             {7, 1.639634, -0.595253, 2.446591, -0.710323, -0.2598},
             {8, -3.460751, -0.974192, 0.979464, -0.938720, -20.4882},
             {15, -0.652938, 1.645503, 2.327606, -1.645942, -33.8825},
             {31, 0.894276, -3.025255, -1.060093, 2.528879, 5.5061},
             {63, -0.923486, -2.764125, 0.634558, 0.183402, -15.7903},
             {99, -0.063729, 3.073685, -2.505104, -0.996223, 1.2960}};
static const int ARGMAX[N] = {14, 14, 46, 56, 56, 30, 3,  2,  17, 56, 46, 17, 56, 51, 59, 56, 0,  46, 36, 34,
                              19, 29, 62, 43, 35, 2,  59, 34, 34, 50, 37, 4,  14, 24, 33, 1,  12, 33, 49, 14,
                              35, 21, 19, 25, 41, 36, 28, 56, 27, 24, 50, 50, 61, 29, 4,  40, 15, 46, 24, 62,
                              4,  59, 48, 41, 46, 19, 46, 12, 48, 56, 3,  45, 46, 58, 2,  2,  27, 51, 51, 2,
                              2,  46, 47, 59, 19, 26, 62, 2,  35, 43, 31, 34, 56, 50, 50, 36, 23, 24, 57, 51};
static const struct {
    int t, layer;
    double logit[6];
    int sel[4];
    double mass[4], window, sink;
} STAT[] = {{31,
             1,
             {-.516913, .174793, -2.741641, 1.533403, 1.152087, .675421},
             {3, 4, 5, 7},
             {.168659, .070320, .162919, .066739},
             .491676,
             .039687},
            {31,
             3,
             {.177665, -2.434233, -1.281089, -.362440, -2.321975, -.354499},
             {0, 2, 3, 5},
             {.090768, .078396, .041288, .011879},
             .685367,
             .092302},
            {99,
             1,
             {4.395570, 3.082550, 2.219430, 1.765445, .921852, 3.219152},
             {0, 6, 17, 22},
             {.089021, .084916, .068461, .085488},
             .591522,
             .080591},
            {99,
             3,
             {-2.162369, -.539389, 1.280653, -.663631, -.803797, -1.163980},
             {2, 20, 21, 22},
             {.068169, .063988, .186243, .107569},
             .494733,
             .079298}};

static int g_stats_seen;
static void on_csa(void *user, const lsa_tap_csa *t) {
    (void)user;
    double sum = (double)t->window_mass + (double)t->sink_mass;
    for (int i = 0; i < t->n_sel; i++) sum += (double)t->mass[i];
    assert_true(fabs(sum - 1.0) <= 1e-5);
    for (size_t k = 0; k < sizeof STAT / sizeof *STAT; k++) {
        if (STAT[k].t != t->position || STAT[k].layer != t->layer.v) continue;
#pragma omp atomic
        g_stats_seen++;
        assert_int_equal(t->n_sel, 4);
        for (int i = 0; i < 4; i++) {
            assert_int_equal(t->sel[i], STAT[k].sel[i]);
            assert_true(fabs((double)t->mass[i] - STAT[k].mass[i]) <= 1e-5);
        }
        for (int i = 0; i < 6; i++) assert_true(fabs((double)t->logit[i] - STAT[k].logit[i]) <= 2e-4);
        assert_true(fabs((double)t->window_mass - STAT[k].window) <= 1e-5);
        assert_true(fabs((double)t->sink_mass - STAT[k].sink) <= 1e-5);
    }
}

static lsa_engine *open_net(lsa_golden g, lsa_golden_store store, lsa_engine_opts o) {
    lsa_err err = {0};
    lsa_engine *e = NULL;
    if (lsa_golden_write(g_dir, &g, store, &err) != LSA_OK ||
        lsa_engine_open(&e, g_dir, &o, &err) != LSA_OK) {
        print_error("%s\n", err.msg);
        fail();
    }
    return e;
}

static void run(const lsa_engine *e, int64_t step, const lsa_taps *taps, float *logits) {
    lsa_err err = {0};
    lsa_session *s = NULL;
    lsa_session_opts o = {.max_tokens = N, .chunk = N};
    int32_t token[N];
    for (int t = 0; t < N; t++) token[t] = lsa_golden_token(t);
    assert_int_equal(lsa_session_create(&s, e, &o, &err), LSA_OK);
    /* stale rows of an earlier sequence must not be seen */
    assert_int_equal(lsa_session_forward(s, token + 3, 50, NULL, false, NULL, &err), LSA_OK);
    lsa_session_reset(s);
    for (int64_t t = 0; t < N; t += step) {
        int64_t n = t + step < N ? step : N - t;
        if (lsa_session_forward(s, token + t, n, logits + t * V, false, taps, &err) != LSA_OK)
            fail_msg("%s", err.msg);
    }
    lsa_session_destroy(s);
}

static void check(const float *logits) {
    double sq = 0;
    for (size_t k = 0; k < sizeof LOGIT / sizeof *LOGIT; k++) {
        const float *l = logits + LOGIT[k].t * V;
        double sum = 0;
        for (int i = 0; i < V; i++) sum += (double)l[i];
        assert_true(fabs((double)l[0] - LOGIT[k].l0) <= 2e-4);
        assert_true(fabs((double)l[1] - LOGIT[k].l1) <= 2e-4);
        assert_true(fabs((double)l[2] - LOGIT[k].l2) <= 2e-4);
        assert_true(fabs((double)l[63] - LOGIT[k].l63) <= 2e-4);
        assert_true(fabs(sum - LOGIT[k].sum) <= 64 * 2e-4);
    }
    for (int t = 0; t < N; t++) {
        int best = 0;
        for (int i = 0; i < V; i++) {
            sq += (double)logits[t * V + i] * (double)logits[t * V + i];
            if (logits[t * V + i] > logits[t * V + best]) best = i;
        }
        assert_int_equal(best, ARGMAX[t]);
    }
    assert_true(fabs(sqrt(sq / (N * V)) - 1.384851) <= 1e-4);
}

static void test_tier_a(void **state) {
    (void)state;
    static float logits[N * V];
    lsa_engine *e = open_net(lsa_golden_default(), LSA_STORE_F32, (lsa_engine_opts){0});
    lsa_taps taps = {.csa = on_csa};
    const int64_t steps[] = {N, 1, 3, 7, 64};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        g_stats_seen = 0;
        run(e, steps[i], &taps, logits);
        check(logits);
        assert_int_equal(g_stats_seen, 4);
    }
    lsa_engine_close(e);
}

static int g_sim_seen;
static void on_csa_sim(void *user, const lsa_tap_csa *t) {
    (void)user;
    static const int want[4] = {3, 4, 5, 7};
    if (t->position != 31 || t->layer.v != 1) return;
    assert_int_equal(t->n_sel, 4);
    for (int i = 0; i < 4; i++) assert_int_equal(t->sel[i], want[i]);
    g_sim_seen++;
}

static void test_simulations(void **state) {
    (void)state;
    static const struct {
        int t;
        double l[4];
        int arg;
    } S[] = {{0, {.639657, -.927573, -.531648, .681403}, 14},
             {8, {-2.530233, -.760770, .919918, -.906568}, 17},
             {99, {.402068, 2.724022, -2.159421, -1.022506}, 47}};
    static float logits[N * V];
    lsa_engine *e = open_net(lsa_golden_default(), LSA_STORE_F32,
                             (lsa_engine_opts){.sim_fp8_kv = true, .sim_fp4_index = true});
    lsa_taps taps = {.csa = on_csa_sim};
    for (int64_t step = 1; step <= N; step += N - 1) {
        g_sim_seen = 0;
        run(e, step, &taps, logits);
        assert_int_equal(g_sim_seen, 1);
        for (size_t k = 0; k < 3; k++) {
            const float *l = logits + S[k].t * V;
            const int col[4] = {0, 1, 2, 63};
            int best = 0;
            for (int i = 0; i < V; i++)
                if (l[i] > l[best]) best = i;
            for (int i = 0; i < 4; i++) {
                double d = fabs((double)l[col[i]] - S[k].l[i]);
                if (!(d <= 2e-2))
                    fail_msg("t %d column %d: %g, want %g", S[k].t, col[i], (double)l[col[i]], S[k].l[i]);
            }
            assert_int_equal(best, S[k].arg);
        }
    }
    lsa_engine_close(e);
}

/* Every storage of one net gives the logits of its dequantised twin, bit for bit. */
static void test_storages(void **state) {
    (void)state;
    static float a[N * V], b[N * V];
    const lsa_golden_store pair[][2] = {{LSA_STORE_F32, LSA_STORE_MODULES},
                                        {LSA_STORE_DEQUANT_BF16, LSA_STORE_BF16},
                                        {LSA_STORE_DEQUANT_E8M0, LSA_STORE_FP8_E8M0},
                                        {LSA_STORE_DEQUANT_F32, LSA_STORE_FP8_F32}};
    for (size_t i = 0; i < 4; i++) {
        lsa_engine *e = open_net(lsa_golden_wide(), pair[i][0], (lsa_engine_opts){0});
        run(e, N, NULL, a);
        lsa_engine_close(e);
        e = open_net(lsa_golden_wide(), pair[i][1], (lsa_engine_opts){0});
        run(e, N, NULL, b);
        lsa_engine_close(e);
        assert_memory_equal(a, b, sizeof a);
        assert_true(isfinite(a[N * V - 1]) && a[5] != a[6]);
    }
}

/* A resident set of everything changes nothing; without chunk 6 the selection at t = 99 moves on and a miss
 * is counted. */
static int g_miss;
static void on_csa_miss(void *user, const lsa_tap_csa *t) {
    (void)user;
    for (int i = 0; i < t->n_sel; i++) assert_int_not_equal(t->sel[i], 6);
    if (t->position == 99 && t->layer.v == 1) g_miss = t->n_miss;
}
static void test_resident(void **state) {
    (void)state;
    static float a[N * V], b[N * V];
    lsa_engine *e = open_net(lsa_golden_default(), LSA_STORE_F32, (lsa_engine_opts){0});
    run(e, N, NULL, a);
    lsa_err err = {0};
    lsa_session *s = NULL;
    lsa_session_opts o = {.max_tokens = N, .chunk = N};
    int32_t token[N];
    uint8_t mask[N / 4];
    for (int t = 0; t < N; t++) token[t] = lsa_golden_token(t);
    memset(mask, 1, sizeof mask);
    assert_int_equal(lsa_session_create(&s, e, &o, &err), LSA_OK);
    lsa_session_set_resident(s, mask, N / 4);
    assert_int_equal(lsa_session_forward(s, token, N, b, false, NULL, &err), LSA_OK);
    assert_memory_equal(a, b, sizeof a);
    lsa_session_reset(s);
    mask[6] = 0;
    lsa_taps taps = {.csa = on_csa_miss};
    lsa_session_set_resident(s, mask, N / 4);
    assert_int_equal(lsa_session_forward(s, token, N, b, false, &taps, &err), LSA_OK);
    assert_true(g_miss >= 1);
    assert_memory_not_equal(a, b, sizeof a);
    assert_int_equal(lsa_session_forward(s, token, 1, b, false, NULL, &err), LSA_E_ARG);
    lsa_session_destroy(s);
    lsa_engine_close(e);
}

/* Perturbing token p changes nothing before p. */
static void test_causal(void **state) {
    (void)state;
    static float a[N * V], b[N * V];
    lsa_engine *e = open_net(lsa_golden_default(), LSA_STORE_F32, (lsa_engine_opts){0});
    run(e, N, NULL, a);
    lsa_err err = {0};
    lsa_session *s = NULL;
    lsa_session_opts o = {.max_tokens = N, .chunk = N};
    int32_t token[N];
    for (int t = 0; t < N; t++) token[t] = lsa_golden_token(t);
    token[70] = (token[70] + 5) % 64;
    assert_int_equal(lsa_session_create(&s, e, &o, &err), LSA_OK);
    assert_int_equal(lsa_session_forward(s, token, N, b, false, NULL, &err), LSA_OK);
    assert_memory_equal(a, b, 64 * V * sizeof(float));
    /* in the same block only rounding may differ: experts see other numbers of tokens */
    for (int i = 64 * V; i < 70 * V; i++) assert_true(fabsf(a[i] - b[i]) <= 1e-4f);
    assert_memory_not_equal(a + 70 * V, b + 70 * V, V * sizeof(float));
    token[3] = 64;
    lsa_session_reset(s);
    assert_int_equal(lsa_session_forward(s, token, N, b, false, NULL, &err), LSA_E_ARG);
    lsa_session_destroy(s);
    lsa_engine_close(e);
}

int main(void) {
    if (!mkdtemp(g_dir)) return 1;
    const struct CMUnitTest t[] = {cmocka_unit_test(test_tier_a), cmocka_unit_test(test_simulations),
                                   cmocka_unit_test(test_storages), cmocka_unit_test(test_resident),
                                   cmocka_unit_test(test_causal)};
    int rc = cmocka_run_group_tests(t, NULL, NULL);
    lsa_err err = {0};
    return rc | (lsa_remove_tree(g_dir, &err) != LSA_OK);
}
