/* Safetensors: an 8-byte little-endian header length, a JSON header, then the tensors' bytes.
 *
 * Invariant: a tensor is handed out only after the whole header passed. The mistake that would stay silent is
 * trusting data_offsets: a wrong pair reads another tensor's bytes without a crash. */
#include "data/lsa_safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/sink.h"
#include "kernels/core/file.h"
#include "kernels/core/json.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

#define MAX_HEADER (INT64_C(100) << 20)

struct lsa_st {
    lsa_map map; /* unused for memory */
    json_t *header;
    lsa_st_tensor *tensor; /* sorted by name */
    int64_t n;
};

static bool parse_dtype(lsa_dtype *out, const char *s) {
    static const struct {
        const char *name;
        lsa_dtype t;
    } map[] = {{"F32", LSA_F32},         {"F16", LSA_F16}, {"BF16", LSA_BF16}, {"F8_E4M3", LSA_F8_E4M3},
               {"F8_E8M0", LSA_F8_E8M0}, {"U8", LSA_U8},   {"I8", LSA_I8},     {"I32", LSA_I32},
               {"I64", LSA_I64},         {"F64", LSA_F64}, {"C64", LSA_C64},   {"F4", LSA_F4}};
    for (size_t i = 0; i < sizeof map / sizeof *map; i++)
        if (!strcmp(s, map[i].name)) {
            *out = map[i].t;
            return true;
        }
    return false;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const lsa_st_tensor *)a)->name, ((const lsa_st_tensor *)b)->name);
}

static int by_data(const void *a, const void *b) {
    const unsigned char *x = ((const lsa_st_tensor *)a)->data, *y = ((const lsa_st_tensor *)b)->data;
    if (x != y) return x < y ? -1 : 1;
    size_t p = ((const lsa_st_tensor *)a)->n_bytes, q = ((const lsa_st_tensor *)b)->n_bytes;
    return (p > q) - (p < q);
}

static lsa_status parse_tensor(lsa_st_tensor *t, const char *name, const json_t *o, const unsigned char *data,
                               int64_t n_data, const char *file, lsa_err *err) {
    char where[512];
    snprintf(where, sizeof where, "%.200s: tensor '%.200s'", file, name);
    const char *dtype;
    json_t *shape, *offs;
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_json_str(&dtype, o, "dtype", where, err));
    LSA_TRY(lsa_json_array(&shape, o, "shape", where, err));
    LSA_TRY(lsa_json_array(&offs, o, "data_offsets", where, err));
    t->name = name;
    if (!parse_dtype(&t->dtype, dtype)) LSA_FAIL(LSA_E_FORMAT, "%s: unknown dtype '%.40s'", where, dtype);
    size_t nd = json_array_size(shape);
    if (nd > LSA_ST_MAX_DIM)
        LSA_FAIL(LSA_E_FORMAT, "%s: %zu dimensions, at most %d are supported", where, nd, LSA_ST_MAX_DIM);
    t->n_dim = (int32_t)nd;
    t->n_elem = 1;
    for (size_t i = 0; i < nd; i++) {
        const json_t *d = json_array_get(shape, i);
        if (!json_is_integer(d) || json_integer_value(d) < 0)
            LSA_FAIL(LSA_E_FORMAT, "%s: shape entry %zu is not a non-negative integer", where, i);
        t->shape[i] = (int64_t)json_integer_value(d);
        if (!lsa_mul_i64(t->n_elem, t->shape[i], &t->n_elem))
            LSA_FAIL(LSA_E_FORMAT, "%s: shape overflows", where);
    }
    int64_t bytes;
    if (t->dtype == LSA_F4) {
        if (t->n_elem % 2) LSA_FAIL(LSA_E_FORMAT, "%s: odd number of fp4 elements", where);
        bytes = t->n_elem / 2;
    } else if (!lsa_mul_i64(t->n_elem, (int64_t)lsa_dtype_bytes(t->dtype), &bytes)) {
        LSA_FAIL(LSA_E_FORMAT, "%s: byte size overflows", where);
    }
    const json_t *b = json_array_get(offs, 0), *e = json_array_get(offs, 1);
    if (json_array_size(offs) != 2 || !json_is_integer(b) || !json_is_integer(e))
        LSA_FAIL(LSA_E_FORMAT, "%s: data_offsets must be two integers", where);
    int64_t begin = (int64_t)json_integer_value(b), end = (int64_t)json_integer_value(e);
    if (begin < 0 || end < begin || end > n_data)
        LSA_FAIL(
            LSA_E_FORMAT,
            "%s: data_offsets [%lld, %lld] lie outside the %lld data bytes; the file is truncated or damaged",
            where, (long long)begin, (long long)end, (long long)n_data);
    if (end - begin != bytes)
        LSA_FAIL(LSA_E_FORMAT, "%s: shape needs %lld bytes, data_offsets give %lld", where, (long long)bytes,
                 (long long)(end - begin));
    t->n_bytes = (size_t)bytes;
    t->data = data + begin;
done:
    return st;
}

lsa_status lsa_st_open_memory(lsa_st **out, const void *data, size_t n_bytes, const char *name,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_st *s = NULL;
    const unsigned char *p = data;
    uint64_t hlen = 0;
    *out = NULL;
    LSA_TRY(lsa_alloc_((void **)&s, 1, sizeof *s, "safetensors reader", err));
    if (n_bytes < 8)
        LSA_FAIL(LSA_E_FORMAT, "%s: %zu bytes are too few for a safetensors file", name, n_bytes);
    for (int i = 7; i >= 0; i--) hlen = hlen << 8 | p[i];
    if (hlen > (uint64_t)MAX_HEADER || hlen > n_bytes - 8)
        LSA_FAIL(LSA_E_FORMAT, "%s: header length %llu does not fit a file of %zu bytes", name,
                 (unsigned long long)hlen, n_bytes);
    LSA_TRY(lsa_json_parse(&s->header, (const char *)p + 8, (size_t)hlen, name, err));
    if (!json_is_object(s->header)) LSA_FAIL(LSA_E_FORMAT, "%s: header is not a JSON object", name);
    LSA_TRY(lsa_alloc_((void **)&s->tensor, (int64_t)json_object_size(s->header), sizeof *s->tensor,
                       "tensor table", err));
    const char *key;
    json_t *v;
    json_object_foreach(s->header, key, v) {
        if (!strcmp(key, "__metadata__")) {
            if (!json_is_object(v)) LSA_FAIL(LSA_E_FORMAT, "%s: __metadata__ is not an object", name);
            continue;
        }
        LSA_TRY(
            parse_tensor(&s->tensor[s->n], key, v, p + 8 + hlen, (int64_t)(n_bytes - 8 - hlen), name, err));
        s->n++;
    }
    qsort(s->tensor, (size_t)s->n, sizeof *s->tensor, by_data);
    const unsigned char *end = p + 8 + hlen;
    for (int64_t i = 0; i < s->n; i++) {
        const lsa_st_tensor *t = &s->tensor[i];
        if (t->n_bytes == 0) continue;
        if ((const unsigned char *)t->data < end)
            LSA_FAIL(LSA_E_FORMAT, "%s: tensor '%.200s' overlaps another tensor's bytes", name, t->name);
        end = (const unsigned char *)t->data + t->n_bytes;
    }
    qsort(s->tensor, (size_t)s->n, sizeof *s->tensor, by_name);
    *out = s;
    s = NULL;
done:
    lsa_st_close(s);
    return st;
}

lsa_status lsa_st_open(lsa_st **out, const char *path, lsa_err *err) {
    lsa_map map;
    *out = NULL;
    lsa_status st = lsa_map_open(&map, path, err);
    if (st != LSA_OK) return st;
    st = lsa_st_open_memory(out, map.data, map.n_bytes, path, err);
    if (st == LSA_OK)
        (*out)->map = map;
    else
        lsa_map_close(&map);
    return st;
}

void lsa_st_close(lsa_st *s) {
    if (!s) return;
    lsa_map_close(&s->map);
    json_decref(s->header);
    lsa_free(s->tensor);
    lsa_free(s);
}

int64_t lsa_st_count(const lsa_st *s) {
    return s->n;
}

const lsa_st_tensor *lsa_st_at(const lsa_st *s, int64_t i) {
    return i >= 0 && i < s->n ? &s->tensor[i] : NULL;
}

const lsa_st_tensor *lsa_st_find(const lsa_st *s, const char *name) {
    int64_t lo = 0, hi = s->n;
    while (lo < hi) {
        int64_t mid = (lo + hi) / 2;
        int c = strcmp(s->tensor[mid].name, name);
        if (c == 0) return &s->tensor[mid];
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

static void shape_text(char *buf, size_t n, const int64_t *shape, int32_t n_dim) {
    size_t used = 0;
    buf[0] = 0;
    for (int32_t i = 0; i < n_dim && used + 24 < n; i++)
        used += (size_t)snprintf(buf + used, n - used, "%s%lld", i ? "," : "", (long long)shape[i]);
}

lsa_status lsa_st_need(const lsa_st_tensor **out, const lsa_st *s, const char *name, lsa_dtype dtype,
                       int32_t n_dim, const int64_t *shape, lsa_err *err) {
    const lsa_st_tensor *t = lsa_st_find(s, name);
    *out = NULL;
    if (!t) LSA_RET_FAIL(LSA_E_FORMAT, "tensor '%s' is missing", name);
    bool same = t->n_dim == n_dim;
    for (int32_t i = 0; same && i < n_dim; i++) same = shape[i] == -1 || shape[i] == t->shape[i];
    char want[128], got[128];
    shape_text(want, sizeof want, shape, n_dim);
    shape_text(got, sizeof got, t->shape, t->n_dim);
    if (t->dtype != dtype || !same)
        LSA_RET_FAIL(LSA_E_FORMAT, "tensor '%s': expected %s [%s], found %s [%s]", name,
                     lsa_dtype_name(dtype), want, lsa_dtype_name(t->dtype), got);
    *out = t;
    return LSA_OK;
}

const char *lsa_st_metadata(const lsa_st *s, const char *key) {
    return json_string_value(json_object_get(json_object_get(s->header, "__metadata__"), key));
}

lsa_status lsa_st_to_f32(float *dst, const lsa_st_tensor *t, lsa_err *err) {
    const unsigned char *p = t->data;
#define EACH(type, expr)                                                                                     \
    for (int64_t i = 0; i < t->n_elem; i++) {                                                                \
        type x;                                                                                              \
        memcpy(&x, p + (size_t)i * sizeof x, sizeof x);                                                      \
        dst[i] = (expr);                                                                                     \
    }                                                                                                        \
    return LSA_OK
    switch (t->dtype) {
    case LSA_F32:
        memcpy(dst, p, t->n_bytes);
        return LSA_OK;
    case LSA_F16:
        EACH(uint16_t, lsa_f16_to_f32(x));
    case LSA_BF16:
        EACH(uint16_t, lsa_bf16_to_f32(x));
    case LSA_F64:
        EACH(double, (float)x);
    case LSA_F8_E4M3:
        EACH(uint8_t, lsa_e4m3_to_f32(x));
    case LSA_F8_E8M0:
        EACH(uint8_t, lsa_e8m0_to_f32(x));
    case LSA_I32:
        EACH(int32_t, (float)x);
    case LSA_I64:
        EACH(int64_t, (float)x);
    case LSA_U8:
    case LSA_I8:
    case LSA_C64:
    case LSA_F4:
        break;
    }
#undef EACH
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "tensor '%.200s': %s cannot be read as float", t->name,
                 lsa_dtype_name(t->dtype));
}

static lsa_status entry_bytes(int64_t *out, const lsa_st_entry *e, lsa_err *err) {
    int64_t n = 1;
    for (int32_t i = 0; i < e->n_dim; i++)
        if (e->shape[i] < 0 || !lsa_mul_i64(n, e->shape[i], &n))
            LSA_RET_FAIL(LSA_E_BUG, "tensor '%s': bad shape", e->name);
    if (e->dtype == LSA_F4)
        *out = n / 2;
    else if (!lsa_mul_i64(n, (int64_t)lsa_dtype_bytes(e->dtype), out))
        LSA_RET_FAIL(LSA_E_BUG, "tensor '%s': size", e->name);
    return LSA_OK;
}

/* The header of entries, with its length before it and padded to 8 bytes: (*out)[*n], freed by lsa_free. */
static lsa_status make_header(char **out, size_t *n_bytes, const lsa_st_entry *entries, int64_t n,
                              const char *const *metadata, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *head = json_object();
    char *text = NULL;
    int64_t offset = 0;
    *out = NULL;
    if (metadata && metadata[0]) {
        json_t *m = json_object();
        for (int64_t i = 0; metadata[i]; i += 2)
            json_object_set_new(m, metadata[i], json_string(metadata[i + 1]));
        json_object_set_new(head, "__metadata__", m);
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t bytes;
        LSA_TRY(entry_bytes(&bytes, &entries[i], err));
        if (json_object_get(head, entries[i].name))
            LSA_FAIL(LSA_E_BUG, "tensor '%s' given twice", entries[i].name);
        json_t *shape = json_array();
        for (int32_t d = 0; d < entries[i].n_dim; d++)
            json_array_append_new(shape, json_integer(entries[i].shape[d]));
        json_object_set_new(head, entries[i].name,
                            json_pack("{s:s, s:o, s:[I,I]}", "dtype", lsa_dtype_name(entries[i].dtype),
                                      "shape", shape, "data_offsets", (json_int_t)offset,
                                      (json_int_t)(offset + bytes)));
        offset += bytes;
    }
    text = json_dumps(head, JSON_COMPACT);
    if (!text) LSA_FAIL(LSA_E_NOMEM, "cannot format a safetensors header");
    const size_t len = strlen(text), padded = (len + 7) / 8 * 8;
    LSA_TRY(LSA_NEW(*out, 8 + padded, err));
    for (int i = 0; i < 8; i++) (*out)[i] = (char)((uint64_t)padded >> (8 * i));
    memset(*out + 8, ' ', padded);
    memcpy(*out + 8, text, len);
    *n_bytes = 8 + padded;
done:
    free(text);
    json_decref(head);
    return st;
}

lsa_status lsa_st_save(const char *path, const lsa_st_entry *entries, int64_t n, const char *const *metadata,
                       lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_commit c = {.fd = -1};
    char *head = NULL;
    size_t n_head;
    LSA_TRY(make_header(&head, &n_head, entries, n, metadata, err));
    LSA_TRY(lsa_commit_begin(&c, path, err));
    LSA_TRY(lsa_commit_write(&c, head, n_head, err));
    for (int64_t i = 0; i < n; i++) {
        int64_t bytes;
        LSA_TRY(entry_bytes(&bytes, &entries[i], err));
        LSA_TRY(lsa_commit_write(&c, entries[i].data, (size_t)bytes, err));
    }
    LSA_TRY(lsa_commit_end(&c, err));
done:
    lsa_commit_abort(&c);
    lsa_free(head);
    return st;
}

lsa_status lsa_st_emit(lsa_sink *to, const lsa_tensor_out *t, int64_t n, const char *const *metadata,
                       lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_st_entry *e = NULL;
    char *head = NULL;
    size_t n_head;
    LSA_TRY(LSA_NEW(e, n, err));
    for (int64_t i = 0; i < n; i++) {
        e[i] = (lsa_st_entry){.name = t[i].name, .dtype = t[i].dtype, .n_dim = t[i].n_dim};
        memcpy(e[i].shape, t[i].shape, sizeof t[i].shape);
    }
    LSA_TRY(make_header(&head, &n_head, e, n, metadata, err));
    LSA_TRY(lsa_sink_put(to, head, n_head, err));
    for (int64_t i = 0; i < n; i++) {
        const int64_t begin = to->n_bytes;
        LSA_TRY(t[i].emit(&t[i], to, err));
        if (to->n_bytes - begin != lsa_tensor_out_bytes(&t[i]))
            LSA_FAIL(LSA_E_BUG, "tensor '%s' wrote another size than its shape", t[i].name);
    }
done:
    lsa_free(e);
    lsa_free(head);
    return st;
}
