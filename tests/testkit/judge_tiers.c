/* See judge_tiers.h. */
#include "tests/testkit/judge_tiers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "infer/decoder.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"
#include "kernels/model/gpu_session.h"

typedef struct result {
    float *logits; /* [n, vocab] */
    int32_t *sel;  /* [n_csa, n, top-k], -1 behind the selected */
    lsa_gpu_session_use use;
} result;

typedef struct how {
    const char *name;
    int share;     /* 1 of so many evictable chunks stays; 0: no set */
    bool prefetch; /* what the window after this one will want, while this one runs */
    bool again;    /* the sequence twice, in the same session */
    bool starve;   /* ask for everything before every window: refused once it does not fit, nothing changes */
} how;

typedef struct shared {
    const lsa_engine *e;
    const lsa_teacher_config *c;
    lsa_gpu_model *gpu;
    const judge_plan *p;
    const int32_t *token;
    int32_t *sel; /* of the run in progress */
    int64_t refused;
} shared;

static void on_csa(void *user, const lsa_tap_csa *a) {
    const shared *x = user;
    const int64_t k = x->c->index_topk;
    int32_t *to = x->sel + (a->ord.v * x->p->n + a->position) * k;
    for (int64_t i = 0; i < k; i++) to[i] = i < a->n_sel ? a->sel[i] : -1;
}

static void set_of(uint8_t *kept, int64_t ev, int64_t s, int share) {
    lsa_rng g = lsa_rng_make(77, (uint64_t)s);
    for (int64_t c = 0; c < ev; c++) kept[c] = lsa_rng_below(&g, (uint64_t)share) == 0;
}

static lsa_status set_window(shared *x, const how *h, lsa_decoder *d, uint8_t *kept, int64_t s,
                             lsa_err *err) {
    lsa_status st = LSA_OK;
    const judge_plan *p = x->p;
    const int64_t ev = lsa_evictable(s, p->tail), next = s + p->tau - s % p->tau;
    lsa_gpu_session *g = lsa_decoder_gpu(d);
    if (h->starve) {
        lsa_err no = {0};
        memset(kept, 1, (size_t)ev);
        const lsa_status refused = lsa_decoder_set_resident(d, kept, ev, &no);
        if (refused != LSA_OK && !strstr(no.msg, "reserve")) LSA_FAIL(LSA_E_BUG, "%s", no.msg);
        x->refused += refused == LSA_E_NOMEM;
    }
    set_of(kept, ev, s, h->share);
    LSA_TRY(lsa_decoder_set_resident(d, kept, ev, err));
    if (h->prefetch) {
        const int64_t ahead = lsa_min_i64(lsa_evictable(next, p->tail), s / LSA_CHUNK);
        set_of(kept, ahead, next, h->share);
        LSA_TRY(lsa_gpu_session_prefetch(g, kept, ahead, err));
    }
done:
    return st;
}

static lsa_status sequence(shared *x, const how *h, lsa_decoder *d, uint8_t *kept, result *r, lsa_err *err) {
    lsa_status st = LSA_OK;
    const judge_plan *p = x->p;
    const lsa_taps taps = {.user = x, .csa = on_csa};
    for (int64_t s = 0; s < p->n;) {
        int64_t m = lsa_min_i64(p->tau - s % p->tau, p->n - s), misses = 0;
        if (s < p->prefill)
            m = lsa_min_i64(p->chunk, p->prefill - s);
        else if (p->n - s <= p->single)
            m = 1;
        if (h->prefetch && s < p->prefill && s + m == p->prefill) { /* its last page is not full yet */
            set_of(kept, s / LSA_CHUNK, s, 1);
            LSA_TRY(lsa_gpu_session_prefetch(lsa_decoder_gpu(d), kept, s / LSA_CHUNK, err));
        }
        if (h->share && (s == p->prefill || (s > p->prefill && s % p->tau == 0)))
            LSA_TRY(set_window(x, h, d, kept, s, err));
        LSA_TRY(lsa_decoder_forward(d, x->token + s, m, r->logits + s * x->c->vocab, &taps, &misses, err));
        s += m;
    }
    lsa_gpu_session_count(lsa_decoder_gpu(d), &r->use);
done:
    return st;
}

static lsa_status run(shared *x, const how *h, const lsa_gpu_session_opts *o, result *r, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_decoder *d = NULL;
    uint8_t *kept = NULL;
    LSA_TRY(LSA_NEW(r->logits, x->p->n * x->c->vocab, err));
    LSA_TRY(LSA_NEW(r->sel, x->c->n_csa * x->p->n * x->c->index_topk, err));
    LSA_TRY(LSA_NEW(kept, x->p->n / LSA_CHUNK + 1, err));
    x->sel = r->sel;
    LSA_TRY(lsa_decoder_open_gpu(&d, x->e, x->gpu, o, err));
    for (int i = 0; i < 1 + h->again; i++) {
        lsa_decoder_reset(d);
        LSA_TRY(sequence(x, h, d, kept, r, err));
    }
done:
    lsa_free(kept);
    lsa_decoder_close(d);
    return st;
}

static int same(const shared *x, const result *a, const result *b, const char *name) {
    const bool ok = !memcmp(a->logits, b->logits, (size_t)(x->p->n * x->c->vocab) * 4) &&
                    !memcmp(a->sel, b->sel, (size_t)(x->c->n_csa * x->p->n * x->c->index_topk) * 4);
    printf("%s: %s; GPU rows %lld, keys %lld, for level 1 %lld, pinned %lld bytes, %lld swapped\n", name,
           ok ? "the same bits" : "OTHER BITS", (long long)b->use.rows, (long long)b->use.keys,
           (long long)b->use.keys_level1, (long long)b->use.host, (long long)b->use.swapped);
    return !ok;
}

/* Rows through the codec against f32 rows of the CPU that went through the simulation: the rotary channels
 * and keys are rounded besides, so most tokens are close, not all. */
static int close_to_cpu(const shared *x, const result *r, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_session *s = NULL;
    float *want = NULL;
    const int64_t n = x->p->n, V = x->c->vocab;
    double sum = 0, size = 0;
    LSA_TRY(LSA_NEW(want, n * V, err));
    LSA_TRY(lsa_session_create(&s, x->e, &(lsa_session_opts){.max_tokens = n, .chunk = n}, err));
    LSA_TRY(lsa_session_forward(s, x->token, n, want, false, NULL, err));
    for (int64_t i = 0; i < n * V; i++) {
        const double d = (double)(r->logits[i] - want[i]);
        sum += d * d;
        size += (double)want[i] * (double)want[i];
    }
    printf("encoded rows and keys against the CPU's: %.3g of the logits' norm\n", sqrt(sum / size));
done:
    lsa_free(want);
    lsa_session_destroy(s);
    return st != LSA_OK || !(sqrt(sum / size) < 0.3);
}

static int64_t pages_most(const judge_plan *p, const how *h, int32_t page) {
    int64_t most = 0;
    uint8_t *kept = calloc((size_t)p->n, 1);
    if (!kept) abort();
    for (int64_t s = p->prefill; s < p->n; s += p->tau - s % p->tau) {
        const int64_t ev = lsa_evictable(s, p->tail),
                      end = lsa_min_i64(s + p->tau - s % p->tau, p->n) / LSA_CHUNK;
        int64_t n = 0;
        set_of(kept, ev, s, h->share);
        for (int64_t i = 0; i * page < end; i++) {
            bool want = i == s / LSA_CHUNK / page && s / LSA_CHUNK % page;
            for (int64_t c = i * page; c < (i + 1) * page && c < end; c++) want = want || c >= ev || kept[c];
            n += want;
        }
        most = lsa_max_i64(most, n);
    }
    free(kept);
    return most;
}

int judge_tiers(lsa_ctx *ctx, const char *dir, const judge_plan *p, int32_t page) {
    lsa_status st = LSA_OK;
    lsa_err why = {0}, *const err = &why;
    lsa_engine *e = NULL;
    shared x = {.p = p};
    result r[7] = {0};
    int32_t *token = NULL;
    int bad = 1;
    const lsa_engine_opts eo = {.sim_fp8_kv = true};
    const int64_t all = p->n / LSA_CHUNK + 1;
    const int share = p->tail ? 3 : 12; /* pages without a resident chunk too */
    const how none = {"no set", 0, false, false, false}, every = {"everything", 1, false, false, false},
              some = {"some", share, false, false, false}, tight = {"some", share, false, true, true},
              ahead = {"some", share, true, false, false};
    lsa_gpu_session_opts server = {.max_tokens = p->n, .storage = LSA_GPU_ROWS_SERVER},
                         tiers = {.max_tokens = p->n, .storage = LSA_GPU_ROWS_TIERED, .page = 1};
    lsa_rng rng = lsa_rng_make(19, 7);
    LSA_TRY(lsa_engine_open(&e, dir, &eo, err));
    x.e = e;
    x.c = lsa_engine_config(e);
    LSA_TRY(LSA_NEW(token, p->n, err));
    x.token = token;
    for (int64_t i = 0; i < p->n; i++) token[i] = (int32_t)lsa_rng_below(&rng, (uint64_t)x.c->vocab);
    LSA_TRY(lsa_gpu_model_create(&x.gpu, ctx, e, lsa_max_i64(p->chunk, p->tau), err));
    LSA_TRY(run(&x, &none, &server, &r[0], err));
    LSA_TRY(run(&x, &some, &server, &r[1], err));
    tiers.reserve = all;
    LSA_TRY(run(&x, &every, &tiers, &r[2], err));
    tiers.reserve = pages_most(p, &some, 1); /* not one place too many */
    LSA_TRY(run(&x, &tight, &tiers, &r[3], err));
    tiers.keys_on_gpu[0] = true;
    LSA_TRY(run(&x, &ahead, &tiers, &r[4], err));
    tiers.page = page, tiers.reserve = pages_most(p, &some, page);
    LSA_TRY(run(&x, &some, &tiers, &r[5], err));
    tiers.reserve += 3;
    LSA_TRY(run(&x, &ahead, &tiers, &r[6], err));
    bad = close_to_cpu(&x, &r[0], err);
    bad += same(&x, &r[0], &r[2], "tiers, everything resident");
    bad += same(&x, &r[1], &r[3], "tiers, chunks, a full reserve, twice");
    bad += same(&x, &r[1], &r[4], "tiers, chunks, prefetched");
    bad += same(&x, &r[1], &r[5], "tiers, pages");
    bad += same(&x, &r[1], &r[6], "tiers, pages, prefetched");
    {
        const int64_t row = lsa_server_row_bytes(x.c) - LSA_KEY_BYTES;
        bad += r[0].use.rows != all * row * x.c->n_csa ||
               r[3].use.rows != pages_most(p, &some, 1) * row * x.c->n_csa || r[3].use.swapped <= 0 ||
               x.refused == 0 || r[3].use.host <= all * row * x.c->n_csa || r[4].use.keys_level1 <= 0 ||
               !memcmp(r[0].logits, r[1].logits, (size_t)(p->n * x.c->vocab) * 4);
    }
done:
    if (st != LSA_OK) {
        printf("%s\n", why.msg);
        bad++;
    }
    for (size_t i = 0; i < sizeof r / sizeof *r; i++) {
        lsa_free(r[i].logits);
        lsa_free(r[i].sel);
    }
    lsa_free(token);
    lsa_gpu_model_destroy(x.gpu);
    lsa_engine_close(e);
    return bad;
}
