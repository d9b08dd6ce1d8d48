/* Batches: see batch.h. Sampling is keyed by (seed, epoch, document, query token, chunk), so it does not
 * depend on batch size, order or threads, and the GPU step (kernels/cuda/step/sample.cu) draws the same
 * chunks. */
#include "trainer/batch.h"

#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"

/* ---- arrays ---- */

void lsa_batch_fini(lsa_batch *b) {
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) {
        lsa_free(b->x[l]);
        lsa_free(b->key[l]);
    }
    void *p[] = {b->position, b->key_base,   b->n_cand, b->cand,   b->y,      b->weight,  b->doc,
                 b->start,    b->row_weight, b->shard,  b->recent, b->memory, b->observed};
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
    lsa_free(b->observed);
    b->observed = NULL;
    LSA_TRY(lsa_alloc_((void **)&b->observed, m, sizeof *b->observed, "batch", err));
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

static lsa_status room_prior(lsa_batch *b, int64_t mn, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (mn <= b->cap_prior) return LSA_OK;
    ROOM(b->recent, mn);
    ROOM(b->memory, mn);
    b->cap_prior = mn;
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

void lsa_batch_counts_add(lsa_batch_counts *a, const lsa_batch_counts *b) {
    a->n_elem += b->n_elem;
    a->n_pair += b->n_pair;
    a->n_balanced += b->n_balanced;
    a->row_weights += b->row_weights;
}

lsa_status lsa_batch_next(lsa_batch *b, lsa_source *s, lsa_order *o, const lsa_recipe *r,
                          const lsa_indexer_geom *g, lsa_cursor *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t rows = lsa_order_rows(o), n_shard = lsa_order_share(o), m = rows * n_shard;
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
        lsa_place p;
        LSA_TRY(lsa_order_at(&p, o, lsa_order_first(o) + i / rows, c->asked + i % rows, err));
        epoch[i] = p.epoch;
        LSA_TRY(lsa_source_get(&doc[i], s, p.doc, err));
        LSA_TRY(lsa_window_at(&w[i], s, doc[i], p.window, err));
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
    b->has_prior = g->prior;
    if (g->prior) LSA_TRY(room_prior(b, m * b->n, err));
    for (int64_t i = 0; i < m && g->prior; i++) b->observed[i] = &doc[i]->observed;
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
    if (b->n_shard != n_shard) ROOM(b->shard, n_shard);
    b->n_shard = n_shard;
    memset(b->shard, 0, (size_t)n_shard * sizeof *b->shard);
    for (int64_t i = 0; i < m; i++) {
        lsa_batch_counts *const k = &b->shard[i / rows];
        k->n_elem += b->n_cand[i];
        k->n_balanced += n_pos[i];
        k->n_pair += n_pos[i] * (b->n_cand[i] - n_pos[i]);
        if (kl) k->row_weights += (double)b->row_weight[i];
    }
    b->count = (lsa_batch_counts){0};
    for (int64_t v = 0; v < n_shard; v++) lsa_batch_counts_add(&b->count, &b->shard[v]);
    c->asked += rows;
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
    b->has_prior = g->prior;
    if (g->prior) LSA_TRY(room_prior(b, m * b->n, err));
    for (int64_t i = 0; i < m && g->prior; i++) b->observed[i] = &d->observed;
    LSA_TRY(room_keys(b, d->info.n_key, g, err));
    for (int32_t l = 0; l < g->n_layer; l++)
        memcpy(b->key[l], d->key[l], (size_t)(d->info.n_key * LSA_KEY_BYTES));
    b->n_key = d->info.n_key;
done:
    return st;
}
