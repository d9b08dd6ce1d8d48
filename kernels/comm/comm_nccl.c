/* Device collectives: see comm_gpu.h. In builds with CUDA only. */
#include "kernels/comm/comm_gpu.h"

#include <dlfcn.h>
#include <string.h>

#include "kernels/core/mem.h"

#if __has_include(<nccl.h>)
#include <nccl.h>

struct lsa_gpu_comm {
    lsa_comm *host;
    int rank, size;
    ncclComm_t nccl; /* NULL once aborted */
    ncclResult_t (*version)(int *);
    ncclResult_t (*unique_id)(ncclUniqueId *);
    ncclResult_t (*init)(ncclComm_t *, int, ncclUniqueId, int);
    ncclResult_t (*destroy)(ncclComm_t);
    ncclResult_t (*abort)(ncclComm_t);
    ncclResult_t (*async_error)(ncclComm_t, ncclResult_t *);
    const char *(*text)(ncclResult_t);
    const char *(*last_error)(ncclComm_t);
    ncclResult_t (*group_start)(void);
    ncclResult_t (*group_end)(void);
    ncclResult_t (*all_reduce)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                               cudaStream_t);
    ncclResult_t (*reduce_scatter)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                                   cudaStream_t);
    ncclResult_t (*all_gather)(const void *, void *, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
};

static const struct {
    ncclDataType_t type;
    size_t size;
} TYPE[] = {
    [LSA_GPU_F32] = {ncclFloat32, 4}, [LSA_GPU_BF16] = {ncclBfloat16, 2}, [LSA_GPU_F64] = {ncclFloat64, 8}};

#define NCCL(call)                                                                                           \
    do {                                                                                                     \
        const ncclResult_t e_ = (call);                                                                      \
        if (e_ != ncclSuccess)                                                                               \
            LSA_RET_FAIL(LSA_E_COMM, "NCCL: %s: %s (%s)", #call, c->text(e_), c->last_error(c->nccl));       \
    } while (0)

/* The library is never unloaded: its threads may outlive a communicator. */
static lsa_status load(lsa_gpu_comm *c, lsa_err *err) {
    void *const lib = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "several GPUs exchange gradients by NCCL, which is not installed: %s",
                     dlerror());
    const struct {
        const char *name;
        void *to;
    } f[] = {{"ncclGetVersion", &c->version},     {"ncclGetUniqueId", &c->unique_id},
             {"ncclCommInitRank", &c->init},      {"ncclCommDestroy", &c->destroy},
             {"ncclCommAbort", &c->abort},        {"ncclCommGetAsyncError", &c->async_error},
             {"ncclGetErrorString", &c->text},    {"ncclGetLastError", &c->last_error},
             {"ncclGroupStart", &c->group_start}, {"ncclGroupEnd", &c->group_end},
             {"ncclAllReduce", &c->all_reduce},   {"ncclReduceScatter", &c->reduce_scatter},
             {"ncclAllGather", &c->all_gather}};
    for (size_t i = 0; i < sizeof f / sizeof *f; i++) {
        void *const p = dlsym(lib, f[i].name);
        if (!p) LSA_RET_FAIL(LSA_E_UNSUPPORTED, "NCCL: no %s; version 2.13 or later is needed", f[i].name);
        memcpy(f[i].to, &p, sizeof p);
    }
    return LSA_OK;
}

/* All ranks with the same library, then the communicator. */
static lsa_status meet(lsa_gpu_comm *c, int device, lsa_err *err) {
    lsa_status st = LSA_OK;
    ncclUniqueId id;
    ncclResult_t e;
    int version = 0;
    memset(&id, 0, sizeof id);
    NCCL(c->version(&version));
    LSA_TRY(lsa_comm_agree(c->host, "the version of NCCL", (uint64_t)version, LSA_E_CONFIG, err));
    if (c->rank == 0) NCCL(c->unique_id(&id));
    LSA_TRY(lsa_comm_broadcast(c->host, &id, sizeof id, err));
    lsa_comm_enter(c->host, "joining the GPUs");
    e = c->init(&c->nccl, c->size, id, c->rank);
    lsa_comm_leave(c->host);
    if (e != ncclSuccess)
        LSA_FAIL(LSA_E_COMM,
                 "NCCL cannot join %d GPUs: %s (%s); each rank needs a GPU of its own (this one has GPU %d)",
                 c->size, c->text(e), c->last_error(NULL), device);
done:
    return st;
}

lsa_status lsa_gpu_comm_open(lsa_gpu_comm **out, lsa_comm *host, int device, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_comm *c = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(c, 1, err));
    c->host = host;
    c->rank = lsa_comm_rank(host);
    c->size = lsa_comm_size(host);
    LSA_TRY(load(c, err));
    LSA_TRY(meet(c, device, err));
    *out = c;
    c = NULL;
done:
    lsa_free(c);
    return st;
}

static void give_up(lsa_gpu_comm *c) {
    if (c->nccl) c->abort(c->nccl);
    c->nccl = NULL;
}

void lsa_gpu_comm_close(lsa_gpu_comm *c) {
    if (!c) return;
    if (lsa_comm_check(c->host, NULL) != LSA_OK) {
        give_up(c);
    } else if (c->nccl) {
        lsa_comm_enter(c->host, "parting the GPUs");
        c->destroy(c->nccl);
        lsa_comm_leave(c->host);
    }
    lsa_free(c);
}

lsa_status lsa_gpu_comm_begin(lsa_gpu_comm *c, lsa_err *err) {
    NCCL(c->group_start());
    return LSA_OK;
}
lsa_status lsa_gpu_comm_end(lsa_gpu_comm *c, lsa_err *err) {
    NCCL(c->group_end());
    return LSA_OK;
}

lsa_status lsa_gpu_comm_add(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type, void *stream,
                            lsa_err *err) {
    NCCL(c->all_reduce(x, x, (size_t)n, TYPE[type].type, ncclSum, c->nccl, (cudaStream_t)stream));
    return LSA_OK;
}
lsa_status lsa_gpu_comm_add_slices(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type, void *stream,
                                   lsa_err *err) {
    const size_t slice = (size_t)(n / c->size);
    char *const mine = (char *)x + (size_t)c->rank * slice * TYPE[type].size;
    NCCL(c->reduce_scatter(x, mine, slice, TYPE[type].type, ncclSum, c->nccl, (cudaStream_t)stream));
    return LSA_OK;
}
lsa_status lsa_gpu_comm_gather_slices(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type, void *stream,
                                      lsa_err *err) {
    const size_t slice = (size_t)(n / c->size);
    char *const mine = (char *)x + (size_t)c->rank * slice * TYPE[type].size;
    NCCL(c->all_gather(mine, x, slice, TYPE[type].type, c->nccl, (cudaStream_t)stream));
    return LSA_OK;
}

lsa_status lsa_gpu_comm_check(lsa_gpu_comm *c, lsa_err *err) {
    lsa_status st = lsa_comm_check(c->host, err);
    ncclResult_t e = ncclSuccess;
    if (st == LSA_OK && !c->nccl) LSA_FAIL(LSA_E_COMM, "the exchange between the GPUs was given up before");
    if (st == LSA_OK && c->async_error(c->nccl, &e) != ncclSuccess) e = ncclInternalError;
    if (e != ncclSuccess && e != ncclInProgress)
        LSA_FAIL(LSA_E_COMM, "NCCL: %s (%s)", c->text(e), c->last_error(c->nccl));
done:
    if (st != LSA_OK) give_up(c);
    return st;
}

#else

#define NO_NCCL                                                                                              \
    LSA_RET_FAIL(LSA_E_UNSUPPORTED,                                                                          \
                 "several GPUs: this build has no NCCL; install its development files and build again")

lsa_status lsa_gpu_comm_open(lsa_gpu_comm **out, lsa_comm *host, int device, lsa_err *err) {
    (void)host, (void)device;
    *out = NULL;
    NO_NCCL;
}
void lsa_gpu_comm_close(lsa_gpu_comm *c) {
    (void)c;
}
lsa_status lsa_gpu_comm_begin(lsa_gpu_comm *c, lsa_err *err) {
    (void)c;
    NO_NCCL;
}
lsa_status lsa_gpu_comm_end(lsa_gpu_comm *c, lsa_err *err) {
    (void)c;
    NO_NCCL;
}
lsa_status lsa_gpu_comm_add(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type, void *stream,
                            lsa_err *err) {
    (void)c, (void)x, (void)n, (void)type, (void)stream;
    NO_NCCL;
}
lsa_status lsa_gpu_comm_add_slices(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type, void *stream,
                                   lsa_err *err) {
    (void)c, (void)x, (void)n, (void)type, (void)stream;
    NO_NCCL;
}
lsa_status lsa_gpu_comm_gather_slices(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type, void *stream,
                                      lsa_err *err) {
    (void)c, (void)x, (void)n, (void)type, (void)stream;
    NO_NCCL;
}
lsa_status lsa_gpu_comm_check(lsa_gpu_comm *c, lsa_err *err) {
    (void)c;
    NO_NCCL;
}
#endif
