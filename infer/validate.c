/* Validation: see validate.h. Documents are taken in groups: first their full runs (window masses and
 * reference logits), then every document x policy x budget side by side, each with a session of its own; sums
 * are added in document order, so neither the group's size nor the number of threads changes a result.
 *
 * The mistake that would stay silent: letting a policy see the window it is judged on. Only `oracle` may; the
 * memory indexer reads its own run up to token s-1, and its prior the masses of that run. */
#include "infer/validate.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/clock.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

void lsa_validation_fini(lsa_validation *v) {
    lsa_free(v->row);
    memset(v, 0, sizeof *v);
}

/* ---- one document under one policy ---- */

typedef struct job {
    lsa_result r;
    const lsa_indexer_file *indexer; /* lsa and untrained */
    lsa_heat *heat;                  /* NULL: not drawn */
    const lsa_full_run *f;
    bool want_masks;
    LSA_VEC(char) masks;
    lsa_status st;
    lsa_err err;
} job;

/* What all jobs share while they run. */
typedef struct shared {
    const lsa_engine *e;
    const lsa_validate_opts *o;
    lsa_gpu_model *gpu; /* NULL: on the CPU */
    lsa_progress progress;
    double done; /* tokens, over all jobs */
} shared;

static void report_tokens(shared *sh, int64_t n) {
#pragma omp critical(lsa_validate_progress)
    {
        sh->done += (double)n;
        lsa_progress_update(&sh->progress, sh->done, NULL);
    }
}

typedef struct scratch {
    float *score, *mass, *last, *select;
    int32_t *sel;
    uint8_t *kept;
    float *logits;
} scratch;

static lsa_status scratch_make(scratch *w, int64_t n_chunk, int64_t n_logit, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(LSA_NEW(w->score, n_chunk, err));
    LSA_TRY(LSA_NEW(w->mass, n_chunk, err));
    LSA_TRY(LSA_NEW(w->last, n_chunk, err));
    LSA_TRY(LSA_NEW(w->select, n_chunk, err));
    LSA_TRY(LSA_NEW(w->sel, n_chunk, err));
    LSA_TRY(LSA_NEW(w->kept, n_chunk, err));
    LSA_TRY(LSA_NEW(w->logits, n_logit, err));
done:
    return st;
}
static void scratch_free(scratch *w) {
    void *p[] = {w->score, w->mass, w->last, w->select, w->sel, w->kept, w->logits};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
}

static void draw(lsa_heat *h, const uint8_t *kept, int64_t ev, int64_t s, int64_t n_token) {
    const int64_t row = s * h->rows / n_token, chunks = lsa_max_i64(1, n_token / LSA_CHUNK);
    int64_t have[LSA_HEAT_COLS] = {0}, all[LSA_HEAT_COLS] = {0};
    for (int64_t c = 0; c < s / LSA_CHUNK; c++) {
        const int64_t col = c * h->cols / chunks;
        all[col]++;
        have[col] += c >= ev || kept[c];
    }
    for (int k = 0; k < h->cols; k++)
        if (all[k]) h->v[row][k] = (uint8_t)(1 + 254 * have[k] / all[k]);
}

static lsa_status write_mask(job *j, const uint8_t *kept, int64_t ev, int64_t s, lsa_err *err) {
    char budget[32] = "null";
    if (j->r.budget >= 0) snprintf(budget, sizeof budget, "%.9g", j->r.budget);
    lsa_status st = LSA_VEC_RESERVE(j->masks, j->masks.len + 256 + 12 * ev, err);
    if (st != LSA_OK) return st;
    char *p = j->masks.data + j->masks.len;
    p += sprintf(
        p,
        "{\"document\": %lld, \"policy\": \"%s\", \"budget\": %s, \"start\": %lld, \"evictable\": %lld, \"kept\": [",
        (long long)j->f->doc->index, lsa_policy_name(j->r.policy), budget, (long long)s, (long long)ev);
    const char *sep = "";
    for (int64_t c = 0; c < ev; c++)
        if (kept[c]) {
            p += sprintf(p, "%s%lld", sep, (long long)c);
            sep = ", ";
        }
    p += sprintf(p, "]}\n");
    j->masks.len = p - j->masks.data;
    return LSA_OK;
}

/* Decides the resident set of window [s, s+n) into w->kept and counts what it holds; returns through *n_kept.
 */
static lsa_status decide(job *j, lsa_decoder *decoder, lsa_recall *recall, const lsa_validate_opts *o,
                         scratch *w, int64_t s, int64_t n, int64_t ev, int64_t *n_kept, lsa_err *err) {
    lsa_status st = LSA_OK;
    const bool fixed = recall && (o->top_k > 0 || o->threshold >= 0); /* the budget does not decide */
    const lsa_keep_rule rule = {.budget = fixed ? -1 : j->r.budget,
                                .threshold = fixed ? o->threshold : -1,
                                .top_k = fixed ? o->top_k : 0,
                                .sink = o->sink};
    double total = 0, have = 0;
    lsa_window_mass(w->mass, j->f, s, s + n, ev);
    if (recall) {
        lsa_recall_input in;
        LSA_TRY(lsa_decoder_recall_input(decoder, j->indexer->geom.ord, j->indexer->geom.n_layer, &in, err));
        LSA_TRY(lsa_recall_score_input(recall, &in, w->score, ev, err));
    } else {
        const lsa_policy_inputs in = {
            .mass = w->mass, .last = w->last, .seed = o->seed, .doc = j->f->doc->index, .s = s};
        if (j->r.policy == LSA_POLICY_LAST || j->r.policy == LSA_POLICY_LAST_SPREAD)
            lsa_window_mass(w->last, j->f, s - o->tau, s, ev);
        lsa_policy_score(w->score, j->r.policy, &in, ev);
    }
    *n_kept = lsa_keep(w->kept, w->score, ev, &rule, recall && j->indexer->ensemble == LSA_ENSEMBLE_SUM,
                       w->select, w->sel);
    for (int64_t c = 0; c < ev; c++) {
        total += (double)w->mass[c];
        have += w->kept[c] ? (double)w->mass[c] : 0.0;
    }
    j->r.captured += have;
    j->r.total_mass += total;
    j->r.evictable += ev;
    j->r.kept += *n_kept;
    if (recall) j->r.level1_bytes += (double)((ev - *n_kept) * LSA_KEY_BYTES * j->indexer->geom.n_layer);
done:
    return st;
}

static void observe(void *user, const lsa_tap_csa *t) {
    lsa_recall_observe(user, t);
}

static lsa_status run_windows(job *j, shared *sh, lsa_decoder *decoder, lsa_recall *recall, scratch *w,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_validate_opts *o = sh->o;
    const lsa_full_run *f = j->f;
    const int64_t n_token = f->doc->n_token, row_bytes = lsa_server_row_bytes(f->c) * f->c->n_csa;
    const bool evicts = lsa_policy_evicts(j->r.policy);
    const lsa_taps taps = {.user = recall, .csa = observe};
    const bool observes = recall && j->indexer->geom.prior; /* else nobody asks for statistics */
    int64_t drawn = -1;
    for (int64_t s = 0; s < n_token; s += o->tau) {
        const int64_t n = lsa_min_i64(o->tau, n_token - s), ev = evicts ? lsa_evictable(s, o->tail) : 0;
        int64_t kept = 0, misses = 0;
        if (lsa_stop_requested()) LSA_FAIL(LSA_E_INTERRUPTED, "stopped");
        if (ev > 0) LSA_TRY(decide(j, decoder, recall, o, w, s, n, ev, &kept, err));
        if (ev > 0 && j->want_masks) LSA_TRY(write_mask(j, w->kept, ev, s, err));
        if (j->heat && s * j->heat->rows / n_token != drawn) {
            draw(j->heat, w->kept, ev, s, n_token);
            drawn = s * j->heat->rows / n_token;
        }
        j->r.gpu_bytes += (double)((s / LSA_CHUNK - ev + kept) * row_bytes);
        LSA_TRY(lsa_decoder_set_resident(decoder, ev > 0 ? w->kept : NULL, ev, err));
        LSA_TRY(lsa_decoder_forward(decoder, f->doc->token + s, n, w->logits, observes ? &taps : NULL,
                                    evicts ? &misses : NULL, err));
        if (observes) lsa_recall_end_window(recall, n);
        j->r.misses += lsa_max_i64(0, misses);
        j->r.misses_unknown = j->r.misses_unknown || misses < 0;
        lsa_count_logits(&j->r, f, w->logits, s, n);
        j->r.windows++;
        report_tokens(sh, n);
    }
done:
    return st;
}

/* Pages that the last window, which wants most, touches: kept chunks, and a run of newer ones. */
static int64_t reserve_of(const job *j, const lsa_validate_opts *o, int64_t n_token) {
    const int64_t ev = lsa_evictable((n_token - 1) / o->tau * o->tau, o->tail),
                  kept = j->r.budget >= 0 ? lsa_budget_chunks(j->r.budget, ev)
                         : o->top_k > 0   ? lsa_min_i64(o->top_k, ev)
                                          : ev,
                  newer = o->tail / LSA_CHUNK + o->tau / LSA_CHUNK + 2;
    return lsa_min_i64(kept + o->sink + newer / o->page + 2, n_token / LSA_CHUNK / o->page + 1);
}

static lsa_status open_decoder(lsa_decoder **out, const job *j, const shared *sh, lsa_err *err) {
    const lsa_validate_opts *o = sh->o;
    const int64_t n_token = j->f->doc->n_token;
    const bool all = j->r.policy == LSA_POLICY_DENSE;
    if (!sh->gpu || all || o->storage == LSA_GPU_ROWS_F32)
        return lsa_decoder_open(
            out, sh->e, sh->gpu,
            &(lsa_session_opts){.max_tokens = n_token, .chunk = o->tau, .attend_all = all}, err);
    lsa_gpu_session_opts g = {.max_tokens = n_token, .storage = o->storage};
    if (o->storage == LSA_GPU_ROWS_TIERED) {
        g.page = o->page;
        g.reserve = reserve_of(j, o, n_token);
    }
    for (int32_t l = 0; j->indexer && l < j->indexer->geom.n_layer; l++)
        g.keys_on_gpu[j->indexer->geom.ord[l].v] = true;
    return lsa_decoder_open_gpu(out, sh->e, sh->gpu, &g, err);
}

static lsa_status run_job(job *j, shared *sh, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_decoder *decoder = NULL;
    lsa_recall *recall = NULL;
    scratch w = {0};
    const int64_t n_token = j->f->doc->n_token, chunks = n_token / LSA_CHUNK + 1;
    LSA_TRY(open_decoder(&decoder, j, sh, err));
    if (j->indexer) LSA_TRY(lsa_recall_create(&recall, j->indexer, sh->e, chunks, sh->o->tau, err));
    LSA_TRY(scratch_make(&w, chunks, lsa_min_i64(sh->o->tau, n_token) * j->f->c->vocab, err));
    LSA_TRY(run_windows(j, sh, decoder, recall, &w, err));
    lsa_count_memory(&j->r, decoder);
done:
    scratch_free(&w);
    lsa_recall_destroy(recall);
    lsa_decoder_close(decoder);
    return st;
}

/* ---- a group of documents ---- */

static void add(lsa_result *a, const lsa_result *b) {
    a->documents++;
    for (int p = 0; p < LSA_N_PART; p++) {
        a->nll[p] += b->nll[p];
        a->n[p] += b->n[p];
    }
    a->tokens += b->n[LSA_PART_ALL];
    a->windows += b->windows, a->recalled += b->recalled, a->agree += b->agree, a->n_kl += b->n_kl,
        a->misses += b->misses;
    a->kept += b->kept, a->evictable += b->evictable, a->kl += b->kl, a->captured += b->captured,
        a->total_mass += b->total_mass;
    a->gpu_bytes += b->gpu_bytes, a->level1_bytes += b->level1_bytes;
    a->rows_bytes = lsa_max_i64(a->rows_bytes, b->rows_bytes);
    a->keys_bytes = lsa_max_i64(a->keys_bytes, b->keys_bytes);
    a->host_bytes = lsa_max_i64(a->host_bytes, b->host_bytes);
    a->swapped_bytes += b->swapped_bytes;
    a->misses_unknown = a->misses_unknown || b->misses_unknown;
    a->has_needs = a->has_needs || b->has_needs;
}

typedef struct group {
    lsa_full_run *f; /* [n] */
    lsa_result *full;
    lsa_status *st;
    lsa_err *err;
    job *jobs; /* [n, rows] */
    int64_t n, rows;
} group;

static void group_fini(group *g) {
    for (int64_t d = 0; g->f && d < g->n; d++) lsa_full_run_fini(&g->f[d]);
    for (int64_t i = 0; g->jobs && i < g->n * g->rows; i++) lsa_free(g->jobs[i].masks.data);
    void *p[] = {g->f, g->full, g->st, g->err, g->jobs};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    memset(g, 0, sizeof *g);
}

/* Documents of the next group: enough jobs for all threads, reference logits inside the limit, at least one
 * document. */
static int64_t group_size(const lsa_validation *v, const lsa_docs *docs, int64_t at, const lsa_engine *e,
                          const lsa_validate_opts *o) {
    const int64_t limit = o->logits_mib << 20, V = lsa_engine_config(e)->vocab, jobs = lsa_max_i64(1, v->n);
    const int64_t want = lsa_ceil_div(3 * (int64_t)omp_get_max_threads(), jobs);
    int64_t n = 0, bytes = 0;
    while (at + n < lsa_docs_count(docs) && n < want) {
        bytes += lsa_docs_at(docs, at + n)->n_token * V * (int64_t)sizeof(float);
        if (n > 0 && bytes > limit) break;
        n++;
    }
    return n;
}

static lsa_status full_runs(group *g, shared *sh, const lsa_docs *docs, int64_t at, lsa_err *err) {
    const lsa_validate_opts *o = sh->o;
    const int64_t V = lsa_engine_config(sh->e)->vocab;
    const bool outer =
        !sh->gpu && g->n >= omp_get_max_threads(); /* else the forward calls share the threads */
#pragma omp parallel for schedule(dynamic, 1) if (outer)
    for (int64_t d = 0; d < g->n; d++) {
        const lsa_doc *doc = lsa_docs_at(docs, at + d);
        const bool logits = doc->n_token * V * (int64_t)sizeof(float) <= o->logits_mib << 20;
        g->st[d] = lsa_full_run_make(&g->f[d], &g->full[d], sh->e, sh->gpu, o->storage != LSA_GPU_ROWS_F32,
                                     doc, o->tau, o->tail, logits, &g->err[d]);
        report_tokens(sh, doc->n_token);
    }
    for (int64_t d = 0; d < g->n; d++)
        if (g->st[d] != LSA_OK) {
            if (err && err->code == LSA_OK) *err = g->err[d];
            lsa_err_wrap(err, "document %lld, full", (long long)lsa_docs_at(docs, at + d)->index);
            return g->st[d];
        }
    return LSA_OK;
}

static void plan_jobs(group *g, lsa_validation *v, const lsa_indexer_file *indexer,
                      const lsa_indexer_file *untrained, const lsa_validate_opts *o) {
    for (int64_t d = 0; d < g->n; d++)
        for (int64_t i = 0; i < g->rows; i++) {
            job *j = &g->jobs[d * g->rows + i];
            j->f = &g->f[d];
            j->r = (lsa_result){
                .policy = v->row[i].policy, .budget = v->row[i].budget, .has_needs = j->f->doc->has_needs};
            j->indexer = j->r.policy == LSA_POLICY_LSA         ? indexer
                         : j->r.policy == LSA_POLICY_UNTRAINED ? untrained
                                                               : NULL;
            j->want_masks = o->masks && lsa_policy_evicts(j->r.policy);
            for (int k = 0; j->f->doc == v->first && k < v->n_heat; k++)
                if (v->heat[k].policy == j->r.policy && v->heat[k].budget == j->r.budget)
                    j->heat = &v->heat[k];
        }
}

static lsa_status run_group(lsa_validation *v, shared *sh, const lsa_docs *docs, int64_t at, int64_t n,
                            const lsa_indexer_file *indexer, const lsa_indexer_file *untrained,
                            lsa_commit *masks, lsa_err *err) {
    lsa_status st = LSA_OK;
    group g = {.n = n, .rows = v->n};
    LSA_TRY(LSA_NEW(g.f, n, err));
    LSA_TRY(LSA_NEW(g.full, n, err));
    LSA_TRY(LSA_NEW(g.st, n, err));
    LSA_TRY(LSA_NEW(g.err, n, err));
    LSA_TRY(LSA_NEW(g.jobs, n * v->n, err));
    LSA_TRY(full_runs(&g, sh, docs, at, err));
    plan_jobs(&g, v, indexer, untrained, sh->o);
#pragma omp parallel for schedule(dynamic, 1) if (!sh->gpu)
    for (int64_t i = 0; i < n * g.rows; i++) {
        job *j = &g.jobs[i];
        if (j->r.policy == LSA_POLICY_FULL)
            j->r = g.full[i / g.rows];
        else
            j->st = run_job(j, sh, &j->err);
    }
    for (int64_t i = 0; i < n * g.rows; i++)
        if (g.jobs[i].st != LSA_OK) {
            if (err && err->code == LSA_OK) *err = g.jobs[i].err;
            lsa_err_wrap(err, "document %lld, policy %s", (long long)g.jobs[i].f->doc->index,
                         lsa_policy_name(g.jobs[i].r.policy));
            st = g.jobs[i].st;
            goto done;
        }
    for (int64_t d = 0; d < n; d++) {
        add(&v->full, &g.full[d]);
        for (int64_t i = 0; i < g.rows; i++) {
            job *j = &g.jobs[d * g.rows + i];
            if (j->r.policy == LSA_POLICY_DENSE) { /* nothing is evicted, so it holds what full holds */
                j->r.captured = j->r.total_mass = g.full[d].total_mass;
                j->r.kept = j->r.evictable = g.full[d].evictable;
            }
            add(&v->row[i], &j->r);
            if (masks) LSA_TRY(lsa_commit_write(masks, j->masks.data, (size_t)j->masks.len, err));
        }
    }
done:
    group_fini(&g);
    return st;
}

/* ---- the whole ---- */

static lsa_status make_untrained(lsa_indexer_file *f, const lsa_indexer_file *like,
                                 const lsa_teacher_config *c, uint64_t seed, lsa_err *err) {
    if (like) {
        f->geom = like->geom;
        f->ensemble = like->ensemble;
    } else {
        f->geom = (lsa_indexer_geom){.hidden = c->hidden,
                                     .n_head = 32,
                                     .head_dim = 128,
                                     .rank = 128,
                                     .eps = c->norm_eps,
                                     .rope = c->rope_compress,
                                     .n_layer = c->n_csa};
        for (int32_t o = 0; o < c->n_csa; o++) {
            f->geom.ord[o].v = o;
            f->geom.id[o] = c->csa_id[o];
        }
    }
    lsa_status st = LSA_NEW(f->params, lsa_indexer_n_param(&f->geom), err);
    if (st == LSA_OK) lsa_indexer_init_random(f->params, &f->geom, seed);
    return st;
}

/* One row per policy and budget; full and dense have none, nor have indexers that keep by threshold or top-k.
 */
static lsa_status plan_rows(lsa_validation *v, const lsa_validate_opts *o, lsa_err *err) {
    lsa_status st = LSA_NEW(v->row, LSA_N_POLICY * LSA_MAX_BUDGET, err);
    const bool fixed = o->top_k > 0 || o->threshold >= 0;
    for (int k = 0; st == LSA_OK && k < LSA_N_POLICY; k++) {
        const lsa_policy p = (lsa_policy)k;
        const bool by_budget = lsa_policy_evicts(p) && !(fixed && lsa_policy_learned(p));
        for (int b = 0; o->policy[k] && b < (by_budget ? o->n_budget : 1); b++)
            v->row[v->n++] = (lsa_result){.policy = p, .budget = by_budget ? o->budget[b] : -1};
    }
    v->full = (lsa_result){.policy = LSA_POLICY_FULL, .budget = -1};
    return st;
}

/* The drawn policies, each at the budget nearest to 10 %. */
static void plan_heat(lsa_validation *v, int64_t tau) {
    const lsa_policy which[LSA_MAX_HEAT] = {LSA_POLICY_LSA, LSA_POLICY_ORACLE, LSA_POLICY_RECENCY};
    const int64_t n_token = v->first->n_token;
    for (int k = 0; k < LSA_MAX_HEAT; k++) {
        int best = -1;
        for (int i = 0; i < v->n; i++)
            if (v->row[i].policy == which[k] &&
                (best < 0 || fabs(v->row[i].budget - 0.1) < fabs(v->row[best].budget - 0.1)))
                best = i;
        if (best < 0) continue;
        lsa_heat *h = &v->heat[v->n_heat++];
        h->policy = which[k];
        h->budget = v->row[best].budget;
        h->rows = (int)lsa_min_i64(LSA_HEAT_ROWS, lsa_ceil_div(n_token, tau));
        h->cols = (int)lsa_min_i64(LSA_HEAT_COLS, lsa_max_i64(1, n_token / LSA_CHUNK));
    }
}

static lsa_status check(const lsa_validate_opts *o, const lsa_engine *e, const lsa_indexer_file *indexer,
                        lsa_err *err) {
    const bool learned = o->policy[LSA_POLICY_LSA] || o->policy[LSA_POLICY_UNTRAINED];
    if (o->policy[LSA_POLICY_LSA] && !indexer) LSA_RET_FAIL(LSA_E_ARG, "policy lsa needs --indexer");
    if (lsa_engine_config(e)->n_csa == 0)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED,
                     "the teacher has no compressed-sparse-attention layer: there is nothing to evict");
    return learned && indexer ? lsa_recall_check(indexer, lsa_engine_config(e), err) : LSA_OK;
}

lsa_status lsa_validate(lsa_validation *v, const lsa_engine *e, const lsa_docs *docs,
                        const lsa_indexer_file *indexer, const lsa_validate_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_indexer_file untrained = {0};
    lsa_commit masks = {.fd = -1};
    shared sh = {.e = e, .o = o};
    int64_t runs = 1;
    const double t0 = lsa_now_s();
    memset(v, 0, sizeof *v);
    LSA_TRY(check(o, e, indexer, err));
    LSA_TRY(plan_rows(v, o, err));
    if (o->policy[LSA_POLICY_UNTRAINED])
        LSA_TRY(make_untrained(&untrained, indexer, lsa_engine_config(e), o->seed, err));
    if (o->masks) LSA_TRY(lsa_commit_begin(&masks, o->masks, err));
    if (o->gpu) LSA_TRY(lsa_gpu_model_create(&sh.gpu, o->gpu, e, o->tau, err));
    v->first = lsa_docs_at(docs, 0);
    plan_heat(v, o->tau);
    for (int i = 0; i < v->n; i++) runs += v->row[i].policy != LSA_POLICY_FULL;
    lsa_progress_begin(&sh.progress, "validate", "tokens", (double)(lsa_docs_tokens(docs) * runs), 0);
    for (int64_t d = 0; d < lsa_docs_count(docs);) {
        const int64_t n = group_size(v, docs, d, e, o);
        LSA_TRY(run_group(v, &sh, docs, d, n, indexer, &untrained, o->masks ? &masks : NULL, err));
        d += n;
    }
    lsa_progress_end(&sh.progress);
    if (o->masks) LSA_TRY(lsa_commit_end(&masks, err));
done:
    v->seconds = lsa_now_s() - t0;
    if (o->masks) lsa_commit_abort(&masks);
    lsa_indexer_file_fini(&untrained);
    lsa_gpu_model_destroy(sh.gpu);
    if (st != LSA_OK && st != LSA_E_INTERRUPTED) lsa_validation_fini(v);
    return st;
}
