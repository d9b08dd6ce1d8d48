/* A batch's life and its step: see kernels/model/gpu_batch.h. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/decode/batch_state.h"
#include "kernels/cuda/decode/codec.cuh"

extern "C" {
#include "kernels/model/synthetic.h"
}

lsa_status batch_new(lsa_gpu_batch *b, void **out, int64_t n, size_t size, int64_t *counter, const char *name,
                     lsa_err *err) {
    const lsa_status st = lsa_ctx_alloc_(b->ctx, out, n, size, name, err);
    if (st == LSA_OK) *counter += n * (int64_t)size;
    return st;
}

lsa_status batch_pinned(void **out, int64_t n, size_t size, lsa_err *err) {
    *out = NULL;
    const cudaError_t e = cudaHostAlloc(out, (size_t)n * size, cudaHostAllocMapped | cudaHostAllocPortable);
    if (e == cudaSuccess) return LSA_OK;
    cudaGetLastError();
    *out = NULL;
    LSA_RET_FAIL(
        LSA_E_NOMEM,
        "%.1f MiB of pinned host memory refused (%s): shorten --context or raise the limit on locked "
        "memory",
        (double)n * (double)size / 1048576.0, cudaGetErrorString(e));
}

/* ---- geometry ---- */

static lsa_status check(const lsa_gpu_batch_opts *o, lsa_err *err) {
    int32_t n_csa = 0;
    if (o->n_layer < 1 || o->n_layer > LSA_MAX_LAYERS)
        LSA_RET_FAIL(LSA_E_ARG, "layers: from 1 to %d, found %d", LSA_MAX_LAYERS, o->n_layer);
    for (int32_t l = 0; l < o->n_layer; l++) {
        n_csa += o->ratio[l] == LSA_CHUNK;
        if (o->ratio[l] > 0 && o->tokens % o->ratio[l])
            LSA_RET_FAIL(LSA_E_ARG, "%lld tokens are no multiple of layer %d's ratio %d",
                         (long long)o->tokens, l, o->ratio[l]);
    }
    if (n_csa < 1 || n_csa > LSA_MAX_CSA)
        LSA_RET_FAIL(LSA_E_ARG, "CSA layers: from 1 to %d, found %d", LSA_MAX_CSA, n_csa);
    if (o->rope_dim != ATTEND_ROPE || (o->head_dim != 128 && o->head_dim != 512))
        LSA_RET_FAIL(LSA_E_UNSUPPORTED,
                     "a batched step has heads of 128 or 512 channels, 64 of them rotary; found %d and %d",
                     o->head_dim, o->rope_dim);
    if (o->index_head_dim != 128 || o->index_n_head < 1 || o->index_n_head > 128)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "a batched step has 1 to 128 index heads of 128; found %d of %d",
                     o->index_n_head, o->index_head_dim);
    if (o->tokens < LSA_CHUNK * LSA_PAGE_CHUNKS || o->tokens % (LSA_CHUNK * LSA_PAGE_CHUNKS))
        LSA_RET_FAIL(LSA_E_ARG, "a context is a multiple of %d tokens, found %lld",
                     LSA_CHUNK * LSA_PAGE_CHUNKS, (long long)o->tokens);
    const int64_t n_page = o->tokens / (LSA_CHUNK * LSA_PAGE_CHUNKS);
    if (o->batch < 1 || o->batch > 4096 || o->batch * n_page > INT32_MAX / LSA_MAX_CSA)
        LSA_RET_FAIL(LSA_E_ARG, "requests: %d of %lld tokens are too many", o->batch, (long long)o->tokens);
    if (o->reserve < 0 || o->reserve > n_page || o->staging < 0 ||
        (o->reserve > 0 && o->staging >= o->reserve))
        LSA_RET_FAIL(LSA_E_ARG, "a reserve of %lld pages, %lld of them for staging, of %lld",
                     (long long)o->reserve, (long long)o->staging, (long long)n_page);
    for (int32_t j = 0; j < o->n_memory; j++)
        if (o->memory[j] < (j ? o->memory[j - 1] + 1 : 0) || o->memory[j] >= n_csa)
            LSA_RET_FAIL(LSA_E_ARG, "level 1's layers: ascending CSA ordinals below %d", n_csa);
    return LSA_OK;
}

static void places(lsa_gpu_batch *b) {
    const lsa_gpu_batch_opts *o = &b->o;
    for (int32_t l = 0; l < o->n_layer; l++) b->ord[l] = o->ratio[l] == LSA_CHUNK ? b->n_csa++ : -1;
    for (int32_t c = 0; c < b->n_csa; c++) {
        bool all = o->reserve == 0;
        for (int32_t j = 0; j < o->n_memory; j++) all |= o->memory[j] == c;
        b->full_at[c] = all ? b->n_full++ : -1;
        b->kept_at[c] = all ? -1 : b->n_kept++;
    }
    b->n_page = o->tokens / (LSA_CHUNK * LSA_PAGE_CHUNKS);
    b->reserve = o->reserve ? o->reserve : b->n_page;
    b->active = b->reserve - (o->reserve ? o->staging : 0);
    b->row_bytes = encoded_row_bytes(o->head_dim, o->rope_dim);
}

/* ---- memory ---- */

static lsa_status caches(lsa_gpu_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_batch_opts *o = &b->o;
    const int64_t B = o->batch;
    BATCH_NEW(b->rows, B * b->reserve * b->n_csa * LSA_PAGE_CHUNKS * b->row_bytes, rows);
    if (b->n_kept) BATCH_NEW(b->keys, B * b->reserve * b->n_kept * KEY_PAGE, keys);
    if (b->n_full && o->reserve) BATCH_NEW(b->all_keys, B * b->n_page * b->n_full * KEY_PAGE, keys_level1);
    if (b->n_full && !o->reserve) BATCH_NEW(b->all_keys, B * b->n_page * b->n_full * KEY_PAGE, keys);
    for (int32_t l = 0; l < o->n_layer; l++) {
        BATCH_NEW(b->window[l], B * o->window * b->row_bytes, window);
        if (o->ratio[l] > LSA_CHUNK) BATCH_NEW(b->hca[l], B * (o->tokens / o->ratio[l]) * b->row_bytes, hca);
    }
    BATCH_NEW(b->list, BATCH_LISTS * B * b->active, tables);
    BATCH_NEW(b->layer_keys, b->n_csa * B, tables);
    BATCH_NEW(b->n_chunk, B, tables);
done:
    return st;
}

static lsa_status scorer(lsa_gpu_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_retriever *const x = &b->scorer;
    int major = 0, minor = 0;
    uint8_t *q = NULL;
    x->ctx = b->ctx, x->cs = b->cs;
    x->max_batch = b->o.batch, x->max_chunks = b->active * LSA_PAGE_CHUNKS;
    x->g.n_head = b->o.index_n_head;
    LSA_CUDA(cudaDeviceGetAttribute(&x->n_sm, cudaDevAttrMultiProcessorCount, b->cs->device));
    LSA_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, b->cs->device));
    LSA_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, b->cs->device));
    x->chained = major >= 9;
    x->form = major == 9 && minor == 0 && !b->o.portable ? SERVE_FP8 : SERVE_F32;
    x->heads = x->form == SERVE_F32 ? x->g.n_head : x->g.n_head <= 64 ? 64 : 128;
    if (x->form == SERVE_FP8) LSA_TRY(serve_prepare_sm90(x, err));
    BATCH_NEW(q, (int64_t)b->o.batch * x->heads * 128 * (x->form == SERVE_FP8 ? 1 : 4), work);
    x->q = q;
    BATCH_NEW(x->w, (int64_t)b->o.batch * x->heads, work);
done:
    return st;
}

/* Parts of attention: of the CSA layers, of HCA layers, of windows only. */
static int32_t parts_of(const lsa_gpu_batch *b, int32_t selected) {
    return decode_splits(b->scorer.n_sm, b->o.batch, b->o.n_head, b->o.window + selected);
}

static lsa_status work(lsa_gpu_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_batch_opts *o = &b->o;
    const int64_t B = o->batch, chunks = b->active * LSA_PAGE_CHUNKS, HD = (int64_t)o->n_head * o->head_dim,
                  segments = (chunks + TOPK_SEGMENT - 1) / TOPK_SEGMENT;
    int32_t parts = parts_of(b, o->top_k);
    for (int32_t l = 0; l < o->n_layer; l++) {
        const int32_t p =
            o->ratio[l] > LSA_CHUNK ? parts_of(b, (int32_t)(o->tokens / o->ratio[l])) : parts_of(b, 0);
        parts = p > parts ? p : parts;
    }
    BATCH_NEW(b->q, B * HD, work);
    BATCH_NEW(b->out, B * HD, work);
    BATCH_NEW(b->sink, o->n_head, work);
    BATCH_NEW(b->logit, B * chunks, work);
    BATCH_NEW(b->sel, B * o->top_k, work);
    BATCH_NEW(b->n_sel, B, work);
    if (chunks > TOPK_ALONE) {
        BATCH_NEW(b->best, B * segments * o->top_k, work);
        BATCH_NEW(b->best_at, B * segments * o->top_k, work);
    }
    BATCH_NEW(b->part, decode_part_room(o->batch, o->n_head, o->head_dim, parts), work);
    BATCH_NEW(b->stat, decode_part_room(o->batch, o->n_head, 2, parts), work);
    BATCH_NEW(b->ticket, B * ((o->n_head + ATTEND_HEADS - 1) / ATTEND_HEADS), work);
    BATCH_PINNED(b->page_in, B * b->reserve);
    BATCH_PINNED(b->next_list, BATCH_LISTS * B * b->active);
    BATCH_PINNED(b->move, B * (o->staging + 1));
    BATCH_PINNED(b->wanted, b->n_page);
    LSA_CUDA(cudaStreamCreateWithFlags(&b->copies, cudaStreamNonBlocking));
    LSA_CUDA(cudaEventCreate(&b->copy_begin));
    LSA_CUDA(cudaEventCreate(&b->copied));
    LSA_CUDA(cudaEventCreate(&b->published));
    LSA_CUDA(cudaEventCreate(&b->begin));
    LSA_CUDA(cudaEventCreate(&b->end));
    LSA_TRY(decode_prepare_attend(o->head_dim, err));
done:
    return st;
}

/* ---- lists ---- */

/* Resident pages in ascending order, from page_in, as the kernels index them. */
static void make_lists(lsa_gpu_batch *b) {
    const int64_t BA = b->o.batch * b->active;
    for (int64_t i = 0; i < b->o.batch; i++) {
        const int32_t *const in = b->page_in + i * b->reserve;
        int32_t *const slot = b->next_list + i * b->active, *const key = slot + BA, *const full = key + BA;
        int32_t *const at = full; /* slot of a page first, sorted by counting over the pages */
        int64_t n = 0;
        memset(b->wanted, 0, (size_t)b->n_page);
        for (int64_t r = 0; r < b->reserve; r++)
            if (in[r] >= 0) b->wanted[in[r]] = 1;
        for (int64_t p = 0; p < b->n_page; p++)
            if (b->wanted[p]) at[n++] = (int32_t)p;
        for (int64_t r = 0; r < b->reserve; r++) {
            if (in[r] < 0) continue;
            int64_t lo = 0, hi = b->active - 1;
            while (lo < hi) {
                const int64_t mid = (lo + hi) / 2;
                if (at[mid] < in[r])
                    lo = mid + 1;
                else
                    hi = mid;
            }
            slot[lo] = (int32_t)(i * b->reserve + r);
        }
        for (int64_t j = 0; j < b->active; j++) {
            key[j] = slot[j] * b->n_kept;
            full[j] = (int32_t)(i * b->n_page + full[j]) * b->n_full;
        }
    }
}

static lsa_status show_lists(lsa_gpu_batch *b, lsa_err *err) {
    LSA_CUDA(cudaMemcpyAsync(b->list, b->next_list,
                             (size_t)(BATCH_LISTS * b->o.batch * b->active) * sizeof *b->list,
                             cudaMemcpyHostToDevice, b->cs->stream));
    LSA_CUDA(cudaEventRecord(b->published, b->cs->stream));
    return LSA_OK;
}

/* At first pages spread evenly, in places that are not in order. */
static void first_pages(lsa_gpu_batch *b) {
    for (int64_t i = 0; i < b->o.batch; i++) {
        int32_t *const in = b->page_in + i * b->reserve;
        for (int64_t r = 0; r < b->reserve; r++) in[r] = -1;
        for (int64_t j = 0; j < b->active; j++) in[b->active - 1 - j] = (int32_t)(j * b->n_page / b->active);
    }
}

static lsa_status fill(lsa_gpu_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_batch_opts *o = &b->o;
    const int64_t B = o->batch, BA = B * b->active;
    lsa_gpu_keys *keys = NULL;
    int64_t *n = NULL;
    int32_t *page_in = NULL;
    page_fill f = {b->rows, NULL, B * b->reserve, b->n_page, b->n_csa, {}, o->head_dim, o->rope_dim};
    LSA_TRY(batch_pinned((void **)&keys, b->n_csa * B, sizeof *keys, err));
    LSA_TRY(batch_pinned((void **)&n, B, sizeof *n, err));
    LSA_TRY(lsa_ctx_alloc_(b->ctx, (void **)&page_in, B * b->reserve, sizeof *page_in, "page_in", err));
    first_pages(b);
    make_lists(b);
    LSA_TRY(show_lists(b, err));
    LSA_TRY(lsa_ctx_upload(b->ctx, page_in, b->page_in, (size_t)(B * b->reserve) * sizeof *page_in, err));
    for (int32_t c = 0; c < b->n_csa; c++) f.ord[c] = c;
    f.page = page_in;
    LSA_TRY(synth_pages(&f, b->cs->stream, err));
    f.D = 0, f.to = b->keys, f.layers = b->n_kept;
    for (int32_t c = 0; c < b->n_csa; c++)
        if (b->kept_at[c] >= 0) f.ord[b->kept_at[c]] = c;
    LSA_TRY(synth_pages(&f, b->cs->stream, err));
    f.to = b->all_keys, f.layers = b->n_full, f.page = NULL, f.slots = B * b->n_page;
    for (int32_t c = 0; c < b->n_csa; c++)
        if (b->full_at[c] >= 0) f.ord[b->full_at[c]] = c;
    LSA_TRY(synth_pages(&f, b->cs->stream, err));
    for (int32_t l = 0; l < o->n_layer; l++) {
        LSA_TRY(synth_rows(b->window[l], LSA_SYNTH_WINDOW, l, B * o->window, B * o->window, o->head_dim,
                           o->rope_dim, b->cs->stream, err));
        if (b->hca[l])
            LSA_TRY(synth_rows(b->hca[l], LSA_SYNTH_HCA, l, B * (o->tokens / o->ratio[l]),
                               o->tokens / o->ratio[l], o->head_dim, o->rope_dim, b->cs->stream, err));
    }
    LSA_TRY(synth_queries(b, b->cs->stream, err));
    for (int32_t c = 0; c < b->n_csa; c++)
        for (int64_t i = 0; i < B; i++) {
            const bool all = b->full_at[c] >= 0;
            keys[c * B + i] = {all ? b->all_keys + (int64_t)b->full_at[c] * KEY_PAGE
                                   : b->keys + (int64_t)b->kept_at[c] * KEY_PAGE,
                               b->list + (all ? 2 : 1) * BA + i * b->active, b->active * LSA_PAGE_CHUNKS};
        }
    for (int64_t i = 0; i < B; i++) n[i] = b->active * LSA_PAGE_CHUNKS;
    LSA_TRY(lsa_ctx_upload(b->ctx, b->layer_keys, keys, (size_t)(b->n_csa * B) * sizeof *keys, err));
    LSA_TRY(lsa_ctx_upload(b->ctx, b->n_chunk, n, (size_t)B * sizeof *n, err));
    LSA_TRY(lsa_ctx_sync(b->ctx, err));
done:
    lsa_ctx_free(b->ctx, page_in);
    cudaFreeHost(keys);
    cudaFreeHost(n);
    return st;
}

/* ---- life ---- */

extern "C" void lsa_gpu_batch_destroy(lsa_gpu_batch *b) {
    if (!b) return;
    cudaStreamSynchronize(b->cs->stream);
    if (b->copies) cudaStreamSynchronize(b->copies);
    graphs_free(b);
    level1_free(b);
    void *const p[] = {b->rows,     b->keys, b->all_keys, b->list,    b->layer_keys, b->n_chunk, b->scorer.q,
                       b->scorer.w, b->q,    b->sink,     b->out,     b->logit,      b->best,    b->part,
                       b->stat,     b->sel,  b->n_sel,    b->best_at, b->ticket,     b->flush};
    void *const pinned[] = {b->page_in, b->next_list, b->move, b->wanted};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(b->ctx, p[i]);
    for (int32_t l = 0; l < b->o.n_layer; l++) {
        lsa_ctx_free(b->ctx, b->window[l]);
        lsa_ctx_free(b->ctx, b->hca[l]);
    }
    for (size_t i = 0; i < sizeof pinned / sizeof *pinned; i++) cudaFreeHost(pinned[i]);
    cudaEvent_t const e[] = {b->copy_begin, b->copied, b->published, b->begin, b->end};
    for (size_t i = 0; i < sizeof e / sizeof *e; i++)
        if (e[i]) cudaEventDestroy(e[i]);
    if (b->copies) cudaStreamDestroy(b->copies);
    free(b);
}

extern "C" lsa_status lsa_gpu_batch_create(lsa_gpu_batch **out, lsa_ctx *ctx, const lsa_gpu_batch_opts *o,
                                           lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_batch *b = NULL;
    *out = NULL;
    if (lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA) LSA_FAIL(LSA_E_ARG, "a batched step needs a CUDA context");
    LSA_TRY(check(o, err));
    b = (lsa_gpu_batch *)calloc(1, sizeof *b);
    if (!b) LSA_FAIL(LSA_E_NOMEM, "out of host memory for a batch");
    b->ctx = ctx, b->cs = lsa_cuda(ctx), b->o = *o;
    LSA_CUDA(cudaSetDevice(b->cs->device));
    places(b);
    LSA_TRY(caches(b, err));
    LSA_TRY(scorer(b, err));
    LSA_TRY(work(b, err));
    LSA_TRY(fill(b, err));
    *out = b;
    b = NULL;
done:
    lsa_gpu_batch_destroy(b);
    return st;
}

extern "C" const lsa_gpu_batch_use *lsa_gpu_batch_count(const lsa_gpu_batch *b) {
    return &b->use;
}
extern "C" int64_t lsa_gpu_batch_resident(const lsa_gpu_batch *b) {
    return b->active;
}

/* ---- a step ---- */

static lsa_status score(lsa_gpu_batch *b, int32_t c, lsa_err *err) {
    const lsa_gpu_keys *const keys = b->layer_keys + (int64_t)c * b->o.batch;
    const int64_t ld = b->active * LSA_PAGE_CHUNKS;
    return b->scorer.form == SERVE_F32
               ? serve_score_any(&b->scorer, 0, b->o.batch, keys, b->logit, ld, b->cs->stream, err)
               : serve_score_sm90(&b->scorer, 0, b->o.batch, keys, b->logit, ld, b->cs->stream, err);
}

static lsa_status choose(lsa_gpu_batch *b, lsa_err *err) {
    const int64_t chunks = b->active * LSA_PAGE_CHUNKS;
    const topk_args a = {b->logit,   b->n_chunk, chunks,   chunks,  b->o.batch,
                         b->o.top_k, b->sel,     b->n_sel, b->best, b->best_at};
    return decode_topk(&b->scorer, &a, b->cs->stream, err);
}

static lsa_status attend(lsa_gpu_batch *b, int32_t l, lsa_err *err) {
    const lsa_gpu_batch_opts *o = &b->o;
    const int32_t c = b->ord[l];
    const int64_t page = (int64_t)LSA_PAGE_CHUNKS * b->row_bytes;
    attend_args a = {};
    a.q = b->q, a.sink = b->sink, a.out = b->out;
    a.window = b->window[l], a.window_stride = (int64_t)o->window * b->row_bytes;
    a.n_window = o->window, a.m = o->batch, a.H = o->n_head, a.scale = 1.0f / sqrtf((float)o->head_dim);
    a.part = b->part, a.stat = b->stat, a.ticket = b->ticket;
    if (c >= 0) {
        a.rows = b->rows + c * page, a.page_stride = b->n_csa * page;
        a.slot = b->list, a.ld_slot = b->active;
        a.sel = b->sel, a.n_sel = b->n_sel, a.ld_sel = o->top_k;
        a.n_row = o->top_k;
    } else if (b->hca[l]) {
        a.n_row = (int32_t)(o->tokens / o->ratio[l]);
        a.rows = b->hca[l], a.row_stride = (int64_t)a.n_row * b->row_bytes;
    }
    a.splits = parts_of(b, a.n_row);
    return decode_attend(&b->scorer, &a, o->head_dim, b->cs->stream, err);
}

extern "C" lsa_status lsa_gpu_batch_layer(lsa_gpu_batch *b, int32_t layer, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (b->ord[layer] >= 0) {
        LSA_TRY(score(b, b->ord[layer], err));
        LSA_TRY(choose(b, err));
    }
    LSA_TRY(attend(b, layer, err));
done:
    return st;
}

extern "C" lsa_status lsa_gpu_batch_launch(lsa_gpu_batch *b, lsa_gpu_batch_part part, lsa_err *err) {
    lsa_status st = LSA_OK;
    const bool all = part == LSA_BATCH_CSA || part == LSA_BATCH_STEP;
    for (int32_t l = 0; l < b->o.n_layer; l++) {
        if (b->ord[l] >= 0) {
            if (all || part == LSA_BATCH_SCORE) LSA_TRY(score(b, b->ord[l], err));
            if (all || part == LSA_BATCH_TOPK) LSA_TRY(choose(b, err));
            if (all || part == LSA_BATCH_ATTEND) LSA_TRY(attend(b, l, err));
        } else if (part == LSA_BATCH_OTHER || part == LSA_BATCH_STEP) {
            LSA_TRY(attend(b, l, err));
        }
    }
done:
    return st;
}

/* ---- swapping ---- */

extern "C" lsa_status lsa_gpu_pages_create(lsa_gpu_pages **out, lsa_ctx *ctx, const lsa_gpu_batch_opts *o,
                                           lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_pages *p = NULL;
    lsa_gpu_batch *shape = NULL; /* only its places */
    cudaStream_t const s = lsa_cuda(ctx)->stream;
    page_fill f = {};
    *out = NULL;
    LSA_TRY(check(o, err));
    p = (lsa_gpu_pages *)calloc(1, sizeof *p);
    shape = (lsa_gpu_batch *)calloc(1, sizeof *shape);
    if (!p || !shape) LSA_FAIL(LSA_E_NOMEM, "out of host memory for pages");
    shape->o = *o;
    places(shape);
    p->n_page = shape->n_page;
    LSA_TRY(batch_pinned((void **)&p->rows, p->n_page * shape->n_csa * LSA_PAGE_CHUNKS,
                         (size_t)shape->row_bytes, err));
    p->bytes += p->n_page * shape->n_csa * LSA_PAGE_CHUNKS * shape->row_bytes;
    if (shape->n_kept) {
        LSA_TRY(batch_pinned((void **)&p->keys, p->n_page * shape->n_kept, KEY_PAGE, err));
        p->bytes += p->n_page * shape->n_kept * KEY_PAGE;
    }
    f.to = p->rows, f.slots = f.n_page = p->n_page, f.layers = shape->n_csa, f.D = o->head_dim;
    f.rope = o->rope_dim;
    for (int32_t c = 0; c < shape->n_csa; c++) f.ord[c] = c;
    LSA_TRY(synth_pages(&f, s, err));
    f.to = p->keys, f.layers = shape->n_kept, f.D = 0;
    for (int32_t c = 0; c < shape->n_csa; c++)
        if (shape->kept_at[c] >= 0) f.ord[shape->kept_at[c]] = c;
    LSA_TRY(synth_pages(&f, s, err));
    LSA_TRY(lsa_ctx_sync(ctx, err));
    *out = p;
    p = NULL;
done:
    lsa_gpu_pages_destroy(p);
    free(shape);
    return st;
}
extern "C" void lsa_gpu_pages_destroy(lsa_gpu_pages *p) {
    if (!p) return;
    cudaFreeHost(p->rows);
    cudaFreeHost(p->keys);
    free(p);
}
extern "C" int64_t lsa_gpu_pages_bytes(const lsa_gpu_pages *p) {
    return p->bytes;
}

/* Moves of request i: free places get wanted pages, as many pages that are not wanted leave. */
static int32_t plan(lsa_gpu_batch *b, int64_t i, const int32_t *page, int32_t n_page, int2 *move) {
    int32_t *const in = b->page_in + i * b->reserve;
    int32_t n = 0, leave = 0, left = 0;
    int64_t place = 0;
    memset(b->wanted, 0, (size_t)b->n_page);
    for (int32_t j = 0; j < n_page; j++) b->wanted[page[j]] = 1;
    for (int64_t r = 0; r < b->reserve; r++) {
        if (in[r] < 0) continue;
        if (b->wanted[in[r]])
            b->wanted[in[r]] = 2; /* here already */
        else
            leave++;
    }
    for (int32_t j = 0; j < n_page && n < b->o.staging && n < leave; j++) {
        if (b->wanted[page[j]] != 1) continue;
        while (in[place] >= 0) place++;
        move[n].x = page[j], move[n].y = (int32_t)place++;
        n++;
    }
    for (int64_t r = 0; r < b->reserve && left < n; r++)
        if (in[r] >= 0 && !b->wanted[in[r]]) in[r] = -1, left++;
    for (int32_t j = 0; j < n; j++) {
        in[move[j].y] = move[j].x;
        move[j].y += (int32_t)(i * b->reserve);
    }
    return n;
}

extern "C" lsa_status lsa_gpu_batch_swap(lsa_gpu_batch *b, const lsa_gpu_pages *from, const int32_t *page,
                                         int64_t ld, const int32_t *n, int64_t *moved, lsa_err *err) {
    const int64_t page_bytes = (int64_t)LSA_PAGE_CHUNKS * b->row_bytes * b->n_csa,
                  key_bytes = (int64_t)KEY_PAGE * b->n_kept;
    swap_args a = {{{from->rows, b->rows, page_bytes, page_bytes, page_bytes},
                    {from->keys, b->keys, key_bytes, key_bytes, key_bytes}},
                   b->move,
                   0};
    if (from->n_page < b->n_page)
        LSA_RET_FAIL(LSA_E_ARG, "the host holds %lld pages, a request has %lld", (long long)from->n_page,
                     (long long)b->n_page);
    /* the former lists and moves are on the GPU */
    LSA_CUDA(cudaEventSynchronize(b->published));
    LSA_CUDA(cudaStreamSynchronize(b->copies));
    for (int64_t i = 0; i < b->o.batch; i++) a.n += plan(b, i, page + i * ld, n[i], b->move + a.n);
    make_lists(b);
    *moved = a.n * (page_bytes + key_bytes);
    LSA_CUDA(cudaStreamWaitEvent(b->copies, b->published, 0)); /* the places were left then */
    LSA_CUDA(cudaEventRecord(b->copy_begin, b->copies));
    const lsa_status st = decode_swap(&a, b->copies, err);
    if (st != LSA_OK) return st;
    LSA_CUDA(cudaEventRecord(b->copied, b->copies));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_batch_publish(lsa_gpu_batch *b, double *seconds, lsa_err *err) {
    LSA_CUDA(cudaStreamWaitEvent(b->cs->stream, b->copied, 0));
    const lsa_status st = show_lists(b, err);
    if (st != LSA_OK || !seconds) return st;
    float ms = 0;
    LSA_CUDA(cudaEventSynchronize(b->copied));
    LSA_CUDA(cudaEventElapsedTime(&ms, b->copy_begin, b->copied));
    *seconds = ms * 1e-3;
    return LSA_OK;
}

/* ---- checks ---- */

extern "C" lsa_status lsa_gpu_batch_see(lsa_gpu_batch *b, int32_t request, lsa_gpu_batch_view *v,
                                        lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t i = request, chunks = b->active * LSA_PAGE_CHUNKS,
                  HD = (int64_t)b->o.n_head * b->o.head_dim;
    if (request < 0 || request >= b->o.batch) LSA_FAIL(LSA_E_ARG, "request %d of %d", request, b->o.batch);
    v->n_page = b->active;
    LSA_TRY(
        lsa_ctx_download(b->ctx, v->page, b->list + i * b->active, (size_t)b->active * sizeof *v->page, err));
    for (int64_t j = 0; j < b->active; j++) v->page[j] = b->page_in[v->page[j]];
    LSA_TRY(
        lsa_ctx_download(b->ctx, v->logit, b->logit + i * chunks, (size_t)chunks * sizeof *v->logit, err));
    LSA_TRY(
        lsa_ctx_download(b->ctx, v->sel, b->sel + i * b->o.top_k, (size_t)b->o.top_k * sizeof *v->sel, err));
    LSA_TRY(lsa_ctx_download(b->ctx, v->n_sel, b->n_sel + i, sizeof *v->n_sel, err));
    LSA_TRY(lsa_ctx_download(b->ctx, v->out, b->out + i * HD, (size_t)HD * sizeof *v->out, err));
done:
    return st;
}
