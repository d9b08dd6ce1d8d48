/* Reading shards: the document table is loaded at open, everything else by pread at the datasets' offsets.
 *
 * Invariant: no number from a file is used as an index before it was checked against the arrays it indexes.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "data/manifest.h"
#include "data/shard_internal.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"

typedef struct csr_sets {
    lsa_h5_set begin, chunk, votes, logit, mass, row, rest;
} csr_sets;

typedef struct shard {
    char path[LSA_PATH_MAX];
    int fd;
    int64_t n_doc, n_hidden;
    int64_t *key_begin, *row_begin, *hidden_begin; /* [n_doc+1] */
    lsa_h5_set position, visible, hidden_row, key[LSA_MAX_CSA], hidden[LSA_MAX_CSA];
    lsa_h5_set local[LSA_MAX_CSA], sink[LSA_MAX_CSA];
    csr_sets labels, stats[LSA_MAX_CSA], dense[LSA_MAX_CSA];
} shard;

struct lsa_shards {
    lsa_manifest m;
    shard *shard;
    int64_t n_shard;
    lsa_shards_doc *doc; /* all documents */
    int64_t *local;      /* number of a document inside its shard */
    uint64_t hash;
};

static lsa_status read_set(void *dst, const shard *s, const lsa_h5_set *set, int64_t first, int64_t n,
                           const char *what, lsa_err *err) {
    const int64_t w = lsa_h5_type_bytes(set->type) * (set->cols ? set->cols : 1);
    if (first < 0 || n < 0 || first > set->rows || n > set->rows - first)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s': rows [%lld, +%lld) of '%s' lie outside its %lld rows", s->path,
                     (long long)first, (long long)n, what, (long long)set->rows);
    if (n == 0) return LSA_OK;
    return lsa_pread_all(s->fd, dst, (size_t)(n * w), set->offset + first * w, s->path, err);
}

/* A begin array of a document table: starts at 0, never falls, ends at `total` (or -1: any). */
static lsa_status check_begin(const int64_t *b, int64_t n, int64_t total, const char *path, const char *what,
                              lsa_err *err) {
    if (b[0] != 0)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s': '%s' starts at %lld, expected 0", path, what, (long long)b[0]);
    for (int64_t i = 0; i < n; i++)
        if (b[i + 1] < b[i])
            LSA_RET_FAIL(LSA_E_FORMAT, "'%s': '%s' falls at row %lld: %lld after %lld", path, what,
                         (long long)(i + 1), (long long)b[i + 1], (long long)b[i]);
    if (total >= 0 && b[n] != total)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s': '%s' ends at %lld, expected %lld", path, what, (long long)b[n],
                     (long long)total);
    return LSA_OK;
}

static lsa_status find_csr(csr_sets *c, lsa_h5_reader *h, const char *group, int64_t rows, bool labels,
                           bool dense, lsa_err *err) {
    lsa_status st = LSA_OK;
    char name[96];
#define FIND(field, type, n)                                                                                 \
    do {                                                                                                     \
        snprintf(name, sizeof name, "%s/" #field, group);                                                    \
        LSA_TRY(lsa_h5_find(&c->field, h, name, type, n, 0, err));                                           \
    } while (0)
    if (dense) {
        FIND(row, LSA_H5_I64, -1);
        rows = c->row.rows;
        FIND(rest, LSA_H5_F16, rows);
    }
    FIND(begin, LSA_H5_I64, rows + 1);
    FIND(chunk, LSA_H5_I32, -1);
    if (labels) {
        FIND(votes, LSA_H5_U8, c->chunk.rows);
        return LSA_OK;
    }
    if (dense) {
        FIND(mass, LSA_H5_F16, c->chunk.rows);
        return LSA_OK;
    }
    FIND(logit, LSA_H5_F16, c->chunk.rows);
    snprintf(name, sizeof name, "%s/native_mass", group);
    LSA_TRY(lsa_h5_find(&c->mass, h, name, LSA_H5_F16, c->chunk.rows, 0, err));
done:
    return st;
}

static lsa_status read_table(lsa_shards *s, shard *x, lsa_h5_reader *h, const lsa_manifest_shard *m,
                             int64_t shard_no, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_h5_set set;
    int64_t *n_token = NULL, *hidden_row = NULL, n_row;
    uint64_t *token_hash = NULL;
    char(*name)[96] = NULL;
    x->n_doc = m->documents;
    LSA_TRY(LSA_NEW(x->key_begin, x->n_doc + 1, err));
    LSA_TRY(LSA_NEW(x->row_begin, x->n_doc + 1, err));
    LSA_TRY(LSA_NEW(x->hidden_begin, x->n_doc + 1, err));
    LSA_TRY(LSA_NEW(n_token, x->n_doc, err));
    LSA_TRY(lsa_alloc_((void **)&name, x->n_doc, 96, "document names", err));
    LSA_TRY(lsa_h5_find(&set, h, "/docs/name", LSA_H5_STR, x->n_doc, 0, err));
    LSA_TRY(read_set(name, x, &set, 0, x->n_doc, "/docs/name", err));
    LSA_TRY(lsa_h5_find(&set, h, "/docs/n_tokens", LSA_H5_I64, x->n_doc, 0, err));
    LSA_TRY(read_set(n_token, x, &set, 0, x->n_doc, "/docs/n_tokens", err));
    LSA_TRY(LSA_NEW(token_hash, x->n_doc, err));
    LSA_TRY(lsa_h5_find(&set, h, "/docs/token_xxh64", LSA_H5_U64, x->n_doc, 0, err));
    LSA_TRY(read_set(token_hash, x, &set, 0, x->n_doc, "/docs/token_xxh64", err));
    LSA_TRY(lsa_h5_find(&set, h, "/docs/key_begin", LSA_H5_I64, x->n_doc + 1, 0, err));
    LSA_TRY(read_set(x->key_begin, x, &set, 0, x->n_doc + 1, "/docs/key_begin", err));
    LSA_TRY(check_begin(x->key_begin, x->n_doc, -1, x->path, "/docs/key_begin", err));
    LSA_TRY(lsa_h5_find(&set, h, "/docs/row_begin", LSA_H5_I64, x->n_doc + 1, 0, err));
    LSA_TRY(read_set(x->row_begin, x, &set, 0, x->n_doc + 1, "/docs/row_begin", err));
    LSA_TRY(check_begin(x->row_begin, x->n_doc, m->rows, x->path, "/docs/row_begin", err));
    n_row = x->row_begin[x->n_doc];
    LSA_TRY(lsa_h5_find(&x->position, h, "/rows/position", LSA_H5_I64, n_row, 0, err));
    LSA_TRY(lsa_h5_find(&x->visible, h, "/rows/visible", LSA_H5_I32, n_row, 0, err));
    LSA_TRY(lsa_h5_find(&x->hidden_row, h, "/hidden/row", LSA_H5_I64, -1, 0, err));
    x->n_hidden = x->hidden_row.rows;
    if (x->n_hidden > n_row)
        LSA_FAIL(LSA_E_FORMAT, "'%s': '/hidden/row' has %lld rows for %lld tokens", x->path,
                 (long long)x->n_hidden, (long long)n_row);
    LSA_TRY(LSA_NEW(hidden_row, x->n_hidden, err));
    LSA_TRY(read_set(hidden_row, x, &x->hidden_row, 0, x->n_hidden, "/hidden/row", err));
    int64_t h_at = 0;
    for (int64_t d = 0; d < x->n_doc; d++) {
        int64_t rows = x->row_begin[d + 1] - x->row_begin[d], keys = x->key_begin[d + 1] - x->key_begin[d],
                first = 0;
        if (n_token[d] < 1 || rows > n_token[d] || keys != n_token[d] / LSA_CHUNK)
            LSA_FAIL(
                LSA_E_FORMAT,
                "'%s': document %lld has %lld tokens, %lld rows and %lld keys, which do not fit together",
                x->path, (long long)d, (long long)n_token[d], (long long)rows, (long long)keys);
        if (rows) {
            LSA_TRY(read_set(&first, x, &x->position, x->row_begin[d], 1, "/rows/position", err));
            if (first < 0 || first > n_token[d] - rows)
                LSA_FAIL(LSA_E_FORMAT, "'%s': document %lld: first labelled position %lld does not fit",
                         x->path, (long long)d, (long long)first);
        }
        x->hidden_begin[d] = h_at;
        while (h_at < x->n_hidden && hidden_row[h_at] < x->row_begin[d + 1]) {
            if (hidden_row[h_at] < x->row_begin[d] ||
                (h_at > x->hidden_begin[d] && hidden_row[h_at] <= hidden_row[h_at - 1]))
                LSA_FAIL(LSA_E_FORMAT, "'%s': '/hidden/row' is not ascending at %lld", x->path,
                         (long long)h_at);
            h_at++;
        }
        int64_t i = s->m.info.n_doc++;
        lsa_shards_doc *o = &s->doc[i];
        snprintf(o->name, sizeof o->name, "%.95s", name[d]);
        o->n_token = n_token[d];
        o->n_key = keys;
        o->n_row = rows;
        o->first_position = first;
        o->n_hidden = h_at - x->hidden_begin[d];
        o->shard = (int32_t)shard_no;
        o->token_xxh64 = token_hash[d];
        s->local[i] = d;
    }
    x->hidden_begin[x->n_doc] = h_at;
    if (h_at != x->n_hidden) LSA_FAIL(LSA_E_FORMAT, "'%s': '/hidden/row' points outside the rows", x->path);
done:
    lsa_free(n_token);
    lsa_free(token_hash);
    lsa_free(hidden_row);
    lsa_free(name);
    return st;
}

/* Keys in another codec, or not rotated, would be read as numbers all the same. */
static lsa_status check_codec(lsa_h5_reader *h, const char *path, const char *name, lsa_err *err) {
    lsa_status st = LSA_OK;
    char codec[32], rotation[32];
    LSA_TRY(lsa_h5_get_set_str(codec, sizeof codec, h, name, "codec", err));
    LSA_TRY(lsa_h5_get_set_str(rotation, sizeof rotation, h, name, "rotation", err));
    if (strcmp(codec, "e4m3_f32") || strcmp(rotation, "hadamard128"))
        LSA_FAIL(
            LSA_E_UNSUPPORTED,
            "'%s': dataset '%s' holds keys in codec '%s', rotation '%s'; this version reads e4m3_f32 with "
            "hadamard128: dump again with it, or use the version that wrote the shard",
            path, name, codec, rotation);
done:
    return st;
}

static lsa_status open_shard(lsa_shards *s, int64_t i, lsa_err *err) {
    lsa_status st = LSA_OK;
    shard *x = &s->shard[i];
    const lsa_manifest_shard *m = &s->m.shard.data[i];
    const lsa_shards_info *f = &s->m.info;
    lsa_h5_reader *h = NULL;
    char name[64], text[96], hash[17];
    x->fd = open(x->path, O_RDONLY | O_CLOEXEC);
    if (x->fd < 0) LSA_FAIL(LSA_E_IO, "cannot open '%s'", x->path);
    LSA_TRY(lsa_shard_check_head(x->path, m, err));
    LSA_TRY(lsa_h5_open(&h, x->path, err));
    LSA_TRY(lsa_h5_get_str(text, sizeof text, h, "format", err));
    if (strcmp(text, "lsa-shard/1"))
        LSA_FAIL(LSA_E_FORMAT, "'%s': format is '%s', expected lsa-shard/1", x->path, text);
    LSA_TRY(lsa_h5_get_str(text, sizeof text, h, "teacher_hash", err));
    lsa_hex64(hash, f->teacher_hash);
    if (strcmp(text, hash))
        LSA_FAIL(LSA_E_FORMAT, "'%s' comes from another teacher (%s) than its manifest (%s)", x->path, text,
                 hash);
    LSA_TRY(read_table(s, x, h, m, i, err));
    const int64_t n_row = x->row_begin[x->n_doc], n_key = x->key_begin[x->n_doc];
    LSA_TRY(find_csr(&x->labels, h, "/labels", n_row, true, false, err));
    for (int32_t o = 0; o < f->n_csa; o++) {
        if (f->has_keys[o]) {
            snprintf(name, sizeof name, "/keys/c%d", o);
            LSA_TRY(check_codec(h, x->path, name, err));
            LSA_TRY(lsa_h5_find(&x->key[o], h, name, LSA_H5_U8, n_key, LSA_KEY_BYTES, err));
            snprintf(name, sizeof name, "/hidden/c%d", o);
            LSA_TRY(lsa_h5_find(&x->hidden[o], h, name, LSA_H5_U16, x->n_hidden, f->hidden, err));
        }
        if (f->has_stats) {
            snprintf(name, sizeof name, "/stats/c%d", o);
            LSA_TRY(find_csr(&x->stats[o], h, name, n_row, false, false, err));
            snprintf(name, sizeof name, "/stats/c%d/local_mass", o);
            LSA_TRY(lsa_h5_find(&x->local[o], h, name, LSA_H5_F16, n_row, 0, err));
            snprintf(name, sizeof name, "/stats/c%d/sink_mass", o);
            LSA_TRY(lsa_h5_find(&x->sink[o], h, name, LSA_H5_F16, n_row, 0, err));
        }
        if (f->has_dense) {
            snprintf(name, sizeof name, "/dense/c%d", o);
            LSA_TRY(find_csr(&x->dense[o], h, name, 0, false, true, err));
        }
    }
done:
    lsa_h5_close(h);
    return st;
}

/* Before anything is allocated by the manifest's counts: the files are there, of the stated size, and could
 * hold them. */
static lsa_status check_file(shard *x, const char *dir, const lsa_manifest_shard *m, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t bytes;
    x->fd = -1;
    LSA_TRY(lsa_path(x->path, err, "%s/%s", dir, m->file));
    if (!lsa_exists(x->path))
        LSA_FAIL(LSA_E_FORMAT, "shard '%s' is missing but the manifest lists it; restore it or dump again",
                 x->path);
    LSA_TRY(lsa_file_size(&bytes, x->path, err));
    if (bytes != m->bytes)
        LSA_FAIL(
            LSA_E_FORMAT,
            "shard '%s' has %lld bytes, the manifest says %lld; it was truncated or replaced: restore it or dump again",
            x->path, (long long)bytes, (long long)m->bytes);
    if (m->documents > bytes || m->rows > bytes)
        LSA_FAIL(
            LSA_E_FORMAT,
            "shard '%s': the manifest claims %lld documents and %lld rows, more than its %lld bytes hold",
            x->path, (long long)m->documents, (long long)m->rows, (long long)bytes);
done:
    return st;
}

lsa_status lsa_shards_open(lsa_shards **out, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_shards *s = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(s, 1, err));
    LSA_TRY(lsa_manifest_load(&s->m, dir, err));
    if (s->m.shard.len == 0)
        LSA_FAIL(LSA_E_FORMAT, "'%s' holds no sealed shard yet; run 'lsa-dump resume %s'", dir, dir);
    const int64_t n_doc = s->m.info.n_doc;
    LSA_TRY(LSA_NEW(s->shard, s->m.shard.len, err));
    for (int64_t i = 0; i < s->m.shard.len; i++) {
        LSA_TRY(check_file(&s->shard[i], dir, &s->m.shard.data[i], err));
        s->n_shard = i + 1;
        s->hash = lsa_xxh64((uint64_t[2]){s->hash, s->m.shard.data[i].xxh64}, 16);
    }
    LSA_TRY(LSA_NEW(s->doc, n_doc, err));
    LSA_TRY(LSA_NEW(s->local, n_doc, err));
    s->m.info.n_doc = 0;
    for (int64_t i = 0; i < s->n_shard; i++) LSA_TRY(open_shard(s, i, err));
    *out = s;
    s = NULL;
done:
    lsa_shards_close(s);
    return st;
}

void lsa_shards_close(lsa_shards *s) {
    if (!s) return;
    for (int64_t i = 0; i < s->n_shard; i++) {
        if (s->shard[i].fd >= 0) close(s->shard[i].fd);
        lsa_free(s->shard[i].key_begin);
        lsa_free(s->shard[i].row_begin);
        lsa_free(s->shard[i].hidden_begin);
    }
    lsa_free(s->shard);
    lsa_free(s->doc);
    lsa_free(s->local);
    lsa_manifest_fini(&s->m);
    lsa_free(s);
}

const lsa_shards_info *lsa_shards_get_info(const lsa_shards *s) {
    return &s->m.info;
}
lsa_shards_doc lsa_shards_get_doc(const lsa_shards *s, int64_t doc) {
    return s->doc[doc];
}
const char *lsa_shards_path(const lsa_shards *s, int32_t i) {
    return s->shard[i].path;
}
uint64_t lsa_shards_hash(const lsa_shards *s) {
    return s->hash;
}

static lsa_status need_layer(const lsa_shards *s, lsa_csa_ord ord, lsa_err *err) {
    if (ord.v < 0 || ord.v >= s->m.info.n_csa || !s->m.info.has_keys[ord.v])
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "the shards hold no keys and hidden vectors of CSA layer %d; dump it with --layers",
                     ord.v);
    return LSA_OK;
}

lsa_status lsa_shards_keys(uint8_t **out, const lsa_shards *s, int64_t doc, lsa_csa_ord ord, lsa_err *err) {
    lsa_status st = LSA_OK;
    const shard *x = &s->shard[s->doc[doc].shard];
    uint8_t *k = NULL;
    *out = NULL;
    LSA_TRY(need_layer(s, ord, err));
    LSA_TRY(lsa_alloc_((void **)&k, s->doc[doc].n_key * LSA_KEY_BYTES, 1, "keys", err));
    LSA_TRY(read_set(k, x, &x->key[ord.v], x->key_begin[s->local[doc]], s->doc[doc].n_key, "keys", err));
    *out = k;
    k = NULL;
done:
    lsa_free(k);
    return st;
}

lsa_status lsa_shards_hidden(int64_t **position, uint16_t **hidden, const lsa_shards *s, int64_t doc,
                             lsa_csa_ord ord, lsa_err *err) {
    lsa_status st = LSA_OK;
    const shard *x = &s->shard[s->doc[doc].shard];
    const int64_t d = s->local[doc], n = s->doc[doc].n_hidden, first = x->hidden_begin[d];
    int64_t *pos = NULL;
    uint16_t *v = NULL;
    *position = NULL;
    *hidden = NULL;
    LSA_TRY(need_layer(s, ord, err));
    LSA_TRY(LSA_NEW(pos, n, err));
    LSA_TRY(LSA_NEW(v, n * s->m.info.hidden, err));
    LSA_TRY(read_set(pos, x, &x->hidden_row, first, n, "/hidden/row", err));
    LSA_TRY(read_set(v, x, &x->hidden[ord.v], first, n, "hidden", err));
    for (int64_t i = 0; i < n; i++) pos[i] += s->doc[doc].first_position - x->row_begin[d];
    *position = pos;
    *hidden = v;
    pos = NULL;
    v = NULL;
done:
    lsa_free(pos);
    lsa_free(v);
    return st;
}

/* Rows [row, row+n) of a CSR, rebased, with chunk ids checked against the keys of the document. */
static lsa_status read_csr(lsa_csr *c, const shard *x, const csr_sets *set, int64_t row, int64_t n,
                           int64_t n_key, const char *what, lsa_err *err) {
    lsa_status st = LSA_OK;
    memset(c, 0, sizeof *c);
    LSA_TRY(LSA_NEW(c->begin, n + 1, err));
    LSA_TRY(read_set(c->begin, x, &set->begin, row, n + 1, what, err));
    const int64_t base = c->begin[0];
    for (int64_t i = 0; i <= n; i++)
        if (c->begin[i] < 0 || c->begin[i] > set->chunk.rows)
            LSA_FAIL(LSA_E_FORMAT,
                     "'%s': '%s/begin' row %lld is %lld, must be in [0, %lld]; run 'lsa-dump verify'",
                     x->path, what, (long long)(row + i), (long long)c->begin[i], (long long)set->chunk.rows);
    for (int64_t i = 0; i <= n; i++) c->begin[i] -= base;
    LSA_TRY(check_begin(c->begin, n, -1, x->path, what, err));
    c->n_row = n;
    c->n_entry = c->begin[n];
    LSA_TRY(LSA_NEW(c->chunk, c->n_entry, err));
    LSA_TRY(read_set(c->chunk, x, &set->chunk, base, c->n_entry, what, err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = c->begin[i]; j < c->begin[i + 1]; j++)
            if (c->chunk[j] < 0 || c->chunk[j] >= n_key ||
                (j > c->begin[i] && c->chunk[j] <= c->chunk[j - 1]))
                LSA_FAIL(
                    LSA_E_FORMAT,
                    "'%s': '%s' row %lld: chunk %d must be in [0, %lld) and ascending; run 'lsa-dump verify'",
                    x->path, what, (long long)(row + i), c->chunk[j], (long long)n_key);
    if (set->votes.rows) {
        LSA_TRY(LSA_NEW(c->votes, c->n_entry, err));
        LSA_TRY(read_set(c->votes, x, &set->votes, base, c->n_entry, what, err));
    }
    if (set->logit.rows) {
        LSA_TRY(LSA_NEW(c->logit, c->n_entry, err));
        LSA_TRY(read_set(c->logit, x, &set->logit, base, c->n_entry, what, err));
    }
    if (set->mass.rows) {
        LSA_TRY(LSA_NEW(c->mass, c->n_entry, err));
        LSA_TRY(read_set(c->mass, x, &set->mass, base, c->n_entry, what, err));
    }
done:
    if (st != LSA_OK) lsa_csr_fini(c);
    return st;
}

lsa_status lsa_shards_labels(lsa_csr *out, const lsa_shards *s, int64_t doc, lsa_err *err) {
    const shard *x = &s->shard[s->doc[doc].shard];
    return read_csr(out, x, &x->labels, x->row_begin[s->local[doc]], s->doc[doc].n_row, s->doc[doc].n_key,
                    "/labels", err);
}

static lsa_status need_ord(const lsa_shards *s, lsa_csa_ord ord, lsa_err *err) {
    if (ord.v < 0 || ord.v >= s->m.info.n_csa)
        LSA_RET_FAIL(LSA_E_CONFIG, "CSA layer %d: the shards have layers [0, %d)", ord.v, s->m.info.n_csa);
    return LSA_OK;
}

lsa_status lsa_shards_stats(lsa_csr *out, const lsa_shards *s, int64_t doc, lsa_csa_ord ord, lsa_err *err) {
    const shard *x = &s->shard[s->doc[doc].shard];
    char what[32];
    memset(out, 0, sizeof *out);
    lsa_status st = need_ord(s, ord, err);
    if (st != LSA_OK) return st;
    if (!s->m.info.has_stats)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "the shards hold no /stats (dumped with --no-stats): KL to the native mass and captured mass need them");
    snprintf(what, sizeof what, "/stats/c%d", ord.v);
    return read_csr(out, x, &x->stats[ord.v], x->row_begin[s->local[doc]], s->doc[doc].n_row,
                    s->doc[doc].n_key, what, err);
}

lsa_status lsa_shards_local_mass(uint16_t **local, uint16_t **sink, const lsa_shards *s, int64_t doc,
                                 lsa_csa_ord ord, lsa_err *err) {
    lsa_status st = LSA_OK;
    const shard *x = &s->shard[s->doc[doc].shard];
    const int64_t r0 = x->row_begin[s->local[doc]], n = s->doc[doc].n_row;
    uint16_t *a = NULL, *b = NULL;
    *local = *sink = NULL;
    LSA_TRY(need_ord(s, ord, err));
    if (!s->m.info.has_stats) LSA_FAIL(LSA_E_CONFIG, "the shards hold no /stats (dumped with --no-stats)");
    LSA_TRY(LSA_NEW(a, n, err));
    LSA_TRY(LSA_NEW(b, n, err));
    LSA_TRY(read_set(a, x, &x->local[ord.v], r0, n, "local_mass", err));
    LSA_TRY(read_set(b, x, &x->sink[ord.v], r0, n, "sink_mass", err));
    *local = a;
    *sink = b;
    a = b = NULL;
done:
    lsa_free(a);
    lsa_free(b);
    return st;
}

lsa_status lsa_shards_dense(lsa_csr *out, const lsa_shards *s, int64_t doc, lsa_csa_ord ord, lsa_err *err) {
    lsa_status st = LSA_OK;
    const shard *x = &s->shard[s->doc[doc].shard];
    const csr_sets *set = x->dense;
    const int64_t r0 = x->row_begin[s->local[doc]], r1 = r0 + s->doc[doc].n_row;
    int64_t *row = NULL;
    char what[32];
    memset(out, 0, sizeof *out);
    LSA_TRY(need_ord(s, ord, err));
    if (!s->m.info.has_dense)
        LSA_FAIL(LSA_E_CONFIG, "the shards hold no /dense: dump with --dense-every to use dense targets");
    set += ord.v;
    snprintf(what, sizeof what, "/dense/c%d", ord.v);
    LSA_TRY(LSA_NEW(row, set->row.rows, err));
    LSA_TRY(read_set(row, x, &set->row, 0, set->row.rows, what, err));
    int64_t a = 0;
    for (int64_t i = 1; i < set->row.rows; i++)
        if (row[i] <= row[i - 1])
            LSA_FAIL(LSA_E_FORMAT, "'%s': '%s/row' is not ascending at %lld: %lld after %lld", x->path, what,
                     (long long)i, (long long)row[i], (long long)row[i - 1]);
    while (a < set->row.rows && row[a] < r0) a++;
    int64_t b = a;
    while (b < set->row.rows && row[b] < r1) b++;
    LSA_TRY(read_csr(out, x, set, a, b - a, s->doc[doc].n_key, what, err));
    LSA_TRY(LSA_NEW(out->row, b - a, err));
    for (int64_t i = a; i < b; i++) out->row[i - a] = row[i] - r0;
    LSA_TRY(LSA_NEW(out->rest, b - a, err));
    LSA_TRY(read_set(out->rest, x, &set->rest, a, b - a, what, err));
done:
    lsa_free(row);
    if (st != LSA_OK) lsa_csr_fini(out);
    return st;
}

lsa_status lsa_shards_check_rows(const lsa_shards *s, int64_t doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    const shard *x = &s->shard[s->doc[doc].shard];
    const int64_t r0 = x->row_begin[s->local[doc]], n = s->doc[doc].n_row, first = s->doc[doc].first_position;
    int64_t *pos = NULL;
    int32_t *vis = NULL;
    uint16_t *mass = NULL;
    LSA_TRY(LSA_NEW(pos, n, err));
    LSA_TRY(LSA_NEW(vis, n, err));
    LSA_TRY(LSA_NEW(mass, n, err));
    LSA_TRY(read_set(pos, x, &x->position, r0, n, "/rows/position", err));
    LSA_TRY(read_set(vis, x, &x->visible, r0, n, "/rows/visible", err));
    for (int64_t i = 0; i < n; i++)
        if (pos[i] != first + i || vis[i] != lsa_visible(first + i))
            LSA_FAIL(
                LSA_E_FORMAT,
                "'%s': '/rows' row %lld says position %lld and %d visible chunks, expected %lld and %lld",
                x->path, (long long)(r0 + i), (long long)pos[i], vis[i], (long long)(first + i),
                (long long)lsa_visible(first + i));
    for (int32_t o = 0; s->m.info.has_stats && o < s->m.info.n_csa; o++)
        for (int which = 0; which < 2; which++) {
            const char *what = which ? "sink_mass" : "local_mass";
            LSA_TRY(read_set(mass, x, which ? &x->sink[o] : &x->local[o], r0, n, what, err));
            for (int64_t i = 0; i < n; i++) {
                const float m = lsa_f16_to_f32(mass[i]);
                if (!(m >= 0.0f && m <= 1.0f))
                    LSA_FAIL(LSA_E_FORMAT, "'%s': '/stats/c%d/%s' row %lld is %g, must be in [0, 1]", x->path,
                             o, what, (long long)(r0 + i), (double)m);
            }
        }
done:
    lsa_free(pos);
    lsa_free(vis);
    lsa_free(mass);
    return st;
}
