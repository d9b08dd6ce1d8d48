/* Observed masses of a batch: see observer.h. The mistake that would stay silent: letting a chunk that was
 * evicted be observed, which no decoder can. */
#include "trainer/observer.h"

#include <string.h>

#include "kernels/continuation.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/cpu/topk.h"
#include "kernels/prior.h"

void lsa_observer_fini(lsa_observer *o) {
    void *p[] = {o->recent, o->memory, o->score, o->scratch, o->sel};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    memset(o, 0, sizeof *o);
}

static lsa_status room(lsa_observer *o, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (n <= o->room) return LSA_OK;
    lsa_observer_fini(o);
    LSA_TRY(LSA_NEW(o->recent, n, err));
    LSA_TRY(LSA_NEW(o->memory, n, err));
    LSA_TRY(LSA_NEW(o->score, n, err));
    LSA_TRY(LSA_NEW(o->scratch, n, err));
    LSA_TRY(LSA_NEW(o->sel, n, err));
    o->room = n;
done:
    return st;
}

/* Window `start` of row i was decoded: its masses on resident chunks are the recent ones. score: what ranked
 * them. */
static void end_window(lsa_observer *o, const lsa_observed *seen, const lsa_observe_args *a, int64_t start,
                       int64_t n) {
    const int64_t w = start / seen->tau,
                  k = lsa_topk(o->score, n, lsa_budget_chunks(a->budget, n), NULL, 0, o->scratch, o->sel);
    lsa_prior_end_window(o->recent, o->memory, seen->n_key);
    if (w >= seen->n_window) return;
    for (int64_t j = seen->begin[w], kept = 0; j < seen->begin[w + 1]; j++) {
        const int32_t c = seen->chunk[j];
        while (kept < k && o->sel[kept] < c) kept++;
        if (c >= n || (kept < k && o->sel[kept] == c)) o->recent[c] = seen->mass[j];
    }
}

static lsa_status observe_row(lsa_observer *o, const lsa_batch *b, const lsa_observe_args *a, int64_t i,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_observed *seen = b->observed[i];
    const int64_t n = b->n_cand[i];
    float *recent = b->recent + i * b->n, *memory = b->memory + i * b->n;
    const bool follows = o->room && o->doc == b->doc[i] && o->next == b->start[i];
    LSA_TRY(room(o, seen->n_key, err));
    if (!follows) lsa_observed_masses(o->recent, o->memory, seen, b->start[i]);
    for (int64_t c = 0; c < n; c++) {
        recent[c] = lsa_prior_feature(o->recent[c]);
        memory[c] = lsa_prior_feature(o->memory[c]);
        float sum = 0;
        for (int32_t l = 0; l < a->n_layer; l++) sum += a->z[l * a->stride + i * b->n + c];
        o->score[c] = sum + lsa_prior_value(a->weight, recent[c], memory[c]);
    }
    lsa_continue(o->score, NULL, o->score, n, a->cost, a->reach);
    end_window(o, seen, a, b->start[i], n);
    o->doc = b->doc[i];
    o->next = b->start[i] + seen->tau;
done:
    return st;
}

static bool follows(const lsa_batch *b, int64_t i) {
    return b->doc[i] == b->doc[i - 1] && b->start[i] == b->start[i - 1] + b->observed[i]->tau;
}

lsa_status lsa_observe(lsa_observer *o, const lsa_batch *b, const lsa_observe_args *a, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (!b->has_prior) LSA_RET_FAIL(LSA_E_BUG, "a batch without observed masses for a model with a prior");
    for (int64_t i = 0; o && i < b->m; i++) LSA_TRY(observe_row(o, b, a, i, err));
    if (o) goto done;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t first = 0; first < b->m; first++) {
        lsa_observer own = {0};
        lsa_status got = LSA_OK;
        if (first && follows(b, first)) continue; /* belongs to the rows before */
        for (int64_t i = first; got == LSA_OK && i < b->m && (i == first || follows(b, i)); i++)
            got = observe_row(&own, b, a, i, NULL);
        lsa_observer_fini(&own);
#pragma omp critical(lsa_observe_status)
        if (got != LSA_OK) st = got;
    }
    if (st != LSA_OK) LSA_FAIL(st, "out of memory for the observed masses of a batch");
done:
    return st;
}
