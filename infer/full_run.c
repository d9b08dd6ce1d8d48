/* The full run: see full_run.h. NUMERIC: calls are whole blocks of the engine, so a policy that evicts
 * nothing, window by window of 64, computes the same bits.
 *
 * The mistake that would stay silent: taking captured mass from a policy's own run, where evicted chunks have
 * none. */
#include "infer/full_run.h"

#include <math.h>
#include <string.h>

#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/model/gpu_session.h"

enum { CALL = 1024 }; /* tokens a forward call on the CPU: 16 blocks of the engine */

void lsa_full_run_fini(lsa_full_run *f) {
    void *p[] = {f->part, f->sel, f->mass, f->n_sel, f->logp, f->top1};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    memset(f, 0, sizeof *f);
}

static void on_csa(void *user, const lsa_tap_csa *t) {
    lsa_full_run *f = user;
    const int64_t at = t->ord.v * f->doc->n_token + t->position;
    f->n_sel[at] = t->n_sel;
    memcpy(f->sel + at * f->cap, t->sel, (size_t)t->n_sel * sizeof *t->sel);
    memcpy(f->mass + at * f->cap, t->mass, (size_t)t->n_sel * sizeof *t->mass);
}

void lsa_window_mass(float *mass, const lsa_full_run *f, int64_t s, int64_t e, int64_t n) {
    memset(mass, 0, (size_t)n * sizeof *mass);
    for (int64_t o = 0; o < f->c->n_csa; o++)
        for (int64_t t = s; t < e; t++) {
            const int64_t at = o * f->doc->n_token + t;
            for (int64_t i = at * f->cap; i < at * f->cap + f->n_sel[at]; i++)
                if (f->sel[i] < n) mass[f->sel[i]] += f->mass[i];
        }
}

/* ---- logits ---- */

static int32_t arg_max(const float *l, int64_t n) {
    int32_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (l[i] > l[best]) best = (int32_t)i;
    return best;
}

static double log_sum_exp(const float *l, int64_t n, float top) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += (double)expf(l[i] - top);
    return (double)top + log(s);
}

static void count_token(lsa_result *r, const lsa_full_run *f, const float *l, int64_t t, int32_t top,
                        double lse, bool with_kl) {
    const int32_t want = f->doc->token[t + 1];
    const uint8_t part = f->part[t + 1];
    for (int p = 0; p < LSA_N_PART; p++)
        if (part >> p & 1) {
            r->nll[p] += lse - (double)l[want];
            r->n[p]++;
        }
    if (part >> LSA_PART_ANSWER & 1) r->recalled += top == want;
    r->agree += top == f->top1[t];
    if (!with_kl) return;
    const float *p = f->logp + t * f->c->vocab;
    double kl = 0;
    for (int64_t i = 0; i < f->c->vocab; i++)
        kl += (double)(expf(p[i]) * (p[i] - (float)((double)l[i] - lse)));
    r->kl += kl;
    r->n_kl++;
}

void lsa_count_logits(lsa_result *r, const lsa_full_run *f, const float *logits, int64_t s, int64_t n) {
    const int64_t V = f->c->vocab;
    for (int64_t t = s; t < s + n && t + 1 < f->doc->n_token; t++) {
        const float *l = logits + (t - s) * V;
        const int32_t top = arg_max(l, V);
        count_token(r, f, l, t, top, log_sum_exp(l, V, l[top]), f->logp != NULL);
    }
}

/* The same for the full run itself, which is also the reference that the others are compared with; its own KL
 * is 0. */
static void keep_logits(lsa_full_run *f, lsa_result *r, const float *logits, int64_t s, int64_t n) {
    const int64_t V = f->c->vocab,
                  m = lsa_min_i64(n, f->doc->n_token - 1 - s); /* the last token predicts nothing */
    double lse[LSA_MAX_TAU];
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < m; t++) {
        const float *l = logits + t * V;
        const int32_t top = f->top1[s + t] = arg_max(l, V);
        lse[t] = log_sum_exp(l, V, l[top]);
        for (int64_t i = 0; f->logp && i < V; i++) f->logp[(s + t) * V + i] = (float)((double)l[i] - lse[t]);
    }
    for (int64_t t = 0; t < m; t++) count_token(r, f, logits + t * V, s + t, f->top1[s + t], lse[t], false);
    r->n_kl += f->logp ? m : 0;
}

void lsa_count_memory(lsa_result *r, lsa_decoder *d) {
    lsa_gpu_session_use u;
    if (!lsa_decoder_gpu(d)) return;
    lsa_gpu_session_count(lsa_decoder_gpu(d), &u);
    r->rows_bytes = lsa_max_i64(r->rows_bytes, u.rows);
    r->keys_bytes = lsa_max_i64(r->keys_bytes, u.keys + u.keys_level1);
    r->host_bytes = lsa_max_i64(r->host_bytes, u.host);
    r->swapped_bytes += u.swapped;
}

/* ---- the run ---- */

static lsa_status make_room(lsa_full_run *f, bool logits, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n = f->doc->n_token, rows = f->c->n_csa * n;
    f->cap = lsa_min_i64(f->c->index_topk, n / LSA_CHUNK + 1);
    LSA_TRY(LSA_NEW(f->part, n, err));
    LSA_TRY(LSA_NEW(f->sel, rows * f->cap, err));
    LSA_TRY(LSA_NEW(f->mass, rows * f->cap, err));
    LSA_TRY(LSA_NEW(f->n_sel, rows, err));
    LSA_TRY(LSA_NEW(f->top1, n, err));
    if (logits) LSA_TRY(LSA_NEW(f->logp, n * f->c->vocab, err));
    lsa_token_parts(f->part, f->doc);
done:
    return st;
}

/* What there was to evict, and that nothing was. */
static lsa_status count_windows(lsa_result *r, const lsa_full_run *f, int64_t tau, int64_t tail,
                                lsa_err *err) {
    const int64_t n = f->doc->n_token, row_bytes = lsa_server_row_bytes(f->c) * f->c->n_csa;
    float *mass = NULL;
    lsa_status st = LSA_NEW(mass, n / LSA_CHUNK + 1, err);
    if (st != LSA_OK) return st;
    for (int64_t s = 0; s < n; s += tau) {
        const int64_t ev = lsa_evictable(s, tail);
        lsa_window_mass(mass, f, s, lsa_min_i64(n, s + tau), ev);
        for (int64_t c = 0; c < ev; c++) r->total_mass += (double)mass[c];
        r->evictable += ev;
        r->gpu_bytes += (double)(s / LSA_CHUNK * row_bytes);
        r->windows++;
    }
    r->captured = r->total_mass;
    r->kept = r->evictable;
    lsa_free(mass);
    return LSA_OK;
}

lsa_status lsa_full_run_make(lsa_full_run *f, lsa_result *r, const lsa_engine *e, lsa_gpu_model *gpu,
                             bool encoded, const lsa_doc *doc, int64_t tau, int64_t tail, bool want_logits,
                             lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n = doc->n_token, call = gpu ? tau : CALL;
    lsa_decoder *decoder = NULL;
    float *logits = NULL;
    *f = (lsa_full_run){.doc = doc, .c = lsa_engine_config(e)};
    *r = (lsa_result){.policy = LSA_POLICY_FULL, .budget = -1, .has_needs = doc->has_needs};
    LSA_TRY(make_room(f, want_logits, err));
    LSA_TRY(LSA_NEW(logits, call * f->c->vocab, err));
    if (gpu && encoded) {
        const lsa_gpu_session_opts o = {.max_tokens = n, .storage = LSA_GPU_ROWS_SERVER};
        LSA_TRY(lsa_decoder_open_gpu(&decoder, e, gpu, &o, err));
    } else {
        LSA_TRY(lsa_decoder_open(&decoder, e, gpu, &(lsa_session_opts){.max_tokens = n, .chunk = call}, err));
    }
    const lsa_taps taps = {.user = f, .csa = on_csa};
    for (int64_t s = 0; s < n; s += call) {
        const int64_t m = lsa_min_i64(call, n - s);
        if (lsa_stop_requested()) LSA_FAIL(LSA_E_INTERRUPTED, "stopped");
        LSA_TRY(lsa_decoder_forward(decoder, doc->token + s, m, logits, &taps, NULL, err));
        keep_logits(f, r, logits, s, m);
    }
    lsa_count_memory(r, decoder);
    LSA_TRY(count_windows(r, f, tau, tail, err));
done:
    lsa_free(logits);
    lsa_decoder_close(decoder);
    return st;
}
