/* Statistics on their way to the host. A chunk's kernels write into a slot; a second stream copies the slot
 * to pinned memory while the first goes on; the tap is called when its turn comes, at the latest when the
 * slot is needed again. The mistake that would stay silent: copying from what the next chunk overwrites,
 * which is why keys, hidden vectors and probes are put aside in the slot first. */
#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/core/lsa_ids.h"
}

#define NEW(p, count) LSA_TRY(lsa_ctx_alloc_(t->ctx, (void **)&(p), (int64_t)(count), sizeof *(p), #p, err))
#define PINNED(p, count)                                                                                     \
    LSA_CUDA(cudaHostAlloc((void **)&(p), (size_t)(count) * sizeof *(p), cudaHostAllocDefault))
#define BOTH(x, count)                                                                                       \
    do {                                                                                                     \
        NEW(s->on.x, count);                                                                                 \
        PINNED(s->host.x, count);                                                                            \
    } while (0)

static int64_t probe_size(const lsa_gpu_teacher *t) {
    return t->max_tokens / LSA_CHUNK + 1 + t->ID + t->g.index_n_head;
}

static lsa_status create(lsa_gpu_teacher *t, teacher_slot *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t m = t->chunk;
    LSA_CUDA(cudaEventCreateWithFlags(&s->ready, cudaEventDisableTiming));
    LSA_CUDA(cudaEventCreate(&s->begun));
    LSA_CUDA(cudaEventCreate(&s->copied));
    BOTH(sel, m * t->top);
    BOTH(n_sel, m);
    BOTH(sel_logit, m * t->top);
    BOTH(mass, m * t->top);
    BOTH(part, 2 * m);
    BOTH(key, (m / LSA_CHUNK + 1) * t->g.index_head_dim);
    BOTH(probe, LSA_GPU_MAX_PROBE * probe_size(t));
done:
    return st;
}

lsa_status teacher_slots_create(lsa_gpu_teacher *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_CUDA(cudaStreamCreateWithFlags(&t->copies, cudaStreamNonBlocking));
    for (teacher_slot &s : t->slot) LSA_TRY(create(t, &s, err));
done:
    return st;
}

static void free_hidden(lsa_gpu_teacher *t, teacher_slot *s) {
    lsa_ctx_free(t->ctx, s->on.hidden);
    cudaFreeHost(s->host.hidden);
    s->on.hidden = s->host.hidden = NULL;
    s->hidden_room = 0;
}
static void free_dense(lsa_gpu_teacher *t, teacher_slot *s) {
    lsa_ctx_free(t->ctx, s->on.dense);
    cudaFreeHost(s->host.dense);
    s->on.dense = s->host.dense = NULL;
    s->dense_room = 0;
}

void teacher_slots_destroy(lsa_gpu_teacher *t) {
    if (t->copies) cudaStreamSynchronize(t->copies);
    for (teacher_slot &s : t->slot) {
        void *const on[] = {s.on.sel, s.on.n_sel, s.on.sel_logit, s.on.mass, s.on.part, s.on.key, s.on.probe},
                    *const host[] = {s.host.sel,  s.host.n_sel, s.host.sel_logit, s.host.mass,
                                     s.host.part, s.host.key,   s.host.probe};
        for (void *p : on) lsa_ctx_free(t->ctx, p);
        for (void *p : host) cudaFreeHost(p);
        free_hidden(t, &s);
        free_dense(t, &s);
        const cudaEvent_t event[] = {s.ready, s.begun, s.copied};
        for (cudaEvent_t e : event)
            if (e) cudaEventDestroy(e);
    }
    if (t->copies) cudaStreamDestroy(t->copies);
}

/* Positions of [p, p + m) with (position + 1) mod every = 0: the first of them, and how many. */
static int64_t wanted(int64_t every, int64_t p, int64_t m, int64_t *first) {
    *first = every > 0 ? (p + every) / every * every - 1 : 0;
    return every > 0 && *first < p + m ? (p + m - 1 - *first) / every + 1 : 0;
}

lsa_status teacher_slots_room(lsa_gpu_teacher *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t hidden = t->hidden_stride > 0 ? t->chunk / t->hidden_stride + 1 : 0,
                  dense = t->dense_every > 0 ? t->chunk / t->dense_every + 1 : 0;
    for (teacher_slot &slot : t->slot) {
        teacher_slot *const s = &slot;
        if (hidden > s->hidden_room || dense > s->dense_room) LSA_TRY(teacher_slots_deliver(t, err));
        if (hidden > s->hidden_room) {
            free_hidden(t, s);
            BOTH(hidden, hidden * t->g.hidden);
            s->hidden_room = hidden;
        }
        if (dense > s->dense_room) {
            free_dense(t, s);
            BOTH(dense, dense * (t->max_tokens / LSA_CHUNK + 1));
            s->dense_room = dense;
        }
    }
done:
    return st;
}

static lsa_status deliver(lsa_gpu_teacher *t, teacher_slot *s, lsa_err *err) {
    if (!s->full) return LSA_OK;
    float ms = 0;
    s->full = false;
    LSA_CUDA(cudaEventSynchronize(s->copied));
    LSA_CUDA(cudaEventElapsedTime(&ms, s->begun, s->copied));
    t->seconds[LSA_GPU_COPIES] += 1e-3 * (double)ms;
    lsa_gpu_probe probe[LSA_GPU_MAX_PROBE];
    for (int32_t i = 0; i < s->n_probe; i++) {
        const float *const at = s->host.probe + i * probe_size(t), *const iq =
                                                                       at + t->max_tokens / LSA_CHUNK + 1;
        probe[i] = {s->probe[i], at, iq, iq + t->ID};
    }
    const lsa_gpu_csa_rows rows = {s->p,
                                   s->m,
                                   t->top,
                                   s->host.sel,
                                   s->host.n_sel,
                                   s->host.sel_logit,
                                   s->host.mass,
                                   s->host.part,
                                   s->host.part + s->m,
                                   s->host.key,
                                   s->first_key,
                                   s->n_key,
                                   s->host.hidden,
                                   s->hidden_stride,
                                   probe,
                                   s->n_probe,
                                   s->host.dense,
                                   s->dense_every,
                                   t->max_tokens / LSA_CHUNK + 1};
    s->tap(s->user, &rows);
    return LSA_OK;
}

lsa_status teacher_slots_deliver(lsa_gpu_teacher *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int i = 0; i < TEACHER_SLOTS; i++) LSA_TRY(deliver(t, &t->slot[(t->next + i) % TEACHER_SLOTS], err));
done:
    return st;
}

lsa_status teacher_slot_take(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_gpu_csa_tap *tap, void *user,
                             lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t first;
    teacher_slot *const s = &t->slot[t->next];
    LSA_TRY(deliver(t, s, err));
    t->sel = s->on.sel, t->n_sel = s->on.n_sel;
    t->sel_logit = s->on.sel_logit, t->mass = s->on.mass, t->part = s->on.part;
    s->p = p, s->m = m;
    s->tap = tap, s->user = user;
    s->hidden_stride = t->hidden_stride, s->dense_every = t->dense_every;
    s->n_hidden = wanted(s->hidden_stride, p, m, &first);
    s->n_dense = wanted(s->dense_every, p, m, &first);
    s->first_key = p / LSA_CHUNK;
    s->n_key = (p + m) / LSA_CHUNK - s->first_key;
    s->n_probe = 0;
    for (int32_t i = 0; i < t->n_probe; i++)
        if (t->probe[i] >= p && t->probe[i] < p + m) s->probe[s->n_probe++] = t->probe[i];
done:
    return st;
}

lsa_status teacher_slot_hidden(lsa_gpu_teacher *t, lsa_err *err) {
    const teacher_slot *const s = &t->slot[t->next];
    const size_t row = (size_t)t->g.hidden * sizeof(float);
    int64_t first;
    if (wanted(s->hidden_stride, s->p, s->m, &first) > 0)
        LSA_CUDA(cudaMemcpy2DAsync(s->on.hidden, row, t->x + (first - s->p) * t->g.hidden,
                                   row * (size_t)s->hidden_stride, row, (size_t)s->n_hidden,
                                   cudaMemcpyDeviceToDevice, t->cs->stream));
    return LSA_OK;
}

static lsa_status put_aside(lsa_gpu_teacher *t, const lsa_gpu_layer *l, teacher_slot *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    const cudaStream_t stream = t->cs->stream;
    const int64_t Di = t->g.index_head_dim, Hi = t->g.index_n_head;
    int64_t first;
    if (s->n_key > 0)
        LSA_CUDA(cudaMemcpyAsync(s->on.key, t->key + s->first_key * Di,
                                 (size_t)(s->n_key * Di) * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    for (int32_t i = 0; i < s->n_probe; i++) {
        float *const to = s->on.probe + i * probe_size(t), *const iq = to + t->max_tokens / LSA_CHUNK + 1;
        const int64_t at = s->probe[i] - s->p;
        LSA_TRY(teacher_probe(t, s->p, at, to, err));
        LSA_CUDA(cudaMemcpyAsync(iq, t->iq + at * t->ID, (size_t)t->ID * sizeof(float),
                                 cudaMemcpyDeviceToDevice, stream));
        LSA_CUDA(cudaMemcpyAsync(iq + t->ID, t->iw + at * Hi, (size_t)Hi * sizeof(float),
                                 cudaMemcpyDeviceToDevice, stream));
    }
    if (wanted(s->dense_every, s->p, s->m, &first) > 0)
        LSA_TRY(teacher_dense(t, l, s->p, first, s->n_dense, s->on.dense, err));
done:
    return st;
}

#define FETCH(x, count)                                                                                      \
    do {                                                                                                     \
        if ((count) > 0)                                                                                     \
            LSA_CUDA(cudaMemcpyAsync(s->host.x, s->on.x, (size_t)(count) * sizeof *s->on.x,                  \
                                     cudaMemcpyDeviceToHost, t->copies));                                    \
    } while (0)

lsa_status teacher_slot_send(lsa_gpu_teacher *t, const lsa_gpu_layer *l, lsa_err *err) {
    lsa_status st = LSA_OK;
    teacher_slot *const s = &t->slot[t->next];
    const int64_t m = s->m;
    LSA_TRY(put_aside(t, l, s, err));
    LSA_CUDA(cudaEventRecord(s->ready, t->cs->stream));
    LSA_CUDA(cudaStreamWaitEvent(t->copies, s->ready, 0));
    LSA_CUDA(cudaEventRecord(s->begun, t->copies));
    FETCH(sel, m * t->top);
    FETCH(n_sel, m);
    FETCH(sel_logit, m * t->top);
    FETCH(mass, m * t->top);
    FETCH(part, 2 * m);
    FETCH(key, s->n_key * t->g.index_head_dim);
    FETCH(probe, s->n_probe * probe_size(t));
    FETCH(hidden, s->n_hidden * t->g.hidden);
    FETCH(dense, s->n_dense * (t->max_tokens / LSA_CHUNK + 1));
    LSA_CUDA(cudaEventRecord(s->copied, t->copies));
    s->full = true;
    t->next = (t->next + 1) % TEACHER_SLOTS;
done:
    return st;
}
