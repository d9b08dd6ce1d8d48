/* Tokenised documents: see docs.h for the rules of cutting. The mistake that would stay silent: cutting
 * planted files by id 0, which also occurs inside their documents. */
#include "data/docs.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/json.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

struct lsa_docs {
    int32_t *token;
    int64_t n_token, cap_token;
    LSA_VEC(lsa_doc) doc; /* all documents of the file */
    LSA_VEC(int64_t) start;
    int64_t first, count; /* the chosen range */
};

static bool has_ext(const char *path, const char *ext) {
    size_t n = strlen(path), m = strlen(ext);
    return n > m && !strcmp(path + n - m, ext);
}

static const char *base_name(const char *path) {
    const char *s = strrchr(path, '/');
    return s ? s + 1 : path;
}

static lsa_status add_doc(lsa_docs *d, const char *path, int64_t start, int64_t n, const char *name,
                          lsa_err *err) {
    if (n < 1)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: document %lld is empty; remove it from the input", path,
                     (long long)d->doc.len);
    lsa_status st = LSA_VEC_RESERVE(d->doc, d->doc.len + 1, err);
    if (st == LSA_OK) st = LSA_VEC_RESERVE(d->start, d->doc.len + 1, err);
    if (st != LSA_OK) return st;
    lsa_doc *x = &d->doc.data[d->doc.len];
    memset(x, 0, sizeof *x);
    x->index = d->doc.len;
    x->n_token = n;
    if (name)
        snprintf(x->name, sizeof x->name, "%.95s", name);
    else
        snprintf(x->name, sizeof x->name, "%.70s:%lld", base_name(path), (long long)d->doc.len);
    d->start.data[d->doc.len++] = start;
    return LSA_OK;
}

static lsa_status read_ids(lsa_docs *d, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    char *raw = NULL;
    size_t n_bytes;
    const size_t w = has_ext(path, ".u32") ? 4 : 2;
    LSA_TRY(lsa_read_file(&raw, &n_bytes, path, err));
    if (n_bytes % w)
        LSA_FAIL(LSA_E_FORMAT,
                 "%s: %zu bytes are not a whole number of %zu-byte tokens; the file is truncated", path,
                 n_bytes, w);
    d->n_token = (int64_t)(n_bytes / w);
    if (d->n_token == 0) LSA_FAIL(LSA_E_FORMAT, "%s: the file holds no tokens", path);
    LSA_TRY(LSA_NEW(d->token, d->n_token, err));
    d->cap_token = d->n_token;
    for (int64_t i = 0; i < d->n_token; i++) {
        const unsigned char *p = (const unsigned char *)raw + (size_t)i * w;
        uint32_t v = (uint32_t)p[0] | (uint32_t)p[1] << 8;
        if (w == 4) v |= (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        if (v > INT32_MAX) LSA_FAIL(LSA_E_FORMAT, "%s: token %lld is %u, not an id", path, (long long)i, v);
        d->token[i] = (int32_t)v;
    }
done:
    lsa_free(raw);
    return st;
}

/* Called for each non-empty line of a JSONL file, parsed; where is "path:line" for messages. */
typedef lsa_status (*line_fn)(lsa_docs *d, const json_t *o, const char *path, const char *where,
                              lsa_err *err);

static lsa_status each_line(lsa_docs *d, const char *path, line_fn fn, lsa_err *err) {
    lsa_status st = LSA_OK;
    char *text = NULL;
    size_t n;
    json_t *o = NULL;
    LSA_TRY(lsa_read_file(&text, &n, path, err));
    if (strlen(text) != n)
        LSA_FAIL(LSA_E_FORMAT, "%s: a zero byte at offset %zu; this is not a JSONL file", path, strlen(text));
    int64_t number = 0;
    for (char *p = text; *p;) {
        char *end = strchr(p, '\n');
        size_t len = end ? (size_t)(end - p) : strlen(p);
        number++;
        bool blank = true;
        for (size_t i = 0; i < len; i++) blank = blank && isspace((unsigned char)p[i]);
        if (!blank) {
            char where[LSA_PATH_MAX + 32];
            snprintf(where, sizeof where, "%s:%lld", path, (long long)number);
            LSA_TRY(lsa_json_parse(&o, p, len, where, err));
            LSA_TRY(fn(d, o, path, where, err));
            json_decref(o);
            o = NULL;
        }
        p += len + (end != NULL);
    }
done:
    json_decref(o);
    lsa_free(text);
    return st;
}

static lsa_status token_line(lsa_docs *d, const json_t *o, const char *path, const char *where,
                             lsa_err *err) {
    json_t *a;
    lsa_status st = lsa_json_array(&a, o, "tokens", where, err);
    if (st != LSA_OK) return st;
    int64_t n = (int64_t)json_array_size(a), at = d->n_token;
    st = lsa_grow_((void **)&d->token, &d->cap_token, at + n, sizeof *d->token, "tokens", err);
    if (st != LSA_OK) return st;
    for (int64_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(a, (size_t)i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
            LSA_RET_FAIL(LSA_E_FORMAT, "%s: tokens[%lld] is not a token id", where, (long long)i);
        d->token[at + i] = (int32_t)json_integer_value(v);
    }
    d->n_token += n;
    return add_doc(d, path, at, n, json_string_value(json_object_get(o, "name")), err);
}

static lsa_status read_pairs(int64_t *out, int64_t width, const json_t *a, int64_t n_token, const char *key,
                             const char *where, lsa_err *err) {
    for (size_t i = 0; i < json_array_size(a); i++) {
        const json_t *p = json_array_get(a, i);
        if (json_array_size(p) != (size_t)width)
            LSA_RET_FAIL(LSA_E_FORMAT, "%s: %s[%zu] must have %lld numbers", where, key, i, (long long)width);
        for (int64_t j = 0; j < width; j++) {
            const json_t *v = json_array_get(p, (size_t)j);
            if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > n_token)
                LSA_RET_FAIL(LSA_E_FORMAT, "%s: %s[%zu][%lld] must be an offset in [0, %lld]", where, key, i,
                             (long long)j, (long long)n_token);
            out[(int64_t)i * width + j] = (int64_t)json_integer_value(v);
        }
    }
    return LSA_OK;
}

static int by_question(const void *a, const void *b) {
    const lsa_fact *x = a, *y = b;
    return (x->question > y->question) - (x->question < y->question);
}
static int by_dest(const void *a, const void *b) {
    const lsa_replay *x = a, *y = b;
    return (x->dest > y->dest) - (x->dest < y->dest);
}

static lsa_status needs_line(lsa_docs *d, const json_t *o, const char *path, const char *where,
                             lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t start, n;
    json_t *facts, *replays;
    lsa_fact *f = NULL;
    lsa_replay *r = NULL;
    (void)path;
    LSA_TRY(lsa_json_i64(&start, o, "start", where, err));
    LSA_TRY(lsa_json_i64(&n, o, "tokens", where, err));
    if (start < 0 || n < 0 || start > d->n_token || n > d->n_token - start)
        LSA_FAIL(
            LSA_E_FORMAT,
            "%s: tokens [%lld, +%lld) lie outside the token file of %lld; the index belongs to another file",
            where, (long long)start, (long long)n, (long long)d->n_token);
    LSA_TRY(add_doc(d, where, start, n, NULL, err));
    LSA_TRY(lsa_json_array(&facts, o, "facts", where, err));
    LSA_TRY(lsa_json_array(&replays, o, "replays", where, err));
    lsa_doc *x = &d->doc.data[d->doc.len - 1];
    snprintf(x->name, sizeof x->name, "planted:%lld", (long long)x->index);
    x->has_needs = true;
    x->n_fact = (int64_t)json_array_size(facts);
    x->n_replay = (int64_t)json_array_size(replays);
    LSA_TRY(LSA_NEW(f, x->n_fact, err));
    x->fact = f;
    LSA_TRY(LSA_NEW(r, x->n_replay, err));
    x->replay = r;
    LSA_TRY(read_pairs((int64_t *)f, 2, facts, n, "facts", where, err));
    LSA_TRY(read_pairs((int64_t *)r, 3, replays, n, "replays", where, err));
    if (f) qsort(f, (size_t)x->n_fact, sizeof *f, by_question);
    if (r) qsort(r, (size_t)x->n_replay, sizeof *r, by_dest);
done:
    return st;
}

static lsa_status cut_by_zero(lsa_docs *d, const char *path, lsa_err *err) {
    int64_t start = 0;
    for (int64_t i = 1; i <= d->n_token; i++) {
        if (i < d->n_token && d->token[i] != 0) continue;
        lsa_status st = add_doc(d, path, start, i - start, NULL, err);
        if (st != LSA_OK) return st;
        start = i;
    }
    return LSA_OK;
}

static lsa_status parse_end(int64_t *out, int64_t dflt, const char *s, size_t n, const char *range,
                            lsa_err *err) {
    *out = dflt;
    if (n == 0) return LSA_OK;
    char *end;
    errno = 0;
    long long v = strtoll(s, &end, 10);
    if (errno || end != s + n || v < 0)
        LSA_RET_FAIL(LSA_E_ARG, "--documents '%s' must look like A:B, half-open, from 0", range);
    *out = v;
    return LSA_OK;
}

lsa_status lsa_docs_range(int64_t *first, int64_t *last, const char *range, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t a = 0, b = n;
    if (range) {
        const char *colon = strchr(range, ':');
        if (!colon) LSA_FAIL(LSA_E_ARG, "--documents '%s' must look like A:B, half-open, from 0", range);
        LSA_TRY(parse_end(&a, 0, range, (size_t)(colon - range), range, err));
        LSA_TRY(parse_end(&b, n, colon + 1, strlen(colon + 1), range, err));
    }
    if (a >= b || b > n)
        LSA_FAIL(LSA_E_ARG, "--documents %lld:%lld is not a non-empty part of the %lld documents",
                 (long long)a, (long long)b, (long long)n);
    *first = a;
    *last = b;
done:
    return st;
}

static lsa_status set_range(lsa_docs *d, const char *range, lsa_err *err) {
    int64_t last = 0;
    const lsa_status st = lsa_docs_range(&d->first, &last, range, d->doc.len, err);
    d->count = last - d->first;
    return st;
}

lsa_status lsa_docs_open(lsa_docs **out, const char *tokens, const char *needs, const char *range,
                         int64_t vocab, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_docs *d = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(d, 1, err));
    if (has_ext(tokens, ".jsonl")) {
        if (needs)
            LSA_FAIL(LSA_E_ARG,
                     "--needs cuts .u16 and .u32 files; '%s' has one document per line, so leave --needs out",
                     tokens);
        LSA_TRY(each_line(d, tokens, token_line, err));
    } else {
        LSA_TRY(read_ids(d, tokens, err));
        if (needs)
            LSA_TRY(each_line(d, needs, needs_line, err));
        else
            LSA_TRY(cut_by_zero(d, tokens, err));
    }
    if (d->doc.len == 0) LSA_FAIL(LSA_E_FORMAT, "%s: no documents", needs ? needs : tokens);
    for (int64_t i = 0; i < d->doc.len; i++) d->doc.data[i].token = d->token + d->start.data[i];
    LSA_TRY(set_range(d, range, err));
    for (int64_t i = 0; vocab > 0 && i < d->count; i++) {
        const lsa_doc *x = lsa_docs_at(d, i);
        for (int64_t t = 0; t < x->n_token; t++)
            if (x->token[t] >= vocab)
                LSA_FAIL(LSA_E_FORMAT,
                         "%s: document %lld, token %lld is %d; the teacher's vocabulary is [0, %lld)", tokens,
                         (long long)x->index, (long long)t, x->token[t], (long long)vocab);
    }
    *out = d;
    d = NULL;
done:
    lsa_docs_close(d);
    return st;
}

void lsa_docs_close(lsa_docs *d) {
    if (!d) return;
    for (int64_t i = 0; i < d->doc.len; i++) {
        union {
            const void *c;
            void *v;
        } f = {.c = d->doc.data[i].fact}, r = {.c = d->doc.data[i].replay};
        lsa_free(f.v);
        lsa_free(r.v);
    }
    lsa_free(d->doc.data);
    lsa_free(d->start.data);
    lsa_free(d->token);
    lsa_free(d);
}

int64_t lsa_docs_count(const lsa_docs *d) {
    return d->count;
}
const lsa_doc *lsa_docs_at(const lsa_docs *d, int64_t i) {
    return i >= 0 && i < d->count ? &d->doc.data[d->first + i] : NULL;
}
int64_t lsa_docs_tokens(const lsa_docs *d) {
    int64_t n = 0;
    for (int64_t i = 0; i < d->count; i++) n += lsa_docs_at(d, i)->n_token;
    return n;
}
uint64_t lsa_docs_hash(const lsa_docs *d) {
    uint64_t h = 0;
    for (int64_t i = 0; i < d->count; i++) {
        const lsa_doc *x = lsa_docs_at(d, i);
        uint64_t k[3] = {h, (uint64_t)x->n_token, lsa_xxh64(x->token, (size_t)x->n_token * sizeof *x->token)};
        h = lsa_xxh64(k, sizeof k);
    }
    return h;
}
