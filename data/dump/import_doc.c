/* From a borrowed document to shard columns: see import_doc.h. Rules of the reference's labels: FlashMemory,
 * arXiv 2606.09079, and the released dump.
 *
 * The mistake that would stay silent: accepting a label because its chunk exists at the end of the document.
 * It must exist when the token is processed; with keys of the whole answer at hand both look alike. */
#include "data/dump/import_doc.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/mem.h"

void lsa_import_close(lsa_import_doc *d) {
    lsa_free(d->entry);
    for (int i = 0; i < LSA_IMPORT_MAX_FILES; i++) lsa_st_close(d->file[i]);
    lsa_map_close(&d->map);
    memset(d, 0, sizeof *d);
}

/* Element i of an integer tensor, which need not be aligned. */
static int64_t integer(const lsa_st_tensor *t, int64_t i) {
    const unsigned char *p = t->data;
    int32_t v;
    int64_t w;
    switch (t->dtype) {
    case LSA_U8:
        return p[i];
    case LSA_I32:
        memcpy(&v, p + 4 * i, 4);
        return v;
    default:
        memcpy(&w, p + 8 * i, 8);
        return w;
    }
}

/* ---- keys and hidden vectors ---- */

static lsa_status copy_keys(lsa_doc_stats *out, const lsa_import_doc *d, int32_t ord, lsa_err *err) {
    const lsa_import_layer *l = &d->layer[ord];
    if (l->n_key != out->n_key)
        LSA_RET_FAIL(
            LSA_E_FORMAT,
            "%s: CSA layer %d has %lld index keys, expected %lld for %lld tokens: the keys were recorded from other tokens "
            "than the labels",
            d->where, ord, (long long)l->n_key, (long long)out->n_key, (long long)out->n_token);
    const lsa_status st = LSA_NEW(out->key[ord], out->n_key * LSA_KEY_BYTES, err);
    if (st != LSA_OK) return st;
    if (out->n_key) memcpy(out->key[ord], l->key, (size_t)(out->n_key * LSA_KEY_BYTES));
    for (int64_t c = 0; c < out->n_key; c++) {
        const uint8_t *key = out->key[ord] + c * LSA_KEY_BYTES;
        float scale;
        memcpy(&scale, key + 128, 4);
        bool bad = !(scale > 0) || !isfinite(scale);
        for (int i = 0; i < 128; i++) bad = bad || (key[i] & 0x7f) == 0x7f;
        if (bad)
            LSA_RET_FAIL(LSA_E_FORMAT, "%s: index key %lld of CSA layer %d is not a number (scale %g)",
                         d->where, (long long)c, ord, (double)scale);
    }
    return LSA_OK;
}

static uint16_t as_bf16(const unsigned char *p, lsa_dtype t) {
    uint16_t h;
    float f;
    if (t == LSA_F32) {
        memcpy(&f, p, 4);
        return lsa_f32_to_bf16(f);
    }
    memcpy(&h, p, 2);
    return t == LSA_BF16 ? h : lsa_f32_to_bf16(lsa_f16_to_f32(h));
}

static lsa_status copy_hidden(lsa_doc_stats *out, const lsa_import_doc *d, const lsa_shards_info *f,
                              int32_t ord, lsa_err *err) {
    const lsa_import_layer *l = &d->layer[ord];
    const int64_t width = (int64_t)lsa_dtype_bytes(l->dtype);
    const lsa_status st = LSA_NEW(out->hidden[ord], out->n_hidden * f->hidden, err);
    if (st != LSA_OK) return st;
    uint16_t *dst = out->hidden[ord];
    for (int64_t r = 0; r < d->n_row; r++) {
        if ((d->first + r + 1) % f->hidden_stride) continue;
        const unsigned char *src = l->hidden + r * l->step * width;
        bool finite = true;
        for (int64_t j = 0; j < f->hidden; j++) {
            dst[j] = as_bf16(src + j * width, l->dtype);
            finite = finite && (dst[j] & 0x7f80) != 0x7f80;
        }
        if (!finite)
            LSA_RET_FAIL(LSA_E_FORMAT, "%s: the hidden vector of token %lld in CSA layer %d is not finite",
                         d->where, (long long)(d->first + r), ord);
        dst += f->hidden;
    }
    return LSA_OK;
}

/* ---- labels ---- */

typedef struct vote {
    int32_t chunk;
    uint8_t votes;
} vote;

static int by_chunk(const void *a, const void *b) {
    const int32_t x = ((const vote *)a)->chunk, y = ((const vote *)b)->chunk;
    return (x > y) - (x < y);
}

typedef struct labeller {
    lsa_csr *out;
    const lsa_import_doc *d;
    int64_t n_key, cap[2];
    LSA_VEC(vote) row;
} labeller;

static lsa_status check_chunk(const labeller *l, int64_t row, int64_t chunk, lsa_err *err) {
    const int64_t token = l->d->first + row, visible = lsa_visible(token);
    if (chunk < 0 || chunk >= l->n_key)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: token %lld is labelled with chunk %lld, the document has [0, %lld)",
                     l->d->where, (long long)token, (long long)chunk, (long long)l->n_key);
    if (chunk >= visible)
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "%s: token %lld is labelled with chunk %lld, which is not complete yet: only %lld are "
                     "visible to it; labels must be causal",
                     l->d->where, (long long)token, (long long)chunk, (long long)visible);
    return LSA_OK;
}

/* Sorts and appends the votes of one row. */
static lsa_status add_row(labeller *l, int64_t row, lsa_err *err) {
    lsa_csr *c = l->out;
    const int64_t n = c->n_entry + l->row.len;
    lsa_status st = lsa_grow_((void **)&c->chunk, &l->cap[0], n, sizeof *c->chunk, "labels", err);
    if (st == LSA_OK) st = lsa_grow_((void **)&c->votes, &l->cap[1], n, sizeof *c->votes, "votes", err);
    if (st != LSA_OK) return st;
    if (l->row.len) qsort(l->row.data, (size_t)l->row.len, sizeof *l->row.data, by_chunk);
    for (int64_t i = 0; i < l->row.len; i++) {
        const vote v = l->row.data[i];
        if (i && v.chunk == l->row.data[i - 1].chunk)
            LSA_RET_FAIL(LSA_E_FORMAT, "%s: token %lld is labelled with chunk %d twice", l->d->where,
                         (long long)(l->d->first + row), v.chunk);
        c->chunk[c->n_entry] = v.chunk;
        c->votes[c->n_entry++] = v.votes;
    }
    c->begin[row + 1] = c->n_entry;
    return LSA_OK;
}

static lsa_status votes_row(labeller *l, int64_t row, const lsa_shards_info *f, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_import_doc *d = l->d;
    const int64_t a = integer(&d->begin, row), b = integer(&d->begin, row + 1), m = d->chunk.n_elem;
    if (a < 0 || b < a || b > m || (row == 0 && a != 0) || (row == d->n_row - 1 && b != m))
        LSA_FAIL(LSA_E_FORMAT,
                 "%s: '%s' says labels %lld to %lld belong to row %lld, which does not fit the %lld labels",
                 d->where, d->begin.name, (long long)a, (long long)b, (long long)row, (long long)m);
    LSA_TRY(LSA_VEC_RESERVE(l->row, b - a, err));
    l->row.len = b - a;
    for (int64_t i = a; i < b; i++) {
        const int64_t chunk = integer(&d->chunk, i), votes = integer(&d->votes, i);
        LSA_TRY(check_chunk(l, row, chunk, err));
        if (votes < f->label_min_votes || votes > f->n_csa)
            LSA_FAIL(
                LSA_E_FORMAT,
                "%s: token %lld, chunk %lld has %lld votes, must be in [%d, %d] (--min-votes, CSA layers of "
                "the model)",
                d->where, (long long)(d->first + row), (long long)chunk, (long long)votes, f->label_min_votes,
                f->n_csa);
        l->row.data[i - a] = (vote){(int32_t)chunk, (uint8_t)votes};
    }
    LSA_TRY(add_row(l, row, err));
done:
    return st;
}

/* Where a chunk stands in the row and which layer chose it last, both + 1. */
typedef struct mark {
    int32_t at, layer;
} mark;

/* Every layer's selection is its vote. */
static lsa_status topk_row(labeller *l, int64_t row, const lsa_shards_info *f, mark *m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_import_doc *d = l->d;
    l->row.len = 0;
    for (int32_t o = 0; o < f->n_csa; o++) {
        const int64_t before = l->row.len;
        LSA_TRY(LSA_VEC_RESERVE(l->row, before + d->top_k, err));
        for (int64_t i = 0; i < d->top_k; i++) {
            const int64_t chunk = integer(&d->topk, (row * f->n_csa + o) * d->top_k + i);
            if (chunk == -1) continue;
            LSA_TRY(check_chunk(l, row, chunk, err));
            if (m[chunk].at == 0) {
                l->row.data[l->row.len++] = (vote){(int32_t)chunk, 0};
                m[chunk].at = (int32_t)l->row.len;
            }
            if (m[chunk].layer == o + 1)
                LSA_FAIL(LSA_E_FORMAT, "%s: token %lld: CSA layer %d selects chunk %lld twice", d->where,
                         (long long)(d->first + row), o, (long long)chunk);
            m[chunk].layer = o + 1;
            l->row.data[m[chunk].at - 1].votes++;
        }
    }
    for (int64_t i = 0; i < l->row.len; i++) m[l->row.data[i].chunk] = (mark){0, 0};
    LSA_TRY(add_row(l, row, err));
done:
    return st;
}

static lsa_status build_labels(lsa_doc_stats *out, const lsa_import_doc *d, const lsa_shards_info *f,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    labeller l = {.out = &out->labels, .d = d, .n_key = out->n_key};
    mark *m = NULL;
    out->labels.n_row = d->n_row;
    LSA_TRY(LSA_NEW(out->labels.begin, d->n_row + 1, err));
    LSA_TRY(LSA_NEW(m, out->n_key, err));
    for (int64_t r = 0; r < d->n_row; r++)
        LSA_TRY(d->top_k ? topk_row(&l, r, f, m, err) : votes_row(&l, r, f, err));
done:
    lsa_free(m);
    lsa_free(l.row.data);
    return st;
}

lsa_status lsa_import_build(lsa_doc_stats *out, const lsa_import_doc *d, const lsa_shards_info *f,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    memset(out, 0, sizeof *out);
    memcpy(out->name, d->name, sizeof out->name);
    out->first_position = d->first;
    out->n_token = d->first + d->n_row;
    out->n_key = out->n_token / LSA_CHUNK;
    out->token_xxh64 = d->token_xxh64;
    out->n_hidden = out->n_token / f->hidden_stride - d->first / f->hidden_stride;
    LSA_TRY(build_labels(out, d, f, err));
    for (int32_t o = 0; o < f->n_csa; o++) {
        if (!f->has_keys[o]) continue;
        LSA_TRY(copy_keys(out, d, o, err));
        LSA_TRY(copy_hidden(out, d, f, o, err));
    }
done:
    if (st != LSA_OK) lsa_doc_stats_fini(out);
    return st;
}
