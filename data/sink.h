/* Where a writer's bytes go: a file that is committed, an existing file to compare with, or a checksum. Every
 * file format of an export is one function from content to a sink, so the same code writes it and later
 * proves that a file still is what its content says. Sequential; one thread per sink. */
#ifndef LSA_DATA_SINK_H
#define LSA_DATA_SINK_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/lsa_status.h"

typedef struct lsa_sink {
    lsa_status (*put)(void *user, const void *data, size_t n_bytes, lsa_err *err);
    void *user;
    int64_t n_bytes; /* so far */
} lsa_sink;

LSA_NODISCARD lsa_status lsa_sink_put(lsa_sink *s, const void *data, size_t n_bytes, lsa_err *err);
LSA_NODISCARD lsa_status lsa_sink_zeros(lsa_sink *s, int64_t n_bytes, lsa_err *err);
/* The low `width` bytes of v, little-endian. */
LSA_NODISCARD lsa_status lsa_sink_uint(lsa_sink *s, uint64_t v, int width, lsa_err *err);

/* Into an open commit (kernels/core/file.h). */
lsa_sink lsa_sink_commit(lsa_commit *c);

/* Against a file: LSA_E_FORMAT at the first byte that differs, and lsa_compare_end for what is left over. */
typedef struct lsa_compare {
    lsa_map map;
    int64_t at;
    const char *path; /* borrowed */
} lsa_compare;
LSA_NODISCARD lsa_status lsa_compare_open(lsa_compare *c, const char *path, lsa_err *err);
lsa_sink lsa_sink_compare(lsa_compare *c);
LSA_NODISCARD lsa_status lsa_compare_end(const lsa_compare *c, lsa_err *err);
void lsa_compare_close(lsa_compare *c);

/* CRC-32 of what is put; *crc starts at 0. */
lsa_sink lsa_sink_crc(uint32_t *crc);

#define LSA_OUT_MAX_DIM 2
/* A tensor to be written: its bytes are made while they are written, so that no second copy of the weights
 * exists. */
typedef struct lsa_tensor_out lsa_tensor_out;
struct lsa_tensor_out {
    char name[96];
    lsa_dtype dtype;
    int32_t n_dim;
    int64_t shape[LSA_OUT_MAX_DIM];
    lsa_status (*emit)(const lsa_tensor_out *t, lsa_sink *to,
                       lsa_err *err); /* exactly lsa_tensor_out_bytes, each time */
    const void *src;                  /* borrowed */
    int64_t src_cols;                 /* for emit, where the shape does not say it */
};
int64_t lsa_tensor_out_bytes(const lsa_tensor_out *t);

/* A safetensors file of these tensors in this order; metadata as lsa_st_save (data/lsa_safetensors.h). */
LSA_NODISCARD lsa_status lsa_st_emit(lsa_sink *to, const lsa_tensor_out *t, int64_t n,
                                     const char *const *metadata, lsa_err *err);

#endif
