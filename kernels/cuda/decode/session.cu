/* The GPU session put together: caches of every layer, and the order of a call. See
 * kernels/model/gpu_session.h. A call goes through a layer as a chunk of the GPU teacher does: project,
 * compress the windows it completes, select, attend, mixture of experts. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/decode/session_state.h"

enum { LOGIT_BYTES = 1 << 27 };

/* ---- rows of the last tokens ---- */

static lsa_status rows_make(lsa_gpu_session *s, token_rows *r, int64_t keep, int64_t width,
                            int64_t second_width, lsa_err *err) {
    lsa_status st = LSA_OK;
    r->width = width, r->second_width = second_width, r->keep = keep;
    r->room = 2 * keep + s->t->chunk; /* so that rows that move never overlap where they go */
    NEW(r->data, r->room * width, other);
    NEW(r->second, r->room * second_width, other);
done:
    return st;
}

/* Room for m tokens from position p on. */
static lsa_status rows_need(lsa_gpu_session *s, token_rows *r, int64_t p, int64_t m, lsa_err *err) {
    if (!r->data || p + m - r->first <= r->room) return LSA_OK;
    const int64_t from = p - r->keep - r->first;
    const cudaStream_t stream = s->t->cs->stream;
    LSA_CUDA(cudaMemcpyAsync(r->data, r->data + from * r->width,
                             (size_t)(r->keep * r->width) * sizeof *r->data, cudaMemcpyDeviceToDevice,
                             stream));
    if (r->second)
        LSA_CUDA(cudaMemcpyAsync(r->second, r->second + from * r->second_width,
                                 (size_t)(r->keep * r->second_width) * sizeof *r->second,
                                 cudaMemcpyDeviceToDevice, stream));
    r->first = p - r->keep;
    return LSA_OK;
}

/* ---- memory ---- */

static lsa_status layer_make(lsa_gpu_session *s, decode_layer *y, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &s->t->g;
    const lsa_gpu_layer_weights *w = &y->l->w;
    const int64_t D = g->head_dim, Di = g->index_head_dim;
    const bool csa = w->roles == 2;
    y->csa = csa ? s->n_csa++ : -1;
    LSA_TRY(rows_make(s, &y->win, g->window, D, 0, err));
    if (!w->ratio) goto done;
    LSA_TRY(rows_make(s, &y->proj, (int64_t)w->roles * w->ratio, 2 * w->roles * D, csa ? 4 * Di : 0, err));
    if (csa && s->o.storage != LSA_GPU_ROWS_F32) goto done; /* pages.cu */
    if (csa) {
        NEW(y->row, (s->max_chunk + 1) * D, rows);
        NEW(y->key, (s->max_chunk + 1) * Di, keys);
    } else {
        NEW(y->row, (s->o.max_tokens / w->ratio + 1) * D, other);
    }
done:
    return st;
}

static lsa_status rows_of_calls(lsa_gpu_session *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    decode_rows *const on = &s->on, *const host = &s->host;
    const int64_t m = s->t->chunk, rows = m * s->t->top;
    NEW(on->sel, rows, work);
    NEW(on->n_sel, m, work);
    NEW(on->miss, m, work);
    NEW(on->sel_logit, rows, work);
    NEW(on->mass, rows, work);
    NEW(on->part, 2 * m, work);
    PINNED(host->sel, rows);
    PINNED(host->n_sel, m);
    PINNED(host->miss, m);
    PINNED(host->sel_logit, rows);
    PINNED(host->mass, rows);
    PINNED(host->part, 2 * m);
    PINNED(host->hidden, m * s->t->g.hidden);
done:
    return st;
}

extern "C" lsa_status lsa_gpu_session_create(lsa_gpu_session **out, lsa_gpu_teacher *t,
                                             lsa_gpu_layer *const *layer, int32_t n_layer,
                                             const lsa_gpu_session_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_session *s = NULL;
    const lsa_gpu_teacher_geom *g = &t->g;
    *out = NULL;
    if (o->max_tokens < 1 || o->max_tokens > INT64_C(1) << 31 || n_layer < 1 || n_layer > LSA_MAX_LAYERS)
        LSA_RET_FAIL(LSA_E_ARG, "GPU session: max_tokens %lld must be in [1, 2^31], layers %d in [1, %d]",
                     (long long)o->max_tokens, n_layer, LSA_MAX_LAYERS);
    s = (lsa_gpu_session *)calloc(1, sizeof *s);
    if (!s) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    s->t = t;
    s->o = *o;
    s->n_layer = n_layer;
    s->max_chunk = o->max_tokens / LSA_CHUNK;
    for (int32_t l = 0; l < n_layer; l++) {
        s->layer[l].l = layer[l];
        LSA_TRY(layer_make(s, &s->layer[l], err));
    }
    LSA_TRY(pages_make(s, err));
    NEW(s->token, t->chunk, work);
    NEW(s->X, t->chunk * g->hc_mult * g->hidden, work);
    s->logit_rows = LOGIT_BYTES / ((s->max_chunk + 1) * (int64_t)sizeof *s->logit);
    s->logit_rows = s->logit_rows < 1 ? 1 : s->logit_rows > t->chunk ? t->chunk : s->logit_rows;
    if (!o->attend_all) NEW(s->logit, s->logit_rows * (s->max_chunk + 1), work);
    NEW(s->hidden, (int64_t)s->n_csa * g->hidden, work);
    if (o->storage != LSA_GPU_ROWS_TIERED) NEW(s->mask, s->max_chunk + 1, work);
    NEW(s->all_miss, 1, work);
    LSA_TRY(rows_of_calls(s, err));
    *out = s;
    s = NULL;
done:
    lsa_gpu_session_destroy(s);
    return st;
}

extern "C" void lsa_gpu_session_destroy(lsa_gpu_session *s) {
    if (!s) return;
    cudaStreamSynchronize(s->t->cs->stream);
    pages_free(s);
    for (int32_t l = 0; l < s->n_layer; l++) {
        decode_layer *const y = &s->layer[l];
        void *const p[] = {y->win.data, y->proj.data, y->proj.second, y->row, y->key};
        for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(s->t->ctx, p[i]);
    }
    const decode_rows *const on = &s->on, *const host = &s->host;
    void *const p[] = {s->token, s->X,      s->logit, s->hidden,     s->out,   s->mask, s->all_miss,
                       on->sel,  on->n_sel, on->miss, on->sel_logit, on->mass, on->part};
    void *const pinned[] = {host->sel,  host->n_sel, host->miss,  host->sel_logit,
                            host->mass, host->part,  host->hidden};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(s->t->ctx, p[i]);
    for (size_t i = 0; i < sizeof pinned / sizeof *pinned; i++) cudaFreeHost(pinned[i]);
    free(s);
}

extern "C" void lsa_gpu_session_reset(lsa_gpu_session *s) {
    s->pos = s->n_masked = 0; /* rows of the sequence before are never read: position 0 bounds them */
    s->masked = false;
    pages_reset(s);
    for (int32_t l = 0; l < s->n_layer; l++) s->layer[l].win.first = s->layer[l].proj.first = 0;
}

extern "C" int64_t lsa_gpu_session_position(const lsa_gpu_session *s) {
    return s->pos;
}

extern "C" lsa_status lsa_gpu_session_set_resident(lsa_gpu_session *s, const uint8_t *resident,
                                                   int64_t n_masked, lsa_err *err) {
    lsa_status st = LSA_OK;
    const bool tiers = s->o.storage == LSA_GPU_ROWS_TIERED;
    if (resident && (n_masked < 0 || n_masked > s->max_chunk))
        LSA_RET_FAIL(LSA_E_ARG, "a resident set of %lld chunks; there is room for %lld", (long long)n_masked,
                     (long long)s->max_chunk);
    if (resident && tiers) LSA_TRY(pages_set(s, resident, n_masked, err));
    if (resident && !tiers) LSA_TRY(lsa_ctx_upload(s->t->ctx, s->mask, resident, (size_t)n_masked, err));
    if (!resident && s->masked) { /* what is formed from here on misses the reserve: it starts empty again */
        LSA_CUDA(cudaStreamSynchronize(s->t->cs->stream));
        pages_reset(s);
    }
    s->masked = resident != NULL;
    s->n_masked = resident ? n_masked : 0;
done:
    return st;
}

extern "C" void lsa_gpu_session_count(const lsa_gpu_session *s, lsa_gpu_session_use *out) {
    *out = s->use;
    for (int64_t i = 0; i < s->store.n_page; i++) out->pages_resident += s->store.slot_of[i] >= 0;
}

/* ---- a call ---- */

/* The layer's statistics of the call, to the host and to the tap. */
static lsa_status tell(lsa_gpu_session *s, int32_t l, int64_t m, lsa_gpu_session_tap *tap, void *user,
                       lsa_err *err) {
    const cudaStream_t stream = s->t->cs->stream;
    const decode_rows *const on = &s->on, *const host = &s->host;
    const size_t rows = (size_t)(m * s->t->top) * 4, one = (size_t)m * 4;
    LSA_CUDA(cudaMemcpyAsync(host->sel, on->sel, rows, cudaMemcpyDeviceToHost, stream));
    LSA_CUDA(cudaMemcpyAsync(host->sel_logit, on->sel_logit, rows, cudaMemcpyDeviceToHost, stream));
    LSA_CUDA(cudaMemcpyAsync(host->mass, on->mass, rows, cudaMemcpyDeviceToHost, stream));
    LSA_CUDA(cudaMemcpyAsync(host->n_sel, on->n_sel, one, cudaMemcpyDeviceToHost, stream));
    LSA_CUDA(cudaMemcpyAsync(host->miss, on->miss, one, cudaMemcpyDeviceToHost, stream));
    LSA_CUDA(cudaMemcpyAsync(host->part, on->part, 2 * one, cudaMemcpyDeviceToHost, stream));
    LSA_CUDA(cudaStreamSynchronize(stream));
    lsa_gpu_session_rows r = {};
    r.layer = l, r.first = s->pos, r.m = m, r.top_k = s->t->top;
    r.sel = host->sel, r.n_sel = host->n_sel, r.n_miss = reserve_only(s) ? NULL : host->miss;
    r.logit = host->sel_logit, r.mass = host->mass;
    r.window_mass = host->part, r.sink_mass = host->part + m;
    r.hidden = host->hidden;
    tap(user, &r);
    return LSA_OK;
}

/* The teacher's buffers become this layer's, and rows of the call are where positions from p on say. */
static lsa_status enter(lsa_gpu_session *s, decode_layer *y, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_teacher *const t = s->t;
    LSA_TRY(rows_need(s, &y->win, s->pos, m, err));
    LSA_TRY(rows_need(s, &y->proj, s->pos, m, err));
    t->win = at_position(y->win.data, y->win.width, y->win.first);
    t->proj = at_position(y->proj.data, y->proj.width, y->proj.first);
    t->iproj = at_position(y->proj.second, y->proj.second_width, y->proj.first);
    t->row = y->row;
    t->key = y->key;
    if (y->csa >= 0 && s->o.storage != LSA_GPU_ROWS_F32) {
        t->row = at_position(s->store.fresh_row, t->g.head_dim, s->pos / LSA_CHUNK);
        t->key = at_position(s->store.fresh_key, t->g.index_head_dim, s->pos / LSA_CHUNK);
    }
done:
    return st;
}

static lsa_status attend(lsa_gpu_session *s, const decode_layer *y, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_teacher *const t = s->t;
    int32_t *const sel = t->sel;
    if (y->csa >= 0 && s->o.attend_all) {
        lsa_gpu_layer all = *y->l;
        all.w.roles = 1; /* as a layer without an indexer: every row before the token */
        return teacher_attend(t, &all, s->pos, m, err);
    }
    if (y->csa < 0 || s->o.storage == LSA_GPU_ROWS_F32) return teacher_attend(t, y->l, s->pos, m, err);
    LSA_TRY(pages_gather(s, y, m, err));
    t->row = s->store.gathered;
    t->sel = s->store.gathered_sel;
    st = teacher_attend(t, y->l, s->pos, m, err);
    t->sel = sel;
done:
    return st;
}

static lsa_status through_layer(lsa_gpu_session *s, int32_t l, int64_t m, lsa_gpu_session_tap *tap,
                                void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_teacher *const t = s->t;
    decode_layer *const y = &s->layer[l];
    const lsa_gpu_layer_weights *w = &y->l->w;
    const int64_t p = s->pos, d = t->g.hidden;
    const bool csa = y->csa >= 0, told = csa && tap && !s->o.attend_all;
    LSA_TRY(enter(s, y, m, err));
    LSA_TRY(teacher_collapse(t, p, m, w->attn_fn, w->attn_base, w->attn_scale, w->attn_norm, err));
    if (csa)
        LSA_CUDA(cudaMemcpyAsync(s->hidden + y->csa * d, t->x + (m - 1) * d, (size_t)d * sizeof *t->x,
                                 cudaMemcpyDeviceToDevice, t->cs->stream));
    if (told)
        LSA_CUDA(cudaMemcpyAsync(s->host.hidden, t->x, (size_t)(m * d) * sizeof *t->x, cudaMemcpyDeviceToHost,
                                 t->cs->stream));
    LSA_TRY(teacher_project(t, y->l, p, m, err));
    if (w->ratio) LSA_TRY(teacher_compress(t, y->l, p / w->ratio, (p + m) / w->ratio, err));
    if (csa && s->o.storage != LSA_GPU_ROWS_F32)
        LSA_TRY(pages_store(s, y, p / w->ratio, (p + m) / w->ratio, err));
    if (csa && !s->o.attend_all) LSA_TRY(decode_select(s, y, p, m, err));
    LSA_TRY(attend(s, y, m, err));
    LSA_TRY(teacher_expand(t, p, m, err));
    LSA_TRY(teacher_collapse(t, p, m, w->ffn_fn, w->ffn_base, w->ffn_scale, w->ffn_norm, err));
    LSA_TRY(teacher_moe(t, y->l, p, m, err));
    LSA_TRY(teacher_expand(t, p, m, err));
    if (told) LSA_TRY(tell(s, l, m, tap, user, err));
done:
    return st;
}

static lsa_status check_tokens(const lsa_gpu_session *s, const int32_t *token, int64_t m, lsa_err *err) {
    if (m < 0 || m > s->t->chunk || s->pos + m > s->o.max_tokens)
        LSA_RET_FAIL(LSA_E_ARG, "forward: %lld tokens at position %lld; at most %lld a call and %lld in all",
                     (long long)m, (long long)s->pos, (long long)s->t->chunk, (long long)s->o.max_tokens);
    for (int64_t i = 0; i < m; i++)
        if (token[i] < 0 || token[i] >= s->t->g.vocab)
            LSA_RET_FAIL(LSA_E_ARG, "token %d at position %lld is outside the vocabulary [0, %d)", token[i],
                         (long long)(s->pos + i), s->t->g.vocab);
    return LSA_OK;
}

/* Logits of the last n tokens of a call of m. */
static lsa_status head(lsa_gpu_session *s, int64_t m, int64_t n, float *logits, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_teacher *const t = s->t;
    const int64_t V = t->g.vocab;
    if (n > s->out_rows) {
        lsa_ctx_free(t->ctx, s->out);
        s->use.work -= s->out_rows * V * (int64_t)sizeof *s->out;
        s->out = NULL, s->out_rows = 0;
        NEW(s->out, n * V, work);
        s->out_rows = n;
    }
    LSA_TRY(teacher_head(t, s->pos + m - n, n, err));
    LSA_TRY(teacher_gemm(t, n, V, t->g.hidden, t->x, t->table.head, 0, s->out, err));
    LSA_TRY(lsa_ctx_download(t->ctx, logits, s->out, (size_t)(n * V) * sizeof *logits, err));
done:
    return st;
}

/* The buffers that a call lends to the teacher; it has its own back afterwards. */
struct borrowed {
    int32_t *token, *sel, *n_sel;
    float *X, *win, *proj, *iproj, *row, *key, *sel_logit, *mass, *part;
    int64_t n;
};
static borrowed swap_out(const lsa_gpu_teacher *t) {
    return {t->token, t->sel, t->n_sel,     t->X,    t->win,  t->proj, t->iproj,
            t->row,   t->key, t->sel_logit, t->mass, t->part, t->n};
}
static void swap_back(lsa_gpu_teacher *t, const borrowed *b) {
    t->token = b->token, t->sel = b->sel, t->n_sel = b->n_sel;
    t->X = b->X, t->win = b->win, t->proj = b->proj, t->iproj = b->iproj, t->row = b->row, t->key = b->key;
    t->sel_logit = b->sel_logit, t->mass = b->mass, t->part = b->part, t->n = b->n;
}

extern "C" lsa_status lsa_gpu_session_forward(lsa_gpu_session *s, const int32_t *token, int64_t m,
                                              float *logits, bool last_only, lsa_gpu_session_tap *tap,
                                              void *user, int64_t *n_miss, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_teacher *const t = s->t;
    const borrowed own = swap_out(t);
    if (n_miss) *n_miss = 0;
    LSA_TRY(check_tokens(s, token, m, err));
    if (m == 0) goto done;
    LSA_TRY(pages_grow(s, m, err));
    LSA_TRY(lsa_ctx_upload(t->ctx, s->token, token, (size_t)m * sizeof *token, err));
    LSA_TRY(lsa_ctx_zero(t->ctx, s->all_miss, sizeof *s->all_miss, err));
    t->token = s->token, t->X = s->X, t->n = m;
    t->sel = s->on.sel, t->n_sel = s->on.n_sel, t->sel_logit = s->on.sel_logit;
    t->mass = s->on.mass, t->part = s->on.part;
    LSA_TRY(teacher_embed(t, err));
    t->token = (int32_t *)((uintptr_t)s->token - (uintptr_t)s->pos * sizeof *s->token);
    t->X = at_position(s->X, t->g.hc_mult * (int64_t)t->g.hidden, s->pos);
    for (int32_t l = 0; l < s->n_layer; l++) LSA_TRY(through_layer(s, l, m, tap, user, err));
    if (logits) LSA_TRY(head(s, m, last_only ? 1 : m, logits, err));
    if (n_miss) {
        unsigned long long miss = 0;
        LSA_TRY(lsa_ctx_download(t->ctx, &miss, s->all_miss, sizeof miss, err));
        *n_miss = reserve_only(s) ? -1 : (int64_t)miss;
    }
    s->pos += m;
done:
    swap_back(t, &own);
    return st;
}

/* ---- what level 1 reads ---- */

static lsa_status check_csa(const lsa_gpu_session *s, int32_t layer, lsa_err *err) {
    if (layer < 0 || layer >= s->n_layer || s->layer[layer].csa < 0)
        LSA_RET_FAIL(LSA_E_ARG, "layer %d has no indexer", layer);
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_session_keys(lsa_gpu_session *s, int32_t layer, int64_t first, int64_t last,
                                           float *key, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t Di = s->t->g.index_head_dim;
    LSA_TRY(check_csa(s, layer, err));
    if (first < 0 || last < first || last > s->pos / LSA_CHUNK)
        LSA_FAIL(LSA_E_ARG, "index keys %lld to %lld of %lld", (long long)first, (long long)last,
                 (long long)(s->pos / LSA_CHUNK));
    if (s->o.storage == LSA_GPU_ROWS_F32)
        LSA_TRY(lsa_ctx_download(s->t->ctx, key, s->layer[layer].key + first * Di,
                                 (size_t)((last - first) * Di) * sizeof *key, err));
    else
        LSA_TRY(pages_read_keys(s, &s->layer[layer], first, last, key, err));
done:
    return st;
}

extern "C" lsa_status lsa_gpu_session_hidden(lsa_gpu_session *s, int32_t layer, float *hidden, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t d = s->t->g.hidden;
    LSA_TRY(check_csa(s, layer, err));
    LSA_TRY(lsa_ctx_download(s->t->ctx, hidden, s->hidden + s->layer[layer].csa * d,
                             (size_t)d * sizeof *hidden, err));
done:
    return st;
}
