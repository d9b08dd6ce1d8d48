/* Streaming: see gpu_stream.h. Turn k is layer k mod n, in place k mod 2 of the GPU's two.
 *   reader  turn k is read once the copy of turn k - 2 has left its staging
 *   main    turn k is copied once it was read and turn k - 2 has been computed (the GPU waits, not this
 * thread)
 */
#include "infer/gpu_stream.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "data/teacher_internal.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

typedef struct source { /* of one tensor */
    const void *values, *scales;
    size_t bytes, scale_bytes;
    int64_t *ids; /* owned; or NULL */
    char name[160];
} source;

typedef struct layer_plan { /* of one layer in one place */
    LSA_VEC(lsa_gpu_tensor) tensor;
    LSA_VEC(source) from;
    char *base;
    int64_t arena, stored; /* bytes */
    const lsa_engine *e;
    lsa_gpu_layer *layer;
} layer_plan;

struct lsa_gpu_stream {
    const lsa_engine *e;
    int32_t n_layer;
    lsa_gpu_weights *w;
    layer_plan plan[2][LSA_MAX_LAYERS];
    int64_t turn; /* in work */
    pthread_t reader;
    bool started;
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    int64_t read, queued; /* turns below were read; their copies were queued */
    bool ending;
    lsa_status st; /* of the reader */
    lsa_err err;
};

/* ---- what a layer consists of ---- */

static lsa_status give_room(void *user, void **p, int64_t n, size_t size, const char *what, lsa_err *err) {
    layer_plan *const l = user;
    (void)what, (void)err;
    *p = l->base + l->arena;
    l->arena += (n * (int64_t)size + 255) / 256 * 256;
    return LSA_OK;
}

static int64_t stored_room(layer_plan *l, size_t bytes) {
    const int64_t at = l->stored;
    l->stored += ((int64_t)bytes + 255) / 256 * 256;
    return at;
}

static lsa_status add(layer_plan *l, lsa_gpu_tensor t, source from, const char *name, lsa_err *err) {
    lsa_status st = LSA_OK;
    snprintf(from.name, sizeof from.name, "%s", name);
    t.at = stored_room(l, from.bytes);
    t.scale_at = stored_room(l, from.scale_bytes);
    LSA_TRY(LSA_VEC_RESERVE(l->tensor, l->tensor.len + 1, err));
    LSA_TRY(LSA_VEC_RESERVE(l->from, l->from.len + 1, err));
    l->tensor.data[l->tensor.len++] = t;
    l->from.data[l->from.len++] = from;
    from.ids = NULL;
done:
    lsa_free(from.ids);
    return st;
}

static lsa_status plan_numbers(void *user, float *dst, const char *name, int64_t rows, int64_t cols,
                               lsa_err *err) {
    layer_plan *const l = user;
    lsa_teacher_place f;
    const lsa_status st = lsa_teacher_locate(&f, l->e->teacher, name, rows, cols, err);
    if (st != LSA_OK) return st;
    const lsa_dtype d = f.values.dtype;
    const lsa_gpu_tensor t = {.type = f.fp4           ? LSA_GPU_E2M1
                                      : f.scale       ? LSA_GPU_E4M3
                                      : d == LSA_BF16 ? LSA_GPU_BF16
                                      : d == LSA_F16  ? LSA_GPU_F16
                                                      : LSA_GPU_F32,
                              .scale_f32 = f.scale && f.scale->dtype == LSA_F32,
                              .rows = rows,
                              .cols = cols,
                              .dst = dst};
    return add(l, t,
               (source){f.values.data, f.scale ? f.scale->data : NULL, f.values.n_bytes,
                        f.scale ? f.scale->n_bytes : 0, NULL, ""},
               name, err);
}

static lsa_status plan_experts(void *user, int64_t *dst, const char *name, lsa_err *err) {
    layer_plan *const l = user;
    const lsa_teacher_config *c = &l->e->c;
    const int64_t n = (int64_t)c->vocab * c->n_expert_tok;
    int64_t *ids = NULL;
    lsa_status st = LSA_NEW(ids, n, err);
    if (st == LSA_OK) st = lsa_engine_experts_of_tokens(ids, l->e, name, err);
    if (st != LSA_OK) {
        lsa_free(ids);
        return st;
    }
    return add(l,
               (lsa_gpu_tensor){.type = LSA_GPU_I64, .rows = c->vocab, .cols = c->n_expert_tok, .dst = dst},
               (source){ids, NULL, (size_t)n * sizeof *ids, 0, ids, ""}, name, err);
}

static void drop_plan(layer_plan *l) {
    for (int64_t i = 0; i < l->from.len; i++) lsa_free(l->from.data[i].ids);
    lsa_free(l->from.data);
    lsa_free(l->tensor.data);
    lsa_gpu_layer_drop(l->layer);
    memset(l, 0, sizeof *l);
}

static lsa_status make_plan(layer_plan *l, layer_weights *w, const lsa_engine *e, int32_t layer, char *base,
                            lsa_err *err) {
    const lsa_layer_sink sink = {l, give_room, plan_numbers, plan_experts};
    l->e = e;
    l->base = base;
    memset(w, 0, sizeof *w);
    return lsa_engine_read_layer(w, e, layer, &sink, err);
}

static lsa_status plan_all(lsa_gpu_stream *s, lsa_gpu_teacher *t, lsa_err *err) {
    static char nowhere[1]; /* sizes first: addresses of this pass are not used */
    lsa_status st = LSA_OK;
    int64_t arena = 0, stored = 0;
    layer_weights w;
    for (int32_t l = 0; l < s->n_layer; l++) {
        layer_plan *const p = &s->plan[0][l];
        LSA_TRY(make_plan(p, &w, s->e, l, nowhere, err));
        arena = lsa_max_i64(arena, p->arena);
        stored = lsa_max_i64(stored, p->stored);
        drop_plan(p);
    }
    LSA_TRY(lsa_gpu_weights_create(&s->w, t, arena, stored, err));
    for (int i = 0; i < 2; i++)
        for (int32_t l = 0; l < s->n_layer; l++) {
            layer_plan *const p = &s->plan[i][l];
            LSA_TRY(make_plan(p, &w, s->e, l, lsa_gpu_weights_arena(s->w, i), err));
            const lsa_gpu_layer_weights g = lsa_gpu_weights_of(&w, s->e->c.ratio[l]);
            LSA_TRY(lsa_gpu_layer_borrow(&p->layer, t, &g, err));
        }
done:
    return st;
}

/* ---- the reader ---- */

static void copy_layer(const layer_plan *l, char *to) {
    for (int64_t i = 0; i < l->from.len; i++) {
        const source *const f = &l->from.data[i];
        const lsa_gpu_tensor *const t = &l->tensor.data[i];
        memcpy(to + t->at, f->values, f->bytes);
        if (f->scale_bytes) memcpy(to + t->scale_at, f->scales, f->scale_bytes);
    }
}

static void *read_layers(void *arg) {
    lsa_gpu_stream *const s = arg;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->ending && s->read >= s->queued + 2) pthread_cond_wait(&s->changed, &s->lock);
        if (s->ending || s->st != LSA_OK) break;
        const int64_t k = s->read;
        pthread_mutex_unlock(&s->lock);
        lsa_err why = {0};
        const lsa_status st = k >= 2 ? lsa_gpu_weights_wait_staging(s->w, (int)(k % 2), &why) : LSA_OK;
        if (st == LSA_OK)
            copy_layer(&s->plan[k % 2][k % s->n_layer], lsa_gpu_weights_staging(s->w, (int)(k % 2)));
        pthread_mutex_lock(&s->lock);
        s->read++;
        if (st != LSA_OK) s->st = st, s->err = why;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

lsa_status lsa_gpu_stream_create(lsa_gpu_stream **out, const lsa_engine *e, lsa_gpu_teacher *t,
                                 lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_stream *s = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(s, 1, err));
    s->e = e;
    s->n_layer = e->c.n_layer;
    s->turn = -1;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    LSA_TRY(plan_all(s, t, err));
    if (pthread_create(&s->reader, NULL, read_layers, s) != 0)
        LSA_FAIL(LSA_E_NOMEM, "cannot start the thread that reads weights");
    s->started = true;
    *out = s;
    s = NULL;
done:
    lsa_gpu_stream_destroy(s);
    return st;
}

void lsa_gpu_stream_destroy(lsa_gpu_stream *s) {
    if (!s) return;
    if (s->started) {
        pthread_mutex_lock(&s->lock);
        s->ending = true;
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->lock);
        pthread_join(s->reader, NULL);
    }
    for (int i = 0; i < 2; i++)
        for (int32_t l = 0; l < s->n_layer; l++) drop_plan(&s->plan[i][l]);
    lsa_gpu_weights_destroy(s->w);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
    lsa_free(s);
}

/* Queues copies of turns that were read, up to `last`; with wait: until that one is. */
static lsa_status queue_copies(lsa_gpu_stream *s, int64_t last, bool wait, lsa_err *err) {
    lsa_status st = LSA_OK;
    pthread_mutex_lock(&s->lock);
    while (st == LSA_OK && s->queued <= last) {
        while (wait && s->read <= s->queued && s->st == LSA_OK) pthread_cond_wait(&s->changed, &s->lock);
        if (s->st != LSA_OK) {
            if (err && err->code == LSA_OK) *err = s->err;
            st = s->st;
        }
        if (st != LSA_OK || s->read <= s->queued) break;
        const int64_t k = s->queued;
        pthread_mutex_unlock(&s->lock);
        const layer_plan *const l = &s->plan[k % 2][k % s->n_layer];
        st = lsa_gpu_weights_upload(s->w, (int)(k % 2), l->tensor.data, l->tensor.len, l->stored, err);
        pthread_mutex_lock(&s->lock);
        s->queued++;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    return st;
}

lsa_status lsa_gpu_stream_begin(lsa_gpu_layer **layer, lsa_gpu_stream *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t bad = -1;
    const int64_t k = ++s->turn;
    const layer_plan *const l = &s->plan[k % 2][k % s->n_layer];
    *layer = l->layer;
    LSA_TRY(queue_copies(s, k, true, err));
    LSA_TRY(lsa_gpu_weights_begin(s->w, (int)(k % 2), &bad, err));
    if (bad >= 0)
        LSA_FAIL(
            LSA_E_FORMAT,
            "tensor '%s' of model '%s': an element is not a finite number; the file is damaged, get it again",
            l->from.data[bad].name, lsa_teacher_name(s->e->teacher));
    LSA_TRY(lsa_gpu_stream_poll(s, err));
done:
    return st;
}

lsa_status lsa_gpu_stream_poll(lsa_gpu_stream *s, lsa_err *err) {
    return queue_copies(s, s->turn + 1, false, err);
}

lsa_status lsa_gpu_stream_end(lsa_gpu_stream *s, lsa_err *err) {
    return lsa_gpu_weights_end(s->w, (int)(s->turn % 2), err);
}
