/* Batches: see batch.h. Sampling is keyed by (seed, epoch, document, query token, chunk), so it does not
 * depend on batch size, order or threads, and the GPU step (kernels/cuda/step/sample.cu) draws the same
 * chunks. */
#include "trainer/batch.h"

#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"

/* ---- order ---- */

struct lsa_order {
    const lsa_recipe *r;
    int64_t n_doc, n_window, epoch;
    int64_t *begin;          /* [n_doc+1] windows before document i */
    int64_t *bytes;          /* [n_doc] keys and hidden vectors */
    int64_t *perm;           /* documents, of the current epoch */
    int64_t *at;             /* [n_doc+1] windows before the i-th document of the permutation */
    int64_t n_group, *group; /* [n_group+1] first place in perm of each group */
    int64_t shuffled, *mix;  /* windows of this group of the epoch, shuffled; -1: of none */
};

lsa_status lsa_order_create(lsa_order **out, lsa_source *s, const lsa_recipe *r, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_order *o = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(o, 1, err));
    o->r = r;
    o->n_doc = lsa_source_n_train(s);
    o->epoch = -1;
    LSA_TRY(LSA_NEW(o->begin, o->n_doc + 1, err));
    LSA_TRY(LSA_NEW(o->at, o->n_doc + 1, err));
    LSA_TRY(LSA_NEW(o->bytes, o->n_doc, err));
    LSA_TRY(LSA_NEW(o->group, o->n_doc + 1, err));
    for (int64_t d = 0; d < o->n_doc; d++) {
        int64_t n;
        LSA_TRY(lsa_source_n_window(&n, s, d, err));
        o->begin[d + 1] = o->begin[d] + n;
        o->bytes[d] = lsa_source_doc_bytes(s, d);
    }
    o->n_window = o->begin[o->n_doc];
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
    LSA_TRY(LSA_NEW(o->perm, o->n_doc, err));
    if (r->order == LSA_ORDER_SHUFFLED) LSA_TRY(LSA_NEW(o->mix, o->n_window, err));
    *out = o;
    o = NULL;
done:
    lsa_order_destroy(o);
    return st;
}

void lsa_order_destroy(lsa_order *o) {
    if (!o) return;
    lsa_free(o->begin);
    lsa_free(o->at);
    lsa_free(o->perm);
    lsa_free(o->bytes);
    lsa_free(o->group);
    lsa_free(o->mix);
    lsa_free(o);
}

int64_t lsa_order_epoch_windows(const lsa_order *o) {
    return o->n_window;
}

static void shuffle(int64_t *p, int64_t n, uint64_t key, uint64_t hi) {
    lsa_rng g = lsa_rng_make(key, hi);
    for (int64_t i = 0; i < n; i++) p[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)lsa_rng_below(&g, (uint64_t)i + 1), x = p[i];
        p[i] = p[j];
        p[j] = x;
    }
}

/* Groups: documents that are in memory together. Two groups fit the pool (one in use, one on its way), or all
 * documents are one group. */
static void make_groups(lsa_order *o) {
    int64_t total = 0, here = 0;
    const int64_t budget = o->r->pool_mib << 20;
    for (int64_t d = 0; d < o->n_doc; d++) total += o->bytes[d];
    o->n_group = 0;
    for (int64_t i = 0; i < o->n_doc; i++) {
        const int64_t b = o->bytes[o->perm[i]];
        if (i == 0 || (total > budget && here + b > budget / 2)) {
            o->group[o->n_group++] = i;
            here = 0;
        }
        here += b;
    }
    o->group[o->n_group] = o->n_doc;
}

static void shuffle_epoch(lsa_order *o, int64_t epoch) {
    shuffle(o->perm, o->n_doc, lsa_mix64((uint64_t)o->r->seed, 201), (uint64_t)epoch);
    for (int64_t i = 0; i < o->n_doc; i++)
        o->at[i + 1] = o->at[i] + o->begin[o->perm[i] + 1] - o->begin[o->perm[i]];
    make_groups(o);
    o->epoch = epoch;
    o->shuffled = -1;
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

lsa_status lsa_order_next(int64_t *doc, int64_t *window, lsa_order *o, lsa_cursor *c, lsa_err *err) {
    if (c->epoch < 0 || c->index < 0 || c->index > o->n_window)
        LSA_RET_FAIL(LSA_E_FORMAT, "cursor (epoch %lld, index %lld) does not fit %lld windows an epoch",
                     (long long)c->epoch, (long long)c->index, (long long)o->n_window);
    if (c->index == o->n_window) {
        c->epoch++;
        c->index = 0;
    }
    if (o->epoch != c->epoch) shuffle_epoch(o, c->epoch);
    int64_t index = c->index;
    if (o->r->order == LSA_ORDER_SHUFFLED) {
        int64_t g = 0;
        while (o->at[o->group[g + 1]] <= index) g++;
        const int64_t first = o->at[o->group[g]];
        if (o->shuffled != g)
            shuffle(o->mix, o->at[o->group[g + 1]] - first,
                    lsa_mix64(lsa_mix64((uint64_t)o->r->seed, 203), (uint64_t)c->epoch), (uint64_t)g);
        o->shuffled = g;
        index = first + o->mix[index - first];
    }
    const int64_t i = find_part(o->at, o->n_doc, index);
    *doc = o->perm[i];
    *window = index - o->at[i];
    c->index++;
    return LSA_OK;
}

int64_t lsa_order_group(const lsa_order *o, int64_t index) {
    int64_t g = 0;
    while (g + 1 < o->n_group && o->at[o->group[g + 1]] <= index) g++;
    return g;
}
int64_t lsa_order_groups(lsa_order *o, int64_t epoch) {
    if (o->epoch != epoch) shuffle_epoch(o, epoch);
    return o->n_group;
}
int64_t lsa_order_group_docs(lsa_order *o, int64_t epoch, int64_t g, const int64_t **doc) {
    if (o->epoch != epoch) shuffle_epoch(o, epoch);
    *doc = o->perm + o->group[g];
    return o->group[g + 1] - o->group[g];
}

/* ---- arrays ---- */

void lsa_batch_fini(lsa_batch *b) {
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) {
        lsa_free(b->x[l]);
        lsa_free(b->key[l]);
    }
    void *p[] = {b->position, b->key_base, b->n_cand, b->cand,      b->y,
                 b->weight,   b->doc,      b->start,  b->row_weight};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    memset(b, 0, sizeof *b);
}

/* Fresh, larger memory; contents are not kept (every batch is filled anew). */
#define ROOM(p, n)                                                                                           \
    do {                                                                                                     \
        lsa_free(p);                                                                                         \
        (p) = NULL;                                                                                          \
        LSA_TRY(LSA_NEW(p, n, err));                                                                         \
    } while (0)

static lsa_status room_rows(lsa_batch *b, int64_t m, const lsa_indexer_geom *g, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (m <= b->cap_m) return LSA_OK;
    for (int32_t l = 0; l < g->n_layer; l++) ROOM(b->x[l], m * g->hidden);
    ROOM(b->position, m);
    ROOM(b->key_base, m);
    ROOM(b->n_cand, m);
    ROOM(b->doc, m);
    ROOM(b->row_weight, m);
    ROOM(b->start, m);
    b->cap_m = m;
done:
    return st;
}

static lsa_status room_elems(lsa_batch *b, int64_t mn, bool cand, bool labels, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (mn <= b->cap_mn) return LSA_OK;
    if (labels) {
        ROOM(b->y, mn);
        ROOM(b->weight, mn);
    }
    if (cand) ROOM(b->cand, mn);
    b->cap_mn = mn;
done:
    return st;
}

static lsa_status room_keys(lsa_batch *b, int64_t n_key, const lsa_indexer_geom *g, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (n_key <= b->cap_key) return LSA_OK;
    for (int32_t l = 0; l < g->n_layer; l++) ROOM(b->key[l], n_key * LSA_KEY_BYTES);
    b->cap_key = n_key;
done:
    return st;
}

static void fill_query(lsa_batch *b, int64_t i, const lsa_train_doc *d, const lsa_window *w,
                       const lsa_indexer_geom *g) {
    b->position[i] = w->query;
    b->doc[i] = d->doc;
    b->start[i] = w->start;
    for (int32_t l = 0; l < g->n_layer; l++)
        for (int64_t j = 0; j < g->hidden; j++)
            b->x[l][i * g->hidden + j] = lsa_bf16_to_f32(d->hidden[l][w->hidden_row * g->hidden + j]);
}

/* The key pool: every document of the batch once; key_base of each query. */
static lsa_status fill_keys(lsa_batch *b, const lsa_train_doc *const *doc, int64_t m,
                            const lsa_indexer_geom *g, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t n = 0;
    for (int pass = 0; pass < 2; pass++) {
        n = 0;
        for (int64_t i = 0; i < m; i++) {
            int64_t first = i;
            for (int64_t j = 0; j < i && first == i; j++)
                if (doc[j] == doc[i]) first = j;
            if (first < i) {
                b->key_base[i] = b->key_base[first];
                continue;
            }
            b->key_base[i] = n;
            if (pass == 1)
                for (int32_t l = 0; l < g->n_layer; l++)
                    memcpy(b->key[l] + n * LSA_KEY_BYTES, doc[i]->key[l],
                           (size_t)(doc[i]->info.n_key * LSA_KEY_BYTES));
            n += doc[i]->info.n_key;
        }
        if (pass == 0) LSA_TRY(room_keys(b, n, g, err));
    }
    b->n_key = n;
done:
    return st;
}

/* ---- labels ---- */

float lsa_positive_weight(const lsa_recipe *r, const lsa_train_doc *d, int32_t chunk, uint8_t votes) {
    if ((r->trivial || r->mode == LSA_MODE_REFERENCE) && d->trivial && d->trivial[chunk]) return 0.5f;
    return r->weighted ? 0.5f + 1.5f * ((float)votes - 3.0f) / 18.0f : 1.0f;
}

/* The random word of a chunk in one window of one epoch. */
typedef struct draw {
    uint64_t key, hi;
} draw;
static uint32_t word_of(draw g, int32_t chunk) {
    return lsa_philox(g.key, (uint64_t)chunk >> 2, g.hi).v[chunk & 3];
}

/* Keeps the k of n ascending ids whose words are smallest (ties: the lower id), ascending. word is scratch of
 * n. */
static void choose(int32_t *id, int64_t n, int64_t k, draw g, uint32_t *word) {
    uint32_t prefix = 0;
    int64_t left = k, kept = 0;
    if (k >= n || k <= 0) return;
    for (int64_t i = 0; i < n; i++) word[i] = word_of(g, id[i]);
    for (int shift = 24; shift >= 0; shift -= 8) { /* the k-th smallest word, a byte at a time */
        int64_t count[256] = {0};
        for (int64_t i = 0; i < n; i++)
            if (shift == 24 || word[i] >> (shift + 8) == prefix) count[word[i] >> shift & 255]++;
        uint32_t b = 0;
        while (count[b] < left) left -= count[b++];
        prefix = prefix << 8 | b;
    }
    for (int64_t i = 0; i < n; i++)
        if (word[i] < prefix || (word[i] == prefix && left-- > 0)) id[kept++] = id[i];
}

/* What a window's row counts for under kl. */
static float row_weight(const lsa_recipe *r, double mass) {
    return mass > 0 ? r->by_mass ? (float)mass : 1.0f : 0.0f;
}

/* Positives and sampled negatives of one window into cand/y/weight of row i, each ascending. pos, neg and
 * word are scratch of n_cand. */
static int64_t sample_row(lsa_batch *b, int64_t i, const lsa_recipe *r, const lsa_train_doc *d,
                          const lsa_window *w, const uint8_t *votes, int64_t epoch, int32_t *pos,
                          int32_t *neg, uint32_t *word, int64_t *n_pos_out) {
    const draw g = {lsa_mix64(lsa_mix64((uint64_t)r->seed, 202), (uint64_t)epoch),
                    lsa_mix64((uint64_t)d->doc, (uint64_t)w->query)};
    int64_t n_pos = 0, n_neg = 0;
    for (int64_t c = 0; c < w->n_cand; c++) {
        if (votes[c])
            pos[n_pos++] = (int32_t)c;
        else
            neg[n_neg++] = (int32_t)c;
    }
    if (n_pos > r->max_pos) {
        choose(pos, n_pos, r->max_pos, g, word);
        n_pos = r->max_pos;
    }
    const int64_t want = lsa_min_i64(lsa_min_i64((int64_t)((double)n_pos * r->neg_ratio), r->max_neg), n_neg);
    choose(neg, n_neg, want, g, word);
    for (int64_t j = 0; j < n_pos + want; j++) {
        const int64_t at = i * b->n + j;
        const bool p = j < n_pos;
        b->cand[at] = p ? pos[j] : neg[j - n_pos];
        b->y[at] = p ? 1.0f : 0.0f;
        b->weight[at] = p ? lsa_positive_weight(r, d, pos[j], votes[pos[j]]) : 1.0f;
    }
    *n_pos_out = n_pos;
    return n_pos + want;
}

/* All candidates with labels 0/1, or the normalised target mass. */
static void full_row(lsa_batch *b, int64_t i, const lsa_recipe *r, const lsa_train_doc *d,
                     const lsa_window *w, const uint8_t *votes, float *y, int64_t *n_pos_out) {
    if (r->loss == LSA_LOSS_KL) {
        double sum = 0;
        for (int64_t c = 0; c < w->n_cand; c++) sum += (double)y[c];
        b->row_weight[i] = row_weight(r, sum);
        for (int64_t c = 0; c < w->n_cand && sum > 0; c++) y[c] = (float)((double)y[c] / sum);
        return;
    }
    int64_t n_pos = 0;
    for (int64_t c = 0; c < w->n_cand; c++) n_pos += votes[c] > 0;
    const float other = !r->balance ? 1.0f
                        : w->n_cand > n_pos
                            ? (float)(r->neg_ratio * (double)n_pos / (double)(w->n_cand - n_pos))
                            : 0.0f;
    for (int64_t c = 0; c < w->n_cand; c++) {
        y[c] = votes[c] ? 1.0f : 0.0f;
        b->weight[i * b->n + c] = votes[c] ? lsa_positive_weight(r, d, (int32_t)c, votes[c]) : other;
    }
    *n_pos_out = n_pos;
}

/* KL over sampled candidates: positives are the chunks with the most mass. */
static int64_t sample_kl_row(lsa_batch *b, int64_t i, const lsa_recipe *r, const lsa_train_doc *d,
                             const lsa_window *w, const float *mass, int64_t epoch, uint8_t *votes,
                             int32_t *pos, int32_t *neg, uint32_t *word) {
    int64_t n_pos;
    for (int64_t c = 0; c < w->n_cand; c++) votes[c] = mass[c] > 0.0f;
    const int64_t k = sample_row(b, i, r, d, w, votes, epoch, pos, neg, word, &n_pos);
    double sum = 0;
    for (int64_t j = 0; j < k; j++) sum += (double)mass[b->cand[i * b->n + j]];
    b->row_weight[i] = row_weight(r, sum);
    for (int64_t j = 0; j < k; j++)
        b->y[i * b->n + j] = sum > 0 ? (float)((double)mass[b->cand[i * b->n + j]] / sum) : 0.0f;
    return k;
}

lsa_status lsa_batch_next(lsa_batch *b, lsa_source *s, lsa_order *o, const lsa_recipe *r,
                          const lsa_indexer_geom *g, lsa_cursor *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t m = r->batch;
    const lsa_train_doc **doc = NULL;
    lsa_window *w = NULL;
    int64_t *epoch = NULL, *n_pos = NULL, widest = 0;
    const bool kl = r->loss == LSA_LOSS_KL, sampled = r->candidates == LSA_CAND_SAMPLED;
    LSA_TRY(lsa_alloc_((void **)&doc, m, sizeof *doc, "batch", err));
    LSA_TRY(LSA_NEW(w, m, err));
    LSA_TRY(LSA_NEW(epoch, m, err));
    LSA_TRY(LSA_NEW(n_pos, m, err));
    LSA_TRY(room_rows(b, m, g, err));
    lsa_source_unpin(s);
    for (int64_t i = 0; i < m; i++) {
        int64_t d, k;
        LSA_TRY(lsa_order_next(&d, &k, o, c, err));
        epoch[i] = c->epoch;
        LSA_TRY(lsa_source_get(&doc[i], s, d, err));
        LSA_TRY(lsa_window_at(&w[i], s, doc[i], k, err));
        fill_query(b, i, doc[i], &w[i], g);
        widest = lsa_max_i64(widest, w[i].n_cand);
    }
    b->m = m;
    b->has_cand = sampled;
    b->n = sampled
               ? lsa_min_i64(widest, r->max_pos + lsa_min_i64(r->max_neg,
                                                              (int64_t)((double)r->max_pos * r->neg_ratio)))
               : widest;
    LSA_TRY(fill_keys(b, doc, m, g, err));
    LSA_TRY(room_elems(b, m * b->n, sampled, true, err));
    bool failed = false;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < m; i++) {
        float *mass = NULL, *y = b->y + i * b->n;
        uint8_t *votes = NULL;
        int32_t *pos = NULL, *neg = NULL;
        uint32_t *word = NULL;
        const int64_t n = w[i].n_cand;
        if (LSA_NEW(votes, n, NULL) != LSA_OK ||
            (sampled && (LSA_NEW(pos, n, NULL) != LSA_OK || LSA_NEW(neg, n, NULL) != LSA_OK ||
                         LSA_NEW(word, n, NULL) != LSA_OK)) ||
            (kl && sampled && LSA_NEW(mass, n, NULL) != LSA_OK)) {
#pragma omp atomic write
            failed = true;
        } else {
            memset(y, 0, (size_t)b->n * sizeof *y);
            lsa_window_needs(kl ? (sampled ? mass : y) : NULL, kl ? NULL : votes, s, doc[i], &w[i]);
            int64_t k = n;
            if (kl && sampled)
                k = sample_kl_row(b, i, r, doc[i], &w[i], mass, epoch[i], votes, pos, neg, word);
            else if (sampled)
                k = sample_row(b, i, r, doc[i], &w[i], votes, epoch[i], pos, neg, word, &n_pos[i]);
            else
                full_row(b, i, r, doc[i], &w[i], votes, y, &n_pos[i]);
            b->n_cand[i] = (int32_t)k;
            for (int64_t j = k; sampled && j < b->n; j++) b->cand[i * b->n + j] = 0;
        }
        lsa_free(mass);
        lsa_free(votes);
        lsa_free(pos);
        lsa_free(neg);
        lsa_free(word);
    }
    if (failed) LSA_FAIL(LSA_E_NOMEM, "out of memory while making a batch");
    b->n_elem = b->n_pair = b->n_balanced = 0;
    b->row_weights = 0;
    for (int64_t i = 0; i < m; i++) {
        b->n_elem += b->n_cand[i];
        b->n_balanced += n_pos[i];
        b->n_pair += n_pos[i] * (b->n_cand[i] - n_pos[i]);
        if (kl) b->row_weights += (double)b->row_weight[i];
    }
done:
    lsa_free(doc);
    lsa_free(w);
    lsa_free(epoch);
    lsa_free(n_pos);
    return st;
}

lsa_status lsa_batch_document(lsa_batch *b, lsa_source *s, int64_t doc, int64_t first, int64_t m,
                              const lsa_indexer_geom *g, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_train_doc *d;
    lsa_source_unpin(s);
    LSA_TRY(lsa_source_get(&d, s, doc, err));
    LSA_TRY(room_rows(b, m, g, err));
    b->m = m;
    b->n = 0;
    b->has_cand = false;
    for (int64_t i = 0; i < m; i++) {
        lsa_window w;
        LSA_TRY(lsa_window_at(&w, s, d, first + i, err));
        fill_query(b, i, d, &w, g);
        b->n_cand[i] = (int32_t)w.n_cand;
        b->key_base[i] = 0;
        b->n = lsa_max_i64(b->n, w.n_cand);
    }
    LSA_TRY(room_keys(b, d->info.n_key, g, err));
    for (int32_t l = 0; l < g->n_layer; l++)
        memcpy(b->key[l], d->key[l], (size_t)(d->info.n_key * LSA_KEY_BYTES));
    b->n_key = d->info.n_key;
done:
    return st;
}
