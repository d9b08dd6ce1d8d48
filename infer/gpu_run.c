/* Documents on a GPU: see gpu_run.h. */
#include "infer/gpu_run.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "infer/gpu_stream.h"
#include "infer/gpu_weights.h"
#include "kernels/core/clock.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

struct lsa_gpu_run {
    lsa_ctx *ctx;
    const lsa_engine *e;
    lsa_gpu_teacher *teacher;
    lsa_gpu_layer *layer[LSA_MAX_LAYERS]; /* resident */
    lsa_gpu_stream *stream;               /* or streamed */
    char *parked; /* pinned [parked_tokens, streams, d], f32 or bf16: documents between two layers */
    int64_t parked_tokens;
    bool half;
    const char *dir;      /* the same, mapped from a file there */
    double taps, feeding; /* seconds */
};

lsa_gpu_teacher_geom lsa_gpu_geom_of_config(const lsa_teacher_config *c, bool sim_fp8_kv,
                                            bool sim_fp4_index) {
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
                                  .sim_fp8_kv = sim_fp8_kv,
                                  .sim_fp4_index = sim_fp4_index};
}

lsa_gpu_teacher_geom lsa_gpu_geom_of(const lsa_engine *e) {
    return lsa_gpu_geom_of_config(&e->c, e->opts.sim_fp8_kv, e->opts.sim_fp4_index);
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

lsa_gpu_teacher_tables lsa_gpu_tables_of(const lsa_engine *e) {
    return (lsa_gpu_teacher_tables){e->freq_main, e->freq_comp,  e->embed,        e->head,
                                    e->norm,      e->hc_head_fn, e->hc_head_base, e->hc_head_scale};
}

lsa_status lsa_gpu_run_create(lsa_gpu_run **out, lsa_ctx *ctx, const lsa_engine *e, int64_t max_tokens,
                              int64_t chunk, bool stream, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_run *x = NULL;
    const lsa_gpu_teacher_geom g = lsa_gpu_geom_of(e);
    const lsa_gpu_teacher_tables tables = lsa_gpu_tables_of(e);
    *out = NULL;
    LSA_TRY(LSA_NEW(x, 1, err));
    x->ctx = ctx;
    x->e = e;
    LSA_TRY(lsa_gpu_teacher_create(&x->teacher, ctx, &g, &tables, max_tokens,
                                   chunk ? chunk : LSA_GPU_RUN_CHUNK, err));
    if (stream) LSA_TRY(lsa_gpu_stream_create(&x->stream, e, x->teacher, err));
    for (int32_t l = 0; l < e->c.n_layer && !stream; l++) {
        const lsa_gpu_layer_weights w = lsa_gpu_weights_of(&e->layer[l], e->c.ratio[l]);
        LSA_TRY(lsa_gpu_layer_put(&x->layer[l], x->teacher, &w, err));
    }
    *out = x;
    x = NULL;
done:
    lsa_gpu_run_destroy(x);
    return st;
}

/* Bytes that are parked for one token. */
static int64_t token_bytes(const lsa_gpu_run *x) {
    return (int64_t)x->e->c.hc_mult * x->e->c.hidden * (x->half ? 2 : 4);
}

void lsa_gpu_run_park(lsa_gpu_run *x, bool half, const char *dir) {
    x->half = half;
    x->dir = dir;
}

static void leave_parking(lsa_gpu_run *x) {
    if (x->parked && x->dir)
        munmap(x->parked, (size_t)(x->parked_tokens * token_bytes(x)));
    else if (x->parked)
        lsa_gpu_unpin(x->parked);
    x->parked = NULL;
    x->parked_tokens = 0;
}

/* A file that goes when it is unmapped, or with the process; all of its blocks are there, since a full disk
 * could not be reported later. */
static lsa_status map_file(char **out, const char *dir, int64_t bytes, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    int fd = -1, sys;
    void *p;
    LSA_TRY(lsa_path(path, err, "%s/.lsa-streams-XXXXXX", dir));
    fd = mkstemp(path);
    if (fd < 0)
        LSA_FAIL(lsa_status_from_errno(errno), "cannot create a file in '%s': %s", dir, strerror(errno));
    unlink(path);
    sys = posix_fallocate(fd, 0, (off_t)bytes);
    if (sys)
        LSA_FAIL(lsa_status_from_errno(sys),
                 "the streams of a wave take %.2f GiB in '%s': %s; a smaller --wave-tokens or another folder",
                 (double)bytes / 0x1p30, dir, strerror(sys));
    p = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        LSA_FAIL(LSA_E_NOMEM, "cannot map %.2f GiB: %s", (double)bytes / 0x1p30, strerror(errno));
    *out = p;
done:
    if (fd >= 0) close(fd);
    return st;
}

void lsa_gpu_run_destroy(lsa_gpu_run *x) {
    if (!x) return;
    for (int32_t l = 0; l < LSA_MAX_LAYERS; l++) lsa_gpu_layer_drop(x->layer[l]);
    lsa_gpu_stream_destroy(x->stream);
    lsa_gpu_teacher_destroy(x->teacher); /* waits for what is being parked */
    leave_parking(x);
    lsa_free(x);
}

/* Rows of layer `ord` of a document, each token by some OpenMP thread. */
static void call_taps(const lsa_gpu_run *x, const lsa_gpu_doc *doc, int32_t ord, const lsa_gpu_csa_rows *a) {
    const lsa_teacher_config *c = &x->e->c;
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t i = 0; i < a->m; i++) {
        const int64_t p = a->first + i;
        lsa_tap_csa t = {.ord = {ord},
                         .layer = c->csa_id[ord],
                         .position = p,
                         .n_visible = lsa_visible(p),
                         .n_sel = a->n_sel[i],
                         .sel = a->sel + i * a->top_k,
                         .sel_logit = a->logit + i * a->top_k,
                         .mass = a->mass + i * a->top_k,
                         .window_mass = a->window_mass[i],
                         .sink_mass = a->sink_mass[i]};
        for (int32_t k = 0; k < a->n_probe; k++)
            if (a->probe[k].position == p)
                t.logit = a->probe[k].logit, t.iq = a->probe[k].iq, t.iw = a->probe[k].iw;
        if (a->hidden_stride && (p + 1) % a->hidden_stride == 0)
            t.hidden = a->hidden + ((p + 1) / a->hidden_stride - a->first / a->hidden_stride - 1) * c->hidden;
        if (a->dense_every && (p + 1) % a->dense_every == 0)
            t.dense_mass =
                a->dense + ((p + 1) / a->dense_every - a->first / a->dense_every - 1) * a->dense_ld;
        doc->taps->csa(doc->taps->user, &t);
    }
}

/* One of what a document waits for is there: the rows of its CSA layers, and the queueing of its last layer.
 */
static void one_less(lsa_gpu_doc *doc) {
    if (--doc->left == 0 && doc->done) doc->done(doc->user);
}

static void on_rows(void *user, const lsa_gpu_csa_rows *a) {
    const lsa_gpu_row_user *const u = user;
    lsa_gpu_run *const x = u->run;
    lsa_gpu_doc *const doc = u->doc;
    const double t0 = lsa_now_s();
    const int64_t Di = x->e->c.index_head_dim;
    if (doc->key[u->ord] && a->n_key)
        memcpy(doc->key[u->ord] + a->first_key * Di, a->key, (size_t)(a->n_key * Di) * sizeof *a->key);
    if (doc->taps && doc->taps->csa) call_taps(x, doc, u->ord, a);
    x->taps += lsa_now_s() - t0;
    if (a->first + a->m == doc->n) one_less(doc);
}

static lsa_status begin(lsa_gpu_run *x, const lsa_gpu_doc *doc, const void *from, void *to, lsa_err *err) {
    const lsa_gpu_teacher_doc d = {.token = doc->token,
                                   .n = doc->n,
                                   .probe = doc->probe,
                                   .n_probe = doc->n_probe,
                                   .hidden_stride = doc->hidden_stride,
                                   .dense_every = doc->dense_every,
                                   .from = from,
                                   .to = to,
                                   .half = x->half};
    return lsa_gpu_teacher_begin(x->teacher, &d, err);
}

static lsa_status through(lsa_gpu_run *x, lsa_gpu_doc *doc, int32_t l, const lsa_gpu_layer *layer,
                          lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_teacher_config *c = &x->e->c;
    const int32_t ord = c->csa_ord[l];
    if (ord >= 0) doc->rows[ord] = (lsa_gpu_row_user){x, doc, ord};
    LSA_TRY(lsa_gpu_teacher_layer(x->teacher, layer, ord >= 0 ? on_rows : NULL,
                                  ord >= 0 ? &doc->rows[ord] : NULL, err));
    if (step) LSA_TRY(step(user, doc->n * (l + 1) / c->n_layer - doc->n * l / c->n_layer, err));
done:
    return st;
}

static lsa_status room_to_park(lsa_gpu_run *x, lsa_gpu_doc *const *doc, int64_t n, lsa_err *err) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; i++) tokens += doc[i]->n;
    if (tokens <= x->parked_tokens) return LSA_OK;
    lsa_status st = lsa_ctx_sync(x->ctx, err); /* what is parked may still be read */
    if (st != LSA_OK) return st;
    leave_parking(x);
    st = x->dir ? map_file(&x->parked, x->dir, tokens * token_bytes(x), err)
                : lsa_gpu_pin((void **)&x->parked, tokens * token_bytes(x), err);
    if (st == LSA_OK) x->parked_tokens = tokens;
    return st;
}

static lsa_status wave(lsa_gpu_run *x, lsa_gpu_doc *const *doc, int64_t n,
                       lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_teacher_config *c = &x->e->c;
    LSA_TRY(room_to_park(x, doc, n, err));
    for (int32_t l = 0; l < c->n_layer; l++) {
        lsa_gpu_layer *layer;
        LSA_TRY(lsa_gpu_stream_begin(&layer, x->stream, err));
        LSA_TRY(lsa_gpu_teacher_turn(x->teacher, err));
        char *at = x->parked;
        for (int64_t i = 0; i < n; i++) {
            LSA_TRY(begin(x, doc[i], l > 0 ? at : NULL, l + 1 < c->n_layer ? at : NULL, err));
            LSA_TRY(through(x, doc[i], l, layer, step, user, err));
            LSA_TRY(lsa_gpu_stream_poll(x->stream, err));
            at += doc[i]->n * token_bytes(x);
            if (l + 1 == c->n_layer) one_less(doc[i]); /* it may be gone after this */
        }
        LSA_TRY(lsa_gpu_stream_end(x->stream, err));
    }
done:
    return st;
}

static lsa_status resident(lsa_gpu_run *x, lsa_gpu_doc *doc,
                           lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user,
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(begin(x, doc, NULL, NULL, err));
    for (int32_t l = 0; l < x->e->c.n_layer; l++) LSA_TRY(through(x, doc, l, x->layer[l], step, user, err));
    one_less(doc);
done:
    return st;
}

lsa_status lsa_gpu_run_feed(lsa_gpu_run *x, lsa_gpu_doc *const *doc, int64_t n,
                            lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    const double t0 = lsa_now_s(), taps = x->taps;
    for (int64_t i = 0; i < n; i++) doc[i]->left = x->e->c.n_csa + 1;
    if (x->stream)
        LSA_TRY(wave(x, doc, n, step, user, err));
    else
        for (int64_t i = 0; i < n; i++) LSA_TRY(resident(x, doc[i], step, user, err));
done:
    x->feeding += lsa_now_s() - t0 - (x->taps - taps);
    return st;
}

lsa_status lsa_gpu_run_drain(lsa_gpu_run *x, lsa_err *err) {
    const double t0 = lsa_now_s(), taps = x->taps;
    const lsa_status st = lsa_gpu_teacher_drain(x->teacher, err);
    x->feeding += lsa_now_s() - t0 - (x->taps - taps);
    return st;
}

lsa_status lsa_gpu_run_logits(lsa_gpu_run *x, int64_t first, int64_t m, float *logits, lsa_err *err) {
    return lsa_gpu_teacher_logits(x->teacher, first, m, logits, err);
}

lsa_status lsa_gpu_run_times(lsa_gpu_run *x, lsa_gpu_times *out, lsa_err *err) {
    out->taps = x->taps;
    out->wait = x->feeding;
    return lsa_gpu_teacher_seconds(x->teacher, out->gpu, err);
}
