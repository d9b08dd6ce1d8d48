/* See judge_soak.h. */
#include "tests/testkit/judge_soak.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "infer/decoder.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"
#include "kernels/model/gpu_session.h"

enum { LIVE = 64 };

typedef struct request {
    uint64_t seed, sum; /* sum: of all logits so far */
    int64_t n_prompt, n_new, done;
    int32_t next;
    lsa_decoder *d; /* NULL: not there */
} request;

typedef struct soak {
    const lsa_engine *e;
    lsa_gpu_model *gpu;
    int32_t vocab, scale;
    int64_t room;
    float *logits;
    uint8_t *kept;
    LSA_VEC(request) ended;
} soak;

static request plan(uint64_t seed, int32_t scale) {
    lsa_rng g = lsa_rng_make(seed, 1);
    request r = {.seed = seed};
    r.n_prompt = 1 + (int64_t)lsa_rng_below(&g, (uint64_t)(40 * scale));
    r.n_new = 1 + (int64_t)lsa_rng_below(&g, (uint64_t)(24 * scale));
    return r;
}

static lsa_status join(soak *k, request *r, lsa_err *err) {
    lsa_gpu_session_opts o = {.max_tokens = r->n_prompt + r->n_new, .storage = LSA_GPU_ROWS_TIERED};
    o.page = 1 + (int32_t)(r->seed % 5);
    o.reserve = o.max_tokens / LSA_CHUNK / o.page + 1;
    return lsa_decoder_open_gpu(&r->d, k->e, k->gpu, &o, err);
}

static int32_t arg_max(const float *l, int32_t n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (l[i] > l[best]) best = i;
    return best;
}

/* The prompt, or a token and before it, at a window's start, another resident set. */
static lsa_status step(soak *k, request *r, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t pos = lsa_decoder_position(r->d), tau = 8 * k->scale;
    int64_t n = 1;
    if (pos == 0) {
        int32_t *prompt = NULL;
        lsa_rng g = lsa_rng_make(r->seed, 2);
        n = r->n_prompt;
        LSA_TRY(LSA_NEW(prompt, n, err));
        for (int64_t i = 0; i < n; i++) prompt[i] = (int32_t)lsa_rng_below(&g, (uint64_t)k->vocab);
        st = lsa_decoder_forward(r->d, prompt, n, k->logits, NULL, NULL, err);
        lsa_free(prompt);
    } else {
        if (pos == r->n_prompt || pos % tau == 0) {
            const int64_t ev = lsa_evictable(pos, 4 * k->scale);
            lsa_rng g = lsa_rng_make(r->seed, (uint64_t)pos + 3);
            for (int64_t c = 0; c < ev; c++) k->kept[c] = lsa_rng_below(&g, 4) == 0;
            LSA_TRY(lsa_decoder_set_resident(r->d, k->kept, ev, err));
        }
        st = lsa_decoder_forward(r->d, &r->next, 1, k->logits, NULL, NULL, err);
        r->done++;
    }
    if (st != LSA_OK) return st;
    r->sum = lsa_mix64(r->sum, lsa_xxh64(k->logits, (size_t)(n * k->vocab) * sizeof *k->logits));
    r->next = arg_max(k->logits + (n - 1) * k->vocab, k->vocab);
done:
    return st;
}

static lsa_status together(soak *k, int64_t steps, int32_t live, lsa_err *err) {
    lsa_status st = LSA_OK;
    request now[LIVE] = {0};
    lsa_rng g = lsa_rng_make(23, 9);
    uint64_t seed = 1;
    for (int64_t i = 0; i < steps; i++) {
        request *r = &now[lsa_rng_below(&g, (uint64_t)live)];
        if (!r->d) {
            *r = plan(seed++, k->scale);
            LSA_TRY(join(k, r, err));
        }
        LSA_TRY(step(k, r, err));
        if (r->done < r->n_new) continue;
        LSA_TRY(LSA_VEC_RESERVE(k->ended, k->ended.len + 1, err));
        lsa_decoder_close(r->d);
        r->d = NULL;
        k->ended.data[k->ended.len++] = *r;
    }
done:
    for (int32_t i = 0; i < LIVE; i++) lsa_decoder_close(now[i].d);
    return st;
}

static lsa_status alone(soak *k, const request *want, int *bad, lsa_err *err) {
    lsa_status st = LSA_OK;
    request r = plan(want->seed, k->scale);
    LSA_TRY(join(k, &r, err));
    for (int64_t i = 0; i <= r.n_new; i++) LSA_TRY(step(k, &r, err));
    if (r.sum != want->sum) {
        printf("request %llu: other logits than alone\n", (unsigned long long)want->seed);
        ++*bad;
    }
done:
    lsa_decoder_close(r.d);
    return st;
}

int judge_soak(lsa_ctx *ctx, const char *dir, int64_t steps, int32_t live, int32_t scale) {
    lsa_status st = LSA_OK;
    lsa_err why = {0}, *const err = &why;
    lsa_engine *e = NULL;
    soak k = {.scale = scale};
    int bad = 0;
    if (live > LIVE) return 1;
    LSA_TRY(lsa_engine_open(&e, dir, NULL, err));
    k.e = e;
    k.vocab = lsa_engine_config(e)->vocab;
    LSA_TRY(LSA_NEW(k.logits, 40 * scale * k.vocab, err));
    LSA_TRY(LSA_NEW(k.kept, 64 * scale, err));
    LSA_TRY(lsa_gpu_model_create(&k.gpu, ctx, e, 40 * scale, err));
    LSA_TRY(together(&k, steps, live, err));
    for (int64_t i = 0; i < k.ended.len; i++) LSA_TRY(alone(&k, &k.ended.data[i], &bad, err));
    printf("%lld steps over %d requests at a time, %lld came to their end: %s\n", (long long)steps, live,
           (long long)k.ended.len, bad ? "FAILED" : "each as alone");
    bad += k.ended.len < live;
done:
    if (st != LSA_OK) {
        printf("%s\n", why.msg);
        bad++;
    }
    lsa_free(k.logits);
    lsa_free(k.kept);
    lsa_free(k.ended.data);
    lsa_gpu_model_destroy(k.gpu);
    lsa_engine_close(e);
    return bad;
}
