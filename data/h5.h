/* HDF5 behind a small door: the only place that includes hdf5.h.
 *
 * Writer: one file built in one go; the first failure sticks (every later call returns it) and seal refuses.
 * Datasets are contiguous, allocated early, unfiltered, without object times, each with an attribute `xxh64`
 * (16 hex digits over its bytes): equal content gives equal files. Reader: finds a dataset's type, shape,
 * file offset and stated hash; the bytes are then read by pread. All calls take one process-wide lock,
 * because HDF5 may be built without thread safety. */
#ifndef LSA_DATA_H5_H
#define LSA_DATA_H5_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/core/hash.h"
#include "kernels/core/lsa_status.h"

/* First thing in every program that touches shards: no exit handler (it can crash after a failed close), no
 * printing. */
void lsa_h5_init(void);

typedef enum lsa_h5_type {
    LSA_H5_U8,
    LSA_H5_I32,
    LSA_H5_I64,
    LSA_H5_U64,
    LSA_H5_U16,
    LSA_H5_F32,
    LSA_H5_F16,
    LSA_H5_STR
} lsa_h5_type;
int64_t lsa_h5_type_bytes(lsa_h5_type t); /* LSA_H5_STR: fixed 96-byte strings, NUL-padded */

typedef struct lsa_h5_writer lsa_h5_writer;
/* head_bytes: room at the start of the file for all of HDF5's own structures, so that data follows without a
 * gap. */
LSA_NODISCARD lsa_status lsa_h5_create(lsa_h5_writer **out, const char *path, int64_t head_bytes,
                                       lsa_err *err);
/* A dataset of rows [, cols] (cols 0: a vector): pieces laid end to end, and the hash of that. name:
 * "/group/set"; groups are made as needed. The bytes go to their place in the file past HDF5 and outside the
 * lock, so that several shards are written at once. */
LSA_NODISCARD lsa_status lsa_h5_write(lsa_h5_writer *w, const char *name, lsa_h5_type t, int64_t rows,
                                      int64_t cols, const lsa_piece *piece, int64_t n, uint64_t xxh64,
                                      lsa_err *err);
LSA_NODISCARD lsa_status lsa_h5_attr_str(lsa_h5_writer *w, const char *object, const char *name,
                                         const char *value, lsa_err *err);
/* Closes everything; any failure since create is reported here again. The writer is gone afterwards either
 * way. */
LSA_NODISCARD lsa_status lsa_h5_finish(lsa_h5_writer *w, lsa_err *err);

typedef struct lsa_h5_reader lsa_h5_reader;
typedef struct lsa_h5_set {
    lsa_h5_type type;
    int64_t rows, cols; /* cols 0: a vector */
    int64_t offset;     /* bytes from the start of the file; -1 for an empty set */
    uint64_t xxh64;
} lsa_h5_set;
LSA_NODISCARD lsa_status lsa_h5_open(lsa_h5_reader **out, const char *path, lsa_err *err);
void lsa_h5_close(lsa_h5_reader *r);
bool lsa_h5_has(lsa_h5_reader *r, const char *name);
/* Type must match; rows or cols of -1 match anything. LSA_E_FORMAT names dataset, expected, found; offset +
 * size must lie in the file. */
LSA_NODISCARD lsa_status lsa_h5_find(lsa_h5_set *out, lsa_h5_reader *r, const char *name, lsa_h5_type t,
                                     int64_t rows, int64_t cols, lsa_err *err);
/* Attribute of the root, or of a dataset, into buf; LSA_E_FORMAT if absent or longer. */
LSA_NODISCARD lsa_status lsa_h5_get_str(char *buf, size_t n, lsa_h5_reader *r, const char *name,
                                        lsa_err *err);
LSA_NODISCARD lsa_status lsa_h5_get_set_str(char *buf, size_t n, lsa_h5_reader *r, const char *set,
                                            const char *name, lsa_err *err);

#endif
