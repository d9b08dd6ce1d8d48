/* The tensors of a geometry: see teacher_tensors.h. The mistake that would stay silent: a tensor left out
 * here is reported as unknown in every checkpoint, and one too many as missing. */
#include "data/teacher_tensors.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/num.h"

typedef struct walk {
    const lsa_teacher_config *c;
    lsa_teacher_tensor_fn fn;
    void *user;
    lsa_err *err;
    int32_t layer;
} walk;

/* One tensor; the name is relative to the layer. */
LSA_PRINTF(5, 6)
static lsa_status put(const walk *w, lsa_dtype dtype, int64_t rows, int64_t cols, const char *fmt, ...) {
    lsa_teacher_tensor t = {.rows = rows, .cols = cols, .dtype = dtype, .layer = w->layer};
    va_list ap;
    int at = w->layer < 0 ? 0 : snprintf(t.name, sizeof t.name, "layers.%d.", w->layer);
    va_start(ap, fmt);
    vsnprintf(t.name + at, sizeof t.name - (size_t)at, fmt, ap);
    va_end(ap);
    t.expert = strstr(t.name, ".ffn.experts.") != NULL;
    t.lookup = !strcmp(t.name, "embed.weight") || strstr(t.name, ".ape");
    return w->fn(w->user, &t, w->err);
}

static lsa_status put_compressor(const walk *w, const char *prefix, int64_t ratio, int64_t width) {
    lsa_status st = LSA_OK;
    const int64_t d = w->c->hidden, roles = ratio == LSA_CHUNK ? 2 : 1;
    LSA_TRY(put(w, LSA_BF16, roles * width, d, "%s.wkv.weight", prefix));
    LSA_TRY(put(w, LSA_BF16, roles * width, d, "%s.wgate.weight", prefix));
    LSA_TRY(put(w, LSA_F32, ratio, roles * width, "%s.ape", prefix));
    LSA_TRY(put(w, LSA_BF16, 1, width, "%s.norm.weight", prefix));
done:
    return st;
}

static lsa_status put_attention(const walk *w) {
    lsa_status st = LSA_OK;
    const lsa_teacher_config *c = w->c;
    const lsa_layer_kind kind = c->kind[w->layer];
    const lsa_dtype m = c->matrix_dtype;
    const int64_t d = c->hidden, HD = (int64_t)c->n_head * c->head_dim, G = (int64_t)c->o_groups * c->o_rank;
    LSA_TRY(put(w, m, c->q_rank, d, "attn.wq_a.weight"));
    LSA_TRY(put(w, LSA_BF16, 1, c->q_rank, "attn.q_norm.weight"));
    LSA_TRY(put(w, m, HD, c->q_rank, "attn.wq_b.weight"));
    LSA_TRY(put(w, m, c->head_dim, d, "attn.wkv.weight"));
    LSA_TRY(put(w, LSA_BF16, 1, c->head_dim, "attn.kv_norm.weight"));
    LSA_TRY(put(w, LSA_F32, 1, c->n_head, "attn.attn_sink"));
    LSA_TRY(put(w, m, G, HD / c->o_groups, "attn.wo_a.weight"));
    LSA_TRY(put(w, m, d, G, "attn.wo_b.weight"));
    if (kind != LSA_LAYER_WINDOW)
        LSA_TRY(put_compressor(w, "attn.compressor", c->ratio[w->layer], c->head_dim));
    if (kind == LSA_LAYER_CSA) {
        LSA_TRY(
            put(w, m, (int64_t)c->index_n_head * c->index_head_dim, c->q_rank, "attn.indexer.wq_b.weight"));
        LSA_TRY(put(w, LSA_BF16, c->index_n_head, d, "attn.indexer.weights_proj.weight"));
        LSA_TRY(put_compressor(w, "attn.indexer.compressor", LSA_CHUNK, c->index_head_dim));
    }
done:
    return st;
}

static lsa_status put_moe(const walk *w) {
    lsa_status st = LSA_OK;
    const lsa_teacher_config *c = w->c;
    const int64_t d = c->hidden, m = c->moe_dim;
    LSA_TRY(put(w, LSA_BF16, c->n_expert, d, "ffn.gate.weight"));
    if (c->hash_moe[w->layer])
        LSA_TRY(put(w, LSA_I64, c->vocab, c->n_expert_tok, "ffn.gate.tid2eid"));
    else
        LSA_TRY(put(w, LSA_F32, 1, c->n_expert, "ffn.gate.bias"));
    for (int32_t e = 0; e <= c->n_expert; e++) {
        const lsa_dtype t = e < c->n_expert ? c->expert_dtype : c->matrix_dtype;
        char who[32];
        if (e < c->n_expert)
            snprintf(who, sizeof who, "experts.%d", e);
        else
            snprintf(who, sizeof who, "shared_experts");
        LSA_TRY(put(w, t, m, d, "ffn.%s.w1.weight", who));
        LSA_TRY(put(w, t, d, m, "ffn.%s.w2.weight", who));
        LSA_TRY(put(w, t, m, d, "ffn.%s.w3.weight", who));
    }
done:
    return st;
}

static lsa_status put_layer(const walk *w) {
    lsa_status st = LSA_OK;
    const int64_t d = w->c->hidden, n = w->c->hc_mult;
    static const char *const part[] = {"attn", "ffn"};
    for (int i = 0; i < 2; i++) {
        LSA_TRY(put(w, LSA_BF16, 1, d, "%s_norm.weight", part[i]));
        LSA_TRY(put(w, LSA_F32, n * (n + 2), n * d, "hc_%s_fn", part[i]));
        LSA_TRY(put(w, LSA_F32, 1, n * (n + 2), "hc_%s_base", part[i]));
        LSA_TRY(put(w, LSA_F32, 1, 3, "hc_%s_scale", part[i]));
    }
    LSA_TRY(put_attention(w));
    LSA_TRY(put_moe(w));
done:
    return st;
}

lsa_status lsa_teacher_each(const lsa_teacher_config *c, lsa_teacher_tensor_fn fn, void *user, lsa_err *err) {
    lsa_status st = LSA_OK;
    walk w = {c, fn, user, err, -1};
    const int64_t d = c->hidden, n = c->hc_mult;
    LSA_TRY(put(&w, LSA_BF16, c->vocab, d, "embed.weight"));
    LSA_TRY(put(&w, LSA_BF16, c->vocab, d, "head.weight"));
    LSA_TRY(put(&w, LSA_BF16, 1, d, "norm.weight"));
    LSA_TRY(put(&w, LSA_F32, n, n * d, "hc_head_fn"));
    LSA_TRY(put(&w, LSA_F32, 1, n, "hc_head_base"));
    LSA_TRY(put(&w, LSA_F32, 1, 1, "hc_head_scale"));
    for (w.layer = 0; w.layer < c->n_layer; w.layer++) LSA_TRY(put_layer(&w));
done:
    return st;
}

int64_t lsa_teacher_tensor_bytes(const lsa_teacher_tensor *t) {
    const int64_t n = t->rows * t->cols;
    if (t->dtype == LSA_F4) return t->rows * lsa_ceil_div(t->cols, 2) + t->rows * lsa_ceil_div(t->cols, 32);
    if (t->dtype == LSA_F8_E4M3) return n + lsa_ceil_div(t->rows, 128) * lsa_ceil_div(t->cols, 128);
    return n * (int64_t)lsa_dtype_bytes(t->dtype);
}

typedef struct tally {
    lsa_teacher_size *s;
    const lsa_teacher_config *c;
    int64_t layer_bytes[LSA_MAX_LAYERS];
} tally;

static lsa_status count(void *user, const lsa_teacher_tensor *t, lsa_err *err) {
    tally *y = user;
    const int64_t bytes = lsa_teacher_tensor_bytes(t);
    const double n = (double)t->rows * (double)t->cols;
    (void)err;
    y->s->tensors += 1 + (t->dtype == LSA_F4 || t->dtype == LSA_F8_E4M3);
    y->s->f32_tensors += t->dtype == LSA_F32;
    y->s->bytes += bytes;
    if (t->layer >= 0) y->layer_bytes[t->layer] += bytes;
    if (t->dtype == LSA_I64) return LSA_OK;
    y->s->params += n;
    if (t->rows > 1 && !t->lookup && t->layer >= 0)
        y->s->active += t->expert ? n * y->c->n_expert_tok / y->c->n_expert : n;
    return LSA_OK;
}

lsa_status lsa_teacher_measure(lsa_teacher_size *out, const lsa_teacher_config *c, lsa_err *err) {
    tally y = {.s = out, .c = c};
    memset(out, 0, sizeof *out);
    const lsa_status st = lsa_teacher_each(c, count, &y, err);
    for (int32_t l = 0; l < c->n_layer; l++)
        out->largest_layer = lsa_max_i64(out->largest_layer, y.layer_bytes[l]);
    return st;
}

double lsa_visible_sum(int64_t n, int64_t ratio, int64_t cap) {
    double tail = 0;
    if (n / ratio > cap) { /* from token cap*ratio-1 on, cap rows each */
        tail = (double)cap * (double)(n - (cap * ratio - 1));
        n = cap * ratio - 1;
    }
    const double q = (double)(n / ratio), m = (double)ratio;
    return tail + m * q * (q - 1) / 2 + q * ((double)n - q * m + 1);
}

double lsa_teacher_flops(const lsa_teacher_config *c, const lsa_teacher_size *s, int64_t n) {
    const double row = 4.0 * c->n_head * c->head_dim, index = 2.0 * c->index_n_head * c->index_head_dim;
    double f = 2 * s->active * (double)n;
    for (int32_t l = 0; l < c->n_layer; l++) {
        f += row * lsa_visible_sum(n, 1, c->window);
        if (c->kind[l] == LSA_LAYER_HCA) f += row * lsa_visible_sum(n, c->ratio[l], n);
        if (c->kind[l] != LSA_LAYER_CSA) continue;
        f += row * lsa_visible_sum(n, LSA_CHUNK, c->index_topk);
        f += index * lsa_visible_sum(n, LSA_CHUNK, n);
    }
    return f;
}
