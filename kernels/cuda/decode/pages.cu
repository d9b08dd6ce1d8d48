/* Encoded rows and keys of the CSA layers, and their tiers: all of them in pinned host memory, written as
 * they are formed; a reserve of pages on the GPU, one page table for all layers. See
 * kernels/model/gpu_session.h.
 *
 * A page's place is known to the host (slot_of) before the kernels know it (table, uploaded in the order of
 * the compute stream), so copies go on beside calls that use the former set. The mistake that would stay
 * silent: a page that is copied while chunks of it are still to come; such a page is never prefetched, and
 * once it has a place its new chunks are written to both tiers. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/decode/codec.cuh"
#include "kernels/cuda/decode/session_state.h"

extern "C" {
#include "kernels/core/dtype.h"
}

enum { THREADS = TEACHER_THREADS, WARPS = THREADS / 32, MOST_BYTES = 4 * TEACHER_WIDTH };

/* ---- memory ---- */

static lsa_status layer_pages(lsa_gpu_session *s, decode_layer *y, lsa_err *err) {
    lsa_status st = LSA_OK;
    const page_store *const g = &s->store;
    const int64_t chunks = s->max_chunk + 1, held = s->o.reserve * s->o.page;
    if (s->o.storage == LSA_GPU_ROWS_SERVER) {
        NEW(y->rows, chunks * g->row_bytes, rows);
        NEW(y->keys, chunks * g->key_bytes, keys);
        goto done;
    }
    NEW(y->rows, held * g->row_bytes, rows);
    PINNED(y->host_rows, g->n_page * s->o.page * g->row_bytes);
    PINNED(y->host_keys, g->n_page * s->o.page * g->key_bytes);
    if (s->o.keys_on_gpu[y->csa])
        NEW(y->all_keys, chunks * g->key_bytes, keys_level1);
    else
        NEW(y->keys, held * g->key_bytes, keys);
done:
    return st;
}

static lsa_status make_tiers(lsa_gpu_session *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    page_store *const g = &s->store;
    g->n_page = (s->max_chunk + s->o.page) / s->o.page;
    PINNED(g->slot_of, g->n_page);
    PINNED(g->shown, g->n_page);
    PINNED(g->wanted, g->n_page);
    PINNED(g->free_slot, s->o.reserve);
    PINNED(g->move, 2 * s->o.reserve);
    PINNED(g->host_list, s->max_chunk + 1);
    NEW(g->table, g->n_page, other);
    NEW(g->list, s->max_chunk + 1, other);
    LSA_CUDA(cudaStreamCreateWithFlags(&g->copies, cudaStreamNonBlocking));
    LSA_CUDA(cudaEventCreateWithFlags(&g->computed, cudaEventDisableTiming));
    LSA_CUDA(cudaEventCreateWithFlags(&g->copied, cudaEventDisableTiming));
    pages_reset(s);
done:
    return st;
}

lsa_status pages_make(lsa_gpu_session *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    page_store *const g = &s->store;
    const lsa_gpu_teacher_geom *q = &s->t->g;
    const int64_t m = s->t->chunk;
    if (s->o.storage == LSA_GPU_ROWS_F32) return LSA_OK;
    if (s->o.attend_all)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "attention to every chunk reads rows in f32: use that storage");
    if ((q->head_dim - q->rope_dim) % 4 || q->rope_dim % 2 || q->index_head_dim % 4)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "encoded rows need plain and index channels in fours, rotary ones in twos: found %d, %d, %d",
            q->head_dim - q->rope_dim, q->index_head_dim, q->rope_dim);
    if (s->o.storage == LSA_GPU_ROWS_TIERED && (s->o.reserve < 1 || s->o.page < 1))
        LSA_RET_FAIL(LSA_E_ARG, "a reserve of %lld pages of %d chunks: both must be at least 1",
                     (long long)s->o.reserve, s->o.page);
    g->row_bytes = encoded_row_bytes(q->head_dim, q->rope_dim);
    g->key_bytes = q->index_head_dim + 4;
    if (s->o.storage == LSA_GPU_ROWS_TIERED) LSA_TRY(make_tiers(s, err));
    for (int32_t l = 0; l < s->n_layer; l++)
        if (s->layer[l].csa >= 0) LSA_TRY(layer_pages(s, &s->layer[l], err));
    NEW(g->fresh_row, (m / LSA_CHUNK + 2) * q->head_dim, work);
    NEW(g->fresh_key, (m / LSA_CHUNK + 2) * q->index_head_dim, work);
    NEW(g->gathered, m * s->t->top * q->head_dim, work);
    NEW(g->gathered_sel, m * s->t->top, work);
done:
    return st;
}

void pages_free(lsa_gpu_session *s) {
    page_store *const g = &s->store;
    lsa_ctx *const ctx = s->t->ctx;
    if (g->copies) cudaStreamSynchronize(g->copies);
    for (int32_t l = 0; l < s->n_layer; l++) {
        decode_layer *const y = &s->layer[l];
        lsa_ctx_free(ctx, y->rows);
        lsa_ctx_free(ctx, y->keys);
        lsa_ctx_free(ctx, y->all_keys);
        cudaFreeHost(y->host_rows);
        cudaFreeHost(y->host_keys);
    }
    void *const p[] = {g->table, g->list, g->fresh_row, g->fresh_key, g->gathered, g->gathered_sel, g->stage};
    void *const pinned[] = {g->slot_of, g->shown, g->wanted, g->free_slot, g->move, g->host_list};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(ctx, p[i]);
    for (size_t i = 0; i < sizeof pinned / sizeof *pinned; i++) cudaFreeHost(pinned[i]);
    if (g->computed) cudaEventDestroy(g->computed);
    if (g->copied) cudaEventDestroy(g->copied);
    if (g->copies) cudaStreamDestroy(g->copies);
}

void pages_reset(lsa_gpu_session *s) {
    page_store *const g = &s->store;
    if (s->o.storage != LSA_GPU_ROWS_TIERED) return;
    if (g->copies) cudaStreamSynchronize(g->copies);
    for (int64_t i = 0; i < g->n_page; i++) g->slot_of[i] = g->shown[i] = -1;
    for (int64_t i = 0; i < s->o.reserve; i++) g->free_slot[i] = (int32_t)(s->o.reserve - 1 - i);
    g->n_free = s->o.reserve;
    g->n_list = 0;
}

/* ---- swapping ---- */

struct fetch_args {
    struct {
        const uint8_t *from;
        uint8_t *to;
        int64_t bytes; /* of a page */
    } part[2 * LSA_MAX_CSA];
    const int32_t *move; /* [n, 2] page, slot */
};

/* A block a page and part. */
static __global__ void __launch_bounds__(THREADS) fetch_k(const __grid_constant__ fetch_args a) {
    const auto &p = a.part[blockIdx.y];
    const uint32_t *const from = (const uint32_t *)(p.from + a.move[2 * blockIdx.x] * p.bytes);
    uint32_t *const to = (uint32_t *)(p.to + a.move[2 * blockIdx.x + 1] * p.bytes);
    for (int64_t i = threadIdx.x; i < p.bytes / 4; i += THREADS) to[i] = from[i];
}

/* Copies the first n pages of the move list, all layers by one launch, once what is computed now is done. */
static lsa_status fetch(lsa_gpu_session *s, int64_t n, lsa_err *err) {
    page_store *const g = &s->store;
    fetch_args a;
    int parts = 0;
    if (n == 0) return LSA_OK;
    a.move = g->move;
    for (int32_t l = 0; l < s->n_layer; l++) {
        const decode_layer *const y = &s->layer[l];
        if (y->csa < 0) continue;
        a.part[parts++] = {y->host_rows, y->rows, (int64_t)s->o.page * g->row_bytes};
        if (y->keys) a.part[parts++] = {y->host_keys, y->keys, (int64_t)s->o.page * g->key_bytes};
    }
    for (int i = 0; i < parts; i++) s->use.swapped += n * a.part[i].bytes;
    LSA_CUDA(cudaEventRecord(g->computed, s->t->cs->stream));
    LSA_CUDA(cudaStreamWaitEvent(g->copies, g->computed, 0));
    fetch_k<<<dim3((unsigned)n, (unsigned)parts), THREADS, 0, g->copies>>>(a);
    LSA_LAUNCHED("fetch");
}

/* Marks the pages of a set; returns how many. */
static int64_t mark(lsa_gpu_session *s, const uint8_t *resident, int64_t n_masked) {
    page_store *const g = &s->store;
    const int64_t page = s->o.page, formed = s->pos / LSA_CHUNK;
    int64_t n = 0;
    memset(g->wanted, 0, (size_t)g->n_page);
    for (int64_t c = 0; c < n_masked; c++)
        if (resident[c]) g->wanted[c / page] = 1;
    for (int64_t c = n_masked; c < formed; c++) g->wanted[c / page] = 1;
    if (formed % page) g->wanted[formed / page] = 1; /* its next chunks join the others */
    for (int64_t i = 0; i < g->n_page; i++) n += g->wanted[i];
    return n;
}

/* Gives places to wanted pages that have none, of pages complete before `limit`; returns the move list's
 * length. */
static int64_t place(lsa_gpu_session *s, int64_t limit) {
    page_store *const g = &s->store;
    int64_t n = 0;
    for (int64_t i = 0; i < limit && g->n_free > 0; i++) {
        if (!g->wanted[i] || g->slot_of[i] >= 0) continue;
        g->slot_of[i] = g->free_slot[--g->n_free];
        g->move[2 * n] = (int32_t)i;
        g->move[2 * n + 1] = g->slot_of[i];
        n++;
    }
    return n;
}

extern "C" lsa_status lsa_gpu_session_prefetch(lsa_gpu_session *s, const uint8_t *resident, int64_t n_masked,
                                               lsa_err *err) {
    if (s->o.storage != LSA_GPU_ROWS_TIERED) return LSA_OK;
    if (n_masked < 0 || n_masked > s->pos / LSA_CHUNK)
        LSA_RET_FAIL(LSA_E_ARG, "prefetch of a set of %lld chunks; %lld are formed", (long long)n_masked,
                     (long long)(s->pos / LSA_CHUNK));
    LSA_CUDA(cudaStreamSynchronize(s->store.copies)); /* the move list is read by the copy before */
    mark(s, resident, n_masked);
    return fetch(s, place(s, s->pos / LSA_CHUNK / s->o.page), err);
}

lsa_status pages_set(lsa_gpu_session *s, const uint8_t *resident, int64_t n_masked, lsa_err *err) {
    lsa_status st = LSA_OK;
    page_store *const g = &s->store;
    const cudaStream_t stream = s->t->cs->stream;
    if (n_masked > s->pos / LSA_CHUNK)
        LSA_RET_FAIL(LSA_E_ARG, "a resident set of %lld chunks; %lld are formed", (long long)n_masked,
                     (long long)(s->pos / LSA_CHUNK));
    /* the places that are freed below are read, and the lists are, by what runs now */
    LSA_CUDA(cudaStreamSynchronize(stream));
    LSA_CUDA(cudaStreamSynchronize(g->copies));
    const int64_t n = mark(s, resident, n_masked);
    if (n > s->o.reserve)
        LSA_RET_FAIL(
            LSA_E_NOMEM,
            "the resident set touches %lld pages of %d chunks, the reserve holds %lld: lower the budget "
            "or give it more",
            (long long)n, s->o.page, (long long)s->o.reserve);
    for (int64_t i = 0; i < g->n_page; i++)
        if (g->slot_of[i] >= 0 && !g->wanted[i]) {
            g->free_slot[g->n_free++] = g->slot_of[i];
            g->slot_of[i] = -1;
        }
    LSA_TRY(fetch(s, place(s, g->n_page), err));
    LSA_CUDA(cudaEventRecord(g->copied, g->copies));
    LSA_CUDA(cudaStreamWaitEvent(stream, g->copied, 0));
    memcpy(g->shown, g->slot_of, (size_t)g->n_page * sizeof *g->shown);
    g->n_list = 0;
    for (int64_t c = 0; c < n_masked; c++)
        if (resident[c]) g->host_list[g->n_list++] = (int32_t)c;
    LSA_CUDA(cudaMemcpyAsync(g->table, g->shown, (size_t)g->n_page * sizeof *g->table, cudaMemcpyHostToDevice,
                             stream));
    LSA_CUDA(cudaMemcpyAsync(g->list, g->host_list, (size_t)g->n_list * sizeof *g->list,
                             cudaMemcpyHostToDevice, stream));
    if (g->stage) { /* decoding begins */
        lsa_ctx_free(s->t->ctx, g->stage);
        g->stage = NULL;
        s->use.work -= (s->max_chunk + 1) * g->key_bytes;
    }
done:
    return st;
}

/* Pages that a prefetch brought and no set has shown yet go first when places are short. */
static lsa_status drop_prefetched(lsa_gpu_session *s, lsa_err *err) {
    page_store *const g = &s->store;
    LSA_CUDA(cudaStreamSynchronize(g->copies));
    for (int64_t i = 0; i < g->n_page; i++)
        if (g->slot_of[i] >= 0 && g->shown[i] < 0) {
            g->free_slot[g->n_free++] = g->slot_of[i];
            g->slot_of[i] = -1;
        }
    return LSA_OK;
}

lsa_status pages_grow(lsa_gpu_session *s, int64_t m, lsa_err *err) {
    page_store *const g = &s->store;
    const int64_t first = s->pos / LSA_CHUNK, last = (s->pos + m) / LSA_CHUNK, page = s->o.page;
    int64_t need = 0;
    if (!reserve_only(s) || last == first) return LSA_OK;
    for (int64_t i = first / page; i <= (last - 1) / page; i++) need += g->slot_of[i] < 0;
    if (need > g->n_free) {
        const lsa_status st = drop_prefetched(s, err);
        if (st != LSA_OK) return st;
    }
    if (need > g->n_free)
        LSA_RET_FAIL(
            LSA_E_NOMEM,
            "the reserve of %lld pages is full at position %lld: choose a smaller resident set or give "
            "it more",
            (long long)s->o.reserve, (long long)s->pos);
    for (int64_t i = first / page; i <= (last - 1) / page; i++) {
        if (g->slot_of[i] < 0) g->slot_of[i] = g->free_slot[--g->n_free];
        if (g->shown[i] == g->slot_of[i]) continue;
        g->shown[i] = g->slot_of[i];
        LSA_CUDA(cudaMemcpyAsync(g->table + i, g->shown + i, sizeof *g->table, cudaMemcpyHostToDevice,
                                 s->t->cs->stream));
    }
    return LSA_OK;
}

/* ---- rows in and out ---- */

struct store_args {
    const float *row, *key;
    uint8_t *rows[2], *keys[2]; /* [0] by chunk, [1] by place in the reserve; NULL: not there */
    uint8_t *all_keys;
    const int32_t *table;
    int64_t first;
    int D, Di, rope, row_bytes, key_bytes, page;
};

static __device__ void put_bytes(uint8_t *to, const uint8_t *from, int n) {
    if (!to) return;
    for (int i = threadIdx.x; i < n / 4; i += THREADS) ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
}

/* A block a chunk. */
static __global__ void __launch_bounds__(THREADS) store_k(const __grid_constant__ store_args a) {
    __shared__ uint32_t row_words[MOST_BYTES / 4], key_words[MOST_BYTES / 4];
    uint8_t *const row = (uint8_t *)row_words, *const key = (uint8_t *)key_words;
    const int64_t c = a.first + blockIdx.x;
    const int warp = threadIdx.x >> 5;
    encode_row(row, a.row + (int64_t)blockIdx.x * a.D, a.D, a.rope, warp, WARPS);
    if (warp == 0) encode_key(key, a.key + (int64_t)blockIdx.x * a.Di, a.Di);
    __syncthreads();
    put_bytes(a.rows[0] ? a.rows[0] + c * a.row_bytes : NULL, row, a.row_bytes);
    put_bytes(a.keys[0] ? a.keys[0] + c * a.key_bytes : NULL, key, a.key_bytes);
    put_bytes(a.all_keys ? a.all_keys + c * a.key_bytes : NULL, key, a.key_bytes);
    if (!a.table) return;
    const int64_t at = (int64_t)a.table[c / a.page] * a.page + c % a.page;
    put_bytes(a.rows[1] + at * a.row_bytes, row, a.row_bytes);
    put_bytes(a.keys[1] ? a.keys[1] + at * a.key_bytes : NULL, key, a.key_bytes);
}

lsa_status pages_store(lsa_gpu_session *s, const decode_layer *y, int64_t first, int64_t last, lsa_err *err) {
    const page_store *const g = &s->store;
    const lsa_gpu_teacher_geom *q = &s->t->g;
    const bool tiers = s->o.storage == LSA_GPU_ROWS_TIERED;
    if (last <= first) return LSA_OK;
    const store_args a = {g->fresh_row,
                          g->fresh_key,
                          {tiers ? y->host_rows : y->rows, y->rows},
                          {tiers ? y->host_keys : y->keys, y->keys},
                          y->all_keys,
                          reserve_only(s) ? g->table : NULL,
                          first,
                          q->head_dim,
                          q->index_head_dim,
                          q->rope_dim,
                          g->row_bytes,
                          g->key_bytes,
                          s->o.page};
    store_k<<<(unsigned)(last - first), THREADS, 0, s->t->cs->stream>>>(a);
    LSA_LAUNCHED("store");
}

struct gather_args {
    row_source rows;
    const int32_t *sel, *n_sel;
    float *out;
    int32_t *out_sel;
    int D, rope, top;
};

/* A block 8 selected rows of a token (blockIdx.y), a warp each. */
static __global__ void __launch_bounds__(THREADS) gather_k(const __grid_constant__ gather_args a) {
    const int64_t t = blockIdx.x, i = (int64_t)blockIdx.y * WARPS + (threadIdx.x >> 5), at = t * a.top + i;
    if (i >= a.n_sel[t]) return;
    const uint8_t *const row = row_at(a.rows, a.sel[at]);
    for (int c = threadIdx.x & 31; c < a.D; c += 32) a.out[at * a.D + c] = row_value(row, c, a.D, a.rope);
    if ((threadIdx.x & 31) == 0) a.out_sel[at] = (int32_t)at;
}

lsa_status pages_gather(lsa_gpu_session *s, const decode_layer *y, int64_t m, lsa_err *err) {
    const page_store *const g = &s->store;
    const lsa_gpu_teacher *const t = s->t;
    const bool host = s->o.storage == LSA_GPU_ROWS_TIERED && !s->masked;
    const gather_args a = {
        {host ? y->host_rows : y->rows, reserve_only(s) ? g->table : NULL, s->o.page, g->row_bytes},
        t->sel,
        t->n_sel,
        g->gathered,
        g->gathered_sel,
        t->g.head_dim,
        t->g.rope_dim,
        (int)t->top};
    gather_k<<<dim3((unsigned)m, (unsigned)((t->top + WARPS - 1) / WARPS)), THREADS, 0, t->cs->stream>>>(a);
    LSA_LAUNCHED("gather");
}

lsa_status pages_keys(lsa_gpu_session *s, const decode_layer *y, int64_t visible, row_source *out,
                      lsa_err *err) {
    lsa_status st = LSA_OK;
    page_store *const g = &s->store;
    *out = {y->all_keys ? y->all_keys : y->keys, y->keys && reserve_only(s) ? g->table : NULL, s->o.page,
            g->key_bytes};
    if (s->o.storage != LSA_GPU_ROWS_TIERED || s->masked || y->all_keys) goto done;
    if (!g->stage) NEW(g->stage, (s->max_chunk + 1) * g->key_bytes, work); /* prefill: every key is scored */
    LSA_CUDA(cudaMemcpyAsync(g->stage, y->host_keys, (size_t)(visible * g->key_bytes), cudaMemcpyHostToDevice,
                             s->t->cs->stream));
    out->base = g->stage;
done:
    return st;
}

lsa_status pages_read_keys(lsa_gpu_session *s, const decode_layer *y, int64_t first, int64_t last, float *key,
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t bytes = s->store.key_bytes, Di = s->t->g.index_head_dim, n = last - first;
    uint8_t *copy = NULL;
    const uint8_t *from = y->host_keys ? y->host_keys + first * bytes : NULL;
    LSA_CUDA(cudaStreamSynchronize(s->t->cs->stream));
    if (!from && n > 0) {
        copy = (uint8_t *)malloc((size_t)(n * bytes));
        if (!copy) LSA_FAIL(LSA_E_NOMEM, "out of memory");
        LSA_TRY(lsa_ctx_download(s->t->ctx, copy, y->keys + first * bytes, (size_t)(n * bytes), err));
        from = copy;
    }
    for (int64_t i = 0; i < n; i++) {
        float scale;
        memcpy(&scale, from + i * bytes + Di, sizeof scale);
        for (int64_t c = 0; c < Di; c++) key[i * Di + c] = lsa_e4m3_to_f32(from[i * bytes + c]) * scale;
    }
done:
    free(copy);
    return st;
}
