/* Windows, samples and order against a brute-force reading of hand-made shards: labels and masses are drawn
 * at random, chunk 5 is golden nearly everywhere, and the expected sets are recomputed here from those draws,
 * not from the trainer's code. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/shard_write.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/rng.h"
#include "trainer/batch.h"

enum { LAYERS = 2, HIDDEN = 8, DOCS = 5, LONGEST = 700 };
static const int64_t TOKENS[DOCS] = {640, 700, 3, 333, 512}; /* the third is shorter than any window */

static char g_dir[64];
/* The truth: votes[doc][token][chunk] and mass[doc][layer][token][chunk]. */
static uint8_t g_votes[DOCS][LONGEST][LONGEST / 4];
static float g_mass[DOCS][LAYERS][LONGEST][LONGEST / 4];

static void put(lsa_csr *c, int64_t row, int32_t chunk, uint8_t votes, uint16_t mass) {
    c->chunk[c->n_entry] = chunk;
    if (c->votes) c->votes[c->n_entry] = votes;
    if (c->mass) c->mass[c->n_entry] = mass;
    if (c->logit) c->logit[c->n_entry] = 0;
    c->begin[row + 1] = ++c->n_entry;
}

static void csr_room(lsa_csr *c, int64_t rows, bool labels) {
    c->n_row = rows;
    assert_int_equal(LSA_NEW(c->begin, rows + 1, NULL), LSA_OK);
    assert_int_equal(LSA_NEW(c->chunk, rows * (LONGEST / 4), NULL), LSA_OK);
    if (labels) {
        assert_int_equal(LSA_NEW(c->votes, rows * (LONGEST / 4), NULL), LSA_OK);
    } else {
        assert_int_equal(LSA_NEW(c->logit, rows * (LONGEST / 4), NULL), LSA_OK);
        assert_int_equal(LSA_NEW(c->mass, rows * (LONGEST / 4), NULL), LSA_OK);
    }
}

static void make_doc(lsa_doc_stats *d, int64_t doc, int64_t stride) {
    const int64_t T = TOKENS[doc];
    lsa_rng r = lsa_rng_make(31, (uint64_t)doc);
    memset(d, 0, sizeof *d);
    snprintf(d->name, sizeof d->name, "hand:%lld", (long long)doc);
    d->n_token = T;
    d->n_key = T / 4;
    d->n_hidden = T / stride;
    csr_room(&d->labels, T, true);
    for (int32_t l = 0; l < LAYERS; l++) {
        assert_int_equal(LSA_NEW(d->key[l], d->n_key * LSA_KEY_BYTES, NULL), LSA_OK);
        assert_int_equal(LSA_NEW(d->hidden[l], d->n_hidden * HIDDEN, NULL), LSA_OK);
        assert_int_equal(LSA_NEW(d->local_mass[l], T, NULL), LSA_OK);
        assert_int_equal(LSA_NEW(d->sink_mass[l], T, NULL), LSA_OK);
        csr_room(&d->stats[l], T, false);
        for (int64_t c = 0; c < d->n_key; c++)
            d->key[l][c * LSA_KEY_BYTES] = (uint8_t)(8 * doc + l + 1),
                          d->key[l][c * LSA_KEY_BYTES + 1] = (uint8_t)(c & 63);
        for (int64_t i = 0; i < d->n_hidden; i++) /* the vector names its document, layer and position */
            for (int64_t j = 0; j < HIDDEN; j++)
                d->hidden[l][i * HIDDEN + j] = lsa_f32_to_bf16((float)(j == 0   ? doc
                                                                       : j == 1 ? l
                                                                       : j == 2 ? i
                                                                                : 0));
    }
    for (int64_t t = 0; t < T; t++) {
        d->labels.begin[t + 1] = d->labels.n_entry;
        for (int32_t l = 0; l < LAYERS; l++) d->stats[l].begin[t + 1] = d->stats[l].n_entry;
        for (int32_t c = 0; c < (t + 1) / 4; c++) {
            const uint64_t x = lsa_rng_below(&r, 100);
            const uint8_t v = c == 5 && t % 16 ? 2 : x < 2 ? 2 : x < 5 ? 1 : 0;
            if (v) put(&d->labels, t, c, v, 0);
            g_votes[doc][t][c] = v;
            for (int32_t l = 0; l < LAYERS; l++) {
                const uint16_t m = lsa_rng_below(&r, 100) < 6
                                       ? lsa_f32_to_f16(0.001f * (float)(1 + lsa_rng_below(&r, 90)))
                                       : 0;
                if (m) put(&d->stats[l], t, c, 0, m);
                g_mass[doc][l][t][c] = lsa_f16_to_f32(m);
            }
        }
    }
}

static void make_shards(const char *dir, int32_t stride) {
    lsa_manifest m = {0};
    lsa_manifest_shard s;
    lsa_doc_stats d[DOCS];
    lsa_err err = {0};
    assert_int_equal(lsa_mkdirs(dir, NULL), LSA_OK);
    snprintf(m.info.teacher, sizeof m.info.teacher, "hand-made");
    m.info.hidden = HIDDEN, m.info.hidden_stride = stride, m.info.n_csa = LAYERS, m.info.has_stats = true;
    m.info.rope = (lsa_rope){
        .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    m.info.label_top_p = 0.6, m.info.label_pool = 64;
    for (int32_t l = 0; l < LAYERS; l++) m.info.csa_id[l].v = 2 * l + 1, m.info.has_keys[l] = true;
    for (int64_t i = 0; i < DOCS; i++) make_doc(&d[i], i, stride);
    for (int part = 0; part < 2; part++) { /* two shards: documents 0..2 and 3..4 */
        if (lsa_shard_seal(&s, dir, part ? "b.h5" : "a.h5", &m.info, d + 3 * part, part ? 2 : 3, &err) !=
            LSA_OK)
            fail_msg("%s", err.msg);
        assert_int_equal(lsa_manifest_add(&m, &s, NULL), LSA_OK);
    }
    m.complete = true;
    m.run = json_object();
    if (lsa_manifest_save(&m, dir, &err) != LSA_OK) fail_msg("%s", err.msg);
    for (int64_t i = 0; i < DOCS; i++) lsa_doc_stats_fini(&d[i]);
    lsa_manifest_fini(&m);
}

/* ---- what a test works with
 * -------------------------------------------------------------------------------- */

typedef struct bench {
    lsa_recipe r;
    lsa_indexer_geom g;
    lsa_source *s;
    lsa_order *o;
    lsa_batch b;
    lsa_cursor c;
} bench;

static void open_bench(bench *x, int stride, const char *const *set, int n_set) {
    char dir[96];
    lsa_err err = {0};
    memset(x, 0, sizeof *x);
    snprintf(dir, sizeof dir, "%s/s%d", g_dir, stride);
    if (lsa_recipe_load(&x->r, lsa_recipe_keys, lsa_recipe_n_key, NULL, set, n_set, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    x->g = (lsa_indexer_geom){
        .hidden = HIDDEN, .n_head = 2, .head_dim = 128, .rank = 4, .eps = 1e-6f, .n_layer = LAYERS};
    for (int32_t l = 0; l < LAYERS; l++) x->g.ord[l].v = l, x->g.id[l].v = 2 * l + 1;
    if (lsa_source_open(&x->s, dir, &x->r, &x->g, true, &err) != LSA_OK) fail_msg("%s", err.msg);
    if (lsa_order_create(&x->o, x->s, &x->r, &err) != LSA_OK) fail_msg("%s", err.msg);
}
static void next(bench *x) {
    lsa_err err = {0};
    if (lsa_batch_next(&x->b, x->s, x->o, &x->r, &x->g, &x->c, &err) != LSA_OK) fail_msg("%s", err.msg);
}
static void close_bench(bench *x) {
    lsa_batch_fini(&x->b);
    lsa_order_destroy(x->o);
    lsa_source_close(x->s);
}

static uint8_t window_votes(int64_t doc, int64_t a, int64_t b, int64_t c, int64_t min_layers) {
    uint8_t best = 0;
    for (int64_t t = a; t < b; t++)
        if (g_votes[doc][t][c] >= min_layers && g_votes[doc][t][c] > best) best = g_votes[doc][t][c];
    return best;
}
static double window_mass(int64_t doc, int64_t a, int64_t b, int64_t c) {
    double m = 0;
    for (int l = 0; l < LAYERS; l++)
        for (int64_t t = a; t < b; t++) m += (double)g_mass[doc][l][t][c];
    return m;
}
static bool trivial(int64_t doc, int64_t c, int64_t min_layers) {
    int64_t n = 0;
    for (int64_t t = 0; t < TOKENS[doc]; t++) n += g_votes[doc][t][c] >= min_layers;
    return (double)n > 0.8 * (double)TOKENS[doc];
}

static const char *const LOOK[] = {"window.tail=128", "sample.val_documents=0", "train.batch=7"};
static const char *const REFERENCE[] = {
    "train.mode=reference",  "window.stride=1",     "sample.candidates=sampled",
    "sample.order=shuffled", "sample.causal=false", "sample.exclude_resident=false",
    "loss.kind=focal",       "loss.on=layer",       "sample.val_documents=0",
    "train.batch=9",         "sample.max_pos=12",   "sample.neg_ratio=2"};
enum { N_REF = sizeof REFERENCE / sizeof *REFERENCE };

/* ---- lookahead
 * ----------------------------------------------------------------------------------------------- */

/* The query of window [s, s+64) is token s-1; candidates end where the tail begins; the target is the
 * normalised mass. */
static void test_lookahead_kl(void **state) {
    (void)state;
    bench x;
    open_bench(&x, 64, LOOK, 3);
    /* starts 192, 256, ... whose 64 tokens fit: 7 of 640 tokens, 7 of 700, none of 3, 2 of 333 (192, 256), 5
     * of 512 */
    assert_int_equal(lsa_order_epoch_windows(x.o), 21);
    for (int k = 0; k < 9; k++) {
        next(&x);
        assert_int_equal(x.b.m, 7);
        assert_false(x.b.has_cand);
        for (int64_t i = 0; i < x.b.m; i++) {
            const int64_t doc = x.b.doc[i], s = x.b.start[i], n = (s - 128) / 4;
            double total = 0;
            assert_true(s % 64 == 0 && s >= 192 && s + 64 <= TOKENS[doc]);
            assert_int_equal(x.b.position[i], s - 1);
            assert_int_equal(x.b.n_cand[i], n);
            for (int l = 0; l < LAYERS; l++) {
                const float *h = x.b.x[l] + i * HIDDEN;
                assert_true(h[0] == (float)doc && h[1] == (float)l && h[2] == (float)(s / 64 - 1));
                const uint8_t *key = x.b.key[l] + x.b.key_base[i] * LSA_KEY_BYTES;
                assert_true(key[0] == 8 * doc + l + 1 && key[LSA_KEY_BYTES + 1] == 1 &&
                            x.b.key_base[i] + n <= x.b.n_key);
            }
            for (int64_t c = 0; c < n; c++) total += window_mass(doc, s, s + 64, c);
            for (int64_t c = 0; c < x.b.n; c++) {
                const double want = c < n ? window_mass(doc, s, s + 64, c) / total : 0;
                if (!(fabs((double)x.b.y[i * x.b.n + c] - want) <= 1e-6))
                    fail_msg("window %lld of document %lld, chunk %lld", (long long)s, (long long)doc,
                             (long long)c);
            }
        }
        assert_int_equal(x.b.n_row, 7);
    }
    close_bench(&x);
}

/* With votes over all candidates: labels, weights, counts; resident chunks come in when asked for. */
static void test_lookahead_votes(void **state) {
    (void)state;
    const char *set[] = {LOOK[0],
                         LOOK[1],
                         LOOK[2],
                         "loss.kind=bce",
                         "loss.weighted=true",
                         "loss.trivial=true",
                         "sample.min_layers=1",
                         "sample.exclude_resident=false"};
    for (int resident = 0; resident < 2; resident++) {
        bench x;
        open_bench(&x, 64, set, resident ? 8 : 7);
        for (int k = 0; k < 4; k++) {
            next(&x);
            int64_t elems = 0;
            for (int64_t i = 0; i < x.b.m; i++) {
                const int64_t doc = x.b.doc[i], s = x.b.start[i], n = resident ? s / 4 : (s - 128) / 4;
                assert_int_equal(x.b.n_cand[i], n);
                elems += n;
                for (int64_t c = 0; c < n; c++) {
                    const uint8_t v = window_votes(doc, s, s + 64, c, 1);
                    const float w = !v                   ? 1.0f
                                    : trivial(doc, c, 1) ? 0.5f
                                                         : 0.5f + 1.5f * ((float)v - 3.0f) / 18.0f;
                    assert_true(x.b.y[i * x.b.n + c] == (v ? 1.0f : 0.0f));
                    assert_true(x.b.weight[i * x.b.n + c] == w);
                }
            }
            assert_int_equal(x.b.n_elem, elems);
        }
        close_bench(&x);
    }
}

/* ---- sampling
 * -------------------------------------------------------------------------------------------------- */

static void check_sampled(const bench *x, int64_t tau, bool reference) {
    int64_t pairs = 0;
    for (int64_t i = 0; i < x->b.m; i++) {
        const int64_t doc = x->b.doc[i], s = x->b.start[i],
                      end = s + tau < TOKENS[doc] ? s + tau : TOKENS[doc];
        const int64_t n = reference ? TOKENS[doc] / 4 : (s - 128) / 4;
        int64_t gold = 0, pos = 0, neg = 0;
        uint8_t seen[LONGEST / 4] = {0};
        for (int64_t c = 0; c < n; c++) gold += window_votes(doc, s, end, c, 2) > 0;
        for (int64_t j = 0; j < x->b.n_cand[i]; j++) {
            const int64_t c = x->b.cand[i * x->b.n + j];
            const uint8_t v = window_votes(doc, s, end, c, 2);
            const float y = x->b.y[i * x->b.n + j], w = x->b.weight[i * x->b.n + j];
            assert_true(c >= 0 && c < n && !seen[c]++);
            assert_true(y == (v ? 1.0f : 0.0f)); /* a golden chunk that was not sampled is never a negative */
            assert_true(w == (y > 0 && reference && trivial(doc, c, 2) ? 0.5f : 1.0f));
            if (y > 0)
                pos++;
            else
                neg++;
        }
        const int64_t want = gold < x->r.max_pos ? gold : x->r.max_pos, room = n - gold, ask = want * 2;
        assert_int_equal(pos, want);
        assert_int_equal(neg, ask < room ? ask : room);
        pairs += pos * neg;
        assert_int_equal(x->b.position[i], reference ? s : s - 1);
    }
    assert_int_equal(x->b.n_pair, pairs);
}

static void test_lookahead_sampled(void **state) {
    (void)state;
    const char *set[] = {LOOK[0],
                         LOOK[1],
                         LOOK[2],
                         "loss.kind=focal",
                         "sample.candidates=sampled",
                         "sample.max_pos=4",
                         "sample.neg_ratio=2"};
    bench x;
    open_bench(&x, 64, set, 7);
    for (int k = 0; k < 12; k++) {
        next(&x);
        check_sampled(&x, 64, false);
    }
    close_bench(&x);
}

/* Every token with a golden chunk in [t, t+64), cut at the end, future chunks included. */
static void test_reference(void **state) {
    (void)state;
    bench x;
    int64_t windows = 0, future = 0, cut = 0, halves = 0;
    open_bench(&x, 1, REFERENCE, N_REF);
    for (int64_t doc = 0; doc < DOCS; doc++)
        for (int64_t t = 0; t < TOKENS[doc]; t++) {
            bool any = false;
            for (int64_t c = 0; c < TOKENS[doc] / 4; c++)
                any = any || window_votes(doc, t, t + 64 < TOKENS[doc] ? t + 64 : TOKENS[doc], c, 2);
            windows += any;
        }
    assert_int_equal(lsa_order_epoch_windows(x.o), windows);
    for (int k = 0; k < 60; k++) {
        next(&x);
        check_sampled(&x, 64, true);
        for (int64_t i = 0; i < x.b.m; i++) {
            cut += x.b.start[i] + 64 > TOKENS[x.b.doc[i]];
            for (int64_t j = 0; j < x.b.n_cand[i]; j++) {
                future += x.b.cand[i * x.b.n + j] >= (x.b.start[i] + 1) / 4 && x.b.y[i * x.b.n + j] > 0;
                halves += x.b.weight[i * x.b.n + j] == 0.5f;
            }
        }
    }
    assert_true(future > 0 && cut > 0 && halves > 0); /* the data do exercise the rules */
    close_bench(&x);
}

/* ---- order
 * ------------------------------------------------------------------------------------------------------- */

/* An epoch asks every window once; epochs differ; document order keeps documents together. */
static void test_epochs(void **state) {
    (void)state;
    for (int shuffled = 0; shuffled < 2; shuffled++) {
        const char *set[] = {LOOK[0], LOOK[1], LOOK[2],
                             shuffled ? "sample.order=shuffled" : "sample.order=document"};
        bench x;
        open_bench(&x, 64, set, 4);
        const int64_t n = lsa_order_epoch_windows(x.o);
        int64_t first[64] = {0}, changes = 0, differ = 0;
        for (int64_t e = 0; e < 3; e++) {
            uint8_t seen[DOCS][16] = {{0}};
            int64_t before = -1;
            for (int64_t i = 0; i < n; i++) {
                int64_t doc, w;
                assert_int_equal(lsa_order_next(&doc, &w, x.o, &x.c, NULL), LSA_OK);
                assert_int_equal(x.c.epoch, e);
                assert_true(doc >= 0 && doc < DOCS && w >= 0 && w < 16 && !seen[doc][w]++);
                changes += e == 0 && i && doc != before;
                before = doc;
                if (e == 0)
                    first[i] = 100 * doc + w;
                else
                    differ += first[i] != 100 * doc + w;
            }
        }
        if (shuffled)
            assert_true(changes > 4);
        else
            assert_int_equal(changes, 3); /* four documents have windows */
        assert_true(differ > 0);
        close_bench(&x);
    }
}

/* What a window draws does not depend on how the run got there: batch size, resuming at a cursor, or the
 * cache. */
static void test_pure(void **state) {
    (void)state;
    const char *a[N_REF + 1], *b[N_REF + 1];
    memcpy(a, REFERENCE, sizeof REFERENCE);
    memcpy(b, REFERENCE, sizeof REFERENCE);
    a[N_REF] = "train.batch=24";
    b[N_REF] = "train.batch=5";
    bench x, y;
    open_bench(&x, 1, a, N_REF + 1);
    open_bench(&y, 1, b, N_REF + 1);
    next(&x);
    y.c.index = 10; /* as after a resume */
    for (int k = 0; k < 2; k++) {
        next(&y);
        for (int64_t i = 0; i < 5; i++) {
            const int64_t j = 10 + 5 * k + i;
            assert_int_equal(y.b.doc[i], x.b.doc[j]);
            assert_int_equal(y.b.start[i], x.b.start[j]);
            assert_int_equal(y.b.n_cand[i], x.b.n_cand[j]);
            assert_memory_equal(y.b.cand + i * y.b.n, x.b.cand + j * x.b.n,
                                (size_t)y.b.n_cand[i] * sizeof(int32_t));
        }
    }
    close_bench(&x);
    close_bench(&y);
}

static void test_nothing_to_train_on(void **state) {
    (void)state;
    bench x;
    lsa_err err = {0};
    open_bench(&x, 64, LOOK, 3);
    lsa_order *o = NULL;
    x.r.tail = 100000;
    lsa_source *s = NULL;
    char dir[96];
    snprintf(dir, sizeof dir, "%s/s64", g_dir);
    assert_int_equal(lsa_source_open(&s, dir, &x.r, &x.g, true, &err), LSA_OK);
    assert_int_equal(lsa_order_create(&o, s, &x.r, &err), LSA_E_CONFIG);
    assert_non_null(strstr(err.msg, "no window"));
    lsa_source_close(s);
    err = (lsa_err){0};
    x.c = (lsa_cursor){0, 22};
    assert_int_equal(lsa_batch_next(&x.b, x.s, x.o, &x.r, &x.g, &x.c, &err),
                     LSA_E_FORMAT); /* a cursor that does not fit */
    close_bench(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lookahead_kl),
        cmocka_unit_test(test_lookahead_votes),
        cmocka_unit_test(test_lookahead_sampled),
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_epochs),
        cmocka_unit_test(test_pure),
        cmocka_unit_test(test_nothing_to_train_on),
    };
    char dir[96];
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-sample-XXXXXX");
    if (!mkdtemp(g_dir)) return 1;
    snprintf(dir, sizeof dir, "%s/s64", g_dir);
    make_shards(dir, 64);
    snprintf(dir, sizeof dir, "%s/s1", g_dir);
    make_shards(dir, 1);
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
