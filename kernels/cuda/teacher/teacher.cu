/* The GPU teacher put together: memory, weights, and the order of a layer. See kernels/model/gpu_teacher.h. A
 * chunk of tokens is projected, then the windows it completes are compressed, then it attends: every row that
 * one of its tokens may read is then there. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

enum { LOGIT_BYTES = 1 << 30 }; /* enough tokens for all multiprocessors at the longest contexts */

static lsa_status check(const lsa_gpu_teacher_geom *g, int64_t max_tokens, int64_t chunk, lsa_err *err) {
    const auto sized = [](int n) { return n >= 64 && n <= TEACHER_WIDTH && (n & (n - 1)) == 0; };
    if (g->hc_mult < 1 || g->hc_mult > TEACHER_STREAMS || !sized(g->head_dim) || !sized(g->index_head_dim) ||
        g->rope_dim > g->head_dim || g->rope_dim > g->index_head_dim || g->n_head % g->o_groups)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "the GPU teacher takes up to %d streams, heads and index heads of 64, 128, 256, 512 or %d: "
            "found %d streams, heads of %d, index heads of %d; use --device cpu",
            TEACHER_STREAMS, TEACHER_WIDTH, g->hc_mult, g->head_dim, g->index_head_dim);
    if (max_tokens < 0 || chunk < 1)
        LSA_RET_FAIL(LSA_E_ARG, "room for %lld tokens, %lld at a time", (long long)max_tokens,
                     (long long)chunk);
    return LSA_OK;
}

static lsa_status to_device(lsa_gpu_teacher *t, const void **out, const void *host, int64_t n, size_t size,
                            const char *name, lsa_err *err) {
    void *p = NULL;
    *out = NULL;
    if (!host) return LSA_OK;
    const lsa_status st = lsa_ctx_alloc_(t->ctx, &p, n, size, name, err);
    if (st != LSA_OK) return st;
    *out = p;
    return lsa_ctx_upload(t->ctx, p, host, (size_t)n * size, err);
}
#define PUT(to, from, count)                                                                                 \
    LSA_TRY(to_device(t, (const void **)&(to), (from), (int64_t)(count), sizeof *(from), #to, err))
#define NEW(p, count) LSA_TRY(lsa_ctx_alloc_(t->ctx, (void **)&(p), (int64_t)(count), sizeof *(p), #p, err))

static lsa_status allocate(lsa_gpu_teacher *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &t->g;
    const int64_t T = t->max_tokens, m = t->chunk, d = g->hidden, D = g->head_dim, Di = g->index_head_dim,
                  E = g->n_expert, k = g->n_expert_tok, M = g->moe_dim, Hi = g->index_n_head,
                  GR = (int64_t)g->o_groups * g->o_rank, chunks = T / LSA_CHUNK + 1;
    t->nz = (int64_t)g->hc_mult * (g->hc_mult + 2);
    t->HD = (int64_t)g->n_head * D;
    t->ID = Hi * Di;
    t->nx = g->q_rank + D + 4 * D + 4 * Di + Hi;
    t->top = g->index_topk;
    NEW(t->token, T);
    t->n_slot = T ? (T + m - 1) / m + 1 : 0;
    NEW(t->ring, t->n_slot * m * g->hc_mult * d);
    t->X = t->ring;
    NEW(t->win, T * D);
    NEW(t->proj, T * 4 * D);
    NEW(t->iproj, T * 4 * Di);
    NEW(t->row, chunks * D);
    NEW(t->key, chunks * Di);
    NEW(t->z, m * t->nz);
    NEW(t->coef, m * t->nz);
    NEW(t->x, m * d);
    NEW(t->xp, m * t->nx);
    NEW(t->qr, m * g->q_rank);
    NEW(t->qq, m * (t->HD + t->ID));
    NEW(t->q, m * t->HD);
    NEW(t->iq, m * t->ID);
    NEW(t->iw, m * Hi);
    NEW(t->o, m * t->HD);
    NEW(t->og, m * GR);
    NEW(t->o2, m * GR);
    NEW(t->y, m * d);
    t->logit_room = m * (chunks + 32);
    if (t->logit_room > LOGIT_BYTES / 4) t->logit_room = LOGIT_BYTES / 4;
    if (t->logit_room < chunks + 32) t->logit_room = chunks + 32;
    NEW(t->logit, t->logit_room);
    NEW(t->candidate, t->logit_room);
    NEW(t->key16, chunks * Di);
    NEW(t->iq16, m * t->ID);
    NEW(t->key_most, 1);
    NEW(t->route, m * E);
    NEW(t->weight, m * k);
    NEW(t->expert, m * k);
    NEW(t->place, m * k);
    NEW(t->begin, E + 1);
    NEW(t->list, m * k);
    NEW(t->act, m * k * M);
    NEW(t->ye, m * k * d);
    NEW(t->h13, m * 2 * M);
    LSA_TRY(teacher_slots_create(t, err));
    LSA_TRY(teacher_marks_create(t, err));
done:
    return st;
}

extern "C" lsa_status lsa_gpu_teacher_create(lsa_gpu_teacher **out, lsa_ctx *ctx,
                                             const lsa_gpu_teacher_geom *g, const lsa_gpu_teacher_tables *w,
                                             int64_t max_tokens, int64_t chunk, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_teacher *t = NULL;
    const int64_t V = g->vocab, d = g->hidden, s = g->hc_mult;
    *out = NULL;
    if (lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA) LSA_RET_FAIL(LSA_E_ARG, "a GPU teacher needs a CUDA context");
    LSA_TRY(check(g, max_tokens, chunk, err));
    t = (lsa_gpu_teacher *)calloc(1, sizeof *t);
    if (!t) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    t->ctx = ctx;
    t->cs = lsa_cuda(ctx);
    t->g = *g;
    t->max_tokens = max_tokens;
    t->chunk = max_tokens && chunk > max_tokens ? max_tokens : chunk;
    PUT(t->table.freq_main, w->freq_main, g->rope_dim / 2);
    PUT(t->table.freq_comp, w->freq_comp, g->rope_dim / 2);
    PUT(t->table.embed, w->embed, V * d);
    PUT(t->table.head, w->head, V * d);
    PUT(t->table.norm, w->norm, d);
    PUT(t->table.head_fn, w->head_fn, s * s * d);
    PUT(t->table.head_base, w->head_base, s);
    PUT(t->table.head_scale, w->head_scale, 1);
    LSA_TRY(allocate(t, err));
    *out = t;
    t = NULL;
done:
    lsa_gpu_teacher_destroy(t);
    return st;
}

extern "C" void lsa_gpu_teacher_destroy(lsa_gpu_teacher *t) {
    if (!t) return;
    cudaStreamSynchronize(t->cs->stream);
    const lsa_gpu_teacher_tables *const w = &t->table;
    const void *const table[] = {w->freq_main, w->freq_comp, w->embed,     w->head,
                                 w->norm,      w->head_fn,   w->head_base, w->head_scale};
    void *const p[] = {t->token, t->ring,   t->win,       t->proj,  t->iproj, t->row,     t->key,
                       t->z,     t->coef,   t->x,         t->xp,    t->qr,    t->qq,      t->q,
                       t->iq,    t->iw,     t->o,         t->og,    t->o2,    t->y,       t->logit,
                       t->route, t->weight, t->expert,    t->place, t->begin, t->list,    t->act,
                       t->ye,    t->h13,    t->candidate, t->key16, t->iq16,  t->key_most};
    teacher_park_destroy(t);
    teacher_slots_destroy(t);
    teacher_marks_destroy(t);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        lsa_ctx_free(t->ctx, (void *)(uintptr_t)table[i]);
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(t->ctx, p[i]);
    free(t);
}

extern "C" lsa_status lsa_gpu_layer_put(lsa_gpu_layer **out, lsa_gpu_teacher *t,
                                        const lsa_gpu_layer_weights *w, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &t->g;
    const int64_t d = g->hidden, s = g->hc_mult, E = g->n_expert, M = g->moe_dim, D = g->head_dim,
                  Di = g->index_head_dim, GR = (int64_t)g->o_groups * g->o_rank;
    const bool csa = w->roles == 2;
    lsa_gpu_layer *l = (lsa_gpu_layer *)calloc(1, sizeof *l);
    *out = NULL;
    if (!l) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    l->ctx = t->ctx;
    lsa_gpu_layer_weights *const o = &l->w;
    o->ratio = w->ratio, o->roles = w->roles, o->nx = w->nx;
    o->at_kv = w->at_kv, o->at_cv = w->at_cv, o->at_cg = w->at_cg, o->at_iv = w->at_iv, o->at_ig = w->at_ig,
    o->at_iw = w->at_iw;
    PUT(o->attn_fn, w->attn_fn, t->nz * s * d);
    PUT(o->attn_base, w->attn_base, t->nz);
    PUT(o->attn_scale, w->attn_scale, 3);
    PUT(o->ffn_fn, w->ffn_fn, t->nz * s * d);
    PUT(o->ffn_base, w->ffn_base, t->nz);
    PUT(o->ffn_scale, w->ffn_scale, 3);
    PUT(o->attn_norm, w->attn_norm, d);
    PUT(o->ffn_norm, w->ffn_norm, d);
    PUT(o->q_norm, w->q_norm, g->q_rank);
    PUT(o->kv_norm, w->kv_norm, D);
    PUT(o->sink, w->sink, g->n_head);
    PUT(o->wx, w->wx, (int64_t)w->nx * d);
    PUT(o->wq, w->wq, (t->HD + (csa ? t->ID : 0)) * g->q_rank);
    PUT(o->wo_a, w->wo_a, GR * (t->HD / g->o_groups));
    PUT(o->wo_b, w->wo_b, d * GR);
    PUT(o->ape, w->ape, (int64_t)w->ratio * w->roles * D);
    PUT(o->comp_norm, w->comp_norm, D);
    PUT(o->iape, w->iape, (int64_t)LSA_CHUNK * 2 * Di);
    PUT(o->icomp_norm, w->icomp_norm, Di);
    PUT(o->gate, w->gate, E * d);
    PUT(o->gate_bias, w->gate_bias, E);
    PUT(o->tid2eid, w->tid2eid, (int64_t)g->vocab * g->n_expert_tok);
    PUT(o->w13, w->w13, (E + 1) * 2 * M * d);
    PUT(o->w2, w->w2, (E + 1) * d * M);
    *out = l;
    l = NULL;
done:
    lsa_gpu_layer_drop(l);
    return st;
}

extern "C" void lsa_gpu_layer_drop(lsa_gpu_layer *l) {
    if (!l) return;
    const lsa_gpu_layer_weights *const w = &l->w;
    const void *const p[] = {w->attn_fn,   w->attn_base, w->attn_scale, w->ffn_fn,     w->ffn_base,
                             w->ffn_scale, w->attn_norm, w->ffn_norm,   w->q_norm,     w->kv_norm,
                             w->sink,      w->wx,        w->wq,         w->wo_a,       w->wo_b,
                             w->ape,       w->comp_norm, w->iape,       w->icomp_norm, w->gate,
                             w->gate_bias, w->tid2eid,   w->w13,        w->w2};
    for (size_t i = 0; i < sizeof p / sizeof *p && !l->borrowed; i++)
        lsa_ctx_free(l->ctx, (void *)(uintptr_t)p[i]);
    free(l);
}

extern "C" lsa_status lsa_gpu_teacher_begin(lsa_gpu_teacher *t, const lsa_gpu_teacher_doc *doc,
                                            lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n = doc->n;
    if (doc->n_probe < 0 || doc->n_probe > LSA_GPU_MAX_PROBE)
        LSA_RET_FAIL(LSA_E_ARG, "%d probed positions; at most %d", doc->n_probe, LSA_GPU_MAX_PROBE);
    if (n < 1 || n > t->max_tokens)
        LSA_RET_FAIL(LSA_E_ARG, "a document of %lld tokens; there is room for %lld", (long long)n,
                     (long long)t->max_tokens);
    for (int64_t i = 0; i < n; i++)
        if (doc->token[i] < 0 || doc->token[i] >= t->g.vocab)
            LSA_RET_FAIL(LSA_E_ARG, "token %d at position %lld is outside the vocabulary [0, %d)",
                         doc->token[i], (long long)i, t->g.vocab);
    t->n_probe = doc->n_probe;
    for (int32_t i = 0; i < doc->n_probe; i++) t->probe[i] = doc->probe[i];
    t->hidden_stride = doc->hidden_stride > 0 ? doc->hidden_stride : 0;
    t->dense_every = doc->dense_every > 0 ? doc->dense_every : 0;
    LSA_TRY(teacher_slots_room(t, err));
    t->n = n;
    LSA_TRY(lsa_ctx_upload(t->ctx, t->token, doc->token, (size_t)n * sizeof *doc->token, err));
    LSA_TRY(teacher_park_begin(t, doc, err));
    if (!doc->from) LSA_TRY(teacher_embed(t, err));
done:
    return st;
}

static lsa_status chunk_through(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m,
                                lsa_gpu_csa_tap *tap, void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_layer_weights *w = &l->w;
    const bool csa = w->roles == 2, tell = csa && tap;
    if (csa) LSA_TRY(teacher_slot_take(t, p, m, tap, user, err)); /* room for the selection at least */
    LSA_TRY(teacher_marks_begin(t, err));
    LSA_TRY(teacher_park_wait(t, p, err));
    LSA_TRY(teacher_collapse(t, p, m, w->attn_fn, w->attn_base, w->attn_scale, w->attn_norm, err));
    LSA_TRY(teacher_mark(t, LSA_GPU_STREAMS, err));
    if (tell) LSA_TRY(teacher_slot_hidden(t, err));
    LSA_TRY(teacher_project(t, l, p, m, err));
    LSA_TRY(teacher_mark(t, LSA_GPU_PROJECT, err));
    if (w->ratio) {
        LSA_TRY(teacher_compress(t, l, p / w->ratio, (p + m) / w->ratio, err));
        LSA_TRY(teacher_mark(t, LSA_GPU_COMPRESS, err));
    }
    if (csa) {
        LSA_TRY(teacher_select(t, p, m, err));
        LSA_TRY(teacher_mark(t, LSA_GPU_INDEX, err));
    }
    LSA_TRY(teacher_attend(t, l, p, m, err));
    LSA_TRY(teacher_mark(t, LSA_GPU_ATTEND, err));
    if (tell) {
        LSA_TRY(teacher_slot_send(t, l, err));
        LSA_TRY(teacher_mark(t, LSA_GPU_STATISTICS, err));
    }
    LSA_TRY(teacher_expand(t, p, m, err));
    LSA_TRY(teacher_collapse(t, p, m, w->ffn_fn, w->ffn_base, w->ffn_scale, w->ffn_norm, err));
    LSA_TRY(teacher_mark(t, LSA_GPU_STREAMS, err));
    LSA_TRY(teacher_moe(t, l, p, m, err));
    LSA_TRY(teacher_mark(t, LSA_GPU_MOE, err));
    LSA_TRY(teacher_expand(t, p, m, err));
    LSA_TRY(teacher_mark(t, LSA_GPU_STREAMS, err));
    LSA_TRY(teacher_park_leave(t, p, err));
done:
    return st;
}

extern "C" lsa_status lsa_gpu_teacher_layer(lsa_gpu_teacher *t, const lsa_gpu_layer *l, lsa_gpu_csa_tap *tap,
                                            void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int64_t p = 0; p < t->n; p += t->chunk)
        LSA_TRY(chunk_through(t, l, p, t->n - p < t->chunk ? t->n - p : t->chunk, tap, user, err));
done:
    return st;
}

extern "C" lsa_status lsa_gpu_teacher_drain(lsa_gpu_teacher *t, lsa_err *err) {
    return teacher_slots_deliver(t, err);
}

extern "C" lsa_status lsa_gpu_teacher_seconds(lsa_gpu_teacher *t, double out[LSA_GPU_STAGES], lsa_err *err) {
    const lsa_status st = teacher_marks_collect(t, err);
    for (int i = 0; i < LSA_GPU_STAGES; i++) out[i] = t->seconds[i];
    return st;
}

extern "C" lsa_status lsa_gpu_teacher_logits(lsa_gpu_teacher *t, int64_t first, int64_t m, float *logits,
                                             lsa_err *err) {
    lsa_status st = LSA_OK;
    float *out = NULL;
    if (first < 0 || m < 0 || m > t->chunk || first + m > t->n)
        LSA_RET_FAIL(LSA_E_ARG, "logits of tokens %lld to %lld of %lld, at most %lld at a time",
                     (long long)first, (long long)(first + m), (long long)t->n, (long long)t->chunk);
    LSA_TRY(lsa_ctx_alloc_(t->ctx, (void **)&out, m * t->g.vocab, sizeof *out, "logits", err));
    LSA_TRY(teacher_head(t, first, m, err));
    LSA_TRY(teacher_gemm(t, m, t->g.vocab, t->g.hidden, t->x, t->table.head, 0, out, err));
    LSA_TRY(lsa_ctx_download(t->ctx, logits, out, (size_t)(m * t->g.vocab) * sizeof *logits, err));
done:
    lsa_ctx_free(t->ctx, out);
    return st;
}
