/* A trainer of the op-by-op step over hand-made shards (hand_shards.h), with all it needs, for tests of what
 * is learned beside the layers. cmocka: a failing call fails the test. */
#ifndef LSA_TESTS_TESTKIT_TRAIN_RIG_H
#define LSA_TESTS_TESTKIT_TRAIN_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>

#include "kernels/comm/comm.h"
#include "kernels/core/mem.h"
#include "tests/testkit/hand_shards.h"
#include "trainer/step.h"

typedef struct rig {
    lsa_recipe r;
    lsa_indexer_geom g;
    lsa_ctx *ctx;
    lsa_comm *comm;
    lsa_source *s;
    lsa_order *o;
    lsa_trainer *t;
    lsa_batch b;
    lsa_cursor c;
    float *p, *grad;      /* [n] parameters the trainer begins with; gradient of the last step */
    int64_t n, costs, at; /* costs, at: where the continuation's costs and the prior's weights lie */
} rig;

static inline void ok(lsa_status st, const lsa_err *err) {
    if (st != LSA_OK) fail_msg("%s", err->msg);
}

static inline void close_trainer(rig *x) {
    lsa_trainer_destroy(x->t);
    x->t = NULL;
}
/* A trainer that begins with x->p. */
static inline void open_trainer(rig *x) {
    lsa_err err = {0};
    close_trainer(x);
    ok(lsa_trainer_create(&x->t, x->ctx, x->comm, lsa_order_share(x->o), &x->r, &x->g, x->p, NULL, NULL, 0,
                          &err),
       &err);
}

/* set [n_set]: recipe settings, which agree with reach and prior. shards: gradients go through a communicator
 * of one. masses: the source is asked for them. */
static inline void open_train_rig(rig *x, const char *dir, const char *const *set, int n_set, int32_t reach,
                                  bool prior, bool shards, bool masses) {
    lsa_err err = {0};
    memset(x, 0, sizeof *x);
    ok(lsa_recipe_load(&x->r, lsa_recipe_keys, lsa_recipe_n_key, NULL, set, n_set, &err), &err);
    ok(lsa_recipe_check(&x->r, &err), &err);
    x->g = (lsa_indexer_geom){.hidden = HAND_HIDDEN,
                              .n_head = 16,
                              .head_dim = 128,
                              .rank = 4,
                              .eps = 1e-6f,
                              .n_layer = HAND_LAYERS,
                              .reach = reach,
                              .prior = prior};
    x->g.rope = (lsa_rope){
        .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    for (int32_t l = 0; l < HAND_LAYERS; l++) x->g.ord[l].v = l, x->g.id[l].v = 2 * l + 1;
    x->n = lsa_indexer_n_param(&x->g);
    x->costs = lsa_indexer_costs_at(&x->g);
    x->at = lsa_indexer_prior_at(&x->g);
    assert_int_equal(LSA_NEW(x->p, x->n, NULL), LSA_OK);
    assert_int_equal(LSA_NEW(x->grad, x->n, NULL), LSA_OK);
    lsa_indexer_init_random(x->p, &x->g, 5);
    ok(lsa_ctx_create(&x->ctx, "cpu", &err), &err);
    if (shards) ok(lsa_comm_open(&x->comm, &(lsa_comm_opts){.ranks = "self", .deadline_s = 60}, &err), &err);
    ok(lsa_source_open(&x->s, dir, &x->r, &x->g, masses, &err), &err);
    ok(lsa_order_create(&x->o, x->s, &x->r, 0, 1, &err), &err);
    open_trainer(x);
}
static inline void close_rig(rig *x) {
    close_trainer(x);
    lsa_batch_fini(&x->b);
    lsa_order_destroy(x->o);
    lsa_source_close(x->s);
    lsa_comm_close(x->comm, LSA_OK, NULL);
    lsa_ctx_destroy(x->ctx);
    lsa_free(x->p);
    lsa_free(x->grad);
}

/* The next windows. */
static inline void next_batch(rig *x) {
    lsa_err err = {0};
    ok(lsa_batch_next(&x->b, x->s, x->o, &x->r, &x->g, &x->c, &err), &err);
}
/* A step on them. */
static inline lsa_step_result step_rig(rig *x, int64_t number) {
    lsa_step_result out;
    lsa_err err = {0};
    ok(lsa_trainer_step(&out, x->t, &x->b, number, &err), &err);
    ok(lsa_trainer_grad(x->t, x->grad, &err), &err);
    assert_false(out.skipped);
    return out;
}

#endif
