/* Host backends use plain memory: copies are memcpy and nothing is asynchronous. */
#include "kernels/host_memory.h"

#include <string.h>

#include "kernels/core/mem.h"

lsa_status lsa_host_alloc(lsa_ctx *c, void **out, size_t n_bytes, const char *what, lsa_err *err) {
    (void)c;
    return lsa_alloc_(out, (int64_t)n_bytes, 1, what, err);
}
void lsa_host_release(lsa_ctx *c, void *p) {
    (void)c;
    lsa_free(p);
}
lsa_status lsa_host_copy(lsa_ctx *c, void *dst, const void *src, size_t n_bytes, lsa_err *err) {
    (void)c;
    (void)err;
    memcpy(dst, src, n_bytes);
    return LSA_OK;
}
lsa_status lsa_host_zero(lsa_ctx *c, void *dst, size_t n_bytes, lsa_err *err) {
    (void)c;
    (void)err;
    memset(dst, 0, n_bytes);
    return LSA_OK;
}
lsa_status lsa_host_sync(lsa_ctx *c, lsa_err *err) {
    (void)c;
    (void)err;
    return LSA_OK;
}
