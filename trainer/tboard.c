/* TFRecord framing (length, masked CRC32C of the length, data, masked CRC32C of the data) around Event
 * protobufs with the fields wall_time = 1 (double), step = 2 (varint), file_version = 3 (string), summary = 5
 * {value = 1 {tag = 1, simple_value = 2}}. */
#include "trainer/tboard.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "kernels/core/file.h"

static uint32_t crc32c(const unsigned char *p, size_t n) {
    uint32_t c = 0xffffffffu;
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++) c = c >> 1 ^ (c & 1 ? 0x82f63b78u : 0);
    }
    return ~c;
}
static uint32_t masked(const unsigned char *p, size_t n) {
    const uint32_t c = crc32c(p, n);
    return (c >> 15 | c << 17) + 0xa282ead8u;
}

static size_t varint(unsigned char *p, uint64_t v) {
    size_t n = 0;
    while (v > 127) {
        p[n++] = (unsigned char)(v | 128);
        v >>= 7;
    }
    p[n++] = (unsigned char)v;
    return n;
}

static void record(FILE *f, const unsigned char *data, size_t n) {
    unsigned char len[8];
    uint64_t v = n;
    memcpy(len, &v, 8);
    uint32_t a = masked(len, 8), b = masked(data, n);
    fwrite(len, 1, 8, f);
    fwrite(&a, 1, 4, f);
    fwrite(data, 1, n, f);
    fwrite(&b, 1, 4, f);
    fflush(f);
}

static size_t head(unsigned char *p) {
    const double now = (double)time(NULL);
    p[0] = 1 << 3 | 1;
    memcpy(p + 1, &now, 8);
    return 9;
}

lsa_status lsa_tboard_open(lsa_tboard *t, const char *dir, lsa_err *err) {
    char path[LSA_PATH_MAX];
    t->f = NULL;
    lsa_status st = lsa_mkdirs(dir, err);
    if (st == LSA_OK) st = lsa_path(path, err, "%s/events.out.tfevents.%lld.lsa", dir, (long long)time(NULL));
    if (st != LSA_OK) return st;
    t->f = fopen(path, "ab");
    if (!t->f) LSA_RET_FAIL(lsa_status_from_errno(errno), "cannot create '%s': %s", path, strerror(errno));
    unsigned char e[64];
    size_t n = head(e);
    e[n++] = 3 << 3 | 2;
    e[n++] = 13;
    memcpy(e + n, "brain.Event:2", 13);
    record(t->f, e, n + 13);
    return LSA_OK;
}

void lsa_tboard_scalar(lsa_tboard *t, const char *tag, int64_t step, double value) {
    unsigned char v[160], e[256];
    const size_t len = strlen(tag) < 96 ? strlen(tag) : 96;
    const float f = (float)value;
    size_t n = 0;
    if (!t->f) return;
    v[n++] = 1 << 3 | 2;
    n += varint(v + n, len);
    memcpy(v + n, tag, len);
    n += len;
    v[n++] = 2 << 3 | 5;
    memcpy(v + n, &f, 4);
    n += 4;
    size_t k = head(e);
    e[k++] = 2 << 3;
    k += varint(e + k, (uint64_t)step);
    e[k++] = 5 << 3 | 2;
    k += varint(e + k, n + 1 + (n > 127 ? 2 : 1));
    e[k++] = 1 << 3 | 2;
    k += varint(e + k, n);
    memcpy(e + k, v, n);
    record(t->f, e, k + n);
}

void lsa_tboard_close(lsa_tboard *t) {
    if (t->f) fclose(t->f);
    t->f = NULL;
}
