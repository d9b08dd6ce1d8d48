/* The step put together: memory, pool, graph. See kernels/model/gpu_step.h. The order of a step: descriptors
 * -> samples -> per micro-batch (hidden vectors -> projections -> scores, loss, query gradients -> weight
 * gradients) -> norm, decision -> AdamW. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/step/ranks.h"
#include "kernels/cuda/step/timing.cuh"

/* Zeroed memory; with poison bytes 0xFF (NaN, -1) between guard zones. */
static lsa_status array(lsa_gpu_step *s, void **out, int64_t n, size_t size, const char *name, lsa_err *err) {
    if (!s->o.poison) return lsa_ctx_alloc_(s->ctx, out, n, size, name, err);
    step_guarded *const g = &s->guarded[s->n_guarded];
    if (s->n_guarded == STEP_ARRAYS) LSA_RET_FAIL(LSA_E_ARG, "more than %d arrays", STEP_ARRAYS);
    g->bytes = (size_t)n * size;
    g->name = name;
    LSA_CUDA(cudaMalloc((void **)&g->base, g->bytes + 2 * STEP_GUARD));
    s->n_guarded++;
    LSA_CUDA(cudaMemsetAsync(g->base, 0xFF, g->bytes + 2 * STEP_GUARD, s->cs->stream));
    *out = g->base + STEP_GUARD;
    return LSA_OK;
}
#define STEP_NEW(p, n)                                                                                       \
    do {                                                                                                     \
        void *x_ = NULL;                                                                                     \
        if ((st = array(s, &x_, (int64_t)(n), sizeof *(p), #p, err)) != LSA_OK) return st;                   \
        *(void **)&(p) = x_;                                                                                 \
    } while (0)

extern "C" lsa_status lsa_gpu_guards(lsa_gpu_step *s, lsa_err *err) {
    uint8_t zone[STEP_GUARD];
    LSA_CUDA(cudaStreamSynchronize(s->cs->stream));
    for (int i = 0; i < 2 * s->n_guarded; i++) {
        const step_guarded *const g = &s->guarded[i / 2];
        LSA_CUDA(cudaMemcpy(zone, g->base + (i % 2 ? STEP_GUARD + g->bytes : 0), STEP_GUARD,
                            cudaMemcpyDeviceToHost));
        for (int k = 0; k < STEP_GUARD; k++)
            if (zone[k] != 0xFF)
                LSA_RET_FAIL(LSA_E_NUMERIC, "a kernel wrote %s array %s (%zu bytes)",
                             i % 2 ? "behind" : "before", g->name, g->bytes);
    }
    return LSA_OK;
}

static lsa_status check(const lsa_indexer_geom *g, const lsa_gpu_opts *o, lsa_err *err) {
    if (g->hidden % 8 || g->rank % 8 || g->n_head % 8)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "train.precision bf16 needs hidden size, rank and heads in multiples of 8, found %d, %d, %d; use f32",
            g->hidden, g->rank, g->n_head);
    if (o->batch < 1 || o->micro < 1 || o->batch % o->micro)
        LSA_RET_FAIL(LSA_E_CONFIG, "train.micro_batch %lld must divide train.batch %lld", (long long)o->micro,
                     (long long)o->batch);
    if (o->comm && o->bf16_gradients && o->micro < o->batch)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "optim.exchange bf16 needs a rank's windows at once: train.micro_batch 0, or exchange f32");
    if (g->reach && (o->sampled || !o->on_sum))
        LSA_RET_FAIL(LSA_E_CONFIG, "a continuation needs all candidates and a loss on the sum of the layers");
    if (g->prior)
        LSA_RET_FAIL(LSA_E_CONFIG, "model.prior is not in the bf16 and fp8 steps: set train.precision: f32");
    if (o->columns < 1 || o->max_chunk > 1600000)
        LSA_RET_FAIL(LSA_E_CONFIG, "windows of up to %lld chunks: this path takes at most 1,600,000",
                     (long long)o->max_chunk);
    return LSA_OK;
}

static lsa_status allocate(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_opts *o = &s->o;
    const int64_t L = s->g.n_layer, m = o->micro, B = o->batch, d = s->g.hidden, r = s->g.rank,
                  H = s->g.n_head, P = s->n_param, M = L * s->shard.own + s->g.reach;
    const bool z = s->eval_only || !step_pointwise(s);
    if (!s->eval_only) {
        STEP_NEW(s->p, P);
        STEP_NEW(s->p16, P);
        STEP_NEW(s->freq, 64);
    }
    s->block = (void **)calloc((size_t)o->n_slot, sizeof *s->block);
    s->hard = (int32_t **)calloc((size_t)o->n_slot, sizeof *s->hard);
    s->n_window = (int64_t *)calloc((size_t)o->n_slot, sizeof *s->n_window);
    if (!s->block || !s->hard || !s->n_window) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    STEP_NEW(s->doc, o->n_slot);
    STEP_NEW(s->row, B);
    STEP_NEW(s->where, B);
    STEP_NEW(s->cs_table, B * 64);
    STEP_NEW(s->n_cand, B);
    STEP_NEW(s->x, L * m * d);
    STEP_NEW(s->u, L * m * r);
    STEP_NEW(s->qlin, L * m * H * 128);
    STEP_NEW(s->a, L * m * r);
    STEP_NEW(s->rstd, L * m);
    STEP_NEW(s->w, L * m * H);
    STEP_NEW(s->control, 1);
    if (z) STEP_NEW(s->z, L * m * o->columns);
    if (s->eval_only) {
        STEP_NEW(s->eval, lsa_gpu_eval_rows(&s->g) * B);
        return LSA_OK;
    }
    STEP_NEW(s->grad, P);
    if (o->comm && o->bf16_gradients) STEP_NEW(s->g16, P);
    if (o->bf16_moments) {
        STEP_NEW(s->m16, M);
        STEP_NEW(s->v16, M);
    } else {
        STEP_NEW(s->m, M);
        STEP_NEW(s->v, M);
    }
    if (o->poison) { /* moments start at 0 */
        LSA_CUDA(cudaMemsetAsync(s->m ? (void *)s->m : s->m16, 0, (size_t)M * (s->m ? 4 : 2), s->cs->stream));
        LSA_CUDA(cudaMemsetAsync(s->v ? (void *)s->v : s->v16, 0, (size_t)M * (s->v ? 4 : 2), s->cs->stream));
    }
    STEP_NEW(s->total, 3);
    STEP_NEW(s->hash, 1);
    STEP_NEW(s->n_pos, B);
    if (o->sampled) STEP_NEW(s->cand, B * o->columns);
    STEP_NEW(s->y, B * o->columns);
    if (o->loss == LSA_STEP_KL)
        STEP_NEW(s->row_weight, B);
    else
        STEP_NEW(s->weight, B * o->columns);
    if (o->loss == LSA_STEP_BPR || o->loss == LSA_STEP_MARGIN) STEP_NEW(s->zcopy, L * m * o->columns);
    if (s->g.reach) {
        STEP_NEW(s->zcopy, m * o->columns);
        STEP_NEW(s->from, m * o->columns);
        STEP_NEW(s->cost_part, B * s->g.reach);
    }
    STEP_NEW(s->dq, L * m * H * 128);
    STEP_NEW(s->da, L * m * r);
    STEP_NEW(s->dw, L * m * H);
    STEP_NEW(s->du, L * m * r);
    STEP_NEW(s->dg_part, L * 16 * r);
    STEP_NEW(s->row_loss, B * L);
    STEP_NEW(s->bound, L * m);
    STEP_NEW(s->partial, STEP_PARTIALS);
    for (int i = 0; i < 3 && o->snapshots; i++) STEP_NEW(s->snapshot[i], P);
    if (o->snapshots && (st = step_way_open(&s->way, err)) != LSA_OK) return st;
    s->desc_bytes = LSA_GPU_FLIGHT * (sizeof(step_desc) + (size_t)B * sizeof(lsa_gpu_row)) + 16;
    LSA_CUDA(cudaHostAlloc((void **)&s->desc_host, s->desc_bytes, cudaHostAllocMapped));
    LSA_CUDA(cudaHostGetDevicePointer((void **)&s->desc, s->desc_host, 0));
    LSA_CUDA(
        cudaHostAlloc((void **)&s->result_host, LSA_GPU_FLIGHT * sizeof *s->result, cudaHostAllocMapped));
    LSA_CUDA(cudaHostGetDevicePointer((void **)&s->result, s->result_host, 0));
    for (int i = 0; i < LSA_GPU_FLIGHT; i++)
        LSA_CUDA(cudaEventCreateWithFlags(&s->done[i], cudaEventDisableTiming));
    return LSA_OK;
}

/* Between the flat place of a rank's own elements and where their moments lie. */
template <typename T>
static __global__ void own_from_flat_k(const float *flat, int64_t layer_param, int64_t n,
                                       const __grid_constant__ lsa_gpu_shard own, T *out) {
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
        const int64_t l = i / own.own;
        out[i] = (T)flat[l * layer_param + step_own_place(own, i - l * own.own)];
    }
}
template <typename T>
static __global__ void flat_from_own_k(const T *in, int64_t layer_param, int64_t n,
                                       const __grid_constant__ lsa_gpu_shard own, float *flat) {
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
        const int64_t l = i / own.own;
        flat[l * layer_param + step_own_place(own, i - l * own.own)] = (float)in[i];
    }
}

/* Moments of the costs lie behind the others. */
template <typename FROM, typename TO> static __global__ void costs_move_k(const FROM *in, int n, TO *out) {
    if ((int)threadIdx.x < n) out[threadIdx.x] = (TO)(float)in[threadIdx.x];
}

/* Moments from and to flat host memory; the gradient's memory is the way station. */
static lsa_status put_moment(lsa_gpu_step *s, const float *host, float *to, bf16 *to16, lsa_err *err) {
    const int64_t n = s->g.n_layer * s->shard.own;
    if (!host) return LSA_OK;
    LSA_CUDA(cudaMemcpyAsync(s->grad, host, (size_t)s->n_param * sizeof(float), cudaMemcpyHostToDevice,
                             s->cs->stream));
    if (to)
        own_from_flat_k<<<4096, 256, 0, s->cs->stream>>>(s->grad, s->layer_param, n, s->shard, to);
    else
        own_from_flat_k<<<4096, 256, 0, s->cs->stream>>>(s->grad, s->layer_param, n, s->shard, to16);
    if (s->g.reach && to)
        costs_move_k<<<1, LSA_MAX_REACH, 0, s->cs->stream>>>(s->grad + s->at_costs, s->g.reach, to + n);
    else if (s->g.reach)
        costs_move_k<<<1, LSA_MAX_REACH, 0, s->cs->stream>>>(s->grad + s->at_costs, s->g.reach, to16 + n);
    LSA_LAUNCHED("moments in");
}
/* The other way, of all ranks; what other ranks want of this one goes into `flat` too. */
static lsa_status get_moment(lsa_gpu_step *s, float *flat, const float *from, const bf16 *from16,
                             lsa_err *err) {
    const int64_t n = s->g.n_layer * s->shard.own;
    if (from)
        flat_from_own_k<<<4096, 256, 0, s->cs->stream>>>(from, s->layer_param, n, s->shard, flat);
    else
        flat_from_own_k<<<4096, 256, 0, s->cs->stream>>>(from16, s->layer_param, n, s->shard, flat);
    if (s->g.reach && from)
        costs_move_k<<<1, LSA_MAX_REACH, 0, s->cs->stream>>>(from + n, s->g.reach, flat + s->at_costs);
    else if (s->g.reach)
        costs_move_k<<<1, LSA_MAX_REACH, 0, s->cs->stream>>>(from16 + n, s->g.reach, flat + s->at_costs);
    LSA_CUDA(cudaGetLastError());
    return step_ranks_gather(s, flat, err);
}

static lsa_status set_params(lsa_gpu_step *s, const float *params, lsa_err *err) {
    LSA_CUDA(cudaMemcpyAsync(s->p, params, (size_t)s->n_param * sizeof(float), cudaMemcpyHostToDevice,
                             s->cs->stream));
    const lsa_status st = step_shadow(s, err);
    if (st != LSA_OK) return st;
    LSA_CUDA(cudaStreamSynchronize(s->cs->stream));
    return LSA_OK;
}

/* What every step object has: geometry, memory, plans. */
static lsa_status open_step(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    cudaDeviceProp prop;
    cudaMemPool_t pool;
    uint64_t keep = UINT64_MAX; /* released blocks are for the next documents, not for the driver */
    s->cs = lsa_cuda(s->ctx);
    s->n_param = lsa_indexer_n_param(&s->g);
    s->at_costs = lsa_indexer_costs_at(&s->g);
    s->layer_param = s->at_costs / s->g.n_layer;
    s->at_wa = lsa_indexer_tensor_at(&s->g, 0, LSA_WQ_A).offset;
    s->at_wb = lsa_indexer_tensor_at(&s->g, 0, LSA_WQ_B).offset;
    s->at_gn = lsa_indexer_tensor_at(&s->g, 0, LSA_Q_NORM).offset;
    s->at_ww = lsa_indexer_tensor_at(&s->g, 0, LSA_W_PROJ).offset;
    s->shard = {1, {{0, s->layer_param, 0, false}}, s->layer_param};
    if (s->o.comm && !s->eval_only) {
        LSA_TRY(lsa_gpu_shard_make(&s->norm, &s->g, lsa_comm_rank(s->o.comm), lsa_comm_size(s->o.comm), err));
        if (s->o.sharded) s->shard = s->norm;
        if (lsa_comm_rank(s->o.comm) > 0) step_drop_gain(&s->norm); /* counted once, by rank 0 */
    }
    LSA_CUDA(cudaGetDeviceProperties(&prop, s->cs->device));
    s->sm90 = prop.major == 9 && prop.minor == 0 && !s->o.portable;
    s->n_sm = prop.multiProcessorCount;
    LSA_TRY(allocate(s, err));
    LSA_TRY(step_gemm_plan(s, err));
    LSA_CUDA(cudaStreamCreateWithFlags(&s->copy, cudaStreamNonBlocking));
    LSA_CUDA(cudaDeviceGetDefaultMemPool(&pool, s->cs->device));
    LSA_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
    LSA_TRY(step_ranks_open(s, err));
done:
    return st;
}

extern "C" lsa_status lsa_gpu_create(lsa_gpu_step **out, lsa_ctx *ctx, const lsa_indexer_geom *g,
                                     const lsa_gpu_opts *o, const float *params, const float *m,
                                     const float *v, int64_t updates, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_step *s = NULL;
    step_control control = {};
    float freq[64];
    *out = NULL;
    if (lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA) LSA_RET_FAIL(LSA_E_ARG, "a GPU step needs a CUDA context");
    LSA_TRY(check(g, o, err));
    s = (lsa_gpu_step *)calloc(1, sizeof *s);
    if (!s) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    s->ctx = ctx;
    s->g = *g;
    s->o = *o;
    LSA_TRY(open_step(s, err));
    lsa_rope_freqs(freq, &g->rope);
    LSA_TRY(lsa_ctx_upload(ctx, s->freq, freq, (size_t)(g->rope.dim / 2) * sizeof *freq, err));
    control.updates = updates;
    LSA_TRY(lsa_ctx_upload(ctx, s->control, &control, sizeof control, err));
    LSA_TRY(step_ranks_rehearse(s, err));
    LSA_TRY(put_moment(s, m, s->m, s->m16, err));
    LSA_TRY(put_moment(s, v, s->v, s->v16, err));
    LSA_TRY(set_params(s, params, err));
    *out = s;
    s = NULL;
done:
    lsa_gpu_destroy(s);
    return st;
}

extern "C" lsa_status lsa_gpu_create_eval(lsa_gpu_step **out, lsa_gpu_step *weights, int64_t windows,
                                          int64_t columns, int32_t n_slot, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_step *s = (lsa_gpu_step *)calloc(1, sizeof *s);
    *out = NULL;
    if (!s) LSA_RET_FAIL(LSA_E_NOMEM, "out of memory");
    s->ctx = weights->ctx;
    s->g = weights->g;
    s->o = weights->o;
    s->eval_only = true;
    s->p = weights->p, s->p16 = weights->p16, s->freq = weights->freq;
    s->o.batch = s->o.micro = windows;
    s->o.columns = columns;
    s->o.n_slot = n_slot;
    LSA_TRY(open_step(s, err));
    *out = s;
    s = NULL;
done:
    lsa_gpu_destroy(s);
    return st;
}

extern "C" void lsa_gpu_destroy(lsa_gpu_step *s) {
    if (!s) return;
    const bool whole = step_ranks_await(s, NULL, "ending", NULL) == LSA_OK;
    if (!whole) cudaStreamSynchronize(s->cs->stream);
    /* Before NCCL ends, because it waits for graphs that hold its work; not after it was aborted, because the
     * graph would call back into what is gone. */
    if (s->graph && whole) cudaGraphExecDestroy(s->graph);
    step_ranks_close(s);
    if (s->copy) {
        cudaStreamSynchronize(s->copy);
        cudaStreamDestroy(s->copy);
    }
    step_way_close(s->way);
    step_gemm_free(s);
    if (s->eval_only) s->p = NULL, s->p16 = NULL, s->freq = NULL;
    for (int i = 0; s->block && i < s->o.n_slot; i++) cudaFree(s->block[i]);
    for (int i = 0; s->hard && i < s->o.n_slot; i++) cudaFree(s->hard[i]);
    free(s->block);
    free(s->hard);
    free(s->n_window);
    void *const p[] = {s->p,           s->grad,        s->m,          s->v,     s->p16,     s->m16,
                       s->v16,         s->freq,        s->doc,        s->row,   s->where,   s->cs_table,
                       s->n_cand,      s->n_pos,       s->cand,       s->y,     s->weight,  s->x,
                       s->u,           s->qlin,        s->dq,         s->da,    s->dw,      s->a,
                       s->rstd,        s->w,           s->z,          s->du,    s->dg_part, s->zcopy,
                       s->row_loss,    s->partial,     s->control,    s->bound, s->eval,    s->row_weight,
                       s->word,        s->g16,         s->total,      s->hash,  s->from,    s->cost_part,
                       s->snapshot[0], s->snapshot[1], s->snapshot[2]};
    for (size_t i = 0; i < sizeof p / sizeof *p && !s->n_guarded; i++) cudaFree(p[i]);
    for (int i = 0; i < s->n_guarded; i++) cudaFree(s->guarded[i].base);
    cudaFreeHost(s->desc_host);
    cudaFreeHost(s->result_host);
    for (int i = 0; i < LSA_GPU_FLIGHT; i++)
        if (s->done[i]) cudaEventDestroy(s->done[i]);
    free(s);
}

/* ---- pool ---- */

extern "C" lsa_status lsa_gpu_thread_begin(const lsa_gpu_step *s, lsa_err *err) {
    LSA_CUDA(cudaSetDevice(s->cs->device));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_pool_put(lsa_gpu_step *s, int32_t slot, const lsa_gpu_doc *d, const void *block,
                                       lsa_err *err) {
    if (slot < 0 || slot >= s->o.n_slot) LSA_RET_FAIL(LSA_E_ARG, "pool: slot %d of %d", slot, s->o.n_slot);
    if (s->block[slot]) LSA_CUDA(cudaFreeAsync(s->block[slot], s->copy));
    if (s->hard[slot]) LSA_CUDA(cudaFreeAsync(s->hard[slot], s->copy));
    s->block[slot] = NULL;
    s->hard[slot] = NULL;
    if (!d) return LSA_OK;
    const cudaError_t e = cudaMallocAsync(&s->block[slot], (size_t)d->bytes, s->copy);
    if (e != cudaSuccess) {
        cudaGetLastError();
        LSA_RET_FAIL(LSA_E_NOMEM,
                     "%.1f MiB of GPU memory for document %lld refused (%s); lower train.pool_mib",
                     (double)d->bytes / 1048576.0, (long long)d->doc, cudaGetErrorString(e));
    }
    uint8_t *const b = (uint8_t *)s->block[slot];
    step_doc x = {};
    s->n_window[slot] = d->n_window;
    x.doc = d->doc, x.n_key = d->n_key, x.n_hidden = d->n_hidden, x.n_window = d->n_window;
    x.key = b + d->key, x.scale = (const float *)(b + d->scale), x.hidden = (const bf16 *)(b + d->hidden);
    x.window = (const lsa_gpu_window *)(b + d->window), x.need_begin = (const int64_t *)(b + d->need_begin);
    x.chunk = (const int32_t *)(b + d->chunk), x.weight = (const float *)(b + d->weight),
    x.mass = (const float *)(b + d->mass);
    LSA_CUDA(cudaMemcpyAsync(b, block, (size_t)d->bytes, cudaMemcpyHostToDevice, s->copy));
    LSA_CUDA(cudaMemcpyAsync(s->doc + slot, &x, sizeof x, cudaMemcpyHostToDevice,
                             s->copy)); /* pageable: taken before the return */
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_pool_wait(lsa_gpu_step *s, lsa_err *err) {
    LSA_CUDA(cudaStreamSynchronize(s->copy));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_host_alloc(void **out, int64_t bytes, lsa_err *err) {
    LSA_CUDA(cudaHostAlloc(out, (size_t)bytes, cudaHostAllocDefault));
    return LSA_OK;
}
extern "C" void lsa_gpu_host_free(void *p) {
    cudaFreeHost(p);
}

extern "C" lsa_status lsa_gpu_memory(const lsa_gpu_step *s, int64_t *free_bytes, int64_t *total,
                                     lsa_err *err) {
    size_t f, t;
    (void)s;
    LSA_CUDA(cudaMemGetInfo(&f, &t));
    *free_bytes = (int64_t)f;
    *total = (int64_t)t;
    return LSA_OK;
}

/* ---- the step ---- */

bool step_pointwise(const lsa_gpu_step *s) {
    return (s->o.loss == LSA_STEP_BCE || s->o.loss == LSA_STEP_FOCAL) &&
           (!s->o.on_sum || (s->g.n_layer == 1 && s->g.reach == 0));
}

static score_args score_of(const lsa_gpu_step *s, int64_t first, int64_t m) {
    const int64_t n = s->o.columns;
    score_args a = {};
    a.m = (int32_t)s->o.micro;
    a.rows = (int32_t)m;
    a.L = s->g.n_layer;
    a.H = s->g.n_head;
    a.rope_dim = s->g.rope.dim;
    a.n = n;
    a.qlin = s->qlin;
    a.w = s->w;
    a.cs = s->cs_table + first * (s->g.rope.dim / 2);
    a.where = s->where + first;
    a.cand = s->cand && !s->eval_only ? s->cand + first * n : NULL;
    a.n_cand = s->n_cand + first;
    a.y = s->y ? s->y + first * n : NULL;
    a.weight = s->weight ? s->weight + first * n : NULL;
    a.smoothing = s->o.smoothing;
    a.focal = s->o.loss == LSA_STEP_FOCAL;
    a.fp8 = s->o.fp8_query;
    a.z = s->z;
    a.dz = s->z;
    a.dz_layer = s->o.on_sum ? 0 : s->o.micro * n;
    a.bound = s->bound;
    a.bound_layer = s->o.on_sum ? 0 : (int32_t)s->o.micro;
    a.scale = &s->control->loss_scale;
    a.dq = s->dq;
    a.dw = s->dw;
    a.row_loss =
        s->row_loss ? s->row_loss + first * (step_pointwise(s) || !s->o.on_sum ? s->g.n_layer : 1) : NULL;
    return a;
}

lsa_status step_score_z(lsa_gpu_step *s, int64_t first, int64_t m, lsa_err *err) {
    const score_args a = score_of(s, first, m);
    if (!s->sm90) return score_any(s, &a, SCORE_Z, err);
    /* enough blocks to fill the card twice when windows are few and long */
    int splits = (int)(4 * s->n_sm / (s->o.micro * s->g.n_layer) + 1);
    const int most = (int)((s->o.columns + 8 * STEP_TILE - 1) / (8 * STEP_TILE));
    splits = splits < most ? splits : most;
    return score_z_sm90(s, &a, splits < 1 ? 1 : splits, err);
}

lsa_status step_score_grad(lsa_gpu_step *s, int64_t first, bool pointwise, lsa_err *err) {
    const score_args a = score_of(s, first, s->o.micro);
    return s->sm90 ? score_grad_sm90(s, &a, pointwise, err)
                   : score_any(s, &a, pointwise ? SCORE_POINTWISE : SCORE_GRAD, err);
}

lsa_status step_query(lsa_gpu_step *s, int64_t first, int64_t m, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(step_gather(s, first, m, err));
    LSA_TRY(step_gemm_run(s, GEMM_A, false, err));
    LSA_TRY(step_gemm_run(s, GEMM_W, false, err));
    LSA_TRY(step_norm_fwd(s, err));
    LSA_TRY(step_gemm_run(s, GEMM_Q, false, err));
done:
    return st;
}

static lsa_status step_scores(lsa_gpu_step *s, int64_t first, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (step_pointwise(s)) return step_score_grad(s, first, true, err);
    LSA_TRY(step_score_z(s, first, s->o.micro, err));
    LSA_TRY(step_loss(s, first, err));
    LSA_TRY(step_score_grad(s, first, false, err));
done:
    return st;
}

/* last: of the micro-batches, so that what is formed is the whole gradient of this rank. */
static lsa_status step_weight_grads(lsa_gpu_step *s, bool add, bool last, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(step_gemm_run(s, GEMM_DWB, add, err));
    if (last) LSA_TRY(step_ranks_reduce(s, STEP_WQ_B, err));
    LSA_TRY(step_gemm_run(s, GEMM_DU, false, err));
    LSA_TRY(step_norm_bwd(s, add, err));
    LSA_TRY(step_gemm_run(s, GEMM_DWA, add, err));
    LSA_TRY(step_gemm_run(s, GEMM_DWW, add, err));
    if (last) LSA_TRY(step_ranks_reduce(s, STEP_OTHERS, err));
    if (last) LSA_TRY(step_ranks_join(s, err));
done:
    return st;
}

static lsa_status enqueue(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(step_ranks_share_early(s, err));
    LSA_TRY(step_prepare(s, err));
    LSA_TRY(step_ranks_join(s, err));
    for (int64_t first = 0; first < s->o.batch; first += s->o.micro) {
        LSA_TRY(step_query(s, first, s->o.micro, err));
        LSA_TRY(step_scores(s, first, err));
        if (first + s->o.micro == s->o.batch) LSA_TRY(step_costs_grad(s, err));
        LSA_TRY(step_weight_grads(s, first > 0, first + s->o.micro == s->o.batch, err));
    }
    LSA_TRY(step_norm_and_control(s, err));
    LSA_TRY(step_update(s, err));
    LSA_TRY(step_ranks_share_late(s, err));
done:
    return st;
}

static lsa_status capture(lsa_gpu_step *s, lsa_err *err) {
    cudaGraph_t graph = NULL;
    LSA_CUDA(cudaStreamBeginCapture(s->cs->stream, cudaStreamCaptureModeThreadLocal));
    const lsa_status st = enqueue(s, err);
    const cudaError_t e = cudaStreamEndCapture(s->cs->stream, &graph);
    if (st != LSA_OK || e != cudaSuccess) {
        if (graph) cudaGraphDestroy(graph);
        if (st != LSA_OK) return st;
        LSA_RET_FAIL(LSA_E_DEVICE, "the step could not be captured: %s", cudaGetErrorString(e));
    }
    const cudaError_t f = cudaGraphInstantiate(&s->graph, graph, 0);
    cudaGraphDestroy(graph);
    if (f != cudaSuccess)
        LSA_RET_FAIL(LSA_E_DEVICE, "the step's graph could not be made: %s", cudaGetErrorString(f));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_launch(lsa_gpu_step *s, const lsa_gpu_row *row, double lr, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t slot = s->launched % LSA_GPU_FLIGHT;
    if (s->launched - s->taken >= LSA_GPU_FLIGHT)
        LSA_RET_FAIL(LSA_E_ARG, "take a result before another step is started");
    if (!s->graph) LSA_TRY(capture(s, err));
    ((step_desc *)s->desc_host)[slot].lr = (float)lr;
    memcpy(s->desc_host + LSA_GPU_FLIGHT * sizeof(step_desc) +
               (size_t)slot * (size_t)s->o.batch * sizeof *row,
           row, (size_t)s->o.batch * sizeof *row);
    LSA_CUDA(cudaGraphLaunch(s->graph, s->cs->stream));
    LSA_CUDA(cudaEventRecord(s->done[slot], s->cs->stream));
    s->launched++;
done:
    return st;
}

extern "C" lsa_status lsa_gpu_result_take(lsa_gpu_step *s, lsa_gpu_result *out, lsa_err *err) {
    if (s->taken == s->launched) LSA_RET_FAIL(LSA_E_ARG, "no step is in flight");
    const lsa_status st =
        step_ranks_await(s, s->done[s->taken % LSA_GPU_FLIGHT], "training on the GPUs", err);
    if (st != LSA_OK) return st;
    *out = s->result_host[s->taken % LSA_GPU_FLIGHT];
    s->taken++;
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_wait(lsa_gpu_step *s, lsa_err *err) {
    LSA_CUDA(cudaStreamSynchronize(s->cs->stream));
    return LSA_OK;
}

extern "C" lsa_status lsa_gpu_snapshot(lsa_gpu_step *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    float *const *const to = s->snapshot;
    LSA_TRY(step_ranks_gather(s, s->p, err));
    if (to[0])
        LSA_CUDA(cudaMemcpyAsync(to[0], s->p, (size_t)s->n_param * sizeof(float), cudaMemcpyDeviceToDevice,
                                 s->cs->stream));
    LSA_TRY(get_moment(s, to[1] ? to[1] : s->grad, s->m, s->m16, err));
    LSA_TRY(get_moment(s, to[2] ? to[2] : s->grad, s->v, s->v16, err));
    LSA_TRY(step_ranks_await(s, NULL, "gathering the state of the GPUs", err));
done:
    return st;
}

/* NUMERIC: a sum of mixed words, so that the order of threads does not matter. */
static __device__ __forceinline__ unsigned long long mixed(uint64_t i, uint32_t bits) {
    uint64_t x = (i << 32 | bits) + 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
static __global__ void hash_k(const bf16 *p16, const float *p, int64_t n, int64_t at_costs,
                              int64_t layer_param, int64_t gain0, int64_t gain1, unsigned long long *out) {
    unsigned long long sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
        const int64_t at = i % layer_param;
        const bool f32 = i >= at_costs || (at >= gain0 && at < gain1);
        sum += mixed((uint64_t)i, f32 ? __float_as_uint(p[i]) : (uint32_t)__bfloat16_as_ushort(p16[i]));
    }
    for (int o = 16; o >= 1; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (threadIdx.x % 32 == 0) atomicAdd(out, sum);
}
extern "C" lsa_status lsa_gpu_share(lsa_gpu_step *s, lsa_err *err) {
    return step_ranks_share(s, err);
}

extern "C" lsa_status lsa_gpu_hash(lsa_gpu_step *s, uint64_t *out, lsa_err *err) {
    unsigned long long h = 0;
    const lsa_status shared = lsa_gpu_share(s, err);
    if (shared != LSA_OK) return shared;
    LSA_CUDA(cudaMemsetAsync(s->hash, 0, sizeof *s->hash, s->cs->stream));
    hash_k<<<4096, 256, 0, s->cs->stream>>>(s->p16, s->p, s->n_param, s->at_costs, s->layer_param, s->at_gn,
                                            s->at_gn + s->g.rank, s->hash);
    LSA_CUDA(cudaMemcpyAsync(&h, s->hash, sizeof h, cudaMemcpyDeviceToHost, s->cs->stream));
    const lsa_status st = step_ranks_await(s, NULL, "comparing the GPUs", err);
    *out = h;
    return st;
}

static __global__ void widen_k(const bf16 *g16, int64_t n, int64_t layer_param, int64_t gain0, int64_t gain1,
                               float *g) {
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
        const int64_t at = i % layer_param;
        if (at < gain0 || at >= gain1) g[i] = __bfloat162float(g16[i]);
    }
}

extern "C" lsa_status lsa_gpu_peek(lsa_gpu_step *s, int32_t *n_cand, int32_t *n_pos, int32_t *cand, float *y,
                                   float *weight, float *grad, lsa_err *err) {
    const size_t B = (size_t)s->o.batch, n = (size_t)s->o.columns;
    if (grad && s->g16)
        widen_k<<<4096, 256, 0, s->cs->stream>>>(s->g16, s->at_costs, s->layer_param, s->at_gn,
                                                 s->at_gn + s->g.rank, s->grad);
    LSA_CUDA(cudaStreamSynchronize(s->cs->stream));
    if (n_cand) LSA_CUDA(cudaMemcpy(n_cand, s->n_cand, B * 4, cudaMemcpyDeviceToHost));
    if (n_pos) LSA_CUDA(cudaMemcpy(n_pos, s->n_pos, B * 4, cudaMemcpyDeviceToHost));
    if (cand && s->cand) LSA_CUDA(cudaMemcpy(cand, s->cand, B * n * 4, cudaMemcpyDeviceToHost));
    if (cand && !s->cand) memset(cand, 0xff, B * n * 4);
    if (y) LSA_CUDA(cudaMemcpy(y, s->y, B * n * 4, cudaMemcpyDeviceToHost));
    if (weight && s->weight) LSA_CUDA(cudaMemcpy(weight, s->weight, B * n * 4, cudaMemcpyDeviceToHost));
    if (grad) LSA_CUDA(cudaMemcpy(grad, s->grad, (size_t)s->n_param * 4, cudaMemcpyDeviceToHost));
    return LSA_OK;
}

/* ---- measuring ---- */

extern "C" lsa_status lsa_gpu_stage_times(lsa_gpu_step *s, int repeats, lsa_gpu_times *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    int k = 0;
    *out = (lsa_gpu_times){};
    out->exchange = out->share = -1;
#define STAGE(text, call)                                                                                    \
    out->name[k] = text;                                                                                     \
    LSA_TRY(step_time_part(s, repeats, &out->ms[k++], err, [&]() -> lsa_status { return call; }))
    STAGE("samples", step_prepare(s, err));
    STAGE("hidden vectors", step_gather(s, 0, s->o.micro, err));
    STAGE("projections", step_query(s, 0, s->o.micro, err));
    STAGE("norm forward", step_norm_fwd(s, err));
    STAGE("scores, loss, gradient", step_scores(s, 0, err));
    STAGE("norm backward", step_norm_bwd(s, false, err));
    STAGE("weight gradients", step_weight_grads(s, false, true, err));
    STAGE("gradient norm", step_norm_and_control(s, err));
    STAGE("AdamW", step_update(s, err));
    if (s->ranks) {
        out->exchange = k;
        STAGE("gradients of all GPUs", step_ranks_exchange(s, err));
    }
    if (s->ranks && s->o.sharded) {
        out->share = k;
        STAGE("weights of the other GPUs", step_ranks_share(s, err));
    }
#undef STAGE
    for (int backward = 0; backward < 2; backward++) {
        lsa_err why = {};
        out->cudnn_ms[backward] = -1;
        if (step_cudnn_norm(s, backward, repeats, &out->cudnn_ms[backward], &out->cudnn_difference[backward],
                            &why) != LSA_OK)
            snprintf(out->cudnn_refused, sizeof out->cudnn_refused, "%.255s", why.msg);
    }
    out->n = k;
    step_control c; /* the repeats have counted as steps: the host's count follows */
    LSA_CUDA(cudaStreamSynchronize(s->cs->stream));
    LSA_CUDA(cudaMemcpy(&c, s->control, sizeof c, cudaMemcpyDeviceToHost));
    s->launched = s->taken = c.launched;
done:
    return st;
}

extern "C" lsa_status lsa_gpu_ceilings(lsa_gpu_step *s, double *copy_rate, double *flop_rate, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t bytes = (int64_t)2 << 30, n = 8192;
    uint8_t *a = NULL, *b = NULL;
    double ms = 0;
    step_gemm big = {};
    LSA_CUDA(cudaMalloc((void **)&a, (size_t)bytes));
    LSA_CUDA(cudaMalloc((void **)&b, (size_t)bytes));
    LSA_TRY(step_time_part(s, 20, &ms, err, [&]() -> lsa_status {
        LSA_CUDA(cudaMemcpyAsync(b, a, (size_t)bytes, cudaMemcpyDeviceToDevice, s->cs->stream));
        return LSA_OK;
    }));
    *copy_rate = 2.0 * (double)bytes / (ms * 1e-3);
    LSA_TRY(step_square_plan(s, &big, n, err));
    step_random_bf16(s, (bf16 *)a, n * n);
    LSA_TRY(
        step_time_part(s, 20, &ms, err, [&]() -> lsa_status { return step_gemm_on(s, &big, a, a, b, err); }));
    *flop_rate = 2.0 * (double)n * (double)n * (double)n / (ms * 1e-3);
done:
    step_gemm_drop(&big);
    cudaFree(a);
    cudaFree(b);
    return st;
}
