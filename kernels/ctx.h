/* Where arithmetic runs: a context owns one backend (ref, cpu or cuda), its stream and its memory.
 *
 * Backends: `ref` = scalar truth with double accumulation, `cpu` = OpenMP + OpenBLAS, `cuda` = one GPU.
 * Device strings: "auto" (cuda if one works, else cpu; the reason is kept), "cpu", "ref", "cuda", "cuda:N". A
 * GPU that was asked for and cannot be had is LSA_E_DEVICE; there is no silent fallback. Calls are
 * asynchronous on the context's stream; only lsa_ctx_download and lsa_ctx_sync wait. A context belongs to one
 * thread at a time. */
#ifndef LSA_KERNELS_CTX_H
#define LSA_KERNELS_CTX_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

typedef enum lsa_backend_kind { LSA_BACKEND_REF = 0, LSA_BACKEND_CPU, LSA_BACKEND_CUDA } lsa_backend_kind;

typedef struct lsa_ctx lsa_ctx; /* fields: kernels/backend.h */

LSA_NODISCARD lsa_status lsa_ctx_create(lsa_ctx **out, const char *device, lsa_err *err);
void lsa_ctx_destroy(lsa_ctx *ctx); /* NULL allowed */
lsa_backend_kind lsa_ctx_kind(const lsa_ctx *ctx);
const char *lsa_ctx_describe(const lsa_ctx *ctx); /* "cpu, 16 threads" or "cuda:0 NVIDIA H100, sm_90, 79 GiB";
                                                     for auto on a CPU also why no GPU is used */

/* Memory of the backend, zeroed. NULL pointers are fine for free. */
LSA_NODISCARD lsa_status lsa_ctx_alloc_(lsa_ctx *ctx, void **out, int64_t n, size_t size, const char *what,
                                        lsa_err *err);
#define LSA_CTX_NEW(ctx, p, n, err) lsa_ctx_alloc_((ctx), (void **)&(p), (int64_t)(n), sizeof *(p), #p, (err))
void lsa_ctx_free(lsa_ctx *ctx, void *p);

/* Copies between host and backend memory. upload may return before the copy ends but has consumed src. */
LSA_NODISCARD lsa_status lsa_ctx_upload(lsa_ctx *ctx, void *dst, const void *src, size_t n_bytes,
                                        lsa_err *err);
LSA_NODISCARD lsa_status lsa_ctx_download(lsa_ctx *ctx, void *dst, const void *src, size_t n_bytes,
                                          lsa_err *err);
LSA_NODISCARD lsa_status lsa_ctx_zero(lsa_ctx *ctx, void *dst, size_t n_bytes, lsa_err *err);
LSA_NODISCARD lsa_status lsa_ctx_sync(lsa_ctx *ctx, lsa_err *err);

#endif
