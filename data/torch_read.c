/* Reader of torch.save archives: see torch_file.h. The pickle says names, shapes and storage keys; the
 * archive says where the bytes are; a tensor is handed out only when both agree about the storage's size. */
#include <stdio.h>
#include <string.h>

#include "data/pickle.h"
#include "data/torch_file.h"
#include "data/zip.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

struct lsa_torch {
    lsa_map map; /* unused for memory */
    char where[256];
    lsa_zip zip;
    lsa_pickle_tensor *entry; /* owns the names */
    lsa_st_tensor *tensor;
    const lsa_zip_entry **storage; /* of each tensor */
    const lsa_zip_entry *note;
    int64_t n;
};

/* The folder of the archive: what stands before /data.pkl, which is there once. */
static lsa_status find_dir(char dir[LSA_ZIP_NAME_MAX], const lsa_torch *t, lsa_err *err) {
    static const char tail[] = "/data.pkl";
    int found = 0;
    for (int64_t i = 0; i < t->zip.n; i++) {
        const char *name = t->zip.entry[i].name;
        const size_t n = strlen(name), k = sizeof tail - 1;
        if (n <= k || strcmp(name + n - k, tail)) continue;
        memcpy(dir, name, n - k);
        dir[n - k] = 0;
        found++;
    }
    if (found != 1)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: a zip archive with %d entries */data.pkl; torch.save writes one",
                     t->where, found);
    return LSA_OK;
}

static const lsa_zip_entry *entry_of(const lsa_torch *t, const char *dir, const char *name) {
    char full[2 * LSA_ZIP_NAME_MAX];
    snprintf(full, sizeof full, "%s/%s", dir, name);
    return lsa_zip_find(&t->zip, full);
}

static lsa_status place(lsa_torch *t, int64_t i, const char *dir, lsa_err *err) {
    const lsa_pickle_tensor *p = &t->entry[i];
    lsa_st_tensor *x = &t->tensor[i];
    char name[64];
    int64_t bytes;
    const int64_t width = (int64_t)lsa_dtype_bytes(p->dtype);
    snprintf(name, sizeof name, "data/%s", p->storage);
    const lsa_zip_entry *e = entry_of(t, dir, name);
    if (!e)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: tensor '%s': the archive has no storage %s", t->where, p->name, name);
    if (!lsa_mul_i64(p->storage_n, width, &bytes) || (uint64_t)bytes != e->size)
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "%s: tensor '%s': %lld elements of %s need not the %llu bytes of storage %s", t->where,
                     p->name, (long long)p->storage_n, lsa_dtype_name(p->dtype), (unsigned long long)e->size,
                     name);
    *x = (lsa_st_tensor){.name = p->name,
                         .dtype = p->dtype,
                         .n_dim = p->n_dim,
                         .n_elem = p->n_elem,
                         .n_bytes = (size_t)(p->n_elem * width),
                         .data = e->data + p->offset * width};
    memcpy(x->shape, p->shape, sizeof p->shape);
    t->storage[i] = e;
    return LSA_OK;
}

lsa_status lsa_torch_open_memory(lsa_torch **out, const void *data, size_t n_bytes, const char *name,
                                 lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_torch *t = NULL;
    char dir[LSA_ZIP_NAME_MAX];
    *out = NULL;
    LSA_TRY(LSA_NEW(t, 1, err));
    snprintf(t->where, sizeof t->where, "%.250s", name);
    LSA_TRY(lsa_zip_open(&t->zip, data, n_bytes, t->where, err));
    LSA_TRY(find_dir(dir, t, err));
    const lsa_zip_entry *order = entry_of(t, dir, "byteorder"), *pickle = entry_of(t, dir, "data.pkl");
    if (order && (order->size != 6 || memcmp(order->data, "little", 6)))
        LSA_FAIL(LSA_E_UNSUPPORTED, "%s: written on a big-endian machine", t->where);
    LSA_TRY(lsa_zip_check(pickle, t->where, err));
    LSA_TRY(lsa_pickle_tensors(&t->entry, &t->n, pickle->data, pickle->size, t->where, err));
    LSA_TRY(LSA_NEW(t->tensor, t->n, err));
    LSA_TRY(lsa_alloc_((void **)&t->storage, t->n, sizeof(void *), "storages", err));
    for (int64_t i = 0; i < t->n; i++) LSA_TRY(place(t, i, dir, err));
    t->note = entry_of(t, dir, "extra/lsa.json");
    if (t->note) LSA_TRY(lsa_zip_check(t->note, t->where, err));
    *out = t;
    t = NULL;
done:
    lsa_torch_close(t);
    return st;
}

lsa_status lsa_torch_open(lsa_torch **out, const char *path, lsa_err *err) {
    lsa_map map;
    *out = NULL;
    lsa_status st = lsa_map_open(&map, path, err);
    if (st != LSA_OK) return st;
    st = lsa_torch_open_memory(out, map.data, map.n_bytes, path, err);
    if (st == LSA_OK)
        (*out)->map = map;
    else
        lsa_map_close(&map);
    return st;
}

void lsa_torch_close(lsa_torch *t) {
    if (!t) return;
    lsa_zip_close(&t->zip);
    lsa_map_close(&t->map);
    lsa_free(t->entry);
    lsa_free(t->tensor);
    lsa_free((void *)t->storage);
    lsa_free(t);
}

int64_t lsa_torch_count(const lsa_torch *t) {
    return t->n;
}

const lsa_st_tensor *lsa_torch_at(const lsa_torch *t, int64_t i) {
    return i >= 0 && i < t->n ? &t->tensor[i] : NULL;
}

const lsa_st_tensor *lsa_torch_find(const lsa_torch *t, const char *name) {
    for (int64_t i = 0; i < t->n; i++)
        if (!strcmp(t->tensor[i].name, name)) return &t->tensor[i];
    return NULL;
}

const char *lsa_torch_note(const lsa_torch *t, size_t *n_bytes) {
    *n_bytes = t->note ? t->note->size : 0;
    return t->note ? (const char *)t->note->data : NULL;
}

lsa_status lsa_torch_to_f32(float *dst, const lsa_torch *t, const lsa_st_tensor *x, lsa_err *err) {
    const lsa_status st = lsa_zip_check(t->storage[x - t->tensor], t->where, err);
    return st == LSA_OK ? lsa_st_to_f32(dst, x, err) : st;
}
