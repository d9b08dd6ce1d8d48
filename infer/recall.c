/* Level 1: see recall.h. Keys are encoded once, when their chunk is complete; they never change afterwards.
 *
 * NUMERIC: hidden vectors are rounded to bf16 and keys to the shard's fp8 codec, as training saw them. The
 * mistake that would stay silent: scoring with hidden vectors of another run (the full one), where nothing
 * was ever evicted. */
#include "infer/recall.h"

#include <math.h>
#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/cpu/topk.h"
#include "kernels/continuation.h"
#include "kernels/ops.h"
#include "kernels/prior.h"

struct lsa_recall {
    const lsa_indexer_file *f;
    lsa_ctx *ctx;
    int64_t max_chunk, n_key; /* keys encoded so far */
    uint8_t *key[LSA_MAX_CSA];
    float freq[64], *x, *z;
    lsa_indexer_act act;
    /* with a prior: masses of chunks, and a ring of what tokens read, at position % pending */
    float *recent, *memory, *prior; /* [max_chunk] */
    int32_t n_csa;
    int64_t pending, window, room; /* window: first token that is in none yet; room: entries of a token */
    int32_t *sel, *n_sel;          /* [n_csa, pending, room], [n_csa, pending] */
    float *mass;
};

lsa_status lsa_recall_check(const lsa_indexer_file *f, const lsa_teacher_config *c, lsa_err *err) {
    const lsa_indexer_geom *g = &f->geom;
    if (g->n_layer < 1) LSA_RET_FAIL(LSA_E_CONFIG, "the indexer has no layers");
    if (g->hidden != c->hidden)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "the indexer reads hidden vectors of %d, the teacher has %d; export one trained for this teacher",
            g->hidden, c->hidden);
    if (c->index_head_dim != 128)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "the teacher's index keys have %d channels, memory indexers read 128",
                     c->index_head_dim);
    for (int32_t l = 0; l < g->n_layer; l++)
        if (g->ord[l].v < 0 || g->ord[l].v >= c->n_csa || c->csa_id[g->ord[l].v].v != g->id[l].v)
            LSA_RET_FAIL(
                LSA_E_CONFIG,
                "the indexer has CSA layer %d as transformer layer %d, the teacher does not; it belongs to another model",
                g->ord[l].v, g->id[l].v);
    return LSA_OK;
}

static lsa_status make_observed(lsa_recall *r, const lsa_teacher_config *c, int64_t pending, lsa_err *err) {
    lsa_status st = LSA_OK;
    r->n_csa = c->n_csa;
    r->pending = pending;
    r->room = lsa_min_i64(c->index_topk, r->max_chunk);
    LSA_TRY(LSA_NEW(r->recent, r->max_chunk, err));
    LSA_TRY(LSA_NEW(r->memory, r->max_chunk, err));
    LSA_TRY(LSA_NEW(r->prior, r->max_chunk, err));
    LSA_TRY(LSA_NEW(r->sel, r->n_csa * pending * r->room, err));
    LSA_TRY(LSA_NEW(r->mass, r->n_csa * pending * r->room, err));
    LSA_TRY(LSA_NEW(r->n_sel, r->n_csa * pending, err));
done:
    return st;
}

lsa_status lsa_recall_create(lsa_recall **out, const lsa_indexer_file *f, const lsa_engine *e,
                             int64_t max_chunk, int64_t pending, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_recall *r = NULL;
    const lsa_indexer_geom *g = &f->geom;
    *out = NULL;
    LSA_TRY(lsa_recall_check(f, lsa_engine_config(e), err));
    LSA_TRY(LSA_NEW(r, 1, err));
    r->f = f;
    r->max_chunk = max_chunk;
    LSA_TRY(lsa_ctx_create(&r->ctx, "cpu", err));
    lsa_rope_freqs(r->freq, &g->rope);
    for (int32_t l = 0; l < g->n_layer; l++) LSA_TRY(LSA_NEW(r->key[l], max_chunk * LSA_KEY_BYTES, err));
    LSA_TRY(LSA_NEW(r->x, g->hidden, err));
    LSA_TRY(LSA_NEW(r->z, max_chunk, err));
    LSA_TRY(LSA_NEW(r->act.a, g->rank, err));
    LSA_TRY(LSA_NEW(r->act.rstd, 1, err));
    LSA_TRY(LSA_NEW(r->act.u, g->rank, err));
    LSA_TRY(LSA_NEW(r->act.q, g->n_head * 128, err));
    LSA_TRY(LSA_NEW(r->act.w, g->n_head, err));
    if (g->prior) LSA_TRY(make_observed(r, lsa_engine_config(e), pending, err));
    *out = r;
    r = NULL;
done:
    lsa_recall_destroy(r);
    return st;
}

void lsa_recall_destroy(lsa_recall *r) {
    if (!r) return;
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) lsa_free(r->key[l]);
    void *p[] = {r->x,      r->z,      r->act.a, r->act.rstd, r->act.u, r->act.q, r->act.w,
                 r->recent, r->memory, r->prior, r->sel,      r->mass,  r->n_sel};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    lsa_ctx_destroy(r->ctx);
    lsa_free(r);
}

void lsa_recall_reset(lsa_recall *r) {
    r->n_key = 0;
    r->window = 0;
    if (!r->recent) return;
    memset(r->recent, 0, (size_t)r->max_chunk * sizeof *r->recent);
    memset(r->memory, 0, (size_t)r->max_chunk * sizeof *r->memory);
}

void lsa_recall_observe(lsa_recall *r, const lsa_tap_csa *t) {
    if (!r->recent) return;
    const int64_t at = t->ord.v * r->pending + t->position % r->pending, n = lsa_min_i64(t->n_sel, r->room);
    r->n_sel[at] = (int32_t)n;
    if (n == 0) return;
    memcpy(r->sel + at * r->room, t->sel, (size_t)n * sizeof *r->sel);
    memcpy(r->mass + at * r->room, t->mass, (size_t)n * sizeof *r->mass);
}

/* NUMERIC: added layer by layer in the order of the tokens, whatever threads observed them. */
void lsa_recall_end_window(lsa_recall *r, int64_t n) {
    if (!r->recent || n < 1) return;
    lsa_prior_end_window(r->recent, r->memory, r->max_chunk);
    for (int64_t l = 0; l < r->n_csa; l++)
        for (int64_t t = r->window; t < r->window + n; t++) {
            const int64_t at = l * r->pending + t % r->pending;
            for (int64_t i = at * r->room; i < at * r->room + r->n_sel[at]; i++)
                r->recent[r->sel[i]] += r->mass[i];
        }
    const float tokens = (float)r->n_csa * (float)n;
    for (int64_t c = 0; c < r->max_chunk; c++) r->recent[c] /= tokens;
    r->window += n;
}

lsa_status lsa_recall_score(lsa_recall *r, const lsa_session *s, float *score, int64_t n, lsa_err *err) {
    lsa_recall_input in = {.position = lsa_session_position(s)};
    for (int32_t l = 0; l < r->f->geom.n_layer; l++) {
        int64_t n_key;
        in.key[l] = lsa_session_keys(s, r->f->geom.ord[l], &n_key);
        in.hidden[l] = lsa_session_hidden(s, r->f->geom.ord[l]);
    }
    return lsa_recall_score_input(r, &in, score, n, err);
}

lsa_status lsa_recall_score_input(lsa_recall *r, const lsa_recall_input *in, float *score, int64_t n,
                                  lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &r->f->geom;
    const int64_t position = in->position - 1, base = 0;
    const int32_t n_cand = (int32_t)n;
    if (n > r->max_chunk || position < 0)
        LSA_RET_FAIL(LSA_E_BUG, "recall: %lld chunks at position %lld", (long long)n, (long long)position);
    for (int32_t l = 0; l < g->n_layer; l++) {
        const float *key = in->key[l], *h = in->hidden[l];
        for (int64_t i = r->n_key; i < n; i++) lsa_key_encode(r->key[l] + i * LSA_KEY_BYTES, key + i * 128);
        for (int32_t i = 0; i < g->hidden; i++) r->x[i] = lsa_round_bf16(h[i]); /* as training saw it */
        LSA_TRY(lsa_indexer_query(r->ctx, g, r->f->params, l, 1, r->x, &position, r->freq, &r->act, err));
        LSA_TRY(lsa_indexer_score_fwd(r->ctx,
                                      &(lsa_indexer_score_fwd_args){1, g->n_head, 128, n, lsa_max_i64(1, n),
                                                                    r->act.q, r->act.w, r->key[l], &base,
                                                                    NULL, &n_cand, false, r->z},
                                      err));
        for (int64_t i = 0; i < n; i++) {
            const float p = 1.0f / (1.0f + expf(-r->z[i]));
            switch (r->f->ensemble) {
            case LSA_ENSEMBLE_SUM:
                score[i] = l ? score[i] + r->z[i] : r->z[i];
                break;
            case LSA_ENSEMBLE_MEAN:
                score[i] = (l ? score[i] : 0.0f) + p / (float)g->n_layer;
                break;
            case LSA_ENSEMBLE_MAX:
                score[i] = l ? fmaxf(score[i], p) : p;
                break;
            }
        }
    }
    if (g->prior) {
        lsa_prior_values(r->prior, r->recent, r->memory, r->f->params + lsa_indexer_prior_at(g), n);
        for (int64_t i = 0; i < n; i++) score[i] += r->prior[i];
    }
    if (g->reach) lsa_continue(score, NULL, score, n, r->f->params + lsa_indexer_costs_at(g), g->reach);
    r->n_key = lsa_max_i64(r->n_key, n);
done:
    return st;
}

int64_t lsa_keep(uint8_t *kept, const float *score, int64_t n, const lsa_keep_rule *rule, bool is_logit,
                 float *scratch, int32_t *sel) {
    int64_t count = 0;
    memset(kept, 0, (size_t)n);
    if (rule->threshold >= 0) {
        for (int64_t i = 0; i < n; i++) {
            const double p = is_logit ? 1.0 / (1.0 + exp(-(double)score[i])) : (double)score[i];
            kept[i] = p > rule->threshold;
        }
    } else {
        const int64_t k =
            lsa_topk(score, n, rule->top_k > 0 ? rule->top_k : lsa_budget_chunks(rule->budget, n), NULL, 0,
                     scratch, sel);
        for (int64_t i = 0; i < k; i++) kept[sel[i]] = 1;
    }
    for (int64_t i = 0; i < lsa_min_i64(rule->sink, n); i++) kept[i] = 1;
    for (int64_t i = 0; i < n; i++) count += kept[i];
    return count;
}
