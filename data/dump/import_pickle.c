/* doc_*.pkl of the FlashMemory dump: a plain pickle of name -> tensor, read in place by data/pickle.h.
 *
 * Keys: hidden_layer_{L} bf16 [T, d], positions_layer_{L} i64 [T], compk_layer_{L} u8 [N, 132],
 * label_indices, label_scores, label_pointers i32; L is the CSA ordinal. logits_, q_ and weights_ are passed
 * over: they cover three tokens. The mistake that would stay silent: taking L for the transformer layer. */
#include <stdio.h>
#include <string.h>

#include "data/dump/import_doc.h"

typedef struct reader {
    lsa_import_doc *d;
    const lsa_pickle_tensor *entry;
    int64_t n;
    const lsa_shards_info *model;
    lsa_err *err;
} reader;

/* The L of prefixL. */
static bool numbered(int64_t *out, const char *name, const char *prefix) {
    const size_t n = strlen(prefix);
    if (strncmp(name, prefix, n) || !name[n] || strlen(name + n) > 9) return false;
    *out = 0;
    for (const char *s = name + n; *s; s++) {
        if (*s < '0' || *s > '9') return false;
        *out = *out * 10 + (*s - '0');
    }
    return true;
}

/* A tensor by name, of this type and shape (-1: any size). */
static lsa_status need(lsa_st_tensor *out, const reader *r, const char *name, lsa_dtype t, int32_t n_dim,
                       int64_t rows, int64_t cols) {
    lsa_err *err = r->err;
    const lsa_pickle_tensor *x = NULL;
    for (int64_t i = 0; i < r->n && !x; i++)
        if (!strcmp(r->entry[i].name, name)) x = &r->entry[i];
    if (!x) LSA_RET_FAIL(LSA_E_FORMAT, "%s: '%s' is missing", r->d->where, name);
    if (x->dtype != t || x->n_dim != n_dim)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: '%s' is %s with %d dimensions, expected %s with %d", r->d->where,
                     name, lsa_dtype_name(x->dtype), x->n_dim, lsa_dtype_name(t), n_dim);
    if (n_dim == 2 && x->shape[1] != cols)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: '%s' is %lld wide, expected %lld", r->d->where, name,
                     (long long)x->shape[1], (long long)cols);
    if (rows >= 0 && x->shape[0] != rows)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: '%s' has %lld rows, expected %lld", r->d->where, name,
                     (long long)x->shape[0], (long long)rows);
    const size_t width = lsa_dtype_bytes(t);
    *out = (lsa_st_tensor){.name = x->name,
                           .dtype = t,
                           .n_dim = n_dim,
                           .n_elem = x->n_elem,
                           .n_bytes = (size_t)x->n_elem * width,
                           .data = x->data + (size_t)x->offset * width};
    memcpy(out->shape, x->shape, sizeof out->shape);
    return LSA_OK;
}

static lsa_status read_positions(const reader *r, int64_t layer) {
    lsa_status st = LSA_OK;
    lsa_import_doc *d = r->d;
    lsa_err *err = r->err;
    lsa_st_tensor t;
    char name[48];
    snprintf(name, sizeof name, "positions_layer_%lld", (long long)layer);
    LSA_TRY(need(&t, r, name, LSA_I64, 1, d->n_row, 1));
    for (int64_t i = 0; i < d->n_row; i++) {
        int64_t p;
        memcpy(&p, (const unsigned char *)t.data + 8 * i, 8);
        if (i == 0 && d->first < 0) d->first = p;
        if (d->first < 0 || d->first > INT64_C(1) << 40 || p != d->first + i)
            LSA_FAIL(
                LSA_E_FORMAT,
                "%s: '%s' row %lld is %lld, expected %lld: positions must be consecutive and the same in every "
                "layer",
                d->where, name, (long long)i, (long long)p, (long long)(d->first < 0 ? 0 : d->first + i));
    }
done:
    return st;
}

static lsa_status read_layer(const reader *r, int64_t layer) {
    lsa_status st = LSA_OK;
    lsa_import_doc *d = r->d;
    lsa_err *err = r->err;
    lsa_st_tensor h, k;
    char name[48];
    if (layer >= r->model->n_csa) {
        int32_t ord = -1;
        for (int32_t o = 0; o < r->model->n_csa; o++)
            if (r->model->csa_id[o].v == layer) ord = o;
        LSA_FAIL(LSA_E_FORMAT, "%s: 'hidden_layer_%lld': the model has CSA layers 0 to %d%s", d->where,
                 (long long)layer, r->model->n_csa - 1,
                 ord >= 0 ? "; names hold the ordinal, not the transformer layer" : "");
    }
    snprintf(name, sizeof name, "hidden_layer_%lld", (long long)layer);
    LSA_TRY(need(&h, r, name, LSA_BF16, 2, d->n_row, r->model->hidden));
    d->n_row = h.shape[0];
    snprintf(name, sizeof name, "compk_layer_%lld", (long long)layer);
    LSA_TRY(need(&k, r, name, LSA_U8, 2, -1, LSA_KEY_BYTES));
    LSA_TRY(read_positions(r, layer));
    d->layer[layer] = (lsa_import_layer){h.data, LSA_BF16, r->model->hidden, k.data, k.shape[0]};
done:
    return st;
}

/* "<folder>/<file>", without .pkl. */
static void set_name(lsa_import_doc *d, const char *path) {
    const char *s = path + strlen(path);
    for (int slashes = 0; s > path; s--)
        if (s[-1] == '/' && ++slashes == 2) break;
    const size_t n = strlen(s), cut = n > 4 && !strcmp(s + n - 4, ".pkl") ? n - 4 : n;
    const size_t skip = cut < sizeof d->name ? 0 : cut - sizeof d->name + 1; /* the end tells them apart */
    snprintf(d->name, sizeof d->name, "%.*s", (int)(cut - skip), s + skip);
}

lsa_status lsa_import_pickle(lsa_import_doc *d, const char *path, const lsa_shards_info *model,
                             lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t n = 0, layer;
    bool any = false;
    *d = (lsa_import_doc){.first = -1, .n_row = -1, .kind = "attn_norm"};
    snprintf(d->where, sizeof d->where, "%s", path);
    set_name(d, path);
    LSA_TRY(lsa_map_open(&d->map, path, err));
    LSA_TRY(lsa_pickle_plain(&d->entry, &n, d->map.data, d->map.n_bytes, d->where, err));
    const reader r = {d, d->entry, n, model, err};
    for (int64_t i = 0; i < n; i++) {
        if (!numbered(&layer, d->entry[i].name, "hidden_layer_")) continue;
        LSA_TRY(read_layer(&r, layer));
        any = true;
    }
    if (!any) LSA_FAIL(LSA_E_FORMAT, "%s: no 'hidden_layer_{L}': not a document of the dump", d->where);
    if (d->n_row < 1) LSA_FAIL(LSA_E_FORMAT, "%s: the document has no recorded token", d->where);
    LSA_TRY(need(&d->begin, &r, "label_pointers", LSA_I32, 1, d->n_row + 1, 1));
    LSA_TRY(need(&d->chunk, &r, "label_indices", LSA_I32, 1, -1, 1));
    LSA_TRY(need(&d->votes, &r, "label_scores", LSA_I32, 1, d->chunk.n_elem, 1));
done:
    return st;
}
