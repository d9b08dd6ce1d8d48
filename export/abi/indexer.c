/* The front door of the server ABI: see lsa_indexer.h. Arguments are checked here as far as both devices can;
 * the CPU also checks what arrays hold. The mistake that would stay silent: a query of fewer requests than
 * the scores that follow, which would then use the queries of another step. */
#include "export/abi/lsa_indexer.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "data/indexer_file.h"
#include "export/abi/handle.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

_Static_assert(sizeof(lsa_idx_keys) == sizeof(lsa_gpu_keys) &&
                   offsetof(lsa_idx_keys, data) == offsetof(lsa_gpu_keys, data) &&
                   offsetof(lsa_idx_keys, page) == offsetof(lsa_gpu_keys, page) &&
                   offsetof(lsa_idx_keys, n_chunk) == offsetof(lsa_gpu_keys, n_chunk),
               "key descriptors of the interface and of the GPU are one struct");
_Static_assert(LSA_IDX_F32 == (int)LSA_PATH_F32 && LSA_IDX_BF16 == (int)LSA_PATH_BF16 &&
                   LSA_IDX_FP8 == (int)LSA_PATH_FP8,
               "numeric paths");
_Static_assert(LSA_IDX_SUM == (int)LSA_ENSEMBLE_SUM && LSA_IDX_MEAN == (int)LSA_ENSEMBLE_MEAN &&
                   LSA_IDX_MAX == (int)LSA_ENSEMBLE_MAX && LSA_IDX_SUM == (int)LSA_SCORE_SUM &&
                   LSA_IDX_MEAN == (int)LSA_SCORE_MEAN && LSA_IDX_MAX == (int)LSA_SCORE_MAX,
               "ensembles");
_Static_assert(sizeof((lsa_err){0}.msg) == LSA_IDX_ERROR, "messages are copied whole");

/* No trained weight is near it; beyond it f32 sums could overflow and logits become NaN. */
#define LARGEST_WEIGHT 1e6f

static int finish(lsa_status st, const lsa_err *err, char *error) {
    static const int code[] = {
        [LSA_OK] = LSA_IDX_OK,
        [LSA_E_ARG] = LSA_IDX_E_ARG,
        [LSA_E_CONFIG] = LSA_IDX_E_CONFIG,
        [LSA_E_FORMAT] = LSA_IDX_E_FORMAT,
        [LSA_E_IO] = LSA_IDX_E_IO,
        [LSA_E_NOSPC] = LSA_IDX_E_IO,
        [LSA_E_NOMEM] = LSA_IDX_E_NOMEM,
        [LSA_E_DEVICE] = LSA_IDX_E_DEVICE,
        [LSA_E_COMM] = LSA_IDX_E_DEVICE,
        [LSA_E_NUMERIC] = LSA_IDX_E_FORMAT,
        [LSA_E_UNSUPPORTED] = LSA_IDX_E_UNSUPPORTED,
        [LSA_E_INTERRUPTED] = LSA_IDX_E_BUG,
        [LSA_E_BUG] = LSA_IDX_E_BUG,
    };
    if (error) snprintf(error, LSA_IDX_ERROR, "%s", st == LSA_OK ? "" : err->msg);
    return code[st];
}

/* ---- open, clone, close ---- */

static lsa_status check_options(const lsa_idx_options *o, lsa_err *err) {
    if (!o || !o->device) LSA_RET_FAIL(LSA_E_ARG, "open: options and options->device must not be NULL");
    if (strcmp(o->device, "cpu") && strcmp(o->device, "cuda") && strncmp(o->device, "cuda:", 5))
        LSA_RET_FAIL(LSA_E_ARG, "open: device '%.40s' is unknown; expected cpu, cuda or cuda:N", o->device);
    if (o->path < 0 || o->path >= LSA_QUERY_PATHS)
        LSA_RET_FAIL(LSA_E_ARG, "open: numeric path %d is unknown", o->path);
    if (o->max_batch < 1 || o->max_batch > 4096)
        LSA_RET_FAIL(LSA_E_ARG, "open: max_batch must be in [1, 4096], found %d", o->max_batch);
    if (o->max_chunks < 1 || o->max_chunks > INT32_MAX)
        LSA_RET_FAIL(LSA_E_ARG, "open: max_chunks must be in [1, %d], found %lld", INT32_MAX,
                     (long long)o->max_chunks);
    return LSA_OK;
}

static lsa_status check_weights(const lsa_indexer_file *f, const char *folder, lsa_err *err) {
    for (int32_t l = 0; l < f->geom.n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor t = lsa_indexer_tensor_at(&f->geom, l, (lsa_indexer_part)p);
            for (int64_t i = 0; i < t.n; i++)
                if (!(fabsf(f->params[t.offset + i]) <= LARGEST_WEIGHT))
                    LSA_RET_FAIL(
                        LSA_E_FORMAT,
                        "indexer '%s': tensor %s: element %lld is %g; no trained weight is beyond %g: the file is damaged",
                        folder, t.name, (long long)i, (double)f->params[t.offset + i],
                        (double)LARGEST_WEIGHT);
        }
    return LSA_OK;
}

static void release(lsa_idx_shared *s) {
    if (!s || atomic_fetch_sub(&s->handles, 1) > 1) return;
    lsa_free(s->params);
    lsa_ctx_destroy(s->ctx);
    lsa_free(s);
}

static lsa_status make_shared(lsa_idx_shared **out, const char *folder, const lsa_idx_options *o,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_indexer_file f = {0};
    lsa_idx_shared *s = NULL;
    *out = NULL;
    LSA_TRY(lsa_indexer_file_load(&f, folder, err));
    LSA_TRY(check_weights(&f, folder, err));
    LSA_TRY(LSA_NEW(s, 1, err));
    atomic_init(&s->handles, 1);
    s->geom = f.geom;
    s->tau = f.tau;
    s->path = (lsa_query_path)o->path;
    s->max_batch = o->max_batch;
    s->max_chunks = o->max_chunks;
    lsa_rope_freqs(s->freq, &f.geom.rope);
    LSA_TRY(lsa_idx_export_read(&s->e, &f, folder, err));
    LSA_TRY(lsa_json_i64_or(&s->trained_length, 0, f.train, "trained_length", folder, err));
    s->params = f.params;
    f.params = NULL;
    LSA_TRY(lsa_ctx_create(&s->ctx, o->device, err));
    *out = s;
    s = NULL;
done:
    release(s);
    lsa_indexer_file_fini(&f);
    return st;
}

static lsa_status open_handle(lsa_idx **out, int32_t abi, const char *folder, const lsa_idx_options *o,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_idx *x = NULL;
    if (!out) LSA_FAIL(LSA_E_ARG, "open: out must not be NULL");
    *out = NULL;
    if (abi != LSA_IDX_ABI)
        LSA_FAIL(LSA_E_UNSUPPORTED,
                 "open: the caller was built for interface %d, this library has %d: build it again", abi,
                 LSA_IDX_ABI);
    if (!folder) LSA_FAIL(LSA_E_ARG, "open: folder must not be NULL");
    LSA_TRY(check_options(o, err));
    LSA_TRY(LSA_NEW(x, 1, err));
    LSA_TRY(make_shared(&x->s, folder, o, err));
    if (lsa_ctx_kind(x->s->ctx) == LSA_BACKEND_CUDA) {
        LSA_TRY(lsa_gpu_retriever_create(&x->gpu, x->s->ctx, &x->s->geom, x->s->params, x->s->path,
                                         o->max_batch, o->max_chunks, false, err));
        lsa_free(x->s->params);
        x->s->params = NULL;
    } else {
        LSA_TRY(lsa_idx_host_init(&x->host, x->s, err));
    }
    *out = x;
    x = NULL;
done:
    lsa_idx_close(x);
    return st;
}

int lsa_idx_open(lsa_idx **out, int32_t abi, const char *folder, const lsa_idx_options *options,
                 char *error) {
    lsa_err err = {0};
    return finish(open_handle(out, abi, folder, options, &err), &err, error);
}

static lsa_status clone_handle(lsa_idx **out, const lsa_idx *from, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_idx *x = NULL;
    if (!out) LSA_FAIL(LSA_E_ARG, "clone: out must not be NULL");
    *out = NULL;
    if (!from) LSA_FAIL(LSA_E_ARG, "clone: the handle is NULL");
    LSA_TRY(LSA_NEW(x, 1, err));
    x->s = from->s;
    atomic_fetch_add(&x->s->handles, 1);
    if (from->gpu)
        LSA_TRY(lsa_gpu_retriever_clone(&x->gpu, from->gpu, err));
    else
        LSA_TRY(lsa_idx_host_init(&x->host, x->s, err));
    *out = x;
    x = NULL;
done:
    lsa_idx_close(x);
    return st;
}

int lsa_idx_clone(lsa_idx **out, const lsa_idx *x, char *error) {
    lsa_err err = {0};
    return finish(clone_handle(out, x, &err), &err, error);
}

void lsa_idx_close(lsa_idx *x) {
    if (!x) return;
    lsa_gpu_retriever_destroy(x->gpu);
    lsa_idx_host_fini(&x->host);
    release(x->s);
    lsa_free(x);
}

void lsa_idx_get_info(const lsa_idx *x, lsa_idx_info *out) {
    if (!out) return;
    memset(out, 0, sizeof *out);
    if (!x) return;
    const lsa_idx_shared *s = x->s;
    const lsa_indexer_geom *g = &s->geom;
    out->hidden = g->hidden;
    out->n_head = g->n_head;
    out->head_dim = g->head_dim;
    out->rank = g->rank;
    out->n_layer = g->n_layer;
    for (int32_t l = 0; l < g->n_layer; l++) {
        out->ordinal[l] = g->ord[l].v;
        out->layer_id[l] = g->id[l].v;
    }
    out->ensemble = (int32_t)s->e.ensemble;
    out->calibrated = s->e.calibrated;
    out->tau = s->tau;
    out->tail = s->e.tail;
    out->trained_length = s->trained_length;
    out->device_bytes = x->gpu ? lsa_gpu_retriever_bytes(x->gpu) : 0;
    out->host_bytes = (int64_t)(sizeof *x + sizeof *s) + x->host.bytes +
                      (s->params ? lsa_indexer_n_param(g) * (int64_t)sizeof *s->params : 0);
}

/* ---- query, score, select ---- */

static bool aligned(const void *p, size_t n) {
    return p && (uintptr_t)p % n == 0;
}

static lsa_status check_call(const lsa_idx *x, const char *what, int32_t layer, int32_t m, lsa_err *err) {
    if (!x) LSA_RET_FAIL(LSA_E_ARG, "%s: the handle is NULL", what);
    if (layer < 0 || layer >= x->s->geom.n_layer)
        LSA_RET_FAIL(LSA_E_ARG, "%s: layer %d; the indexer has joint layers 0 to %d", what, layer,
                     x->s->geom.n_layer - 1);
    if (m < 0 || m > x->s->max_batch)
        LSA_RET_FAIL(LSA_E_ARG, "%s: %d requests; the handle was opened for at most %d", what, m,
                     x->s->max_batch);
    return LSA_OK;
}

static lsa_status check_rows(const char *what, const char *name, const void *p, size_t size, int64_t rows,
                             int64_t ld, lsa_err *err) {
    int64_t n;
    if (!aligned(p, size))
        LSA_RET_FAIL(LSA_E_ARG, "%s: %s must not be NULL and be aligned to %zu bytes", what, name, size);
    if (ld < 1 || !lsa_mul_i64(rows, ld, &n) || !lsa_mul_i64(n, (int64_t)size, &n))
        LSA_RET_FAIL(LSA_E_ARG, "%s: %lld rows of %s with %lld columns each", what, (long long)rows, name,
                     (long long)ld);
    return LSA_OK;
}

static lsa_status query(lsa_idx *x, int32_t layer, int32_t m, const uint16_t *hidden, const int64_t *position,
                        void *stream, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(check_call(x, "query", layer, m, err));
    if (m == 0) goto done;
    LSA_TRY(check_rows("query", "hidden", hidden, sizeof *hidden, m, x->s->geom.hidden, err));
    LSA_TRY(check_rows("query", "position", position, sizeof *position, m, 1, err));
    x->queried[layer] = 0; /* a query that fails leaves none */
    if (x->gpu)
        LSA_TRY(lsa_gpu_retriever_query(x->gpu, layer, m, hidden, position, stream, err));
    else
        LSA_TRY(lsa_idx_host_query(x, layer, m, hidden, position, err));
    x->queried[layer] = m;
done:
    return st;
}

int lsa_idx_query(lsa_idx *x, int32_t layer, int32_t m, const uint16_t *hidden, const int64_t *position,
                  void *stream, char *error) {
    lsa_err err = {0};
    return finish(query(x, layer, m, hidden, position, stream, &err), &err, error);
}

static lsa_status score(lsa_idx *x, int32_t layer, int32_t m, const lsa_idx_keys *keys, float *logit,
                        int64_t ld, void *stream, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(check_call(x, "score", layer, m, err));
    if (m == 0) goto done;
    LSA_TRY(check_rows("score", "keys", keys, _Alignof(lsa_idx_keys), m, 1, err));
    LSA_TRY(check_rows("score", "logit", logit, sizeof *logit, m, ld, err));
    if (m > x->queried[layer])
        LSA_FAIL(LSA_E_ARG, "score: %d requests, but the latest query of layer %d was of %d", m, layer,
                 x->queried[layer]);
    if (x->gpu)
        LSA_TRY(lsa_gpu_retriever_score(x->gpu, layer, m, (const lsa_gpu_keys *)(const void *)keys, logit, ld,
                                        stream, err));
    else
        LSA_TRY(lsa_idx_host_score(x, layer, m, keys, logit, ld, err));
done:
    return st;
}

int lsa_idx_score(lsa_idx *x, int32_t layer, int32_t m, const lsa_idx_keys *keys, float *logit, int64_t ld,
                  void *stream, char *error) {
    lsa_err err = {0};
    return finish(score(x, layer, m, keys, logit, ld, stream, &err), &err, error);
}

int lsa_idx_has_prior(const lsa_idx *x) {
    return x && x->s->e.prior;
}

static lsa_status need_prior(const lsa_idx *x, const char *what, lsa_err *err) {
    if (!x->s->e.prior)
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "%s: this export was trained without an observed-mass prior; masses add nothing: call "
                     "lsa_idx_select",
                     what);
    return LSA_OK;
}

static lsa_status observe(lsa_idx *x, float *state, int64_t ld, int64_t n, const int32_t *chunk,
                          const float *mass, void *stream, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(check_call(x, "observe", 0, 0, err));
    LSA_TRY(need_prior(x, "observe", err));
    LSA_TRY(check_rows("observe", "state", state, sizeof *state, 2, ld, err));
    if (n < 0) LSA_FAIL(LSA_E_ARG, "observe: %lld chunks", (long long)n);
    if (n > 0) LSA_TRY(check_rows("observe", "chunk", chunk, sizeof *chunk, n, 1, err));
    if (n > 0) LSA_TRY(check_rows("observe", "mass", mass, sizeof *mass, n, 1, err));
    if (x->gpu)
        LSA_TRY(lsa_gpu_retriever_observe(x->gpu, state, ld, n, chunk, mass, stream, err));
    else
        LSA_TRY(lsa_idx_host_observe(state, ld, n, chunk, mass, err));
done:
    return st;
}

int lsa_idx_observe(lsa_idx *x, float *state, int64_t ld, int64_t n, const int32_t *chunk, const float *mass,
                    void *stream, char *error) {
    lsa_err err = {0};
    return finish(observe(x, state, ld, n, chunk, mass, stream, &err), &err, error);
}

/* state NULL: nothing was observed. */
static lsa_status select_chunks(lsa_idx *x, int32_t m, const lsa_idx_rule *rule, const float *logit,
                                int64_t ld, const int64_t *n_chunk, const float *const *state,
                                int64_t ld_state, int32_t *out, int64_t ld_out, int32_t *n_out, void *stream,
                                lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_select_rule r;
    LSA_TRY(check_call(x, "select", 0, m, err));
    if (!rule) LSA_FAIL(LSA_E_ARG, "select: rule must not be NULL");
    LSA_TRY(lsa_idx_resolve(&r, &x->s->e, rule, err));
    if (m == 0) goto done;
    if (state) LSA_TRY(check_rows("select", "state", state, sizeof(void *), m, 1, err));
    if (state && ld_state < 1) LSA_FAIL(LSA_E_ARG, "select: states of %lld chunks", (long long)ld_state);
    r.observed = state;
    r.observed_ld = ld_state;
    LSA_TRY(check_rows("select", "logit", logit, sizeof *logit, (int64_t)m * r.n_layer, ld, err));
    LSA_TRY(check_rows("select", "n_chunk", n_chunk, sizeof *n_chunk, m, 1, err));
    LSA_TRY(check_rows("select", "out", out, sizeof *out, m, ld_out, err));
    LSA_TRY(check_rows("select", "n_out", n_out, sizeof *n_out, m, 1, err));
    if (x->gpu)
        LSA_TRY(lsa_gpu_retriever_select(x->gpu, m, &r, logit, ld, n_chunk, out, ld_out, n_out, stream, err));
    else
        LSA_TRY(lsa_idx_host_select(x, m, &r, logit, ld, n_chunk, out, ld_out, n_out, err));
done:
    return st;
}

int lsa_idx_select(lsa_idx *x, int32_t m, const lsa_idx_rule *rule, const float *logit, int64_t ld,
                   const int64_t *n_chunk, int32_t *out, int64_t ld_out, int32_t *n_out, void *stream,
                   char *error) {
    lsa_err err = {0};
    return finish(select_chunks(x, m, rule, logit, ld, n_chunk, NULL, 0, out, ld_out, n_out, stream, &err),
                  &err, error);
}

int lsa_idx_select_observed(lsa_idx *x, int32_t m, const lsa_idx_rule *rule, const float *logit, int64_t ld,
                            const int64_t *n_chunk, const float *const *state, int64_t ld_state, int32_t *out,
                            int64_t ld_out, int32_t *n_out, void *stream, char *error) {
    lsa_err err = {0};
    lsa_status st = check_call(x, "select", 0, m, &err);
    if (st == LSA_OK) st = need_prior(x, "select_observed", &err);
    if (st == LSA_OK)
        st = select_chunks(x, m, rule, logit, ld, n_chunk, state, ld_state, out, ld_out, n_out, stream, &err);
    return finish(st, &err, error);
}
