/* Golden vectors: see golden.h. Inputs are a function of the geometry alone, so equal weights give equal
 * bytes. */
#include "export/golden.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/lsa_safetensors.h"
#include "export/checker.h"
#include "export/convention.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/core/rng.h"

#define FORMAT "lsa-golden/2"
#define CRC    "file_crc32" /* the first key of the metadata */

enum { M = LSA_GOLD_M, N = LSA_GOLD_KEYS, MAX_ENTRY = LSA_MAX_CSA * (LSA_STAGES + 2) + 24 };
static const int64_t POSITION[M] = {0, 61, 70003, 999983};
static const float SIZE[M] = {1, 0x1p-10f, 1, 1}; /* the small vector makes eps visible */

static float normal(lsa_rng *r) {
    const float u = lsa_rng_uniform(r) + 0x1p-25f, v = lsa_rng_uniform(r);
    return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}

static lsa_status make_inputs(lsa_golden *o, const lsa_indexer_geom *g, int32_t l, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_rng r = lsa_rng_make(lsa_mix64(7, (uint64_t)g->ord[l].v), 301);
    LSA_TRY(LSA_NEW(o->x[l], (int64_t)M * g->hidden, err));
    LSA_TRY(LSA_NEW(o->key[l], N * LSA_KEY_BYTES, err));
    for (int64_t i = 0; i < (int64_t)M * g->hidden; i++)
        o->x[l][i] = lsa_round_bf16(SIZE[i / g->hidden] * normal(&r));
    for (int64_t s = 0; s < N; s++) {
        float k[128];
        const float size = expf(0.5f * normal(&r)); /* rows have scales of their own */
        for (int i = 0; i < 128; i++) k[i] = s == LSA_GOLD_ZERO ? 0 : size * normal(&r);
        lsa_key_encode(o->key[l] + s * LSA_KEY_BYTES, k);
    }
    memcpy(o->key[l] + LSA_GOLD_TWIN_HIGH * LSA_KEY_BYTES, o->key[l] + LSA_GOLD_TWIN_LOW * LSA_KEY_BYTES,
           LSA_KEY_BYTES);
done:
    return st;
}

void lsa_gold_combine(float *score, const float *const *logit, int32_t n_layer, lsa_ensemble e) {
    for (int64_t i = 0; i < M * N; i++) {
        double sum = 0, max = 0;
        for (int32_t l = 0; l < n_layer; l++) {
            const double v = (double)logit[l][i], p = 1 / (1 + exp(-v));
            sum += e == LSA_ENSEMBLE_SUM ? v : p;
            if (!(p <= max)) max = p;
        }
        score[i] = (float)(e == LSA_ENSEMBLE_MAX ? max : e == LSA_ENSEMBLE_MEAN ? sum / n_layer : sum);
    }
}

/* k is such that of the two equal keys only one fits. Ranks are counted, not sorted: this is the truth. */
static void pick(lsa_gold_selection *p, float threshold) {
    for (int i = 0; i < M; i++) {
        const float *s = p->score + i * N;
        p->k[i] = 1;
        for (int c = 0; c < N; c++) p->k[i] += s[c] > s[LSA_GOLD_TWIN_LOW];
        for (int c = 0; c < N; c++) {
            int before = 0;
            for (int o = 0; o < N; o++) before += s[o] > s[c] || (s[o] == s[c] && o < c);
            p->top[i * N + c] = before < p->k[i];
            p->above[i * N + c] = s[c] > threshold;
        }
    }
}

/* The continuation of a score, the keys taken for neighbouring chunks; once more, in double. */
static void continue_score(float *out, const float *score, const float *cost, int32_t reach) {
    for (int i = 0; i < M; i++)
        for (int c = 0; c < N; c++) {
            double best = (double)score[i * N + c];
            for (int j = 1; j <= reach && j <= c; j++)
                best = fmax(best, (double)score[i * N + c - j] - (double)cost[j - 1]);
            out[i * N + c] = (float)best;
        }
}

static lsa_status compute(lsa_golden *o, const lsa_indexer_file *f, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_ctx *ctx = NULL;
    const float *logit[LSA_MAX_CSA];
    o->n_layer = f->geom.n_layer;
    memcpy(o->position, POSITION, sizeof POSITION);
    o->threshold = f->ensemble == LSA_ENSEMBLE_SUM ? 0.0f : 0.5f; /* the zero key's score */
    LSA_TRY(lsa_ctx_create(&ctx, "ref", err));
    for (int32_t l = 0; l < o->n_layer; l++) {
        LSA_TRY(make_inputs(o, &f->geom, l, err));
        const lsa_chain_in in = {o->x[l], o->key[l], o->position};
        LSA_TRY(lsa_chain_run(&o->at[l], ctx, &f->geom, f->params, l, &in, LSA_FAULT_NONE, 0, err));
    }
    for (int p = 0; p < LSA_QUERY_PATHS; p++) {
        for (int32_t l = 0; l < o->n_layer; l++) logit[l] = o->at[l].v[lsa_logit_stage[p]];
        lsa_gold_combine(o->pick[p].score, logit, o->n_layer, f->ensemble);
        pick(&o->pick[p], o->threshold);
        continue_score(o->continued[p], o->pick[p].score, f->params + lsa_indexer_costs_at(&f->geom),
                       f->geom.reach);
    }
done:
    lsa_ctx_destroy(ctx);
    return st;
}

void lsa_golden_fini(lsa_golden *o) {
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) {
        lsa_free(o->x[l]);
        lsa_free(o->key[l]);
        lsa_stages_fini(&o->at[l]);
    }
    memset(o, 0, sizeof *o);
}

/* ---- the file: one list of its tensors for the writer and the reader ---- */

typedef struct part {
    char name[40];
    lsa_dtype dtype; /* in the file; memory is float for BF16 and for the codes (U8 with `codes`) */
    bool codes;
    int32_t n_dim;
    int64_t shape[3], n;
    void *mem;
} part;

typedef struct plan {
    part p[MAX_ENTRY];
    int n;
    int32_t rank[LSA_GOLD_RANKS], head[LSA_GOLD_HEADS];
    float freq[64];
} plan;

static void add(plan *t, void *mem, lsa_dtype dtype, bool codes, int32_t n_dim, const int64_t *shape,
                const char *name) {
    part *p = &t->p[t->n++];
    *p = (part){.dtype = dtype, .codes = codes, .n_dim = n_dim, .n = 1, .mem = mem};
    snprintf(p->name, sizeof p->name, "%s", name);
    for (int32_t i = 0; i < n_dim; i++) p->n *= p->shape[i] = shape[i];
}

static void make_plan(plan *t, lsa_golden *o, const lsa_indexer_geom *g) {
    char name[40];
    t->n = 0;
    lsa_rope_freqs(t->freq, &g->rope);
    const int64_t ranks = lsa_gold_ranks(t->rank, g), heads = lsa_gold_heads(t->head, g), m = M, one = 1,
                  pairs = g->rope.dim / 2, grid[] = {M, N}, x[] = {M, g->hidden}, key[] = {N, LSA_KEY_BYTES};
    add(t, o->position, LSA_I64, false, 1, &m, "position");
    add(t, t->freq, LSA_F32, false, 1, &pairs, "freq");
    add(t, t->rank, LSA_I32, false, 1, &ranks, "rank_index");
    add(t, t->head, LSA_I32, false, 1, &heads, "head_index");
    for (int32_t l = 0; l < g->n_layer; l++) {
        snprintf(name, sizeof name, "l%d.hidden", g->ord[l].v);
        add(t, o->x[l], LSA_BF16, false, 2, x, name);
        snprintf(name, sizeof name, "l%d.key", g->ord[l].v);
        add(t, o->key[l], LSA_U8, false, 2, key, name);
        for (int s = 0; s < LSA_STAGES; s++) {
            int64_t shape[3];
            const int32_t nd = lsa_stage_shape(shape, (lsa_stage)s, g, false);
            snprintf(name, sizeof name, "l%d.%s", g->ord[l].v, lsa_stage_name((lsa_stage)s));
            add(t, o->at[l].v[s], lsa_stage_dtype((lsa_stage)s), s == LSA_STAGE_CODE_FP8, nd, shape, name);
        }
    }
    add(t, &o->threshold, LSA_F32, false, 1, &one, "threshold");
    for (int p = 0; p < LSA_QUERY_PATHS; p++) {
        lsa_gold_selection *k = &o->pick[p];
        const struct {
            const char *what;
            void *mem;
            lsa_dtype t;
        } x4[] = {{"score", k->score, LSA_F32},
                  {"k", k->k, LSA_I32},
                  {"top", k->top, LSA_U8},
                  {"above", k->above, LSA_U8}};
        for (int i = 0; i < 4; i++) {
            snprintf(name, sizeof name, "%s.%s", lsa_query_path_name((lsa_query_path)p), x4[i].what);
            add(t, x4[i].mem, x4[i].t, false, i == 1 ? 1 : 2, grid, name);
        }
        if (!g->reach) continue;
        snprintf(name, sizeof name, "%s.continued", lsa_query_path_name((lsa_query_path)p));
        add(t, o->continued[p], LSA_F32, false, 2, grid, name);
    }
}

/* The bytes of a part as they lie in the file, in fresh memory. */
static lsa_status pack(unsigned char **out, const part *p, lsa_err *err) {
    const size_t size = lsa_dtype_bytes(p->dtype);
    const lsa_status st = lsa_alloc_((void **)out, p->n, size, p->name, err);
    if (st != LSA_OK) return st;
    const float *f = p->mem;
    for (int64_t i = 0; p->codes && i < p->n; i++) (*out)[i] = lsa_f32_to_e4m3(f[i]);
    for (int64_t i = 0; p->dtype == LSA_BF16 && i < p->n; i++) {
        const uint16_t b = lsa_f32_to_bf16(f[i]);
        memcpy(*out + 2 * i, &b, 2);
    }
    if (!p->codes && p->dtype != LSA_BF16) memcpy(*out, p->mem, (size_t)p->n * size);
    return LSA_OK;
}

static void unpack(const part *p, const unsigned char *data) {
    float *f = p->mem;
    for (int64_t i = 0; p->codes && i < p->n; i++) f[i] = lsa_e4m3_to_f32(data[i]);
    for (int64_t i = 0; p->dtype == LSA_BF16 && i < p->n; i++) {
        uint16_t b;
        memcpy(&b, data + 2 * i, 2);
        f[i] = lsa_bf16_to_f32(b);
    }
    if (!p->codes && p->dtype != LSA_BF16) memcpy(p->mem, data, (size_t)p->n * lsa_dtype_bytes(p->dtype));
}

static lsa_status crc_of_indexer(char hex[9], const char *dir, lsa_err *err) {
    char path[LSA_PATH_MAX];
    uint32_t crc = 0;
    lsa_status st = lsa_path(path, err, "%s/indexer.safetensors", dir);
    if (st == LSA_OK) st = lsa_crc32_file(&crc, path, err);
    snprintf(hex, 9, "%08x", crc);
    return st;
}

/* CRC of a golden file with zeros in the place of `own`, its checksum: names and shapes count too. */
static lsa_status crc_of_golden(char hex[9], const char *path, const char *own, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_map m = {0};
    LSA_TRY(lsa_map_open(&m, path, err));
    const unsigned char *at = strlen(own) == 8 ? memmem(m.data, m.n_bytes, own, 8) : NULL;
    const size_t n = at ? (size_t)(at - m.data) : 0, rest = at ? n + 8 : 0;
    uint32_t crc = lsa_crc32(0, m.data, n);
    if (at) crc = lsa_crc32(crc, "00000000", 8);
    snprintf(hex, 9, "%08x", lsa_crc32(crc, m.data + rest, m.n_bytes - rest));
done:
    lsa_map_close(&m);
    return st;
}

lsa_status lsa_golden_vectors_write(const lsa_indexer_file *f, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_golden o = {0};
    plan *t = NULL;
    lsa_st_entry *e = NULL;
    unsigned char **bytes = NULL;
    char path[LSA_PATH_MAX], of_indexer[9], own[9] = "00000000";
    char *table = NULL;
    LSA_TRY(compute(&o, f, err));
    LSA_TRY(LSA_NEW(t, 1, err));
    make_plan(t, &o, &f->geom);
    LSA_TRY(lsa_conventions_text(&table, &f->geom, err));
    LSA_TRY(LSA_NEW(e, t->n + 1, err));
    LSA_TRY(LSA_NEW(bytes, t->n, err));
    for (int i = 0; i < t->n; i++) {
        const part *p = &t->p[i];
        LSA_TRY(pack(&bytes[i], p, err));
        e[i] = (lsa_st_entry){p->name, p->dtype, p->n_dim, {p->shape[0], p->shape[1], p->shape[2]}, bytes[i]};
    }
    e[t->n] = (lsa_st_entry){"conventions", LSA_U8, 1, {(int64_t)strlen(table)}, table};
    LSA_TRY(crc_of_indexer(of_indexer, dir, err));
    LSA_TRY(lsa_path(path, err, "%s/golden.safetensors", dir));
    for (int pass = 0; pass < 2; pass++) { /* with zeros in the place of its checksum, then with it */
        const char *meta[] = {CRC,
                              own,
                              "lsa.format",
                              FORMAT,
                              "ensemble",
                              lsa_ensemble_name(f->ensemble),
                              "indexer_crc32",
                              of_indexer,
                              NULL};
        LSA_TRY(lsa_st_save(path, e, t->n + 1, meta, err));
        if (pass == 0) LSA_TRY(crc_of_golden(own, path, own, err));
    }
    LSA_TRY(lsa_path(path, err, "%s/check_indexer.py", dir));
    LSA_TRY(lsa_write_file(path, lsa_checker_text, lsa_checker_bytes, err));
done:
    for (int i = 0; bytes && i < t->n; i++) lsa_free(bytes[i]);
    free(table);
    lsa_free(bytes);
    lsa_free(e);
    lsa_free(t);
    lsa_golden_fini(&o);
    return st;
}

/* Metadata `key` is `want`, or the message that begins with `else_say`. */
static lsa_status meta_is(const lsa_st *s, const char *key, const char *want, const char *path,
                          const char *else_say, lsa_err *err) {
    const char *found = lsa_st_metadata(s, key);
    if (!found || strcmp(found, want))
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s': %s: %s is '%.40s', expected '%s'; export again", path, else_say,
                     key, found ? found : "missing", want);
    return LSA_OK;
}

lsa_status lsa_golden_load(lsa_golden *o, const lsa_indexer_file *f, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_st *s = NULL;
    plan *t = NULL;
    const char *own;
    char path[LSA_PATH_MAX], hex[9];
    memset(o, 0, sizeof *o);
    LSA_TRY(lsa_path(path, err, "%s/golden.safetensors", dir));
    LSA_TRY(lsa_st_open(&s, path, err));
    LSA_TRY(meta_is(s, "lsa.format", FORMAT, path, "golden vectors of another version", err));
    own = lsa_st_metadata(s, CRC);
    LSA_TRY(crc_of_golden(hex, path, own ? own : "", err));
    LSA_TRY(meta_is(s, CRC, hex, path, "the golden vectors were changed or damaged", err));
    LSA_TRY(crc_of_indexer(hex, dir, err));
    LSA_TRY(meta_is(
        s, "indexer_crc32", hex, path,
        "indexer.safetensors is not the file that the golden vectors were made from; it was changed or damaged",
        err));
    LSA_TRY(meta_is(s, "ensemble", lsa_ensemble_name(f->ensemble), path,
                    "golden vectors of another ensemble than the indexer's", err));
    o->n_layer = f->geom.n_layer;
    for (int32_t l = 0; l < o->n_layer; l++) {
        LSA_TRY(LSA_NEW(o->x[l], (int64_t)M * f->geom.hidden, err));
        LSA_TRY(LSA_NEW(o->key[l], N * LSA_KEY_BYTES, err));
        for (int k = 0; k < LSA_STAGES; k++)
            LSA_TRY(LSA_NEW(o->at[l].v[k], lsa_stage_elems((lsa_stage)k, &f->geom), err));
    }
    LSA_TRY(LSA_NEW(t, 1, err));
    make_plan(t, o, &f->geom);
    if (lsa_st_count(s) != t->n + 1 || !lsa_st_find(s, "conventions"))
        LSA_FAIL(LSA_E_FORMAT,
                 "'%s' has not the tensors of %s for this geometry: %lld, expected %d; export again", path,
                 FORMAT, (long long)lsa_st_count(s), t->n + 1);
    for (int i = 0; i < t->n; i++) {
        const lsa_st_tensor *x;
        LSA_TRY(lsa_st_need(&x, s, t->p[i].name, t->p[i].dtype, t->p[i].n_dim, t->p[i].shape, err));
        unpack(&t->p[i], x->data);
    }
done:
    lsa_free(t);
    lsa_st_close(s);
    if (st != LSA_OK) lsa_golden_fini(o);
    return st;
}
