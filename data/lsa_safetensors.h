/* Safetensors files: a validating mmap reader and an atomic, deterministic writer.
 *
 * Reader: nothing of a tensor is visible before the whole header passed: header length inside the file, valid
 * JSON, no duplicate names, known dtype, shape product without overflow, shape x itemsize = length, offsets
 * inside the file and not overlapping. LSA_E_FORMAT names file, tensor, expected, found. Borrowed pointers
 * live until close. Thread-safe after open. */
#ifndef LSA_SAFETENSORS_H
#define LSA_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/core/dtype.h"
#include "kernels/core/lsa_status.h"

#define LSA_ST_MAX_DIM 8

typedef struct lsa_st_tensor {
    const char *name;
    lsa_dtype dtype;
    int32_t n_dim;
    int64_t shape[LSA_ST_MAX_DIM];
    int64_t n_elem;
    size_t n_bytes;
    const void *data; /* not necessarily aligned for its dtype: use lsa_st_to_f32 or memcpy */
} lsa_st_tensor;

typedef struct lsa_st lsa_st;

LSA_NODISCARD lsa_status lsa_st_open(lsa_st **out, const char *path, lsa_err *err);
/* The same over caller-owned memory (fuzzing, tests); `name` appears in messages. */
LSA_NODISCARD lsa_status lsa_st_open_memory(lsa_st **out, const void *data, size_t n_bytes, const char *name,
                                            lsa_err *err);
void lsa_st_close(lsa_st *s);
int64_t lsa_st_count(const lsa_st *s);
const lsa_st_tensor *lsa_st_at(const lsa_st *s, int64_t i);
const lsa_st_tensor *lsa_st_find(const lsa_st *s, const char *name); /* NULL if absent */
/* Finds and checks dtype and shape (a shape entry of -1 matches anything); LSA_E_FORMAT otherwise. */
LSA_NODISCARD lsa_status lsa_st_need(const lsa_st_tensor **out, const lsa_st *s, const char *name,
                                     lsa_dtype dtype, int32_t n_dim, const int64_t *shape, lsa_err *err);
const char *lsa_st_metadata(const lsa_st *s, const char *key); /* NULL if absent */

/* dst[n_elem] in f32 from F32, F16, BF16, F64 (rounded), F8_E4M3, F8_E8M0, I32, I64; others
 * LSA_E_UNSUPPORTED. */
LSA_NODISCARD lsa_status lsa_st_to_f32(float *dst, const lsa_st_tensor *t, lsa_err *err);

typedef struct lsa_st_entry {
    const char *name;
    lsa_dtype dtype;
    int32_t n_dim;
    int64_t shape[LSA_ST_MAX_DIM];
    const void *data; /* dense, shape x itemsize bytes */
} lsa_st_entry;

/* Commits `path` with the entries in the given order and metadata pairs {key, value, key, value, ..., NULL}
 * (may be NULL); the data section starts 8-byte aligned and equal input gives equal bytes. */
LSA_NODISCARD lsa_status lsa_st_save(const char *path, const lsa_st_entry *entries, int64_t n,
                                     const char *const *metadata, lsa_err *err);

#endif
