/* Contexts: see ctx.h. Host memory for ref and cpu, the CUDA backend's for the rest. */
#include "kernels/ctx.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

lsa_status lsa_ctx_create(lsa_ctx **out, const char *device, lsa_err *err) {
    lsa_ctx *c = NULL;
    *out = NULL;
    lsa_status st = LSA_NEW(c, 1, err);
    if (st != LSA_OK) return st;
    char *end;
    if (!strcmp(device, "ref")) {
        c->kind = LSA_BACKEND_REF;
        c->b = &lsa_backend_ref;
        snprintf(c->text, sizeof c->text, "ref, 1 thread");
    } else if (!strcmp(device, "cpu")) {
        c->kind = LSA_BACKEND_CPU;
        c->b = &lsa_backend_cpu;
        snprintf(c->text, sizeof c->text, "cpu, %d threads", omp_get_max_threads());
    } else if (!strcmp(device, "auto")) {
        lsa_err why = {0};
        st = lsa_cuda_open(c, 0, &why);
        if (st != LSA_OK) {
            c->kind = LSA_BACKEND_CPU;
            c->b = &lsa_backend_cpu;
            snprintf(c->text, sizeof c->text, "cpu, %d threads (no GPU: %.160s)", omp_get_max_threads(),
                     why.msg);
            st = LSA_OK;
        }
    } else if (!strncmp(device, "cuda", 4) && (device[4] == 0 || device[4] == ':')) {
        long index = device[4] ? strtol(device + 5, &end, 10) : 0;
        if (device[4] && (end == device + 5 || *end || index < 0))
            st = lsa_err_set(err, LSA_E_ARG, __FILE__, __LINE__, "device '%s': expected cuda:N", device);
        else
            st = lsa_cuda_open(c, (int)index, err);
    } else {
        st = lsa_err_set(err, LSA_E_ARG, __FILE__, __LINE__,
                         "device '%s' is unknown; expected auto, cpu, ref, cuda or cuda:N", device);
    }
    if (st != LSA_OK) {
        lsa_free(c);
        return st;
    }
    *out = c;
    return LSA_OK;
}

void lsa_ctx_destroy(lsa_ctx *c) {
    if (!c) return;
    if (c->b->close) c->b->close(c);
    lsa_free(c);
}

lsa_backend_kind lsa_ctx_kind(const lsa_ctx *c) {
    return c->kind;
}
const char *lsa_ctx_describe(const lsa_ctx *c) {
    return c->text;
}

lsa_status lsa_ctx_alloc_(lsa_ctx *c, void **out, int64_t n, size_t size, const char *what, lsa_err *err) {
    int64_t bytes;
    *out = NULL;
    if (n < 0 || !lsa_mul_i64(n, (int64_t)size, &bytes))
        LSA_RET_FAIL(LSA_E_NOMEM, "allocating %s: size overflows", what);
    if (bytes == 0) return LSA_OK;
    return c->b->alloc(c, out, (size_t)bytes, what, err);
}
void lsa_ctx_free(lsa_ctx *c, void *p) {
    if (c && p) c->b->release(c, p);
}
lsa_status lsa_ctx_upload(lsa_ctx *c, void *dst, const void *src, size_t n, lsa_err *err) {
    return n ? c->b->upload(c, dst, src, n, err) : LSA_OK;
}
lsa_status lsa_ctx_download(lsa_ctx *c, void *dst, const void *src, size_t n, lsa_err *err) {
    return n ? c->b->download(c, dst, src, n, err) : LSA_OK;
}
lsa_status lsa_ctx_zero(lsa_ctx *c, void *dst, size_t n, lsa_err *err) {
    return n ? c->b->zero(c, dst, n, err) : LSA_OK;
}
lsa_status lsa_ctx_sync(lsa_ctx *c, lsa_err *err) {
    return c->b->sync(c, err);
}
