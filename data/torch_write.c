/* Writer of torch.save archives: see torch_file.h. The pickle uses protocol 2 without a memo, which is all
 * that a dict of tensors needs; torch's restricted unpickler knows every opcode in it. */
#include <stdio.h>
#include <string.h>

#include "data/torch_file.h"
#include "data/zip.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"

typedef LSA_VEC(unsigned char) buffer;

static lsa_status add(buffer *b, const void *data, size_t n, lsa_err *err) {
    const lsa_status st = LSA_VEC_RESERVE(*b, b->len + (int64_t)n, err);
    if (st != LSA_OK) return st;
    memcpy(b->data + b->len, data, n);
    b->len += (int64_t)n;
    return LSA_OK;
}
static lsa_status add_string(buffer *b, const char *s, lsa_err *err) {
    return add(b, s, strlen(s), err);
}
/* BINUNICODE */
static lsa_status add_text(buffer *b, const char *s, lsa_err *err) {
    const size_t n = strlen(s);
    const unsigned char head[5] = {'X', (unsigned char)n, (unsigned char)(n >> 8), 0, 0};
    const lsa_status st = add(b, head, 5, err);
    return st == LSA_OK ? add(b, s, n, err) : st;
}
/* BININT up to 2^31 - 1, else LONG1 of 8 bytes */
static lsa_status add_int(buffer *b, int64_t v, lsa_err *err) {
    unsigned char c[10] = {0x8a, 8};
    for (int i = 0; i < 8; i++) c[2 + i] = (unsigned char)((uint64_t)v >> (8 * i));
    if (v > INT32_MAX) return add(b, c, 10, err);
    c[1] = 'J';
    return add(b, c + 1, 5, err);
}

static const char *storage_type(lsa_dtype t) {
    return t == LSA_F32    ? "FloatStorage"
           : t == LSA_F16  ? "HalfStorage"
           : t == LSA_BF16 ? "BFloat16Storage"
           : t == LSA_C64  ? "ComplexFloatStorage"
                           : NULL;
}

#define ORDERED_DICT "ccollections\nOrderedDict\n)R"

/* _rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict()) */
static lsa_status add_tensor(buffer *b, const lsa_tensor_out *t, int64_t key, lsa_err *err) {
    lsa_status st = LSA_OK;
    char text[64];
    int64_t n = 1;
    for (int32_t i = 0; i < t->n_dim; i++) n *= t->shape[i];
    if (!storage_type(t->dtype) || t->n_dim < 1)
        LSA_FAIL(LSA_E_BUG, "tensor '%s': %s has no torch storage here", t->name, lsa_dtype_name(t->dtype));
    LSA_TRY(add_text(b, t->name, err));
    LSA_TRY(add_string(b, "ctorch._utils\n_rebuild_tensor_v2\n((", err));
    LSA_TRY(add_text(b, "storage", err));
    snprintf(text, sizeof text, "ctorch\n%s\n", storage_type(t->dtype));
    LSA_TRY(add_string(b, text, err));
    snprintf(text, sizeof text, "%lld", (long long)key);
    LSA_TRY(add_text(b, text, err));
    LSA_TRY(add_text(b, "cpu", err));
    LSA_TRY(add_int(b, n, err));
    LSA_TRY(add_string(b, "tQ", err));
    LSA_TRY(add_int(b, 0, err));
    LSA_TRY(add_string(b, "(", err));
    for (int32_t i = 0; i < t->n_dim; i++) LSA_TRY(add_int(b, t->shape[i], err));
    LSA_TRY(add_string(b, "t(", err));
    for (int32_t i = 0; i < t->n_dim; i++) {
        int64_t stride = 1;
        for (int32_t k = i + 1; k < t->n_dim; k++) stride *= t->shape[k];
        LSA_TRY(add_int(b, stride, err));
    }
    LSA_TRY(add_string(b, "t\x89" ORDERED_DICT "tR", err));
done:
    return st;
}

static lsa_status emit_tensor(const void *arg, lsa_sink *to, lsa_err *err) {
    const lsa_tensor_out *t = arg;
    return t->emit(t, to, err);
}

/* The first tensor that shares the storage of tensor i. */
static int64_t owner(const lsa_tensor_out *t, int64_t i) {
    int64_t k = 0;
    while (t[k].src != t[i].src || t[k].emit != t[i].emit) k++;
    return k;
}

lsa_status lsa_torch_emit(lsa_sink *to, const char *dir, const lsa_tensor_out *t, int64_t n, const char *note,
                          lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_zip_out z = {.to = to};
    buffer b = {0};
    char name[LSA_ZIP_NAME_MAX], id[48];
#define NAME(...) (snprintf(name, sizeof name, __VA_ARGS__), name)
    LSA_TRY(add_string(&b, "\x80\x02" ORDERED_DICT "(", err));
    for (int64_t i = 0; i < n; i++) LSA_TRY(add_tensor(&b, &t[i], owner(t, i), err));
    LSA_TRY(add_string(&b, "u.", err));
    LSA_TRY(lsa_zip_add_bytes(&z, NAME("%s/data.pkl", dir), b.data, (size_t)b.len, err));
    LSA_TRY(lsa_zip_add_bytes(&z, NAME("%s/byteorder", dir), "little", 6, err));
    if (note) LSA_TRY(lsa_zip_add_bytes(&z, NAME("%s/extra/lsa.json", dir), note, strlen(note), err));
    for (int64_t i = 0; i < n; i++)
        if (owner(t, i) == i)
            LSA_TRY(lsa_zip_add(&z, NAME("%s/data/%lld", dir, (long long)i), emit_tensor, &t[i], err));
    LSA_TRY(lsa_zip_add_bytes(&z, NAME("%s/version", dir), "3\n", 2, err));
    /* torch writes 40 digits made of the entries' names and CRCs; any text that follows from the content will
     * do */
    uint64_t h = lsa_xxh64(b.data, (size_t)b.len);
    for (int64_t i = 0; i < z.n; i++) h = lsa_xxh64((uint64_t[]){h, z.entry[i].crc}, 16);
    snprintf(id, sizeof id, "%040llu", (unsigned long long)h);
    LSA_TRY(lsa_zip_add_bytes(&z, NAME("%s/.data/serialization_id", dir), id, 40, err));
    LSA_TRY(lsa_zip_end(&z, err));
#undef NAME
done:
    lsa_zip_out_fini(&z);
    lsa_free(b.data);
    return st;
}
