/* Golden vectors: see golden.h. Inputs are a function of the geometry alone, so equal weights give equal
 * bytes. */
#include "export/golden.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "data/lsa_safetensors.h"
#include "kernels/core/hash.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "kernels/core/rng.h"
#include "kernels/cpu/topk.h"
#include "kernels/ops.h"

enum { M = 5, N_KEY = 64, TOP = 16 };
static const int64_t POSITION[M] = {0, 63, 4095, 65535, 1000000};

typedef struct inputs {
    float *x;     /* [M, d], values exact in bf16 */
    uint8_t *key; /* [N_KEY, 132] */
} inputs;

/* What one layer computes, host. */
typedef struct stages {
    float *a, *u, *q, *w, *z;
} stages;

static float normal(lsa_rng *r) {
    const float u = lsa_rng_uniform(r) + 0x1p-25f, v = lsa_rng_uniform(r);
    return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}

static lsa_status make_inputs(inputs *in, const lsa_indexer_geom *g, int32_t l, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_rng r = lsa_rng_make(lsa_mix64(7, (uint64_t)g->ord[l].v), 301);
    LSA_TRY(LSA_NEW(in->x, M * g->hidden, err));
    LSA_TRY(LSA_NEW(in->key, N_KEY * LSA_KEY_BYTES, err));
    for (int64_t i = 0; i < M * g->hidden; i++) in->x[i] = lsa_round_bf16(normal(&r));
    for (int64_t s = 0; s < N_KEY; s++) {
        float k[128];
        for (int i = 0; i < 128; i++) k[i] = normal(&r);
        lsa_key_encode(in->key + s * LSA_KEY_BYTES, k);
    }
done:
    return st;
}

static void inputs_fini(inputs *in) {
    lsa_free(in->x);
    lsa_free(in->key);
    memset(in, 0, sizeof *in);
}
static void stages_fini(stages *s) {
    void *p[] = {s->a, s->u, s->q, s->w, s->z};
    for (int i = 0; i < 5; i++) lsa_free(p[i]);
    memset(s, 0, sizeof *s);
}

/* All stages of one layer on a host context (ref or cpu: their memory is host memory). */
static lsa_status compute(stages *s, lsa_ctx *ctx, const lsa_indexer_file *f, int32_t l, const float *x,
                          const uint8_t *key, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &f->geom;
    float freq[64], rstd[M];
    int64_t base[M] = {0};
    int32_t n_cand[M];
    for (int i = 0; i < M; i++) n_cand[i] = N_KEY;
    lsa_rope_freqs(freq, &g->rope);
    LSA_TRY(LSA_NEW(s->a, (int64_t)M * g->rank, err));
    LSA_TRY(LSA_NEW(s->u, (int64_t)M * g->rank, err));
    LSA_TRY(LSA_NEW(s->q, (int64_t)M * g->n_head * 128, err));
    LSA_TRY(LSA_NEW(s->w, (int64_t)M * g->n_head, err));
    LSA_TRY(LSA_NEW(s->z, M * N_KEY, err));
    const lsa_indexer_act act = {s->a, rstd, s->u, s->q, s->w};
    LSA_TRY(lsa_indexer_query(ctx, g, f->params, l, M, x, POSITION, freq, &act, err));
    LSA_TRY(lsa_indexer_score_fwd(ctx,
                                  &(lsa_indexer_score_fwd_args){M, g->n_head, 128, N_KEY, N_KEY, s->q, s->w,
                                                                key, base, NULL, n_cand, false, s->z},
                                  err));
done:
    return st;
}

/* Score of the ensemble from the layers' logits [n_layer, M, N_KEY]. */
static void combine(float *score, const float *z, const lsa_indexer_file *f) {
    for (int64_t i = 0; i < M * N_KEY; i++) {
        double sum = 0, max = 0;
        for (int32_t l = 0; l < f->geom.n_layer; l++) {
            const double v = (double)z[(int64_t)l * M * N_KEY + i], p = 1 / (1 + exp(-v));
            sum += f->ensemble == LSA_ENSEMBLE_SUM ? v : p;
            if (p > max) max = p;
        }
        score[i] = (float)(f->ensemble == LSA_ENSEMBLE_MAX    ? max
                           : f->ensemble == LSA_ENSEMBLE_MEAN ? sum / f->geom.n_layer
                                                              : sum);
    }
}

enum { PER_LAYER = 7 };

/* XXH64 of the indexer that the vectors were made from. */
static lsa_status hash_of(char hex[17], const char *dir, lsa_err *err) {
    char path[LSA_PATH_MAX];
    uint64_t h = 0;
    lsa_status st = lsa_path(path, err, "%s/indexer.safetensors", dir);
    if (st == LSA_OK) st = lsa_xxh64_file(&h, path, err);
    lsa_hex64(hex, h);
    return st;
}

lsa_status lsa_golden_vectors_write(const lsa_indexer_file *f, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &f->geom;
    lsa_st_entry e[LSA_MAX_CSA * PER_LAYER + 4];
    char name[LSA_MAX_CSA * PER_LAYER][64], path[LSA_PATH_MAX], hex[17];
    inputs in[LSA_MAX_CSA] = {{0}};
    stages s[LSA_MAX_CSA] = {{0}};
    float *z = NULL, score[M * N_KEY], scratch[N_KEY], freq[64];
    int32_t top[M * TOP];
    lsa_ctx *ctx = NULL;
    int64_t n = 0;
    lsa_rope_freqs(freq, &g->rope);
    LSA_TRY(lsa_ctx_create(&ctx, "ref", err));
    LSA_TRY(LSA_NEW(z, g->n_layer * M * N_KEY, err));
    for (int32_t l = 0; l < g->n_layer; l++) {
        LSA_TRY(make_inputs(&in[l], g, l, err));
        LSA_TRY(compute(&s[l], ctx, f, l, in[l].x, in[l].key, err));
        memcpy(z + (int64_t)l * M * N_KEY, s[l].z, sizeof(float) * M * N_KEY);
        const struct {
            const char *what;
            lsa_dtype t;
            int32_t nd;
            int64_t shape[3];
            const void *p;
        } part[PER_LAYER] = {{"hidden", LSA_F32, 2, {M, g->hidden}, in[l].x},
                             {"key", LSA_U8, 2, {N_KEY, LSA_KEY_BYTES}, in[l].key},
                             {"a", LSA_F32, 2, {M, g->rank}, s[l].a},
                             {"u", LSA_F32, 2, {M, g->rank}, s[l].u},
                             {"q", LSA_F32, 3, {M, g->n_head, 128}, s[l].q},
                             {"w", LSA_F32, 2, {M, g->n_head}, s[l].w},
                             {"logit", LSA_F32, 2, {M, N_KEY}, s[l].z}};
        for (int i = 0; i < PER_LAYER; i++, n++) {
            snprintf(name[n], sizeof name[n], "l%d.%s", g->ord[l].v, part[i].what);
            e[n] = (lsa_st_entry){name[n],
                                  part[i].t,
                                  part[i].nd,
                                  {part[i].shape[0], part[i].shape[1], part[i].shape[2]},
                                  part[i].p};
        }
    }
    combine(score, z, f);
    for (int i = 0; i < M; i++) lsa_topk(score + i * N_KEY, N_KEY, TOP, NULL, 0, scratch, top + i * TOP);
    e[n++] = (lsa_st_entry){"position", LSA_I64, 1, {M}, POSITION};
    e[n++] = (lsa_st_entry){"freq", LSA_F32, 1, {g->rope.dim / 2}, freq};
    e[n++] = (lsa_st_entry){"score", LSA_F32, 2, {M, N_KEY}, score};
    e[n++] = (lsa_st_entry){"selected", LSA_I32, 2, {M, TOP}, top};
    LSA_TRY(hash_of(hex, dir, err));
    const char *meta[] = {
        "lsa.format", "lsa-golden/1", "ensemble", lsa_ensemble_name(f->ensemble), "indexer_xxh64", hex, NULL};
    LSA_TRY(lsa_path(path, err, "%s/golden.safetensors", dir));
    LSA_TRY(lsa_st_save(path, e, n, meta, err));
done:
    for (int32_t l = 0; l < g->n_layer; l++) {
        inputs_fini(&in[l]);
        stages_fini(&s[l]);
    }
    lsa_free(z);
    lsa_ctx_destroy(ctx);
    return st;
}

/* Largest difference relative to max(|b|, rms(b)); infinity where either is not finite. */
static double worst_relative(const float *a, const float *b, int64_t n) {
    double ss = 0, worst = 0;
    for (int64_t i = 0; i < n; i++) ss += (double)b[i] * (double)b[i];
    const double rms = sqrt(ss / (double)(n ? n : 1)) + 1e-30;
    for (int64_t i = 0; i < n; i++) {
        const double d = fabs((double)a[i] - (double)b[i]) / fmax(fabs((double)b[i]), rms);
        if (!(d <= worst)) worst = isfinite(d) ? d : (double)INFINITY;
    }
    return worst;
}

lsa_status lsa_golden_vectors_check(const lsa_indexer_file *f, const char *dir, const char *device,
                                    double *worst, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &f->geom;
    const double limit = 1e-4; /* fp32 path against double accumulation; measured about 2e-6 */
    static const char *const cause[] = {
        "wq_a differs, or the hidden vector is read before the norm", "q_norm or its eps",
        "RoPE layout, base or position, or the Hadamard rotation",
        "weights_proj, or its scale 1/sqrt(128*heads)", "key codec, ReLU or head sum"};
    static const char *const what[] = {"a", "u", "q", "w", "logit"};
    char path[LSA_PATH_MAX], name[64], hex[17];
    lsa_st *file = NULL;
    lsa_ctx *ctx = NULL;
    stages s = {0};
    float *x = NULL;
    uint8_t *key = NULL;
    float *z = NULL, score[M * N_KEY], scratch[N_KEY];
    *worst = 0;
    LSA_TRY(lsa_path(path, err, "%s/golden.safetensors", dir));
    LSA_TRY(lsa_st_open(&file, path, err));
    const char *recorded = lsa_st_metadata(file, "indexer_xxh64");
    LSA_TRY(hash_of(hex, dir, err));
    if (!recorded || strcmp(recorded, hex))
        LSA_FAIL(
            LSA_E_FORMAT,
            "'%s/indexer.safetensors' is not the file that the golden vectors were made from; it was changed or damaged: export again",
            dir);
    LSA_TRY(lsa_ctx_create(&ctx, device, err));
    LSA_TRY(LSA_NEW(z, g->n_layer * M * N_KEY, err));
    for (int32_t l = 0; l < g->n_layer; l++) {
        const lsa_st_tensor *t;
        lsa_free(x), lsa_free(key);
        x = NULL, key = NULL;
        stages_fini(&s);
        LSA_TRY(LSA_NEW(x, M * g->hidden, err));
        LSA_TRY(LSA_NEW(key, N_KEY * LSA_KEY_BYTES, err));
        snprintf(name, sizeof name, "l%d.hidden", g->ord[l].v);
        LSA_TRY(lsa_st_need(&t, file, name, LSA_F32, 2, (int64_t[]){M, g->hidden}, err));
        memcpy(x, t->data, t->n_bytes);
        snprintf(name, sizeof name, "l%d.key", g->ord[l].v);
        LSA_TRY(lsa_st_need(&t, file, name, LSA_U8, 2, (int64_t[]){N_KEY, LSA_KEY_BYTES}, err));
        memcpy(key, t->data, t->n_bytes);
        LSA_TRY(compute(&s, ctx, f, l, x, key, err));
        memcpy(z + (int64_t)l * M * N_KEY, s.z, sizeof(float) * M * N_KEY);
        const float *got[] = {s.a, s.u, s.q, s.w, s.z};
        for (int i = 0; i < 5; i++) {
            float *want = NULL;
            snprintf(name, sizeof name, "l%d.%s", g->ord[l].v, what[i]);
            const int64_t shape[5][3] = {
                {M, g->rank}, {M, g->rank}, {M, g->n_head, 128}, {M, g->n_head}, {M, N_KEY}};
            LSA_TRY(lsa_st_need(&t, file, name, LSA_F32, i == 2 ? 3 : 2, shape[i], err));
            LSA_TRY(LSA_NEW(want, t->n_elem, err));
            memcpy(want, t->data, t->n_bytes);
            const double d = worst_relative(got[i], want, t->n_elem);
            lsa_free(want);
            if (!(d <= limit))
                LSA_FAIL(LSA_E_FORMAT,
                         "'%s': layer c%d, stage '%s' is off by %.3g relative (limit %g); likely: %s", path,
                         g->ord[l].v, what[i], d, limit, cause[i]);
            if (d > *worst) *worst = d;
        }
    }
    const lsa_st_tensor *t;
    combine(score, z, f);
    LSA_TRY(lsa_st_need(&t, file, "selected", LSA_I32, 2, (int64_t[]){M, TOP}, err));
    for (int i = 0; i < M; i++) {
        int32_t top[TOP], want[TOP];
        lsa_topk(score + i * N_KEY, N_KEY, TOP, NULL, 0, scratch, top);
        memcpy(want, (const char *)t->data + (size_t)i * sizeof want, sizeof want);
        if (memcmp(top, want, sizeof top))
            LSA_FAIL(
                LSA_E_FORMAT,
                "'%s': the selection of query %d differs from the recorded one: ensemble rule or tie order",
                path, i);
    }
done:
    lsa_free(x);
    lsa_free(key);
    lsa_free(z);
    stages_fini(&s);
    lsa_st_close(file);
    lsa_ctx_destroy(ctx);
    return st;
}
