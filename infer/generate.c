/* Generation: see generate.h. */
#include "infer/generate.h"

#include <string.h>

#include "infer/recall.h"
#include "kernels/core/clock.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

static void on_csa(void *user, const lsa_tap_csa *t) {
    int64_t *misses = user;
#pragma omp atomic
    *misses += t->n_miss;
}

static int32_t arg_max(const float *l, int64_t n) {
    int32_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (l[i] > l[best]) best = (int32_t)i;
    return best;
}

void lsa_generation_fini(lsa_generation *g) {
    lsa_free(g->token);
    memset(g, 0, sizeof *g);
}

lsa_status lsa_generate(lsa_generation *g, const lsa_engine *e, const lsa_indexer_file *indexer,
                        const int32_t *prompt, const lsa_generate_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    enum { CHUNK = 1024 };
    const lsa_teacher_config *c = lsa_engine_config(e);
    const int64_t total = o->n_prompt + o->n_new, chunks = total / LSA_CHUNK + 1;
    lsa_session *s = NULL;
    lsa_recall *r = NULL;
    float *logits = NULL, *score = NULL, *scratch = NULL;
    int32_t *sel = NULL;
    uint8_t *kept = NULL;
    const lsa_taps taps = {.user = &g->misses, .csa = on_csa};
    memset(g, 0, sizeof *g);
    if (o->n_prompt < 1 || o->n_new < 1) LSA_FAIL(LSA_E_ARG, "--prompt and --new must be at least 1");
    LSA_TRY(LSA_NEW(g->token, o->n_new, err));
    LSA_TRY(LSA_NEW(logits, c->vocab, err));
    LSA_TRY(LSA_NEW(score, chunks, err));
    LSA_TRY(LSA_NEW(scratch, chunks, err));
    LSA_TRY(LSA_NEW(sel, chunks, err));
    LSA_TRY(LSA_NEW(kept, chunks, err));
    lsa_session_opts so = {.max_tokens = total, .chunk = CHUNK};
    LSA_TRY(lsa_session_create(&s, e, &so, err));
    if (!o->full) LSA_TRY(lsa_recall_create(&r, indexer, e, chunks, err));
    double t0 = lsa_now_s(), frac = 0;
    for (int64_t t = 0; t < o->n_prompt; t += CHUNK)
        LSA_TRY(
            lsa_session_forward(s, prompt + t, lsa_min_i64(CHUNK, o->n_prompt - t), logits, true, NULL, err));
    g->prefill_s = lsa_now_s() - t0;
    t0 = lsa_now_s();
    for (int64_t i = 0; i < o->n_new && !lsa_stop_requested(); i++) {
        g->token[g->n++] = arg_max(logits, c->vocab);
        if (g->n == o->n_new) break;
        const int64_t pos = lsa_session_position(s), ev = o->full ? 0 : lsa_evictable(pos, o->tail);
        if (!o->full && (pos == o->n_prompt || pos % o->tau == 0)) {
            const lsa_keep_rule rule = {.budget = o->budget, .threshold = -1, .sink = o->sink};
            if (ev > 0) {
                LSA_TRY(lsa_recall_score(r, s, score, ev, err));
                frac += (double)lsa_keep(kept, score, ev, &rule, indexer->ensemble == LSA_ENSEMBLE_SUM,
                                         scratch, sel) /
                        (double)ev;
                g->decisions++;
            }
            lsa_session_set_resident(s, ev > 0 ? kept : NULL, ev);
        }
        LSA_TRY(lsa_session_forward(s, &g->token[g->n - 1], 1, logits, true, &taps, err));
    }
    g->decode_s = lsa_now_s() - t0;
    g->kept_frac = g->decisions ? frac / (double)g->decisions : 1.0;
done:
    lsa_free(logits);
    lsa_free(score);
    lsa_free(scratch);
    lsa_free(sel);
    lsa_free(kept);
    lsa_recall_destroy(r);
    lsa_session_destroy(s);
    if (st != LSA_OK) lsa_generation_fini(g);
    return st;
}
