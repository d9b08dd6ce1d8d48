/* Gathering and sealing: see sink.h.
 *
 * DURABLE: manifest.json is replaced after each sealed shard; a sealed file that it does not name (killed in
 * between) is simply written again. */
#include "data/dump/sink.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/clock.h"
#include "kernels/core/mem.h"

typedef struct shard {
    LSA_VEC(lsa_doc_stats) doc;
    int64_t bytes;
} shard;

struct lsa_sink {
    lsa_manifest *m;
    const char *out;
    int64_t shard_bytes;
    shard *open;
    lsa_lane *lane; /* NULL: sealed by who adds */
    double seconds;
    _Atomic int64_t sealed;
};

static void drop_shard(void *item) {
    shard *const x = item;
    for (int64_t i = 0; x && i < x->doc.len; i++) lsa_doc_stats_fini(&x->doc.data[i]);
    if (x) lsa_free(x->doc.data);
    lsa_free(x);
}

static lsa_status seal(void *user, void *item, lsa_err *err) {
    lsa_sink *const s = user;
    const shard *const x = item;
    lsa_status st = LSA_OK;
    lsa_manifest_shard named;
    char file[64];
    snprintf(file, sizeof file, "shard_%05lld.h5", (long long)s->m->shard.len);
    LSA_TRY(lsa_shard_seal(&named, s->out, file, &s->m->info, x->doc.data, x->doc.len, err));
    LSA_TRY(lsa_manifest_add(s->m, &named, err));
    LSA_TRY(lsa_manifest_save(s->m, s->out, err));
    atomic_store(&s->sealed, s->m->info.n_doc);
done:
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
    LSA_TRY(LSA_NEW(s->open, 1, err));
    if (behind) LSA_TRY(lsa_lane_create(&s->lane, "sealing", 2 * shard_bytes, seal, drop_shard, s, err));
    *out_sink = s;
    s = NULL;
done:
    lsa_sink_destroy(s);
    return st;
}

void lsa_sink_destroy(lsa_sink *s) {
    if (!s) return;
    lsa_lane_destroy(s->lane);
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
    if (s->lane) {
        shard *const given = full;
        LSA_TRY(lsa_lane_reserve(s->lane, given->bytes, err));
        full = NULL; /* the lane's, whatever comes */
        LSA_TRY(lsa_lane_give(s->lane, given, given->bytes, err));
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
    const lsa_status st = close_shard(s, err), ended = lsa_lane_finish(s->lane, st != LSA_OK, err);
    return st != LSA_OK ? st : ended;
}

int64_t lsa_sink_sealed(lsa_sink *s) {
    return atomic_load(&s->sealed);
}

double lsa_sink_seconds(lsa_sink *s) {
    return s->lane ? lsa_lane_seconds(s->lane) : s->seconds;
}
