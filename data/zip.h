/* Stored zip archives, the container of torch.save: a sequential writer with aligned data, and a reader over
 * a map.
 *
 * Only what such an archive needs: method 0 (stored), no encryption, one disk, zip64 where a size, an offset
 * or a count asks for it. Equal input gives equal bytes (the date is 1980-01-01). APPNOTE.TXT 6.3
 * sections 4.3 to 4.5. */
#ifndef LSA_DATA_ZIP_H
#define LSA_DATA_ZIP_H

#include <stddef.h>
#include <stdint.h>

#include "data/sink.h"
#include "kernels/core/lsa_status.h"

#define LSA_ZIP_NAME_MAX 256

typedef struct lsa_zip_entry {
    char name[LSA_ZIP_NAME_MAX];
    uint64_t size, offset;     /* of the data; of the local header (writer) */
    uint32_t crc;              /* CRC-32 as recorded */
    const unsigned char *data; /* reader: borrowed from the map */
} lsa_zip_entry;

/* ---- writer ---- */
typedef struct lsa_zip_out {
    lsa_sink *to;
    lsa_zip_entry *entry;
    int64_t n, cap;
} lsa_zip_out;

/* Adds a file whose bytes `emit(arg, sink)` makes: it is called twice (checksum, then bytes). Data begins at
 * a multiple of 64 bytes. */
LSA_NODISCARD lsa_status lsa_zip_add(lsa_zip_out *z, const char *name,
                                     lsa_status (*emit)(const void *arg, lsa_sink *to, lsa_err *err),
                                     const void *arg, lsa_err *err);
LSA_NODISCARD lsa_status lsa_zip_add_bytes(lsa_zip_out *z, const char *name, const void *data, size_t n_bytes,
                                           lsa_err *err);
/* The central directory. Releases the table also when it fails; lsa_zip_out_fini does that without writing.
 */
LSA_NODISCARD lsa_status lsa_zip_end(lsa_zip_out *z, lsa_err *err);
void lsa_zip_out_fini(lsa_zip_out *z);

/* ---- reader ---- */
typedef struct lsa_zip {
    lsa_zip_entry *entry; /* owned */
    int64_t n;
} lsa_zip;

/* Checks the whole directory: every entry stored, inside the data, its local header agreeing, no name twice.
 * LSA_E_FORMAT names the entry. CRCs are not checked here: lsa_zip_check does that for one entry. `data` must
 * outlive *out; `where` names the file in messages. */
LSA_NODISCARD lsa_status lsa_zip_open(lsa_zip *out, const void *data, size_t n_bytes, const char *where,
                                      lsa_err *err);
void lsa_zip_close(lsa_zip *z);
const lsa_zip_entry *lsa_zip_find(const lsa_zip *z, const char *name); /* NULL if absent */
LSA_NODISCARD lsa_status lsa_zip_check(const lsa_zip_entry *e, const char *where, lsa_err *err);

#endif
