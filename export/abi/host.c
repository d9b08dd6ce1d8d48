/* The server ABI on the CPU: see handle.h. Nothing here allocates after lsa_idx_host_init. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "export/abi/handle.h"
#include "kernels/core/dtype.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

#define TAKE(field, n)                                                                                       \
    do {                                                                                                     \
        LSA_TRY(LSA_NEW(h->field, n, err));                                                                  \
        h->bytes += (int64_t)(n) * (int64_t)sizeof *h->field;                                                \
    } while (0)

lsa_status lsa_idx_host_init(lsa_idx_host *h, const lsa_idx_shared *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &s->geom;
    const int64_t m = s->max_batch, heads = (int64_t)g->n_layer * m * g->n_head;
    memset(h, 0, sizeof *h);
    h->n_work = omp_get_max_threads();
    TAKE(x, m * g->hidden);
    TAKE(a, m * g->rank);
    TAKE(u, m * g->rank);
    TAKE(rstd, m);
    TAKE(q, heads * 128);
    TAKE(w, heads);
    TAKE(score, s->max_chunks);
    TAKE(id, s->max_chunks);
    TAKE(work, h->n_work);
done:
    if (st != LSA_OK) lsa_idx_host_fini(h);
    return st;
}

void lsa_idx_host_fini(lsa_idx_host *h) {
    void *p[] = {h->x, h->a, h->u, h->rstd, h->q, h->w, h->score, h->id, h->work};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    memset(h, 0, sizeof *h);
}

static float *query_at(const lsa_idx *x, int32_t layer, int32_t i) {
    return x->host.q + ((int64_t)layer * x->s->max_batch + i) * x->s->geom.n_head * 128;
}
static float *weight_at(const lsa_idx *x, int32_t layer, int32_t i) {
    return x->host.w + ((int64_t)layer * x->s->max_batch + i) * x->s->geom.n_head;
}

lsa_status lsa_idx_host_query(lsa_idx *x, int32_t layer, int32_t m, const uint16_t *hidden,
                              const int64_t *position, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_idx_shared *s = x->s;
    lsa_idx_host *h = &x->host;
    const lsa_indexer_act act = {h->a, h->rstd, h->u, query_at(x, layer, 0), weight_at(x, layer, 0)};
    for (int32_t i = 0; i < m; i++)
        if (position[i] < 0)
            LSA_FAIL(LSA_E_ARG, "query: request %d: position %lld is negative", i, (long long)position[i]);
    for (int64_t i = 0; i < (int64_t)m * s->geom.hidden; i++) h->x[i] = lsa_bf16_to_f32(hidden[i]);
    if (s->path == LSA_PATH_F32) {
        LSA_TRY(lsa_indexer_query(s->ctx, &s->geom, s->params, layer, m, h->x, position, s->freq, &act, err));
        goto done;
    }
    LSA_TRY(lsa_indexer_query_raw(s->ctx, &s->geom, s->params, layer, m, h->x, &act, err));
#pragma omp parallel for schedule(static) if (m > 1)
    for (int32_t i = 0; i < m; i++) {
        float *q = query_at(x, layer, i);
        lsa_query_path_row(s->path, &s->geom, s->freq, position[i], q, NULL, q, NULL, NULL);
    }
done:
    return st;
}

/* Everything that can be seen of a request's keys before they are read. */
static lsa_status check_keys(const lsa_idx *x, int32_t i, const lsa_idx_keys *k, int64_t ld, lsa_err *err) {
    const int64_t most = lsa_min_i64(ld, x->s->max_chunks);
    if (k->n_chunk < 0 || k->n_chunk > most)
        LSA_RET_FAIL(
            LSA_E_ARG,
            "score: request %d has %lld chunks; room is for 0 to %lld (ld %lld, max_chunks of the handle %lld)",
            i, (long long)k->n_chunk, (long long)most, (long long)ld, (long long)x->s->max_chunks);
    if (k->n_chunk == 0) return LSA_OK;
    const size_t align = k->page ? 16 : 4;
    if (!k->data || (uintptr_t)k->data % align || (uintptr_t)k->page % 4)
        LSA_RET_FAIL(LSA_E_ARG, "score: request %d: keys must not be NULL and be aligned to %zu bytes%s", i,
                     align, k->page ? ", its page table to 4" : "");
    for (int64_t p = 0; k->page && p < lsa_ceil_div(k->n_chunk, LSA_PAGE_CHUNKS); p++)
        if (k->page[p] < 0)
            LSA_RET_FAIL(LSA_E_ARG, "score: request %d: entry %lld of its page table is %d", i, (long long)p,
                         k->page[p]);
    return LSA_OK;
}

lsa_status lsa_idx_host_score(lsa_idx *x, int32_t layer, int32_t m, const lsa_idx_keys *keys, float *logit,
                              int64_t ld, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int32_t i = 0; i < m; i++) LSA_TRY(check_keys(x, i, &keys[i], ld, err));
    for (int32_t i = 0; i < m; i++)
        lsa_cpu_score_cache(logit + i * ld, x->s->geom.n_head, query_at(x, layer, i), weight_at(x, layer, i),
                            keys[i].data, keys[i].page, keys[i].n_chunk, x->host.work, x->host.n_work);
done:
    return st;
}

lsa_status lsa_idx_host_observe(float *state, int64_t ld, int64_t n, const int32_t *chunk, const float *mass,
                                lsa_err *err) {
    for (int64_t i = 0; i < n; i++)
        if (chunk[i] < 0 || chunk[i] >= ld || !(mass[i] >= 0) || !isfinite(mass[i]))
            LSA_RET_FAIL(
                LSA_E_ARG,
                "observe: entry %lld: chunk %d with mass %g; expected a chunk in [0, %lld) and a finite "
                "mass of at least 0",
                (long long)i, chunk[i], (double)mass[i], (long long)ld);
    lsa_select_observe(state, ld, n, chunk, mass);
    return LSA_OK;
}

lsa_status lsa_idx_host_select(lsa_idx *x, int32_t m, const lsa_select_rule *rule, const float *logit,
                               int64_t ld, const int64_t *n_chunk, int32_t *out, int64_t ld_out,
                               int32_t *n_out, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t most = lsa_min_i64(ld, x->s->max_chunks);
    for (int32_t i = 0; i < m; i++)
        if (n_chunk[i] < 0 || n_chunk[i] > most)
            LSA_FAIL(LSA_E_ARG,
                     "select: request %d has %lld chunks; room is for 0 to %lld (ld %lld, max_chunks %lld)",
                     i, (long long)n_chunk[i], (long long)most, (long long)ld, (long long)x->s->max_chunks);
    for (int32_t i = 0; i < m; i++) {
        int64_t n;
        lsa_select_rule one = *rule;
        if (rule->observed) one.observed = rule->observed + i;
        LSA_TRY(lsa_select(x->host.id, &n, x->host.score, &one, logit + i * ld, m * ld, n_chunk[i], err));
        n = lsa_min_i64(n, ld_out);
        memcpy(out + i * ld_out, x->host.id, (size_t)n * sizeof *out);
        n_out[i] = (int32_t)n;
    }
done:
    return st;
}
