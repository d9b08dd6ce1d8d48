/* XXH64 over libxxhash, CRC-32 over zlib. */
#include "kernels/core/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>
#include <zlib.h>

uint64_t lsa_xxh64(const void *data, size_t n_bytes) {
    return XXH64(data, n_bytes, 0);
}

uint32_t lsa_crc32(uint32_t crc, const void *data, size_t n_bytes) {
    return (uint32_t)crc32_z(crc, data, n_bytes);
}

/* Calls update(state, block) over a whole file. */
static lsa_status each_block(const char *path, void (*update)(void *, const void *, size_t), void *state,
                             lsa_err *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) LSA_RET_FAIL(LSA_E_IO, "cannot open '%s': %s", path, strerror(errno));
    static _Thread_local unsigned char buf[1 << 18];
    for (;;) {
        ssize_t n = read(fd, buf, sizeof buf);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            lsa_status st =
                lsa_err_set(err, LSA_E_IO, __FILE__, __LINE__, "cannot read '%s': %s", path, strerror(errno));
            close(fd);
            return st;
        }
        if (n == 0) break;
        update(state, buf, (size_t)n);
    }
    close(fd);
    return LSA_OK;
}

static void update_xxh64(void *s, const void *p, size_t n) {
    XXH64_update(s, p, n);
}
static void update_crc32(void *s, const void *p, size_t n) {
    uint32_t *crc = s;
    *crc = lsa_crc32(*crc, p, n);
}

lsa_status lsa_xxh64_file(uint64_t *out, const char *path, lsa_err *err) {
    XXH64_state_t s;
    XXH64_reset(&s, 0);
    const lsa_status st = each_block(path, update_xxh64, &s, err);
    *out = st == LSA_OK ? XXH64_digest(&s) : 0;
    return st;
}

lsa_status lsa_crc32_file(uint32_t *out, const char *path, lsa_err *err) {
    *out = 0;
    return each_block(path, update_crc32, out, err);
}

void lsa_hex64(char out[17], uint64_t h) {
    snprintf(out, 17, "%016llx", (unsigned long long)h);
}

lsa_status lsa_unhex64(uint64_t *out, const char *s, lsa_err *err) {
    *out = 0;
    for (int i = 0; i < 16; i++) {
        char c = s ? s[i] : 0;
        uint64_t d;
        if (c >= '0' && c <= '9')
            d = (uint64_t)(c - '0');
        else if (c >= 'a' && c <= 'f')
            d = (uint64_t)(c - 'a' + 10);
        else
            LSA_RET_FAIL(LSA_E_FORMAT, "hash '%.20s' is not 16 lower-case hex digits", s ? s : "");
        *out = *out << 4 | d;
    }
    if (s[16]) LSA_RET_FAIL(LSA_E_FORMAT, "hash '%.20s' is longer than 16 hex digits", s);
    return LSA_OK;
}
