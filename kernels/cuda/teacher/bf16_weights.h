/* A layer's tensors as they are stored and where their bf16 (or f32) forms go. Internal to
 * kernels/cuda/teacher. */
#ifndef LSA_KERNELS_CUDA_TEACHER_BF16_WEIGHTS_H
#define LSA_KERNELS_CUDA_TEACHER_BF16_WEIGHTS_H

#include "kernels/cuda/teacher/bf16_state.h"

enum { BF16_TENSORS = 2048 };

typedef enum bf16_form {
    FORM_BF16,
    FORM_F32,
    FORM_PARTS, /* f32 as three bf16 matrices, see bf16_streams.cu */
    FORM_I64
} bf16_form;

struct bf16_tensor {
    lsa_gpu_tensor t; /* at, scale_at: in the stored bytes; scales are E8M0 */
    bf16_form form;
    float mean, spread; /* of made-up weights */
};
struct bf16_layout {
    bf16_tensor tensor[BF16_TENSORS];
    int n;
    int64_t stored, arena; /* bytes */
    lsa_bf16_weights w;    /* pointers into the arena */
};

/* V4's tensors of a layer in their storage types, arena at `base`. LSA_E_CONFIG: too many tensors. */
lsa_status bf16_layout_make(bf16_layout *o, const lsa_gpu_teacher_geom *g, int ratio, int roles, bool hash,
                            char *base, lsa_err *err);
/* stored [o->stored] filled from a hash of `seed`. */
lsa_status bf16_layout_invent(const bf16_layout *o, char *stored, uint32_t seed, cudaStream_t s,
                              lsa_err *err);
lsa_status bf16_layout_decode(const bf16_layout *o, const char *stored, cudaStream_t s, lsa_err *err);

#endif
