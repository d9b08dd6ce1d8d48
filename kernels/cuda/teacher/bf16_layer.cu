/* The bf16 tier's layer put together: memory and the order of the stages. See kernels/model/gpu_bf16.h. */
#include <stdlib.h>

#include "kernels/cuda/teacher/bf16_state.h"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

enum {
    LOGIT_BYTES = 64 << 20, /* rows of logits at a time: written and read within the L2 cache, more or less */
    WORKSPACE = 32 << 20
};

static lsa_status check(const lsa_gpu_teacher_geom *g, int64_t max_tokens, int64_t chunk, lsa_err *err) {
    const bool heads = g->head_dim == 128 || g->head_dim == 256 || g->head_dim == 512;
    const int64_t tiles = (g->window + g->index_topk) / 64 + 1;
    if (!heads || g->index_head_dim != TEACHER_SCREENED ||
        (g->hc_mult != 1 && g->hc_mult != 2 && g->hc_mult != 4))
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "the bf16 tier takes heads of 128, 256 or 512, index heads of %d, and 1, 2 or 4 streams: found "
            "heads of %d, index heads of %d, %d streams; use the fp32 tier",
            TEACHER_SCREENED, g->head_dim, g->index_head_dim, g->hc_mult);
    if (g->hidden % 8 || g->q_rank % 8 || g->o_rank % 8 || g->moe_dim % 8 || g->rope_dim % 2 ||
        g->n_head % g->o_groups || g->n_head * g->head_dim / g->o_groups % 8)
        LSA_RET_FAIL(LSA_E_CONFIG, "the bf16 tier takes widths that are multiples of 8; use the fp32 tier");
    if (g->n_expert > 512 || g->n_expert_tok > 16 || g->n_expert_tok > g->n_expert)
        LSA_RET_FAIL(LSA_E_CONFIG, "the bf16 tier takes up to 512 experts, 16 of them a token: found %d, %d",
                     g->n_expert, g->n_expert_tok);
    if (((tiles + 1) * 64 + 4 * tiles * 64) * 4 > 4 * 64 * g->head_dim)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "the bf16 tier has no room for the masses of %d window rows and %d selected ones at heads of "
            "%d; use the fp32 tier",
            g->window, g->index_topk, g->head_dim);
    if (max_tokens < 1 || chunk < 1)
        LSA_RET_FAIL(LSA_E_ARG, "room for %lld tokens, %lld at a time", (long long)max_tokens,
                     (long long)chunk);
    return LSA_OK;
}

/* Allocates, or only counts. */
#define NEW(p, count)                                                                                        \
    do {                                                                                                     \
        b->bytes += ((int64_t)(count) * (int64_t)sizeof *(p) + 255) / 256 * 256;                             \
        if (!counting)                                                                                       \
            LSA_TRY(lsa_ctx_alloc_(b->ctx, (void **)&(p), (int64_t)(count), sizeof *(p), #p, err));          \
    } while (0)

static lsa_status allocate(lsa_bf16 *b, bool counting, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &b->g;
    const int64_t T = b->max_tokens, m = b->chunk, d = g->hidden, D = g->head_dim, Di = g->index_head_dim,
                  E = g->n_expert, k = g->n_expert_tok, M = g->moe_dim, Hi = g->index_n_head;
    b->nz = (int64_t)g->hc_mult * (g->hc_mult + 2);
    b->HD = (int64_t)g->n_head * D;
    b->ID = Hi * Di;
    b->nx = g->q_rank + D + 4 * D + 4 * Di + Hi;
    b->top = g->index_topk;
    b->chunks = T / LSA_CHUNK + 1;
    b->rows = m * k + E * BF16_ALIGN;
    b->tiles = (g->window + g->index_topk + 63) / 64;
    b->logit_room = LOGIT_BYTES / 4 > b->chunks + 32 ? LOGIT_BYTES / 4 : b->chunks + 32;
    if (b->logit_room > m * (b->chunks + 32)) b->logit_room = m * (b->chunks + 32);
    NEW(b->freq_main, g->rope_dim / 2);
    NEW(b->freq_comp, g->rope_dim / 2);
    NEW(b->win, T * D);
    NEW(b->row, b->chunks * D);
    NEW(b->key, b->chunks * Di);
    NEW(b->proj, T * 4 * D);
    NEW(b->iproj, T * 4 * Di);
    NEW(b->z, m * 3 * b->nz);
    NEW(b->coef, m * b->nz);
    NEW(b->xp, m * b->nx);
    NEW(b->iw, m * Hi);
    NEW(b->x, m * d);
    NEW(b->qr, m * g->q_rank);
    NEW(b->q, m * (b->HD + b->ID));
    NEW(b->iq, m * b->ID);
    NEW(b->o, m * b->HD);
    NEW(b->og, m * g->o_groups * g->o_rank);
    NEW(b->y, m * d);
    NEW(b->logit, b->logit_room);
    NEW(b->candidate, b->logit_room);
    NEW(b->route, m * E);
    NEW(b->weight, m * k);
    NEW(b->expert, m * k);
    NEW(b->place, m * k);
    NEW(b->begin, E + 1);
    NEW(b->list, b->rows);
    NEW(b->xe, b->rows * d);
    NEW(b->h13, (b->rows + m) * 2 * M);
    NEW(b->act, (b->rows + m) * M);
    NEW(b->ye, b->rows * d);
    NEW(b->ys, m * d);
    NEW(b->kept, (int64_t)b->blocks * b->tiles * 64 * 64);
    NEW(b->kept_most, (int64_t)b->blocks * b->tiles * 64);
    NEW(b->sel, m * b->top);
    NEW(b->n_sel, m);
    NEW(b->sel_logit, m * b->top);
    NEW(b->mass, m * b->top);
    NEW(b->part, 2 * m);
    for (int i = 0; i < BF16_LANES; i++) {
        b->bytes += WORKSPACE;
        if (!counting)
            LSA_TRY(lsa_ctx_alloc_(b->ctx, &b->workspace[i], WORKSPACE, 1, "workspace of products", err));
    }
done:
    return st;
}

extern "C" int64_t lsa_bf16_bytes(const lsa_gpu_teacher_geom *g, int64_t max_tokens, int64_t chunk) {
    lsa_bf16 b = {};
    b.g = *g;
    b.max_tokens = max_tokens;
    b.chunk = chunk < max_tokens ? chunk : max_tokens;
    b.blocks = 132;
    return allocate(&b, true, NULL) == LSA_OK ? b.bytes : 0;
}

extern "C" lsa_status lsa_bf16_create(lsa_bf16 **out, lsa_ctx *ctx, const lsa_gpu_teacher_geom *g,
                                      const float *freq_main, const float *freq_comp, int64_t max_tokens,
                                      int64_t chunk, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_bf16 *b = NULL;
    *out = NULL;
    if (lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA) LSA_RET_FAIL(LSA_E_ARG, "the bf16 tier needs a CUDA context");
    LSA_TRY(check(g, max_tokens, chunk, err));
    b = (lsa_bf16 *)calloc(1, sizeof *b);
    if (!b) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    b->ctx = ctx;
    b->cs = lsa_cuda(ctx);
    b->g = *g;
    b->max_tokens = max_tokens;
    b->chunk = chunk < max_tokens ? chunk : max_tokens;
    LSA_CUDA(cudaDeviceGetAttribute(&b->blocks, cudaDevAttrMultiProcessorCount, b->cs->device));
    LSA_TRY(allocate(b, false, err));
    LSA_CUDA(cudaHostAlloc((void **)&b->host_begin, (size_t)(g->n_expert + 1) * sizeof(int32_t),
                           cudaHostAllocDefault));
    LSA_TRY(lsa_ctx_upload(ctx, b->freq_main, freq_main, (size_t)(g->rope_dim / 2) * sizeof(float), err));
    LSA_TRY(lsa_ctx_upload(ctx, b->freq_comp, freq_comp, (size_t)(g->rope_dim / 2) * sizeof(float), err));
    b->lane[0] = b->cs->stream;
    LSA_CUDA(cudaEventCreateWithFlags(&b->fork, cudaEventDisableTiming));
    LSA_CUDA(cudaEventCreateWithFlags(&b->counted, cudaEventDisableTiming));
    for (int i = 1; i < BF16_LANES; i++) {
        LSA_CUDA(cudaStreamCreateWithFlags(&b->lane[i], cudaStreamNonBlocking));
        LSA_CUDA(cudaEventCreateWithFlags(&b->joined[i], cudaEventDisableTiming));
    }
    for (cudaEvent_t &e : b->event) LSA_CUDA(cudaEventCreate(&e));
    LSA_TRY(lsa_ctx_sync(ctx, err));
    *out = b;
    b = NULL;
done:
    lsa_bf16_destroy(b);
    return st;
}

extern "C" void lsa_bf16_destroy(lsa_bf16 *b) {
    if (!b) return;
    cudaStreamSynchronize(b->cs->stream);
    bf16_gemm_close(b);
    void *const p[] = {b->freq_main, b->freq_comp, b->win,   b->row,   b->key,       b->proj,  b->iproj,
                       b->z,         b->coef,      b->xp,    b->iw,    b->x,         b->qr,    b->q,
                       b->iq,        b->o,         b->og,    b->y,     b->logit,     b->route, b->weight,
                       b->candidate, b->expert,    b->place, b->begin, b->list,      b->xe,    b->h13,
                       b->act,       b->ye,        b->ys,    b->kept,  b->kept_most, b->sel,   b->n_sel,
                       b->sel_logit, b->mass,      b->part};
    for (void *x : p) lsa_ctx_free(b->ctx, x);
    cudaFreeHost(b->host_begin);
    for (int i = 0; i < BF16_LANES; i++) {
        lsa_ctx_free(b->ctx, b->workspace[i]);
        if (i && b->lane[i]) cudaStreamDestroy(b->lane[i]);
        if (b->joined[i]) cudaEventDestroy(b->joined[i]);
    }
    if (b->fork) cudaEventDestroy(b->fork);
    if (b->counted) cudaEventDestroy(b->counted);
    for (cudaEvent_t e : b->event)
        if (e) cudaEventDestroy(e);
    free(b);
}

lsa_status bf16_select(lsa_bf16 *b, int64_t p, int64_t m, lsa_err *err) {
    const teacher_index a = {b->iq,         b->key,   b->iw,       b->logit,          b->candidate,
                             b->logit_room, p,        m,           b->g.index_n_head, (int)b->top,
                             b->sel,        b->n_sel, b->sel_logit};
    return teacher_index16(&a, b->cs->stream, err);
}

/* Attention output to the sublayer's y. */
lsa_status bf16_output(lsa_bf16 *b, const lsa_bf16_weights *w, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_teacher_geom *g = &b->g;
    const int64_t width = b->HD / g->o_groups, R = g->o_rank, GR = g->o_groups * R;
    for (int64_t i = 0; i < g->o_groups; i++) {
        const bf16_product p = {
            m, R, width, b->o + i * width, w->wo_a + i * R * width, b->HD, width, b->og + i * R, GR, false};
        LSA_TRY(bf16_gemm(b, 0, &p, err));
    }
    {
        const bf16_product p = {m, g->hidden, GR, b->og, w->wo_b, GR, GR, b->y, g->hidden, false};
        LSA_TRY(bf16_gemm(b, 0, &p, err));
    }
done:
    return st;
}

static lsa_status attend(lsa_bf16 *b, const lsa_bf16_weights *w, int64_t p, int64_t m, lsa_err *err) {
    const lsa_gpu_teacher_geom *g = &b->g;
    const bool csa = w->roles == 2;
    bf16_attend_args a = {};
    a.q = b->q, a.win = b->win, a.row = b->row;
    a.sink = w->sink;
    a.freq = w->ratio ? b->freq_comp : b->freq_main;
    if (csa) a.sel = b->sel, a.n_sel = b->n_sel, a.mass = b->mass, a.part = b->part;
    a.o = b->o;
    a.kept = b->kept, a.kept_most = b->kept_most;
    a.p = p, a.m = m;
    a.ldq = b->HD + (csa ? b->ID : 0), a.ldo = b->HD;
    a.H = g->n_head, a.window = g->window, a.ratio = w->ratio, a.top = (int)b->top, a.rope = g->rope_dim;
    a.tiles = b->tiles, a.blocks = b->blocks;
    return bf16_attend(&a, g->head_dim, b->cs->stream, err);
}

static lsa_status mark(lsa_bf16 *b, int ended, lsa_err *err) {
    if (b->timed) LSA_CUDA(cudaEventRecord(b->event[ended + 1], b->cs->stream));
    return LSA_OK;
}
static lsa_status sum_up(lsa_bf16 *b, lsa_err *err) {
    if (!b->timed) return LSA_OK;
    LSA_CUDA(cudaEventSynchronize(b->event[LSA_BF16_STAGES]));
    for (int i = 0; i < LSA_BF16_STAGES; i++) {
        float ms = 0;
        LSA_CUDA(cudaEventElapsedTime(&ms, b->event[i], b->event[i + 1]));
        b->seconds[i] += 1e-3 * (double)ms;
    }
    return LSA_OK;
}

extern "C" lsa_status lsa_bf16_layer(lsa_bf16 *b, const lsa_bf16_weights *w, uint16_t *X,
                                     const int32_t *token, int64_t p, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (m < 1 || m > b->chunk || p < 0 || p + m > b->max_tokens)
        LSA_RET_FAIL(LSA_E_ARG, "tokens %lld to %lld; room for %lld, %lld at a time", (long long)p,
                     (long long)(p + m), (long long)b->max_tokens, (long long)b->chunk);
    LSA_TRY(mark(b, -1, err));
    LSA_TRY(bf16_collapse(b, X, m, w->attn_fn, w->attn_base, w->attn_scale, w->attn_norm, err));
    LSA_TRY(mark(b, LSA_BF16_STREAMS_IN, err));
    LSA_TRY(bf16_project(b, w, p, m, err));
    LSA_TRY(mark(b, LSA_BF16_PROJECT, err));
    if (w->ratio) LSA_TRY(bf16_compress(b, w, p / w->ratio, (p + m) / w->ratio, err));
    LSA_TRY(mark(b, LSA_BF16_COMPRESS, err));
    if (w->roles == 2) LSA_TRY(bf16_select(b, p, m, err));
    LSA_TRY(mark(b, LSA_BF16_INDEX, err));
    LSA_TRY(attend(b, w, p, m, err));
    LSA_TRY(mark(b, LSA_BF16_ATTEND, err));
    LSA_TRY(bf16_output(b, w, m, err));
    LSA_TRY(mark(b, LSA_BF16_OUTPUT, err));
    LSA_TRY(bf16_expand(b, X, m, false, err));
    LSA_TRY(bf16_collapse(b, X, m, w->ffn_fn, w->ffn_base, w->ffn_scale, w->ffn_norm, err));
    LSA_TRY(mark(b, LSA_BF16_STREAMS_MID, err));
    LSA_TRY(bf16_moe(b, w, token, m, err));
    LSA_TRY(mark(b, LSA_BF16_MOE, err));
    LSA_TRY(bf16_expand(b, X, m, true, err));
    LSA_TRY(mark(b, LSA_BF16_STREAMS_OUT, err));
    LSA_TRY(sum_up(b, err));
done:
    return st;
}

extern "C" lsa_bf16_rows lsa_bf16_selected(const lsa_bf16 *b) {
    return {b->sel, b->n_sel, b->sel_logit, b->mass, b->part};
}
extern "C" void lsa_bf16_time(lsa_bf16 *b, bool on) {
    b->timed = on;
}
extern "C" void lsa_bf16_seconds(const lsa_bf16 *b, double out[LSA_BF16_STAGES]) {
    for (int i = 0; i < LSA_BF16_STAGES; i++) out[i] = b->seconds[i];
}
