/* See judge_session.h. NUMERIC: both sum in f32 in different orders, so a selection may differ where two
 * logits are closer than that; such tokens are counted, and few are allowed. */
#include "tests/testkit/judge_session.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "infer/decoder.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"

/* What a run shows; rows by CSA layer and token. */
typedef struct trace {
    const lsa_teacher_config *c;
    int64_t n, misses;
    int32_t *n_sel, *n_miss, *sel;             /* sel, logit, mass: index_topk a row */
    float *logit, *mass, *part, *hidden;       /* part: window, sink */
    float *logits, *key[LSA_MAX_CSA], *at_end; /* [n, vocab]; at_end: hidden vectors of the last token */
} trace;

typedef enum mode { PLAIN, EVICT, KEEP_ALL, DENSE } mode;

static lsa_status trace_make(trace *t, const lsa_teacher_config *c, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t rows = c->n_csa * n, k = c->index_topk;
    t->c = c, t->n = n;
    LSA_TRY(LSA_NEW(t->n_sel, rows, err));
    LSA_TRY(LSA_NEW(t->n_miss, rows, err));
    LSA_TRY(LSA_NEW(t->sel, rows * k, err));
    LSA_TRY(LSA_NEW(t->logit, rows * k, err));
    LSA_TRY(LSA_NEW(t->mass, rows * k, err));
    LSA_TRY(LSA_NEW(t->part, rows * 2, err));
    LSA_TRY(LSA_NEW(t->hidden, rows * c->hidden, err));
    LSA_TRY(LSA_NEW(t->logits, n * c->vocab, err));
    LSA_TRY(LSA_NEW(t->at_end, c->n_csa * c->hidden, err));
    for (int32_t o = 0; o < c->n_csa; o++)
        LSA_TRY(LSA_NEW(t->key[o], (n / LSA_CHUNK + 1) * c->index_head_dim, err));
done:
    return st;
}
static void trace_free(trace *t) {
    void *p[] = {t->n_sel, t->n_miss, t->sel, t->logit, t->mass, t->part, t->hidden, t->logits, t->at_end};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    for (int32_t o = 0; o < LSA_MAX_CSA; o++) lsa_free(t->key[o]);
}

static void on_csa(void *user, const lsa_tap_csa *a) {
    trace *t = user;
    const int64_t at = a->ord.v * t->n + a->position, k = t->c->index_topk;
    t->n_sel[at] = a->n_sel;
    t->n_miss[at] = a->n_miss;
    memcpy(t->sel + at * k, a->sel, (size_t)a->n_sel * 4);
    memcpy(t->logit + at * k, a->sel_logit, (size_t)a->n_sel * 4);
    memcpy(t->mass + at * k, a->mass, (size_t)a->n_sel * 4);
    memcpy(t->hidden + at * t->c->hidden, a->hidden, (size_t)t->c->hidden * 4);
    t->part[2 * at] = a->window_mass;
    t->part[2 * at + 1] = a->sink_mass;
}

static int64_t call_at(const judge_plan *p, int64_t s) {
    const int64_t left = p->n - s;
    if (s < p->prefill) return lsa_min_i64(p->chunk, p->prefill - s);
    if (left <= p->single) return 1;
    return lsa_min_i64(p->tau - s % p->tau, left - p->single);
}

/* A quarter of the evictable chunks, in the same places for both. */
static void choose_resident(uint8_t *kept, int64_t ev, int64_t s, mode how) {
    lsa_rng g = lsa_rng_make(31, (uint64_t)s);
    for (int64_t c = 0; c < ev; c++) kept[c] = how == KEEP_ALL || lsa_rng_below(&g, 4) == 0;
}

static lsa_status run(trace *t, const lsa_engine *e, lsa_gpu_model *gpu, const judge_plan *p,
                      const int32_t *token, mode how, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_decoder *d = NULL;
    uint8_t *kept = NULL;
    const lsa_taps taps = {.user = t, .csa = on_csa};
    const lsa_session_opts o = {.max_tokens = p->n, .chunk = p->n, .attend_all = how == DENSE};
    LSA_TRY(trace_make(t, lsa_engine_config(e), p->n, err));
    LSA_TRY(LSA_NEW(kept, p->n / LSA_CHUNK + 1, err));
    LSA_TRY(lsa_decoder_open(&d, e, gpu, &o, err));
    for (int64_t s = 0; s < p->n;) {
        const int64_t m = call_at(p, s), ev = lsa_evictable(s, p->tail);
        const bool set = s >= p->prefill && (how == EVICT || how == KEEP_ALL);
        int64_t misses = 0;
        if (set && (s == p->prefill || s % p->tau == 0)) {
            choose_resident(kept, ev, s, how);
            LSA_TRY(lsa_decoder_set_resident(d, kept, ev, err));
        }
        LSA_TRY(lsa_decoder_forward(d, token + s, m, t->logits + s * t->c->vocab, how == DENSE ? NULL : &taps,
                                    &misses, err));
        t->misses += misses;
        s += m;
        lsa_recall_input in; /* as level 1 does, in the middle of a sequence */
        LSA_TRY(lsa_decoder_recall_input(d, (lsa_csa_ord[]){{t->c->n_csa - 1}}, 1, &in, err));
    }
    for (int32_t i = 0; i < t->c->n_csa; i++) {
        lsa_recall_input in;
        LSA_TRY(lsa_decoder_recall_input(d, (lsa_csa_ord[]){{i}}, 1, &in, err));
        memcpy(t->key[i], in.key[0], (size_t)(p->n / LSA_CHUNK * t->c->index_head_dim) * 4);
        memcpy(t->at_end + i * t->c->hidden, in.hidden[0], (size_t)t->c->hidden * 4);
    }
done:
    lsa_free(kept);
    lsa_decoder_close(d);
    return st;
}

static void differ(double *worst, const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= *worst)) *worst = d;
    }
}

static void larger(double *worst, double v) {
    if (!(v <= *worst)) *worst = v;
}

typedef struct bounds {
    double logits, keys, logit, mass, hidden;
} bounds;

/* Largest differences of a layer's row into *d; false if it is out of bounds or selects other chunks. */
static bool compare_row(bounds *d, const trace *a, const trace *b, int64_t i, const bounds *most) {
    const int64_t k = a->c->index_topk, w = a->c->hidden;
    bounds r = {0};
    differ(&r.hidden, a->hidden + i * w, b->hidden + i * w, w);
    bool same = a->n_sel[i] == b->n_sel[i] && a->n_miss[i] == b->n_miss[i] &&
                !memcmp(a->sel + i * k, b->sel + i * k, (size_t)a->n_sel[i] * 4);
    if (same) {
        differ(&r.logit, a->logit + i * k, b->logit + i * k, a->n_sel[i]);
        differ(&r.mass, a->mass + i * k, b->mass + i * k, a->n_sel[i]);
        differ(&r.mass, a->part + 2 * i, b->part + 2 * i, 2);
    }
    larger(&d->hidden, r.hidden);
    larger(&d->logit, r.logit);
    larger(&d->mass, r.mass);
    return same && r.logit <= most->logit && r.mass <= most->mass && r.hidden <= most->hidden;
}

static int compare(const trace *a, const trace *b, const judge_plan *p, const char *what) {
    const lsa_teacher_config *c = a->c;
    const int64_t rows = c->n_csa * a->n, V = c->vocab, key = c->index_head_dim;
    int64_t apart = 0, far = 0, keys = 0;
    bounds d = {0};
    /* As in judge_teacher.c. Where two logits are nearly equal, or with simulations a value lies at a
     * boundary, either side may be taken, and later layers carry that on: some tokens may then be anywhere.
     * Seen on an H100 with a quarter resident: 4 of 3,000 tokens, 94 of 9,000 rows; with simulations 8 of
     * 1,500 tokens, 761 of 4,500 rows. */
    const bounds most =
        p->sim ? (bounds){0.1, 1e-3, 0.05, 1e-3, 0.02} : (bounds){1e-3, 2e-4, 3e-4, 2e-5, 2e-4};
    const double share = p->sim ? 0.25 : 0.02;
    for (int64_t t = 0; t < a->n; t++) {
        double v = 0;
        differ(&v, a->logits + t * V, b->logits + t * V, V);
        far += !(v <= most.logits);
        larger(&d.logits, v);
    }
    for (int32_t o = 0; o < c->n_csa; o++)
        for (int64_t i = 0; i < a->n / LSA_CHUNK; i++) {
            double v = 0;
            differ(&v, a->key[o] + i * key, b->key[o] + i * key, key);
            keys += !(v <= most.keys);
            larger(&d.keys, v);
        }
    for (int64_t i = 0; i < rows; i++) apart += !compare_row(&d, a, b, i, &most);
    double end = 0;
    differ(&end, a->at_end, b->at_end, c->n_csa * c->hidden);
    printf("%lld tokens, %s%s: logits %.2g, keys %.2g, native logits %.2g, mass %.2g, hidden %.2g; misses "
           "%lld and %lld; out of bounds: %lld tokens, %lld keys, %lld rows of %lld\n",
           (long long)p->n, what, p->sim ? ", cache simulations" : "", d.logits, d.keys, d.logit, d.mass,
           d.hidden, (long long)a->misses, (long long)b->misses, (long long)far, (long long)keys,
           (long long)apart, (long long)rows);
    return (double)far > share * (double)a->n || (double)keys > share * (double)(rows / LSA_CHUNK) ||
           (double)apart > share * (double)rows || (!p->sim && !(end <= most.hidden)) ||
           (!p->sim && a->misses != b->misses);
}

static int same_bits(const trace *a, const trace *b, const char *what) {
    const bool same = !memcmp(a->logits, b->logits, (size_t)(a->n * a->c->vocab) * 4);
    printf("%s: %s\n", what, same ? "the same bits" : "OTHER BITS");
    return !same;
}

int judge_session(lsa_ctx *ctx, const char *dir, const judge_plan *p) {
    lsa_status st = LSA_OK;
    lsa_err why = {0}, *const err = &why;
    lsa_engine *e = NULL;
    lsa_gpu_model *gpu = NULL;
    trace cpu[4] = {0}, dev[4] = {0};
    static const char *const name[] = {"everything resident", "a quarter resident", "a set of everything",
                                       "all attended"};
    int32_t *token = NULL;
    int bad = 1;
    const lsa_engine_opts eo = {.sim_fp8_kv = p->sim, .sim_fp4_index = p->sim};
    lsa_rng rng = lsa_rng_make(13, 7);
    LSA_TRY(lsa_engine_open(&e, dir, &eo, err));
    LSA_TRY(LSA_NEW(token, p->n, err));
    for (int64_t i = 0; i < p->n; i++)
        token[i] = (int32_t)lsa_rng_below(&rng, (uint64_t)lsa_engine_config(e)->vocab);
    LSA_TRY(lsa_gpu_model_create(&gpu, ctx, e, lsa_max_i64(p->chunk, p->tau), err));
    bad = 0;
    for (mode how = PLAIN; how <= DENSE; how++) {
        LSA_TRY(run(&dev[how], e, gpu, p, token, how, err));
        if (how == KEEP_ALL) continue;
        LSA_TRY(run(&cpu[how], e, NULL, p, token, how, err));
        bad += compare(&cpu[how], &dev[how], p, name[how]);
    }
    bad += same_bits(&dev[PLAIN], &dev[KEEP_ALL], name[KEEP_ALL]);
    if (dev[EVICT].misses == 0 || dev[PLAIN].misses != 0 || dev[KEEP_ALL].misses != 0) {
        printf("misses: some with a quarter resident, none otherwise: FAILED\n");
        bad++;
    }
done:
    if (st != LSA_OK) {
        printf("%s\n", why.msg);
        bad++;
    }
    for (int i = 0; i < 4; i++) {
        trace_free(&cpu[i]);
        trace_free(&dev[i]);
    }
    lsa_free(token);
    lsa_gpu_model_destroy(gpu);
    lsa_engine_close(e);
    return bad;
}
