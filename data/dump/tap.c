/* Taps: callbacks write into slots of their own (layer, position), so worker threads never meet. The slots of
 * what a layer selected lie where the shard has them: a row selects min(index_topk, visible) entries, so its
 * place is known before. Votes are bits over them.
 *
 * The mistake that would stay silent: storing hidden vectors of the wrong position (the query of window s is
 * s-1). */
#include "data/dump/tap.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "data/dump/votes.h"
#include "data/shard_internal.h"
#include "kernels/core/dtype.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/cpu/topk.h"

typedef struct dense_row {
    int32_t *chunk;
    uint16_t *mass;
    int32_t n;
    uint16_t rest;
} dense_row;

typedef struct layer_slots {
    int32_t *sel;            /* [n_entry]: rows begin at entries_before */
    uint16_t *logit, *mass;  /* same */
    int32_t *n_sel;          /* [n_token] */
    int32_t *vote;           /* [n_token, pool] voted chunks, if the pool is not what was selected */
    uint64_t *voted;         /* [n_token, words] of the row's entries of vote or sel */
    uint16_t *local, *sink;  /* [n_token] */
    uint16_t *hidden;        /* [n_hidden, d] */
    dense_row *dense;        /* [n_dense] */
    float *iq, *iw, *plogit; /* probes */
} layer_slots;

struct lsa_tap_state {
    const lsa_teacher_config *c;
    lsa_dump_rule rule;
    int64_t n_token, n_hidden, n_dense, n_entry, words;
    int64_t probe[LSA_MAX_PROBE], probe_at[LSA_MAX_PROBE + 1], n_probe;
    layer_slots layer[LSA_MAX_CSA];
    lsa_gpu_doc gpu; /* keys owned */
    lsa_taps taps;
    atomic_bool failed; /* out of memory inside a callback */
    atomic_bool sparse; /* a row selected fewer than it could */
};

/* Not zeroed, for what is written before it is read: the pages then come in by the threads that write. */
#define HUGE_PAGE (INT64_C(2) << 20)
static lsa_status blank(void **out, int64_t n, size_t size, lsa_err *err) {
    int64_t bytes = 0;
    *out = NULL;
    if (n <= 0) return LSA_OK;
    if (lsa_mul_i64(n, (int64_t)size, &bytes) && bytes <= INT64_MAX - HUGE_PAGE) {
        const int64_t unit = bytes >= 4 * HUGE_PAGE ? HUGE_PAGE : 64;
        *out = aligned_alloc((size_t)unit, (size_t)lsa_align_up(bytes, unit));
        /* advice, for fewer page faults */
        if (*out && unit > 64) (void)madvise(*out, (size_t)lsa_align_up(bytes, unit), MADV_HUGEPAGE);
    }
    if (!*out)
        LSA_RET_FAIL(LSA_E_NOMEM, "statistics of a document: %lld elements of %zu bytes refused",
                     (long long)n, size);
    return LSA_OK;
}
#define BLANK(p, n, err) blank((void **)&(p), (int64_t)(n), sizeof *(p), (err))

static bool on_dense_row(const lsa_tap_state *t, int64_t pos) {
    return t->rule.dense_every > 0 && (pos + 1) % t->rule.dense_every == 0;
}

static void take_dense(lsa_tap_state *t, layer_slots *l, const lsa_tap_csa *a) {
    dense_row *r = &l->dense[(a->position + 1) / t->rule.dense_every - 1];
    int64_t n = 0;
    double rest = 0;
    for (int64_t s = 0; s < a->n_visible; s++) n += (double)a->dense_mass[s] >= t->rule.dense_min;
    if (LSA_NEW(r->chunk, n, NULL) != LSA_OK || LSA_NEW(r->mass, n, NULL) != LSA_OK) {
        atomic_store(&t->failed, true);
        return;
    }
    for (int64_t s = 0; s < a->n_visible; s++) {
        if ((double)a->dense_mass[s] >= t->rule.dense_min) {
            r->chunk[r->n] = (int32_t)s;
            r->mass[r->n++] = lsa_f32_to_f16(a->dense_mass[s]);
        } else {
            rest += (double)a->dense_mass[s];
        }
    }
    r->rest = lsa_f32_to_f16((float)rest);
}

/* The first `rows` rows select so many, each as many as it can. */
static int64_t entries_before(const lsa_tap_state *t, int64_t rows) {
    const int64_t k = t->c->index_topk, whole = rows / LSA_CHUNK - 1, m = lsa_min_i64(whole, k);
    if (whole < 0) return 0;
    return LSA_CHUNK * (m * (m + 1) / 2 + (whole - m) * k) +
           (rows % LSA_CHUNK + 1) * lsa_min_i64(k, whole + 1);
}

static bool pool_is_selected(const lsa_tap_state *t) {
    return t->rule.pool == t->c->index_topk;
}

/* The candidates that voted bits stand for. */
static const int32_t *candidates(const lsa_tap_state *t, const layer_slots *l, int64_t row) {
    return pool_is_selected(t) ? l->sel + entries_before(t, row) : l->vote + row * t->rule.pool;
}

static void set_bit(uint64_t *bits, int64_t i) {
    bits[i / 64] |= UINT64_C(1) << i % 64;
}

static void take_votes(lsa_tap_state *t, layer_slots *l, const lsa_tap_csa *a) {
    const int32_t pool = t->rule.pool;
    uint64_t *const bits = l->voted + a->position * t->words;
    memset(bits, 0, (size_t)t->words * sizeof *bits);
    if (pool_is_selected(t)) {
        int32_t out[LSA_MAX_POOL];
        const int32_t n = lsa_votes(a->sel, a->n_sel, a->sel_logit, t->rule.top_p, out);
        for (int32_t i = 0, k = 0; i < n; i++, k++) { /* both ascend */
            while (a->sel[k] != out[i]) k++;
            set_bit(bits, k);
        }
        return;
    }
    int32_t *out = l->vote + a->position * pool;
    float *scratch = NULL;
    int32_t *sel = NULL;
    if (LSA_NEW(scratch, a->n_visible, NULL) != LSA_OK || LSA_NEW(sel, a->n_visible, NULL) != LSA_OK) {
        atomic_store(&t->failed, true);
    } else if (a->n_visible) {
        int64_t n = lsa_topk(a->logit, a->n_visible, pool, NULL, 0, scratch, sel);
        for (int64_t i = 0; i < n; i++) scratch[i] = a->logit[sel[i]];
        n = lsa_votes(sel, (int32_t)n, scratch, t->rule.top_p, out);
        for (int64_t i = 0; i < n; i++) set_bit(bits, i);
    }
    lsa_free(scratch);
    lsa_free(sel);
}

static void on_csa(void *user, const lsa_tap_csa *a) {
    lsa_tap_state *t = user;
    layer_slots *l = &t->layer[a->ord.v];
    const int64_t p = a->position, d = t->c->hidden;
    const int64_t at = entries_before(t, p);
    take_votes(t, l, a);
    if (l->sel && a->n_sel) memcpy(l->sel + at, a->sel, (size_t)a->n_sel * sizeof *a->sel);
    if (t->rule.stats) {
        l->n_sel[p] = a->n_sel;
        if (at + a->n_sel != entries_before(t, p + 1)) atomic_store(&t->sparse, true);
        for (int32_t i = 0; i < a->n_sel; i++) {
            l->logit[at + i] = lsa_f32_to_f16(a->sel_logit[i]);
            l->mass[at + i] = lsa_f32_to_f16(a->mass[i]);
        }
        l->local[p] = lsa_f32_to_f16(a->window_mass);
        l->sink[p] = lsa_f32_to_f16(a->sink_mass);
    }
    if (l->hidden && (p + 1) % t->rule.hidden_stride == 0) {
        uint16_t *h = l->hidden + ((p + 1) / t->rule.hidden_stride - 1) * d;
        for (int64_t i = 0; i < d; i++) h[i] = lsa_f32_to_bf16(a->hidden[i]);
    }
    if (a->dense_mass) take_dense(t, l, a);
    for (int64_t i = 0; i < t->n_probe; i++) {
        if (t->probe[i] != p || !l->iq) continue;
        const int64_t h = t->c->index_n_head;
        memcpy(l->iq + i * h * 128, a->iq, (size_t)(h * 128) * sizeof(float));
        memcpy(l->iw + i * h, a->iw, (size_t)h * sizeof(float));
        if (a->n_visible) memcpy(l->plogit + t->probe_at[i], a->logit, (size_t)a->n_visible * sizeof(float));
    }
}

static bool on_want_dense(void *user, lsa_csa_ord ord, int64_t pos) {
    (void)ord;
    return on_dense_row(user, pos);
}

lsa_taps lsa_tap_callbacks(lsa_tap_state *t) {
    return (lsa_taps){.user = t, .csa = on_csa, .want_dense = on_want_dense};
}

lsa_status lsa_tap_begin(lsa_tap_state **out, const lsa_teacher_config *c, const lsa_dump_rule *rule,
                         int64_t n_token, bool probe, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_tap_state *t = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(t, 1, err));
    t->c = c;
    t->rule = *rule;
    t->n_token = n_token;
    t->n_hidden = n_token / rule->hidden_stride;
    t->n_dense = rule->dense_every ? n_token / rule->dense_every : 0;
    t->n_entry = entries_before(t, n_token);
    t->words = lsa_ceil_div(rule->pool, 64);
    if (probe && c->index_head_dim == 128) {
        t->probe[0] = n_token / 2;
        t->probe[1] = n_token - 1;
        t->n_probe = t->probe[0] < t->probe[1] ? 2 : 1;
        for (int64_t i = 0; i < t->n_probe; i++)
            t->probe_at[i + 1] = t->probe_at[i] + lsa_visible(t->probe[i]);
    }
    for (int32_t o = 0; o < c->n_csa; o++) {
        layer_slots *l = &t->layer[o];
        LSA_TRY(BLANK(l->voted, n_token * t->words, err));
        if (!pool_is_selected(t)) LSA_TRY(BLANK(l->vote, n_token * rule->pool, err));
        if (rule->stats || pool_is_selected(t)) LSA_TRY(BLANK(l->sel, t->n_entry, err));
        if (rule->stats) {
            LSA_TRY(BLANK(l->logit, t->n_entry, err));
            LSA_TRY(BLANK(l->mass, t->n_entry, err));
            LSA_TRY(LSA_NEW(l->n_sel, n_token, err));
            LSA_TRY(LSA_NEW(l->local, n_token, err));
            LSA_TRY(LSA_NEW(l->sink, n_token, err));
        }
        LSA_TRY(LSA_NEW(l->dense, t->n_dense, err));
        if (!rule->has_keys[o]) continue;
        LSA_TRY(LSA_NEW(l->hidden, t->n_hidden * c->hidden, err));
        LSA_TRY(LSA_NEW(l->iq, t->n_probe * c->index_n_head * 128, err));
        LSA_TRY(LSA_NEW(l->iw, t->n_probe * c->index_n_head, err));
        LSA_TRY(LSA_NEW(l->plogit, t->probe_at[t->n_probe], err));
    }
    *out = t;
    t = NULL;
done:
    lsa_tap_end(t);
    return st;
}

void lsa_tap_end(lsa_tap_state *t) {
    if (!t) return;
    for (int32_t o = 0; o < LSA_MAX_CSA; o++) {
        layer_slots *l = &t->layer[o];
        for (int64_t i = 0; l->dense && i < t->n_dense; i++) {
            lsa_free(l->dense[i].chunk);
            lsa_free(l->dense[i].mass);
        }
        void *p[] = {l->sel,  l->logit,  l->mass,  l->n_sel, l->vote, l->voted,  l->local,
                     l->sink, l->hidden, l->dense, l->iq,    l->iw,   l->plogit, t->gpu.key[o]};
        for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    }
    lsa_free(t);
}

/* The first voted entry from `at` on; 64 * words: none. */
static int64_t next_vote(const lsa_tap_state *t, const uint64_t *bits, int64_t at) {
    for (int64_t w = at / 64; w < t->words; w++) {
        const uint64_t left = w == at / 64 ? bits[w] >> at % 64 << at % 64 : bits[w];
        if (left) return 64 * w + __builtin_ctzll(left);
    }
    return 64 * t->words;
}

/* Votes of all layers of one row, merged: chunk ascending with its number of votes. Returns the count. */
static int64_t merge_votes(const lsa_tap_state *t, int64_t row, int32_t *chunk, uint8_t *votes) {
    const int32_t *of[LSA_MAX_CSA];
    const uint64_t *bits[LSA_MAX_CSA];
    int64_t at[LSA_MAX_CSA], n = 0;
    int32_t head[LSA_MAX_CSA]; /* each layer's next chunk */
    const int64_t end = 64 * t->words;
    for (int32_t o = 0; o < t->c->n_csa; o++) {
        of[o] = candidates(t, &t->layer[o], row);
        bits[o] = t->layer[o].voted + row * t->words;
        at[o] = next_vote(t, bits[o], 0);
        head[o] = at[o] < end ? of[o][at[o]] : INT32_MAX;
    }
    for (;; n++) {
        int32_t best = INT32_MAX;
        for (int32_t o = 0; o < t->c->n_csa; o++)
            if (head[o] < best) best = head[o];
        if (best == INT32_MAX) return n;
        uint8_t v = 0;
        for (int32_t o = 0; o < t->c->n_csa; o++) {
            if (head[o] != best) continue;
            v++;
            at[o] = at[o] + 1 < end ? next_vote(t, bits[o], at[o] + 1) : end;
            head[o] = at[o] < end ? of[o][at[o]] : INT32_MAX;
        }
        if (chunk) {
            chunk[n] = best;
            votes[n] = v;
        }
    }
}

static lsa_status make_labels(lsa_csr *c, const lsa_tap_state *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    c->n_row = t->n_token;
    LSA_TRY(LSA_NEW(c->begin, t->n_token + 1, err));
#pragma omp parallel for
    for (int64_t r = 0; r < t->n_token; r++) c->begin[r + 1] = merge_votes(t, r, NULL, NULL);
    for (int64_t r = 0; r < t->n_token; r++) c->begin[r + 1] += c->begin[r];
    c->n_entry = c->begin[t->n_token];
    LSA_TRY(BLANK(c->chunk, c->n_entry, err));
    LSA_TRY(BLANK(c->votes, c->n_entry, err));
    if (c->n_entry == 0) goto done;
#pragma omp parallel for
    for (int64_t r = 0; r < t->n_token; r++)
        merge_votes(t, r, c->chunk + c->begin[r], c->votes + c->begin[r]);
done:
    return st;
}

#define TAKE(dst, src) ((dst) = (src), (src) = NULL)

/* The slots, as they are. After make_labels, which reads them. */
static lsa_status make_stats(lsa_csr *c, const lsa_tap_state *t, layer_slots *l, lsa_err *err) {
    lsa_status st = LSA_OK;
    const bool sparse = atomic_load(&t->sparse);
    c->n_row = t->n_token;
    LSA_TRY(BLANK(c->begin, t->n_token + 1, err));
    c->begin[0] = 0;
#pragma omp parallel for
    for (int64_t r = 1; r <= t->n_token; r++) c->begin[r] = entries_before(t, r);
    for (int64_t r = 0; sparse && r < t->n_token; r++) { /* closed up */
        const int64_t from = entries_before(t, r), to = c->begin[r];
        const size_t n = (size_t)l->n_sel[r];
        c->begin[r + 1] = to + (int64_t)n;
        if (n == 0 || from == to) continue;
        memmove(l->sel + to, l->sel + from, n * sizeof *l->sel);
        memmove(l->logit + to, l->logit + from, n * sizeof *l->logit);
        memmove(l->mass + to, l->mass + from, n * sizeof *l->mass);
    }
    c->n_entry = c->begin[t->n_token];
    TAKE(c->chunk, l->sel);
    TAKE(c->logit, l->logit);
    TAKE(c->mass, l->mass);
done:
    return st;
}

static lsa_status make_dense(lsa_csr *c, const lsa_tap_state *t, const layer_slots *l, lsa_err *err) {
    lsa_status st = LSA_OK;
    c->n_row = t->n_dense;
    LSA_TRY(LSA_NEW(c->begin, t->n_dense + 1, err));
    LSA_TRY(LSA_NEW(c->row, t->n_dense, err));
    LSA_TRY(LSA_NEW(c->rest, t->n_dense, err));
    for (int64_t r = 0; r < t->n_dense; r++) {
        c->begin[r + 1] = c->begin[r] + l->dense[r].n;
        c->row[r] = (r + 1) * t->rule.dense_every - 1;
        c->rest[r] = l->dense[r].rest;
    }
    c->n_entry = c->begin[t->n_dense];
    LSA_TRY(LSA_NEW(c->chunk, c->n_entry, err));
    LSA_TRY(LSA_NEW(c->mass, c->n_entry, err));
    for (int64_t r = 0; r < t->n_dense; r++) {
        if (l->dense[r].n == 0) continue;
        memcpy(c->chunk + c->begin[r], l->dense[r].chunk, (size_t)l->dense[r].n * sizeof(int32_t));
        memcpy(c->mass + c->begin[r], l->dense[r].mass, (size_t)l->dense[r].n * sizeof(uint16_t));
    }
done:
    return st;
}

#define FEW 65536 /* not worth threads */
static bool bf16_finite(const uint16_t *x, int64_t n) {
    int bad = 0;
#pragma omp parallel for reduction(| : bad) if (n > FEW)
    for (int64_t i = 0; i < n; i++) bad |= (x[i] & 0x7f80u) == 0x7f80u;
    return !bad;
}
static bool f16_finite(const uint16_t *x, int64_t n) {
    int bad = 0;
#pragma omp parallel for reduction(| : bad) if (n > FEW)
    for (int64_t i = 0; i < n; i++) bad |= (x[i] & 0x7c00u) == 0x7c00u;
    return !bad;
}

/* Sound weights can still overflow on the way; such a document must not be sealed. */
static lsa_status check_finite(const lsa_doc_stats *x, const lsa_tap_state *t, lsa_err *err) {
    for (int32_t o = 0; o < t->c->n_csa; o++) {
        const char *what = NULL;
        if (x->hidden[o] && !bf16_finite(x->hidden[o], x->n_hidden * t->c->hidden)) what = "a hidden vector";
        if (x->stats[o].n_entry && !f16_finite(x->stats[o].logit, x->stats[o].n_entry))
            what = "a native logit"; /* or one beyond f16 */
        if (x->stats[o].n_entry && !f16_finite(x->stats[o].mass, x->stats[o].n_entry)) what = "a mass";
        if (x->local_mass[o] &&
            (!f16_finite(x->local_mass[o], x->n_token) || !f16_finite(x->sink_mass[o], x->n_token)))
            what = "the mass of the window or the sink";
        for (int64_t i = 0; x->key[o] && i < x->n_key; i++) {
            float scale;
            memcpy(&scale, x->key[o] + i * LSA_KEY_BYTES + 128, sizeof scale);
            if (!isfinite(scale)) what = "an index key";
        }
        if (what)
            LSA_RET_FAIL(
                LSA_E_NUMERIC,
                "document '%s': %s of layer %d (c%d) is not finite; the teacher's weights are unsound, "
                "nothing of this document is sealed",
                x->name, what, t->c->csa_id[o].v, o);
    }
    return LSA_OK;
}

lsa_status lsa_tap_finish(lsa_doc_stats *out, lsa_tap_state *t, const lsa_session *s, const lsa_doc *doc,
                          lsa_err *err) {
    lsa_status st = LSA_OK;
    memset(out, 0, sizeof *out);
    if (atomic_load(&t->failed))
        LSA_FAIL(LSA_E_NOMEM, "document '%s': out of memory while gathering statistics", doc->name);
    snprintf(out->name, sizeof out->name, "%s", doc->name);
    out->n_token = t->n_token;
    out->n_key = t->n_token / LSA_CHUNK;
    out->token_xxh64 = lsa_xxh64(doc->token, (size_t)doc->n_token * sizeof *doc->token);
    out->n_hidden = t->n_hidden;
    out->n_probe = t->n_probe;
    out->n_probe_logit = t->probe_at[t->n_probe];
    out->probe_heads = t->c->index_n_head;
    LSA_TRY(LSA_NEW(out->probe_row, t->n_probe, err));
    for (int64_t i = 0; i < t->n_probe; i++) out->probe_row[i] = t->probe[i];
    LSA_TRY(make_labels(&out->labels, t, err));
    for (int32_t o = 0; o < t->c->n_csa; o++) {
        layer_slots *l = &t->layer[o];
        if (t->rule.stats) {
            LSA_TRY(make_stats(&out->stats[o], t, l, err));
            TAKE(out->local_mass[o], l->local);
            TAKE(out->sink_mass[o], l->sink);
        }
        if (t->rule.dense_every) LSA_TRY(make_dense(&out->dense[o], t, l, err));
        if (!t->rule.has_keys[o]) continue;
        int64_t n_key = out->n_key;
        const float *const key = s ? lsa_session_keys(s, (lsa_csa_ord){o}, &n_key) : t->gpu.key[o];
        LSA_TRY(BLANK(out->key[o], n_key * LSA_KEY_BYTES, err));
#pragma omp parallel for
        for (int64_t i = 0; i < n_key; i++) lsa_key_encode(out->key[o] + i * LSA_KEY_BYTES, key + i * 128);
        TAKE(out->hidden[o], l->hidden);
        TAKE(out->probe_iq[o], l->iq);
        TAKE(out->probe_iw[o], l->iw);
        TAKE(out->probe_logit[o], l->plogit);
    }
    LSA_TRY(check_finite(out, t, err));
done:
    if (st != LSA_OK) lsa_doc_stats_fini(out);
    return st;
}

lsa_status lsa_reader_check(const lsa_reader *r, const lsa_teacher_config *c, const lsa_dump_rule *rule,
                            lsa_err *err) {
    if (!r->gpu) return LSA_OK;
    if (rule->pool != c->index_topk)
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "--pool %d: the GPU pass votes among the %d selected entries; use --device cpu",
                     rule->pool, c->index_topk);

    return LSA_OK;
}

static lsa_status read_by_session(lsa_session *s, const lsa_doc *doc, const lsa_taps *taps,
                                  lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user,
                                  lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_session_reset(s);
    for (int64_t at = 0; at < doc->n_token; at += LSA_TAP_CHUNK) {
        const int64_t n = lsa_min_i64(LSA_TAP_CHUNK, doc->n_token - at);
        LSA_TRY(lsa_session_forward(s, doc->token + at, n, NULL, false, taps, err));
        if (step) LSA_TRY(step(user, n, err));
    }
done:
    return st;
}

lsa_status lsa_tap_gpu_doc(lsa_gpu_doc **out, lsa_tap_state *t, const lsa_doc *doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    t->taps = lsa_tap_callbacks(t);
    t->gpu = (lsa_gpu_doc){.token = doc->token,
                           .n = doc->n_token,
                           .probe = t->probe,
                           .n_probe = (int32_t)t->n_probe,
                           .hidden_stride = t->rule.hidden_stride,
                           .dense_every = t->rule.dense_every,
                           .taps = &t->taps};
    *out = &t->gpu;
    for (int32_t o = 0; o < t->c->n_csa; o++)
        if (t->rule.has_keys[o])
            LSA_TRY(BLANK(t->gpu.key[o], doc->n_token / LSA_CHUNK * t->c->index_head_dim, err));
done:
    return st;
}

static lsa_status read_by_gpu(lsa_gpu_run *x, lsa_tap_state *t, const lsa_doc *doc,
                              lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user,
                              lsa_err *err) {
    lsa_gpu_doc *g;
    lsa_status st = lsa_tap_gpu_doc(&g, t, doc, err), drained;
    if (st != LSA_OK) return st;
    st = lsa_gpu_run_feed(x, &g, 1, step, user, err);
    drained =
        lsa_gpu_run_drain(x, st == LSA_OK ? err : NULL); /* the state must not go before its rows come */
    return st != LSA_OK ? st : drained;
}

lsa_status lsa_tap_document(lsa_doc_stats *out, const lsa_reader *r, const lsa_teacher_config *c,
                            const lsa_dump_rule *rule, const lsa_doc *doc, bool probe,
                            lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_tap_state *t = NULL;
    LSA_TRY(lsa_tap_begin(&t, c, rule, doc->n_token, probe, err));
    const lsa_taps taps = lsa_tap_callbacks(t);
    LSA_TRY(r->gpu ? read_by_gpu(r->gpu, t, doc, step, user, err)
                   : read_by_session(r->session, doc, &taps, step, user, err));
    LSA_TRY(lsa_tap_finish(out, t, r->session, doc, err));
done:
    lsa_tap_end(t);
    return st;
}
