/* Training with resident documents on a GPU that is made up here: it computes nothing, but knows what every
 * slot holds, ends a step only when it is waited for, and copies slowly. So whatever timing does, a step must
 * find the windows that the order names, and no slot of a running step may be touched. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "kernels/core/rng.h"
#include "tests/testkit/hand_shards.h"
#include "trainer/order.h"
#include "trainer/resident.h"

/* ---- the GPU ---- */

enum { SLOTS = 2 * HAND_DOCS, ROWS = 64 };
struct lsa_gpu_step {
    bool eval;
    int64_t doc[SLOTS], n_window[SLOTS]; /* doc -1: nothing */
    bool copied[SLOTS], mined[SLOTS];
    int64_t batch, launched, ended, taken;
    int32_t used[LSA_GPU_FLIGHT][ROWS];
    lsa_rng rng;
};

static pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER; /* launched, ended, used, g_torn */
static char g_dir[64];
static int g_puts, g_steps_waited;
static int g_threads, g_begun; /* reading threads begun; in the first step */
static bool g_torn;            /* something touched a slot in use, or used one that was not ready */

static bool in_flight(const lsa_gpu_step *s, int32_t slot) {
    for (int64_t k = s->ended; k < s->launched; k++)
        for (int64_t i = 0; i < s->batch; i++)
            if (s->used[k % LSA_GPU_FLIGHT][i] == slot) return true;
    return false;
}

lsa_status lsa_gpu_create(lsa_gpu_step **out, lsa_ctx *ctx, const lsa_indexer_geom *g, const lsa_gpu_opts *o,
                          const float *params, const float *m, const float *v, int64_t updates,
                          lsa_err *err) {
    lsa_status st = LSA_OK;
    (void)ctx, (void)g, (void)params, (void)m, (void)v, (void)updates;
    LSA_TRY(LSA_NEW(*out, 1, err));
    (*out)->batch = o->batch;
    (*out)->rng = lsa_rng_make(3, 4);
    assert_true(o->n_slot == SLOTS && o->batch <= ROWS);
    for (int i = 0; i < SLOTS; i++) (*out)->doc[i] = -1;
done:
    return st;
}
lsa_status lsa_gpu_create_eval(lsa_gpu_step **out, lsa_gpu_step *s, int64_t windows, int64_t columns,
                               int32_t n_slot, lsa_err *err) {
    lsa_status st = LSA_OK;
    (void)s, (void)windows, (void)columns, (void)n_slot;
    LSA_TRY(LSA_NEW(*out, 1, err));
    (*out)->eval = true;
done:
    return st;
}
void lsa_gpu_destroy(lsa_gpu_step *s) {
    lsa_free(s);
}
lsa_status lsa_gpu_thread_begin(const lsa_gpu_step *s, lsa_err *err) {
    (void)s, (void)err;
    pthread_mutex_lock(&g_lock);
    g_threads++;
    pthread_mutex_unlock(&g_lock);
    return LSA_OK;
}
lsa_status lsa_gpu_host_alloc(void **out, int64_t bytes, lsa_err *err) {
    return lsa_alloc_(out, bytes, 1, "block", err);
}
void lsa_gpu_host_free(void *p) {
    lsa_free(p);
}
lsa_status lsa_gpu_pool_put(lsa_gpu_step *s, int32_t slot, const lsa_gpu_doc *d, const void *block,
                            lsa_err *err) {
    (void)block, (void)err;
    const struct timespec nap = {0, (long)lsa_rng_below(&s->rng, 300000)};
    pthread_mutex_lock(&g_lock);
    if (slot < 0 || slot >= SLOTS || in_flight(s, slot)) g_torn = true;
    pthread_mutex_unlock(&g_lock);
    s->doc[slot] = d ? d->doc : -1;
    s->n_window[slot] = d ? d->n_window : 0;
    s->copied[slot] = s->mined[slot] = false;
    g_puts += d != NULL;
    nanosleep(&nap, NULL);
    return LSA_OK;
}
lsa_status lsa_gpu_pool_wait(lsa_gpu_step *s, lsa_err *err) {
    (void)err;
    for (int i = 0; i < SLOTS; i++) s->copied[i] |= s->doc[i] >= 0;
    return LSA_OK;
}
lsa_status lsa_gpu_launch(lsa_gpu_step *s, const lsa_gpu_row *row, double lr, lsa_err *err) {
    (void)lr, (void)err;
    assert_true(s->launched - s->taken < LSA_GPU_FLIGHT);
    pthread_mutex_lock(&g_lock);
    for (int64_t i = 0; i < s->batch; i++) {
        const int32_t slot = row[i].slot;
        if (slot < 0 || slot >= SLOTS || !s->copied[slot] || row[i].window >= s->n_window[slot])
            g_torn = true;
        s->used[s->launched % LSA_GPU_FLIGHT][i] = slot;
    }
    s->launched++;
    pthread_mutex_unlock(&g_lock);
    return LSA_OK;
}
lsa_status lsa_gpu_result_take(lsa_gpu_step *s, lsa_gpu_result *out, lsa_err *err) {
    (void)err;
    assert_true(s->taken < s->launched);
    s->taken++;
    pthread_mutex_lock(&g_lock);
    if (s->ended < s->taken) s->ended = s->taken;
    pthread_mutex_unlock(&g_lock);
    *out = (lsa_gpu_result){.loss = 1, .updates = s->taken};
    return LSA_OK;
}
lsa_status lsa_gpu_snapshot(lsa_gpu_step *s, lsa_err *err) {
    (void)s;
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "the made-up GPU has no parameters");
}
lsa_status lsa_gpu_snapshot_get(const lsa_gpu_step *s, float *params, float *m, float *v, lsa_err *err) {
    (void)s, (void)params, (void)m, (void)v;
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "the made-up GPU has no parameters");
}
lsa_status lsa_gpu_share(lsa_gpu_step *s, lsa_err *err) {
    (void)s, (void)err;
    return LSA_OK;
}
lsa_status lsa_gpu_hash(lsa_gpu_step *s, uint64_t *out, lsa_err *err) {
    (void)s, (void)out;
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "the made-up GPU has no parameters");
}
lsa_status lsa_gpu_wait(lsa_gpu_step *s, lsa_err *err) {
    (void)err;
    pthread_mutex_lock(&g_lock);
    g_steps_waited += s->ended < s->launched;
    s->ended = s->launched;
    pthread_mutex_unlock(&g_lock);
    return LSA_OK;
}
lsa_status lsa_gpu_mine(lsa_gpu_step *s, lsa_gpu_step *eval, int32_t slot, lsa_err *err) {
    (void)err;
    if (!eval->eval || !s->copied[slot]) g_torn = true;
    s->mined[slot] = true;
    return LSA_OK;
}
int64_t lsa_gpu_rows(const lsa_gpu_step *s) {
    return s->batch;
}
lsa_status lsa_gpu_eval(lsa_gpu_step *s, int64_t m, const lsa_gpu_row *row, float threshold, int64_t topk,
                        int32_t n_budget, const double *budget, lsa_gpu_eval_row *out, lsa_err *err) {
    (void)s, (void)m, (void)row, (void)threshold, (void)topk, (void)n_budget, (void)budget, (void)out;
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "the made-up GPU does not evaluate");
}

/* ---- what is judged ---- */

/* Row i of a step is of shard i / rows; its document, window and epoch are those of the order. The recipe's
 * pool of 0 MiB makes groups as small as they may be. */
static void follow_rank(const char *batch, const char *shards, const char *stride, int64_t pool_mib,
                        double hard, int rank, int size) {
    const char *const set[] = {
        "window.tail=128",           "sample.val_documents=0", batch, shards, "sample.order=shuffled", stride,
        "sample.candidates=sampled", "loss.kind=focal"};
    lsa_recipe r;
    lsa_indexer_geom g = {
        .hidden = HAND_HIDDEN, .n_head = 2, .head_dim = 128, .rank = 4, .eps = 1e-6f, .n_layer = HAND_LAYERS};
    lsa_source *s = NULL;
    lsa_order *o = NULL, *again = NULL;
    lsa_resident *x = NULL;
    lsa_cursor c = {0};
    lsa_err err = {0};
    char dir[96];
    for (int32_t l = 0; l < HAND_LAYERS; l++) g.ord[l].v = l, g.id[l].v = 2 * l + 1;
    snprintf(dir, sizeof dir, "%s/s%s", g_dir, strchr(stride, '=') + 1);
    assert_int_equal(lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, NULL, set, 8, &err), LSA_OK);
    r.pool_mib = pool_mib;
    r.hard_share = hard;
    r.hard_every = 5;
    if (lsa_source_open(&s, dir, &r, &g, true, &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_int_equal(lsa_order_create(&o, s, &r, rank, size, &err), LSA_OK);
    assert_int_equal(lsa_order_create(&again, s, &r, 0, 1, &err), LSA_OK);
    if (lsa_resident_create(&x, NULL, NULL, s, o, &r, &g, NULL, NULL, NULL, 0, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    lsa_gpu_step *const gpu = lsa_resident_step(x);
    const int64_t rows = lsa_order_rows(o), first = lsa_order_first(o), share = lsa_order_share(o);
    assert_int_equal(gpu->batch, rows * share);
    const int64_t steps = 3 * lsa_order_epoch_windows(o) / r.batch + 3;
    g_torn = false;
    g_puts = g_threads = 0;
    for (int64_t step = 0; step <= steps; step++) { /* two in flight, as training does */
        lsa_step_result got;
        if (step < steps) {
            if (lsa_resident_launch(x, &c, step, &err) != LSA_OK) fail_msg("step %d: %s", (int)step, err.msg);
            assert_int_equal(c.asked, (step + 1) * rows);
            if (step == 0) g_begun = g_threads;
            for (int64_t i = 0; i < gpu->batch; i++) {
                lsa_place p;
                const int32_t slot = gpu->used[step % LSA_GPU_FLIGHT][i];
                assert_int_equal(lsa_order_at(&p, again, first + i / rows, step * rows + i % rows, NULL),
                                 LSA_OK);
                assert_int_equal(gpu->doc[slot], p.doc);
                assert_true(hard == 0 || gpu->mined[slot]);
            }
        }
        if (step > 0) assert_int_equal(lsa_resident_take(x, &got, &err), LSA_OK);
    }
    assert_false(g_torn);
    for (int64_t v = first; v < first + share; v++) assert_true(pool_mib == 0 || lsa_order_whole(o, v));
    if (pool_mib && size == 1) assert_int_equal(g_puts, HAND_DOCS); /* read once, kept */
    lsa_resident_destroy(x);
    lsa_order_destroy(o);
    lsa_order_destroy(again);
    lsa_source_close(s);
}

static void follow(const char *batch, const char *shards, const char *stride, int64_t pool_mib, double hard) {
    follow_rank(batch, shards, stride, pool_mib, hard, 0, 1);
}

static void test_whole(void **state) {
    (void)state;
    follow("train.batch=8", "data.virtual_shards=1", "window.stride=1", 64, 0);
    follow("train.batch=8", "data.virtual_shards=4", "window.stride=1", 64, 0);
}

static void test_rotating(void **state) {
    (void)state;
    g_steps_waited = 0;
    follow("train.batch=2", "data.virtual_shards=1", "window.stride=64", 0, 0);
    follow("train.batch=4", "data.virtual_shards=2", "window.stride=64", 0, 0);
    follow("train.batch=10", "data.virtual_shards=1", "window.stride=64", 0, 0); /* of 21 windows */
    follow("train.batch=64", "data.virtual_shards=1", "window.stride=1", 0, 0);
    follow("train.batch=16", "data.virtual_shards=4", "window.stride=1", 0, 0);
    assert_true(g_steps_waited > 0); /* some step had to wait for a bank: the hard case was met */
}

/* Groups of single documents: what all shards need is read together, and so is what they need next. */
static void test_together(void **state) {
    (void)state;
    follow("train.batch=4", "data.virtual_shards=4", "window.stride=1", 0, 0);
    assert_in_range(g_begun, 4, 2 * HAND_DOCS);
}

static void test_mined(void **state) {
    (void)state;
    follow("train.batch=4", "data.virtual_shards=2", "window.stride=64", 0, 0.5);
    follow("train.batch=8", "data.virtual_shards=4", "window.stride=1", 64, 0.5);
}

/* A rank of several follows the same order, on its shards. */
static void test_ranks(void **state) {
    (void)state;
    for (int rank = 0; rank < 2; rank++) {
        follow_rank("train.batch=16", "data.virtual_shards=4", "window.stride=1", 0, 0, rank, 2);
        follow_rank("train.batch=8", "data.virtual_shards=2", "window.stride=64", 64, 0.5, rank, 2);
    }
}

static int begin(void **state) {
    (void)state;
    char dir[96];
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-resident-XXXXXX");
    if (!mkdtemp(g_dir)) return 1;
    for (int32_t stride = 1; stride <= 64; stride *= 64) {
        snprintf(dir, sizeof dir, "%s/s%d", g_dir, stride);
        hand_shards(dir, stride);
    }
    return 0;
}
static int end(void **state) {
    (void)state;
    return lsa_remove_tree(g_dir, NULL) == LSA_OK ? 0 : 1;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_whole), cmocka_unit_test(test_rotating),
                                       cmocka_unit_test(test_together), cmocka_unit_test(test_mined),
                                       cmocka_unit_test(test_ranks)};
    return cmocka_run_group_tests(tests, begin, end);
}
