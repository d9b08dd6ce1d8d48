/* Memory functions of the host backends. Internal to kernels. */
#ifndef LSA_KERNELS_HOST_MEMORY_H
#define LSA_KERNELS_HOST_MEMORY_H

#include "kernels/backend.h"

lsa_status lsa_host_alloc(lsa_ctx *c, void **out, size_t n_bytes, const char *what, lsa_err *err);
void lsa_host_release(lsa_ctx *c, void *p);
lsa_status lsa_host_copy(lsa_ctx *c, void *dst, const void *src, size_t n_bytes, lsa_err *err);
lsa_status lsa_host_zero(lsa_ctx *c, void *dst, size_t n_bytes, lsa_err *err);
lsa_status lsa_host_sync(lsa_ctx *c, lsa_err *err);

#define LSA_HOST_MEMORY                                                                                      \
    .alloc = lsa_host_alloc, .release = lsa_host_release, .upload = lsa_host_copy,                           \
    .download = lsa_host_copy, .zero = lsa_host_zero, .sync = lsa_host_sync

#endif
