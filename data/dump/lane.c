/* A queue with one thread: see lane.h. */
#include "data/dump/lane.h"

#include <pthread.h>

#include "kernels/core/clock.h"
#include "kernels/core/mem.h"

typedef struct entry {
    void *item;
    int64_t bytes;
} entry;

struct lsa_lane {
    const char *name;
    int64_t limit, held; /* bytes reserved and not yet handled */
    lsa_status (*handle)(void *user, void *item, lsa_err *err);
    void (*drop)(void *item);
    void *user;
    pthread_t thread;
    bool started, ending, abandoned;
    pthread_mutex_t lock; /* all below, held, ending and abandoned */
    pthread_cond_t changed;
    LSA_VEC(entry) queue;
    double seconds;
    lsa_status st;
    lsa_err err;
};

static void *work(void *arg) {
    lsa_lane *const l = arg;
    pthread_mutex_lock(&l->lock);
    for (;;) {
        while (l->queue.len == 0 && !l->ending) pthread_cond_wait(&l->changed, &l->lock);
        if (l->queue.len == 0) break;
        const entry e = l->queue.data[0];
        for (int64_t i = 1; i < l->queue.len; i++) l->queue.data[i - 1] = l->queue.data[i];
        l->queue.len--;
        if (l->st == LSA_OK && !l->abandoned) {
            lsa_err why = {0};
            pthread_mutex_unlock(&l->lock);
            const double t0 = lsa_now_s();
            const lsa_status st = l->handle(l->user, e.item, &why);
            const double dt = lsa_now_s() - t0;
            pthread_mutex_lock(&l->lock);
            l->seconds += dt;
            if (st != LSA_OK) l->st = st, l->err = why;
        }
        pthread_mutex_unlock(&l->lock);
        l->drop(e.item);
        pthread_mutex_lock(&l->lock);
        l->held -= e.bytes;
        pthread_cond_broadcast(&l->changed);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

lsa_status lsa_lane_create(lsa_lane **out, const char *name, int64_t limit,
                           lsa_status (*handle)(void *user, void *item, lsa_err *err),
                           void (*drop)(void *item), void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_lane *l = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(l, 1, err));
    l->name = name, l->limit = limit, l->handle = handle, l->drop = drop, l->user = user;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->changed, NULL);
    if (pthread_create(&l->thread, NULL, work, l) != 0)
        LSA_FAIL(LSA_E_NOMEM, "cannot start the thread of '%s'", name);
    l->started = true;
    *out = l;
    l = NULL;
done:
    lsa_lane_destroy(l);
    return st;
}

static lsa_status result(const lsa_lane *l, lsa_err *err) { /* with the lock */
    if (l->st != LSA_OK && err && err->code == LSA_OK) *err = l->err;
    return l->st;
}

lsa_status lsa_lane_finish(lsa_lane *l, bool abandon, lsa_err *err) {
    if (!l || !l->started) return LSA_OK;
    pthread_mutex_lock(&l->lock);
    l->ending = true;
    l->abandoned = l->abandoned || abandon;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
    l->started = false;
    return result(l, err);
}

void lsa_lane_destroy(lsa_lane *l) {
    if (!l) return;
    const lsa_status ignored = lsa_lane_finish(l, true, NULL);
    (void)ignored;
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->changed);
    lsa_free(l->queue.data);
    lsa_free(l);
}

static bool fits(const lsa_lane *l, int64_t bytes) {
    return l->held == 0 || l->held + bytes <= l->limit;
}

bool lsa_lane_try(lsa_lane *l, int64_t bytes) {
    pthread_mutex_lock(&l->lock);
    const bool yes = l->st != LSA_OK || fits(l, bytes);
    if (yes) l->held += bytes;
    pthread_mutex_unlock(&l->lock);
    return yes;
}

lsa_status lsa_lane_reserve(lsa_lane *l, int64_t bytes, lsa_err *err) {
    pthread_mutex_lock(&l->lock);
    while (l->st == LSA_OK && !fits(l, bytes)) pthread_cond_wait(&l->changed, &l->lock);
    l->held += bytes;
    const lsa_status st = result(l, err);
    pthread_mutex_unlock(&l->lock);
    return st;
}

lsa_status lsa_lane_give(lsa_lane *l, void *item, int64_t bytes, lsa_err *err) {
    pthread_mutex_lock(&l->lock);
    lsa_status st = LSA_VEC_RESERVE(l->queue, l->queue.len + 1, err);
    if (st == LSA_OK) {
        l->queue.data[l->queue.len++] = (entry){item, bytes};
        pthread_cond_broadcast(&l->changed);
        st = result(l, err);
    } else {
        l->drop(item);
    }
    pthread_mutex_unlock(&l->lock);
    return st;
}

double lsa_lane_seconds(lsa_lane *l) {
    pthread_mutex_lock(&l->lock);
    const double s = l->seconds;
    pthread_mutex_unlock(&l->lock);
    return s;
}
