/* The memory indexer: the parameter table and the query path over the ops. See indexer.h for the mathematics.
 */
#include "kernels/model/indexer.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/rng.h"
#include "kernels/ops.h"

static lsa_status in_range(const char *name, int64_t v, int64_t lo, int64_t hi, lsa_err *err) {
    if (v < lo || v > hi)
        LSA_RET_FAIL(LSA_E_CONFIG, "indexer: %s must be in [%lld, %lld], found %lld", name, (long long)lo,
                     (long long)hi, (long long)v);
    return LSA_OK;
}

lsa_status lsa_indexer_geom_check(const lsa_indexer_geom *g, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(in_range("hidden size", g->hidden, 1, 1 << 20, err));
    LSA_TRY(in_range("heads", g->n_head, 1, 128, err));
    LSA_TRY(in_range("head dimension", g->head_dim, 128, 128, err));
    LSA_TRY(in_range("rank", g->rank, 1, 1 << 16, err));
    LSA_TRY(in_range("layers", g->n_layer, 1, LSA_MAX_CSA, err));
    LSA_TRY(in_range("rotary dimension", g->rope.dim, 0, 128, err));
    LSA_TRY(in_range("reach of the continuation", g->reach, 0, LSA_MAX_REACH, err));
    if (g->rope.dim % 2 || !(g->rope.base > 1) || !(g->rope.factor >= 1) || g->rope.original_len < 1 ||
        !(g->rope.beta_fast > 0) || !(g->rope.beta_slow > 0) || !(g->eps > 0))
        LSA_FAIL(LSA_E_CONFIG, "indexer: RoPE constants or eps out of range");
    for (int32_t i = 0; i < g->n_layer; i++) {
        LSA_TRY(in_range("CSA ordinal", g->ord[i].v, i ? g->ord[i - 1].v + 1 : 0, LSA_MAX_CSA - 1, err));
        LSA_TRY(in_range("layer id", g->id[i].v, i ? g->id[i - 1].v + 1 : 0, LSA_MAX_LAYERS - 1, err));
    }
done:
    return st;
}

lsa_indexer_tensor lsa_indexer_tensor_at(const lsa_indexer_geom *g, int32_t layer, lsa_indexer_part part) {
    static const char *const name[] = {"wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight"};
    const int64_t d = g->hidden, H = g->n_head, r = g->rank, q = H * g->head_dim;
    const int64_t shape[][2] = {{r, d}, {q, r}, {r, 1}, {H, d}};
    lsa_indexer_tensor t = {.n_dim = part == LSA_Q_NORM ? 1 : 2, .shape = {shape[part][0], shape[part][1]}};
    snprintf(t.name, sizeof t.name, "retrievers.l%d.%s", g->ord[layer].v, name[part]);
    t.offset = layer * lsa_indexer_layer_params(g);
    for (int p = 0; p < (int)part; p++) t.offset += shape[p][0] * shape[p][1];
    t.n = shape[part][0] * shape[part][1];
    return t;
}

int64_t lsa_indexer_layer_params(const lsa_indexer_geom *g) {
    const int64_t d = g->hidden, H = g->n_head, r = g->rank;
    return r * d + H * g->head_dim * r + r + H * d;
}
int64_t lsa_indexer_costs_at(const lsa_indexer_geom *g) {
    return g->n_layer * lsa_indexer_layer_params(g);
}
int64_t lsa_indexer_prior_at(const lsa_indexer_geom *g) {
    return lsa_indexer_costs_at(g) + g->reach;
}
int64_t lsa_indexer_n_extra(const lsa_indexer_geom *g) {
    return g->reach + (g->prior ? LSA_PRIOR_WEIGHTS : 0);
}
int64_t lsa_indexer_n_param(const lsa_indexer_geom *g) {
    return lsa_indexer_costs_at(g) + lsa_indexer_n_extra(g);
}

int64_t lsa_indexer_n_tensor(const lsa_indexer_geom *g) {
    return (int64_t)g->n_layer * LSA_INDEXER_PARTS + (g->reach > 0) + g->prior;
}
lsa_indexer_tensor lsa_indexer_tensor_no(const lsa_indexer_geom *g, int64_t i) {
    const int64_t parts = (int64_t)g->n_layer * LSA_INDEXER_PARTS;
    if (i < parts)
        return lsa_indexer_tensor_at(g, (int32_t)(i / LSA_INDEXER_PARTS),
                                     (lsa_indexer_part)(i % LSA_INDEXER_PARTS));
    if (i == parts && g->reach > 0)
        return (lsa_indexer_tensor){.name = "continuation",
                                    .n_dim = 1,
                                    .shape = {g->reach, 1},
                                    .offset = lsa_indexer_costs_at(g),
                                    .n = g->reach};
    return (lsa_indexer_tensor){.name = "prior",
                                .n_dim = 1,
                                .shape = {LSA_PRIOR_WEIGHTS, 1},
                                .offset = lsa_indexer_prior_at(g),
                                .n = LSA_PRIOR_WEIGHTS};
}

void lsa_indexer_start_extra(float *params, const lsa_indexer_geom *g) {
    float *const at = params + lsa_indexer_costs_at(g);
    for (int64_t j = 0; j < lsa_indexer_n_extra(g); j++)
        at[j] = j < g->reach ? LSA_COST_START : LSA_PRIOR_START;
}

lsa_status lsa_indexer_costs_check(const float *cost, int64_t reach, const char *where, lsa_err *err) {
    if (reach < 0 || reach > LSA_MAX_REACH)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: the continuation must reach 0 to %d chunks, found %lld", where,
                     LSA_MAX_REACH, (long long)reach);
    for (int64_t j = 0; j < reach; j++)
        if (!(cost[j] >= 0) || !isfinite(cost[j]))
            LSA_RET_FAIL(LSA_E_FORMAT,
                         "%s: continuation: b_%lld is %g; expected a finite number of at least 0", where,
                         (long long)j + 1, (double)cost[j]);
    return LSA_OK;
}

lsa_status lsa_indexer_prior_check(const float weight[LSA_PRIOR_WEIGHTS], const char *where, lsa_err *err) {
    for (int k = 0; k < LSA_PRIOR_WEIGHTS; k++)
        if (!isfinite(weight[k]))
            LSA_RET_FAIL(LSA_E_FORMAT, "%s: prior: w_%d is %g; expected a finite number", where, k + 1,
                         (double)weight[k]);
    return LSA_OK;
}

/* Uniform in +-1/sqrt(fan_in): element i of tensor (layer ordinal, part) of a seed. */
static void fill_uniform(float *x, int64_t n, int64_t fan_in, uint64_t seed, int32_t ord, int part) {
    lsa_rng r = lsa_rng_make(lsa_mix64(seed, 101), lsa_mix64((uint64_t)ord, (uint64_t)part));
    const float a = 1.0f / sqrtf((float)fan_in);
    for (int64_t i = 0; i < n; i++) x[i] = (2.0f * lsa_rng_uniform(&r) - 1.0f) * a;
}

void lsa_indexer_init_random(float *params, const lsa_indexer_geom *g, uint64_t seed) {
    for (int32_t l = 0; l < g->n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor t = lsa_indexer_tensor_at(g, l, (lsa_indexer_part)p);
            if (p == LSA_Q_NORM)
                for (int64_t i = 0; i < t.n; i++) params[t.offset + i] = 1.0f;
            else
                fill_uniform(params + t.offset, t.n, t.shape[1], seed, g->ord[l].v, p);
        }
    lsa_indexer_start_extra(params, g);
}

/* NUMERIC: with the new Wa rows zero the mean square spans r instead of r0 values, so rms shrinks by
 * sqrt(r/r0) and g must shrink with it; eps is not scaled, which changes u by at most eps/mean(a^2) relative.
 */
lsa_status lsa_indexer_widen(float *dst, const lsa_indexer_geom *dg, const float *src,
                             const lsa_indexer_geom *sg, uint64_t seed, lsa_err *err) {
    if (dg->hidden != sg->hidden || dg->head_dim != sg->head_dim || dg->rank < sg->rank ||
        dg->n_head < sg->n_head)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "cannot widen an indexer of hidden %d, %d heads, rank %d to hidden %d, %d heads, rank %d: only heads and rank may grow",
            sg->hidden, sg->n_head, sg->rank, dg->hidden, dg->n_head, dg->rank);
    if (dg->reach < sg->reach)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "the initial checkpoint has a continuation over %d chunks, this run one over %d, which would be "
            "another score; set model.continuation: %d",
            sg->reach, dg->reach, sg->reach);
    if (sg->prior && !dg->prior)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "the initial checkpoint has an observed-mass prior, this run none, which would be another "
            "score; set model.prior: true");
    lsa_indexer_init_random(dst, dg, seed);
    if (sg->prior)
        memcpy(dst + lsa_indexer_prior_at(dg), src + lsa_indexer_prior_at(sg),
               LSA_PRIOR_WEIGHTS * sizeof *dst);
    if (sg->reach)
        memcpy(dst + lsa_indexer_costs_at(dg), src + lsa_indexer_costs_at(sg),
               (size_t)sg->reach * sizeof *dst);
    const int64_t d = dg->hidden, r0 = sg->rank, r = dg->rank, q0 = (int64_t)sg->n_head * 128;
    const float grow = sqrtf((float)r / (float)r0), head = sqrtf((float)dg->n_head / (float)sg->n_head);
    for (int32_t l = 0; l < dg->n_layer; l++) {
        int32_t s = 0;
        while (s < sg->n_layer && sg->ord[s].v != dg->ord[l].v) s++;
        if (s == sg->n_layer || sg->id[s].v != dg->id[l].v)
            LSA_RET_FAIL(LSA_E_CONFIG, "the initial checkpoint has no indexer for CSA layer %d (layer id %d)",
                         dg->ord[l].v, dg->id[l].v);
        float *wa = dst + lsa_indexer_tensor_at(dg, l, LSA_WQ_A).offset,
              *wb = dst + lsa_indexer_tensor_at(dg, l, LSA_WQ_B).offset;
        float *g = dst + lsa_indexer_tensor_at(dg, l, LSA_Q_NORM).offset,
              *ww = dst + lsa_indexer_tensor_at(dg, l, LSA_W_PROJ).offset;
        const float *swa = src + lsa_indexer_tensor_at(sg, s, LSA_WQ_A).offset,
                    *swb = src + lsa_indexer_tensor_at(sg, s, LSA_WQ_B).offset;
        const float *sn = src + lsa_indexer_tensor_at(sg, s, LSA_Q_NORM).offset,
                    *sww = src + lsa_indexer_tensor_at(sg, s, LSA_W_PROJ).offset;
        memcpy(wa, swa, (size_t)(r0 * d) * sizeof *wa);
        memset(wa + r0 * d, 0, (size_t)((r - r0) * d) * sizeof *wa);
        for (int64_t i = 0; i < r0; i++) g[i] = sn[i] / grow;
        for (int64_t i = 0; i < q0; i++) memcpy(wb + i * r, swb + i * r0, (size_t)r0 * sizeof *wb);
        for (int64_t i = 0; i < sg->n_head * d; i++) ww[i] = sww[i] * head;
        memset(ww + sg->n_head * d, 0, (size_t)((dg->n_head - sg->n_head) * d) * sizeof *ww);
    }
    return LSA_OK;
}

static float head_scale(const lsa_indexer_geom *g) {
    return (float)(1.0 / sqrt((double)g->head_dim * (double)g->n_head));
}

lsa_status lsa_indexer_query_raw(lsa_ctx *ctx, const lsa_indexer_geom *g, const float *params, int32_t layer,
                                 int64_t m, const float *x, const lsa_indexer_act *act, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t d = g->hidden, r = g->rank, q = (int64_t)g->n_head * g->head_dim;
    const float *wa = params + lsa_indexer_tensor_at(g, layer, LSA_WQ_A).offset,
                *wb = params + lsa_indexer_tensor_at(g, layer, LSA_WQ_B).offset;
    const float *gn = params + lsa_indexer_tensor_at(g, layer, LSA_Q_NORM).offset,
                *ww = params + lsa_indexer_tensor_at(g, layer, LSA_W_PROJ).offset;
    LSA_TRY(lsa_gemm(
        ctx,
        &(lsa_gemm_args){.trans_b = true, .m = m, .n = r, .k = d, .alpha = 1, .a = x, .b = wa, .c = act->a},
        err));
    LSA_TRY(lsa_rmsnorm_fwd(ctx, &(lsa_rmsnorm_fwd_args){m, r, g->eps, act->a, gn, act->u, act->rstd}, err));
    LSA_TRY(
        lsa_gemm(ctx,
                 &(lsa_gemm_args){
                     .trans_b = true, .m = m, .n = q, .k = r, .alpha = 1, .a = act->u, .b = wb, .c = act->q},
                 err));
    LSA_TRY(lsa_gemm(ctx,
                     &(lsa_gemm_args){.trans_b = true,
                                      .m = m,
                                      .n = g->n_head,
                                      .k = d,
                                      .alpha = head_scale(g),
                                      .a = x,
                                      .b = ww,
                                      .c = act->w},
                     err));
done:
    return st;
}

lsa_status lsa_indexer_query(lsa_ctx *ctx, const lsa_indexer_geom *g, const float *params, int32_t layer,
                             int64_t m, const float *x, const int64_t *position, const float *freq,
                             const lsa_indexer_act *act, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_indexer_query_raw(ctx, g, params, layer, m, x, act, err));
    LSA_TRY(lsa_rope_hadamard(
        ctx, &(lsa_rope_hadamard_args){m, g->n_head, g->head_dim, g->rope.dim, false, position, freq, act->q},
        err));
done:
    return st;
}

lsa_status lsa_indexer_query_bwd(lsa_ctx *ctx, const lsa_indexer_geom *g, const float *params, float *grad,
                                 int32_t layer, int64_t m, const float *x, const int64_t *position,
                                 const float *freq, const lsa_indexer_act *act, float *dq, const float *dw,
                                 float *du, bool accumulate, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t d = g->hidden, r = g->rank, q = (int64_t)g->n_head * g->head_dim;
    const int64_t wa = lsa_indexer_tensor_at(g, layer, LSA_WQ_A).offset,
                  wb = lsa_indexer_tensor_at(g, layer, LSA_WQ_B).offset;
    const int64_t gn = lsa_indexer_tensor_at(g, layer, LSA_Q_NORM).offset,
                  ww = lsa_indexer_tensor_at(g, layer, LSA_W_PROJ).offset;
    const float beta = accumulate ? 1.0f : 0.0f;
    LSA_TRY(lsa_gemm(ctx,
                     &(lsa_gemm_args){.trans_a = true,
                                      .m = g->n_head,
                                      .n = d,
                                      .k = m,
                                      .alpha = head_scale(g),
                                      .beta = beta,
                                      .a = dw,
                                      .b = x,
                                      .c = grad + ww},
                     err));
    LSA_TRY(lsa_rope_hadamard(
        ctx, &(lsa_rope_hadamard_args){m, g->n_head, g->head_dim, g->rope.dim, true, position, freq, dq},
        err));
    LSA_TRY(lsa_gemm(ctx,
                     &(lsa_gemm_args){.trans_a = true,
                                      .m = q,
                                      .n = r,
                                      .k = m,
                                      .alpha = 1,
                                      .beta = beta,
                                      .a = dq,
                                      .b = act->u,
                                      .c = grad + wb},
                     err));
    LSA_TRY(lsa_gemm(
        ctx, &(lsa_gemm_args){.m = m, .n = r, .k = q, .alpha = 1, .a = dq, .b = params + wb, .c = du}, err));
    LSA_TRY(lsa_rmsnorm_bwd(
        ctx, &(lsa_rmsnorm_bwd_args){m, r, act->a, params + gn, act->rstd, du, du, grad + gn, accumulate},
        err));
    LSA_TRY(lsa_gemm(ctx,
                     &(lsa_gemm_args){.trans_a = true,
                                      .m = r,
                                      .n = d,
                                      .k = m,
                                      .alpha = 1,
                                      .beta = beta,
                                      .a = du,
                                      .b = x,
                                      .c = grad + wa},
                     err));
done:
    return st;
}
