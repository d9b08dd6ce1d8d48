/* A document's streams between two layers, in pinned memory: copied chunk by chunk by two streams of their
 * own while chunks before and after are computed. X is a ring of slots, a chunk each; a document takes as
 * many in a row as it has chunks, so that one can arrive while the one before is computed or leaves.
 *   loaded[i]    slot i holds what its document parked        computing waits for it
 *   computed[i]  the layer is done with slot i                saving, and the next load, wait for it
 *   saved[i]     slot i was copied out                        whatever writes to slot i next waits for it
 *   turn         what was saved before it may be loaded after it
 * The mistake that would stay silent: a load that overtakes the save of the same document in the layer
 * before; lsa_gpu_teacher_turn is what forbids it. */
#include "kernels/cuda/teacher/teacher_state.h"

#define NEW(p, count) LSA_TRY(lsa_ctx_alloc_(t->ctx, (void **)&(p), (int64_t)(count), sizeof *(p), #p, err))

struct teacher_park {
    cudaStream_t in, out;
    cudaEvent_t turn;
    cudaEvent_t *loaded, *computed, *saved; /* [n_slot] */
    uint16_t *half;                         /* [n_slot * chunk, s, d]: bf16 on its way; or NULL */
    int64_t next, base;                     /* slots: free next, of the document */
};

static int64_t width(const lsa_gpu_teacher *t) {
    return (int64_t)t->g.hc_mult * t->g.hidden;
}

static lsa_status park_create(lsa_gpu_teacher *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    const size_t n = (size_t)t->n_slot;
    teacher_park *const k = (teacher_park *)calloc(1, sizeof *k);
    if (!k) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    t->park = k;
    k->loaded = (cudaEvent_t *)calloc(3 * n, sizeof *k->loaded);
    if (!k->loaded) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    k->computed = k->loaded + n, k->saved = k->computed + n;
    LSA_CUDA(cudaStreamCreateWithFlags(&k->in, cudaStreamNonBlocking));
    LSA_CUDA(cudaStreamCreateWithFlags(&k->out, cudaStreamNonBlocking));
    LSA_CUDA(cudaEventCreateWithFlags(&k->turn, cudaEventDisableTiming));
    for (size_t i = 0; i < 3 * n; i++)
        LSA_CUDA(cudaEventCreateWithFlags(&k->loaded[i], cudaEventDisableTiming));
    LSA_TRY(lsa_ctx_sync(t->ctx, err)); /* X is zeroed on another stream */
done:
    return st;
}

void teacher_park_destroy(lsa_gpu_teacher *t) {
    teacher_park *const k = t->park;
    if (!k) return;
    if (k->in) cudaStreamSynchronize(k->in), cudaStreamDestroy(k->in);
    if (k->out) cudaStreamSynchronize(k->out), cudaStreamDestroy(k->out);
    if (k->turn) cudaEventDestroy(k->turn);
    for (int64_t i = 0; k->loaded && i < 3 * t->n_slot; i++)
        if (k->loaded[i]) cudaEventDestroy(k->loaded[i]);
    lsa_ctx_free(t->ctx, k->half);
    free(k->loaded);
    free(k);
    t->park = NULL;
}

static __global__ void to_half(const float *x, uint16_t *y, int64_t n) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += gridDim.x * (int64_t)blockDim.x) {
        const uint32_t u = __float_as_uint(x[i]);
        y[i] = (u & 0x7fffffffu) > 0x7f800000u ? (uint16_t)(u >> 16 | 0x40)
                                               : (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
    }
}
static __global__ void of_half(const uint16_t *x, float *y, int64_t n) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += gridDim.x * (int64_t)blockDim.x)
        y[i] = __uint_as_float((uint32_t)x[i] << 16);
}
enum { BLOCKS = 1024, THREADS = 256 };

/* Numbers of the chunk at p, and where they begin, in X and in what is parked. */
static int64_t numbers(const lsa_gpu_teacher *t, int64_t p) {
    return (t->n - p < t->chunk ? t->n - p : t->chunk) * width(t);
}

static lsa_status load(lsa_gpu_teacher *t, int64_t p, lsa_err *err) {
    teacher_park *const k = t->park;
    const int64_t slot = k->base + p / t->chunk, n = numbers(t, p);
    float *const X = t->X + p * width(t);
    LSA_CUDA(cudaStreamWaitEvent(k->in, k->computed[slot], 0));
    LSA_CUDA(cudaStreamWaitEvent(k->in, k->saved[slot], 0));
    if (t->parked_half) {
        uint16_t *const half = k->half + slot * t->chunk * width(t);
        LSA_CUDA(cudaMemcpyAsync(half, (const uint16_t *)t->parked_from + p * width(t),
                                 (size_t)n * sizeof *half, cudaMemcpyHostToDevice, k->in));
        of_half<<<BLOCKS, THREADS, 0, k->in>>>(half, X, n);
        LSA_CUDA(cudaGetLastError());
    } else {
        LSA_CUDA(cudaMemcpyAsync(X, (const float *)t->parked_from + p * width(t), (size_t)n * sizeof *X,
                                 cudaMemcpyHostToDevice, k->in));
    }
    LSA_CUDA(cudaEventRecord(k->loaded[slot], k->in));
    return LSA_OK;
}

lsa_status teacher_park_begin(lsa_gpu_teacher *t, const lsa_gpu_teacher_doc *doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    t->parked_from = doc->from, t->parked_to = doc->to, t->parked_half = doc->half;
    if (!t->park && !doc->from && !doc->to) return LSA_OK; /* X is the first slots */
    if (!t->park) LSA_TRY(park_create(t, err));
    if (doc->half && !t->park->half) {
        NEW(t->park->half, t->n_slot * t->chunk * width(t));
        LSA_TRY(lsa_ctx_sync(t->ctx, err)); /* zeroed on another stream */
    }
    {
        teacher_park *const k = t->park;
        const int64_t slots = (t->n + t->chunk - 1) / t->chunk;
        k->base = k->next + slots <= t->n_slot ? k->next : 0;
        k->next = k->base + slots;
        t->X = t->ring + k->base * t->chunk * width(t);
        for (int64_t i = 0; i < slots; i++)
            if (doc->from)
                LSA_TRY(load(t, i * t->chunk, err));
            else
                LSA_CUDA(cudaStreamWaitEvent(t->cs->stream, k->saved[k->base + i], 0));
    }
done:
    return st;
}

lsa_status teacher_park_wait(lsa_gpu_teacher *t, int64_t p, lsa_err *err) {
    if (t->park && t->parked_from)
        LSA_CUDA(cudaStreamWaitEvent(t->cs->stream, t->park->loaded[t->park->base + p / t->chunk], 0));
    return LSA_OK;
}

lsa_status teacher_park_leave(lsa_gpu_teacher *t, int64_t p, lsa_err *err) {
    teacher_park *const k = t->park;
    if (!k) return LSA_OK;
    const int64_t slot = k->base + p / t->chunk, n = numbers(t, p);
    const float *const X = t->X + p * width(t);
    LSA_CUDA(cudaEventRecord(k->computed[slot], t->cs->stream));
    if (!t->parked_to) return LSA_OK;
    LSA_CUDA(cudaStreamWaitEvent(k->out, k->computed[slot], 0));
    if (t->parked_half) {
        uint16_t *const half = k->half + slot * t->chunk * width(t);
        to_half<<<BLOCKS, THREADS, 0, k->out>>>(X, half, n);
        LSA_CUDA(cudaGetLastError());
        LSA_CUDA(cudaMemcpyAsync((uint16_t *)t->parked_to + p * width(t), half, (size_t)n * sizeof *half,
                                 cudaMemcpyDeviceToHost, k->out));
    } else {
        LSA_CUDA(cudaMemcpyAsync((float *)t->parked_to + p * width(t), X, (size_t)n * sizeof *X,
                                 cudaMemcpyDeviceToHost, k->out));
    }
    LSA_CUDA(cudaEventRecord(k->saved[slot], k->out));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_teacher_turn(lsa_gpu_teacher *t, lsa_err *err) {
    if (!t->park) return LSA_OK;
    LSA_CUDA(cudaEventRecord(t->park->turn, t->park->out));
    LSA_CUDA(cudaStreamWaitEvent(t->park->in, t->park->turn, 0));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_pin(void **out, int64_t bytes, lsa_err *err) {
    *out = NULL;
    LSA_CUDA(cudaHostAlloc(out, (size_t)bytes, cudaHostAllocDefault));
    return LSA_OK;
}
extern "C" void lsa_gpu_unpin(void *p) {
    cudaFreeHost(p);
}
