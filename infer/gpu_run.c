/* Documents on a GPU: see gpu_run.h. */
#include "infer/gpu_run.h"

#include <string.h>

#include "infer/gpu_weights.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

struct lsa_gpu_run {
    const lsa_engine *e;
    lsa_gpu_teacher *teacher;
    lsa_gpu_layer *layer[LSA_MAX_LAYERS];
    float *key[LSA_MAX_CSA]; /* [max chunks, Di] */
    int64_t n;               /* tokens of the last document */
    /* while a layer runs */
    const lsa_taps *taps;
    int32_t in_work;
};

lsa_gpu_teacher_geom lsa_gpu_geom_of(const lsa_engine *e) {
    const lsa_teacher_config *c = &e->c;
    return (lsa_gpu_teacher_geom){.hidden = c->hidden,
                                  .n_head = c->n_head,
                                  .head_dim = c->head_dim,
                                  .rope_dim = c->rope_dim,
                                  .q_rank = c->q_rank,
                                  .o_groups = c->o_groups,
                                  .o_rank = c->o_rank,
                                  .window = c->window,
                                  .index_n_head = c->index_n_head,
                                  .index_head_dim = c->index_head_dim,
                                  .index_topk = c->index_topk,
                                  .n_expert = c->n_expert,
                                  .n_expert_tok = c->n_expert_tok,
                                  .moe_dim = c->moe_dim,
                                  .hc_mult = c->hc_mult,
                                  .hc_iters = c->hc_iters,
                                  .vocab = c->vocab,
                                  .hc_eps = c->hc_eps,
                                  .norm_eps = c->norm_eps,
                                  .route_scale = c->route_scale,
                                  .swiglu_limit = c->swiglu_limit,
                                  .sim_fp8_kv = e->opts.sim_fp8_kv,
                                  .sim_fp4_index = e->opts.sim_fp4_index};
}

lsa_gpu_layer_weights lsa_gpu_weights_of(const layer_weights *w, int32_t ratio) {
    return (lsa_gpu_layer_weights){.ratio = ratio,
                                   .roles = w->comp.roles,
                                   .nx = w->nx,
                                   .at_kv = w->at_kv,
                                   .at_cv = w->at_cv,
                                   .at_cg = w->at_cg,
                                   .at_iv = w->at_iv,
                                   .at_ig = w->at_ig,
                                   .at_iw = w->at_iw,
                                   .attn_fn = w->hc_attn.fn,
                                   .attn_base = w->hc_attn.base,
                                   .attn_scale = w->hc_attn.scale,
                                   .ffn_fn = w->hc_ffn.fn,
                                   .ffn_base = w->hc_ffn.base,
                                   .ffn_scale = w->hc_ffn.scale,
                                   .attn_norm = w->attn_norm,
                                   .ffn_norm = w->ffn_norm,
                                   .q_norm = w->q_norm,
                                   .kv_norm = w->kv_norm,
                                   .sink = w->sink,
                                   .wx = w->wx,
                                   .wq = w->wq,
                                   .wo_a = w->wo_a,
                                   .wo_b = w->wo_b,
                                   .ape = w->comp.ape,
                                   .comp_norm = w->comp.norm,
                                   .iape = w->icomp.ape,
                                   .icomp_norm = w->icomp.norm,
                                   .gate = w->gate,
                                   .gate_bias = w->gate_bias,
                                   .tid2eid = w->tid2eid,
                                   .w13 = w->w13,
                                   .w2 = w->w2};
}

lsa_status lsa_gpu_run_create(lsa_gpu_run **out, lsa_ctx *ctx, const lsa_engine *e, int64_t max_tokens,
                              int64_t chunk, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_run *x = NULL;
    const lsa_gpu_teacher_geom g = lsa_gpu_geom_of(e);
    const lsa_gpu_teacher_tables tables = {e->freq_main, e->freq_comp,  e->embed,        e->head,
                                           e->norm,      e->hc_head_fn, e->hc_head_base, e->hc_head_scale};
    *out = NULL;
    LSA_TRY(LSA_NEW(x, 1, err));
    x->e = e;
    LSA_TRY(lsa_gpu_teacher_create(&x->teacher, ctx, &g, &tables, max_tokens,
                                   chunk ? chunk : LSA_GPU_RUN_CHUNK, err));
    for (int32_t l = 0; l < e->c.n_layer; l++) {
        const lsa_gpu_layer_weights w = lsa_gpu_weights_of(&e->layer[l], e->c.ratio[l]);
        LSA_TRY(lsa_gpu_layer_put(&x->layer[l], x->teacher, &w, err));
    }
    for (int32_t o = 0; o < e->c.n_csa; o++)
        LSA_TRY(LSA_NEW(x->key[o], (max_tokens / LSA_CHUNK + 1) * e->c.index_head_dim, err));
    *out = x;
    x = NULL;
done:
    lsa_gpu_run_destroy(x);
    return st;
}

void lsa_gpu_run_destroy(lsa_gpu_run *x) {
    if (!x) return;
    for (int32_t l = 0; l < LSA_MAX_LAYERS; l++) lsa_gpu_layer_drop(x->layer[l]);
    for (int32_t o = 0; o < LSA_MAX_CSA; o++) lsa_free(x->key[o]);
    lsa_gpu_teacher_destroy(x->teacher);
    lsa_free(x);
}

static void on_rows(void *user, const lsa_gpu_csa_rows *a) {
    const lsa_gpu_run *x = user;
    const lsa_teacher_config *c = &x->e->c;
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t i = 0; i < a->m; i++) {
        lsa_tap_csa t = {.ord = {c->csa_ord[x->in_work]},
                         .layer = {x->in_work},
                         .position = a->first + i,
                         .n_visible = lsa_visible(a->first + i),
                         .hidden = a->hidden + i * c->hidden,
                         .n_sel = a->n_sel[i],
                         .sel = a->sel + i * a->top_k,
                         .sel_logit = a->logit + i * a->top_k,
                         .mass = a->mass + i * a->top_k,
                         .window_mass = a->window_mass[i],
                         .sink_mass = a->sink_mass[i]};
        for (int32_t k = 0; k < a->n_probe; k++)
            if (a->probe[k].position == t.position)
                t.logit = a->probe[k].logit, t.iq = a->probe[k].iq, t.iw = a->probe[k].iw;
        if (a->dense && (t.position + 1) % a->dense_every == 0)
            t.dense_mass =
                a->dense + ((t.position + 1) / a->dense_every - a->first / a->dense_every - 1) * a->dense_ld;
        x->taps->csa(x->taps->user, &t);
    }
}

lsa_status lsa_gpu_run_document(lsa_gpu_run *x, const int32_t *token, int64_t n, const int64_t *probe,
                                int32_t n_probe, int64_t dense_every, const lsa_taps *taps,
                                lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user,
                                lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_teacher_config *c = &x->e->c;
    x->taps = taps;
    x->n = n;
    LSA_TRY(lsa_gpu_teacher_begin(x->teacher, token, n, probe, n_probe, dense_every, err));
    for (int32_t l = 0; l < c->n_layer; l++) {
        x->in_work = l;
        LSA_TRY(lsa_gpu_teacher_layer(x->teacher, x->layer[l], taps && taps->csa ? on_rows : NULL, x, err));
        if (c->csa_ord[l] >= 0) LSA_TRY(lsa_gpu_teacher_keys(x->teacher, x->key[c->csa_ord[l]], err));
        if (step) LSA_TRY(step(user, n * (l + 1) / c->n_layer - n * l / c->n_layer, err));
    }
done:
    return st;
}

lsa_status lsa_gpu_run_logits(lsa_gpu_run *x, int64_t first, int64_t m, float *logits, lsa_err *err) {
    return lsa_gpu_teacher_logits(x->teacher, first, m, logits, err);
}

const float *lsa_gpu_run_keys(const lsa_gpu_run *x, lsa_csa_ord ord, int64_t *n) {
    *n = x->n / LSA_CHUNK;
    return x->key[ord.v];
}
