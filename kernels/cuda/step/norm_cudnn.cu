/* RMSNorm by cuDNN's graph API, for lsa-train bench only: the step uses our own kernels (norm.cu) as long as
 * they measure faster (kernels/PERF.md). cuDNN is loaded when asked for, so nothing depends on it. One graph
 * serves all layers: their arrays only differ in the pointers. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "kernels/cuda/step/timing.cuh"

#if __has_include(<cudnn.h>)
#include <cudnn.h>

enum { MAX_DESC = 24, ARRAYS = 7 };

typedef struct cudnn_norm {
    void *lib;
    cudnnHandle_t handle;
    cudnnStatus_t (*create)(cudnnHandle_t *);
    cudnnStatus_t (*destroy)(cudnnHandle_t);
    cudnnStatus_t (*set_stream)(cudnnHandle_t, cudaStream_t);
    const char *(*text)(cudnnStatus_t);
    cudnnStatus_t (*make)(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t *);
    cudnnStatus_t (*drop)(cudnnBackendDescriptor_t);
    cudnnStatus_t (*set)(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t, cudnnBackendAttributeType_t,
                         int64_t, const void *);
    cudnnStatus_t (*get)(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t, cudnnBackendAttributeType_t,
                         int64_t, int64_t *, void *);
    cudnnStatus_t (*finalize)(cudnnBackendDescriptor_t);
    cudnnStatus_t (*execute)(cudnnHandle_t, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t);
    cudnnBackendDescriptor_t desc[MAX_DESC]; /* owned */
    int n_desc;
    cudnnBackendDescriptor_t plan, pack[LSA_MAX_CSA]; /* one pack of pointers a layer */
    void *workspace, *out;                            /* out: where results go that the step must not see */
    float *dscale;
} cudnn_norm;

#define CUDNN(call)                                                                                          \
    do {                                                                                                     \
        const cudnnStatus_t e_ = (call);                                                                     \
        if (e_ != CUDNN_STATUS_SUCCESS)                                                                      \
            LSA_RET_FAIL(LSA_E_UNSUPPORTED, "cuDNN: %s: %s", #call, c->text(e_));                            \
    } while (0)

static lsa_status load(cudnn_norm *c, cudaStream_t stream, lsa_err *err) {
    c->lib = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!c->lib) c->lib = dlopen("libcudnn.so", RTLD_NOW | RTLD_LOCAL);
    if (!c->lib) LSA_RET_FAIL(LSA_E_UNSUPPORTED, "cuDNN is not installed: %s", dlerror());
    const struct {
        const char *name;
        void *to;
    } f[] = {{"cudnnCreate", &c->create},
             {"cudnnDestroy", &c->destroy},
             {"cudnnSetStream", &c->set_stream},
             {"cudnnGetErrorString", &c->text},
             {"cudnnBackendCreateDescriptor", &c->make},
             {"cudnnBackendDestroyDescriptor", &c->drop},
             {"cudnnBackendSetAttribute", &c->set},
             {"cudnnBackendGetAttribute", &c->get},
             {"cudnnBackendFinalize", &c->finalize},
             {"cudnnBackendExecute", &c->execute}};
    for (size_t i = 0; i < sizeof f / sizeof *f; i++) {
        void *p = dlsym(c->lib, f[i].name);
        if (!p) LSA_RET_FAIL(LSA_E_UNSUPPORTED, "cuDNN: no %s", f[i].name);
        memcpy(f[i].to, &p, sizeof p);
    }
    CUDNN(c->create(&c->handle));
    CUDNN(c->set_stream(c->handle, stream));
    return LSA_OK;
}

static void unload(cudnn_norm *c) {
    for (int i = 0; i < c->n_desc; i++) c->drop(c->desc[i]);
    for (int i = 0; i < LSA_MAX_CSA; i++)
        if (c->pack[i]) c->drop(c->pack[i]);
    if (c->handle) c->destroy(c->handle);
    cudaFree(c->workspace);
    cudaFree(c->out);
    cudaFree(c->dscale);
    if (c->lib) dlclose(c->lib);
}

static lsa_status descriptor(cudnn_norm *c, cudnnBackendDescriptor_t *out, cudnnBackendDescriptorType_t type,
                             lsa_err *err) {
    if (c->n_desc == MAX_DESC) LSA_RET_FAIL(LSA_E_BUG, "more than %d cuDNN descriptors", MAX_DESC);
    CUDNN(c->make(type, out));
    c->desc[c->n_desc++] = *out;
    return LSA_OK;
}

/* [rows, cols, 1, 1], dense; by_value: a host scalar. */
static lsa_status tensor(cudnn_norm *c, cudnnBackendDescriptor_t *out, int64_t id, cudnnDataType_t type,
                         int64_t rows, int64_t cols, bool by_value, lsa_err *err) {
    const lsa_status st = descriptor(c, out, CUDNN_BACKEND_TENSOR_DESCRIPTOR, err);
    if (st != LSA_OK) return st;
    const int64_t dim[4] = {rows, cols, 1, 1}, stride[4] = {cols, 1, cols, cols}, align = 16;
    CUDNN(c->set(*out, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type));
    CUDNN(c->set(*out, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dim));
    CUDNN(c->set(*out, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, stride));
    CUDNN(c->set(*out, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id));
    CUDNN(c->set(*out, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &align));
    if (by_value) CUDNN(c->set(*out, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value));
    CUDNN(c->finalize(*out));
    return LSA_OK;
}

/* The first engine that cuDNN's heuristics name and that can be built. */
static lsa_status plan(cudnn_norm *c, cudnnBackendDescriptor_t op, lsa_err *err) {
    lsa_status st = LSA_OK;
    cudnnBackendDescriptor_t graph, heur, config[8];
    const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    int64_t n = 0, bytes = 0, got;
    LSA_TRY(descriptor(c, &graph, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, err));
    CUDNN(c->set(graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &c->handle));
    CUDNN(c->set(graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &op));
    CUDNN(c->finalize(graph));
    LSA_TRY(descriptor(c, &heur, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, err));
    CUDNN(c->set(heur, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &graph));
    CUDNN(c->set(heur, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode));
    CUDNN(c->finalize(heur));
    for (int i = 0; i < 8; i++) LSA_TRY(descriptor(c, &config[i], CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, err));
    CUDNN(c->get(heur, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 8, &n, config));
    for (int64_t i = 0; i < n && i < 8; i++) {
        LSA_TRY(descriptor(c, &c->plan, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, err));
        CUDNN(c->set(c->plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &c->handle));
        CUDNN(c->set(c->plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1,
                     &config[i]));
        if (c->finalize(c->plan) != CUDNN_STATUS_SUCCESS) continue;
        CUDNN(c->get(c->plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &got, &bytes));
        LSA_CUDA(cudaMalloc(&c->workspace, bytes > 0 ? (size_t)bytes : 16));
        return LSA_OK;
    }
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "cuDNN has no engine for this RMSNorm");
done:
    return st;
}

static lsa_status pack(cudnn_norm *c, int32_t layer, int64_t n, const int64_t *id, void **p, lsa_err *err) {
    CUDNN(c->make(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &c->pack[layer]));
    CUDNN(c->set(c->pack[layer], CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, p));
    CUDNN(c->set(c->pack[layer], CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, id));
    CUDNN(c->set(c->pack[layer], CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &c->workspace));
    CUDNN(c->finalize(c->pack[layer]));
    return LSA_OK;
}

enum { X = 1, SCALE, EPS, RSTD, Y, DY, DSCALE };

static lsa_status build(cudnn_norm *c, lsa_gpu_step *s, bool backward, cudnnDataType_t out_type,
                        lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t m = s->o.micro, r = s->g.rank;
    const cudnnBackendNormMode_t mode = CUDNN_RMS_NORM;
    const cudnnBackendNormFwdPhase_t phase = CUDNN_NORM_FWD_TRAINING;
    cudnnBackendDescriptor_t x, scale, eps, rstd, y, dy, dscale, op;
    LSA_TRY(tensor(c, &x, X, CUDNN_DATA_FLOAT, m, r, false, err));
    LSA_TRY(tensor(c, &scale, SCALE, CUDNN_DATA_FLOAT, 1, r, false, err));
    LSA_TRY(tensor(c, &rstd, RSTD, CUDNN_DATA_FLOAT, m, 1, false, err));
    LSA_TRY(tensor(c, &y, Y, out_type, m, r, false, err));
    if (!backward) {
        LSA_TRY(tensor(c, &eps, EPS, CUDNN_DATA_FLOAT, 1, 1, true, err));
        LSA_TRY(descriptor(c, &op, CUDNN_BACKEND_OPERATION_NORM_FORWARD_DESCRIPTOR, err));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_FWD_MODE, CUDNN_TYPE_NORM_MODE, 1, &mode));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_FWD_PHASE, CUDNN_TYPE_NORM_FWD_PHASE, 1, &phase));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_FWD_XDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &x));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_FWD_SCALE_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &scale));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_FWD_EPSILON_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &eps));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_FWD_INV_VARIANCE_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1,
                     &rstd));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_FWD_YDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &y));
    } else {
        LSA_TRY(tensor(c, &dy, DY, CUDNN_DATA_FLOAT, m, r, false, err));
        LSA_TRY(tensor(c, &dscale, DSCALE, CUDNN_DATA_FLOAT, 1, r, false, err));
        LSA_TRY(descriptor(c, &op, CUDNN_BACKEND_OPERATION_NORM_BACKWARD_DESCRIPTOR, err));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_BWD_MODE, CUDNN_TYPE_NORM_MODE, 1, &mode));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_BWD_XDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &x));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_BWD_INV_VARIANCE_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1,
                     &rstd));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_BWD_DYDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &dy));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_BWD_SCALE_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &scale));
        CUDNN(
            c->set(op, CUDNN_ATTR_OPERATION_NORM_BWD_DSCALE_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &dscale));
        CUDNN(c->set(op, CUDNN_ATTR_OPERATION_NORM_BWD_DXDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &y));
    }
    CUDNN(c->finalize(op));
    LSA_TRY(plan(c, op, err));
    LSA_CUDA(cudaMalloc(&c->out, (size_t)(s->g.n_layer * m * r) * sizeof(float)));
    LSA_CUDA(cudaMalloc((void **)&c->dscale, (size_t)(s->g.n_layer * r) * sizeof(float)));
    for (int32_t l = 0; l < s->g.n_layer; l++) {
        const int64_t at = l * m * r;
        const size_t size = out_type == CUDNN_DATA_FLOAT ? 4 : 2;
        void *const out = (uint8_t *)c->out + (size_t)at * size;
        void *const gain = s->p + l * s->layer_param + s->at_gn;
        const int64_t id_fwd[] = {X, SCALE, EPS, RSTD, Y}, id_bwd[] = {X, SCALE, RSTD, Y, DY, DSCALE};
        void *p_fwd[] = {s->a + at, gain, &s->g.eps, s->rstd + l * m, out};
        void *p_bwd[] = {s->a + at, gain, s->rstd + l * m, out, s->du + at, c->dscale + (int64_t)l * r};
        LSA_TRY(backward ? pack(c, l, 6, id_bwd, p_bwd, err) : pack(c, l, 5, id_fwd, p_fwd, err));
    }
done:
    return st;
}

static lsa_status run(cudnn_norm *c, int32_t n_layer, lsa_err *err) {
    for (int32_t l = 0; l < n_layer; l++) CUDNN(c->execute(c->handle, c->plan, c->pack[l]));
    return LSA_OK;
}

/* Largest difference from what our kernels left in s->u or s->da, relative to the largest of those. */
static lsa_status difference(double *out, const cudnn_norm *c, const lsa_gpu_step *s, bool backward,
                             cudnnDataType_t type, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n = s->g.n_layer * s->o.micro * s->g.rank;
    const size_t size = type == CUDNN_DATA_FLOAT ? 4 : 2;
    bf16 *ours = (bf16 *)malloc((size_t)n * sizeof *ours);
    uint8_t *theirs = (uint8_t *)malloc((size_t)n * size);
    double worst = 0, most = 0;
    if (!ours || !theirs) LSA_FAIL(LSA_E_NOMEM, "no memory for %lld values", (long long)n);
    if (cudaMemcpy(ours, backward ? s->da : s->u, (size_t)n * sizeof *ours, cudaMemcpyDeviceToHost) ||
        cudaMemcpy(theirs, c->out, (size_t)n * size, cudaMemcpyDeviceToHost))
        LSA_FAIL(LSA_E_DEVICE, "the results of RMSNorm cannot be read");
    for (int64_t i = 0; i < n; i++) {
        const double a = (double)__bfloat162float(ours[i]),
                     b = size == 4 ? (double)((float *)theirs)[i]
                                   : (double)__bfloat162float(((bf16 *)theirs)[i]);
        if (!(fabs(a - b) <= worst)) worst = fabs(a - b);
        if (fabs(a) > most) most = fabs(a);
    }
    *out = worst / most;
done:
    free(ours);
    free(theirs);
    return st;
}

lsa_status step_cudnn_norm(lsa_gpu_step *s, bool backward, int repeats, double *ms, double *diff,
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    cudnn_norm c = {};
    const cudnnDataType_t type[] = {CUDNN_DATA_BFLOAT16, CUDNN_DATA_FLOAT}; /* the step needs bf16 out */
    for (int k = 0; k < 2; k++) {
        unload(&c);
        memset(&c, 0, sizeof c);
        if (err) err->code = LSA_OK;
        LSA_TRY(load(&c, s->cs->stream, err));
        st = build(&c, s, backward, type[k], err);
        if (st != LSA_OK) continue;
        LSA_TRY(
            step_time_part(s, repeats, ms, err, [&]() -> lsa_status { return run(&c, s->g.n_layer, err); }));
        st = difference(diff, &c, s, backward, type[k], err);
        break;
    }
done:
    unload(&c);
    return st;
}

#else
lsa_status step_cudnn_norm(lsa_gpu_step *s, bool backward, int repeats, double *ms, double *diff,
                           lsa_err *err) {
    (void)s, (void)backward, (void)repeats, (void)ms, (void)diff;
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "built without cudnn.h");
}
#endif
