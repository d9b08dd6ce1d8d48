/* The continuation inside a training step: nothing else changes when nothing is lent, the gradient of the
 * costs is the slope of the loss, costs stay where they are defined, and every way of forming the gradient
 * (whole, by virtual shards) gives the same. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "tests/testkit/train_rig.h"

enum { REACH = 5 };
static char g_dir[64];

static void open_rig(rig *x, int32_t reach, bool shards, const char *more) {
    char text[48];
    const char *set[] = {"window.tail=64",
                         "window.stride=16",
                         "train.batch=8",
                         "sample.val_documents=0",
                         "optim.lr=0.02",
                         "optim.weight_decay=0.3",
                         "optim.warmup=0",
                         "optim.clip=0.05",
                         "train.device_unused",
                         "data.virtual_shards=2",
                         more};
    snprintf(text, sizeof text, "model.continuation=%d", reach);
    set[8] = text;
    if (!shards) set[9] = "data.virtual_shards=1";
    open_train_rig(x, g_dir, set, more ? 11 : 10, reach, false, shards, true);
}
static void set_costs(rig *x, float first, float more) {
    for (int32_t j = 0; j < x->g.reach; j++) x->p[x->costs + j] = first + more * (float)j;
}

/* One step on the next windows (again: on the same). */
static lsa_step_result step(rig *x, bool again, int64_t number) {
    if (!again) next_batch(x);
    return step_rig(x, number);
}
static void params(rig *x, float *p) {
    lsa_err err = {0};
    ok(lsa_trainer_get(x->t, p, NULL, NULL, &err), &err);
}

/* Costs that nobody can pay: loss, norm and every other parameter are those of a trainer without a
 * continuation, bit by bit, after some steps; so are they with the key left out, which is 0. */
static void test_nothing_lent(void **state) {
    (void)state;
    for (int shards = 0; shards < 2; shards++) {
        rig a, b;
        open_rig(&a, 0, shards, NULL);
        open_rig(&b, REACH, shards, NULL);
        assert_int_equal(b.n, a.n + REACH);
        set_costs(&b, 1e6f, 1);
        open_trainer(&b);
        for (int i = 0; i < 4; i++) {
            const lsa_step_result x = step(&a, false, i), y = step(&b, false, i);
            assert_true(x.loss == y.loss && x.grad_norm == y.grad_norm && x.grad_norm > 0.05);
        }
        float *p = NULL;
        assert_int_equal(LSA_NEW(p, b.n, NULL), LSA_OK);
        params(&a, a.p);
        params(&b, p);
        assert_memory_equal(p, a.p, (size_t)a.n * sizeof *p);
        assert_memory_equal(p + b.costs, b.p + b.costs, REACH * sizeof *p); /* no decay either */
        lsa_free(p);
        close_rig(&a);
        close_rig(&b);
    }
    lsa_recipe r;
    lsa_err err = {0};
    ok(lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, NULL, NULL, 0, &err), &err);
    assert_int_equal(r.reach, 0);
}

/* Slope of the loss along each cost, for every loss that the sum may have. */
static void test_slopes(void **state) {
    (void)state;
    static const char *const loss[] = {"loss.kind=kl", "loss.kind=bce", "loss.kind=focal"};
    double worst = 0;
    for (int k = 0; k < 3; k++)
        for (int shards = 0; shards < 2; shards++) {
            rig x;
            open_rig(&x, REACH, shards, loss[k]);
            for (int64_t i = 0; i < x.costs; i++) x.p[i] *= 0.5f; /* scores of about 2 */
            set_costs(&x, 0.3f, 0.21f);
            open_trainer(&x);
            step(&x, false, 0);
            double size = 0;
            for (int j = 0; j < REACH; j++) size = fmax(size, fabs((double)x.grad[x.costs + j]));
            assert_true(size > 1e-4);
            float want[REACH];
            memcpy(want, x.grad + x.costs, sizeof want);
            for (int j = 0; j < REACH; j++) {
                float *const cost = &x.p[x.costs + j], at = *cost, h = 1e-2f;
                double value[2];
                for (int side = 0; side < 2; side++) {
                    *cost = side ? at - h : at + h;
                    open_trainer(&x);
                    value[side] = step(&x, true, 0).loss;
                }
                *cost = at;
                const double off = fabs((value[0] - value[1]) / (2 * (double)h) - (double)want[j]) / size;
                if (!(off <= 1e-3)) fail_msg("%s: b_%d: off by %.3g of the largest", loss[k], j + 1, off);
                worst = fmax(worst, off);
            }
            close_rig(&x);
        }
    printf("largest distance of a slope from the gradient of a cost: %.2g of the largest gradient\n", worst);
}

/* Parts of a batch add up to the whole: the same gradient, to rounding, by one part and by two. */
static void test_parts(void **state) {
    (void)state;
    rig whole, parts;
    open_rig(&parts, REACH, true, NULL);
    assert_int_equal(lsa_order_share(parts.o), 2);
    for (int64_t i = 0; i < parts.costs; i++) parts.p[i] *= 0.5f;
    set_costs(&parts, 0.1f, 0.2f);
    open_trainer(&parts);
    step(&parts, false, 0);
    whole = parts;
    whole.comm = NULL;
    whole.t = NULL;
    assert_int_equal(LSA_NEW(whole.grad, whole.n, NULL), LSA_OK);
    open_trainer(&whole);
    step(&whole, true, 0);
    double size = 0;
    for (int64_t i = 0; i < whole.n; i++) size = fmax(size, fabs((double)whole.grad[i]));
    for (int64_t i = 0; i < whole.n; i++)
        assert_true(fabs((double)whole.grad[i] - (double)parts.grad[i]) <= 1e-5 * size);
    close_trainer(&whole);
    lsa_free(whole.grad);
    close_rig(&parts);
}

/* Costs never leave [0, inf), and a cost of 0 can grow again. */
static void test_projection(void **state) {
    (void)state;
    rig x;
    open_rig(&x, REACH, true, NULL);
    for (int64_t i = 0; i < x.costs; i++) x.p[i] *= 0.2f;
    set_costs(&x, 0.01f, 0); /* one step moves a cost by 0.02 */
    open_trainer(&x);
    int zeros = 0, grown = 0;
    for (int i = 0; i < 12; i++) {
        float b[LSA_MAX_REACH], before[LSA_MAX_REACH];
        lsa_err err = {0};
        ok(lsa_trainer_costs(x.t, before, &err), &err);
        step(&x, false, i);
        ok(lsa_trainer_costs(x.t, b, &err), &err);
        ok(lsa_indexer_costs_check(b, REACH, "costs", &err), &err);
        for (int j = 0; j < REACH; j++) {
            zeros += b[j] == 0 && x.grad[x.costs + j] > 0;
            grown += b[j] > before[j];
        }
    }
    assert_true(zeros > 0 && grown > 0);
    close_rig(&x);
}

/* What a start is made of: costs of an initialisation, of a longer reach, of a shorter one. */
static void test_start(void **state) {
    (void)state;
    rig a, b;
    lsa_err err = {0};
    open_rig(&a, 2, false, NULL);
    open_rig(&b, REACH, false, NULL);
    for (int j = 0; j < 2; j++) assert_true(a.p[a.costs + j] == LSA_COST_START);
    a.p[a.costs] = 0.25f, a.p[a.costs + 1] = 0;
    ok(lsa_indexer_widen(b.p, &b.g, a.p, &a.g, 9, &err), &err);
    assert_true(b.p[b.costs] == 0.25f && b.p[b.costs + 1] == 0);
    for (int j = 2; j < REACH; j++) assert_true(b.p[b.costs + j] == LSA_COST_START);
    assert_memory_equal(a.p, b.p, (size_t)a.costs * sizeof *a.p);
    assert_int_equal(lsa_indexer_widen(a.p, &a.g, b.p, &b.g, 9, &err), LSA_E_CONFIG);
    assert_non_null(strstr(err.msg, "set model.continuation: 5"));
    close_rig(&a);
    close_rig(&b);
}

static void test_refuses(void **state) {
    (void)state;
    static const struct {
        const char *set, *message;
    } bad[] = {{"loss.on=layer", "loss.on: sum"},
               {"sample.candidates=sampled", "sample.candidates: all"},
               {"train.trace=x", "train.trace"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *set[] = {"model.continuation=16", bad[i].set};
        lsa_recipe r;
        lsa_err err = {0};
        ok(lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, NULL, set, 2, &err), &err);
        assert_int_equal(lsa_recipe_check(&r, &err), LSA_E_CONFIG);
        if (!strstr(err.msg, bad[i].message)) fail_msg("%s", err.msg);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_nothing_lent), cmocka_unit_test(test_slopes),
                                       cmocka_unit_test(test_parts),        cmocka_unit_test(test_projection),
                                       cmocka_unit_test(test_start),        cmocka_unit_test(test_refuses)};
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-continuation-XXXXXX");
    if (!mkdtemp(g_dir)) return 1;
    hand_shards(g_dir, 1);
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
