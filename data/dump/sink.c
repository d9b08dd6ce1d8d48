/* Gathering and sealing: see sink.h. Beside a GPU several shards are sealed at once, each by a thread of its
 * own; they are named in the manifest in their order all the same. (HDF5's calls take turns, data/h5.c;
 * joining, hashing and reading back do not.)
 *
 * DURABLE: manifest.json is replaced after each sealed shard; a sealed file that it does not name (killed in
 * between) is simply written again. */
#include "data/dump/sink.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "data/dump/plan.h"
#include "data/h5.h"
#include "kernels/core/clock.h"
#include "kernels/core/mem.h"

enum { LANES = LSA_DUMP_SEALING };

typedef struct shard {
    LSA_VEC(lsa_doc_stats) doc;
    int64_t bytes, number;
} shard;

struct lsa_sink {
    lsa_manifest *m;
    const char *out;
    int64_t shard_bytes;
    shard *open;
    lsa_lane *lane[LANES]; /* shard k goes to k mod n_lane */
    int32_t n_lane;        /* 0: sealed by who adds */
    double seconds;
    pthread_mutex_t lock; /* the manifest, and what follows */
    pthread_cond_t changed;
    lsa_status st; /* of the first that failed */
    lsa_err err;
    _Atomic int64_t sealed;
};

static void drop_shard(void *item) {
    shard *const x = item;
    for (int64_t i = 0; x && i < x->doc.len; i++) lsa_doc_stats_fini(&x->doc.data[i]);
    if (x) lsa_free(x->doc.data);
    lsa_free(x);
}

/* When it is the shard's turn. */
static lsa_status name_it(lsa_sink *s, const shard *x, const lsa_manifest_shard *named, lsa_err *err) {
    lsa_status st = LSA_OK;
    pthread_mutex_lock(&s->lock);
    while (s->st == LSA_OK && s->m->shard.len < x->number) pthread_cond_wait(&s->changed, &s->lock);
    if (s->m->shard.len < x->number) { /* one before it is missing */
        if (err && err->code == LSA_OK) *err = s->err;
        st = s->st;
        goto done;
    }
    LSA_TRY(lsa_manifest_add(s->m, named, err));
    LSA_TRY(lsa_manifest_save(s->m, s->out, err));
    atomic_store(&s->sealed, s->m->info.n_doc);
done:
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return st;
}

static lsa_status seal(void *user, void *item, lsa_err *err) {
    lsa_sink *const s = user;
    const shard *const x = item;
    lsa_status st = LSA_OK;
    lsa_manifest_shard named;
    char file[64];
    lsa_h5_init(); /* its silence is the thread's own */
    snprintf(file, sizeof file, "shard_%05lld.h5", (long long)x->number);
    LSA_TRY(lsa_shard_seal(&named, s->out, file, &s->m->info, x->doc.data, x->doc.len, err));
    LSA_TRY(name_it(s, x, &named, err));
done:
    if (st != LSA_OK) {
        pthread_mutex_lock(&s->lock);
        if (s->st == LSA_OK && err) s->err = *err;
        if (s->st == LSA_OK) s->st = st; /* those that wait for their turn must not wait for ever */
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->lock);
    }
    return st;
}

lsa_status lsa_sink_create(lsa_sink **out_sink, lsa_manifest *m, const char *out, int64_t shard_bytes,
                           bool behind, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_sink *s = NULL;
    *out_sink = NULL;
    LSA_TRY(LSA_NEW(s, 1, err));
    s->m = m, s->out = out, s->shard_bytes = shard_bytes;
    atomic_store(&s->sealed, m->info.n_doc);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    LSA_TRY(LSA_NEW(s->open, 1, err));
    s->open->number = m->shard.len;
    for (int32_t i = 0; behind && i < LANES; i++, s->n_lane++)
        LSA_TRY(lsa_lane_create(&s->lane[i], "sealing", shard_bytes, seal, drop_shard, s, err));
    *out_sink = s;
    s = NULL;
done:
    lsa_sink_destroy(s);
    return st;
}

void lsa_sink_destroy(lsa_sink *s) {
    if (!s) return;
    pthread_mutex_lock(&s->lock);
    if (s->st == LSA_OK) s->st = LSA_E_INTERRUPTED;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    for (int32_t i = 0; i < LANES; i++) lsa_lane_destroy(s->lane[i]);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    drop_shard(s->open);
    lsa_free(s);
}

bool lsa_sink_at_start(const lsa_sink *s) {
    return s->open->doc.len == 0;
}

static void drop_probes(lsa_doc_stats *d) {
    for (int32_t o = 0; o < LSA_MAX_CSA; o++) {
        lsa_free(d->probe_iq[o]);
        lsa_free(d->probe_iw[o]);
        lsa_free(d->probe_logit[o]);
        d->probe_iq[o] = d->probe_iw[o] = d->probe_logit[o] = NULL;
    }
    lsa_free(d->probe_row);
    d->probe_row = NULL;
    d->n_probe = d->n_probe_logit = 0;
}

/* Seals the open shard, or hands it to the thread that does. */
static lsa_status close_shard(lsa_sink *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    shard *full = s->open;
    if (full->doc.len == 0) return LSA_OK;
    s->open = NULL;
    LSA_TRY(LSA_NEW(s->open, 1, err));
    s->open->number = full->number + 1;
    if (s->n_lane) {
        shard *const given = full;
        lsa_lane *const lane = s->lane[given->number % s->n_lane];
        LSA_TRY(lsa_lane_reserve(lane, given->bytes, err));
        full = NULL; /* the lane's, whatever comes */
        LSA_TRY(lsa_lane_give(lane, given, given->bytes, err));
    } else {
        const double t0 = lsa_now_s();
        LSA_TRY(seal(s, full, err));
        s->seconds += lsa_now_s() - t0;
    }
done:
    drop_shard(full);
    return st;
}

lsa_status lsa_sink_add(lsa_sink *s, lsa_doc_stats *d, lsa_err *err) {
    shard *const x = s->open;
    lsa_status st = LSA_VEC_RESERVE(x->doc, x->doc.len + 1, err);
    if (st != LSA_OK) {
        lsa_doc_stats_fini(d);
        return st;
    }
    if (x->doc.len) drop_probes(d);
    x->doc.data[x->doc.len++] = *d;
    x->bytes += lsa_doc_stats_bytes(d, &s->m->info);
    memset(d, 0, sizeof *d);
    return x->bytes >= s->shard_bytes ? close_shard(s, err) : LSA_OK;
}

lsa_status lsa_sink_finish(lsa_sink *s, lsa_err *err) {
    lsa_status st = close_shard(s, err);
    for (int32_t i = 0; i < s->n_lane; i++) {
        const lsa_status ended = lsa_lane_finish(s->lane[i], st != LSA_OK, st == LSA_OK ? err : NULL);
        if (st == LSA_OK) st = ended;
    }
    return st;
}

int64_t lsa_sink_sealed(lsa_sink *s) {
    return atomic_load(&s->sealed);
}

double lsa_sink_seconds(lsa_sink *s) {
    double sum = s->seconds;
    for (int32_t i = 0; i < s->n_lane; i++) sum += lsa_lane_seconds(s->lane[i]);
    return s->n_lane ? sum / s->n_lane : sum;
}
