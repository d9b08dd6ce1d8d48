/* Sealing a shard: documents are laid end to end, column by column. The mistake that would stay silent: a
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

typedef struct joiner {
    lsa_h5_writer *h;
    const lsa_doc_stats *d;
    int64_t n;
    lsa_err *err;
} joiner;

/* Writes `name` as the concatenation of part(d) over the documents. */
typedef const void *(*part_fn)(const lsa_doc_stats *d, int32_t ord, int64_t *rows);

static lsa_status join(const joiner *j, const char *name, lsa_h5_type t, int64_t cols, part_fn part,
                       int32_t ord) {
    lsa_status st = LSA_OK;
    char *buf = NULL;
    int64_t total = 0, rows, width = lsa_h5_type_bytes(t) * (cols ? cols : 1);
    for (int64_t i = 0; i < j->n; i++) {
        part(&j->d[i], ord, &rows);
        total += rows;
    }
    LSA_TRY(lsa_alloc_((void **)&buf, total * width, 1, name, j->err));
    char *at = buf;
    for (int64_t i = 0; i < j->n; i++) {
        const void *p = part(&j->d[i], ord, &rows);
        if (rows) memcpy(at, p, (size_t)(rows * width));
        at += rows * width;
    }
    LSA_TRY(lsa_h5_write(j->h, name, t, total, cols, buf ? buf : "", j->err));
done:
    lsa_free(buf);
    return st;
}

typedef const lsa_csr *(*csr_fn)(const lsa_doc_stats *d, int32_t ord);

/* begin arrays of the documents' CSRs, shifted to the shard. */
static lsa_status join_begin(const joiner *j, const char *name, csr_fn get, int32_t ord) {
    lsa_status st = LSA_OK;
    int64_t *b = NULL, rows = 0, at = 0, base = 0;
    for (int64_t i = 0; i < j->n; i++) rows += get(&j->d[i], ord)->n_row;
    LSA_TRY(lsa_alloc_((void **)&b, rows + 1, sizeof *b, name, j->err));
    for (int64_t i = 0; i < j->n; i++) {
        const lsa_csr *c = get(&j->d[i], ord);
        for (int64_t r = 0; r < c->n_row; r++) b[at++] = base + c->begin[r];
        base += c->n_entry;
    }
    b[at] = base;
    LSA_TRY(lsa_h5_write(j->h, name, LSA_H5_I64, rows + 1, 0, b, j->err));
done:
    lsa_free(b);
    return st;
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

static lsa_status write_docs(const joiner *j, const lsa_shards_info *info) {
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
    LSA_TRY(join(j, "/docs/name", LSA_H5_STR, 0, part_name, 0));
    LSA_TRY(join(j, "/docs/n_tokens", LSA_H5_I64, 0, part_n_token, 0));
    LSA_TRY(join(j, "/docs/token_xxh64", LSA_H5_U64, 0, part_hash, 0));
    LSA_TRY(lsa_h5_write(j->h, "/docs/key_begin", LSA_H5_I64, j->n + 1, 0, key_begin, err));
    LSA_TRY(lsa_h5_write(j->h, "/docs/row_begin", LSA_H5_I64, j->n + 1, 0, row_begin, err));
    LSA_TRY(lsa_h5_write(j->h, "/rows/position", LSA_H5_I64, n_row, 0, position, err));
    LSA_TRY(lsa_h5_write(j->h, "/rows/visible", LSA_H5_I32, n_row, 0, visible, err));
    LSA_TRY(lsa_h5_write(j->h, "/hidden/row", LSA_H5_I64, n_hidden, 0,
                         hidden_row ? (const void *)hidden_row : "", err));
done:
    lsa_free(key_begin);
    lsa_free(row_begin);
    lsa_free(position);
    lsa_free(visible);
    lsa_free(hidden_row);
    return st;
}

/* Probes of the shard's first document that has any. */
static lsa_status write_probe(const joiner *j, const lsa_shards_info *info) {
    lsa_status st = LSA_OK;
    char name[64];
    int64_t base = 0;
    for (int64_t i = 0; i < j->n; base += n_rows(&j->d[i++])) {
        const lsa_doc_stats *d = &j->d[i];
        if (d->n_probe == 0) continue;
        int64_t row[LSA_MAX_PROBE];
        for (int64_t p = 0; p < d->n_probe; p++) row[p] = base + d->probe_row[p];
        LSA_TRY(lsa_h5_write(j->h, "/probe/row", LSA_H5_I64, d->n_probe, 0, row, j->err));
        for (int32_t o = 0; o < info->n_csa; o++) {
            if (!info->has_keys[o]) continue;
            snprintf(name, sizeof name, "/probe/c%d/q", o);
            LSA_TRY(lsa_h5_write(j->h, name, LSA_H5_F32, d->n_probe, d->probe_heads * 128, d->probe_iq[o],
                                 j->err));
            snprintf(name, sizeof name, "/probe/c%d/w", o);
            LSA_TRY(lsa_h5_write(j->h, name, LSA_H5_F32, d->n_probe, d->probe_heads, d->probe_iw[o], j->err));
            snprintf(name, sizeof name, "/probe/c%d/logit", o);
            LSA_TRY(lsa_h5_write(j->h, name, LSA_H5_F32, d->n_probe_logit, 0, d->probe_logit[o], j->err));
        }
        break;
    }
done:
    return st;
}

static lsa_status write_layers(const joiner *j, const lsa_shards_info *info) {
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
    LSA_TRY(join_begin(j, "/labels/begin", get_labels, 0));
    LSA_TRY(join(j, "/labels/chunk", LSA_H5_I32, 0, part_lab_chunk, 0));
    LSA_TRY(join(j, "/labels/votes", LSA_H5_U8, 0, part_lab_votes, 0));
    for (int32_t o = 0; o < info->n_csa; o++) {
        if (info->has_keys[o]) {
            SET("/keys/c%d", LSA_H5_U8, LSA_KEY_BYTES, part_key);
            snprintf(name, sizeof name, "/keys/c%d", o);
            LSA_TRY(lsa_h5_attr_str(j->h, name, "codec", "e4m3_f32", j->err));
            LSA_TRY(lsa_h5_attr_str(j->h, name, "rotation", "hadamard128", j->err));
            SET("/hidden/c%d", LSA_H5_U16, info->hidden, part_hidden);
            snprintf(name, sizeof name, "/hidden/c%d", o);
            LSA_TRY(lsa_h5_attr_str(j->h, name, "codec", "bf16", j->err));
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
            int64_t base = 0, rows = 0, at = 0, *row = NULL;
            for (int64_t i = 0; i < j->n; i++) rows += j->d[i].dense[o].n_row;
            LSA_TRY(LSA_NEW(row, rows, j->err));
            for (int64_t i = 0; i < j->n; base += n_rows(&j->d[i++]))
                for (int64_t r = 0; r < j->d[i].dense[o].n_row; r++)
                    row[at++] = base + j->d[i].dense[o].row[r];
            snprintf(name, sizeof name, "/dense/c%d/row", o);
            st = lsa_h5_write(j->h, name, LSA_H5_I64, rows, 0, row ? (const void *)row : "", j->err);
            lsa_free(row);
            LSA_TRY(st);
            BEGIN("/dense/c%d/begin", get_dense);
            SET("/dense/c%d/chunk", LSA_H5_I32, 0, part_de_chunk);
            SET("/dense/c%d/mass", LSA_H5_F16, 0, part_de_mass);
            SET("/dense/c%d/rest", LSA_H5_F16, 0, part_de_rest);
        }
    }
    LSA_TRY(write_probe(j, info));
done:
    return st;
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
    memset(out, 0, sizeof *out);
    LSA_TRY(lsa_path(path, err, "%s/%s", dir, file));
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    LSA_TRY(lsa_h5_create(&h, tmp, (1 + info->n_csa) * LSA_SHARD_HEAD_PER_LAYER, err));
    joiner j = {h, docs, n, err};
    st = write_docs(&j, info);
    if (st == LSA_OK) st = write_layers(&j, info);
    if (st == LSA_OK) st = write_attrs(h, info, err);
    lsa_status closed = lsa_h5_finish(h, err);
    LSA_TRY(st != LSA_OK ? st : closed);
    snprintf(out->file, sizeof out->file, "%s", file);
    out->documents = n;
    for (int64_t i = 0; i < n; i++) out->tokens += docs[i].n_token, out->rows += n_rows(&docs[i]);
    LSA_TRY(lsa_fsync_path(tmp, err));
    LSA_TRY(lsa_shard_check_hashes(&out->head_bytes, tmp, err));
    LSA_TRY(lsa_shard_hash_head(&out->head_xxh64, tmp, out->head_bytes, err));
    LSA_TRY(lsa_file_size(&out->bytes, tmp, err));
    LSA_TRY(lsa_xxh64_file(&out->xxh64, tmp, err));
    LSA_TRY(lsa_rename_durable(tmp, path, err));
done:
    if (st != LSA_OK) unlink(tmp);
    return st;
}
