/* Fibers and the runtime of emu.h. A fiber is entered by setcontext once, then by longjmp: no system calls.
 */
#include "tests/emulated/emu/emu.h"

#include <csetjmp>
#include <ucontext.h>

extern "C" {
#include "kernels/backend.h"
#include "kernels/core/clock.h"
#include "kernels/cpu/gemm.h"
}

dim3 blockDim, gridDim;

namespace emu {
enum { THREADS = 1024, STACK = 64 << 10, RUNS = 0, AT_BARRIER, AT_WARP };

struct fiber {
    ucontext_t start;
    jmp_buf here;
    char *stack;
    bool live, entered;
    int state;
    unsigned mask;
};
static fiber fibers[THREADS];
static jmp_buf scheduler;
static const std::function<void()> *work;
int current;
uint3 thread_index[THREADS], block_index;
char *dynamic;
int64_t pinned;
uint64_t warp_value[32][32];

static void broken(const char *what, int thread) {
    fprintf(stderr, "emulated kernel: %s (block %u,%u,%u, thread %d)\n", what, block_index.x, block_index.y,
            block_index.z, thread);
    abort();
}

static void body() {
    for (;;) { /* the next kernel or block begins where this one ended */
        (*work)();
        fibers[current].live = false;
        if (_setjmp(fibers[current].here) == 0) _longjmp(scheduler, 1);
    }
}
static void rest(int state) {
    fibers[current].state = state;
    if (_setjmp(fibers[current].here) == 0) _longjmp(scheduler, 1);
}
static void run(int i) {
    current = i;
    if (_setjmp(scheduler)) return;
    if (fibers[i].entered) _longjmp(fibers[i].here, 1);
    fibers[i].entered = true;
    setcontext(&fibers[i].start);
}

void barrier() {
    rest(AT_BARRIER);
}
void meet(unsigned mask, uint64_t value) {
    if (!(mask >> lane() & 1)) broken("a lane is not in its own mask", current);
    values()[lane()] = value;
    fibers[current].mask = mask;
    rest(AT_WARP);
}
void part() {
    rest(AT_WARP);
}

/* Frees the lanes of a mask once all of them are there. */
static bool free_warps(int n) {
    bool freed = false;
    for (int i = 0; i < n; i++) {
        if (!fibers[i].live || fibers[i].state != AT_WARP) continue;
        const int w = i & ~31;
        const unsigned mask = fibers[i].mask;
        bool all = true;
        for (int k = 0; k < 32; k++) {
            if (!(mask >> k & 1)) continue;
            if (w + k >= n || !fibers[w + k].live) broken("a lane of a mask has left the kernel", w + k);
            all = all && fibers[w + k].state == AT_WARP && fibers[w + k].mask == mask;
        }
        for (int k = 0; all && k < 32; k++)
            if (mask >> k & 1) fibers[w + k].state = RUNS;
        freed = freed || all;
    }
    return freed;
}

static void run_block(int n) {
    for (int i = 0; i < n; i++) {
        fiber *const f = &fibers[i];
        thread_index[i] = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        f->live = true;
        f->state = RUNS;
        if (f->stack) continue;
        f->stack = (char *)malloc(STACK);
        getcontext(&f->start);
        f->start.uc_stack.ss_sp = f->stack;
        f->start.uc_stack.ss_size = STACK;
        f->start.uc_link = NULL;
        makecontext(&f->start, body, 0);
    }
    for (;;) {
        bool ran = false, any = false;
        for (int i = 0; i < n; i++) {
            if (fibers[i].live && fibers[i].state == RUNS) {
                run(i);
                ran = true;
            }
            any = any || fibers[i].live;
        }
        if (!any) return;
        if (ran || free_warps(n)) continue;
        for (int i = 0; i < n; i++)
            if (fibers[i].live && fibers[i].state != AT_BARRIER) broken("waits for ever", i);
        for (int i = 0; i < n; i++) fibers[i].state = RUNS;
    }
}

void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()> &kernel) {
    const size_t room = (shared + 255) / 256 * 256 + 256;
    blockDim = block;
    gridDim = grid;
    work = &kernel;
    dynamic = (char *)aligned_alloc(256, room);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = {x, y, z};
                memset(dynamic, 0xff, room); /* NaN */
                run_block((int)(block.x * block.y * block.z));
            }
    free(dynamic);
}
} // namespace emu

extern "C" {
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t) {
    return "emulated";
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, n);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) {
    *p = malloc(n);
    emu::pinned += *p != NULL;
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t) {
    *p = malloc(n);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t step, const void *from, size_t from_step, size_t width,
                              size_t rows, cudaMemcpyKind, cudaStream_t) {
    for (size_t i = 0; i < rows; i++)
        memcpy((char *)to + i * step, (const char *)from + i * from_step, width);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int v, size_t n, cudaStream_t) {
    memset(to, v, n);
    return cudaSuccess;
}
/* A stream is done with everything at once; an event is the time when it was recorded. */
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    *s = NULL;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = (cudaEvent_t)calloc(1, sizeof(double));
    return *e ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) {
    return cudaEventCreateWithFlags(e, 0);
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    free(e);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    *(double *)e = lsa_now_s();
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = (float)(1e3 * (*(double *)b - *(double *)a));
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what,
                                   int) { /* an sm_80 with an sm_90's shared memory */
    *value = what == cudaDevAttrComputeCapabilityMajor         ? 8
             : what == cudaDevAttrMultiProcessorCount          ? 16
             : what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10
                                                               : 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    p->major = 8, p->multiProcessorCount = 16;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    *left = *all = (size_t)1 << 40;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    emu::pinned -= p != NULL;
    free(p);
    return cudaSuccess;
}
}

/* cuBLASLt's product by the cpu column's. */
lsa_status lsa_cuda_gemm(lsa_ctx *, const lsa_gemm_args *a, lsa_err *) {
    lsa_gemm_nt(a->m, a->n, a->k, a->alpha, a->a, a->k, a->b, a->k, a->beta, a->c, a->n);
    return LSA_OK;
}
