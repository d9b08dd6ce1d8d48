/* A line of an lsa-import/1 file: JSON that says which document, tensors in safetensors beside it. Layout:
 * data/IMPORT_FORMAT.md. Names of tensors are those that engines use where they have one (hidden_states and
 * token_ids of vLLM, indexer_topk of SGLang).
 *
 * The mistake that would stay silent: columns of hidden_states taken for other layers than they are, so both
 * numbers of every layer must be given and agree with the model. */
#include <stdio.h>
#include <string.h>

#include "data/dump/import_doc.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"

#define MAX_COLUMNS 128

typedef struct line {
    lsa_import_doc *d;
    const json_t *o;
    const lsa_shards_info *model;
    int n_file;
    int32_t column[MAX_COLUMNS]; /* CSA ordinal of a column of hidden_states, -1: unused */
    int64_t n_column;
    lsa_err *err;
} line;

static lsa_status check_keys(const line *l) {
    static const char *const known[] = {"format", "name", "tensors", "first", "layers", "hidden", "source"};
    lsa_err *err = l->err;
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)l->o, key, v) {
        bool ok = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) ok = ok || !strcmp(key, known[i]);
        if (!ok) LSA_RET_FAIL(LSA_E_FORMAT, "%s: unknown key '%.60s'", l->d->where, key);
    }
    return LSA_OK;
}

static lsa_status read_name(const line *l) {
    lsa_status st = LSA_OK;
    lsa_err *err = l->err;
    const char *s;
    LSA_TRY(lsa_json_str(&s, l->o, "format", l->d->where, err));
    if (strcmp(s, "lsa-import/1"))
        LSA_FAIL(LSA_E_FORMAT, "%s: format is '%.40s', this program reads lsa-import/1", l->d->where, s);
    LSA_TRY(check_keys(l));
    LSA_TRY(lsa_json_str(&s, l->o, "name", l->d->where, err));
    if (!*s || strlen(s) >= sizeof l->d->name)
        LSA_FAIL(LSA_E_FORMAT, "%s: 'name' must have 1 to %zu bytes", l->d->where, sizeof l->d->name - 1);
    snprintf(l->d->name, sizeof l->d->name, "%s", s);
    LSA_TRY(lsa_json_i64_or(&l->d->first, 0, l->o, "first", l->d->where, err));
    if (l->d->first < 0 || l->d->first > INT64_C(1) << 40)
        LSA_FAIL(LSA_E_FORMAT, "%s: 'first' is %lld, must be the position of the first recorded token",
                 l->d->where, (long long)l->d->first);
done:
    return st;
}

static lsa_status open_file(line *l, const json_t *name, const char *dir) {
    lsa_status st = LSA_OK;
    lsa_err *err = l->err;
    char path[LSA_PATH_MAX];
    const char *s = json_string_value(name);
    if (!s || !*s || l->n_file == LSA_IMPORT_MAX_FILES)
        LSA_FAIL(LSA_E_FORMAT, "%s: 'tensors' must name 1 to %d safetensors files", l->d->where,
                 LSA_IMPORT_MAX_FILES);
    if (*s == '/')
        LSA_TRY(lsa_path(path, err, "%s", s));
    else
        LSA_TRY(lsa_path(path, err, "%s/%s", dir, s));
    LSA_TRY(lsa_st_open(&l->d->file[l->n_file], path, err));
    l->n_file++;
done:
    if (st != LSA_OK) lsa_err_wrap(err, "%s", l->d->where);
    return st;
}

static lsa_status open_files(line *l, const char *dir) {
    lsa_status st = LSA_OK;
    const json_t *t = json_object_get(l->o, "tensors");
    if (!json_is_array(t) || json_array_size(t) == 0) return open_file(l, t, dir);
    for (size_t i = 0; st == LSA_OK && i < json_array_size(t); i++)
        st = open_file(l, json_array_get(t, i), dir);
    return st;
}

static lsa_status read_layers(line *l) {
    lsa_status st = LSA_OK;
    lsa_err *err = l->err;
    const char *where = l->d->where;
    static const char *const kinds[] = {"attn_norm", "layer_output", "final"};
    const char *kind;
    json_t *a;
    if (!json_object_get(l->o, "layers")) return LSA_OK;
    LSA_TRY(lsa_json_array(&a, l->o, "layers", where, err));
    if (json_array_size(a) > MAX_COLUMNS)
        LSA_FAIL(LSA_E_FORMAT, "%s: 'layers' has more than %d entries", where, MAX_COLUMNS);
    l->n_column = (int64_t)json_array_size(a);
    for (int64_t i = 0; i < l->n_column; i++) {
        const json_t *o = json_array_get(a, (size_t)i);
        int64_t ord, id;
        l->column[i] = -1;
        if (json_is_null(o)) continue;
        LSA_TRY(lsa_json_i64(&ord, o, "ordinal", where, err));
        LSA_TRY(lsa_json_i64(&id, o, "id", where, err));
        if (ord < 0 || ord >= l->model->n_csa)
            LSA_FAIL(LSA_E_FORMAT, "%s: layers[%lld]: CSA ordinal %lld, the model has [0, %d)", where,
                     (long long)i, (long long)ord, l->model->n_csa);
        if (id != l->model->csa_id[ord].v)
            LSA_FAIL(LSA_E_FORMAT, "%s: layers[%lld]: CSA ordinal %lld is layer %d of the model, not %lld",
                     where, (long long)i, (long long)ord, l->model->csa_id[ord].v, (long long)id);
        for (int64_t k = 0; k < i; k++)
            if (l->column[k] == ord)
                LSA_FAIL(LSA_E_FORMAT, "%s: layers[%lld]: CSA ordinal %lld is there twice", where,
                         (long long)i, (long long)ord);
        l->column[i] = (int32_t)ord;
    }
    LSA_TRY(lsa_json_str(&kind, l->o, "hidden", where, err));
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kind, kinds[i])) l->d->kind = kinds[i];
    if (!l->d->kind)
        LSA_FAIL(LSA_E_FORMAT, "%s: 'hidden' is '%.40s', must be attn_norm, layer_output or final", where,
                 kind);
done:
    return st;
}

/* The one tensor of this name among the files, NULL if there is none. */
static lsa_status find(const lsa_st_tensor **out, const line *l, const char *name) {
    lsa_err *err = l->err;
    *out = NULL;
    for (int i = 0; i < l->n_file; i++) {
        const lsa_st_tensor *x = lsa_st_find(l->d->file[i], name);
        if (x && *out) LSA_RET_FAIL(LSA_E_FORMAT, "%s: '%s' is in two of its files", l->d->where, name);
        if (x) *out = x;
    }
    return LSA_OK;
}

/* Rows of a tensor against those of the document, which the first one sets. */
static lsa_status set_rows(const line *l, const char *name, int64_t rows) {
    lsa_err *err = l->err;
    if (l->d->n_row < 0) l->d->n_row = rows;
    if (rows < 1 || rows != l->d->n_row)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: '%s' covers %lld tokens, expected %lld", l->d->where, name,
                     (long long)rows, (long long)(l->d->n_row < 1 ? 1 : l->d->n_row));
    return LSA_OK;
}

static lsa_status need_integers(const line *l, const lsa_st_tensor *t, int32_t n_dim) {
    lsa_err *err = l->err;
    if ((t->dtype != LSA_I32 && t->dtype != LSA_I64 && t->dtype != LSA_U8) || t->n_dim != n_dim)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: '%s' is %s with %d dimensions, expected I32, I64 or U8 with %d",
                     l->d->where, t->name, lsa_dtype_name(t->dtype), t->n_dim, n_dim);
    return LSA_OK;
}

static lsa_status read_votes(const line *l) {
    static const char *const name[] = {"label_begin", "label_chunk", "label_votes"};
    lsa_status st = LSA_OK;
    lsa_err *err = l->err;
    lsa_import_doc *d = l->d;
    const lsa_st_tensor *t[3];
    for (int i = 0; i < 3; i++) {
        LSA_TRY(find(&t[i], l, name[i]));
        if (!t[i])
            LSA_FAIL(
                LSA_E_FORMAT,
                "%s: neither 'indexer_topk' nor '%s': without what the model selected there are no labels",
                d->where, name[i]);
        LSA_TRY(need_integers(l, t[i], 1));
    }
    LSA_TRY(set_rows(l, name[0], t[0]->n_elem - 1));
    if (t[1]->n_elem != t[2]->n_elem)
        LSA_FAIL(LSA_E_FORMAT, "%s: '%s' has %lld entries, '%s' %lld", d->where, name[1],
                 (long long)t[1]->n_elem, name[2], (long long)t[2]->n_elem);
    d->begin = *t[0], d->chunk = *t[1], d->votes = *t[2];
done:
    return st;
}

static lsa_status read_labels(const line *l) {
    lsa_status st = LSA_OK;
    lsa_err *err = l->err;
    lsa_import_doc *d = l->d;
    const lsa_st_tensor *t;
    LSA_TRY(find(&t, l, "indexer_topk"));
    if (!t) return read_votes(l);
    LSA_TRY(need_integers(l, t, 3));
    if (t->shape[1] != l->model->n_csa || t->shape[2] < 1 || t->shape[2] > 1 << 20)
        LSA_FAIL(LSA_E_FORMAT,
                 "%s: 'indexer_topk' is [%lld, %lld, %lld], expected [tokens, %d, k]: one row per CSA "
                 "layer of the model",
                 d->where, (long long)t->shape[0], (long long)t->shape[1], (long long)t->shape[2],
                 l->model->n_csa);
    LSA_TRY(set_rows(l, "indexer_topk", t->shape[0]));
    d->topk = *t;
    d->top_k = t->shape[2];
done:
    return st;
}

static lsa_status read_hidden(const line *l) {
    lsa_status st = LSA_OK;
    lsa_err *err = l->err;
    const lsa_st_tensor *t;
    LSA_TRY(find(&t, l, "hidden_states"));
    if (!t && l->n_column == 0) return LSA_OK;
    if (!t || l->n_column == 0)
        LSA_FAIL(LSA_E_FORMAT, "%s: 'layers' and the tensor 'hidden_states' belong together, one is missing",
                 l->d->where);
    if ((t->dtype != LSA_BF16 && t->dtype != LSA_F16 && t->dtype != LSA_F32) || t->n_dim != 3 ||
        t->shape[1] != l->n_column || t->shape[2] != l->model->hidden)
        LSA_FAIL(
            LSA_E_FORMAT,
            "%s: 'hidden_states' is %s [%lld, %lld, %lld], expected BF16, F16 or F32 [tokens, %lld, %d]: "
            "columns as in 'layers', width of the model",
            l->d->where, lsa_dtype_name(t->dtype), (long long)t->shape[0],
            (long long)(t->n_dim > 1 ? t->shape[1] : 0), (long long)(t->n_dim > 2 ? t->shape[2] : 0),
            (long long)l->n_column, l->model->hidden);
    LSA_TRY(set_rows(l, "hidden_states", t->shape[0]));
    const int64_t width = (int64_t)lsa_dtype_bytes(t->dtype);
    for (int64_t i = 0; i < l->n_column; i++) {
        if (l->column[i] < 0) continue;
        lsa_import_layer *x = &l->d->layer[l->column[i]];
        x->hidden = (const unsigned char *)t->data + i * l->model->hidden * width;
        x->dtype = t->dtype;
        x->step = l->n_column * l->model->hidden;
    }
done:
    return st;
}

static lsa_status read_index_keys(const line *l) {
    lsa_status st = LSA_OK;
    lsa_err *err = l->err;
    char name[32];
    for (int32_t o = 0; o < l->model->n_csa; o++) {
        const lsa_st_tensor *t;
        snprintf(name, sizeof name, "index_keys.%d", o);
        LSA_TRY(find(&t, l, name));
        if (!t) continue;
        if (t->dtype != LSA_U8 || t->n_dim != 2 || t->shape[1] != LSA_KEY_BYTES)
            LSA_FAIL(LSA_E_FORMAT, "%s: '%s' must be U8 [chunks, %d]", l->d->where, name, LSA_KEY_BYTES);
        l->d->layer[o].key = t->data;
        l->d->layer[o].n_key = t->shape[0];
    }
done:
    return st;
}

/* Ids of all tokens, if there; two recordings of one document must agree. */
static lsa_status read_tokens(const line *l) {
    lsa_status st = LSA_OK;
    lsa_err *err = l->err;
    const int64_t n = l->d->first + l->d->n_row;
    int32_t *id = NULL;
    for (int i = 0; i < l->n_file; i++) {
        const lsa_st_tensor *t = lsa_st_find(l->d->file[i], "token_ids");
        if (!t) continue;
        LSA_TRY(need_integers(l, t, 1));
        if (t->n_elem != n)
            LSA_FAIL(LSA_E_FORMAT,
                     "%s: 'token_ids' has %lld entries, expected %lld, all tokens of the document",
                     l->d->where, (long long)t->n_elem, (long long)n);
        lsa_free(id);
        id = NULL;
        LSA_TRY(LSA_NEW(id, n, err));
        for (int64_t k = 0; k < n; k++) {
            int64_t v = 0; /* little-endian; ids are not negative */
            memcpy(&v, (const unsigned char *)t->data + (size_t)k * lsa_dtype_bytes(t->dtype),
                   lsa_dtype_bytes(t->dtype));
            if (v < 0 || v > INT32_MAX)
                LSA_FAIL(LSA_E_FORMAT, "%s: 'token_ids' entry %lld is not an id", l->d->where, (long long)k);
            id[k] = (int32_t)v;
        }
        const uint64_t h = lsa_xxh64(id, (size_t)n * sizeof *id);
        if (l->d->token_xxh64 && l->d->token_xxh64 != h)
            LSA_FAIL(LSA_E_FORMAT,
                     "%s: its files hold different 'token_ids': recordings of different documents",
                     l->d->where);
        l->d->token_xxh64 = h;
    }
done:
    lsa_free(id);
    return st;
}

lsa_status lsa_import_line(lsa_import_doc *d, const json_t *o, const char *dir, const char *where,
                           const lsa_shards_info *model, lsa_err *err) {
    lsa_status st = LSA_OK;
    line l = {.d = d, .o = o, .model = model, .err = err};
    *d = (lsa_import_doc){.n_row = -1};
    snprintf(d->where, sizeof d->where, "%s", where);
    LSA_TRY(read_name(&l));
    LSA_TRY(read_layers(&l));
    LSA_TRY(open_files(&l, dir));
    LSA_TRY(read_labels(&l));
    LSA_TRY(read_hidden(&l));
    LSA_TRY(read_index_keys(&l));
    LSA_TRY(read_tokens(&l));
done:
    return st;
}
