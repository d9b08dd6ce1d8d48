/* Documents and windows: see source.h. The mistake that would stay silent: pairing a window with the hidden
 * vector of its own first token instead of the token before it. */
#include "trainer/source.h"

#include <math.h>
#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

typedef struct slot {
    lsa_train_doc d;
    int64_t used; /* tick of the last use; -1 empty */
    bool pinned;
} slot;

struct lsa_source {
    lsa_shards *shards;
    const lsa_recipe *r;
    lsa_indexer_geom geom;
    bool need_mass;
    int64_t n_train, n_doc, bytes, tick;
    slot *slot;          /* one per document */
    int64_t *n_window;   /* reference mode: -1 not counted yet */
    int64_t **ref_start; /* reference mode: tokens with a non-empty window */
};

lsa_status lsa_source_open(lsa_source **out, const char *dir, const lsa_recipe *r,
                           const lsa_indexer_geom *geom, bool need_mass, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_source *s = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(s, 1, err));
    s->r = r;
    s->geom = *geom;
    s->need_mass = need_mass || geom->prior;
    LSA_TRY(lsa_shards_open(&s->shards, dir, err));
    const lsa_shards_info *f = lsa_shards_get_info(s->shards);
    if (f->hidden != geom->hidden)
        LSA_FAIL(LSA_E_CONFIG, "the shards hold hidden vectors of %d, the indexer reads %d", f->hidden,
                 geom->hidden);
    for (int32_t l = 0; l < geom->n_layer; l++)
        if (geom->ord[l].v >= f->n_csa || f->csa_id[geom->ord[l].v].v != geom->id[l].v ||
            !f->has_keys[geom->ord[l].v])
            LSA_FAIL(LSA_E_CONFIG, "the shards hold no keys and hidden vectors of CSA layer %d (layer id %d)",
                     geom->ord[l].v, geom->id[l].v);
    if (need_mass && r->target == LSA_TARGET_NATIVE && !f->has_stats)
        LSA_FAIL(
            LSA_E_CONFIG,
            "the shards hold no /stats (imported, or dumped with --no-stats), which loss.kind kl and eval.metric captured need; "
            "train on votes: loss.kind focal or bce with loss.on layer and eval.metric f1, or recipes/reference.yaml");
    if (geom->prior && !f->has_stats)
        LSA_FAIL(
            LSA_E_CONFIG,
            "the shards hold no /stats (imported, or dumped with --no-stats), which model.prior needs: set "
            "it to false, or dump with statistics");
    if (r->min_layers < f->label_min_votes)
        LSA_FAIL(
            LSA_E_CONFIG,
            "sample.min_layers is %lld, but the shards hold only chunks with at least %d votes (imported); set it to %d or more",
            (long long)r->min_layers, f->label_min_votes, f->label_min_votes);
    if (need_mass && r->target == LSA_TARGET_DENSE && !f->has_dense)
        LSA_FAIL(LSA_E_CONFIG, "loss.target dense needs shards dumped with --dense-every");
    if (r->mode == LSA_MODE_REFERENCE && f->hidden_stride != 1)
        LSA_FAIL(
            LSA_E_CONFIG,
            "train.mode reference asks every token, but the shards keep hidden vectors every %d tokens; dump with --hidden-stride 1",
            f->hidden_stride);
    if (r->mode == LSA_MODE_LOOKAHEAD && r->stride % f->hidden_stride)
        LSA_FAIL(LSA_E_CONFIG, "window.stride %lld is not a multiple of the shards' hidden stride %d",
                 (long long)r->stride, f->hidden_stride);
    s->n_doc = f->n_doc;
    s->n_train = lsa_max_i64(0, f->n_doc - r->val_documents);
    LSA_TRY(LSA_NEW(s->slot, s->n_doc, err));
    LSA_TRY(LSA_NEW(s->n_window, s->n_doc, err));
    LSA_TRY(lsa_alloc_((void **)&s->ref_start, s->n_doc, sizeof *s->ref_start, "windows", err));
    for (int64_t i = 0; i < s->n_doc; i++) {
        s->slot[i].used = -1;
        s->n_window[i] = -1;
    }
    *out = s;
    s = NULL;
done:
    lsa_source_close(s);
    return st;
}

void lsa_train_doc_fini(lsa_train_doc *d) {
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) {
        lsa_free(d->hidden[l]);
        lsa_free(d->key[l]);
        lsa_csr_fini(&d->mass[l]);
        lsa_csr_fini(&d->native[l]);
    }
    lsa_observed_fini(&d->observed);
    lsa_free(d->hidden_pos);
    lsa_free(d->trivial);
    lsa_csr_fini(&d->labels);
    memset(d, 0, sizeof *d);
}

void lsa_source_close(lsa_source *s) {
    if (!s) return;
    for (int64_t i = 0; s->slot && i < s->n_doc; i++) lsa_train_doc_fini(&s->slot[i].d);
    for (int64_t i = 0; s->ref_start && i < s->n_doc; i++) lsa_free(s->ref_start[i]);
    lsa_free(s->slot);
    lsa_free(s->n_window);
    lsa_free(s->ref_start);
    lsa_shards_close(s->shards);
    lsa_free(s);
}

const lsa_shards *lsa_source_shards(const lsa_source *s) {
    return s->shards;
}
int64_t lsa_source_n_train(const lsa_source *s) {
    return s->n_train;
}
int64_t lsa_source_n_doc(const lsa_source *s) {
    return s->n_doc;
}

/* First window start with something to choose from, on the stride, whose query token exists. */
static int64_t first_start(const lsa_recipe *r) {
    int64_t s = r->stride;
    while (s < 1 || (r->exclude_resident ? lsa_evictable(s, r->tail) : s / LSA_CHUNK) < 1) s += r->stride;
    return s;
}

/* The same for a document whose rows begin at first_position: the query token must be one of them. */
static int64_t doc_start(const lsa_recipe *r, const lsa_shards_doc *d) {
    const int64_t s = first_start(r), late = d->first_position + 1 - s;
    return late > 0 ? s + lsa_ceil_div(late, r->stride) * r->stride : s;
}

static int64_t lookahead_windows(const lsa_recipe *r, const lsa_shards_doc *d) {
    const int64_t first = doc_start(r, d),
                  last = d->first_position + d->n_row - r->tau; /* windows cut by the end are dropped */
    return last < first ? 0 : (last - first) / r->stride + 1;
}

/* Tokens of a document whose window holds a golden chunk (notes 7.1). */
static lsa_status reference_windows(lsa_source *s, int64_t doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_csr c = {0};
    int64_t *next = NULL; /* first token at or after t that has a golden chunk */
    LSA_TRY(lsa_shards_labels(&c, s->shards, doc, err));
    LSA_TRY(LSA_NEW(next, c.n_row + 1, err));
    LSA_TRY(LSA_NEW(s->ref_start[doc], c.n_row, err));
    next[c.n_row] = INT64_MAX;
    for (int64_t t = c.n_row - 1; t >= 0; t--) {
        bool any = false;
        for (int64_t j = c.begin[t]; j < c.begin[t + 1]; j++) any = any || c.votes[j] >= s->r->min_layers;
        next[t] = any ? t : next[t + 1];
    }
    int64_t n = 0;
    for (int64_t t = 0; t < c.n_row; t += s->r->stride)
        if (next[t] < t + s->r->tau) s->ref_start[doc][n++] = t;
    s->n_window[doc] = n;
done:
    lsa_free(next);
    lsa_csr_fini(&c);
    return st;
}

lsa_status lsa_source_n_window(int64_t *out, lsa_source *s, int64_t doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (s->n_window[doc] < 0) {
        if (s->r->mode == LSA_MODE_REFERENCE) {
            LSA_TRY(reference_windows(s, doc, err));
        } else {
            const lsa_shards_doc d = lsa_shards_get_doc(s->shards, doc);
            s->n_window[doc] = lookahead_windows(s->r, &d);
        }
    }
    *out = s->n_window[doc];
done:
    return st;
}

static lsa_status mark_trivial(lsa_train_doc *d, int64_t min_layers, lsa_err *err) {
    int32_t *count = NULL;
    lsa_status st = LSA_NEW(count, d->info.n_key, err);
    if (st == LSA_OK) st = LSA_NEW(d->trivial, d->info.n_key, err);
    if (st == LSA_OK) {
        for (int64_t j = 0; j < d->labels.n_entry; j++)
            count[d->labels.chunk[j]] += d->labels.votes[j] >= min_layers;
        for (int64_t c = 0; c < d->info.n_key; c++)
            d->trivial[c] = (double)count[c] > 0.8 * (double)d->info.n_row;
    }
    lsa_free(count);
    return st;
}

int64_t lsa_source_doc_bytes(const lsa_source *s, int64_t doc) {
    const lsa_shards_doc d = lsa_shards_get_doc(s->shards, doc);
    return s->geom.n_layer * (d.n_hidden * 2 * (int64_t)s->geom.hidden + d.n_key * LSA_KEY_BYTES);
}

lsa_status lsa_source_load(lsa_train_doc *d, const lsa_source *s, int64_t doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_shards_info *f = lsa_shards_get_info(s->shards);
    d->doc = doc;
    d->info = lsa_shards_get_doc(s->shards, doc);
    d->bytes = 4096;
    for (int32_t l = 0; l < s->geom.n_layer; l++) {
        lsa_free(d->hidden_pos);
        d->hidden_pos = NULL;
        LSA_TRY(lsa_shards_hidden(&d->hidden_pos, &d->hidden[l], s->shards, doc, s->geom.ord[l], err));
        LSA_TRY(lsa_shards_keys(&d->key[l], s->shards, doc, s->geom.ord[l], err));
        d->bytes += d->info.n_hidden * (2 * (int64_t)f->hidden + 8) + d->info.n_key * LSA_KEY_BYTES;
    }
    LSA_TRY(lsa_shards_labels(&d->labels, s->shards, doc, err));
    d->bytes += d->labels.n_entry * 5 + d->labels.n_row * 8;
    for (int32_t o = 0; s->need_mass && o < f->n_csa; o++) {
        if (s->r->target == LSA_TARGET_DENSE && f->has_stats) {
            LSA_TRY(lsa_shards_stats(&d->native[o], s->shards, doc, (lsa_csa_ord){o}, err));
            lsa_free(d->native[o].logit);
            d->native[o].logit = NULL;
            d->bytes += d->native[o].n_entry * 6 + d->native[o].n_row * 8;
        }
        if (s->r->target == LSA_TARGET_NATIVE)
            LSA_TRY(lsa_shards_stats(&d->mass[o], s->shards, doc, (lsa_csa_ord){o}, err));
        else
            LSA_TRY(lsa_shards_dense(&d->mass[o], s->shards, doc, (lsa_csa_ord){o}, err));
        lsa_free(d->mass[o].logit);
        d->mass[o].logit = NULL;
        d->bytes += d->mass[o].n_entry * 6 + d->mass[o].n_row * 8;
    }
    if (s->geom.prior) {
        const lsa_csr *native = s->r->target == LSA_TARGET_DENSE ? d->native : d->mass;
        LSA_TRY(lsa_observed_build(&d->observed, native, f->n_csa, d->info.first_position, d->info.n_row,
                                   d->info.n_key, s->r->tau, err));
        d->bytes += lsa_observed_bytes(&d->observed);
    }
    if (s->r->trivial || s->r->mode == LSA_MODE_REFERENCE) LSA_TRY(mark_trivial(d, s->r->min_layers, err));
done:
    if (st != LSA_OK) lsa_train_doc_fini(d);
    return st;
}

static void make_room(lsa_source *s) {
    const int64_t limit = s->r->cache_mib << 20;
    while (s->bytes > limit) {
        int64_t old = -1;
        for (int64_t i = 0; i < s->n_doc; i++)
            if (s->slot[i].used >= 0 && !s->slot[i].pinned &&
                (old < 0 || s->slot[i].used < s->slot[old].used))
                old = i;
        if (old < 0) return; /* what a batch needs stays, whatever the budget */
        s->bytes -= s->slot[old].d.bytes;
        lsa_train_doc_fini(&s->slot[old].d);
        s->slot[old].used = -1;
    }
}

lsa_status lsa_source_get(const lsa_train_doc **out, lsa_source *s, int64_t doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    slot *x = &s->slot[doc];
    if (x->used < 0) {
        LSA_TRY(lsa_source_load(&x->d, s, doc, err));
        s->bytes += x->d.bytes;
    }
    x->used = s->tick++;
    x->pinned = true;
    make_room(s);
    *out = &x->d;
done:
    return st;
}

void lsa_source_unpin(lsa_source *s) {
    for (int64_t i = 0; i < s->n_doc; i++) s->slot[i].pinned = false;
}

lsa_status lsa_window_at(lsa_window *w, const lsa_source *s, const lsa_train_doc *d, int64_t i,
                         lsa_err *err) {
    const lsa_recipe *r = s->r;
    const int64_t stride = lsa_shards_get_info(s->shards)->hidden_stride;
    if (r->mode == LSA_MODE_REFERENCE) {
        w->start = d->info.first_position + s->ref_start[d->doc][i];
        w->end = lsa_min_i64(w->start + r->tau, d->info.first_position + d->info.n_row);
        w->query = w->start;
        w->n_cand = d->info.n_key; /* future chunks included: notes D4 */
    } else {
        w->start = doc_start(r, &d->info) + i * r->stride;
        w->end = w->start + r->tau;
        w->query = w->start - 1;
        w->n_cand = !r->causal            ? d->info.n_key
                    : r->exclude_resident ? lsa_evictable(w->start, r->tail)
                                          : w->start / LSA_CHUNK;
    }
    w->hidden_row = (w->query + 1) / stride - 1 - d->info.first_position / stride;
    if (w->hidden_row < 0 || w->hidden_row >= d->info.n_hidden || d->hidden_pos[w->hidden_row] != w->query ||
        w->n_cand > d->info.n_key)
        LSA_RET_FAIL(
            LSA_E_FORMAT,
            "document %lld has no hidden vector of token %lld; the shards are damaged: run 'lsa-dump verify'",
            (long long)d->doc, (long long)w->query);
    return LSA_OK;
}

/* mass[c] = what the rows of the window hold on chunk c, to this power, over all layers, in row order within
 * a layer. */
static void sum_mass(float *mass, const lsa_csr *layer, double power, const lsa_train_doc *d,
                     const lsa_window *w) {
    const int64_t start = w->start - d->info.first_position, end = w->end - d->info.first_position;
    memset(mass, 0, (size_t)w->n_cand * sizeof *mass);
    for (int32_t o = 0; o < LSA_MAX_CSA; o++) {
        const lsa_csr *m = &layer[o];
        if (m->n_row == 0) continue;
        int64_t a = start, b = end;
        if (m->row) { /* sampled rows only */
            a = 0;
            while (a < m->n_row && m->row[a] < start) a++;
            b = a;
            while (b < m->n_row && m->row[b] < end) b++;
        }
        for (int64_t j = m->begin[a]; j < m->begin[b]; j++)
            if (m->chunk[j] < w->n_cand) {
                const float x = lsa_f16_to_f32(m->mass[j]);
                mass[m->chunk[j]] += power == 1 ? x : powf(x, (float)power);
            }
    }
}

void lsa_window_needs(float *mass, uint8_t *votes, const lsa_source *s, const lsa_train_doc *d,
                      const lsa_window *w) {
    if (votes) {
        memset(votes, 0, (size_t)w->n_cand);
        const int64_t row = d->info.first_position;
        for (int64_t j = d->labels.begin[w->start - row]; j < d->labels.begin[w->end - row]; j++) {
            const int32_t c = d->labels.chunk[j];
            const uint8_t v = d->labels.votes[j];
            if (c < w->n_cand && v >= s->r->min_layers && v > votes[c]) votes[c] = v;
        }
    }
    if (mass) sum_mass(mass, d->mass, s->r->sharpen, d, w);
}

void lsa_window_native(float *mass, double power, const lsa_train_doc *d, const lsa_window *w) {
    bool apart = false;
    for (int32_t o = 0; o < LSA_MAX_CSA; o++) apart = apart || d->native[o].n_row > 0;
    sum_mass(mass, apart ? d->native : d->mass, power, d, w);
}
