/* The order of windows: see order.h. The mistake that would stay silent: letting anything that belongs to a
 * rank (its number, its share) into a random key, so that runs on different numbers of ranks train on
 * different samples. */
#include "trainer/order.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"

typedef struct shard {
    int64_t n_doc, n_window, bytes;
    int64_t *doc;            /* [n_doc] its documents, ascending */
    int64_t epoch;           /* which the rest describes; -1 none */
    int64_t *perm;           /* documents in the epoch's order */
    int64_t *at;             /* [n_doc+1] windows before the i-th of them */
    int64_t n_group, *group; /* [n_group+1] first place in perm of each group */
    bool whole;              /* every epoch is one group */
    int64_t shuffled, *mix;  /* windows of this group of the epoch, shuffled; -1: of none */
} shard;

struct lsa_order {
    const lsa_recipe *r;
    int64_t n_doc, n_window, n_shard, first, share;
    int64_t *windows, *bytes; /* [n_doc] */
    shard *shard;
};

/* ---- dealing ---- */

typedef struct piece {
    int64_t work, i;
} piece;

static int by_work(const void *a, const void *b) {
    const piece *x = a, *y = b;
    if (x->work != y->work) return x->work < y->work ? 1 : -1;
    return (x->i > y->i) - (x->i < y->i);
}

lsa_status lsa_deal(int32_t *to, const int64_t *work, int64_t n, int64_t n_to, lsa_err *err) {
    lsa_status st = LSA_OK;
    piece *p = NULL;
    int64_t *sum = NULL;
    LSA_TRY(LSA_NEW(p, n, err));
    LSA_TRY(LSA_NEW(sum, n_to, err));
    for (int64_t i = 0; i < n; i++) p[i] = (piece){work[i], i};
    if (n > 1) qsort(p, (size_t)n, sizeof *p, by_work);
    for (int64_t k = 0; k < n; k++) {
        int64_t least = 0;
        for (int64_t t = 1; t < n_to; t++)
            if (sum[t] < sum[least]) least = t;
        to[p[k].i] = (int32_t)least;
        sum[least] += p[k].work;
    }
done:
    lsa_free(p);
    lsa_free(sum);
    return st;
}

static lsa_status deal_documents(lsa_order *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    int32_t *to = NULL;
    LSA_TRY(LSA_NEW(to, o->n_doc, err));
    LSA_TRY(lsa_deal(to, o->windows, o->n_doc, o->n_shard, err));
    LSA_TRY(LSA_NEW(o->shard, o->n_shard, err));
    for (int64_t d = 0; d < o->n_doc; d++) o->shard[to[d]].n_doc++;
    for (int64_t v = 0; v < o->n_shard; v++) {
        shard *const s = &o->shard[v];
        LSA_TRY(LSA_NEW(s->doc, s->n_doc, err));
        LSA_TRY(LSA_NEW(s->perm, s->n_doc, err));
        LSA_TRY(LSA_NEW(s->at, s->n_doc + 1, err));
        LSA_TRY(LSA_NEW(s->group, s->n_doc + 1, err));
        s->epoch = -1;
        s->n_doc = 0;
    }
    for (int64_t d = 0; d < o->n_doc; d++) {
        shard *const s = &o->shard[to[d]];
        s->doc[s->n_doc++] = d;
        s->n_window += o->windows[d];
        s->bytes += o->bytes[d];
    }
    for (int64_t v = 0; v < o->n_shard; v++) {
        shard *const s = &o->shard[v];
        s->whole = s->bytes <= (o->r->pool_mib << 20) / o->n_shard || s->n_window < 2 * lsa_order_rows(o);
    }
    for (int64_t v = 0; v < o->n_shard && o->r->order == LSA_ORDER_SHUFFLED; v++)
        LSA_TRY(LSA_NEW(o->shard[v].mix, o->shard[v].n_window, err));
done:
    lsa_free(to);
    return st;
}

/* The rank's share of the shards. */
static lsa_status take_share(lsa_order *o, int rank, int size, lsa_err *err) {
    if (o->n_shard % size) {
        char legal[160] = "";
        size_t at = 0;
        for (int64_t w = 1; w <= o->n_shard && at + 24 < sizeof legal; w++)
            if (o->n_shard % w == 0)
                at += (size_t)snprintf(legal + at, sizeof legal - at, "%s%lld", at ? ", " : "", (long long)w);
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "%d ranks do not divide %lld virtual shards: start %s ranks, or set data.virtual_shards to %lld or %lld "
            "(as long as so many documents have windows)",
            size, (long long)o->n_shard, legal,
            (long long)(o->n_shard < size ? size : o->n_shard / size * size),
            (long long)(o->n_shard / size * size + (o->n_shard < size ? 2 : 1) * size));
    }
    o->share = o->n_shard / size;
    o->first = rank * o->share;
    return LSA_OK;
}

lsa_status lsa_order_create(lsa_order **out, lsa_source *s, const lsa_recipe *r, int rank, int size,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_order *o = NULL;
    int64_t filled = 0;
    *out = NULL;
    LSA_TRY(LSA_NEW(o, 1, err));
    o->r = r;
    o->n_doc = lsa_source_n_train(s);
    LSA_TRY(LSA_NEW(o->windows, o->n_doc, err));
    LSA_TRY(LSA_NEW(o->bytes, o->n_doc, err));
    for (int64_t d = 0; d < o->n_doc; d++) {
        LSA_TRY(lsa_source_n_window(&o->windows[d], s, d, err));
        o->bytes[d] = lsa_source_doc_bytes(s, d);
        o->n_window += o->windows[d];
        filled += o->windows[d] > 0;
    }
    if (o->n_window == 0 && r->mode == LSA_MODE_REFERENCE)
        LSA_FAIL(
            LSA_E_CONFIG,
            "no window to train on: in %lld training documents (%lld held out) no chunk has sample.min_layers = %lld votes; lower it, or "
            "sample.val_documents",
            (long long)o->n_doc, (long long)r->val_documents, (long long)r->min_layers);
    if (o->n_window == 0)
        LSA_FAIL(
            LSA_E_CONFIG,
            "no window to train on: %lld training documents (%lld held out), tau %lld, tail %lld; documents must be longer than "
            "tail + tau tokens and sample.val_documents smaller than their number",
            (long long)o->n_doc, (long long)r->val_documents, (long long)r->tau, (long long)r->tail);
    o->n_shard = lsa_min_i64(r->virtual_shards, filled);
    while (r->virtual_shards % o->n_shard) o->n_shard--;
    LSA_TRY(take_share(o, rank, size, err));
    LSA_TRY(deal_documents(o, err));
    *out = o;
    o = NULL;
done:
    lsa_order_destroy(o);
    return st;
}

void lsa_order_destroy(lsa_order *o) {
    if (!o) return;
    for (int64_t v = 0; o->shard && v < o->n_shard; v++) {
        void *p[] = {o->shard[v].doc, o->shard[v].perm, o->shard[v].at, o->shard[v].group, o->shard[v].mix};
        for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    }
    lsa_free(o->shard);
    lsa_free(o->windows);
    lsa_free(o->bytes);
    lsa_free(o);
}

int64_t lsa_order_epoch_windows(const lsa_order *o) {
    return o->n_window;
}
int64_t lsa_order_shards(const lsa_order *o) {
    return o->n_shard;
}
int64_t lsa_order_first(const lsa_order *o) {
    return o->first;
}
int64_t lsa_order_share(const lsa_order *o) {
    return o->share;
}
int64_t lsa_order_rows(const lsa_order *o) {
    return o->r->batch / o->n_shard;
}
int64_t lsa_order_epoch(const lsa_order *o, const lsa_cursor *c) {
    return c->asked > 0 ? (c->asked * o->n_shard - 1) / o->n_window : 0;
}

/* ---- an epoch ---- */

static void shuffle(int64_t *p, int64_t n, uint64_t key, uint64_t hi) {
    lsa_rng g = lsa_rng_make(key, hi);
    for (int64_t i = 0; i < n; i++) p[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)lsa_rng_below(&g, (uint64_t)i + 1), x = p[i];
        p[i] = p[j];
        p[j] = x;
    }
}

/* The shard in the upper bits of a stream number: shard 0 draws what a run of one shard draws. */
static uint64_t stream(int64_t v, int64_t i) {
    return (uint64_t)v << 40 | (uint64_t)i;
}

/* Groups: documents that are in memory together. Two groups fit the shard's part of the pool (one in use, one
 * on its way); but none has fewer windows than a step takes, so that a step needs two groups at most. */
static void make_groups(const lsa_order *o, shard *s) {
    const int64_t half = (o->r->pool_mib << 20) / o->n_shard / 2, rows = lsa_order_rows(o);
    int64_t bytes = 0;
    s->n_group = 1;
    s->group[0] = 0;
    for (int64_t i = 0; i < s->n_doc && !s->whole; i++) {
        const int64_t first = s->group[s->n_group - 1], b = o->bytes[s->perm[i]];
        if (bytes + b > half && s->at[i] - s->at[first] >= rows && s->n_window - s->at[i] >= rows) {
            s->group[s->n_group++] = i;
            bytes = 0;
        }
        bytes += b;
    }
    s->group[s->n_group] = s->n_doc;
}

static shard *epoch_of(lsa_order *o, int64_t v, int64_t epoch) {
    shard *const s = &o->shard[v];
    if (s->epoch == epoch) return s;
    shuffle(s->perm, s->n_doc, lsa_mix64((uint64_t)o->r->seed, 201), stream(v, epoch));
    for (int64_t i = 0; i < s->n_doc; i++) {
        s->perm[i] = s->doc[s->perm[i]];
        s->at[i + 1] = s->at[i] + o->windows[s->perm[i]];
    }
    make_groups(o, s);
    s->epoch = epoch;
    s->shuffled = -1;
    return s;
}

/* Largest i with begin[i] <= x, for x < begin[n]; skips empty parts. */
static int64_t find_part(const int64_t *begin, int64_t n, int64_t x) {
    int64_t lo = 0, hi = n - 1;
    while (lo < hi) {
        const int64_t mid = (lo + hi + 1) / 2;
        if (begin[mid] <= x)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

static int64_t group_at(const shard *s, int64_t index) {
    int64_t g = 0;
    while (g + 1 < s->n_group && s->at[s->group[g + 1]] <= index) g++;
    return g;
}

lsa_status lsa_order_at(lsa_place *out, lsa_order *o, int64_t v, int64_t k, lsa_err *err) {
    if (v < 0 || v >= o->n_shard || k < 0)
        LSA_RET_FAIL(LSA_E_FORMAT, "window %lld of virtual shard %lld: there are %lld shards", (long long)k,
                     (long long)v, (long long)o->n_shard);
    const int64_t n = o->shard[v].n_window, epoch = k / n;
    shard *const s = epoch_of(o, v, epoch);
    int64_t index = k % n;
    const int64_t g = group_at(s, index);
    if (o->r->order == LSA_ORDER_SHUFFLED) {
        const int64_t first = s->at[s->group[g]];
        if (s->shuffled != g)
            shuffle(s->mix, s->at[s->group[g + 1]] - first,
                    lsa_mix64(lsa_mix64((uint64_t)o->r->seed, 203), (uint64_t)epoch), stream(v, g));
        s->shuffled = g;
        index = first + s->mix[index - first];
    }
    const int64_t i = find_part(s->at, s->n_doc, index);
    *out = (lsa_place){s->perm[i], index - s->at[i], epoch, g};
    return LSA_OK;
}

bool lsa_order_whole(const lsa_order *o, int64_t v) {
    return o->shard[v].whole;
}
int64_t lsa_order_groups(lsa_order *o, int64_t v, int64_t epoch) {
    return epoch_of(o, v, epoch)->n_group;
}
int64_t lsa_order_group_docs(lsa_order *o, int64_t v, int64_t epoch, int64_t g, const int64_t **doc) {
    const shard *const s = epoch_of(o, v, epoch);
    *doc = s->perm + s->group[g];
    return s->group[g + 1] - s->group[g];
}
