/* Sealing a shard: documents are laid end to end, column by column; nothing of theirs is copied but to the
 * file. The mistake that would stay silent: a
 * begin array that is not shifted when documents are joined. */
#include "data/shard_write.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "data/h5.h"
#include "data/shard_internal.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"

void lsa_csr_fini(lsa_csr *c) {
    void *p[] = {c->begin, c->chunk, c->votes, c->logit, c->mass, c->row, c->rest};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    memset(c, 0, sizeof *c);
}

void lsa_doc_stats_fini(lsa_doc_stats *d) {
    for (int32_t o = 0; o < LSA_MAX_CSA; o++) {
        void *p[] = {d->key[o],      d->hidden[o],   d->local_mass[o], d->sink_mass[o],
                     d->probe_iq[o], d->probe_iw[o], d->probe_logit[o]};
        for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
        lsa_csr_fini(&d->stats[o]);
        lsa_csr_fini(&d->dense[o]);
    }
    lsa_csr_fini(&d->labels);
    lsa_free(d->probe_row);
    memset(d, 0, sizeof *d);
}

static int64_t n_rows(const lsa_doc_stats *d) {
    return d->n_token - d->first_position;
}

int64_t lsa_doc_stats_bytes(const lsa_doc_stats *d, const lsa_shards_info *info) {
    int64_t b = 128 + n_rows(d) * 12 + d->n_hidden * 8 + d->labels.n_row * 8 + d->labels.n_entry * 5;
    for (int32_t o = 0; o < info->n_csa; o++) {
        if (info->has_keys[o]) b += d->n_key * LSA_KEY_BYTES + d->n_hidden * info->hidden * 2;
        if (info->has_stats) b += n_rows(d) * 12 + d->stats[o].n_entry * 8;
        if (info->has_dense) b += d->dense[o].n_row * 18 + d->dense[o].n_entry * 6;
    }
    return b;
}

/* A dataset to be: where its bytes lie, end to end, and the attributes it gets beside its hash. */
typedef struct column {
    char name[64];
    lsa_h5_type type;
    int64_t rows, cols;
    lsa_piece *piece; /* [n_piece], owned */
    int64_t n_piece;
    void *made; /* owned: bytes that no document holds */
    uint64_t xxh64;
    const char *codec, *rotation; /* or NULL */
} column;

typedef struct joiner {
    const lsa_doc_stats *d;
    int64_t n;
    LSA_VEC(column) column; /* in the order of the file */
    lsa_err *err;
} joiner;

static lsa_status add(column **out, joiner *j, const char *name, lsa_h5_type t, int64_t cols,
                      int64_t n_piece) {
    lsa_status st = LSA_OK;
    LSA_TRY(LSA_VEC_RESERVE(j->column, j->column.len + 1, j->err));
    *out = &j->column.data[j->column.len];
    **out = (column){.type = t, .cols = cols, .n_piece = n_piece};
    snprintf((*out)->name, sizeof(*out)->name, "%s", name);
    LSA_TRY(LSA_NEW((*out)->piece, n_piece, j->err));
    j->column.len++;
done:
    return st;
}

static int64_t row_bytes(const column *c) {
    return lsa_h5_type_bytes(c->type) * (c->cols ? c->cols : 1);
}

/* `name` is the concatenation of part(d) over the documents. */
typedef const void *(*part_fn)(const lsa_doc_stats *d, int32_t ord, int64_t *rows);

static lsa_status join(joiner *j, const char *name, lsa_h5_type t, int64_t cols, part_fn part, int32_t ord) {
    column *c;
    const lsa_status st = add(&c, j, name, t, cols, j->n);
    for (int64_t i = 0; st == LSA_OK && i < j->n; i++) {
        int64_t rows;
        const void *const p = part(&j->d[i], ord, &rows);
        c->piece[i] = (lsa_piece){p, rows * row_bytes(c)};
        c->rows += rows;
    }
    return st;
}

/* An array of somebody's. */
static lsa_status put(joiner *j, const char *name, lsa_h5_type t, int64_t rows, int64_t cols,
                      const void *data) {
    column *c;
    const lsa_status st = add(&c, j, name, t, cols, 1);
    if (st != LSA_OK) return st;
    c->rows = rows;
    c->piece[0] = (lsa_piece){data, rows * row_bytes(c)};
    return LSA_OK;
}

/* The same, of the joiner's from now on. */
static lsa_status give(joiner *j, const char *name, lsa_h5_type t, int64_t rows, void *data) {
    const lsa_status st = put(j, name, t, rows, 0, data);
    if (st == LSA_OK)
        j->column.data[j->column.len - 1].made = data;
    else
        lsa_free(data);
    return st;
}

typedef const lsa_csr *(*csr_fn)(const lsa_doc_stats *d, int32_t ord);

/* begin arrays of the documents' CSRs, shifted to the shard. */
static lsa_status join_begin(joiner *j, const char *name, csr_fn get, int32_t ord) {
    int64_t *b = NULL, rows = 0, at = 0, base = 0;
    for (int64_t i = 0; i < j->n; i++) rows += get(&j->d[i], ord)->n_row;
    const lsa_status st = lsa_alloc_((void **)&b, rows + 1, sizeof *b, name, j->err);
    if (st != LSA_OK) return st;
    for (int64_t i = 0; i < j->n; i++) {
        const lsa_csr *c = get(&j->d[i], ord);
        for (int64_t r = 0; r < c->n_row; r++) b[at++] = base + c->begin[r];
        base += c->n_entry;
    }
    b[at] = base;
    return give(j, name, LSA_H5_I64, rows + 1, b);
}

#define PART(fn, expr, count)                                                                                \
    static const void *fn(const lsa_doc_stats *d, int32_t o, int64_t *rows) {                                \
        (void)o;                                                                                             \
        *rows = (count);                                                                                     \
        return (expr);                                                                                       \
    }
PART(part_name, d->name, 1)
PART(part_n_token, &d->n_token, 1)
PART(part_hash, &d->token_xxh64, 1)
PART(part_key, d->key[o], d->n_key)
PART(part_hidden, d->hidden[o], d->n_hidden)
PART(part_lab_chunk, d->labels.chunk, d->labels.n_entry)
PART(part_lab_votes, d->labels.votes, d->labels.n_entry)
PART(part_st_chunk, d->stats[o].chunk, d->stats[o].n_entry)
PART(part_st_logit, d->stats[o].logit, d->stats[o].n_entry)
PART(part_st_mass, d->stats[o].mass, d->stats[o].n_entry)
PART(part_local, d->local_mass[o], n_rows(d))
PART(part_sink, d->sink_mass[o], n_rows(d))
PART(part_de_chunk, d->dense[o].chunk, d->dense[o].n_entry)
PART(part_de_mass, d->dense[o].mass, d->dense[o].n_entry)
PART(part_de_rest, d->dense[o].rest, d->dense[o].n_row)

static const lsa_csr *get_labels(const lsa_doc_stats *d, int32_t o) {
    (void)o;
    return &d->labels;
}
static const lsa_csr *get_stats(const lsa_doc_stats *d, int32_t o) {
    return &d->stats[o];
}
static const lsa_csr *get_dense(const lsa_doc_stats *d, int32_t o) {
    return &d->dense[o];
}

static lsa_status list_docs(joiner *j, const lsa_shards_info *info) {
    lsa_status st = LSA_OK;
    int64_t *key_begin = NULL, *row_begin = NULL, *position = NULL, *hidden_row = NULL, n_row = 0,
            n_hidden = 0;
    int32_t *visible = NULL;
    lsa_err *err = j->err;
    LSA_TRY(LSA_NEW(key_begin, j->n + 1, err));
    LSA_TRY(LSA_NEW(row_begin, j->n + 1, err));
    for (int64_t i = 0; i < j->n; i++) {
        key_begin[i + 1] = key_begin[i] + j->d[i].n_key;
        row_begin[i + 1] = row_begin[i] + n_rows(&j->d[i]);
        n_hidden += j->d[i].n_hidden;
    }
    n_row = row_begin[j->n];
    LSA_TRY(LSA_NEW(position, n_row, err));
    LSA_TRY(LSA_NEW(visible, n_row, err));
    LSA_TRY(LSA_NEW(hidden_row, n_hidden, err));
    int64_t r = 0, h = 0;
    for (int64_t i = 0; i < j->n; i++)
        for (int64_t t = j->d[i].first_position; t < j->d[i].n_token; t++, r++) {
            position[r] = t;
            visible[r] = (int32_t)lsa_visible(t);
            if ((t + 1) % info->hidden_stride == 0) hidden_row[h++] = r;
        }
#define GIVE(name, type, rows, p)                                                                            \
    do {                                                                                                     \
        void *const given_ = (p);                                                                            \
        (p) = NULL;                                                                                          \
        LSA_TRY(give(j, name, type, rows, given_));                                                          \
    } while (0)
    LSA_TRY(join(j, "/docs/name", LSA_H5_STR, 0, part_name, 0));
    LSA_TRY(join(j, "/docs/n_tokens", LSA_H5_I64, 0, part_n_token, 0));
    LSA_TRY(join(j, "/docs/token_xxh64", LSA_H5_U64, 0, part_hash, 0));
    GIVE("/docs/key_begin", LSA_H5_I64, j->n + 1, key_begin);
    GIVE("/docs/row_begin", LSA_H5_I64, j->n + 1, row_begin);
    GIVE("/rows/position", LSA_H5_I64, n_row, position);
    GIVE("/rows/visible", LSA_H5_I32, n_row, visible);
    GIVE("/hidden/row", LSA_H5_I64, n_hidden, hidden_row);
done:
    lsa_free(key_begin);
    lsa_free(row_begin);
    lsa_free(position);
    lsa_free(visible);
    lsa_free(hidden_row);
    return st;
}

/* Probes of the shard's first document that has any. */
static lsa_status list_probe(joiner *j, const lsa_shards_info *info) {
    lsa_status st = LSA_OK;
    char name[64];
    int64_t base = 0;
    for (int64_t i = 0; i < j->n; base += n_rows(&j->d[i++])) {
        const lsa_doc_stats *d = &j->d[i];
        if (d->n_probe == 0) continue;
        int64_t *row = NULL;
        LSA_TRY(LSA_NEW(row, d->n_probe, j->err));
        for (int64_t p = 0; p < d->n_probe; p++) row[p] = base + d->probe_row[p];
        GIVE("/probe/row", LSA_H5_I64, d->n_probe, row);
        for (int32_t o = 0; o < info->n_csa; o++) {
            if (!info->has_keys[o]) continue;
            snprintf(name, sizeof name, "/probe/c%d/q", o);
            LSA_TRY(put(j, name, LSA_H5_F32, d->n_probe, d->probe_heads * 128, d->probe_iq[o]));
            snprintf(name, sizeof name, "/probe/c%d/w", o);
            LSA_TRY(put(j, name, LSA_H5_F32, d->n_probe, d->probe_heads, d->probe_iw[o]));
            snprintf(name, sizeof name, "/probe/c%d/logit", o);
            LSA_TRY(put(j, name, LSA_H5_F32, d->n_probe_logit, 0, d->probe_logit[o]));
        }
        break;
    }
done:
    return st;
}

static lsa_status list_dense_rows(joiner *j, const char *name, int32_t o) {
    int64_t base = 0, rows = 0, at = 0, *row = NULL;
    for (int64_t i = 0; i < j->n; i++) rows += j->d[i].dense[o].n_row;
    const lsa_status st = LSA_NEW(row, rows, j->err);
    if (st != LSA_OK) return st;
    for (int64_t i = 0; i < j->n; base += n_rows(&j->d[i++]))
        for (int64_t r = 0; r < j->d[i].dense[o].n_row; r++) row[at++] = base + j->d[i].dense[o].row[r];
    return give(j, name, LSA_H5_I64, rows, row);
}

static lsa_status list_layers(joiner *j, const lsa_shards_info *info) {
    lsa_status st = LSA_OK;
    char name[64];
#define SET(fmt, type, cols, part)                                                                           \
    do {                                                                                                     \
        snprintf(name, sizeof name, fmt, o);                                                                 \
        LSA_TRY(join(j, name, type, cols, part, o));                                                         \
    } while (0)
#define BEGIN(fmt, get)                                                                                      \
    do {                                                                                                     \
        snprintf(name, sizeof name, fmt, o);                                                                 \
        LSA_TRY(join_begin(j, name, get, o));                                                                \
    } while (0)
#define LAST (j->column.data[j->column.len - 1])
    LSA_TRY(join_begin(j, "/labels/begin", get_labels, 0));
    LSA_TRY(join(j, "/labels/chunk", LSA_H5_I32, 0, part_lab_chunk, 0));
    LSA_TRY(join(j, "/labels/votes", LSA_H5_U8, 0, part_lab_votes, 0));
    for (int32_t o = 0; o < info->n_csa; o++) {
        if (info->has_keys[o]) {
            SET("/keys/c%d", LSA_H5_U8, LSA_KEY_BYTES, part_key);
            LAST.codec = "e4m3_f32", LAST.rotation = "hadamard128";
            SET("/hidden/c%d", LSA_H5_U16, info->hidden, part_hidden);
            LAST.codec = "bf16";
        }
        if (info->has_stats) {
            BEGIN("/stats/c%d/begin", get_stats);
            SET("/stats/c%d/chunk", LSA_H5_I32, 0, part_st_chunk);
            SET("/stats/c%d/logit", LSA_H5_F16, 0, part_st_logit);
            SET("/stats/c%d/native_mass", LSA_H5_F16, 0, part_st_mass);
            SET("/stats/c%d/local_mass", LSA_H5_F16, 0, part_local);
            SET("/stats/c%d/sink_mass", LSA_H5_F16, 0, part_sink);
        }
        if (info->has_dense) {
            snprintf(name, sizeof name, "/dense/c%d/row", o);
            LSA_TRY(list_dense_rows(j, name, o));
            BEGIN("/dense/c%d/begin", get_dense);
            SET("/dense/c%d/chunk", LSA_H5_I32, 0, part_de_chunk);
            SET("/dense/c%d/mass", LSA_H5_F16, 0, part_de_mass);
            SET("/dense/c%d/rest", LSA_H5_F16, 0, part_de_rest);
        }
    }
    LSA_TRY(list_probe(j, info));
done:
    return st;
}

/* Hashed by several threads, written by one: a file is written fastest from its beginning to its end. */
static lsa_status write_columns(lsa_h5_writer *h, joiner *j) {
    lsa_status st = LSA_OK;
    const int threads = lsa_shard_threads();
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < j->column.len; i++) {
        column *const c = &j->column.data[i];
        c->xxh64 = lsa_xxh64_pieces(c->piece, c->n_piece);
    }
    for (int64_t i = 0; i < j->column.len; i++) {
        const column *const c = &j->column.data[i];
        LSA_TRY(lsa_h5_write(h, c->name, c->type, c->rows, c->cols, c->piece, c->n_piece, c->xxh64, j->err));
        if (c->codec) LSA_TRY(lsa_h5_attr_str(h, c->name, "codec", c->codec, j->err));
        if (c->rotation) LSA_TRY(lsa_h5_attr_str(h, c->name, "rotation", c->rotation, j->err));
    }
done:
    return st;
}

static void joiner_fini(joiner *j) {
    for (int64_t i = 0; i < j->column.len; i++) {
        lsa_free(j->column.data[i].piece);
        lsa_free(j->column.data[i].made);
    }
    lsa_free(j->column.data);
}

static lsa_status write_attrs(lsa_h5_writer *h, const lsa_shards_info *f, lsa_err *err) {
    lsa_status st = LSA_OK;
    char text[1024] = "", hash[17];
    size_t at = 0;
    LSA_TRY(lsa_h5_attr_str(h, "/", "format", "lsa-shard/1", err));
    LSA_TRY(lsa_h5_attr_str(h, "/", "version", "1", err));
    LSA_TRY(lsa_h5_attr_str(h, "/", "teacher", f->teacher, err));
    lsa_hex64(hash, f->teacher_hash);
    LSA_TRY(lsa_h5_attr_str(h, "/", "teacher_hash", hash, err));
    for (int32_t o = 0; o < f->n_csa && at < sizeof text - 32; o++)
        at += (size_t)snprintf(text + at, sizeof text - at, "%sc%d:%d:%d", o ? " " : "", o, f->csa_id[o].v,
                               LSA_CHUNK);
    LSA_TRY(lsa_h5_attr_str(h, "/", "layer_map", text, err));
    snprintf(text, sizeof text, "%d", f->hidden);
    LSA_TRY(lsa_h5_attr_str(h, "/", "hidden_size", text, err));
    snprintf(text, sizeof text, "%d", f->hidden_stride);
    LSA_TRY(lsa_h5_attr_str(h, "/", "hidden_stride", text, err));
    snprintf(text, sizeof text,
             "dim=%d base=%.17g factor=%.17g original_len=%lld beta_fast=%.17g beta_slow=%.17g", f->rope.dim,
             f->rope.base, f->rope.factor, (long long)f->rope.original_len, f->rope.beta_fast,
             f->rope.beta_slow);
    LSA_TRY(lsa_h5_attr_str(h, "/", "rope", text, err));
    at = (size_t)snprintf(text, sizeof text, "top_p=%.17g pool=%d", f->label_top_p, f->label_pool);
    if (f->label_min_votes > 1) snprintf(text + at, sizeof text - at, " min_votes=%d", f->label_min_votes);
    LSA_TRY(lsa_h5_attr_str(h, "/", "label_rule", text, err));
done:
    return st;
}

lsa_status lsa_shard_seal(lsa_manifest_shard *out, const char *dir, const char *file,
                          const lsa_shards_info *info, const lsa_doc_stats *docs, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX], tmp[LSA_PATH_MAX + 8];
    lsa_h5_writer *h = NULL;
    joiner j = {.d = docs, .n = n, .err = err};
    memset(out, 0, sizeof *out);
    *tmp = 0;
    LSA_TRY(lsa_path(path, err, "%s/%s", dir, file));
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    LSA_TRY(list_docs(&j, info));
    LSA_TRY(list_layers(&j, info));
    LSA_TRY(lsa_h5_create(&h, tmp, (1 + info->n_csa) * LSA_SHARD_HEAD_PER_LAYER, err));
    st = write_columns(h, &j);
    if (st == LSA_OK) st = write_attrs(h, info, err);
    lsa_status closed = lsa_h5_finish(h, err);
    LSA_TRY(st != LSA_OK ? st : closed);
    snprintf(out->file, sizeof out->file, "%s", file);
    out->documents = n;
    for (int64_t i = 0; i < n; i++) out->tokens += docs[i].n_token, out->rows += n_rows(&docs[i]);
    LSA_TRY(lsa_fsync_path(tmp, err));
    LSA_TRY(lsa_shard_check_hashes(&out->head_bytes, &out->xxh64, tmp, err));
    LSA_TRY(lsa_shard_hash_head(&out->head_xxh64, tmp, out->head_bytes, err));
    LSA_TRY(lsa_file_size(&out->bytes, tmp, err));
    LSA_TRY(lsa_rename_durable(tmp, path, err));
done:
    if (st != LSA_OK && *tmp) unlink(tmp);
    joiner_fini(&j);
    return st;
}
