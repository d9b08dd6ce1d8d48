/* Loading: every weight in fp32, matrices that read the same input stacked so that they are one product. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "infer/engine.h"
#include "infer/numeric.h"
#include "kernels/core/mem.h"
#include "kernels/model/rope.h"

typedef struct loader {
    const lsa_engine *e;
    int32_t layer;
    const lsa_layer_sink *to;
    lsa_err *err;
} loader;

/* ---- into host memory ---- */

static lsa_status host_room(void *user, void **p, int64_t n, size_t size, const char *what, lsa_err *err) {
    (void)user;
    return lsa_alloc_(p, n, size, what, err);
}
static lsa_status host_numbers(void *user, float *dst, const char *name, int64_t rows, int64_t cols,
                               lsa_err *err) {
    const lsa_engine *e = user;
    return lsa_teacher_f32(dst, e->teacher, name, rows, cols, err);
}

lsa_status lsa_engine_experts_of_tokens(int64_t *dst, const lsa_engine *e, const char *name, lsa_err *err) {
    const lsa_teacher_config *c = &e->c;
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_teacher_i64(dst, e->teacher, name, c->vocab, c->n_expert_tok, err));
    for (int64_t i = 0; i < (int64_t)c->vocab * c->n_expert_tok; i++)
        if (dst[i] < 0 || dst[i] >= c->n_expert)
            LSA_FAIL(LSA_E_FORMAT, "tensor '%s': element %lld is %lld, must be in [0, %lld]", name,
                     (long long)i, (long long)dst[i], (long long)c->n_expert - 1);
done:
    return st;
}
static lsa_status host_experts(void *user, int64_t *dst, const char *name, lsa_err *err) {
    return lsa_engine_experts_of_tokens(dst, user, name, err);
}

/* ---- a layer ---- */

static lsa_status room(const loader *l, void **p, int64_t n, size_t size, const char *what) {
    return l->to->room(l->to->user, p, n, size, what, l->err);
}

static lsa_status read_into(const loader *l, float *dst, const char *suffix, int64_t rows, int64_t cols) {
    char name[160];
    snprintf(name, sizeof name, "layers.%d.%s", l->layer, suffix);
    return l->to->numbers(l->to->user, dst, name, rows, cols, l->err);
}

static lsa_status read_new(const loader *l, float **dst, const char *suffix, int64_t rows, int64_t cols) {
    lsa_status st = room(l, (void **)dst, rows * cols, sizeof(float), suffix);
    return st == LSA_OK ? read_into(l, *dst, suffix, rows, cols) : st;
}

static lsa_status read_mhc(const loader *l, mhc_weights *w, const char *part) {
    const lsa_teacher_config *c = &l->e->c;
    const int64_t n = c->hc_mult, nz = n * (n + 2);
    lsa_status st = LSA_OK;
    char s[64];
    snprintf(s, sizeof s, "hc_%s_fn", part);
    LSA_TRY(read_new(l, &w->fn, s, nz, n * c->hidden));
    snprintf(s, sizeof s, "hc_%s_base", part);
    LSA_TRY(read_new(l, &w->base, s, 1, nz));
    snprintf(s, sizeof s, "hc_%s_scale", part);
    LSA_TRY(read_new(l, &w->scale, s, 1, 3));
done:
    return st;
}

static lsa_status read_compressor(const loader *l, compressor_weights *w, const char *prefix, int32_t ratio,
                                  int32_t width) {
    lsa_status st = LSA_OK;
    char s[96];
    w->ratio = ratio;
    w->roles = ratio == LSA_CHUNK ? 2 : 1;
    w->width = width;
    snprintf(s, sizeof s, "%s.ape", prefix);
    LSA_TRY(read_new(l, &w->ape, s, ratio, (int64_t)w->roles * width));
    snprintf(s, sizeof s, "%s.norm.weight", prefix);
    LSA_TRY(read_new(l, &w->norm, s, 1, width));
done:
    return st;
}

/* The stacked projection of x: parts in fixed order. */
static lsa_status read_x_projections(const loader *l, layer_weights *w, lsa_layer_kind kind) {
    const lsa_teacher_config *c = &l->e->c;
    lsa_status st = LSA_OK;
    const int64_t d = c->hidden, kc = (int64_t)w->comp.roles * c->head_dim,
                  ki = 2 * (int64_t)c->index_head_dim;
    struct {
        const char *name;
        int64_t rows;
        int32_t *at;
        bool on;
    } part[] = {{"attn.wq_a.weight", c->q_rank, NULL, true},
                {"attn.wkv.weight", c->head_dim, &w->at_kv, true},
                {"attn.compressor.wkv.weight", kc, &w->at_cv, kind != LSA_LAYER_WINDOW},
                {"attn.compressor.wgate.weight", kc, &w->at_cg, kind != LSA_LAYER_WINDOW},
                {"attn.indexer.compressor.wkv.weight", ki, &w->at_iv, kind == LSA_LAYER_CSA},
                {"attn.indexer.compressor.wgate.weight", ki, &w->at_ig, kind == LSA_LAYER_CSA},
                {"attn.indexer.weights_proj.weight", c->index_n_head, &w->at_iw, kind == LSA_LAYER_CSA}};
    int64_t nx = 0;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        if (part[i].at) *part[i].at = part[i].on ? (int32_t)nx : -1;
        if (part[i].on) nx += part[i].rows;
    }
    w->nx = (int32_t)nx;
    LSA_TRY(room(l, (void **)&w->wx, nx * d, sizeof *w->wx, "projections of x"));
    float *at = w->wx;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        if (!part[i].on) continue;
        LSA_TRY(read_into(l, at, part[i].name, part[i].rows, d));
        at += part[i].rows * d;
    }
done:
    return st;
}

static lsa_status read_moe(const loader *l, layer_weights *w) {
    const lsa_teacher_config *c = &l->e->c;
    lsa_status st = LSA_OK;
    const int64_t d = c->hidden, m = c->moe_dim, E = c->n_expert;
    char s[96];
    LSA_TRY(read_new(l, &w->gate, "ffn.gate.weight", E, d));
    LSA_TRY(room(l, (void **)&w->w13, (E + 1) * 2 * m * d, sizeof(float), "experts"));
    LSA_TRY(room(l, (void **)&w->w2, (E + 1) * d * m, sizeof(float), "experts"));
    for (int64_t i = 0; i <= E; i++) {
        char who[48];
        if (i < E)
            snprintf(who, sizeof who, "experts.%lld", (long long)i);
        else
            snprintf(who, sizeof who, "shared_experts");
        snprintf(s, sizeof s, "ffn.%s.w1.weight", who);
        LSA_TRY(read_into(l, w->w13 + i * 2 * m * d, s, m, d));
        snprintf(s, sizeof s, "ffn.%s.w3.weight", who);
        LSA_TRY(read_into(l, w->w13 + i * 2 * m * d + m * d, s, m, d));
        snprintf(s, sizeof s, "ffn.%s.w2.weight", who);
        LSA_TRY(read_into(l, w->w2 + i * d * m, s, d, m));
    }
    if (c->hash_moe[l->layer]) {
        snprintf(s, sizeof s, "layers.%d.ffn.gate.tid2eid", l->layer);
        LSA_TRY(room(l, (void **)&w->tid2eid, (int64_t)c->vocab * c->n_expert_tok, sizeof(int64_t), s));
        LSA_TRY(l->to->experts(l->to->user, w->tid2eid, s, l->err));
    } else {
        LSA_TRY(read_new(l, &w->gate_bias, "ffn.gate.bias", 1, E));
    }
done:
    return st;
}

static lsa_status read_layer(const loader *l, layer_weights *w) {
    const lsa_teacher_config *c = &l->e->c;
    lsa_status st = LSA_OK;
    const lsa_layer_kind kind = c->kind[l->layer];
    const int64_t HD = (int64_t)c->n_head * c->head_dim, ID = (int64_t)c->index_n_head * c->index_head_dim;
    LSA_TRY(read_mhc(l, &w->hc_attn, "attn"));
    LSA_TRY(read_mhc(l, &w->hc_ffn, "ffn"));
    LSA_TRY(read_new(l, &w->attn_norm, "attn_norm.weight", 1, c->hidden));
    LSA_TRY(read_new(l, &w->ffn_norm, "ffn_norm.weight", 1, c->hidden));
    LSA_TRY(read_new(l, &w->q_norm, "attn.q_norm.weight", 1, c->q_rank));
    LSA_TRY(read_new(l, &w->kv_norm, "attn.kv_norm.weight", 1, c->head_dim));
    LSA_TRY(read_new(l, &w->sink, "attn.attn_sink", 1, c->n_head));
    LSA_TRY(read_new(l, &w->wo_a, "attn.wo_a.weight", (int64_t)c->o_groups * c->o_rank, HD / c->o_groups));
    LSA_TRY(read_new(l, &w->wo_b, "attn.wo_b.weight", c->hidden, (int64_t)c->o_groups * c->o_rank));
    if (kind != LSA_LAYER_WINDOW)
        LSA_TRY(read_compressor(l, &w->comp, "attn.compressor", c->ratio[l->layer], c->head_dim));
    if (kind == LSA_LAYER_CSA)
        LSA_TRY(read_compressor(l, &w->icomp, "attn.indexer.compressor", LSA_CHUNK, c->index_head_dim));
    LSA_TRY(read_x_projections(l, w, kind));
    LSA_TRY(
        room(l, (void **)&w->wq, (HD + (kind == LSA_LAYER_CSA ? ID : 0)) * c->q_rank, sizeof(float), "wq_b"));
    LSA_TRY(read_into(l, w->wq, "attn.wq_b.weight", HD, c->q_rank));
    if (kind == LSA_LAYER_CSA)
        LSA_TRY(read_into(l, w->wq + HD * c->q_rank, "attn.indexer.wq_b.weight", ID, c->q_rank));
    LSA_TRY(read_moe(l, w));
done:
    return st;
}

lsa_status lsa_engine_read_layer(layer_weights *w, const lsa_engine *e, int32_t layer,
                                 const lsa_layer_sink *to, lsa_err *err) {
    const loader l = {e, layer, to, err};
    return read_layer(&l, w);
}

lsa_status lsa_engine_open(lsa_engine **out, const char *dir, const lsa_engine_opts *opts, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_engine *e = NULL;
    *out = NULL;
    LSA_TRY(lsa_alloc_((void **)&e, 1, sizeof *e, "engine", err));
    if (opts) e->opts = *opts;
    LSA_TRY(lsa_teacher_open(&e->teacher, dir, err));
    LSA_TRY(lsa_teacher_check(e->teacher, err));
    e->c = *lsa_teacher_cfg(e->teacher);
    const lsa_teacher_config *c = &e->c;
    const int64_t d = c->hidden, n = c->hc_mult;
    if (c->head_dim > 4096 || c->index_head_dim > 4096 || c->n_expert > 4096 || c->n_expert_tok > 64)
        LSA_FAIL(LSA_E_UNSUPPORTED,
                 "%s: head size, expert count or experts per token beyond what the engine was written for",
                 dir);
    LSA_TRY(LSA_NEW(e->freq_main, c->rope_dim / 2, err));
    LSA_TRY(LSA_NEW(e->freq_comp, c->rope_dim / 2, err));
    lsa_rope_freqs(e->freq_main, &c->rope_main);
    lsa_rope_freqs(e->freq_comp, &c->rope_compress);
    LSA_TRY(LSA_NEW(e->embed, c->vocab * d, err));
    LSA_TRY(lsa_teacher_f32(e->embed, e->teacher, "embed.weight", c->vocab, d, err));
    LSA_TRY(LSA_NEW(e->head, c->vocab * d, err));
    LSA_TRY(lsa_teacher_f32(e->head, e->teacher, "head.weight", c->vocab, d, err));
    LSA_TRY(LSA_NEW(e->norm, d, err));
    LSA_TRY(lsa_teacher_f32(e->norm, e->teacher, "norm.weight", 1, d, err));
    LSA_TRY(LSA_NEW(e->hc_head_fn, n * n * d, err));
    LSA_TRY(lsa_teacher_f32(e->hc_head_fn, e->teacher, "hc_head_fn", n, n * d, err));
    LSA_TRY(LSA_NEW(e->hc_head_base, n, err));
    LSA_TRY(lsa_teacher_f32(e->hc_head_base, e->teacher, "hc_head_base", 1, n, err));
    LSA_TRY(LSA_NEW(e->hc_head_scale, 1, err));
    LSA_TRY(lsa_teacher_f32(e->hc_head_scale, e->teacher, "hc_head_scale", 1, 1, err));
    const lsa_layer_sink host = {e, host_room, host_numbers, host_experts};
    for (int32_t l = 0; l < c->n_layer && !e->opts.without_layers; l++)
        LSA_TRY(lsa_engine_read_layer(&e->layer[l], e, l, &host, err));
    *out = e;
    e = NULL;
done:
    if (st != LSA_OK) lsa_err_wrap(err, "teacher '%s'", dir);
    lsa_engine_close(e);
    return st;
}

void lsa_engine_close(lsa_engine *e) {
    if (!e) return;
    for (int32_t l = 0; l < e->c.n_layer; l++) {
        layer_weights *w = &e->layer[l];
        void *p[] = {w->hc_attn.fn,  w->hc_attn.base, w->hc_attn.scale, w->hc_ffn.fn,
                     w->hc_ffn.base, w->hc_ffn.scale, w->attn_norm,     w->ffn_norm,
                     w->wx,          w->q_norm,       w->kv_norm,       w->sink,
                     w->wq,          w->wo_a,         w->wo_b,          w->comp.ape,
                     w->comp.norm,   w->icomp.ape,    w->icomp.norm,    w->gate,
                     w->gate_bias,   w->tid2eid,      w->w13,           w->w2};
        for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    }
    void *p[] = {e->embed,        e->head,          e->norm,      e->hc_head_fn,
                 e->hc_head_base, e->hc_head_scale, e->freq_main, e->freq_comp};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    lsa_teacher_close(e->teacher);
    lsa_free(e);
}

const lsa_teacher_config *lsa_engine_config(const lsa_engine *e) {
    return &e->c;
}
const lsa_teacher *lsa_engine_teacher(const lsa_engine *e) {
    return e->teacher;
}

int64_t lsa_server_row_bytes(const lsa_teacher_config *c) {
    /* E4M3 codes of the plain channels, bf16 rotary channels, one scale per 64 plain channels padded to 8,
     * index key */
    int64_t plain = c->head_dim - c->rope_dim, scales = (plain + 63) / 64;
    return plain + 2 * (int64_t)c->rope_dim + (scales + 7) / 8 * 8 + LSA_KEY_BYTES;
}
