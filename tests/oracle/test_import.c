/* An imported indexer computes what the teacher's own indexer computes: from the hidden vectors of every CSA
 * layer, the same queries, the same head weights and, against the teacher's keys, the same logits; and a
 * wider copy of it still does. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/ckpt.h"
#include "data/docs.h"
#include "export/import.h"
#include "infer/lsa_infer.h"
#include "kernels/core/mem.h"
#include "tests/testkit/compare.h"
#include "tests/testkit/gen.h"

enum { N = 384, D = 128, LAYERS = 3, WIDTH = 256 };
static char g_dir[] = "/tmp/lsa-import-XXXXXX";

typedef struct check {
    float *z; /* [LAYERS, N, N/4] native logits */
    float *hidden, *iq, *iw;
    int heads;
} check;

static void on_csa(void *user, const lsa_tap_csa *t) {
    check *c = user;
    const int64_t at = (int64_t)t->ord.v * N + t->position;
    memcpy(c->hidden + at * WIDTH, t->hidden, WIDTH * sizeof(float));
    memcpy(c->iq + at * c->heads * D, t->iq, (size_t)(c->heads * D) * sizeof(float));
    memcpy(c->iw + at * c->heads, t->iw, (size_t)c->heads * sizeof(float));
    memcpy(c->z + at * (N / 4), t->logit, (size_t)t->n_visible * sizeof(float));
}

/* Queries and weights of layer l for all tokens through the indexer's own path. */
static void query(const lsa_indexer_geom *g, const float *params, int32_t l, const float *x, float *q,
                  float *w) {
    lsa_ctx *ctx = lsa_gen_ctx("cpu");
    lsa_err err = {0};
    float freq[64], *a = NULL, *rstd = NULL, *u = NULL;
    int64_t position[N];
    for (int64_t i = 0; i < N; i++) position[i] = i;
    lsa_rope_freqs(freq, &g->rope);
    assert_int_equal(LSA_NEW(a, (int64_t)N * g->rank, &err), LSA_OK);
    assert_int_equal(LSA_NEW(rstd, N, &err), LSA_OK);
    assert_int_equal(LSA_NEW(u, (int64_t)N * g->rank, &err), LSA_OK);
    const lsa_indexer_act act = {a, rstd, u, q, w};
    if (lsa_indexer_query(ctx, g, params, l, N, x, position, freq, &act, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    lsa_free(a), lsa_free(rstd), lsa_free(u);
}

static double logit(const float *q, const float *w, int heads, const float *key) {
    double z = 0;
    for (int h = 0; h < heads; h++) {
        double p = 0;
        for (int i = 0; i < D; i++) p += (double)q[h * D + i] * (double)key[i];
        z += (double)w[h] * fmax(p, 0);
    }
    return z;
}

static void compare(const check *c, const lsa_session *s, const lsa_indexer_geom *g, const float *params,
                    bool same_heads) {
    float *q = LSA_GEN_NEW(float, N * g->n_head * D), *w = LSA_GEN_NEW(float, N * g->n_head);
    float *got = LSA_GEN_NEW(float, N *(N / 4)), *want = LSA_GEN_NEW(float, N *(N / 4));
    for (int32_t l = 0; l < LAYERS; l++) {
        int64_t n_key, n = 0;
        const float *key = lsa_session_keys(s, (lsa_csa_ord){l}, &n_key);
        query(g, params, l, c->hidden + (int64_t)l * N * WIDTH, q, w);
        if (same_heads) {
            assert_true(lsa_compare_f32("queries", q, c->iq + (int64_t)l * N * c->heads * D,
                                        (int64_t)N * c->heads * D, (lsa_tol){0, 1e-5, 1e-10}));
            assert_true(lsa_compare_f32("weights", w, c->iw + (int64_t)l * N * c->heads,
                                        (int64_t)N * c->heads, (lsa_tol){0, 1e-5, 1e-10}));
        }
        for (int64_t t = 0; t < N; t++)
            for (int64_t k = 0; k < (t + 1) / 4; k++, n++) {
                got[n] = (float)logit(q + t * g->n_head * D, w + t * g->n_head, g->n_head, key + k * D);
                want[n] = c->z[((int64_t)l * N + t) * (N / 4) + k];
            }
        assert_true(lsa_compare_f32("native logits", got, want, n, (lsa_tol){0, 2e-5, 1e-10}));
    }
    free(q), free(w), free(got), free(want);
}

static void test_import(void **state) {
    (void)state;
    lsa_engine *e = NULL;
    lsa_session *s = NULL;
    lsa_docs *docs = NULL;
    lsa_ckpt ck;
    lsa_err err = {0};
    char note[512];
    if (lsa_export_import("recipes/mini/teacher", g_dir, &(lsa_import_options){.layers = "all"}, note,
                          sizeof note, &err) != LSA_OK ||
        lsa_ckpt_load(&ck, g_dir, false, &err) != LSA_OK ||
        lsa_engine_open(&e, "recipes/mini/teacher", &(lsa_engine_opts){0}, &err) != LSA_OK ||
        lsa_docs_open(&docs, "recipes/mini/train.u16", "recipes/mini/train.jsonl", "0:1", 0, &err) !=
            LSA_OK ||
        lsa_session_create(&s, e, &(lsa_session_opts){.max_tokens = N}, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(ck.geom.n_layer, LAYERS);
    check c = {.heads = ck.geom.n_head};
    c.z = LSA_GEN_NEW(float, LAYERS *N *(N / 4)), c.hidden = LSA_GEN_NEW(float, LAYERS *N *WIDTH);
    c.iq = LSA_GEN_NEW(float, LAYERS *N *c.heads *D), c.iw = LSA_GEN_NEW(float, LAYERS *N *c.heads);
    const lsa_taps taps = {.user = &c, .csa = on_csa};
    if (lsa_session_forward(s, lsa_docs_at(docs, 0)->token, N, NULL, false, &taps, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    compare(&c, s, &ck.geom, ck.params, true);
    lsa_indexer_geom wide = ck.geom;
    wide.n_head = 32, wide.rank = 200;
    float *p = LSA_GEN_NEW(float, lsa_indexer_n_param(&wide));
    if (lsa_indexer_widen(p, &wide, ck.params, &ck.geom, 3, &err) != LSA_OK) fail_msg("%s", err.msg);
    compare(&c, s, &wide, p, false);
    free(p), free(c.z), free(c.hidden), free(c.iq), free(c.iw);
    lsa_session_destroy(s);
    lsa_docs_close(docs);
    lsa_engine_close(e);
    lsa_ckpt_fini(&ck);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_import)};
    if (!mkdtemp(g_dir)) return 1;
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
