/* Looking at windows: see measure.h. The mistake that would stay silent: calibrating on what the indexer was
 * trained on, where it is surer than it will ever be again; such documents are refused. */
#include "trainer/measure.h"

#include <math.h>
#include <string.h>

#include "data/docs.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/prior.h"
#include "trainer/observer.h"

enum { GROUP = 64 };

struct lsa_measure {
    lsa_recipe r;
    lsa_indexer_geom g;
    lsa_ctx *ctx;
    lsa_source *source;
    lsa_trainer *trainer;
    int64_t first, last;
    lsa_measure_info info;
    float cost[LSA_MAX_REACH]; /* of the continuation */
    float prior[LSA_PRIOR_WEIGHTS];
};

/* ---- opening ---- */

/* The recipe's definition of golden chunks, on the decoder's windows and candidates. */
static lsa_status make_recipe(lsa_recipe *r, const lsa_indexer_file *f, lsa_err *err) {
    lsa_status st = LSA_OK;
    const json_t *recipe = json_object_get(f->train, "recipe");
    if (recipe)
        LSA_TRY(lsa_recipe_from_json(r, lsa_recipe_keys, lsa_recipe_n_key, recipe, "lsa.train", err));
    else
        LSA_TRY(lsa_recipe_load(r, lsa_recipe_keys, lsa_recipe_n_key, NULL, NULL, 0, err));
    r->mode = LSA_MODE_LOOKAHEAD;
    r->causal = r->exclude_resident = true;
    r->tau = r->stride = f->tau;
    r->tail = f->tail;
    r->val_documents = 0;
    r->target = LSA_TARGET_NATIVE;
    r->trivial = false;
    r->precision = LSA_PRECISION_F32;
done:
    return st;
}

static lsa_status check_teacher(const lsa_indexer_file *f, const lsa_shards_info *s, const char *data,
                                lsa_err *err) {
    const char *want = json_string_value(json_object_get(f->train, "teacher_hash"));
    char have[17];
    lsa_hex64(have, s->teacher_hash);
    if (want && strcmp(want, have))
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "the indexer was made for teacher %s (hash %s), but '%s' was dumped from %s (hash %s)",
                     json_string_value(json_object_get(f->train, "teacher")), want, data, s->teacher, have);
    return LSA_OK;
}

static lsa_status choose_documents(lsa_measure *m, const lsa_indexer_file *f, const char *data,
                                   const char *documents, bool force, lsa_err *err) {
    const char *trained = json_string_value(json_object_get(f->train, "data_hash"));
    const int64_t n = lsa_source_n_doc(m->source);
    const bool same = trained && !strcmp(trained, m->info.data_hash);
    const int64_t n_train =
        same ? (int64_t)json_integer_value(json_object_get(f->train, "train_documents")) : 0;
    const lsa_status st = lsa_docs_range(&m->first, &m->last, documents, n, err);
    if (st != LSA_OK) return st;
    if (force || m->first >= n_train) return LSA_OK;
    if (documents)
        LSA_RET_FAIL(
            LSA_E_ARG,
            "'%s' is the data this indexer was trained on: documents 0 to %lld are not for calibration; "
            "use --documents %lld:%lld, other shards, or --force",
            data, (long long)n_train - 1, (long long)n_train, (long long)n);
    if (n_train >= n)
        LSA_RET_FAIL(LSA_E_ARG,
                     "'%s' is the data this indexer was trained on and none of it was held out: dump other "
                     "documents, or give --force",
                     data);
    m->first = n_train;
    lsa_info("these are the shards of the training run: using its held-out documents %lld to %lld",
             (long long)n_train, (long long)n - 1);
    return LSA_OK;
}

static lsa_status count_windows(lsa_measure *m, const char *data, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int64_t d = m->first; d < m->last; d++) {
        const lsa_shards_doc x = lsa_shards_get_doc(lsa_source_shards(m->source), d);
        int64_t n;
        LSA_TRY(lsa_source_n_window(&n, m->source, d, err));
        m->info.documents += n > 0;
        m->info.windows += n;
        if (n == 0) continue;
        m->info.longest_tokens = lsa_max_i64(m->info.longest_tokens, x.n_token);
        m->info.longest = lsa_max_i64(m->info.longest, (x.n_token / m->r.tau - 1) * m->r.tau / LSA_CHUNK);
    }
    if (m->info.windows == 0)
        LSA_FAIL(LSA_E_CONFIG,
                 "'%s': no document is longer than tail + tau (%lld + %lld tokens): nothing to measure", data,
                 (long long)m->r.tail, (long long)m->r.tau);
done:
    return st;
}

lsa_status lsa_measure_params(lsa_measure *m, const float *params, lsa_err *err) {
    lsa_trainer_destroy(m->trainer);
    m->trainer = NULL;
    if (m->g.reach)
        memcpy(m->cost, params + lsa_indexer_costs_at(&m->g), (size_t)m->g.reach * sizeof *m->cost);
    if (m->g.prior) memcpy(m->prior, params + lsa_indexer_prior_at(&m->g), sizeof m->prior);
    return lsa_trainer_create(&m->trainer, m->ctx, NULL, 1, &m->r, &m->g, params, NULL, NULL, 0, err);
}

void lsa_measure_continue(lsa_select_rule *r, const lsa_measure *m) {
    if (r->score != LSA_SCORE_SUM) return;
    r->reach = m->g.reach;
    memcpy(r->cost, m->cost, sizeof r->cost);
}

static lsa_status has_stats(bool *out, const char *data, lsa_err *err) {
    lsa_shards *s = NULL;
    const lsa_status st = lsa_shards_open(&s, data, err);
    *out = st == LSA_OK && lsa_shards_get_info(s)->has_stats;
    lsa_shards_close(s);
    return st;
}

lsa_status lsa_measure_open(lsa_measure **out, const lsa_indexer_file *f, const char *data,
                            const char *documents, const char *device, bool force, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_measure *m = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(m, 1, err));
    m->g = f->geom;
    LSA_TRY(make_recipe(&m->r, f, err));
    LSA_TRY(has_stats(&m->info.has_mass, data, err));
    LSA_TRY(lsa_source_open(&m->source, data, &m->r, &m->g, m->info.has_mass, err));
    LSA_TRY(check_teacher(f, lsa_shards_get_info(lsa_source_shards(m->source)), data, err));
    lsa_hex64(m->info.data_hash, lsa_shards_hash(lsa_source_shards(m->source)));
    m->info.tail_chunks = m->r.tail / LSA_CHUNK;
    LSA_TRY(choose_documents(m, f, data, documents, force, err));
    m->info.range = m->last - m->first;
    m->info.tail_chunks = m->r.tail / LSA_CHUNK;
    LSA_TRY(count_windows(m, data, err));
    LSA_TRY(lsa_ctx_create(&m->ctx, device, err));
    LSA_TRY(lsa_measure_params(m, f->params, err));
    *out = m;
    m = NULL;
done:
    lsa_measure_close(m);
    return st;
}

void lsa_measure_close(lsa_measure *m) {
    if (!m) return;
    lsa_trainer_destroy(m->trainer);
    lsa_source_close(m->source);
    lsa_ctx_destroy(m->ctx);
    lsa_free(m);
}

lsa_measure_info lsa_measure_get_info(const lsa_measure *m) {
    return m->info;
}

/* ---- walking ---- */

/* Row i of a group. */
static lsa_status look_at(const lsa_look *how, void *row, lsa_seen *seen, const lsa_measure *m,
                          const lsa_batch *b, int64_t i, const lsa_train_doc *d, const lsa_window *w) {
    lsa_status st = LSA_OK;
    uint8_t *votes = NULL;
    float *mass = NULL, *prior = NULL;
    for (int32_t l = 0; l < m->g.n_layer; l++)
        for (int64_t c = 0; c < seen->n; c++)
            if (!isfinite(seen->z[l * seen->stride + c])) return LSA_E_NUMERIC;
    if (m->g.prior) LSA_TRY(LSA_NEW(prior, seen->n, NULL));
    for (int64_t c = 0; prior && c < seen->n; c++)
        prior[c] = lsa_prior_value(m->prior, b->recent[i * b->n + c], b->memory[i * b->n + c]);
    LSA_TRY(LSA_NEW(votes, seen->n, NULL));
    if (m->info.has_mass) LSA_TRY(LSA_NEW(mass, seen->n, NULL));
    lsa_window_needs(NULL, votes, m->source, d, w);
    if (mass) lsa_window_native(mass, 1, d, w);
    seen->prior = prior;
    seen->votes = votes;
    seen->mass = mass;
    st = how->look(how->arg, row, seen);
done:
    seen->prior = NULL;
    seen->votes = NULL;
    seen->mass = NULL;
    lsa_free(prior);
    lsa_free(votes);
    lsa_free(mass);
    return st;
}

static lsa_status look_group(const lsa_look *how, uint8_t *rows, const lsa_measure *m, const lsa_batch *b,
                             const lsa_train_doc *d, int64_t first, const float *z, lsa_err *err) {
    lsa_status st = LSA_OK, got[GROUP];
    lsa_seen seen[GROUP];
    lsa_window w[GROUP];
    memset(rows, 0, (size_t)b->m * how->row_bytes);
    for (int64_t i = 0; i < b->m; i++) {
        LSA_TRY(lsa_window_at(&w[i], m->source, d, first + i, err));
        seen[i] = (lsa_seen){.doc = d->doc - m->first,
                             .visible = lsa_visible(w[i].query),
                             .n = w[i].n_cand,
                             .z = z + i * b->n,
                             .stride = b->m * b->n};
        if (how->begin) LSA_TRY(how->begin(how->arg, &seen[i], err));
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < b->m; i++)
        got[i] = look_at(how, rows + (size_t)i * how->row_bytes, &seen[i], m, b, i, d, &w[i]);
    for (int64_t i = 0; i < b->m; i++) {
        if (got[i] == LSA_E_NUMERIC)
            LSA_FAIL(LSA_E_NUMERIC,
                     "document %lld, window at token %lld: the indexer's logits are not finite",
                     (long long)d->doc, (long long)w[i].start);
        if (got[i] != LSA_OK)
            LSA_FAIL(got[i], "document %lld: out of memory for a window of %lld chunks", (long long)d->doc,
                     (long long)seen[i].n);
        if (how->add) how->add(how->arg, rows + (size_t)i * how->row_bytes, &seen[i]);
    }
done:
    return st;
}

lsa_status lsa_measure_walk(lsa_measure *m, const lsa_look *how, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_batch b = {0};
    LSA_VEC(float) z = {0};
    lsa_observer o = {0};
    uint8_t *rows = NULL;
    lsa_progress p;
    int64_t done_windows = 0;
    LSA_TRY(LSA_NEW(rows, GROUP * (int64_t)how->row_bytes, err));
    lsa_progress_begin(&p, how->what, "windows", (double)m->info.windows, 0);
    for (int64_t doc = m->first; doc < m->last; doc++) {
        int64_t n_window;
        const lsa_train_doc *d;
        LSA_TRY(lsa_source_n_window(&n_window, m->source, doc, err));
        for (int64_t w = 0; w < n_window; w += GROUP) {
            const int64_t n = lsa_min_i64(GROUP, n_window - w);
            if (lsa_stop_requested()) LSA_FAIL(LSA_E_INTERRUPTED, "stopped; nothing was written");
            LSA_TRY(lsa_batch_document(&b, m->source, doc, w, n, &m->g, err));
            LSA_TRY(LSA_VEC_RESERVE(z, m->g.n_layer * n * b.n, err));
            LSA_TRY(lsa_trainer_score(m->trainer, &b, z.data, err));
            if (m->g.prior)
                LSA_TRY(lsa_observe(&o, &b,
                                    &(lsa_observe_args){z.data, m->g.n_layer, n * b.n, m->r.budget, m->prior,
                                                        m->cost, m->g.reach},
                                    err));
            LSA_TRY(lsa_source_get(&d, m->source, doc, err));
            LSA_TRY(look_group(how, rows, m, &b, d, w, z.data, err));
            done_windows += n;
            lsa_progress_update(&p, (double)done_windows, NULL);
        }
    }
    lsa_progress_end(&p);
done:
    lsa_observer_fini(&o);
    lsa_batch_fini(&b);
    lsa_free(z.data);
    lsa_free(rows);
    return st;
}
