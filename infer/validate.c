/* Validation: see validate.h. Document by document: the full run first (it gives the window masses and the reference logits),
 * then every policy and budget side by side, each with a session of its own.
 *
 * The mistake that would stay silent: taking captured mass from a policy's own run, where evicted chunks have none. */
#include "infer/validate.h"

#include <math.h>
#include <string.h>

#include "kernels/core/clock.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"

static const char *const NAME[] = {"full", "dense", "lsa", "oracle", "recency", "random", "untrained", "last", "last-spread"};

const char *lsa_policy_name(lsa_policy p) {
    return NAME[p];
}

void lsa_validation_fini(lsa_validation *v) {
    lsa_free(v->row);
    memset(v, 0, sizeof *v);
}

/* ---- parts of a document ----------------------------------------------------------------------------------- */

static void mark(uint8_t *part, int64_t n, int64_t a, int64_t b, int bit, bool set) {
    for (int64_t t = lsa_max_i64(a, 0); t < lsa_min_i64(b, n); t++) part[t] = (uint8_t)(set ? part[t] | 1u << bit : part[t] & ~(1u << bit));
}

void lsa_token_parts(uint8_t *part, const lsa_doc *d) {
    const int64_t n = d->n_token;
    memset(part, 0, (size_t)n);
    mark(part, n, 1, n, LSA_PART_ALL, true);
    if (!d->has_needs) return;
    mark(part, n, lsa_max_i64(1, n / 2), n, LSA_PART_OTHER, true);
    for (int64_t i = 0; i < d->n_fact; i++) {
        const int64_t p = d->fact[i].statement, q = d->fact[i].question;
        mark(part, n, p, p + 25, LSA_PART_OTHER, false);
        mark(part, n, q, q + 25, LSA_PART_OTHER, false);
        if (q - p > 512) mark(part, n, q + 8, q + 24, LSA_PART_ANSWER, true);
    }
    for (int64_t i = 0; i < d->n_replay; i++) {
        const lsa_replay *r = &d->replay[i];
        mark(part, n, r->dest, r->dest + r->len, LSA_PART_OTHER, false);
        mark(part, n, r->dest + 16, r->dest + r->len, LSA_PART_REPLAY, true);
    }
}

/* ---- the full run ------------------------------------------------------------------------------------------ */

typedef struct full_run {
    const lsa_doc *doc;
    const lsa_teacher_config *c;
    uint8_t *part;
    int64_t cap;               /* entries kept per token and layer */
    int32_t *sel;              /* [n_csa, n_token, cap] */
    float *mass;               /* same */
    int32_t *n_sel;            /* [n_csa, n_token] */
    float *logp;               /* [n_token, vocab] log-probabilities, or NULL */
    int32_t *top1;             /* [n_token] arg max after token t */
} full_run;

static void on_full(void *user, const lsa_tap_csa *t) {
    full_run *f = user;
    const int64_t at = t->ord.v * f->doc->n_token + t->position;
    f->n_sel[at] = t->n_sel;
    memcpy(f->sel + at * f->cap, t->sel, (size_t)t->n_sel * sizeof *t->sel);
    memcpy(f->mass + at * f->cap, t->mass, (size_t)t->n_sel * sizeof *t->mass);
}

static void full_fini(full_run *f) {
    void *p[] = {f->part, f->sel, f->mass, f->n_sel, f->logp, f->top1};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    memset(f, 0, sizeof *f);
}

/* Native mass of window [s, e) summed over its tokens and all CSA layers, on chunks below n. */
static void window_mass(float *mass, const full_run *f, int64_t s, int64_t e, int64_t n) {
    memset(mass, 0, (size_t)n * sizeof *mass);
    for (int64_t o = 0; o < f->c->n_csa; o++)
        for (int64_t t = s; t < e; t++) {
            const int64_t at = o * f->doc->n_token + t;
            for (int32_t i = 0; i < f->n_sel[at]; i++)
                if (f->sel[at * f->cap + i] < n) mass[f->sel[at * f->cap + i]] += f->mass[at * f->cap + i];
        }
}

/* ---- logits ------------------------------------------------------------------------------------------------ */

static int32_t arg_max(const float *l, int64_t n) {
    int32_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (l[i] > l[best]) best = (int32_t)i;
    return best;
}

static double log_sum_exp(const float *l, int64_t n) {
    float m = l[0];
    for (int64_t i = 1; i < n; i++) m = fmaxf(m, l[i]);
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += (double)expf(l[i] - m);
    return (double)m + log(s);
}

/* Counts the logits after tokens [s, s+n): they predict tokens s+1 .. s+n. first: this is the full run itself. */
static void count_logits(lsa_result *r, full_run *f, const float *logits, int64_t s, int64_t n, bool first) {
    const int64_t V = f->c->vocab;
    for (int64_t t = s; t < s + n && t + 1 < f->doc->n_token; t++) {
        const float *l = logits + (t - s) * V;
        const int32_t want = f->doc->token[t + 1], top = arg_max(l, V);
        const double lse = log_sum_exp(l, V), nll = lse - (double)l[want];
        const uint8_t part = f->part[t + 1];
        for (int p = 0; p < LSA_N_PART; p++)
            if (part >> p & 1) {
                r->nll[p] += nll;
                r->n[p]++;
            }
        if (part >> LSA_PART_ANSWER & 1) r->recalled += top == want;
        if (first) {
            f->top1[t] = top;
            for (int64_t i = 0; f->logp && i < V; i++) f->logp[t * V + i] = (float)((double)l[i] - lse);
        }
        r->agree += top == f->top1[t];
        if (f->logp) {
            const float *p = f->logp + t * V;
            double kl = 0;
            for (int64_t i = 0; i < V; i++) kl += (double)(expf(p[i]) * (p[i] - (l[i] - (float)lse)));
            r->kl += kl;
            r->n_kl++;
        }
    }
}

/* ---- resident sets ----------------------------------------------------------------------------------------- */

typedef struct job {
    lsa_result r;
    const lsa_indexer_file *indexer; /* lsa and untrained */
    lsa_heat *heat;                  /* NULL: not drawn */
    lsa_status st;
    lsa_err err;
} job;

typedef struct window_scratch {
    float *score, *mass, *scratch;
    int32_t *sel;
    uint8_t *kept;
} window_scratch;

static lsa_status ws_make(window_scratch *w, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(LSA_NEW(w->score, n, err));
    LSA_TRY(LSA_NEW(w->mass, n, err));
    LSA_TRY(LSA_NEW(w->scratch, n, err));
    LSA_TRY(LSA_NEW(w->sel, n, err));
    LSA_TRY(LSA_NEW(w->kept, n, err));
done:
    return st;
}
static void ws_free(window_scratch *w) {
    void *p[] = {w->score, w->mass, w->scratch, w->sel, w->kept};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
}

/* Scores of the policies that need no model. */
static void simple_score(float *score, const job *j, const full_run *f, const lsa_validate_opts *o, int64_t s, int64_t n, float *mass) {
    switch (j->r.policy) {
    case LSA_POLICY_ORACLE: memcpy(score, mass, (size_t)n * sizeof *score); return;
    case LSA_POLICY_RECENCY:
        for (int64_t c = 0; c < n; c++) score[c] = (float)c;
        return;
    case LSA_POLICY_RANDOM: {
        lsa_rng g = lsa_rng_make(lsa_mix64(o->seed, 401), lsa_mix64((uint64_t)f->doc->index, (uint64_t)s));
        for (int64_t c = 0; c < n; c++) score[c] = lsa_rng_uniform(&g);
        return;
    }
    case LSA_POLICY_LAST:
    case LSA_POLICY_LAST_SPREAD: {
        window_mass(mass, f, s - o->tau, s, n);
        memcpy(score, mass, (size_t)n * sizeof *score);
        for (int64_t c = 0; j->r.policy == LSA_POLICY_LAST_SPREAD && c < n; c++)
            for (int64_t k = 1; mass[c] > 0.0f && k <= 16 && c + k < n; k++) score[c + k] = fmaxf(score[c + k], mass[c] - 1e-3f * (float)k);
        return;
    }
    default: return;
    }
}

static void draw(lsa_heat *h, const uint8_t *kept, int64_t n, int64_t s, int64_t n_token) {
    const int64_t row = s * h->rows / n_token, chunks = lsa_max_i64(1, n_token / LSA_CHUNK);
    int64_t have[LSA_HEAT_COLS] = {0}, all[LSA_HEAT_COLS] = {0};
    for (int64_t c = 0; c < s / LSA_CHUNK; c++) {
        const int64_t col = c * h->cols / chunks;
        all[col]++;
        have[col] += c >= n || kept[c];
    }
    for (int k = 0; k < h->cols; k++)
        if (all[k]) h->v[row][k] = (uint8_t)(1 + 254 * have[k] / all[k]); /* 0: not formed yet */
}

/* Misses of a window, added up by worker threads of the session. */
typedef struct miss_count {
    int64_t n;
} miss_count;
static void on_miss(void *user, const lsa_tap_csa *t) {
    miss_count *m = user;
    if (t->n_miss == 0) return;
#pragma omp atomic
    m->n += t->n_miss;
}

static lsa_status run_windows(job *j, lsa_session *session, lsa_recall *recall, full_run *f, const lsa_validate_opts *o, window_scratch *w, float *logits,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n_token = f->doc->n_token, row_bytes = lsa_server_row_bytes(f->c);
    const bool dense = j->r.policy == LSA_POLICY_DENSE;
    miss_count miss = {0};
    const lsa_taps taps = {.user = &miss, .csa = on_miss};
    const bool fixed = o->top_k > 0 || o->threshold >= 0; /* the budget does not decide */
    const lsa_keep_rule by_budget = {.budget = j->r.budget, .threshold = -1, .top_k = 0, .sink = o->sink};
    const lsa_keep_rule by_rule = {.budget = -1, .threshold = o->threshold, .top_k = o->top_k, .sink = o->sink};
    for (int64_t s = 0; s < n_token; s += o->tau) {
        const int64_t n = lsa_min_i64(o->tau, n_token - s), ev = dense ? 0 : lsa_evictable(s, o->tail);
        int64_t kept = ev;
        if (lsa_stop_requested()) LSA_FAIL(LSA_E_INTERRUPTED, "stopped; nothing is kept of a validation: run it again");
        if (ev > 0) {
            window_mass(w->mass, f, s, s + n, ev);
            double total = 0, have = 0;
            for (int64_t c = 0; c < ev; c++) total += (double)w->mass[c];
            if (recall) LSA_TRY(lsa_recall_score(recall, session, w->score, ev, err));
            else simple_score(w->score, j, f, o, s, ev, w->mass);
            kept = lsa_keep(w->kept, w->score, ev, recall && fixed ? &by_rule : &by_budget, !recall || j->indexer->ensemble == LSA_ENSEMBLE_SUM, w->scratch, w->sel);
            if (j->r.policy == LSA_POLICY_LAST || j->r.policy == LSA_POLICY_LAST_SPREAD) window_mass(w->mass, f, s, s + n, ev);
            for (int64_t c = 0; c < ev; c++) have += w->kept[c] ? (double)w->mass[c] : 0.0;
            j->r.captured += have;
            j->r.total_mass += total;
            j->r.evictable += ev;
            j->r.kept += kept;
        }
        if (j->heat && (s == 0 || s * j->heat->rows / n_token != (s - o->tau) * j->heat->rows / n_token)) draw(j->heat, w->kept, ev, s, n_token);
        const int64_t visible = s / LSA_CHUNK;
        j->r.gpu_bytes += (double)((visible - ev + kept) * row_bytes * f->c->n_csa);
        if (recall) j->r.gpu_bytes += (double)((ev - kept) * LSA_KEY_BYTES * j->indexer->geom.n_layer); /* level 1 reads every key */
        lsa_session_set_resident(session, ev > 0 ? w->kept : NULL, ev);
        LSA_TRY(lsa_session_forward(session, f->doc->token + s, n, logits, false, &taps, err));
        count_logits(&j->r, f, logits, s, n, false);
        j->r.windows++;
    }
    j->r.misses += miss.n;
done:
    return st;
}

static lsa_status run_job(job *j, const lsa_engine *e, full_run *f, const lsa_validate_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_session *session = NULL;
    lsa_recall *recall = NULL;
    window_scratch w = {0};
    float *logits = NULL;
    const int64_t chunks = f->doc->n_token / LSA_CHUNK + 1;
    lsa_session_opts so = {.max_tokens = f->doc->n_token, .chunk = o->tau, .attend_all = j->r.policy == LSA_POLICY_DENSE};
    LSA_TRY(lsa_session_create(&session, e, &so, err));
    if (j->indexer) LSA_TRY(lsa_recall_create(&recall, j->indexer, e, chunks, err));
    LSA_TRY(ws_make(&w, chunks, err));
    LSA_TRY(LSA_NEW(logits, o->tau * f->c->vocab, err));
    LSA_TRY(run_windows(j, session, recall, f, o, &w, logits, err));
done:
    lsa_free(logits);
    ws_free(&w);
    lsa_recall_destroy(recall);
    lsa_session_destroy(session);
    return st;
}

static lsa_status run_full(lsa_result *r, full_run *f, const lsa_engine *e, const lsa_validate_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    enum { CHUNK = 1024 };
    const int64_t n = f->doc->n_token, V = f->c->vocab;
    lsa_session *session = NULL;
    float *logits = NULL;
    f->cap = lsa_min_i64(f->c->index_topk, n / LSA_CHUNK + 1);
    LSA_TRY(LSA_NEW(f->part, n, err));
    LSA_TRY(LSA_NEW(f->sel, f->c->n_csa * n * f->cap, err));
    LSA_TRY(LSA_NEW(f->mass, f->c->n_csa * n * f->cap, err));
    LSA_TRY(LSA_NEW(f->n_sel, f->c->n_csa * n, err));
    LSA_TRY(LSA_NEW(f->top1, n, err));
    if (n * V * 4 <= o->logits_mib << 20) LSA_TRY(LSA_NEW(f->logp, n * V, err));
    LSA_TRY(LSA_NEW(logits, CHUNK * V, err));
    lsa_token_parts(f->part, f->doc);
    lsa_session_opts so = {.max_tokens = n, .chunk = CHUNK};
    LSA_TRY(lsa_session_create(&session, e, &so, err));
    const lsa_taps taps = {.user = f, .csa = on_full};
    for (int64_t s = 0; s < n; s += CHUNK) {
        const int64_t m = lsa_min_i64(CHUNK, n - s);
        if (lsa_stop_requested()) LSA_FAIL(LSA_E_INTERRUPTED, "stopped; nothing is kept of a validation: run it again");
        LSA_TRY(lsa_session_forward(session, f->doc->token + s, m, logits, false, &taps, err));
        count_logits(r, f, logits, s, m, true);
    }
    for (int64_t s = 0; s < n; s += o->tau) {
        const int64_t ev = lsa_evictable(s, o->tail);
        r->evictable += ev;
        r->kept += ev;
        r->gpu_bytes += (double)(s / LSA_CHUNK * lsa_server_row_bytes(f->c) * f->c->n_csa);
        r->windows++;
    }
    r->captured = r->total_mass = 1;
done:
    lsa_free(logits);
    lsa_session_destroy(session);
    return st;
}

/* ---- all documents ----------------------------------------------------------------------------------------- */

static void add(lsa_result *a, const lsa_result *b) {
    a->documents++;
    for (int p = 0; p < LSA_N_PART; p++) {
        a->nll[p] += b->nll[p];
        a->n[p] += b->n[p];
    }
    a->tokens += b->n[LSA_PART_ALL];
    a->windows += b->windows, a->recalled += b->recalled, a->agree += b->agree, a->n_kl += b->n_kl, a->misses += b->misses;
    a->kept += b->kept, a->evictable += b->evictable, a->kl += b->kl, a->captured += b->captured, a->total_mass += b->total_mass;
    a->gpu_bytes += b->gpu_bytes;
    a->has_needs = a->has_needs || b->has_needs;
}

static lsa_status make_untrained(lsa_indexer_file *f, const lsa_indexer_file *like, const lsa_teacher_config *c, uint64_t seed, lsa_err *err) {
    memset(f, 0, sizeof *f);
    if (like) {
        f->geom = like->geom;
        f->ensemble = like->ensemble;
    } else {
        f->geom = (lsa_indexer_geom){.hidden = c->hidden, .n_head = 32, .head_dim = 128, .rank = 128, .eps = c->norm_eps, .rope = c->rope_compress, .n_layer = c->n_csa};
        for (int32_t o = 0; o < c->n_csa; o++) {
            f->geom.ord[o].v = o;
            f->geom.id[o] = c->csa_id[o];
        }
    }
    lsa_status st = LSA_NEW(f->params, lsa_indexer_n_param(&f->geom), err);
    if (st == LSA_OK) lsa_indexer_init_random(f->params, &f->geom, seed);
    return st;
}

static bool has_budget(lsa_policy p) {
    return p != LSA_POLICY_FULL && p != LSA_POLICY_DENSE;
}

/* The drawn policies: lsa and oracle at the budget nearest to 10 %. */
static void plan_heat(lsa_validation *v, int64_t n_token, int64_t tau) {
    const lsa_policy which[] = {LSA_POLICY_ORACLE, LSA_POLICY_LSA, LSA_POLICY_RECENCY};
    for (int k = 0; k < 3; k++) {
        int best = -1;
        for (int i = 0; i < v->n; i++)
            if (v->row[i].policy == which[k] && (best < 0 || fabs(v->row[i].budget - 0.1) < fabs(v->row[best].budget - 0.1))) best = i;
        if (best < 0) continue;
        lsa_heat *h = &v->heat[v->n_heat++];
        h->policy = which[k];
        h->budget = v->row[best].budget;
        h->rows = (int)lsa_min_i64(LSA_HEAT_ROWS, lsa_ceil_div(n_token, tau));
        h->cols = (int)lsa_min_i64(LSA_HEAT_COLS, lsa_max_i64(1, n_token / LSA_CHUNK));
    }
}

static lsa_status one_document(lsa_validation *v, const lsa_engine *e, const lsa_doc *doc, const lsa_indexer_file *indexer, const lsa_indexer_file *untrained,
                               const lsa_validate_opts *o, bool first, lsa_err *err) {
    lsa_status st = LSA_OK;
    job *jobs = NULL;
    full_run f = {.doc = doc, .c = lsa_engine_config(e)};
    lsa_result full = {.policy = LSA_POLICY_FULL, .budget = -1, .has_needs = doc->has_needs};
    LSA_TRY(LSA_NEW(jobs, v->n, err));
    LSA_TRY(run_full(&full, &f, e, o, err));
    for (int i = 0; i < v->n; i++) {
        job *j = &jobs[i];
        j->r = (lsa_result){.policy = v->row[i].policy, .budget = v->row[i].budget, .has_needs = doc->has_needs};
        j->indexer = j->r.policy == LSA_POLICY_LSA ? indexer : j->r.policy == LSA_POLICY_UNTRAINED ? untrained : NULL;
        for (int k = 0; first && k < v->n_heat; k++)
            if (v->heat[k].policy == j->r.policy && v->heat[k].budget == j->r.budget) j->heat = &v->heat[k];
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < v->n; i++) {
        if (jobs[i].r.policy == LSA_POLICY_FULL) jobs[i].r = full;
        else jobs[i].st = run_job(&jobs[i], e, &f, o, &jobs[i].err);
    }
    for (int i = 0; i < v->n; i++) {
        if (jobs[i].st != LSA_OK) {
            if (err && err->code == LSA_OK) *err = jobs[i].err;
            st = jobs[i].st;
            lsa_err_wrap(err, "document %lld, policy %s", (long long)doc->index, lsa_policy_name(jobs[i].r.policy));
            goto done;
        }
        add(&v->row[i], &jobs[i].r);
    }
done:
    full_fini(&f);
    lsa_free(jobs);
    return st;
}

lsa_status lsa_validate(lsa_validation *v, const lsa_engine *e, const lsa_docs *docs, const lsa_indexer_file *indexer, const lsa_validate_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_indexer_file untrained = {0};
    lsa_progress p;
    const double t0 = lsa_now_s();
    memset(v, 0, sizeof *v);
    LSA_TRY(LSA_NEW(v->row, LSA_N_POLICY * LSA_MAX_BUDGET, err));
    for (int k = 0; k < LSA_N_POLICY; k++) {
        if (!o->policy[k]) continue;
        for (int b = 0; b < (has_budget((lsa_policy)k) ? o->n_budget : 1); b++)
            v->row[v->n++] = (lsa_result){.policy = (lsa_policy)k, .budget = has_budget((lsa_policy)k) ? o->budget[b] : -1};
    }
    if (o->policy[LSA_POLICY_LSA] && !indexer) LSA_FAIL(LSA_E_ARG, "policy lsa needs --indexer");
    if (o->policy[LSA_POLICY_UNTRAINED]) LSA_TRY(make_untrained(&untrained, indexer, lsa_engine_config(e), o->seed, err));
    plan_heat(v, lsa_docs_at(docs, 0)->n_token, o->tau);
    lsa_progress_begin(&p, "validate", "documents", (double)lsa_docs_count(docs), 0);
    for (int64_t d = 0; d < lsa_docs_count(docs); d++) {
        LSA_TRY(one_document(v, e, lsa_docs_at(docs, d), indexer, &untrained, o, d == 0, err));
        lsa_progress_update(&p, (double)(d + 1), NULL);
    }
    lsa_progress_end(&p);
    v->seconds = lsa_now_s() - t0;
done:
    lsa_indexer_file_fini(&untrained);
    if (st != LSA_OK) lsa_validation_fini(v);
    return st;
}
