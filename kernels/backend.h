/* What a backend provides, and what a context holds. Internal to kernels. */
#ifndef LSA_KERNELS_BACKEND_H
#define LSA_KERNELS_BACKEND_H

#include "kernels/ctx.h"
#include "kernels/ops.h"

typedef struct lsa_backend {
    const char *name;
    /* memory; all may block */
    lsa_status (*alloc)(lsa_ctx *c, void **out, size_t n_bytes, const char *what, lsa_err *err);
    void (*release)(lsa_ctx *c, void *p);
    lsa_status (*upload)(lsa_ctx *c, void *dst, const void *src, size_t n_bytes, lsa_err *err);
    lsa_status (*download)(lsa_ctx *c, void *dst, const void *src, size_t n_bytes, lsa_err *err);
    lsa_status (*zero)(lsa_ctx *c, void *dst, size_t n_bytes, lsa_err *err);
    lsa_status (*sync)(lsa_ctx *c, lsa_err *err);
    void (*close)(lsa_ctx *c);
    /* operations; NULL = not supported */
#define LSA_OP(op) lsa_status (*op)(lsa_ctx * c, const lsa_##op##_args *a, lsa_err *err);
#include "kernels/ops.def"
#undef LSA_OP
} lsa_backend;

struct lsa_ctx {
    lsa_backend_kind kind;
    const lsa_backend *b;
    void *device; /* state of the CUDA backend */
    char text[256];
};

extern const lsa_backend lsa_backend_ref, lsa_backend_cpu;

/* Opens GPU `index`; LSA_E_DEVICE with the reason if there is none, LSA_E_UNSUPPORTED in builds without CUDA.
 */
LSA_NODISCARD lsa_status lsa_cuda_open(lsa_ctx *c, int index, lsa_err *err);

#endif
