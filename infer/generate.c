/* Generation: see generate.h. */
#include "infer/generate.h"

#include <string.h>

#include "infer/recall.h"
#include "kernels/core/clock.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

typedef struct watch {
    int64_t misses;
    lsa_recall *recall; /* NULL: no level 1 */
} watch;
static void on_csa(void *user, const lsa_tap_csa *t) {
    watch *w = user;
    if (w->recall) lsa_recall_observe(w->recall, t);
#pragma omp atomic
    w->misses += t->n_miss;
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
    /* whole windows a call, so that the prompt's are cut where decoding cuts */
    const int64_t call = lsa_max_i64(1, 1024 / o->tau) * o->tau;
    const lsa_teacher_config *c = lsa_engine_config(e);
    const int64_t total = o->n_prompt + o->n_new, chunks = total / LSA_CHUNK + 1;
    lsa_session *s = NULL;
    lsa_recall *r = NULL;
    float *logits = NULL, *score = NULL, *scratch = NULL;
    int32_t *sel = NULL;
    uint8_t *kept = NULL;
    watch seen = {0};
    const lsa_taps taps = {.user = &seen, .csa = on_csa};
    memset(g, 0, sizeof *g);
    if (o->n_prompt < 1 || o->n_new < 1) LSA_FAIL(LSA_E_ARG, "--prompt and --new must be at least 1");
    LSA_TRY(LSA_NEW(g->token, o->n_new, err));
    LSA_TRY(LSA_NEW(logits, c->vocab, err));
    LSA_TRY(LSA_NEW(score, chunks, err));
    LSA_TRY(LSA_NEW(scratch, chunks, err));
    LSA_TRY(LSA_NEW(sel, chunks, err));
    LSA_TRY(LSA_NEW(kept, chunks, err));
    lsa_session_opts so = {.max_tokens = total, .chunk = lsa_min_i64(call, total)};
    LSA_TRY(lsa_session_create(&s, e, &so, err));
    if (!o->full) LSA_TRY(lsa_recall_create(&r, indexer, e, chunks, call, err));
    seen.recall = r;
    double t0 = lsa_now_s(), frac = 0;
    for (int64_t t = 0; t < o->n_prompt; t += call) {
        const int64_t n = lsa_min_i64(call, o->n_prompt - t);
        LSA_TRY(lsa_session_forward(s, prompt + t, n, logits, true, r ? &taps : NULL, err));
        for (int64_t k = 0; r && k < n; k += o->tau) lsa_recall_end_window(r, lsa_min_i64(o->tau, n - k));
    }
    int64_t decided = o->n_prompt; /* where the window being decoded began */
    g->prefill_s = lsa_now_s() - t0;
    t0 = lsa_now_s();
    for (int64_t i = 0; i < o->n_new && !lsa_stop_requested(); i++) {
        g->token[g->n++] = arg_max(logits, c->vocab);
        if (g->n == o->n_new) break;
        const int64_t pos = lsa_session_position(s), ev = o->full ? 0 : lsa_evictable(pos, o->tail);
        if (!o->full && (pos == o->n_prompt || pos % o->tau == 0)) {
            if (r && pos > decided) lsa_recall_end_window(r, pos - decided);
            decided = pos;
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
    g->misses = seen.misses;
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
