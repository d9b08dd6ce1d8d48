/* What a DeepSeek-V4 model of a given geometry consists of: every tensor with its shape and the type in which
 * the published checkpoints store it, and what follows from that (bytes, parameters, arithmetic).
 *
 * Source: architecture notes 11.1, 11.2 (tensors), 5 to 9 (arithmetic). The MTP block is not part of it.
 * Pure, thread-safe. */
#ifndef LSA_DATA_TEACHER_TENSORS_H
#define LSA_DATA_TEACHER_TENSORS_H

#include "data/teacher.h"
#include "kernels/core/dtype.h"

typedef struct lsa_teacher_tensor {
    char name[96];       /* original name */
    int64_t rows, cols;  /* logical shape; rows = 1 for vectors */
    lsa_dtype dtype;     /* F8_E4M3: E8M0 scales [ceil(rows/128), ceil(cols/128)]; F4: E8M0 [rows, cols/32] */
    int32_t layer;       /* -1: not of a layer */
    bool expert, lookup; /* routed expert; read by index, not multiplied */
} lsa_teacher_tensor;

typedef lsa_status (*lsa_teacher_tensor_fn)(void *user, const lsa_teacher_tensor *t, lsa_err *err);
/* Calls fn for each tensor, global ones first, then by layer; the first error ends it. */
LSA_NODISCARD lsa_status lsa_teacher_each(const lsa_teacher_config *c, lsa_teacher_tensor_fn fn, void *user,
                                          lsa_err *err);

/* Bytes of a tensor with its scales; number of stored tensors (2 with scales). */
int64_t lsa_teacher_tensor_bytes(const lsa_teacher_tensor *t);

typedef struct lsa_teacher_size {
    int64_t tensors, f32_tensors; /* stored, scales counted */
    int64_t bytes, largest_layer; /* as stored */
    double params;                /* numbers in float tensors */
    double active;                /* of them, multiplied for one token: matrices, k of E experts, not head */
} lsa_teacher_size;
LSA_NODISCARD lsa_status lsa_teacher_measure(lsa_teacher_size *out, const lsa_teacher_config *c,
                                             lsa_err *err);

/* Floating-point operations (2 a multiply-add) to read one document of n tokens without logits: the active
 * matrices, attention over window, selected and compressed rows, native indexer scores. */
double lsa_teacher_flops(const lsa_teacher_config *c, const lsa_teacher_size *s, int64_t n);

/* sum over t = 0..n-1 of min(cap, floor((t+1)/ratio)): rows that the tokens of a document see. */
double lsa_visible_sum(int64_t n, int64_t ratio, int64_t cap);

#endif
