/* Sessions on either device: see decoder.h. */
#include "infer/decoder.h"

#include <string.h>

#include "infer/gpu_weights.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/model/gpu_session.h"

struct lsa_gpu_model {
    const lsa_engine *e;
    lsa_gpu_teacher *teacher;
    lsa_gpu_layer *layer[LSA_MAX_LAYERS];
};

struct lsa_decoder {
    const lsa_engine *e;
    lsa_session *cpu; /* one of the two */
    lsa_gpu_session *gpu;
    /* GPU: what was fetched of the index keys and hidden vectors */
    int64_t max_chunk, n_key[LSA_MAX_CSA];
    float *key[LSA_MAX_CSA], *hidden[LSA_MAX_CSA];
    const lsa_taps *taps; /* while a call runs */
};

lsa_status lsa_gpu_model_create(lsa_gpu_model **out, lsa_ctx *ctx, const lsa_engine *e, int64_t chunk,
                                lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_model *g = NULL;
    const lsa_gpu_teacher_geom geom = lsa_gpu_geom_of(e);
    const lsa_gpu_teacher_tables tables = lsa_gpu_tables_of(e);
    *out = NULL;
    LSA_TRY(LSA_NEW(g, 1, err));
    g->e = e;
    LSA_TRY(lsa_gpu_teacher_create(&g->teacher, ctx, &geom, &tables, 0, chunk, err));
    for (int32_t l = 0; l < e->c.n_layer; l++) {
        const lsa_gpu_layer_weights w = lsa_gpu_weights_of(&e->layer[l], e->c.ratio[l]);
        LSA_TRY(lsa_gpu_layer_put(&g->layer[l], g->teacher, &w, err));
    }
    *out = g;
    g = NULL;
done:
    lsa_gpu_model_destroy(g);
    return st;
}

void lsa_gpu_model_destroy(lsa_gpu_model *g) {
    if (!g) return;
    for (int32_t l = 0; l < LSA_MAX_LAYERS; l++) lsa_gpu_layer_drop(g->layer[l]);
    lsa_gpu_teacher_destroy(g->teacher);
    lsa_free(g);
}

static lsa_status open_on(lsa_decoder **out, const lsa_engine *e, lsa_gpu_model *gpu,
                          const lsa_gpu_session_opts *on_gpu, const lsa_session_opts *on_cpu, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_decoder *d = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(d, 1, err));
    d->e = e;
    d->max_chunk = (gpu ? on_gpu->max_tokens : on_cpu->max_tokens) / LSA_CHUNK;
    if (gpu)
        LSA_TRY(lsa_gpu_session_create(&d->gpu, gpu->teacher, gpu->layer, e->c.n_layer, on_gpu, err));
    else
        LSA_TRY(lsa_session_create(&d->cpu, e, on_cpu, err));
    *out = d;
    d = NULL;
done:
    lsa_decoder_close(d);
    return st;
}

lsa_status lsa_decoder_open(lsa_decoder **out, const lsa_engine *e, lsa_gpu_model *gpu,
                            const lsa_session_opts *o, lsa_err *err) {
    const lsa_gpu_session_opts so = {.max_tokens = o->max_tokens, .attend_all = o->attend_all};
    return open_on(out, e, gpu, &so, o, err);
}

lsa_status lsa_decoder_open_gpu(lsa_decoder **out, const lsa_engine *e, lsa_gpu_model *gpu,
                                const lsa_gpu_session_opts *o, lsa_err *err) {
    return open_on(out, e, gpu, o, NULL, err);
}

lsa_gpu_session *lsa_decoder_gpu(lsa_decoder *d) {
    return d->gpu;
}

void lsa_decoder_reset(lsa_decoder *d) {
    memset(d->n_key, 0, sizeof d->n_key);
    if (d->gpu)
        lsa_gpu_session_reset(d->gpu);
    else
        lsa_session_reset(d->cpu);
}

void lsa_decoder_close(lsa_decoder *d) {
    if (!d) return;
    for (int32_t i = 0; i < LSA_MAX_CSA; i++) {
        lsa_free(d->key[i]);
        lsa_free(d->hidden[i]);
    }
    lsa_session_destroy(d->cpu);
    lsa_gpu_session_destroy(d->gpu);
    lsa_free(d);
}

int64_t lsa_decoder_position(const lsa_decoder *d) {
    return d->cpu ? lsa_session_position(d->cpu) : lsa_gpu_session_position(d->gpu);
}

static void on_rows(void *user, const lsa_gpu_session_rows *a) {
    const lsa_decoder *d = user;
    const lsa_teacher_config *c = &d->e->c;
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t i = 0; i < a->m; i++) {
        const lsa_tap_csa t = {.ord = {c->csa_ord[a->layer]},
                               .layer = {a->layer},
                               .position = a->first + i,
                               .n_visible = lsa_visible(a->first + i),
                               .hidden = a->hidden + i * c->hidden,
                               .n_sel = a->n_sel[i],
                               .sel = a->sel + i * a->top_k,
                               .sel_logit = a->logit + i * a->top_k,
                               .mass = a->mass + i * a->top_k,
                               .window_mass = a->window_mass[i],
                               .sink_mass = a->sink_mass[i],
                               .n_miss = a->n_miss ? a->n_miss[i] : 0};
        d->taps->csa(d->taps->user, &t);
    }
}

/* On the CPU misses come token by token, from worker threads. */
typedef struct counted {
    const lsa_taps *inner;
    int64_t n;
} counted;
static void on_csa(void *user, const lsa_tap_csa *t) {
    counted *c = user;
    if (c->inner && c->inner->csa) c->inner->csa(c->inner->user, t);
    if (t->n_miss == 0) return;
#pragma omp atomic
    c->n += t->n_miss;
}

lsa_status lsa_decoder_forward(lsa_decoder *d, const int32_t *token, int64_t n, float *logits,
                               const lsa_taps *taps, int64_t *n_miss, lsa_err *err) {
    if (d->gpu) {
        d->taps = taps;
        return lsa_gpu_session_forward(d->gpu, token, n, logits, false, taps && taps->csa ? on_rows : NULL, d,
                                       n_miss, err);
    }
    if (!n_miss) return lsa_session_forward(d->cpu, token, n, logits, false, taps, err);
    counted c = {.inner = taps};
    const lsa_taps count = {.user = &c, .csa = on_csa};
    const lsa_status st = lsa_session_forward(d->cpu, token, n, logits, false, &count, err);
    *n_miss = c.n;
    return st;
}

lsa_status lsa_decoder_set_resident(lsa_decoder *d, const uint8_t *resident, int64_t n_masked, lsa_err *err) {
    if (d->gpu) return lsa_gpu_session_set_resident(d->gpu, resident, n_masked, err);
    lsa_session_set_resident(d->cpu, resident, n_masked);
    return LSA_OK;
}

lsa_status lsa_decoder_recall_input(lsa_decoder *d, const lsa_csa_ord *ord, int32_t n_ord,
                                    lsa_recall_input *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_teacher_config *c = &d->e->c;
    out->position = lsa_decoder_position(d);
    for (int32_t i = 0; i < n_ord; i++) {
        const int32_t o = ord[i].v, layer = c->csa_id[o].v;
        int64_t n = out->position / LSA_CHUNK;
        if (d->cpu) {
            out->key[i] = lsa_session_keys(d->cpu, ord[i], &n);
            out->hidden[i] = lsa_session_hidden(d->cpu, ord[i]);
            continue;
        }
        if (!d->key[o]) {
            LSA_TRY(LSA_NEW(d->key[o], (d->max_chunk + 1) * c->index_head_dim, err));
            LSA_TRY(LSA_NEW(d->hidden[o], c->hidden, err));
        }
        LSA_TRY(lsa_gpu_session_keys(d->gpu, layer, d->n_key[o], n,
                                     d->key[o] + d->n_key[o] * c->index_head_dim, err));
        LSA_TRY(lsa_gpu_session_hidden(d->gpu, layer, d->hidden[o], err));
        d->n_key[o] = n;
        out->key[i] = d->key[o];
        out->hidden[i] = d->hidden[o];
    }
done:
    return st;
}
