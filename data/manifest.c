/* manifest.json: see manifest.h. It names sealed shards only; a shard that is not named does not exist for
 * readers. */
#include "data/manifest.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/num.h"

lsa_status lsa_manifest_add(lsa_manifest *m, const lsa_manifest_shard *s, lsa_err *err) {
    lsa_shards_info *f = &m->info;
    int64_t doc, row, token;
    lsa_status st = LSA_VEC_RESERVE(m->shard, m->shard.len + 1, err);
    if (st != LSA_OK) return st;
    if (!lsa_add_i64(f->n_doc, s->documents, &doc) || !lsa_add_i64(f->n_row, s->rows, &row) ||
        !lsa_add_i64(f->n_token, s->tokens, &token))
        LSA_RET_FAIL(LSA_E_FORMAT, "shard '%s': the manifest's counts overflow", s->file);
    m->shard.data[m->shard.len++] = *s;
    f->n_shard++;
    f->n_doc = doc;
    f->n_row = row;
    f->n_token = token;
    return LSA_OK;
}

void lsa_manifest_fini(lsa_manifest *m) {
    lsa_free(m->shard.data);
    json_decref(m->run);
    memset(m, 0, sizeof *m);
}

static json_t *hex(uint64_t h) {
    char s[17];
    lsa_hex64(s, h);
    return json_string(s);
}

lsa_status lsa_manifest_save(const lsa_manifest *m, const char *dir, lsa_err *err) {
    const lsa_shards_info *f = &m->info;
    char path[LSA_PATH_MAX];
    lsa_status st = lsa_path(path, err, "%s/manifest.json", dir);
    if (st != LSA_OK) return st;
    json_t *layers = json_array(), *shards = json_array(), *root = json_object();
    for (int32_t i = 0; i < f->n_csa; i++)
        json_array_append_new(layers, json_pack("{s:i, s:i, s:i, s:b}", "ordinal", i, "id", f->csa_id[i].v,
                                                "ratio", LSA_CHUNK, "keys", f->has_keys[i]));
    for (int64_t i = 0; i < m->shard.len; i++) {
        const lsa_manifest_shard *s = &m->shard.data[i];
        json_array_append_new(shards, json_pack("{s:s, s:I, s:I, s:I, s:I, s:o, s:I, s:o}", "file", s->file,
                                                "documents", (json_int_t)s->documents, "rows",
                                                (json_int_t)s->rows, "tokens", (json_int_t)s->tokens, "bytes",
                                                (json_int_t)s->bytes, "xxh64", hex(s->xxh64), "head_bytes",
                                                (json_int_t)s->head_bytes, "head_xxh64", hex(s->head_xxh64)));
    }
    json_object_set_new(root, "format", json_string("lsa-shard/1"));
    json_object_set_new(root, "complete", json_boolean(m->complete));
    json_object_set_new(root, "teacher",
                        json_pack("{s:s, s:o}", "name", f->teacher, "hash", hex(f->teacher_hash)));
    json_object_set_new(root, "hidden", json_integer(f->hidden));
    json_object_set_new(root, "hidden_stride", json_integer(f->hidden_stride));
    json_object_set_new(root, "has_stats", json_boolean(f->has_stats));
    json_object_set_new(root, "has_dense", json_boolean(f->has_dense));
    json_object_set_new(root, "layers", layers);
    json_object_set_new(root, "rope",
                        json_pack("{s:i, s:f, s:f, s:I, s:f, s:f}", "dim", f->rope.dim, "base", f->rope.base,
                                  "factor", f->rope.factor, "original_len", (json_int_t)f->rope.original_len,
                                  "beta_fast", f->rope.beta_fast, "beta_slow", f->rope.beta_slow));
    json_t *labels = json_pack("{s:f, s:i}", "top_p", f->label_top_p, "pool", f->label_pool);
    if (f->label_min_votes > 1) json_object_set_new(labels, "min_votes", json_integer(f->label_min_votes));
    json_object_set_new(root, "labels", labels);
    json_object_set(root, "run", m->run);
    json_object_set_new(root, "shards", shards);
    /* a value that could not be made (out of memory, text that is not UTF-8) must not become a missing key */
    if (json_object_size(root) != 12 || json_array_size(layers) != (size_t)f->n_csa ||
        json_array_size(shards) != (size_t)m->shard.len)
        st = lsa_err_set(err, LSA_E_ARG, __FILE__, __LINE__,
                         "cannot write '%s': names and paths must be UTF-8", path);
    else
        st = lsa_json_save(root, path, err);
    json_decref(root);
    return st;
}

static lsa_status get_hash(uint64_t *out, const json_t *o, const char *key, const char *where, lsa_err *err) {
    const char *s;
    lsa_status st = lsa_json_str(&s, o, key, where, err);
    return st == LSA_OK ? lsa_unhex64(out, s, err) : st;
}

static lsa_status get_i32(int32_t *out, int64_t lo, int64_t hi, const json_t *o, const char *key,
                          const char *where, lsa_err *err) {
    int64_t v;
    lsa_status st = lsa_json_i64_in(&v, lo, hi, o, key, where, err);
    *out = (int32_t)v;
    return st;
}

static lsa_status parse_layers(lsa_shards_info *f, const json_t *root, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *a;
    LSA_TRY(lsa_json_array(&a, root, "layers", where, err));
    if (json_array_size(a) < 1 || json_array_size(a) > LSA_MAX_CSA)
        LSA_FAIL(LSA_E_FORMAT, "%s: 'layers' must have 1 to %d entries, found %zu", where, LSA_MAX_CSA,
                 json_array_size(a));
    f->n_csa = (int32_t)json_array_size(a);
    for (int32_t i = 0; i < f->n_csa; i++) {
        const json_t *o = json_array_get(a, (size_t)i);
        int32_t ord, ratio;
        LSA_TRY(get_i32(&ord, i, i, o, "ordinal", where, err));
        LSA_TRY(get_i32(&f->csa_id[i].v, i ? f->csa_id[i - 1].v + 1 : 0, LSA_MAX_LAYERS - 1, o, "id", where,
                        err));
        LSA_TRY(get_i32(&ratio, LSA_CHUNK, LSA_CHUNK, o, "ratio", where, err));
        f->has_keys[i] = json_is_true(json_object_get(o, "keys"));
    }
done:
    return st;
}

static lsa_status parse_rope(lsa_rope *r, const json_t *root, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *o;
    LSA_TRY(lsa_json_object(&o, root, "rope", where, err));
    LSA_TRY(get_i32(&r->dim, 0, 128, o, "dim", where, err));
    LSA_TRY(lsa_json_f64(&r->base, o, "base", where, err));
    LSA_TRY(lsa_json_f64(&r->factor, o, "factor", where, err));
    LSA_TRY(lsa_json_i64_in(&r->original_len, 1, INT64_C(1) << 40, o, "original_len", where, err));
    LSA_TRY(lsa_json_f64(&r->beta_fast, o, "beta_fast", where, err));
    LSA_TRY(lsa_json_f64(&r->beta_slow, o, "beta_slow", where, err));
    if (!(r->base > 1) || !(r->factor >= 1) || r->dim % 2 || !(r->beta_fast > 0) || !(r->beta_slow > 0))
        LSA_FAIL(LSA_E_FORMAT, "%s: rope constants out of range", where);
done:
    return st;
}

static lsa_status parse_shards(lsa_manifest *m, const json_t *root, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *a;
    LSA_TRY(lsa_json_array(&a, root, "shards", where, err));
    for (size_t i = 0; i < json_array_size(a); i++) {
        const json_t *o = json_array_get(a, i);
        lsa_manifest_shard s = {0};
        const char *file;
        const int64_t big = INT64_C(1) << 50;
        LSA_TRY(lsa_json_str(&file, o, "file", where, err));
        if (!*file || strlen(file) >= sizeof s.file || strchr(file, '/') || file[0] == '.')
            LSA_FAIL(LSA_E_FORMAT, "%s: shard %zu: '%.80s' is not a plain file name", where, i, file);
        snprintf(s.file, sizeof s.file, "%s", file);
        for (int64_t k = 0; k < m->shard.len; k++)
            if (!strcmp(m->shard.data[k].file, s.file))
                LSA_FAIL(LSA_E_FORMAT, "%s: shard '%s' is listed twice", where, s.file);
        LSA_TRY(lsa_json_i64_in(&s.documents, 1, big, o, "documents", where, err));
        LSA_TRY(lsa_json_i64_in(&s.rows, 0, big, o, "rows", where, err));
        LSA_TRY(lsa_json_i64_in(&s.tokens, 1, big, o, "tokens", where, err));
        LSA_TRY(lsa_json_i64_in(&s.bytes, 1, big, o, "bytes", where, err));
        LSA_TRY(get_hash(&s.xxh64, o, "xxh64", where, err));
        LSA_TRY(lsa_json_i64_in(&s.head_bytes, 1, 1 << 26, o, "head_bytes", where, err));
        LSA_TRY(get_hash(&s.head_xxh64, o, "head_xxh64", where, err));
        LSA_TRY(lsa_manifest_add(m, &s, err));
    }
done:
    return st;
}

lsa_status lsa_manifest_parse(lsa_manifest *m, const char *text, size_t n, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *root = NULL, *t, *labels;
    const char *format, *name;
    lsa_shards_info *f = &m->info;
    memset(m, 0, sizeof *m);
    LSA_TRY(lsa_json_parse(&root, text, n, where, err));
    LSA_TRY(lsa_json_str(&format, root, "format", where, err));
    if (strcmp(format, "lsa-shard/1"))
        LSA_FAIL(LSA_E_FORMAT, "%s: format is '%.40s', this program reads lsa-shard/1", where, format);
    m->complete = json_is_true(json_object_get(root, "complete"));
    LSA_TRY(lsa_json_object(&t, root, "teacher", where, err));
    LSA_TRY(lsa_json_str(&name, t, "name", where, err));
    snprintf(f->teacher, sizeof f->teacher, "%.95s", name);
    LSA_TRY(get_hash(&f->teacher_hash, t, "hash", where, err));
    LSA_TRY(get_i32(&f->hidden, 1, 1 << 20, root, "hidden", where, err));
    LSA_TRY(get_i32(&f->hidden_stride, 1, 1 << 20, root, "hidden_stride", where, err));
    f->has_stats = json_is_true(json_object_get(root, "has_stats"));
    f->has_dense = json_is_true(json_object_get(root, "has_dense"));
    LSA_TRY(parse_layers(f, root, where, err));
    LSA_TRY(parse_rope(&f->rope, root, where, err));
    LSA_TRY(lsa_json_object(&labels, root, "labels", where, err));
    LSA_TRY(lsa_json_f64(&f->label_top_p, labels, "top_p", where, err));
    LSA_TRY(get_i32(&f->label_pool, 1, 1 << 30, labels, "pool", where, err));
    f->label_min_votes = 1;
    if (json_object_get(labels, "min_votes"))
        LSA_TRY(get_i32(&f->label_min_votes, 1, LSA_MAX_CSA, labels, "min_votes", where, err));
    LSA_TRY(parse_shards(m, root, where, err));
    m->run = json_incref(json_object_get(root, "run"));
done:
    json_decref(root);
    if (st != LSA_OK) lsa_manifest_fini(m);
    return st;
}

lsa_status lsa_manifest_load(lsa_manifest *m, const char *dir, lsa_err *err) {
    char path[LSA_PATH_MAX], *text = NULL;
    size_t n;
    memset(m, 0, sizeof *m);
    lsa_status st = lsa_path(path, err, "%s/manifest.json", dir);
    if (st == LSA_OK && !lsa_exists(path))
        LSA_RET_FAIL(LSA_E_IO, "'%s' is not a shard folder: it has no manifest.json", dir);
    if (st == LSA_OK) st = lsa_read_file(&text, &n, path, err);
    if (st == LSA_OK) st = lsa_manifest_parse(m, text, n, path, err);
    lsa_free(text);
    return st;
}
