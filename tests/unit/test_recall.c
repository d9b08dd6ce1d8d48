/* The state of the observed-mass prior in the decoder, on the mini teacher: what scores gain over an indexer
 * whose weights are 0 is the prior of the masses that this test saw on a tap of its own; chunks that were not
 * resident have none; a prompt in one call is windows cut at multiples of tau; threads change nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>

#include "infer/recall.h"
#include "kernels/core/mem.h"
#include "kernels/core/rng.h"

enum { TAU = 64, TOKENS = 512 + 20, CHUNKS = TOKENS / 4 + 1, LAYERS = 8 };
static const double W[] = {0.75, -0.25};

typedef struct rig {
    lsa_recall *with, *without;
    double seen[LAYERS][TOKENS][CHUNKS]; /* mass by layer, token and chunk */
} rig;

static void on_csa(void *user, const lsa_tap_csa *t) {
    rig *x = user;
    lsa_recall_observe(x->with, t);
    lsa_recall_observe(x->without, t);
    for (int32_t i = 0; i < t->n_sel; i++) x->seen[t->ord.v][t->position][t->sel[i]] = (double)t->mass[i];
}

static lsa_indexer_file make_file(const lsa_teacher_config *c, bool zero) {
    lsa_indexer_file f = {.geom = {.hidden = c->hidden,
                                   .n_head = 8,
                                   .head_dim = 128,
                                   .rank = 16,
                                   .eps = c->norm_eps,
                                   .rope = c->rope_compress,
                                   .n_layer = 2,
                                   .prior = true}};
    for (int32_t l = 0; l < 2; l++) f.geom.ord[l].v = l, f.geom.id[l] = c->csa_id[l];
    assert_int_equal(LSA_NEW(f.params, lsa_indexer_n_param(&f.geom), NULL), LSA_OK);
    lsa_indexer_init_random(f.params, &f.geom, 3);
    for (int k = 0; k < 2; k++) f.params[lsa_indexer_prior_at(&f.geom) + k] = zero ? 0 : (float)W[k];
    return f;
}

/* The state once more: windows of the given lengths, masses averaged over layers and tokens. */
static void truth(double *m, double *M, rig *x, const int64_t *window, int n_window, int32_t n_csa) {
    memset(m, 0, CHUNKS * sizeof *m);
    memset(M, 0, CHUNKS * sizeof *M);
    for (int64_t w = 0, t0 = 0; w < n_window; t0 += window[w++])
        for (int c = 0; c < CHUNKS; c++) {
            double sum = 0;
            for (int l = 0; l < n_csa; l++)
                for (int64_t t = t0; t < t0 + window[w]; t++) sum += x->seen[l][t][c];
            M[c] = 0.9 * M[c] + m[c];
            m[c] = sum / (n_csa * (double)window[w]);
        }
}

static void check(rig *x, const lsa_session *s, const int64_t *window, int n_window, int32_t n_csa) {
    const int64_t n = lsa_session_position(s) / 4;
    float a[CHUNKS], b[CHUNKS];
    double m[CHUNKS], M[CHUNKS], most = 0;
    lsa_err err = {0};
    if (lsa_recall_score(x->with, s, a, n, &err) != LSA_OK) fail_msg("%s", err.msg);
    if (lsa_recall_score(x->without, s, b, n, &err) != LSA_OK) fail_msg("%s", err.msg);
    truth(m, M, x, window, n_window, n_csa);
    for (int64_t c = 0; c < n; c++) {
        const double want = W[0] * log1p(m[c] / 1e-3) + W[1] * log1p(M[c] / 1e-3),
                     got = (double)a[c] - (double)b[c];
        if (!(fabs(got - want) <= 2e-5 * (1 + fabs(want))))
            fail_msg("window %d, chunk %lld: %.7g, expected %.7g", n_window, (long long)c, got, want);
        if (m[c] == 0 && M[c] == 0) assert_true(a[c] == b[c]);
        most = fmax(most, fabs(want));
    }
    assert_true(most > 0.3);
}

/* The prompt in one call, then a short window, then whole ones with half of the chunks evicted. */
static void walk(int threads, float *last) {
    static rig x;
    const int nt = omp_get_max_threads();
    lsa_engine *e = NULL;
    lsa_session *s = NULL;
    lsa_err err = {0};
    int32_t token[TOKENS];
    uint8_t resident[CHUNKS];
    int64_t window[16] = {64, 64, 64, 64, 40}, n_window = 5, at = 296;
    lsa_rng g = lsa_rng_make(11, 1);
    memset(&x, 0, sizeof x);
    omp_set_num_threads(threads);
    if (lsa_engine_open(&e, "recipes/mini/teacher", &(lsa_engine_opts){0}, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    const lsa_teacher_config *c = lsa_engine_config(e);
    assert_true(c->n_csa <= LAYERS);
    lsa_indexer_file f = make_file(c, false), zero = make_file(c, true);
    if (lsa_recall_create(&x.with, &f, e, CHUNKS, 320, &err) != LSA_OK) fail_msg("%s", err.msg);
    if (lsa_recall_create(&x.without, &zero, e, CHUNKS, 320, &err) != LSA_OK) fail_msg("%s", err.msg);
    if (lsa_session_create(&s, e, &(lsa_session_opts){.max_tokens = TOKENS, .chunk = 320}, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    for (int i = 0; i < TOKENS; i++) token[i] = 2 + (int32_t)lsa_rng_below(&g, (uint64_t)c->vocab - 2);
    const lsa_taps taps = {.user = &x, .csa = on_csa};
    assert_int_equal(lsa_session_forward(s, token, at, NULL, false, &taps, &err), LSA_OK);
    for (int w = 0; w < n_window; w++) {
        lsa_recall_end_window(x.with, window[w]);
        lsa_recall_end_window(x.without, window[w]);
    }
    check(&x, s, window, (int)n_window, c->n_csa);
    while (at < 512) {
        const int64_t n = (at / TAU + 1) * TAU - at, ev = at / 4 - 16;
        for (int64_t k = 0; k < ev; k++) resident[k] = (uint8_t)(k & 1);
        lsa_session_set_resident(s, resident, ev);
        assert_int_equal(lsa_session_forward(s, token + at, n, NULL, false, &taps, &err), LSA_OK);
        for (int l = 0; l < c->n_csa; l++)
            for (int64_t t = at; t < at + n; t++)
                for (int64_t k = 0; k < ev; k += 2) assert_true(x.seen[l][t][k] == 0);
        lsa_recall_end_window(x.with, n);
        lsa_recall_end_window(x.without, n);
        window[n_window++] = n;
        at += n;
        check(&x, s, window, (int)n_window, c->n_csa);
    }
    assert_int_equal(lsa_recall_score(x.with, s, last, 100, &err), LSA_OK);
    lsa_recall_reset(x.with); /* a new request has observed nothing */
    float a[CHUNKS], b[CHUNKS];
    assert_int_equal(lsa_recall_score(x.with, s, a, 100, &err), LSA_OK);
    assert_int_equal(lsa_recall_score(x.without, s, b, 100, &err), LSA_OK);
    assert_memory_equal(a, b, 100 * sizeof *a);
    lsa_recall_destroy(x.with), lsa_recall_destroy(x.without);
    lsa_session_destroy(s);
    lsa_engine_close(e);
    lsa_indexer_file_fini(&f), lsa_indexer_file_fini(&zero);
    omp_set_num_threads(nt);
}

static void test_observed(void **state) {
    (void)state;
    float one[100], four[100];
    walk(1, one);
    walk(4, four);
    assert_memory_equal(one, four, sizeof one);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_observed)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
