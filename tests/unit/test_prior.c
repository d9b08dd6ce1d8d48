/* The observed-mass prior inside a training step: features are the masses of the windows before, counted
 * again here from the hand-made truth; nothing of the window being predicted is in them (planted masses, and
 * the same check with the wrong window, which must see them); the gradient of the weights is the slope of the
 * loss; and weights of 0 change nothing else. */
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
#include "kernels/core/mem.h"
#include "kernels/core/rng.h"
#include "kernels/prior.h"
#include "tests/testkit/train_rig.h"
#include "trainer/observer.h"

enum { TAU = 64, PLANT_DOC = 1, PLANT = 384 }; /* the window that is planted */
static int g_stride = TAU;                     /* of the rigs */
static char g_dir[2][64];                      /* without and with planted masses */

/* batch: windows of a step. more: one more setting. */
static void open_rig(rig *x, const char *dir, bool prior, int32_t reach, int batch, bool shards,
                     const char *more) {
    char text[3][48];
    const char *set[] = {"window.tail=64",
                         "eval.budget=0.2",
                         "sample.val_documents=0",
                         "optim.lr=0.02",
                         "optim.weight_decay=0.3",
                         "optim.warmup=0",
                         prior ? "model.prior=true" : "model.prior=false",
                         shards ? "data.virtual_shards=2" : "data.virtual_shards=1",
                         text[0],
                         text[1],
                         text[2],
                         more};
    snprintf(text[0], sizeof text[0], "model.continuation=%d", reach);
    snprintf(text[1], sizeof text[1], "train.batch=%d", batch);
    snprintf(text[2], sizeof text[2], "window.stride=%d", g_stride);
    open_train_rig(x, dir, set, more ? 12 : 11, reach, prior, shards,
                   !prior); /* a prior needs masses itself */
}
static lsa_step_result step(rig *x) {
    return step_rig(x, 0);
}

/* The state of one document, once more. */
typedef struct history {
    double m[HAND_LONGEST / 4], M[HAND_LONGEST / 4];
} history;
/* The window at s ends; kept NULL: every chunk was resident, else those from n on and the kept ones. */
static void slow_window(history *x, int64_t doc, int64_t s, int64_t n, const bool *kept) {
    for (int64_t c = 0; c < HAND_LONGEST / 4; c++) {
        x->M[c] = 0.9 * x->M[c] + x->m[c];
        x->m[c] = !kept || c >= n || kept[c] ? hand_mass(doc, s, s + TAU, c) / (TAU * HAND_LAYERS) : 0;
    }
}
static void check_row(const rig *x, int64_t i, const history *s, int64_t seen[2]) {
    for (int64_t c = 0; c < x->b.n_cand[i]; c++) {
        const double mass[] = {s->m[c], s->M[c]};
        const double got[] = {(double)x->b.recent[i * x->b.n + c], (double)x->b.memory[i * x->b.n + c]};
        for (int f = 0; f < 2; f++) {
            const double want = log1p(mass[f] / 1e-3);
            if (!(fabs(got[f] - want) <= 1e-5 * want) || (want == 0) != (got[f] == 0))
                fail_msg("document %lld, window %lld, chunk %lld, feature %d: %g, expected %g",
                         (long long)x->b.doc[i], (long long)x->b.start[i], (long long)c, f, got[f], want);
            seen[f] += want > 0;
        }
    }
}

/* A window alone in its step begins as after a prompt: all masses of the windows before. */
static void test_after_prompt(void **state) {
    (void)state;
    rig x;
    int64_t seen[2] = {0};
    open_rig(&x, g_dir[0], true, 0, 1, false, NULL);
    for (int k = 0; k < 30; k++) {
        history s = {{0}, {0}};
        next_batch(&x);
        step(&x);
        for (int64_t w = 0; w + TAU <= x.b.start[0]; w += TAU) slow_window(&s, x.b.doc[0], w, 0, NULL);
        check_row(&x, 0, &s, seen);
    }
    assert_true(seen[0] > 1000 && seen[1] > 1000);
    close_rig(&x);
}

/* Windows that follow each other in a step: a chunk that the model would have evicted is not observed. The
 * logits are the trainer's; what is kept is found once more here, ties to the lower chunk. */
static void test_runs(void **state) {
    (void)state;
    rig x;
    int64_t seen[2] = {0}, followed = 0, hidden = 0;
    float *z = NULL;
    open_rig(&x, g_dir[0], true, 0, 8, false, NULL);
    x.p[x.at] = 0.4f, x.p[x.at + 1] = -0.2f;
    open_trainer(&x);
    for (int k = 0; k < 4; k++) {
        history s = {{0}, {0}};
        next_batch(&x);
        const lsa_batch *b = &x.b;
        assert_int_equal(LSA_NEW(z, HAND_LAYERS * b->m * b->n, NULL), LSA_OK);
        assert_int_equal(lsa_trainer_score(x.t, b, z, NULL), LSA_OK);
        step(&x);
        for (int64_t i = 0; i < b->m; i++) {
            const bool follows = i && b->doc[i] == b->doc[i - 1] && b->start[i] == b->start[i - 1] + TAU;
            const int64_t n = b->n_cand[i];
            double score[HAND_LONGEST / 4];
            bool kept[HAND_LONGEST / 4] = {false};
            followed += follows;
            if (!follows) memset(&s, 0, sizeof s);
            for (int64_t w = 0; !follows && w + TAU <= b->start[i]; w += TAU)
                slow_window(&s, b->doc[i], w, 0, NULL);
            check_row(&x, i, &s, seen);
            for (int64_t c = 0; c < n; c++) {
                score[c] = 0.4 * log1p(s.m[c] / 1e-3) - 0.2 * log1p(s.M[c] / 1e-3);
                for (int l = 0; l < HAND_LAYERS; l++) score[c] += (double)z[(l * b->m + i) * b->n + c];
            }
            for (int64_t c = 0; c < n; c++) {
                int64_t before = 0;
                for (int64_t j = 0; j < n; j++)
                    before += score[j] > score[c] || (score[j] == score[c] && j < c);
                kept[c] = before < (int64_t)ceil(0.2 * (double)n - 1e-9);
                hidden += !kept[c];
            }
            slow_window(&s, b->doc[i], b->start[i], n, kept);
        }
        open_trainer(&x); /* the step has moved the weights */
        lsa_free(z);
    }
    assert_true(followed > 10 && hidden > 500 && seen[0] > 500);
    close_rig(&x);
}

/* One step of both rigs from the same start: the same in the features, the loss and every gradient? */
static bool sees_nothing(rig *a, rig *b) {
    open_trainer(a), open_trainer(b);
    const lsa_step_result x = step(a), y = step(b);
    const size_t bytes = (size_t)a->b.n * sizeof(float);
    const bool same = !memcmp(a->b.recent, b->b.recent, bytes) && !memcmp(a->b.memory, b->b.memory, bytes),
               grad = x.loss == y.loss && !memcmp(a->grad, b->grad, (size_t)a->n * sizeof *a->grad);
    assert_int_equal(same, grad); /* features and gradient agree on what was seen */
    return same && grad;
}

/* Loss on votes, so that masses come in through the prior alone. The wrong window, one too late, is what a
 * leak would be: there the same check must see the plant. */
static void test_leak(void **state) {
    (void)state;
    rig x[2];
    int found = 0;
    for (int k = 0; k < 2; k++) open_rig(&x[k], g_dir[k], true, 3, 1, false, "loss.kind=bce");
    for (int i = 0; i < 60; i++) {
        for (int k = 0; k < 2; k++) next_batch(&x[k]);
        assert_true(x[0].b.doc[0] == x[1].b.doc[0] && x[0].b.start[0] == x[1].b.start[0]);
        if (x[0].b.doc[0] != PLANT_DOC) continue;
        const int64_t s = x[0].b.start[0];
        assert_int_equal(sees_nothing(&x[0], &x[1]), s <= PLANT);
        if (s != PLANT) continue;
        for (int k = 0; k < 2; k++) x[k].b.start[0] += TAU;
        assert_false(sees_nothing(&x[0], &x[1]));
        found++;
    }
    assert_true(found > 0);
    for (int k = 0; k < 2; k++) close_rig(&x[k]);
}

/* The same for windows that follow each other in a step: those up to the planted one see nothing of it. */
static void test_leak_runs(void **state) {
    (void)state;
    rig x[2];
    int64_t same = 0, differ = 0;
    for (int k = 0; k < 2; k++) open_rig(&x[k], g_dir[k], true, 3, 8, false, "loss.kind=bce");
    for (int i = 0; i < 8; i++) {
        for (int k = 0; k < 2; k++) {
            next_batch(&x[k]);
            open_trainer(&x[k]);
            step(&x[k]);
        }
        for (int64_t j = 0; j < x[0].b.m; j++) {
            const size_t at = (size_t)(j * x[0].b.n), bytes = (size_t)x[0].b.n_cand[j] * sizeof(float);
            const bool sees = memcmp(x[0].b.recent + at, x[1].b.recent + at, bytes) ||
                              memcmp(x[0].b.memory + at, x[1].b.memory + at, bytes),
                       late = x[0].b.doc[j] == PLANT_DOC && x[0].b.start[j] > PLANT;
            if (!late) assert_false(sees);
            same += !sees;
            differ += sees;
        }
    }
    assert_true(same > 20 && differ > 2);
    for (int k = 0; k < 2; k++) close_rig(&x[k]);
}

/* Slope of the loss along each weight, alone and before a continuation, whole and by virtual shards. Windows
 * do not follow each other: what is kept jumps with the weights, which is no slope. */
static void test_slopes(void **state) {
    (void)state;
    static const char *const loss[] = {"loss.kind=kl", "loss.kind=bce", "loss.kind=focal"};
    double worst = 0;
    for (int k = 0; k < 12; k++) {
        rig x;
        const bool shards = k / 3 % 2;
        g_stride = 128;
        open_rig(&x, g_dir[0], true, k / 6 ? 5 : 0, 8, shards, loss[k % 3]);
        g_stride = TAU;
        for (int64_t i = 0; i < lsa_indexer_costs_at(&x.g); i++) x.p[i] *= 0.5f; /* scores of about 2 */
        for (int32_t j = 0; j < x.g.reach; j++) x.p[lsa_indexer_costs_at(&x.g) + j] = 0.3f + 0.21f * (float)j;
        x.p[x.at] = 0.4f, x.p[x.at + 1] = -0.2f;
        open_trainer(&x);
        next_batch(&x);
        step(&x);
        const float want[] = {x.grad[x.at], x.grad[x.at + 1]};
        for (int w = 0; w < 2; w++) {
            const float at = x.p[x.at + w], h = 1e-2f;
            double value[2];
            for (int side = 0; side < 2; side++) {
                x.p[x.at + w] = side ? at - h : at + h;
                open_trainer(&x);
                value[side] = step(&x).loss;
            }
            x.p[x.at + w] = at;
            const double size = fabs((double)want[0]) + fabs((double)want[1]),
                         off = fabs((value[0] - value[1]) / (2 * (double)h) - (double)want[w]) / size;
            assert_true(size > 1e-4);
            if (!(off <= 2e-3))
                fail_msg("%s, reach %d: w_%d: off by %.3g", loss[k % 3], x.g.reach, w + 1, off);
            worst = fmax(worst, off);
        }
        close_rig(&x);
    }
    printf("largest distance of a slope from the gradient of a weight: %.2g of the gradient\n", worst);
}

/* Weights of 0: the loss and the gradient of everything else are those without a prior, bit by bit; the
 * weights move without decay. Then the parts of a batch add up to the whole. */
static void test_nothing_added(void **state) {
    (void)state;
    for (int shards = 0; shards < 2; shards++) {
        rig a, b;
        float w[LSA_PRIOR_WEIGHTS];
        lsa_err err = {0};
        open_rig(&a, g_dir[0], false, 5, 8, shards, NULL);
        open_rig(&b, g_dir[0], true, 5, 8, shards, NULL);
        assert_int_equal(b.n, a.n + LSA_PRIOR_WEIGHTS);
        assert_true(b.p[b.at] == LSA_PRIOR_START && b.p[b.at + 1] == LSA_PRIOR_START);
        b.p[b.at] = b.p[b.at + 1] = 0;
        open_trainer(&b);
        next_batch(&a), next_batch(&b);
        const double loss = step(&a).loss;
        assert_true(loss > 0.1 && step(&b).loss == loss);
        assert_memory_equal(a.grad, b.grad, (size_t)a.n * sizeof *a.grad);
        assert_true(b.grad[b.at] != 0 && b.grad[b.at + 1] != 0);
        ok(lsa_trainer_prior(b.t, w, &err), &err);
        for (int k = 0; k < LSA_PRIOR_WEIGHTS; k++) /* the first step of AdamW has the length of the rate */
            assert_true(fabs((double)w[k] + (b.grad[b.at + k] > 0 ? 0.02 : -0.02)) < 1e-4);
        close_rig(&a), close_rig(&b);
    }
}
static void test_parts(void **state) {
    (void)state;
    rig whole, parts;
    open_rig(&parts, g_dir[0], true, 5, 8, true, NULL);
    for (int64_t i = 0; i < lsa_indexer_costs_at(&parts.g); i++) parts.p[i] *= 0.5f;
    open_trainer(&parts);
    next_batch(&parts);
    step(&parts);
    whole = parts;
    whole.comm = NULL;
    whole.t = NULL;
    assert_int_equal(LSA_NEW(whole.grad, whole.n, NULL), LSA_OK);
    open_trainer(&whole);
    step(&whole);
    double size = 0;
    for (int64_t i = 0; i < whole.n; i++) size = fmax(size, fabs((double)whole.grad[i]));
    for (int64_t i = 0; i < whole.n; i++)
        assert_true(fabs((double)whole.grad[i] - (double)parts.grad[i]) <= 1e-5 * size);
    close_trainer(&whole);
    lsa_free(whole.grad);
    close_rig(&parts);
}

/* A long document: what the records leave out of the memory is less than the oldest weight says. */
static void test_long(void **state) {
    (void)state;
    enum { W = 150, TOKENS = 4, CHUNKS = 40 };
    lsa_csr csr = {.n_row = W * TOKENS};
    lsa_observed o;
    lsa_rng g = lsa_rng_make(7, 7);
    float recent[CHUNKS] = {0}, memory[CHUNKS] = {0}, f[2][CHUNKS];
    double left = 0, gap = 0;
    assert_int_equal(LSA_NEW(csr.begin, csr.n_row + 1, NULL), LSA_OK);
    assert_int_equal(LSA_NEW(csr.chunk, csr.n_row, NULL), LSA_OK);
    assert_int_equal(LSA_NEW(csr.mass, csr.n_row, NULL), LSA_OK);
    for (int64_t t = 0; t < csr.n_row; t++) { /* an entry a token */
        csr.chunk[t] = (int32_t)lsa_rng_below(&g, CHUNKS);
        csr.mass[t] = lsa_f32_to_f16(lsa_rng_uniform(&g));
        csr.begin[t + 1] = ++csr.n_entry;
    }
    assert_int_equal(lsa_observed_build(&o, &csr, 1, 0, csr.n_row, CHUNKS, TOKENS, NULL), LSA_OK);
    for (int64_t w = 0; w < W; w++) {
        lsa_observed_masses(f[0], f[1], &o, w * TOKENS);
        for (int c = 0; c < CHUNKS; c++) {
            const double d = (double)memory[c] - (double)f[1][c];
            assert_true(d > -1e-5 && d <= 0.0012 / (1 - 0.9));
            left = fmax(left, d);
            gap = fmax(gap, fabs((double)f[0][c] - (double)recent[c]));
        }
        lsa_prior_end_window(recent, memory, CHUNKS);
        for (int64_t t = w * TOKENS; t < (w + 1) * TOKENS; t++)
            recent[csr.chunk[t]] += lsa_f16_to_f32(csr.mass[t]) / TOKENS;
    }
    assert_true(left > 1e-6 && gap < 1e-5);
    lsa_observed_fini(&o);
    lsa_csr_fini(&csr);
}

/* What a start is made of, and what is refused. */
static void test_start(void **state) {
    (void)state;
    rig a, b;
    lsa_err err = {0};
    open_rig(&a, g_dir[0], true, 2, 8, false, NULL);
    open_rig(&b, g_dir[0], true, 5, 8, false, NULL);
    a.p[a.at] = 1.25f, a.p[a.at + 1] = -3;
    ok(lsa_indexer_widen(b.p, &b.g, a.p, &a.g, 9, &err), &err);
    assert_true(b.p[b.at] == 1.25f && b.p[b.at + 1] == -3.0f && b.p[b.at - 1] == LSA_COST_START);
    b.g.prior = false;
    assert_int_equal(lsa_indexer_widen(b.p, &b.g, a.p, &a.g, 9, &err), LSA_E_CONFIG);
    assert_non_null(strstr(err.msg, "set model.prior: true"));
    close_rig(&a), close_rig(&b);
}
static void test_refuses(void **state) {
    (void)state;
    static const struct {
        const char *set, *message;
    } bad[] = {{"loss.on=layer", "loss.on: sum"},
               {"sample.candidates=sampled", "sample.candidates: all"},
               {"window.stride=16", "window.stride 16 must be a multiple of window.tau 64"},
               {"sample.exclude_resident=false", "sample.exclude_resident: true"},
               {"train.trace=x", "train.trace"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *set[] = {"model.prior=true", bad[i].set};
        lsa_recipe r;
        lsa_err err = {0};
        ok(lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, NULL, set, 2, &err), &err);
        assert_int_equal(lsa_recipe_check(&r, &err), LSA_E_CONFIG);
        if (!strstr(err.msg, bad[i].message)) fail_msg("%s", err.msg);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_leak),   cmocka_unit_test(test_leak_runs), cmocka_unit_test(test_after_prompt),
        cmocka_unit_test(test_runs),   cmocka_unit_test(test_slopes),    cmocka_unit_test(test_nothing_added),
        cmocka_unit_test(test_parts),  cmocka_unit_test(test_long),      cmocka_unit_test(test_start),
        cmocka_unit_test(test_refuses)};
    for (int k = 1; k >= 0; k--) {
        snprintf(g_dir[k], sizeof g_dir[k], "/tmp/lsa-prior-XXXXXX");
        if (!mkdtemp(g_dir[k])) return 1;
        hand_plant = (struct hand_plant){PLANT_DOC, k ? PLANT : 0, k ? PLANT + TAU : 0};
        hand_shards(g_dir[k], 64);
    }
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    for (int k = 0; k < 2; k++)
        if (lsa_remove_tree(g_dir[k], NULL) != LSA_OK) return 1;
    return rc;
}
