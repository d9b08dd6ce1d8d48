/* Stored zip archives: see zip.h. Both sides are sequential over little-endian records.
 *
 * The mistake that would stay silent: believing the central directory alone. The data's place follows from
 * the local header, whose extra field may have another length, so both are read and must agree. */
#include "data/zip.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/core/hash.h"
#include "kernels/core/mem.h"

enum {
    LOCAL = 30,
    CENTRAL = 46,
    END = 22,
    END64 = 56,
    LOCATOR = 20,
    ALIGN = 64,
    VERSION = 20,
    VERSION64 = 45
};
#define SIG_LOCAL   0x04034b50u
#define SIG_CENTRAL 0x02014b50u
#define SIG_END     0x06054b50u
#define SIG_END64   0x06064b50u
#define SIG_LOCATOR 0x07064b50u
#define DATE_1980   0x0021u
#define MAX32       0xffffffffu
#define MAX16       0xffffu

/* ---- writer ---- */

void lsa_zip_out_fini(lsa_zip_out *z) {
    lsa_free(z->entry);
    z->entry = NULL;
    z->n = z->cap = 0;
}

typedef struct field {
    uint64_t v;
    int width;
} field;

static lsa_status put_fields(lsa_sink *to, const field *f, int n, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int i = 0; st == LSA_OK && i < n; i++) st = lsa_sink_uint(to, f[i].v, f[i].width, err);
    return st;
}
#define PUT(to, ...)                                                                                         \
    put_fields(to, (const field[]){__VA_ARGS__},                                                             \
               (int)(sizeof((const field[]){__VA_ARGS__}) / sizeof(field)), err)

lsa_status lsa_zip_add(lsa_zip_out *z, const char *name,
                       lsa_status (*emit)(const void *, lsa_sink *, lsa_err *), const void *arg,
                       lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_zip_entry e = {.offset = (uint64_t)z->to->n_bytes};
    const size_t n_name = strlen(name);
    lsa_sink crc = lsa_sink_crc(&e.crc);
    if (n_name >= sizeof e.name) LSA_FAIL(LSA_E_BUG, "zip entry name '%.80s...' is too long", name);
    memcpy(e.name, name, n_name + 1);
    LSA_TRY(emit(arg, &crc, err));
    e.size = (uint64_t)crc.n_bytes;
    const bool big = e.size >= MAX32;
    const uint64_t head = LOCAL + n_name + (big ? 20 : 0) + 4; /* 4: id and length of the padding field */
    const uint64_t pad = (ALIGN - (e.offset + head) % ALIGN) % ALIGN, size32 = big ? MAX32 : e.size;
    LSA_TRY(PUT(z->to, {SIG_LOCAL, 4}, {big ? VERSION64 : VERSION, 2}, {0, 2}, {0, 2}, {0, 2}, {DATE_1980, 2},
                {e.crc, 4}, {size32, 4}, {size32, 4}, {n_name, 2}, {head + pad - LOCAL - n_name, 2}));
    LSA_TRY(lsa_sink_put(z->to, name, n_name, err));
    if (big) LSA_TRY(PUT(z->to, {1, 2}, {16, 2}, {e.size, 8}, {e.size, 8}));
    LSA_TRY(PUT(z->to, {'F' | 'B' << 8, 2}, {pad, 2}));
    LSA_TRY(lsa_sink_zeros(z->to, (int64_t)pad, err));
    const int64_t begin = z->to->n_bytes;
    LSA_TRY(emit(arg, z->to, err));
    if ((uint64_t)(z->to->n_bytes - begin) != e.size)
        LSA_FAIL(LSA_E_BUG, "zip entry '%s' changed its size while it was written", name);
    LSA_TRY(lsa_grow_((void **)&z->entry, &z->cap, z->n + 1, sizeof e, "zip directory", err));
    z->entry[z->n++] = e;
done:
    return st;
}

typedef struct bytes {
    const void *data;
    size_t n;
} bytes;

static lsa_status emit_bytes(const void *arg, lsa_sink *to, lsa_err *err) {
    const bytes *b = arg;
    return lsa_sink_put(to, b->data, b->n, err);
}

lsa_status lsa_zip_add_bytes(lsa_zip_out *z, const char *name, const void *data, size_t n_bytes,
                             lsa_err *err) {
    return lsa_zip_add(z, name, emit_bytes, &(bytes){data, n_bytes}, err);
}

static lsa_status put_central(lsa_sink *to, const lsa_zip_entry *e, lsa_err *err) {
    lsa_status st = LSA_OK;
    const bool size = e->size >= MAX32, offset = e->offset >= MAX32;
    const unsigned extra = (size ? 16u : 0) + (offset ? 8u : 0), version = extra ? VERSION64 : VERSION;
    const uint64_t size32 = size ? MAX32 : e->size, n_name = strlen(e->name);
    LSA_TRY(PUT(to, {SIG_CENTRAL, 4}, {version, 2}, {version, 2}, {0, 2}, {0, 2}, {0, 2}, {DATE_1980, 2},
                {e->crc, 4}, {size32, 4}, {size32, 4}, {n_name, 2}, {extra ? extra + 4 : 0, 2}, {0, 2},
                {0, 2}, {0, 2}, {0, 4}, {offset ? MAX32 : e->offset, 4}));
    LSA_TRY(lsa_sink_put(to, e->name, n_name, err));
    if (extra) LSA_TRY(PUT(to, {1, 2}, {extra, 2}));
    if (size) LSA_TRY(PUT(to, {e->size, 8}, {e->size, 8}));
    if (offset) LSA_TRY(PUT(to, {e->offset, 8}));
done:
    return st;
}

lsa_status lsa_zip_end(lsa_zip_out *z, lsa_err *err) {
    lsa_status st = LSA_OK;
    const uint64_t begin = (uint64_t)z->to->n_bytes, n = (uint64_t)z->n;
    for (int64_t i = 0; i < z->n; i++) LSA_TRY(put_central(z->to, &z->entry[i], err));
    const uint64_t end = (uint64_t)z->to->n_bytes, size = end - begin;
    const bool big = begin >= MAX32 || size >= MAX32 || n >= MAX16;
    if (big) {
        LSA_TRY(PUT(z->to, {SIG_END64, 4}, {END64 - 12, 8}, {VERSION64, 2}, {VERSION64, 2}, {0, 4}, {0, 4},
                    {n, 8}, {n, 8}, {size, 8}, {begin, 8}));
        LSA_TRY(PUT(z->to, {SIG_LOCATOR, 4}, {0, 4}, {end, 8}, {1, 4}));
    }
    const uint64_t n16 = n >= MAX16 ? MAX16 : n;
    LSA_TRY(PUT(z->to, {SIG_END, 4}, {0, 2}, {0, 2}, {n16, 2}, {n16, 2}, {size >= MAX32 ? MAX32 : size, 4},
                {begin >= MAX32 ? MAX32 : begin, 4}, {0, 2}));
done:
    lsa_zip_out_fini(z);
    return st;
}

/* ---- reader ---- */

static uint64_t get(const unsigned char *p, int width) {
    uint64_t v = 0;
    for (int i = width; i-- > 0;) v = v << 8 | p[i];
    return v;
}

typedef struct directory {
    uint64_t begin, size, count;
} directory;

static lsa_status find_directory(directory *d, const unsigned char *p, uint64_t n, const char *where,
                                 lsa_err *err) {
    if (n < END)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: %llu bytes are too few for a zip archive", where,
                     (unsigned long long)n);
    uint64_t at = n - END;
    for (const uint64_t low = n - END > MAX16 ? n - END - MAX16 : 0;
         get(p + at, 4) != SIG_END || get(p + at + 20, 2) != n - at - END; at--)
        if (at == low)
            LSA_RET_FAIL(
                LSA_E_FORMAT,
                "%s: no end of a zip directory: truncated, or a file of torch.save's old format (save it again with "
                "a current torch)",
                where);
    uint64_t disk = get(p + at + 4, 2) | get(p + at + 6, 2), limit = at;
    *d = (directory){get(p + at + 16, 4), get(p + at + 12, 4), get(p + at + 10, 2)};
    if (at >= LOCATOR && get(p + at - LOCATOR, 4) == SIG_LOCATOR) {
        const uint64_t e = get(p + at - LOCATOR + 8, 8);
        if (at < LOCATOR + END64 || e > at - LOCATOR - END64 || get(p + e, 4) != SIG_END64)
            LSA_RET_FAIL(LSA_E_FORMAT, "%s: the zip64 end of the directory is not where its locator says",
                         where);
        *d = (directory){get(p + e + 48, 8), get(p + e + 40, 8), get(p + e + 32, 8)};
        disk = get(p + e + 16, 4) | get(p + e + 20, 4);
        limit = e;
    }
    if (disk) LSA_RET_FAIL(LSA_E_FORMAT, "%s: a zip archive of several disks cannot be read", where);
    if (d->begin > limit || d->size > limit - d->begin || d->count > d->size / CENTRAL)
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "%s: the zip directory (%llu entries, %llu bytes at %llu) does not fit the file", where,
                     (unsigned long long)d->count, (unsigned long long)d->size, (unsigned long long)d->begin);
    return LSA_OK;
}

/* Replaces sizes and offset that say "see zip64" from the extra field x[n]. */
static bool read_zip64(uint64_t *usize, uint64_t *csize, uint64_t *offset, const unsigned char *x,
                       uint64_t n) {
    uint64_t *want[3];
    int n_want = 0;
    if (*usize == MAX32) want[n_want++] = usize;
    if (*csize == MAX32) want[n_want++] = csize;
    if (*offset == MAX32) want[n_want++] = offset;
    for (uint64_t at = 0; n_want && at + 4 <= n;) {
        const uint64_t id = get(x + at, 2), len = get(x + at + 2, 2);
        if (len > n - at - 4) return false;
        if (id == 1) {
            if (len < 8 * (uint64_t)n_want) return false;
            for (int i = 0; i < n_want; i++) *want[i] = get(x + at + 4 + 8 * i, 8);
            return true;
        }
        at += 4 + len;
    }
    return n_want == 0;
}

/* Places e->data by the local header. `limit`: where the directory begins. */
static lsa_status read_local(lsa_zip_entry *e, const unsigned char *p, uint64_t limit, const char *where,
                             lsa_err *err) {
    const uint64_t n_name = strlen(e->name);
    if (limit < LOCAL || e->offset > limit - LOCAL || get(p + e->offset, 4) != SIG_LOCAL)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: entry '%s': no local header at %llu", where, e->name,
                     (unsigned long long)e->offset);
    const unsigned char *h = p + e->offset;
    const uint64_t left = limit - e->offset - LOCAL, skip = get(h + 26, 2) + get(h + 28, 2);
    if (skip > left || get(h + 26, 2) != n_name || memcmp(h + LOCAL, e->name, n_name) || get(h + 8, 2) != 0)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: entry '%s': its local header does not agree with the directory",
                     where, e->name);
    if (e->size > left - skip)
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "%s: entry '%s': %llu bytes do not fit the file; it is truncated or damaged", where,
                     e->name, (unsigned long long)e->size);
    e->data = h + LOCAL + skip;
    return LSA_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const lsa_zip_entry *)a)->name, ((const lsa_zip_entry *)b)->name);
}

void lsa_zip_close(lsa_zip *z) {
    lsa_free(z->entry);
    z->entry = NULL;
    z->n = 0;
}

lsa_status lsa_zip_open(lsa_zip *out, const void *data, size_t n_bytes, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    const unsigned char *p = data;
    directory d = {0};
    *out = (lsa_zip){0};
    LSA_TRY(find_directory(&d, p, n_bytes, where, err));
    LSA_TRY(LSA_NEW(out->entry, d.count, err));
    const unsigned char *c = p + d.begin;
    for (uint64_t left = d.size; (uint64_t)out->n < d.count; out->n++) {
        lsa_zip_entry *e = &out->entry[out->n];
        if (left < CENTRAL || get(c, 4) != SIG_CENTRAL)
            LSA_FAIL(LSA_E_FORMAT, "%s: zip directory entry %lld is damaged", where, (long long)out->n);
        const uint64_t flags = get(c + 8, 2), method = get(c + 10, 2), n_name = get(c + 28, 2),
                       n_extra = get(c + 30, 2), all = CENTRAL + n_name + n_extra + get(c + 32, 2);
        uint64_t csize = get(c + 20, 4);
        e->size = get(c + 24, 4), e->offset = get(c + 42, 4), e->crc = (uint32_t)get(c + 16, 4);
        if (all > left || n_name >= sizeof e->name || memchr(c + CENTRAL, 0, n_name))
            LSA_FAIL(LSA_E_FORMAT, "%s: zip directory entry %lld: bad name or length", where,
                     (long long)out->n);
        memcpy(e->name, c + CENTRAL, n_name);
        if (method != 0 || (flags & 1))
            LSA_FAIL(LSA_E_FORMAT,
                     "%s: entry '%s' is %s; torch.save stores its entries plainly: save it again", where,
                     e->name, flags & 1 ? "encrypted" : "compressed");
        if (!read_zip64(&e->size, &csize, &e->offset, c + CENTRAL + n_name, n_extra) || csize != e->size)
            LSA_FAIL(LSA_E_FORMAT, "%s: entry '%s': its sizes do not agree", where, e->name);
        LSA_TRY(read_local(e, p, d.begin, where, err));
        c += all, left -= all;
    }
    if (out->n) qsort(out->entry, (size_t)out->n, sizeof *out->entry, by_name);
    for (int64_t i = 1; i < out->n; i++)
        if (!strcmp(out->entry[i - 1].name, out->entry[i].name))
            LSA_FAIL(LSA_E_FORMAT, "%s: entry '%s' is there twice", where, out->entry[i].name);
done:
    if (st != LSA_OK) lsa_zip_close(out);
    return st;
}

const lsa_zip_entry *lsa_zip_find(const lsa_zip *z, const char *name) {
    lsa_zip_entry key = {0};
    if (strlen(name) >= sizeof key.name || z->n == 0) return NULL;
    memcpy(key.name, name, strlen(name) + 1);
    return bsearch(&key, z->entry, (size_t)z->n, sizeof *z->entry, by_name);
}

lsa_status lsa_zip_check(const lsa_zip_entry *e, const char *where, lsa_err *err) {
    const uint32_t crc = lsa_crc32(0, e->data, e->size);
    if (crc != e->crc)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: entry '%s': CRC is %08x, recorded %08x: the file is damaged", where,
                     e->name, crc, e->crc);
    return LSA_OK;
}
