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

#include "kernels/core/file.h"
#include "kernels/core/num.h"

uint64_t lsa_xxh64(const void *data, size_t n_bytes) {
    return XXH64(data, n_bytes, 0);
}

uint32_t lsa_crc32(uint32_t crc, const void *data, size_t n_bytes) {
    return (uint32_t)crc32_z(crc, data, n_bytes);
}

uint64_t lsa_xxh64_pieces(const lsa_piece *piece, int64_t n) {
    XXH64_state_t s;
    XXH64_reset(&s, 0);
    for (int64_t i = 0; i < n; i++)
        if (piece[i].n_bytes) XXH64_update(&s, piece[i].data, (size_t)piece[i].n_bytes);
    return XXH64_digest(&s);
}

/* Small enough to stay in a core's cache between the copy and the hash. */
static _Thread_local unsigned char g_block[1 << 18];

lsa_status lsa_xxh64_range(uint64_t *out, int fd, int64_t offset, int64_t n_bytes, const char *what,
                           lsa_err *err) {
    XXH64_state_t s;
    XXH64_reset(&s, 0);
    *out = 0;
    for (int64_t n; n_bytes > 0; offset += n, n_bytes -= n) {
        n = lsa_min_i64(n_bytes, sizeof g_block);
        const lsa_status st = lsa_pread_all(fd, g_block, (size_t)n, offset, what, err);
        if (st != LSA_OK) return st;
        XXH64_update(&s, g_block, (size_t)n);
    }
    *out = XXH64_digest(&s);
    return LSA_OK;
}

/* Calls update(state, block) over a whole file. */
static lsa_status each_block(const char *path, void (*update)(void *, const void *, size_t), void *state,
                             lsa_err *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) LSA_RET_FAIL(LSA_E_IO, "cannot open '%s': %s", path, strerror(errno));
    for (;;) {
        ssize_t n = read(fd, g_block, sizeof g_block);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            lsa_status st =
                lsa_err_set(err, LSA_E_IO, __FILE__, __LINE__, "cannot read '%s': %s", path, strerror(errno));
            close(fd);
            return st;
        }
        if (n == 0) break;
        update(state, g_block, (size_t)n);
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
