/* Background checkpoints: see saver.h. The mistake that would stay silent: filling the snapshot while its
 * predecessor is still being written, which leaves a checkpoint of two steps at once. */
#include "trainer/saver.h"

#include <pthread.h>

#include "data/ckpt.h"
#include "kernels/core/mem.h"

struct lsa_saver {
    const char *run;
    const lsa_indexer_geom *g;
    int64_t keep, milestone_every, good; /* good: last step known to be written, -1 none */
    lsa_snapshot snap;
    /* the write in progress */
    bool running; /* begun and not joined */
    bool best;
    int64_t step;
    json_t *state;
    lsa_saver_fill *fill;
    void *user;
    pthread_t thread;
    pthread_mutex_t lock; /* ended */
    bool ended;
    lsa_status st; /* its result, once joined */
    lsa_err err;
};

lsa_status lsa_saver_create(lsa_saver **out, const char *run, const lsa_indexer_geom *g, int64_t keep,
                            int64_t milestone_every, int64_t last_step, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_saver *s = NULL;
    const int64_t n = lsa_indexer_n_param(g);
    *out = NULL;
    LSA_TRY(LSA_NEW(s, 1, err));
    pthread_mutex_init(&s->lock, NULL);
    s->run = run;
    s->g = g;
    s->keep = keep;
    s->milestone_every = milestone_every;
    s->good = last_step;
    LSA_TRY(LSA_NEW(s->snap.params, n, err));
    LSA_TRY(LSA_NEW(s->snap.m, n, err));
    LSA_TRY(LSA_NEW(s->snap.v, n, err));
    *out = s;
    s = NULL;
done:
    lsa_saver_destroy(s);
    return st;
}

static void *write_it(void *arg) {
    lsa_saver *const s = arg;
    s->st = s->fill ? s->fill(s->user, &s->snap, &s->err) : LSA_OK;
    if (s->st == LSA_OK)
        s->st = lsa_ckpt_save(s->run, s->step, s->g, s->snap.params, s->snap.m, s->snap.v, s->state, s->best,
                              s->keep, s->milestone_every, &s->err);
    pthread_mutex_lock(&s->lock);
    s->ended = true;
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

lsa_status lsa_saver_wait(lsa_saver *s, lsa_err *err) {
    if (!s->running) return LSA_OK;
    pthread_join(s->thread, NULL);
    s->running = false;
    json_decref(s->state);
    s->state = NULL;
    if (s->st == LSA_OK) {
        s->good = s->step;
        return LSA_OK;
    }
    if (s->good >= 0)
        lsa_err_wrap(&s->err, "the checkpoint of step %lld is not written; step %lld is the last good one",
                     (long long)s->step, (long long)s->good);
    else
        lsa_err_wrap(&s->err, "the checkpoint of step %lld is not written, and there is none before",
                     (long long)s->step);
    if (err && err->code == LSA_OK) *err = s->err;
    return s->st;
}

bool lsa_saver_busy(lsa_saver *s) {
    if (!s->running) return false;
    pthread_mutex_lock(&s->lock);
    const bool ended = s->ended;
    pthread_mutex_unlock(&s->lock);
    return !ended;
}

lsa_status lsa_saver_poll(lsa_saver *s, lsa_err *err) {
    return lsa_saver_busy(s) ? LSA_OK : lsa_saver_wait(s, err);
}

void lsa_saver_destroy(lsa_saver *s) {
    if (!s) return;
    lsa_status ignored = lsa_saver_wait(s, NULL);
    (void)ignored;
    pthread_mutex_destroy(&s->lock);
    lsa_free(s->snap.params);
    lsa_free(s->snap.m);
    lsa_free(s->snap.v);
    lsa_free(s);
}

lsa_snapshot lsa_saver_snapshot(lsa_saver *s) {
    return s->snap;
}

lsa_status lsa_saver_begin(lsa_saver *s, int64_t step, json_t *state, bool best, lsa_saver_fill *fill,
                           void *user, lsa_err *err) {
    if (s->running) {
        json_decref(state);
        LSA_RET_FAIL(LSA_E_BUG, "a checkpoint was begun while step %lld is being written",
                     (long long)s->step);
    }
    s->step = step;
    s->state = state;
    s->best = best;
    s->fill = fill;
    s->user = user;
    s->ended = false;
    s->st = LSA_OK;
    s->err = (lsa_err){0};
    if (pthread_create(&s->thread, NULL, write_it, s) != 0) {
        json_decref(state);
        s->state = NULL;
        LSA_RET_FAIL(LSA_E_NOMEM, "cannot start the thread that writes checkpoints");
    }
    s->running = true;
    return LSA_OK;
}
