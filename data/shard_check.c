/* lsa-dump verify: everything a reader relies on, once, over whole files. */
#include <fcntl.h>
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/manifest.h"
#include "data/shard_internal.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

typedef struct extent { /* of a dataset, or of the whole file */
    char name[128];
    int64_t offset, bytes;
    uint64_t want, found;
} extent;

typedef struct hasher {
    lsa_h5_reader *h;
    const char *path;
    LSA_VEC(extent) extents;
} hasher;

static lsa_status list_one(void *user, const char *name, lsa_err *err) {
    hasher *c = user;
    lsa_status st = LSA_OK;
    extent x = {0};
    snprintf(x.name, sizeof x.name, "%s", name);
    LSA_TRY(lsa_h5_find_any(c->h, name, &x.bytes, &x.offset, &x.want, err));
    LSA_TRY(LSA_VEC_RESERVE(c->extents, c->extents.len + 1, err));
    c->extents.data[c->extents.len++] = x;
done:
    return st;
}

int lsa_shard_threads(void) {
    return (int)lsa_min_i64(8, omp_get_max_threads());
}

/* Of all extents. The first error of any thread. */
static lsa_status hash_all(hasher *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int threads = lsa_shard_threads();
    const int fd = open(c->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) LSA_RET_FAIL(LSA_E_IO, "cannot open '%s'", c->path);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < c->extents.len; i++) {
        extent *const x = &c->extents.data[i];
        lsa_err why = {0};
        const lsa_status read = lsa_xxh64_range(&x->found, fd, x->offset, x->bytes, c->path, &why);
        if (read == LSA_OK) continue;
#pragma omp critical(lsa_shard_hash)
        if (st == LSA_OK) {
            st = read;
            if (err) *err = why;
        }
    }
    close(fd);
    return st;
}

static int by_offset(const void *a, const void *b) {
    const int64_t x = ((const extent *)a)->offset, y = ((const extent *)b)->offset;
    return (x > y) - (x < y);
}

/* Of the extents from `first` on. */
static lsa_status find_head(int64_t *head_bytes, hasher *c, int64_t first, lsa_err *err) {
    int64_t size, at = -1;
    const lsa_status st = lsa_file_size(&size, c->path, err);
    if (st != LSA_OK) return st;
    qsort(c->extents.data + first, (size_t)(c->extents.len - first), sizeof *c->extents.data, by_offset);
    for (int64_t i = first; i < c->extents.len; i++) {
        const extent *const x = &c->extents.data[i];
        if (x->bytes == 0) continue; /* has no place */
        if (at < 0) *head_bytes = at = x->offset;
        if (x->offset != at) break;
        at += x->bytes;
    }
    if (at < 0) LSA_RET_FAIL(LSA_E_FORMAT, "'%s' holds no data", c->path);
    if (at != size)
        LSA_RET_FAIL(LSA_E_BUG, "'%s': HDF5 put structures behind byte %lld, after the first dataset",
                     c->path, (long long)at);
    return LSA_OK;
}

lsa_status lsa_shard_hash_head(uint64_t *xxh64, const char *path, int64_t head_bytes, lsa_err *err) {
    lsa_status st = LSA_OK;
    char *buf = NULL;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) LSA_FAIL(LSA_E_IO, "cannot open '%s'", path);
    LSA_TRY(lsa_alloc_((void **)&buf, head_bytes, 1, "head", err));
    LSA_TRY(lsa_pread_all(fd, buf, (size_t)head_bytes, 0, path, err));
    *xxh64 = lsa_xxh64(buf, (size_t)head_bytes);
done:
    if (fd >= 0) close(fd);
    lsa_free(buf);
    return st;
}

lsa_status lsa_shard_check_head(const char *path, const lsa_manifest_shard *m, lsa_err *err) {
    uint64_t h = 0;
    const lsa_status st = lsa_shard_hash_head(&h, path, m->head_bytes, err);
    if (st == LSA_OK && h != m->head_xxh64)
        LSA_RET_FAIL(
            LSA_E_FORMAT,
            "shard '%s': its first %lld bytes, HDF5's own structures, do not match the manifest's hash; it was damaged or replaced: delete it and dump again",
            path, (long long)m->head_bytes);
    return st;
}

lsa_status lsa_shard_check_hashes(int64_t *head_bytes, uint64_t *whole, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    hasher c = {.path = path};
    if (whole) { /* first: it takes longest */
        LSA_TRY(LSA_VEC_RESERVE(c.extents, 1, err));
        c.extents.data[0] = (extent){.bytes = 0};
        LSA_TRY(lsa_file_size(&c.extents.data[0].bytes, path, err));
        c.extents.len = 1;
    }
    LSA_TRY(lsa_h5_open(&c.h, path, err));
    LSA_TRY(lsa_h5_each(c.h, list_one, &c, err));
    LSA_TRY(hash_all(&c, err));
    for (int64_t i = whole != NULL; i < c.extents.len; i++)
        if (c.extents.data[i].found != c.extents.data[i].want)
            LSA_FAIL(
                LSA_E_FORMAT,
                "'%s': the bytes of dataset '%s' do not match their xxh64; the file is damaged: delete it and dump again",
                path, c.extents.data[i].name);
    if (whole) *whole = c.extents.data[0].found;
    if (head_bytes) LSA_TRY(find_head(head_bytes, &c, whole != NULL, err));
done:
    lsa_free(c.extents.data);
    lsa_h5_close(c.h);
    return st;
}

/* Structure of one document as the trainer will see it. */
static lsa_status check_doc(const lsa_shards *s, int64_t doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_shards_info *f = lsa_shards_get_info(s);
    const lsa_shards_doc d = lsa_shards_get_doc(s, doc);
    lsa_csr c = {0};
    int64_t *pos = NULL;
    uint16_t *hidden = NULL;
    uint8_t *key = NULL;
    LSA_TRY(lsa_shards_check_rows(s, doc, err));
    LSA_TRY(lsa_shards_labels(&c, s, doc, err));
    for (int64_t i = 0; i < c.n_row; i++)
        for (int64_t j = c.begin[i]; j < c.begin[i + 1]; j++) {
            if (c.votes[j] < 1 || c.votes[j] > f->n_csa)
                LSA_FAIL(LSA_E_FORMAT, "document %lld, row %lld: %d votes for chunk %d, must be in [1, %d]",
                         (long long)doc, (long long)i, c.votes[j], c.chunk[j], f->n_csa);
            if (c.chunk[j] >= lsa_visible(d.first_position + i))
                LSA_FAIL(LSA_E_FORMAT,
                         "document %lld, row %lld: label for chunk %d, which is not visible yet",
                         (long long)doc, (long long)i, c.chunk[j]);
        }
    for (int32_t o = 0; o < f->n_csa; o++) {
        if (f->has_keys[o]) {
            LSA_TRY(lsa_shards_hidden(&pos, &hidden, s, doc, (lsa_csa_ord){o}, err));
            for (int64_t i = 0; i < d.n_hidden; i++)
                if ((pos[i] + 1) % f->hidden_stride)
                    LSA_FAIL(
                        LSA_E_FORMAT,
                        "document %lld: hidden vector %lld at position %lld, which is not on the stride of %d",
                        (long long)doc, (long long)i, (long long)pos[i], f->hidden_stride);
            for (int64_t i = 0; i < d.n_hidden * f->hidden; i++)
                if (!isfinite(lsa_bf16_to_f32(hidden[i])))
                    LSA_FAIL(LSA_E_FORMAT, "document %lld: hidden vector %lld of layer c%d is not finite",
                             (long long)doc, (long long)(i / f->hidden), o);
            LSA_TRY(lsa_shards_keys(&key, s, doc, (lsa_csa_ord){o}, err));
            for (int64_t i = 0; i < d.n_key; i++) {
                float scale;
                memcpy(&scale, key + i * LSA_KEY_BYTES + 128, 4);
                if (!(scale > 0.0f) || !isfinite(scale))
                    LSA_FAIL(LSA_E_FORMAT, "document %lld: key %lld of layer c%d has scale %g",
                             (long long)doc, (long long)i, o, (double)scale);
            }
            lsa_free(pos), lsa_free(hidden), lsa_free(key);
            pos = NULL, hidden = NULL, key = NULL;
        }
        if (f->has_stats) {
            lsa_csr_fini(&c);
            LSA_TRY(lsa_shards_stats(&c, s, doc, (lsa_csa_ord){o}, err));
            for (int64_t i = 0; i < c.n_row; i++) {
                double sum = 0;
                for (int64_t j = c.begin[i]; j < c.begin[i + 1]; j++) {
                    float m = lsa_f16_to_f32(c.mass[j]);
                    if (c.chunk[j] >= lsa_visible(d.first_position + i))
                        LSA_FAIL(
                            LSA_E_FORMAT,
                            "document %lld, row %lld, layer c%d: chunk %d is selected before it is visible",
                            (long long)doc, (long long)i, o, c.chunk[j]);
                    if (!isfinite(lsa_f16_to_f32(c.logit[j])))
                        LSA_FAIL(LSA_E_FORMAT,
                                 "document %lld, row %lld, layer c%d: the logit of chunk %d is not finite",
                                 (long long)doc, (long long)i, o, c.chunk[j]);
                    if (!(m >= 0.0f && m <= 1.0f))
                        LSA_FAIL(LSA_E_FORMAT, "document %lld, row %lld, layer c%d: mass %g is not in [0, 1]",
                                 (long long)doc, (long long)i, o, (double)m);
                    sum += (double)m;
                }
                if (!(sum <= 1.01))
                    LSA_FAIL(LSA_E_FORMAT, "document %lld, row %lld, layer c%d: masses add up to %g",
                             (long long)doc, (long long)i, o, sum);
            }
        }
        if (f->has_dense) {
            lsa_csr_fini(&c);
            LSA_TRY(lsa_shards_dense(&c, s, doc, (lsa_csa_ord){o}, err));
            for (int64_t i = 0; i < c.n_row; i++) {
                double sum = (double)lsa_f16_to_f32(c.rest[i]);
                bool late = false;
                for (int64_t j = c.begin[i]; j < c.begin[i + 1]; j++) {
                    late = late || c.chunk[j] >= lsa_visible(d.first_position + c.row[i]);
                    sum += (double)lsa_f16_to_f32(c.mass[j]);
                }
                if (late || !(sum >= 0 && sum <= 1.01))
                    LSA_FAIL(LSA_E_FORMAT, "document %lld, row %lld, layer c%d: dense masses add up to %g%s",
                             (long long)doc, (long long)c.row[i], o, sum,
                             late ? " and name a chunk that is not visible" : "");
            }
        }
    }
done:
    lsa_free(pos);
    lsa_free(hidden);
    lsa_free(key);
    lsa_csr_fini(&c);
    return st;
}

static int descending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* One probe row: the stored native logits (fp32 keys) against logits recomputed from the stored fp8 keys. */
/* Of probe rows that see more than four times the label pool. */
typedef struct probe_summary {
    int64_t rows;
    double r, overlap; /* least */
} probe_summary;

/* Share of the k highest of `want` that are among the k highest of `got`. */
static double top_overlap(const float *got, const float *want, float *sorted, int64_t n, int64_t k) {
    memcpy(sorted, got, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, descending);
    const float a = sorted[k - 1];
    memcpy(sorted, want, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, descending);
    const float b = sorted[k - 1];
    int64_t both = 0;
    for (int64_t s = 0; s < n; s++) both += got[s] >= a && want[s] >= b;
    return fmin(1, (double)both / (double)k); /* ties may be more than k */
}

static lsa_status check_probe_row(probe_summary *sum, int64_t pool, const float *q, const float *w,
                                  int64_t heads, const uint8_t *key, const float *want, int64_t n,
                                  const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    float *got = NULL, *sorted = NULL, row[128];
    if (n < 8) return LSA_OK;
    LSA_TRY(LSA_NEW(got, n, err));
    LSA_TRY(LSA_NEW(sorted, n, err));
    double ma = 0, mb = 0;
    for (int64_t s = 0; s < n; s++) {
        lsa_key_decode(row, key + s * LSA_KEY_BYTES);
        double z = 0;
        for (int64_t h = 0; h < heads; h++) {
            double p = 0;
            for (int i = 0; i < 128; i++) p += (double)q[h * 128 + i] * (double)row[i];
            if (p > 0) z += (double)w[h] * p;
        }
        got[s] = (float)z;
        ma += z / (double)n;
        mb += (double)want[s] / (double)n;
    }
    double ab = 0, aa = 0, bb = 0;
    for (int64_t s = 0; s < n; s++) {
        double x = (double)got[s] - ma, y = (double)want[s] - mb;
        ab += x * y, aa += x * x, bb += y * y;
    }
    double r = aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 1.0;
    const double least =
        n < 64 ? 0.98 : 0.999; /* a few logits may lie close together, within the keys' rounding */
    if (!(r >= least))
        LSA_FAIL(
            LSA_E_FORMAT,
            "%s: native logits recomputed from the stored keys correlate only %.5f with the recorded ones (at least %.3f): wrong rotation, RoPE or scale",
            where, r, least);
    if (pool > 0 && n > 4 * pool) {
        const double overlap = top_overlap(got, want, sorted, n, pool);
        sum->r = sum->rows ? fmin(sum->r, r) : r;
        sum->overlap = sum->rows ? fmin(sum->overlap, overlap) : overlap;
        sum->rows++;
    }
    const int64_t k = n / 8; /* the top eighth must agree, apart from a few at the border */
    const double same = top_overlap(got, want, sorted, n, k) * (double)k;
    if ((double)k - same > fmax(2.0, 0.1 * (double)k))
        LSA_FAIL(LSA_E_FORMAT, "%s: only %.0f of the %lld highest native logits agree with the stored keys",
                 where, same, (long long)k);
done:
    lsa_free(got);
    lsa_free(sorted);
    return st;
}

static lsa_status read_probe(void **out, lsa_h5_reader *h, int fd, const char *path, const char *name,
                             lsa_h5_type t, int64_t *rows, int64_t *cols, lsa_err *err) {
    lsa_h5_set set;
    *out = NULL;
    lsa_status st = lsa_h5_find(&set, h, name, t, -1, *cols ? -1 : 0, err);
    if (st != LSA_OK) return st;
    *rows = set.rows;
    *cols = set.cols;
    int64_t bytes = set.rows * (set.cols ? set.cols : 1) * lsa_h5_type_bytes(t);
    st = lsa_alloc_(out, bytes, 1, name, err);
    if (st == LSA_OK && bytes) st = lsa_pread_all(fd, *out, (size_t)bytes, set.offset, path, err);
    return st;
}

static lsa_status check_probe(probe_summary *sum, const lsa_shards *s, const char *path, int64_t first_doc,
                              int64_t n_doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_shards_info *f = lsa_shards_get_info(s);
    lsa_h5_reader *h = NULL;
    int64_t *row = NULL, n_probe = 0, cols = 0;
    float *q = NULL, *w = NULL, *logit = NULL;
    uint8_t *key = NULL;
    char name[64], where[LSA_PATH_MAX + 96];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) LSA_FAIL(LSA_E_IO, "cannot open '%s'", path);
    LSA_TRY(lsa_h5_open(&h, path, err));
    if (!lsa_h5_has(h, "/probe/row")) goto done;
    LSA_TRY(read_probe((void **)&row, h, fd, path, "/probe/row", LSA_H5_I64, &n_probe, &cols, err));
    if (n_probe < 1) goto done;
    int64_t doc = first_doc, base = 0;
    while (doc < first_doc + n_doc && row[0] >= base + lsa_shards_get_doc(s, doc).n_row)
        base += lsa_shards_get_doc(s, doc++).n_row;
    if (doc == first_doc + n_doc || row[0] < 0)
        LSA_FAIL(LSA_E_FORMAT, "'%s': /probe/row points outside the rows", path);
    const lsa_shards_doc d = lsa_shards_get_doc(s, doc);
    for (int32_t o = 0; o < f->n_csa; o++) {
        if (!f->has_keys[o]) continue;
        int64_t nq, cq = 1, nw, cw = 1, nl, cl = 0, at = 0;
        lsa_free(q), lsa_free(w), lsa_free(logit), lsa_free(key);
        q = w = logit = NULL, key = NULL;
        snprintf(name, sizeof name, "/probe/c%d/q", o);
        LSA_TRY(read_probe((void **)&q, h, fd, path, name, LSA_H5_F32, &nq, &cq, err));
        snprintf(name, sizeof name, "/probe/c%d/w", o);
        LSA_TRY(read_probe((void **)&w, h, fd, path, name, LSA_H5_F32, &nw, &cw, err));
        snprintf(name, sizeof name, "/probe/c%d/logit", o);
        LSA_TRY(read_probe((void **)&logit, h, fd, path, name, LSA_H5_F32, &nl, &cl, err));
        LSA_TRY(lsa_shards_keys(&key, s, doc, (lsa_csa_ord){o}, err));
        if (nq != n_probe || nw != n_probe || cq != cw * 128)
            LSA_FAIL(LSA_E_FORMAT, "'%s': /probe/c%d has mismatched shapes", path, o);
        for (int64_t p = 0; p < n_probe; p++) {
            if (row[p] < base || row[p] - base >= d.n_row)
                LSA_FAIL(LSA_E_FORMAT, "'%s': /probe/row %lld points outside the first document", path,
                         (long long)p);
            int64_t n = lsa_visible(d.first_position + row[p] - base);
            if (n > nl - at)
                LSA_FAIL(LSA_E_FORMAT, "'%s': /probe/c%d row %lld does not fit", path, o, (long long)p);
            snprintf(where, sizeof where, "'%s': probe %lld of layer c%d", path, (long long)p, o);
            LSA_TRY(check_probe_row(sum, f->label_pool, q + p * cq, w + p * cw, cw, key, logit + at, n, where,
                                    err));
            at += n;
        }
    }
done:
    if (fd >= 0) close(fd);
    lsa_h5_close(h);
    lsa_free(row);
    lsa_free(q);
    lsa_free(w);
    lsa_free(logit);
    lsa_free(key);
    return st;
}

lsa_status lsa_shards_verify(const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_manifest m = {0};
    lsa_shards *s = NULL;
    char path[LSA_PATH_MAX];
    probe_summary sum = {0};
    LSA_TRY(lsa_manifest_load(&m, dir, err));
    for (int64_t i = 0; i < m.shard.len; i++) {
        uint64_t h;
        LSA_TRY(lsa_path(path, err, "%s/%s", dir, m.shard.data[i].file));
        if (!lsa_exists(path))
            LSA_FAIL(LSA_E_FORMAT,
                     "shard '%s' is missing but the manifest lists it; restore it or dump again", path);
        LSA_TRY(lsa_xxh64_file(&h, path, err));
        if (h == m.shard.data[i].xxh64) continue;
        LSA_TRY(lsa_shard_check_head(path, &m.shard.data[i], err));
        LSA_TRY(lsa_shard_check_hashes(NULL, NULL, path, err)); /* names the dataset, if one is hit */
        LSA_FAIL(
            LSA_E_FORMAT,
            "shard '%s' does not match the manifest's hash: it was damaged or replaced; delete it and dump again",
            path);
    }
    LSA_TRY(lsa_shards_open(&s, dir, err));
    int64_t doc = 0;
    for (int64_t i = 0; i < m.shard.len; i++) {
        LSA_TRY(lsa_path(path, err, "%s/%s", dir, m.shard.data[i].file));
        LSA_TRY(check_probe(&sum, s, path, doc, m.shard.data[i].documents, err));
        for (int64_t d = 0; d < m.shard.data[i].documents; d++) LSA_TRY(check_doc(s, doc++, err));
    }
    if (sum.rows)
        lsa_info(
            "native logits rebuilt from the stored keys, %lld rows with more than %d visible chunks: r at "
            "least %.6f, at least %.2f %% of the highest %d the same",
            (long long)sum.rows, 4 * m.info.label_pool, sum.r, 100 * sum.overlap, m.info.label_pool);
done:
    lsa_shards_close(s);
    lsa_manifest_fini(&m);
    return st;
}
