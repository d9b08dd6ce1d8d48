/* A bf16 layer of full size without a model: see kernels/model/gpu_bench.h. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cuda/teacher/bf16_weights.h"

extern "C" {
#include "kernels/core/clock.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/model/gpu_bench.h"
}

enum {
    THREADS = TEACHER_THREADS,
    PLACES = 3, /* documents of a wave on the GPU: one comes, one is computed, one leaves */
    RING = 4,
    PIECE = 64 << 20, /* bytes of stored weights that travel together */
    CEILING = 8192
};

struct lsa_layer_bench {
    lsa_ctx *ctx;
    cuda_state *cs;
    lsa_gpu_teacher_geom g;
    int64_t max_tokens, chunk, arena_bytes, stored_bytes, most;
    int stores;
    lsa_bf16 *layer;
    bf16_layout *layout;
    char *arena, *stored[2];
    uint16_t *X; /* [max_tokens, s, d] */
    int32_t *token;
    uint64_t *sum;
    cudaEvent_t begun, ended;
};

static __global__ void __launch_bounds__(THREADS) streams_k(uint16_t *X, int64_t n, uint32_t seed) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        uint32_t h = (uint32_t)i * 0x9e3779b9u ^ seed ^ (uint32_t)(i >> 32);
        h = (h ^ h >> 16) * 0x7feb352du;
        h = (h ^ h >> 15) * 0x846ca68bu;
        X[i] = bf16_of((float)(h >> 8) * 0x1.bb67aep-23f - 1.7320508f); /* of variance 1 */
    }
}
static __global__ void __launch_bounds__(THREADS) tokens_k(int32_t *token, int64_t n, uint32_t vocab) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        token[i] = (int32_t)(((uint32_t)i * 2654435761u >> 8) % vocab);
}
/* A sum of all numbers, each times its place: integers, so the order does not matter. */
static __global__ void __launch_bounds__(THREADS)
    checksum_k(const uint16_t *X, int64_t n, unsigned long long *sum) {
    unsigned long long mine = 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        mine += (unsigned long long)X[i] * (2 * (unsigned long long)i + 1);
    atomicAdd(sum, mine);
}

static lsa_status note_use(lsa_layer_bench *b, lsa_err *err) {
    size_t left = 0, all = 0;
    LSA_CUDA(cudaMemGetInfo(&left, &all));
    if ((int64_t)(all - left) > b->most) b->most = (int64_t)(all - left);
    return LSA_OK;
}

extern "C" lsa_status lsa_layer_bench_create(lsa_layer_bench **out, int64_t *bytes, lsa_ctx *ctx,
                                             const lsa_gpu_teacher_geom *g, const float *freq_main,
                                             const float *freq_comp, int64_t max_tokens, int64_t chunk,
                                             int stores, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_layer_bench *b = (lsa_layer_bench *)calloc(1, sizeof *b);
    const int64_t streams = (int64_t)g->hc_mult * g->hidden;
    /* the documents of a wave take the same room as a long one */
    const int64_t tokens = max_tokens > PLACES * chunk ? max_tokens : PLACES * chunk;
    if (out) *out = NULL;
    if (!b) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    b->ctx = ctx;
    b->g = *g;
    b->max_tokens = max_tokens;
    b->chunk = chunk;
    b->stores = stores;
    b->layout = (bf16_layout *)calloc(1, sizeof *b->layout);
    if (!b->layout) LSA_FAIL(LSA_E_NOMEM, "out of memory");
    for (int hash = 0; hash < 2; hash++) { /* CSA layers are the largest, with or without experts by token */
        LSA_TRY(bf16_layout_make(b->layout, g, LSA_CHUNK, 2, hash, NULL, err));
        if (b->layout->arena > b->arena_bytes) b->arena_bytes = b->layout->arena;
        if (b->layout->stored > b->stored_bytes) b->stored_bytes = b->layout->stored;
    }
    *bytes = b->arena_bytes + stores * b->stored_bytes + tokens * (streams * 2 + 4) +
             lsa_bf16_bytes(g, max_tokens, chunk);
    if (!out) goto done;
    b->cs = lsa_cuda(ctx);
    LSA_TRY(lsa_bf16_create(&b->layer, ctx, g, freq_main, freq_comp, max_tokens, chunk, err));
    LSA_TRY(lsa_ctx_alloc_(ctx, (void **)&b->arena, b->arena_bytes, 1, "weights of a layer", err));
    for (int i = 0; i < stores; i++)
        LSA_TRY(lsa_ctx_alloc_(ctx, (void **)&b->stored[i], b->stored_bytes, 1, "stored weights of a layer",
                               err));
    LSA_TRY(lsa_ctx_alloc_(ctx, (void **)&b->X, tokens * streams, 2, "streams", err));
    LSA_TRY(lsa_ctx_alloc_(ctx, (void **)&b->token, tokens, 4, "tokens", err));
    LSA_TRY(lsa_ctx_alloc_(ctx, (void **)&b->sum, 1, 8, "checksum", err));
    LSA_CUDA(cudaEventCreate(&b->begun));
    LSA_CUDA(cudaEventCreate(&b->ended));
    tokens_k<<<1024, THREADS, 0, b->cs->stream>>>(b->token, tokens, (uint32_t)g->vocab);
    LSA_TRY(lsa_ctx_sync(ctx, err));
    LSA_TRY(note_use(b, err));
    *out = b;
    b = NULL;
done:
    lsa_layer_bench_destroy(b);
    return st;
}

extern "C" void lsa_layer_bench_destroy(lsa_layer_bench *b) {
    if (!b) return;
    lsa_bf16_destroy(b->layer);
    void *const p[] = {b->arena, b->stored[0], b->stored[1], b->X, b->token, b->sum};
    for (void *x : p)
        if (x) lsa_ctx_free(b->ctx, x);
    if (b->begun) cudaEventDestroy(b->begun);
    if (b->ended) cudaEventDestroy(b->ended);
    free(b->layout);
    free(b);
}

extern "C" int64_t lsa_layer_bench_peak(const lsa_layer_bench *b) {
    return b->most;
}

static lsa_status elapsed(lsa_layer_bench *b, double *seconds, lsa_err *err) {
    float ms = 0;
    LSA_CUDA(cudaEventSynchronize(b->ended));
    LSA_CUDA(cudaEventElapsedTime(&ms, b->begun, b->ended));
    *seconds = 1e-3 * (double)ms;
    return LSA_OK;
}

extern "C" lsa_status lsa_layer_bench_ceilings(lsa_layer_bench *b, double *flops, double *bandwidth,
                                               lsa_err *err) {
    lsa_status st = LSA_OK;
    enum { TIMES = 20 };
    const int64_t n = CEILING;
    double seconds = 0;
    /* within the arena: three matrices, then two halves of it */
    uint16_t *const x = (uint16_t *)b->arena;
    const bf16_product p = {n, n, n, x, x + n * n, n, n, x + 2 * n * n, n, false};
    const size_t half = (size_t)(b->arena_bytes / 2 / 256 * 256);
    if (b->arena_bytes < 6 * n * n)
        LSA_FAIL(LSA_E_CONFIG, "the weights of a layer take %lld bytes: too few to measure ceilings in",
                 (long long)b->arena_bytes);
    streams_k<<<4096, THREADS, 0, b->cs->stream>>>(x, 2 * n * n, 7);
    for (int i = 0; i < TIMES + 3; i++) {
        if (i == 3) LSA_CUDA(cudaEventRecord(b->begun, b->cs->stream));
        LSA_TRY(bf16_gemm(b->layer, 0, &p, err));
    }
    LSA_CUDA(cudaEventRecord(b->ended, b->cs->stream));
    LSA_TRY(elapsed(b, &seconds, err));
    *flops = 2.0 * (double)n * (double)n * (double)n * TIMES / seconds;
    for (int i = 0; i < 6; i++) {
        if (i == 1) LSA_CUDA(cudaEventRecord(b->begun, b->cs->stream));
        LSA_CUDA(cudaMemcpyAsync(b->arena + half, b->arena, half, cudaMemcpyDeviceToDevice, b->cs->stream));
    }
    LSA_CUDA(cudaEventRecord(b->ended, b->cs->stream));
    LSA_TRY(elapsed(b, &seconds, err));
    *bandwidth = 2.0 * 5 * (double)half / seconds;
done:
    return st;
}

extern "C" lsa_status lsa_layer_bench_weights(lsa_layer_bench *b, const lsa_layer_bench_layer *l,
                                              int64_t *stored, double *seconds, lsa_err *err) {
    lsa_status st = LSA_OK;
    const cudaStream_t s = b->cs->stream;
    LSA_TRY(bf16_layout_make(b->layout, &b->g, l->ratio, l->roles, l->hash, b->arena, err));
    if (b->layout->arena > b->arena_bytes || b->layout->stored > b->stored_bytes)
        LSA_FAIL(LSA_E_BUG, "a layer of ratio %d takes more than the largest", l->ratio);
    LSA_TRY(bf16_layout_invent(b->layout, b->stored[0], (uint32_t)(l->ratio + 1), s, err));
    LSA_CUDA(cudaEventRecord(b->begun, s));
    LSA_TRY(bf16_layout_decode(b->layout, b->stored[0], s, err));
    LSA_CUDA(cudaEventRecord(b->ended, s));
    LSA_TRY(elapsed(b, seconds, err));
    *stored = b->layout->stored;
done:
    return st;
}

static void fresh_streams(lsa_layer_bench *b, int64_t n) {
    streams_k<<<4096, THREADS, 0, b->cs->stream>>>(b->X, n * b->g.hc_mult * b->g.hidden, 1);
}

static lsa_status document(lsa_layer_bench *b, uint16_t *X, int64_t n, lsa_err *err) {
    for (int64_t p = 0; p < n; p += b->chunk) {
        const int64_t m = n - p < b->chunk ? n - p : b->chunk;
        const lsa_status st = lsa_bf16_layer(b->layer, &b->layout->w, X + p * b->g.hc_mult * b->g.hidden,
                                             b->token + p, p, m, err);
        if (st != LSA_OK) return st;
    }
    return LSA_OK;
}

extern "C" lsa_status lsa_layer_bench_run(lsa_layer_bench *b, const lsa_layer_bench_layer *l, int64_t n,
                                          int runs, double *seconds, double stage[LSA_BF16_STAGES],
                                          uint64_t *checksum, lsa_err *err) {
    lsa_status st = LSA_OK;
    double before[LSA_BF16_STAGES], once;
    const cudaStream_t s = b->cs->stream;
    if (n > b->max_tokens || l->ratio != b->layout->w.ratio)
        LSA_RET_FAIL(LSA_E_ARG, "a document of %lld tokens, room for %lld, ratio %d, weights of ratio %d",
                     (long long)n, (long long)b->max_tokens, l->ratio, b->layout->w.ratio);
    fresh_streams(b, n);
    LSA_TRY(document(b, b->X, n < b->chunk ? n : b->chunk, err)); /* choices of cuBLASLt */
    *seconds = INFINITY;
    for (int i = 0; i < runs; i++) {
        fresh_streams(b, n);
        LSA_CUDA(cudaEventRecord(b->begun, s));
        LSA_TRY(document(b, b->X, n, err));
        LSA_CUDA(cudaEventRecord(b->ended, s));
        LSA_TRY(elapsed(b, &once, err));
        if (once < *seconds) *seconds = once;
    }
    LSA_CUDA(cudaMemsetAsync(b->sum, 0, sizeof *b->sum, s));
    checksum_k<<<4096, THREADS, 0, s>>>(b->X, n * b->g.hc_mult * b->g.hidden, (unsigned long long *)b->sum);
    LSA_TRY(lsa_ctx_download(b->ctx, checksum, b->sum, sizeof *checksum, err));
    lsa_bf16_seconds(b->layer, before);
    lsa_bf16_time(b->layer, true);
    fresh_streams(b, n);
    st = document(b, b->X, n, err);
    lsa_bf16_time(b->layer, false);
    lsa_bf16_seconds(b->layer, stage);
    for (int i = 0; i < LSA_BF16_STAGES; i++) stage[i] -= before[i];
    LSA_TRY(st);
    LSA_TRY(note_use(b, err));
done:
    return st;
}

/* ---- weights from a slow source ---- */

/* The thread that reads: layer k's stored bytes, piece by piece, no faster than the source, into stored[k %
 * 2] once layer k - 2 was decoded from it. */
struct source {
    lsa_layer_bench *b;
    int64_t bytes; /* of a layer */
    char *file;    /* [bytes] what it reads from: pageable memory */
    int layers;
    double rate;
    cudaStream_t stream;
    char *ring[RING];
    cudaEvent_t sent[RING], loaded[2], decoded[2];
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    int queued, used; /* layers whose copies were queued; whose decoding was queued */
    bool ending, failed;
};

static bool feed(source *x, int layer, int64_t *piece) {
    for (int64_t at = 0; at < x->bytes; at += PIECE, (*piece)++) {
        const size_t n = x->bytes - at < PIECE ? (size_t)(x->bytes - at) : (size_t)PIECE;
        const int slot = (int)(*piece % RING);
        const double begun = lsa_now_s();
        /* the source takes n / rate for this piece, copying included */
        if (*piece >= RING && cudaEventSynchronize(x->sent[slot]) != cudaSuccess) return false;
        memcpy(x->ring[slot], x->file + at, n);
        const double left = (double)n / x->rate - (lsa_now_s() - begun);
        if (left > 0) {
            const struct timespec t = {(time_t)left, (long)((left - (double)(time_t)left) * 1e9)};
            nanosleep(&t, NULL);
        }
        if (cudaMemcpyAsync(x->b->stored[layer % 2] + at, x->ring[slot], n, cudaMemcpyHostToDevice,
                            x->stream) != cudaSuccess ||
            cudaEventRecord(x->sent[slot], x->stream) != cudaSuccess)
            return false;
    }
    return cudaEventRecord(x->loaded[layer % 2], x->stream) == cudaSuccess;
}

static void *read_source(void *arg) {
    source *const x = (source *)arg;
    int64_t piece = 0;
    cudaSetDevice(x->b->cs->device);
    for (int k = 0; k < x->layers; k++) {
        pthread_mutex_lock(&x->lock);
        while (!x->ending && x->used < k - 1) pthread_cond_wait(&x->changed, &x->lock);
        const bool ending = x->ending;
        pthread_mutex_unlock(&x->lock);
        if (ending) break;
        bool ok = k < 2 || cudaEventSynchronize(x->decoded[k % 2]) == cudaSuccess;
        ok = ok && feed(x, k, &piece);
        pthread_mutex_lock(&x->lock);
        x->queued = k + 1;
        x->failed = !ok;
        pthread_cond_broadcast(&x->changed);
        pthread_mutex_unlock(&x->lock);
        if (!ok) break;
    }
    return NULL;
}

static lsa_status source_open(source *x, lsa_err *err) {
    x->file = (char *)malloc((size_t)x->bytes);
    if (!x->file) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory: %lld bytes of weights", (long long)x->bytes);
    LSA_CUDA(cudaStreamCreateWithFlags(&x->stream, cudaStreamNonBlocking));
    for (int i = 0; i < RING; i++) {
        LSA_CUDA(cudaHostAlloc((void **)&x->ring[i], PIECE, cudaHostAllocDefault));
        LSA_CUDA(cudaEventCreateWithFlags(&x->sent[i], cudaEventDisableTiming));
    }
    for (int i = 0; i < 2; i++) {
        LSA_CUDA(cudaEventCreateWithFlags(&x->loaded[i], cudaEventDisableTiming));
        LSA_CUDA(cudaEventCreateWithFlags(&x->decoded[i], cudaEventDisableTiming));
    }
    return LSA_OK;
}
static void source_close(source *x) {
    if (x->stream) cudaStreamSynchronize(x->stream);
    free(x->file);
    for (int i = 0; i < RING; i++) {
        cudaFreeHost(x->ring[i]);
        if (x->sent[i]) cudaEventDestroy(x->sent[i]);
    }
    for (int i = 0; i < 2; i++) {
        if (x->loaded[i]) cudaEventDestroy(x->loaded[i]);
        if (x->decoded[i]) cudaEventDestroy(x->decoded[i]);
    }
    if (x->stream) cudaStreamDestroy(x->stream);
}

/* The wave's documents through the layer; their streams come and go on streams of their own. `turn` counts
 * documents over all layers. */
struct traffic {
    cudaStream_t in, out;
    cudaEvent_t came[PLACES], computed[PLACES], left[PLACES];
    uint16_t *host_in, *host_out;
    int64_t turn;
};

static lsa_status traffic_open(traffic *x, size_t bytes, lsa_err *err) {
    LSA_CUDA(cudaStreamCreateWithFlags(&x->in, cudaStreamNonBlocking));
    LSA_CUDA(cudaStreamCreateWithFlags(&x->out, cudaStreamNonBlocking));
    LSA_CUDA(cudaHostAlloc((void **)&x->host_in, bytes, cudaHostAllocDefault));
    LSA_CUDA(cudaHostAlloc((void **)&x->host_out, bytes, cudaHostAllocDefault));
    for (int i = 0; i < PLACES; i++) {
        LSA_CUDA(cudaEventCreateWithFlags(&x->came[i], cudaEventDisableTiming));
        LSA_CUDA(cudaEventCreateWithFlags(&x->computed[i], cudaEventDisableTiming));
        LSA_CUDA(cudaEventCreateWithFlags(&x->left[i], cudaEventDisableTiming));
    }
    return LSA_OK;
}
static void traffic_close(traffic *x) {
    if (x->in) cudaStreamSynchronize(x->in);
    if (x->out) cudaStreamSynchronize(x->out);
    cudaFreeHost(x->host_in);
    cudaFreeHost(x->host_out);
    for (int i = 0; i < PLACES; i++) {
        if (x->came[i]) cudaEventDestroy(x->came[i]);
        if (x->computed[i]) cudaEventDestroy(x->computed[i]);
        if (x->left[i]) cudaEventDestroy(x->left[i]);
    }
    if (x->in) cudaStreamDestroy(x->in);
    if (x->out) cudaStreamDestroy(x->out);
}

static lsa_status wave_document(lsa_layer_bench *b, traffic *x, int64_t n, lsa_err *err) {
    const int at = (int)(x->turn % PLACES);
    const size_t numbers = (size_t)(n * b->g.hc_mult * b->g.hidden);
    uint16_t *const X = b->X + (size_t)at * numbers;
    if (x->turn >= PLACES) LSA_CUDA(cudaStreamWaitEvent(x->in, x->left[at], 0));
    LSA_CUDA(cudaMemcpyAsync(X, x->host_in, numbers * 2, cudaMemcpyHostToDevice, x->in));
    LSA_CUDA(cudaEventRecord(x->came[at], x->in));
    LSA_CUDA(cudaStreamWaitEvent(b->cs->stream, x->came[at], 0));
    const lsa_status st = document(b, X, n, err);
    if (st != LSA_OK) return st;
    LSA_CUDA(cudaEventRecord(x->computed[at], b->cs->stream));
    LSA_CUDA(cudaStreamWaitEvent(x->out, x->computed[at], 0));
    LSA_CUDA(cudaMemcpyAsync(x->host_out, X, numbers * 2, cudaMemcpyDeviceToHost, x->out));
    LSA_CUDA(cudaEventRecord(x->left[at], x->out));
    x->turn++;
    return LSA_OK;
}

/* Seconds between two events of the computing stream. */
static lsa_status add_seconds(double *to, cudaEvent_t from, cudaEvent_t until, lsa_err *err) {
    float ms = 0;
    LSA_CUDA(cudaEventSynchronize(until));
    LSA_CUDA(cudaEventElapsedTime(&ms, from, until));
    *to += 1e-3 * (double)ms;
    return LSA_OK;
}

static lsa_status wave_layers(lsa_layer_bench *b, source *from, traffic *x, int64_t wave, int64_t n,
                              cudaEvent_t *e, lsa_layer_bench_wave *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    const cudaStream_t s = b->cs->stream;
    double start = lsa_now_s();
    for (int k = 0; k < from->layers; k++) {
        cudaEvent_t *const at = e + 3 * k; /* idle, weights there, decoded */
        LSA_CUDA(cudaEventRecord(at[0], s));
        pthread_mutex_lock(&from->lock);
        while (from->queued <= k && !from->failed) pthread_cond_wait(&from->changed, &from->lock);
        const bool failed = from->failed;
        pthread_mutex_unlock(&from->lock);
        if (failed) LSA_FAIL(LSA_E_DEVICE, "copying stored weights failed");
        LSA_CUDA(cudaStreamWaitEvent(s, from->loaded[k % 2], 0));
        LSA_CUDA(cudaEventRecord(at[1], s));
        if (k == 0) {
            LSA_CUDA(cudaEventSynchronize(at[1]));
            out->first_load = lsa_now_s() - start;
            start = lsa_now_s();
        }
        LSA_TRY(bf16_layout_decode(b->layout, b->stored[k % 2], s, err));
        LSA_CUDA(cudaEventRecord(from->decoded[k % 2], s));
        LSA_CUDA(cudaEventRecord(at[2], s));
        pthread_mutex_lock(&from->lock);
        from->used = k + 1;
        pthread_cond_broadcast(&from->changed);
        pthread_mutex_unlock(&from->lock);
        for (int64_t t = 0; t + n <= wave; t += n) LSA_TRY(wave_document(b, x, n, err));
    }
    LSA_CUDA(cudaStreamSynchronize(s));
    LSA_CUDA(cudaStreamSynchronize(x->out));
    out->seconds = lsa_now_s() - start;
    for (int k = 0; k < from->layers; k++) {
        if (k > 0) LSA_TRY(add_seconds(&out->waited, e[3 * k], e[3 * k + 1], err));
        LSA_TRY(add_seconds(&out->decoded, e[3 * k + 1], e[3 * k + 2], err));
    }
done:
    return st;
}

extern "C" lsa_status lsa_layer_bench_stream(lsa_layer_bench *b, const lsa_layer_bench_layer *l, int layers,
                                             int64_t wave, int64_t n, double rate, lsa_layer_bench_wave *out,
                                             lsa_err *err) {
    lsa_status st = LSA_OK;
    source from = {};
    traffic x = {};
    enum { MOST_LAYERS = 8 };
    cudaEvent_t e[3 * MOST_LAYERS] = {};
    pthread_t reader;
    bool reading = false;
    const size_t bytes = (size_t)(n * b->g.hc_mult * b->g.hidden) * 2;
    *out = {};
    from.b = b, from.layers = layers, from.rate = rate, from.bytes = b->layout->stored;
    pthread_mutex_init(&from.lock, NULL);
    pthread_cond_init(&from.changed, NULL);
    if (b->stores < 2 || layers < 1 || layers > MOST_LAYERS || l->ratio != b->layout->w.ratio ||
        n > b->chunk || wave < n)
        LSA_FAIL(
            LSA_E_ARG,
            "streaming needs two places for stored weights, the layer's weights, up to %d layers and documents "
            "of at most %lld tokens; found %d places, %d layers, documents of %lld in a wave of %lld",
            MOST_LAYERS, (long long)b->chunk, b->stores, layers, (long long)n, (long long)wave);
    for (cudaEvent_t &v : e) LSA_CUDA(cudaEventCreate(&v));
    LSA_TRY(source_open(&from, err));
    LSA_TRY(traffic_open(&x, bytes, err));
    LSA_TRY(lsa_ctx_download(b->ctx, from.file, b->stored[0], (size_t)from.bytes, err));
    fresh_streams(b, n);
    LSA_TRY(lsa_ctx_download(b->ctx, x.host_in, b->X, bytes, err));
    if (pthread_create(&reader, NULL, read_source, &from) != 0)
        LSA_FAIL(LSA_E_NOMEM, "cannot start the thread that reads weights");
    reading = true;
    st = wave_layers(b, &from, &x, wave, n, e, out, err);
    out->tokens = wave / n * n;
    out->stored_bytes = from.bytes;
    if (st == LSA_OK) st = note_use(b, err);
done:
    if (reading) {
        pthread_mutex_lock(&from.lock);
        from.ending = true;
        pthread_cond_broadcast(&from.changed);
        pthread_mutex_unlock(&from.lock);
        pthread_join(reader, NULL);
    }
    source_close(&from);
    traffic_close(&x);
    for (cudaEvent_t v : e)
        if (v) cudaEventDestroy(v);
    pthread_mutex_destroy(&from.lock);
    pthread_cond_destroy(&from.changed);
    return st;
}
