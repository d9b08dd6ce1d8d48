/* XXH64 of memory and files (libxxhash, header-only use), hex form 16 lower-case digits; CRC-32 (zlib) where
 * a reader without libxxhash must check what we wrote. */
#ifndef LSA_KERNELS_CORE_HASH_H
#define LSA_KERNELS_CORE_HASH_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

uint64_t lsa_xxh64(const void *data, size_t n_bytes);
/* Of pieces laid end to end. */
typedef struct lsa_piece {
    const void *data;
    int64_t n_bytes;
} lsa_piece;
uint64_t lsa_xxh64_pieces(const lsa_piece *piece, int64_t n);
/* Of n_bytes of an open file from `offset` on; `what` names it. LSA_E_FORMAT if they are not all there. */
LSA_NODISCARD lsa_status lsa_xxh64_range(uint64_t *out, int fd, int64_t offset, int64_t n_bytes,
                                         const char *what, lsa_err *err);
/* Whole file; LSA_E_IO names the path. */
LSA_NODISCARD lsa_status lsa_xxh64_file(uint64_t *out, const char *path, lsa_err *err);
/* CRC-32 as of zip and PNG; `crc` is 0 or that of the bytes before. */
uint32_t lsa_crc32(uint32_t crc, const void *data, size_t n_bytes);
LSA_NODISCARD lsa_status lsa_crc32_file(uint32_t *out, const char *path, lsa_err *err);
void lsa_hex64(char out[17], uint64_t h);
/* Parses exactly 16 hex digits; LSA_E_FORMAT otherwise. */
LSA_NODISCARD lsa_status lsa_unhex64(uint64_t *out, const char *s, lsa_err *err);

#endif
