/* Traces: see trace.h. Every array is copied when the step is added and written at the end. */
#include "trainer/trace.h"

#include <stdio.h>
#include <string.h>

#include "data/lsa_safetensors.h"
#include "kernels/core/mem.h"

struct lsa_trace {
    LSA_VEC(lsa_st_entry) e;
    LSA_VEC(double) loss;
    LSA_VEC(int64_t) seen; /* documents whose keys are stored */
};

static lsa_status put(lsa_trace *t, const char *name, lsa_dtype type, int64_t rows, int64_t cols,
                      const void *data, lsa_err *err) {
    lsa_status st = LSA_OK;
    char *copy_name = NULL, *copy = NULL;
    const int64_t bytes = rows * (cols ? cols : 1) * (int64_t)lsa_dtype_bytes(type);
    LSA_TRY(lsa_alloc_((void **)&copy_name, (int64_t)strlen(name) + 1, 1, "trace", err));
    LSA_TRY(lsa_alloc_((void **)&copy, bytes + 1, 1, "trace", err));
    memcpy(copy_name, name, strlen(name));
    memcpy(copy, data, (size_t)bytes);
    LSA_TRY(LSA_VEC_RESERVE(t->e, t->e.len + 1, err));
    t->e.data[t->e.len++] = (lsa_st_entry){copy_name, type, cols ? 2 : 1, {rows, cols}, copy};
    copy_name = copy = NULL;
done:
    lsa_free(copy_name);
    lsa_free(copy);
    return st;
}

lsa_status lsa_trace_create(lsa_trace **out, const float *params, const lsa_indexer_geom *g, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_trace *t = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(t, 1, err));
    for (int32_t l = 0; l < g->n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_at(g, l, (lsa_indexer_part)p);
            LSA_TRY(
                put(t, x.name, LSA_F32, x.shape[0], x.n_dim == 2 ? x.shape[1] : 0, params + x.offset, err));
        }
    *out = t;
    t = NULL;
done:
    lsa_trace_destroy(t);
    return st;
}

void lsa_trace_destroy(lsa_trace *t) {
    if (!t) return;
    for (int64_t i = 0; i < t->e.len; i++) {
        union {
            const void *c;
            void *v;
        } a = {.c = t->e.data[i].name}, b = {.c = t->e.data[i].data};
        lsa_free(a.v);
        lsa_free(b.v);
    }
    lsa_free(t->e.data);
    lsa_free(t->loss.data);
    lsa_free(t->seen.data);
    lsa_free(t);
}

static lsa_status put_keys(lsa_trace *t, const lsa_batch *b, const lsa_indexer_geom *g, int64_t i,
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    char name[64];
    for (int64_t k = 0; k < t->seen.len; k++)
        if (t->seen.data[k] == b->doc[i]) return LSA_OK;
    int64_t end = b->n_key; /* the document's rows end where the next document's begin */
    for (int64_t j = 0; j < b->m; j++)
        if (b->key_base[j] > b->key_base[i] && b->key_base[j] < end) end = b->key_base[j];
    for (int32_t l = 0; l < g->n_layer; l++) {
        snprintf(name, sizeof name, "keys.%lld.%d", (long long)b->doc[i], l);
        LSA_TRY(put(t, name, LSA_U8, end - b->key_base[i], LSA_KEY_BYTES,
                    b->key[l] + b->key_base[i] * LSA_KEY_BYTES, err));
    }
    LSA_TRY(LSA_VEC_RESERVE(t->seen, t->seen.len + 1, err));
    t->seen.data[t->seen.len++] = b->doc[i];
done:
    return st;
}

lsa_status lsa_trace_add(lsa_trace *t, const lsa_batch *b, const lsa_indexer_geom *g, double loss,
                         lsa_err *err) {
    lsa_status st = LSA_OK;
    char name[64];
    const long long s = (long long)t->loss.len;
#define PUT(what, type, cols, data)                                                                          \
    do {                                                                                                     \
        snprintf(name, sizeof name, "%lld." what, s);                                                        \
        LSA_TRY(put(t, name, type, b->m, cols, data, err));                                                  \
    } while (0)
    PUT("n_cand", LSA_I32, 0, b->n_cand);
    PUT("position", LSA_I64, 0, b->position);
    PUT("doc", LSA_I64, 0, b->doc);
    if (b->has_cand) PUT("cand", LSA_I32, b->n, b->cand);
    PUT("y", LSA_F32, b->n, b->y);
    PUT("weight", LSA_F32, b->n, b->weight);
    for (int32_t l = 0; l < g->n_layer; l++) {
        snprintf(name, sizeof name, "%lld.x.%d", s, l);
        LSA_TRY(put(t, name, LSA_F32, b->m, g->hidden, b->x[l], err));
    }
    for (int64_t i = 0; i < b->m; i++) LSA_TRY(put_keys(t, b, g, i, err));
    LSA_TRY(LSA_VEC_RESERVE(t->loss, t->loss.len + 1, err));
    t->loss.data[t->loss.len++] = loss;
done:
    return st;
}

lsa_status lsa_trace_save(const lsa_trace *t, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_st_entry *e = NULL;
    LSA_TRY(LSA_NEW(e, t->e.len + 1, err));
    memcpy(e, t->e.data, (size_t)t->e.len * sizeof *e);
    e[t->e.len] = (lsa_st_entry){"loss", LSA_F64, 1, {t->loss.len}, t->loss.data};
    LSA_TRY(lsa_st_save(path, e, t->e.len + 1, NULL, err));
done:
    lsa_free(e);
    return st;
}
