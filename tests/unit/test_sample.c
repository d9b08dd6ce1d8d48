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

#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"
#include "tests/testkit/hand_shards.h"
#include "trainer/batch.h"

static char g_dir[64];

/* ---- what a test works with ---- */

typedef struct bench {
    lsa_recipe r;
    lsa_indexer_geom g;
    lsa_source *s;
    lsa_order *o;
    lsa_batch b;
    lsa_cursor c;
    int rank, size; /* size 0: one rank */
} bench;

static void open_bench(bench *x, int stride, const char *const *set, int n_set) {
    char dir[96];
    lsa_err err = {0};
    *x = (bench){.rank = x->rank, .size = x->size};
    snprintf(dir, sizeof dir, "%s/s%d", g_dir, stride);
    if (lsa_recipe_load(&x->r, lsa_recipe_keys, lsa_recipe_n_key, NULL, set, n_set, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    x->g = (lsa_indexer_geom){
        .hidden = HAND_HIDDEN, .n_head = 2, .head_dim = 128, .rank = 4, .eps = 1e-6f, .n_layer = HAND_LAYERS};
    for (int32_t l = 0; l < HAND_LAYERS; l++) x->g.ord[l].v = l, x->g.id[l].v = 2 * l + 1;
    if (lsa_source_open(&x->s, dir, &x->r, &x->g, true, &err) != LSA_OK) fail_msg("%s", err.msg);
    if (lsa_order_create(&x->o, x->s, &x->r, x->rank, x->size ? x->size : 1, &err) != LSA_OK)
        fail_msg("%s", err.msg);
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

static const char *const LOOK[] = {"window.tail=128", "sample.val_documents=0", "train.batch=7",
                                   "data.virtual_shards=1"};
enum { N_LOOK = sizeof LOOK / sizeof *LOOK };
static const char *const REFERENCE[] = {
    "train.mode=reference",  "window.stride=1",     "sample.candidates=sampled",
    "sample.order=shuffled", "sample.causal=false", "sample.exclude_resident=false",
    "loss.kind=focal",       "loss.on=layer",       "sample.val_documents=0",
    "train.batch=9",         "sample.max_pos=12",   "sample.neg_ratio=2",
    "data.virtual_shards=1"};
enum { N_REF = sizeof REFERENCE / sizeof *REFERENCE };

/* ---- lookahead ---- */

/* The query of window [s, s+64) is token s-1; candidates end where the tail begins; the target is the
 * normalised mass. */
static void test_lookahead_kl(void **state) {
    (void)state;
    bench x = {0};
    open_bench(&x, 64, LOOK, N_LOOK);
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
            assert_true(s % 64 == 0 && s >= 192 && s + 64 <= hand_tokens[doc]);
            assert_int_equal(x.b.position[i], s - 1);
            assert_int_equal(x.b.n_cand[i], n);
            for (int l = 0; l < HAND_LAYERS; l++) {
                const float *h = x.b.x[l] + i * HAND_HIDDEN;
                assert_true(h[0] == (float)doc && h[1] == (float)l && h[2] == (float)(s / 64 - 1));
                const uint8_t *key = x.b.key[l] + x.b.key_base[i] * LSA_KEY_BYTES;
                assert_true(key[0] == 8 * doc + l + 1 && key[LSA_KEY_BYTES + 1] == 1 &&
                            x.b.key_base[i] + n <= x.b.n_key);
            }
            for (int64_t c = 0; c < n; c++) total += hand_mass(doc, s, s + 64, c);
            for (int64_t c = 0; c < x.b.n; c++) {
                const double want = c < n ? hand_mass(doc, s, s + 64, c) / total : 0;
                if (!(fabs((double)x.b.y[i * x.b.n + c] - want) <= 1e-6))
                    fail_msg("window %lld of document %lld, chunk %lld", (long long)s, (long long)doc,
                             (long long)c);
            }
        }
        assert_true(x.b.count.row_weights == 7);
    }
    close_bench(&x);
}

/* loss.by_mass: a window's weight is the mass that its target was divided by. */
static void test_by_mass(void **state) {
    (void)state;
    bench x = {0};
    const char *set[] = {LOOK[0], LOOK[1], LOOK[2], LOOK[3], "loss.by_mass=true"};
    open_bench(&x, 64, set, 5);
    double sum = 0;
    next(&x);
    for (int64_t i = 0; i < x.b.m; i++) {
        double total = 0;
        for (int64_t c = 0; c < x.b.n_cand[i]; c++)
            total += hand_mass(x.b.doc[i], x.b.start[i], x.b.start[i] + 64, c);
        assert_true(total > 0 && fabs((double)x.b.row_weight[i] - total) <= 1e-5 * total);
        sum += (double)x.b.row_weight[i];
    }
    assert_true(fabs(x.b.count.row_weights - sum) <= 1e-9 * sum);
    close_bench(&x);
}

/* loss.sharpen: the target is made of powers of the tokens' masses; evaluation goes on counting mass. */
static void test_sharpen(void **state) {
    (void)state;
    bench x = {0};
    const char *set[] = {LOOK[0], LOOK[1], LOOK[2], LOOK[3], "loss.sharpen=2"};
    const lsa_train_doc *d;
    lsa_window w;
    lsa_err err = {0};
    float native[256];
    open_bench(&x, 64, set, 5);
    next(&x);
    for (int64_t i = 0; i < x.b.m; i++) {
        const int64_t doc = x.b.doc[i], s = x.b.start[i], n = x.b.n_cand[i];
        double total = 0;
        for (int64_t c = 0; c < n; c++) total += hand_power(doc, s, s + 64, c, 2);
        for (int64_t c = 0; c < n; c++) {
            const double want = hand_power(doc, s, s + 64, c, 2) / total;
            if (!(fabs((double)x.b.y[i * x.b.n + c] - want) <= 1e-6)) fail_msg("chunk %lld", (long long)c);
        }
    }
    if (lsa_source_get(&d, x.s, 0, &err) != LSA_OK || lsa_window_at(&w, x.s, d, 0, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    lsa_window_native(native, 1, d, &w);
    for (int64_t c = 0; c < w.n_cand; c++)
        assert_true(fabs((double)native[c] - hand_mass(d->doc, w.start, w.end, c)) <= 1e-5);
    close_bench(&x);
}

/* With votes over all candidates: labels, weights, counts; resident chunks come in when asked for. */
static void test_lookahead_votes(void **state) {
    (void)state;
    const char *set[] = {LOOK[0],
                         LOOK[1],
                         LOOK[2],
                         LOOK[3],
                         "loss.kind=bce",
                         "loss.weighted=true",
                         "loss.trivial=true",
                         "sample.min_layers=1",
                         "sample.exclude_resident=false"};
    for (int resident = 0; resident < 2; resident++) {
        bench x = {0};
        open_bench(&x, 64, set, resident ? 9 : 8);
        for (int k = 0; k < 4; k++) {
            next(&x);
            int64_t elems = 0;
            for (int64_t i = 0; i < x.b.m; i++) {
                const int64_t doc = x.b.doc[i], s = x.b.start[i], n = resident ? s / 4 : (s - 128) / 4;
                assert_int_equal(x.b.n_cand[i], n);
                elems += n;
                for (int64_t c = 0; c < n; c++) {
                    const uint8_t v = hand_votes(doc, s, s + 64, c, 1);
                    const float w = !v                        ? 1.0f
                                    : hand_trivial(doc, c, 1) ? 0.5f
                                                              : 0.5f + 1.5f * ((float)v - 3.0f) / 18.0f;
                    assert_true(x.b.y[i * x.b.n + c] == (v ? 1.0f : 0.0f));
                    assert_true(x.b.weight[i * x.b.n + c] == w);
                }
            }
            assert_int_equal(x.b.count.n_elem, elems);
        }
        close_bench(&x);
    }
}

/* ---- sampling ---- */

static void check_sampled(const bench *x, int64_t tau, bool reference) {
    int64_t pairs = 0;
    for (int64_t i = 0; i < x->b.m; i++) {
        const int64_t doc = x->b.doc[i], s = x->b.start[i],
                      end = s + tau < hand_tokens[doc] ? s + tau : hand_tokens[doc];
        const int64_t n = reference ? hand_tokens[doc] / 4 : (s - 128) / 4;
        int64_t gold = 0, pos = 0, neg = 0;
        uint8_t seen[HAND_LONGEST / 4] = {0};
        for (int64_t c = 0; c < n; c++) gold += hand_votes(doc, s, end, c, 2) > 0;
        for (int64_t j = 0; j < x->b.n_cand[i]; j++) {
            const int64_t c = x->b.cand[i * x->b.n + j];
            const uint8_t v = hand_votes(doc, s, end, c, 2);
            const float y = x->b.y[i * x->b.n + j], w = x->b.weight[i * x->b.n + j];
            assert_true(c >= 0 && c < n && !seen[c]++);
            assert_true(y == (v ? 1.0f : 0.0f)); /* a golden chunk that was not sampled is never a negative */
            assert_true(w == (y > 0 && reference && hand_trivial(doc, c, 2) ? 0.5f : 1.0f));
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
    assert_int_equal(x->b.count.n_pair, pairs);
}

static void test_lookahead_sampled(void **state) {
    (void)state;
    const char *set[] = {LOOK[0],
                         LOOK[1],
                         LOOK[2],
                         LOOK[3],
                         "loss.kind=focal",
                         "sample.candidates=sampled",
                         "sample.max_pos=4",
                         "sample.neg_ratio=2"};
    bench x = {0};
    open_bench(&x, 64, set, 8);
    for (int k = 0; k < 12; k++) {
        next(&x);
        check_sampled(&x, 64, false);
    }
    close_bench(&x);
}

/* Every token with a golden chunk in [t, t+64), cut at the end, future chunks included. */
static void test_reference(void **state) {
    (void)state;
    bench x = {0};
    int64_t windows = 0, future = 0, cut = 0, halves = 0;
    open_bench(&x, 1, REFERENCE, N_REF);
    for (int64_t doc = 0; doc < HAND_DOCS; doc++)
        for (int64_t t = 0; t < hand_tokens[doc]; t++) {
            bool any = false;
            for (int64_t c = 0; c < hand_tokens[doc] / 4; c++)
                any = any || hand_votes(doc, t, t + 64 < hand_tokens[doc] ? t + 64 : hand_tokens[doc], c, 2);
            windows += any;
        }
    assert_int_equal(lsa_order_epoch_windows(x.o), windows);
    for (int k = 0; k < 60; k++) {
        next(&x);
        check_sampled(&x, 64, true);
        for (int64_t i = 0; i < x.b.m; i++) {
            cut += x.b.start[i] + 64 > hand_tokens[x.b.doc[i]];
            for (int64_t j = 0; j < x.b.n_cand[i]; j++) {
                future += x.b.cand[i * x.b.n + j] >= (x.b.start[i] + 1) / 4 && x.b.y[i * x.b.n + j] > 0;
                halves += x.b.weight[i * x.b.n + j] == 0.5f;
            }
        }
    }
    assert_true(future > 0 && cut > 0 && halves > 0); /* the data do exercise the rules */
    close_bench(&x);
}

/* ---- order ---- */

/* An epoch asks every window once; epochs differ; document order keeps documents together. */
static void test_epochs(void **state) {
    (void)state;
    for (int shuffled = 0; shuffled < 2; shuffled++) {
        const char *set[] = {LOOK[0], LOOK[1], LOOK[2], LOOK[3],
                             shuffled ? "sample.order=shuffled" : "sample.order=document"};
        bench x = {0};
        open_bench(&x, 64, set, 5);
        const int64_t n = lsa_order_epoch_windows(x.o);
        int64_t first[64] = {0}, changes = 0, differ = 0;
        for (int64_t e = 0; e < 3; e++) {
            uint8_t seen[HAND_DOCS][16] = {{0}};
            int64_t before = -1;
            for (int64_t i = 0; i < n; i++) {
                lsa_place p;
                assert_int_equal(lsa_order_at(&p, x.o, 0, e * n + i, NULL), LSA_OK);
                assert_int_equal(p.epoch, e);
                const int64_t doc = p.doc, w = p.window;
                assert_true(doc >= 0 && doc < HAND_DOCS && w >= 0 && w < 16 && !seen[doc][w]++);
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

/* Without room for two documents, shuffled windows stay inside their group; groups part the documents and
 * have at least the windows of a step; every window is still asked once an epoch, from any cursor. */
static void check_groups(const char *batch, int64_t rows) {
    const char *set[] = {LOOK[0], LOOK[1], LOOK[3], batch, "sample.order=shuffled"};
    bench x = {0};
    lsa_err err = {0};
    open_bench(&x, 64, set, 5);
    assert_true(lsa_order_whole(x.o, 0)); /* everything fits the default pool */
    assert_int_equal(lsa_order_groups(x.o, 0, 0), 1);
    lsa_order_destroy(x.o);
    x.r.pool_mib = 0;
    assert_int_equal(lsa_order_create(&x.o, x.s, &x.r, 0, 1, &err), LSA_OK);
    const int64_t n = lsa_order_epoch_windows(x.o);
    int64_t at[64] = {0};
    assert_true(lsa_order_whole(x.o, 0) == (n < 2 * rows));
    for (int64_t e = 0; e < 8; e++) {
        const int64_t n_group = lsa_order_groups(x.o, 0, e);
        int64_t group_of[HAND_DOCS] = {-1, -1, -1, -1, -1}, windows[HAND_DOCS] = {0};
        assert_true(n_group >= 1 && n_group <= HAND_DOCS && (n_group == 1 || !lsa_order_whole(x.o, 0)));
        if (rows == 1) assert_int_equal(n_group, 4); /* four documents have windows */
        for (int64_t g = 0; g < n_group; g++) {
            const int64_t *doc, n_doc = lsa_order_group_docs(x.o, 0, e, g, &doc);
            for (int64_t i = 0; i < n_doc; i++) {
                assert_int_equal(group_of[doc[i]], -1);
                group_of[doc[i]] = g;
            }
        }
        uint8_t seen[HAND_DOCS][16] = {{0}};
        int64_t last = -1;
        for (int64_t i = 0; i < n; i++) {
            lsa_place p;
            assert_int_equal(lsa_order_at(&p, x.o, 0, e * n + i, NULL), LSA_OK);
            const int64_t doc = p.doc, w = p.window, g = p.group;
            assert_true(g >= last);
            last = g;
            assert_int_equal(group_of[doc], g);
            assert_false(seen[doc][w]++);
            windows[g]++;
            if (e == 0) at[i] = 100 * doc + w;
        }
        for (int64_t g = 0; g < n_group; g++) assert_true(windows[g] >= lsa_min_i64(rows, n));
    }
    for (int64_t i = n - 1; i >= 0; i -= 3) { /* any cursor, backwards */
        lsa_place p;
        assert_int_equal(lsa_order_at(&p, x.o, 0, i, NULL), LSA_OK);
        assert_int_equal(100 * p.doc + p.window, at[i]);
    }
    close_bench(&x);
}
static void test_groups(void **state) {
    (void)state;
    check_groups("train.batch=1", 1);
    check_groups("train.batch=5", 5);
    check_groups("train.batch=7", 7);
    check_groups("train.batch=11", 11); /* of 21 windows */
}

/* ---- virtual shards ---- */

/* Documents are parted, balanced; every shard asks its windows once an epoch of its own; more shards than
 * documents with windows (4 of 5) fall back to a divisor. */
static void test_virtual_shards(void **state) {
    (void)state;
    static const struct {
        const char *v;
        int64_t want;
    } c[] = {{"data.virtual_shards=1", 1}, {"data.virtual_shards=2", 2}, {"data.virtual_shards=4", 4},
             {"data.virtual_shards=8", 4}, {"data.virtual_shards=6", 3}, {"data.virtual_shards=7", 1}};
    for (size_t k = 0; k < 2 * sizeof c / sizeof *c; k++) {
        const char *set[] = {LOOK[0], LOOK[1], "train.batch=168", c[k / 2].v,
                             k % 2 ? "sample.order=shuffled" : "sample.order=document"};
        bench x = {0};
        open_bench(&x, 64, set, 5);
        const int64_t n_shard = lsa_order_shards(x.o);
        assert_int_equal(n_shard, c[k / 2].want);
        assert_int_equal(lsa_order_rows(x.o), 168 / n_shard);
        int owner[HAND_DOCS] = {0};
        int64_t all = 0, least = INT64_MAX, most = 0;
        for (int64_t v = 0; v < n_shard; v++) {
            int64_t n = 0;
            for (int64_t e = 0; e < 2; e++) {
                uint8_t seen[HAND_DOCS][16] = {{0}};
                lsa_place p = {0};
                int64_t i = 0;
                for (;; i++) {
                    assert_int_equal(lsa_order_at(&p, x.o, v, e * n + i, NULL), LSA_OK);
                    if (p.epoch != e) break;
                    assert_false(seen[p.doc][p.window]++);
                    assert_true(owner[p.doc] == 0 || owner[p.doc] == 1 + v);
                    owner[p.doc] = 1 + (int)v;
                }
                assert_true(e == 0 || i == n);
                n = i;
            }
            all += n;
            least = n < least ? n : least;
            most = n > most ? n : most;
        }
        assert_int_equal(all, lsa_order_epoch_windows(x.o));
        assert_true(most - least <= 7); /* a document */
        close_bench(&x);
    }
}

/* The ranks' batches one after the other are the batch of one rank. */
static void test_ranks(void **state) {
    (void)state;
    const char *set[] = {LOOK[0], LOOK[1], "train.batch=12", "data.virtual_shards=4",
                         "sample.order=shuffled"};
    bench one = {0};
    open_bench(&one, 64, set, 5);
    for (int size = 2; size <= 4; size += 2) {
        bench part[4];
        memset(part, 0, sizeof part);
        for (int rank = 0; rank < size; rank++) {
            part[rank].rank = rank, part[rank].size = size;
            open_bench(&part[rank], 64, set, 5);
        }
        one.c.asked = 0;
        for (int step = 0; step < 5; step++) {
            lsa_batch_counts sum = {0};
            next(&one);
            for (int rank = 0; rank < size; rank++) {
                bench *const y = &part[rank];
                next(y);
                assert_int_equal(y->c.asked, one.c.asked);
                assert_int_equal(y->b.m, 12 / size);
                for (int64_t i = 0; i < y->b.m; i++) {
                    assert_int_equal(y->b.doc[i], one.b.doc[rank * y->b.m + i]);
                    assert_int_equal(y->b.start[i], one.b.start[rank * y->b.m + i]);
                }
                for (int64_t v = 0; v < y->b.n_shard; v++) lsa_batch_counts_add(&sum, &y->b.shard[v]);
            }
            assert_memory_equal(&sum, &one.b.count, sizeof sum);
        }
        for (int rank = 0; rank < size; rank++) close_bench(&part[rank]);
    }
    lsa_order *o = NULL;
    lsa_err err = {0};
    assert_int_equal(lsa_order_create(&o, one.s, &one.r, 0, 3, &err), LSA_E_CONFIG);
    assert_non_null(strstr(err.msg, "start 1, 2, 4 ranks"));
    close_bench(&one);
    one.r.batch = 13;
    err = (lsa_err){0};
    assert_int_equal(lsa_recipe_check(&one.r, &err), LSA_E_CONFIG);
    assert_non_null(strstr(err.msg, "12 or 16"));
}

/* The drawn negatives are those whose words are smallest: philox(mix(mix(seed, 202), epoch), chunk / 4,
 * mix(document, query)). The rule is part of the format of a run: the GPU draws by it too. */
static void test_draw_rule(void **state) {
    (void)state;
    const char *set[] = {LOOK[0],
                         LOOK[1],
                         LOOK[2],
                         LOOK[3],
                         "loss.kind=focal",
                         "sample.candidates=sampled",
                         "sample.max_pos=4",
                         "sample.neg_ratio=2"};
    bench x = {0};
    open_bench(&x, 64, set, 8);
    next(&x);
    for (int64_t i = 0; i < x.b.m; i++) {
        const int32_t *cand = x.b.cand + i * x.b.n;
        const uint64_t key = lsa_mix64(lsa_mix64((uint64_t)x.r.seed, 202), 0),
                       hi = lsa_mix64((uint64_t)x.b.doc[i], (uint64_t)x.b.position[i]);
        uint32_t largest = 0;
        int64_t n_pos = 0, below = 0;
        while (n_pos < x.b.n_cand[i] && x.b.y[i * x.b.n + n_pos] > 0) n_pos++;
        for (int64_t j = n_pos; j < x.b.n_cand[i]; j++) {
            const uint32_t w = lsa_philox(key, (uint64_t)cand[j] >> 2, hi).v[cand[j] & 3];
            if (w > largest) largest = w;
            assert_true(j == n_pos || cand[j] > cand[j - 1]);
        }
        /* every chunk with a smaller word is drawn or golden: count those that are neither */
        for (int32_t c = 0; c < (x.b.start[i] - 128) / 4; c++) {
            bool drawn = false;
            for (int64_t j = 0; j < x.b.n_cand[i]; j++) drawn = drawn || cand[j] == c;
            below += !drawn && lsa_philox(key, (uint64_t)c >> 2, hi).v[c & 3] < largest;
        }
        lsa_window w;
        const lsa_train_doc *d;
        uint8_t votes[1024];
        assert_int_equal(lsa_source_get(&d, x.s, x.b.doc[i], NULL), LSA_OK);
        assert_int_equal(lsa_window_at(&w, x.s, d, (x.b.start[i] - 192) / 64, NULL), LSA_OK);
        assert_int_equal(w.start, x.b.start[i]);
        lsa_window_needs(NULL, votes, x.s, d, &w);
        for (int32_t c = 0; c < w.n_cand;
             c++) { /* golden ones beyond max_pos are neither drawn nor negatives */
            bool drawn = false;
            for (int64_t j = 0; j < x.b.n_cand[i]; j++) drawn = drawn || cand[j] == c;
            below -= votes[c] && !drawn && lsa_philox(key, (uint64_t)c >> 2, hi).v[c & 3] < largest;
        }
        assert_int_equal(below, 0);
    }
    close_bench(&x);
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
    bench x = {0}, y = {0};
    open_bench(&x, 1, a, N_REF + 1);
    open_bench(&y, 1, b, N_REF + 1);
    next(&x);
    y.c.asked = 10; /* as after a resume */
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
    bench x = {0};
    lsa_err err = {0};
    open_bench(&x, 64, LOOK, N_LOOK);
    lsa_order *o = NULL;
    x.r.tail = 100000;
    lsa_source *s = NULL;
    char dir[96];
    snprintf(dir, sizeof dir, "%s/s64", g_dir);
    assert_int_equal(lsa_source_open(&s, dir, &x.r, &x.g, true, &err), LSA_OK);
    assert_int_equal(lsa_order_create(&o, s, &x.r, 0, 1, &err), LSA_E_CONFIG);
    assert_non_null(strstr(err.msg, "no window"));
    lsa_source_close(s);
    err = (lsa_err){0};
    x.c = (lsa_cursor){-1};
    assert_int_equal(lsa_batch_next(&x.b, x.s, x.o, &x.r, &x.g, &x.c, &err),
                     LSA_E_FORMAT); /* a cursor that does not fit */
    close_bench(&x);
}

/* Every window of documents whose rows begin late, as in what engines record of an answer: which there are,
 * whose hidden vector asks, what they need. */
static void check_windows(bench *x, int64_t stride, bool reference) {
    for (int64_t doc = 0; doc < HAND_DOCS; doc++) {
        const int64_t T = hand_tokens[doc], first = hand_first[doc];
        const lsa_train_doc *d;
        int64_t n, at = 0;
        lsa_window w;
        assert_int_equal(lsa_source_n_window(&n, x->s, doc, NULL), LSA_OK);
        assert_int_equal(lsa_source_get(&d, x->s, doc, NULL), LSA_OK);
        for (int64_t s = first + !reference; s < T; s++) {
            const int64_t end = s + 64 < T ? s + 64 : T, query = reference ? s : s - 1;
            bool any = false;
            for (int64_t c = 0; c < T / 4; c++) any = any || hand_votes(doc, s, end, c, x->r.min_layers);
            if (reference ? !any : s % 64 || s < 192 || s + 64 > T) continue;
            assert_true(at < n);
            assert_int_equal(lsa_window_at(&w, x->s, d, at++, NULL), LSA_OK);
            assert_int_equal(w.start, s);
            assert_int_equal(w.end, end);
            assert_int_equal(w.query, query);
            assert_int_equal(w.n_cand, reference ? T / 4 : (s - 128) / 4);
            const float which = lsa_bf16_to_f32(d->hidden[1][w.hidden_row * HAND_HIDDEN + 2]);
            assert_true(which == lsa_round_bf16((float)((query + 1) / stride - 1)));
            uint8_t votes[HAND_LONGEST / 4];
            float mass[HAND_LONGEST / 4];
            lsa_window_needs(mass, votes, x->s, d, &w);
            for (int64_t c = 0; c < w.n_cand; c++) {
                assert_int_equal(votes[c], hand_votes(doc, s, end, c, x->r.min_layers));
                assert_true(fabs((double)mass[c] - hand_mass(doc, s, end, c)) <= 1e-4);
            }
        }
        assert_int_equal(at, n);
    }
}

static void test_late_rows(void **state) {
    (void)state;
    const int64_t first[HAND_DOCS] = {101, 0, 2, 255, 192};
    char dir[96];
    bench x = {0};
    memcpy(hand_first, first, sizeof first);
    snprintf(dir, sizeof dir, "%s/s64", g_dir);
    hand_shards(dir, 64);
    open_bench(&x, 64, LOOK, N_LOOK);
    assert_int_equal(lsa_order_epoch_windows(x.o), 7 + 7 + 1 + 4);
    check_windows(&x, 64, false);
    for (int k = 0; k < 5; k++) next(&x);
    close_bench(&x);
    snprintf(dir, sizeof dir, "%s/s1", g_dir);
    hand_shards(dir, 1);
    open_bench(&x, 1, REFERENCE, N_REF);
    check_windows(&x, 1, true);
    for (int k = 0; k < 5; k++) next(&x);
    close_bench(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lookahead_kl),
        cmocka_unit_test(test_by_mass),
        cmocka_unit_test(test_sharpen),
        cmocka_unit_test(test_lookahead_votes),
        cmocka_unit_test(test_lookahead_sampled),
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_epochs),
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_virtual_shards),
        cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_draw_rule),
        cmocka_unit_test(test_pure),
        cmocka_unit_test(test_nothing_to_train_on),
        cmocka_unit_test(test_late_rows), /* last: it makes the shards anew */
    };
    char dir[96];
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-sample-XXXXXX");
    if (!mkdtemp(g_dir)) return 1;
    snprintf(dir, sizeof dir, "%s/s64", g_dir);
    hand_shards(dir, 64);
    snprintf(dir, sizeof dir, "%s/s1", g_dir);
    hand_shards(dir, 1);
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
