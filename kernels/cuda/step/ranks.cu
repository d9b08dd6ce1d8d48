/* Several GPUs in one step: see ranks.h.
 *
 * The mistake that would stay silent: ranks that enqueue their collectives in different orders, or on two
 * streams without a dependency between them. All are enqueued from here, in the order of the step. */
#include <stdlib.h>
#include <time.h>

#include "kernels/cuda/step/ranks.h"

extern "C" {
#include "kernels/comm/comm_gpu.h"
}

struct step_ranks {
    lsa_comm *host;
    lsa_gpu_comm *gpu;
    cudaStream_t side; /* exchanges beside the backward pass */
    cudaEvent_t fork, join;
    bool forked;
};

lsa_status step_ranks_open(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (!s->o.comm || s->eval_only) return LSA_OK;
    step_ranks *const x = s->ranks = (step_ranks *)calloc(1, sizeof *x);
    if (!x) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    x->host = s->o.comm;
    LSA_CUDA(cudaStreamCreateWithFlags(&x->side, cudaStreamNonBlocking));
    LSA_CUDA(cudaEventCreateWithFlags(&x->fork, cudaEventDisableTiming));
    LSA_CUDA(cudaEventCreateWithFlags(&x->join, cudaEventDisableTiming));
    LSA_TRY(lsa_gpu_comm_open(&x->gpu, x->host, s->cs->device, err));
done:
    return st;
}

void step_ranks_close(lsa_gpu_step *s) {
    step_ranks *const x = s->ranks;
    if (!x) return;
    lsa_gpu_comm_close(x->gpu);
    if (x->side) cudaStreamDestroy(x->side);
    if (x->fork) cudaEventDestroy(x->fork);
    if (x->join) cudaEventDestroy(x->join);
    free(x);
    s->ranks = NULL;
}

bool step_ranks_first(const lsa_gpu_step *s) {
    return !s->ranks || lsa_comm_rank(s->ranks->host) == 0;
}

lsa_status step_ranks_add(lsa_gpu_step *s, double *v, int64_t n, lsa_err *err) {
    return s->ranks ? lsa_gpu_comm_add(s->ranks->gpu, v, n, LSA_GPU_F64, s->cs->stream, err) : LSA_OK;
}

/* One tensor of all layers. */
static lsa_status reduce_tensor(lsa_gpu_step *s, lsa_indexer_part part, cudaStream_t stream, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_comm *const c = s->ranks->gpu;
    const lsa_indexer_tensor t = lsa_indexer_tensor_at(&s->g, 0, part);
    const bool narrow = s->g16 && part != LSA_Q_NORM, slices = s->o.sharded && part != LSA_Q_NORM;
    const lsa_gpu_type type = narrow ? LSA_GPU_BF16 : LSA_GPU_F32;
    for (int l = 0; l < s->g.n_layer; l++) {
        const int64_t at = l * s->layer_param + t.offset;
        void *const v = narrow ? (void *)(s->g16 + at) : (void *)(s->grad + at);
        LSA_TRY(slices ? lsa_gpu_comm_add_slices(c, v, t.n, type, stream, err)
                       : lsa_gpu_comm_add(c, v, t.n, type, stream, err));
    }
done:
    return st;
}

/* What the side stream is given next may run beside what the stream is given next. */
static lsa_status fork(lsa_gpu_step *s, lsa_err *err) {
    LSA_CUDA(cudaEventRecord(s->ranks->fork, s->cs->stream));
    LSA_CUDA(cudaStreamWaitEvent(s->ranks->side, s->ranks->fork, 0));
    s->ranks->forked = true;
    return LSA_OK;
}

lsa_status step_ranks_reduce(lsa_gpu_step *s, step_grad_part part, lsa_err *err) {
    lsa_status st = LSA_OK;
    step_ranks *const x = s->ranks;
    if (!x) return LSA_OK;
    const cudaStream_t stream = s->o.no_overlap ? s->cs->stream : x->side;
    if (!s->o.no_overlap) LSA_TRY(fork(s, err));
    LSA_TRY(lsa_gpu_comm_begin(x->gpu, err));
    if (part == STEP_WQ_B) {
        LSA_TRY(reduce_tensor(s, LSA_WQ_B, stream, err));
    } else {
        LSA_TRY(reduce_tensor(s, LSA_WQ_A, stream, err));
        LSA_TRY(reduce_tensor(s, LSA_Q_NORM, stream, err));
        LSA_TRY(reduce_tensor(s, LSA_W_PROJ, stream, err));
        if (s->g.reach)
            LSA_TRY(lsa_gpu_comm_add(x->gpu, s->grad + s->at_costs, s->g.reach, LSA_GPU_F32, stream, err));
    }
    LSA_TRY(lsa_gpu_comm_end(x->gpu, err));
done:
    return st;
}

lsa_status step_ranks_join(lsa_gpu_step *s, lsa_err *err) {
    step_ranks *const x = s->ranks;
    if (!x || !x->forked) return LSA_OK;
    LSA_CUDA(cudaEventRecord(x->join, x->side));
    LSA_CUDA(cudaStreamWaitEvent(s->cs->stream, x->join, 0));
    x->forked = false;
    return LSA_OK;
}

lsa_status step_ranks_exchange(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(step_ranks_reduce(s, STEP_WQ_B, err));
    LSA_TRY(step_ranks_reduce(s, STEP_OTHERS, err));
    LSA_TRY(step_ranks_join(s, err));
done:
    return st;
}

/* Every rank's slices of the projections of all layers. */
static lsa_status gather(lsa_gpu_step *s, void *v, size_t size, lsa_gpu_type type, cudaStream_t stream,
                         lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_comm *const c = s->ranks->gpu;
    LSA_TRY(lsa_gpu_comm_begin(c, err));
    for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_at(&s->g, 0, (lsa_indexer_part)p);
        for (int l = 0; l < s->g.n_layer && p != LSA_Q_NORM; l++)
            LSA_TRY(lsa_gpu_comm_gather_slices(c, (char *)v + (size_t)(l * s->layer_param + t.offset) * size,
                                               t.n, type, stream, err));
    }
    LSA_TRY(lsa_gpu_comm_end(c, err));
done:
    return st;
}

static bool early(const lsa_gpu_step *s) {
    return !s->o.no_overlap && s->o.hard_share == 0;
}
lsa_status step_ranks_share(lsa_gpu_step *s, lsa_err *err) {
    return s->ranks && s->o.sharded ? gather(s, s->p16, sizeof *s->p16, LSA_GPU_BF16, s->cs->stream, err)
                                    : LSA_OK;
}
lsa_status step_ranks_share_early(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (!s->ranks || !s->o.sharded || !early(s)) return LSA_OK;
    LSA_TRY(fork(s, err));
    LSA_TRY(gather(s, s->p16, sizeof *s->p16, LSA_GPU_BF16, s->ranks->side, err));
done:
    return st;
}
lsa_status step_ranks_share_late(lsa_gpu_step *s, lsa_err *err) {
    return early(s) ? LSA_OK : step_ranks_share(s, err);
}
lsa_status step_ranks_gather(lsa_gpu_step *s, float *v, lsa_err *err) {
    return s->ranks && s->o.sharded ? gather(s, v, sizeof *v, LSA_GPU_F32, s->cs->stream, err) : LSA_OK;
}

lsa_status step_ranks_rehearse(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (!s->ranks) return LSA_OK;
    LSA_TRY(step_ranks_add(s, s->total, 3, err));
    LSA_TRY(step_ranks_exchange(s, err));
    LSA_TRY(step_ranks_share(s, err));
    LSA_TRY(step_ranks_gather(s, s->grad, err));
    LSA_TRY(step_ranks_await(s, NULL, "connecting the GPUs", err));
done:
    return st;
}

lsa_status step_ranks_await(lsa_gpu_step *s, cudaEvent_t event, const char *what, lsa_err *err) {
    const struct timespec nap = {0, 20000};
    step_ranks *const x = s->ranks;
    lsa_status st = LSA_OK;
    if (!x || !x->gpu) {
        LSA_CUDA(event ? cudaEventSynchronize(event) : cudaStreamSynchronize(s->cs->stream));
        return LSA_OK;
    }
    lsa_comm_enter(x->host, what);
    for (int looks = 0;; looks++) {
        const cudaError_t e = event ? cudaEventQuery(event) : cudaStreamQuery(s->cs->stream);
        if (e == cudaSuccess) break;
        if (e != cudaErrorNotReady) {
            cudaGetLastError();
            st = lsa_err_set(err, LSA_E_DEVICE, __FILE__, __LINE__, "%s: %s", what, cudaGetErrorString(e));
            break;
        }
        if (looks % 16 == 0 && (st = lsa_gpu_comm_check(x->gpu, err)) != LSA_OK) break;
        nanosleep(&nap, NULL);
    }
    lsa_comm_leave(x->host);
    return st;
}
