/* Conformance: see conform.h. */
#include "export/conform.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "data/lsa_safetensors.h"
#include "export/diagnose.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "kernels/cpu/topk.h"
#include "kernels/continuation.h"
#include "kernels/ops.h"

enum { M = LSA_GOLD_M, N = LSA_GOLD_KEYS };

static const char *const ENSEMBLE = "ensemble: the layers are combined by another rule than the file's";
static const char *const TIES = "ties: of equal scores the lower index is kept";
static const char *const STRICT =
    "threshold: a chunk is kept only if its score is above the threshold, not equal";

/* ---- scores and selections ---- */

/* A kept set against the truth; a chunk whose score lies within the path's rounding of the cut may fall on
 * either side, equal keys and the zero key may not. */
static lsa_status judge_mask(const lsa_golden *o, lsa_query_path p, const uint8_t *got, bool top,
                             const char *who, lsa_err *err) {
    const lsa_gold_selection *t = &o->pick[p];
    for (int i = 0; i < M; i++) {
        const float *s = t->score + i * N;
        const uint8_t *g = got + i * N, *w = (top ? t->top : t->above) + i * N;
        const float cut = top ? s[LSA_GOLD_TWIN_LOW] : o->threshold;
        double ss = 0, max = 0;
        int n = 0;
        for (int c = 0; c < N; c++) {
            ss += (double)(s[c] - o->threshold) * (double)(s[c] - o->threshold);
            max = fmax(max, fabs((double)s[c]));
            n += g[c];
        }
        /* rounding of the logits, and of sigmoids near a half */
        const double slack = 2 * lsa_stage_limit[lsa_logit_stage[p]] * sqrt(ss / N) + 0x1p-22 * max;
        const char *name = lsa_query_path_name(p), *what = top ? "top" : "above";
        if (top && g[LSA_GOLD_TWIN_HIGH] && !g[LSA_GOLD_TWIN_LOW])
            LSA_RET_FAIL(LSA_E_FORMAT,
                         "'%s': '%s.%s' of position %lld keeps chunk %d but not %d, whose keys are equal: %s",
                         who, name, what, (long long)o->position[i], LSA_GOLD_TWIN_HIGH, LSA_GOLD_TWIN_LOW,
                         TIES);
        if (!top && g[LSA_GOLD_ZERO])
            LSA_RET_FAIL(LSA_E_FORMAT,
                         "'%s': '%s.%s' of position %lld keeps chunk %d, whose score is exactly %g: %s", who,
                         name, what, (long long)o->position[i], LSA_GOLD_ZERO, (double)o->threshold, STRICT);
        if (top && n != t->k[i])
            LSA_RET_FAIL(LSA_E_FORMAT, "'%s': '%s.%s' of position %lld keeps %d chunks, '%s.k' says %d", who,
                         name, what, (long long)o->position[i], n, name, t->k[i]);
        for (int c = 0; c < N; c++)
            if (g[c] > 1 || (g[c] != w[c] && !(fabs((double)(s[c] - cut)) <= slack)))
                LSA_RET_FAIL(LSA_E_FORMAT,
                             "'%s': '%s.%s' of position %lld: chunk %d is %d, expected %d (score %g, cut %g)",
                             who, name, what, (long long)o->position[i], c, g[c], w[c], (double)s[c],
                             (double)cut);
    }
    return LSA_OK;
}

static lsa_status judge_score(const lsa_indexer_file *f, const lsa_golden *o, lsa_query_path p,
                              const float *got, const char *who, lsa_err *err) {
    const float *logit[LSA_MAX_CSA];
    float other[M * N];
    int at, q;
    const double limit = lsa_stage_limit[lsa_logit_stage[p]],
                 d = lsa_gold_difference(got, o->pick[p].score, M * N, &at);
    if (d <= limit) return LSA_OK;
    for (int32_t l = 0; l < o->n_layer; l++) logit[l] = o->at[l].v[lsa_logit_stage[p]];
    const char *text = "the layers' logits are not combined as the file says";
    for (int e = 0; e < 3; e++) {
        lsa_gold_combine(other, logit, o->n_layer, (lsa_ensemble)e);
        if (e != (int)f->ensemble && lsa_gold_difference(got, other, M * N, &q) <= limit) text = ENSEMBLE;
    }
    LSA_RET_FAIL(LSA_E_FORMAT, "'%s': '%s.score' is off by %.3g (limit %g), most at position %lld: %s", who,
                 lsa_query_path_name(p), d, limit, (long long)o->position[at], text);
}

static lsa_status judge_continued(const lsa_golden *o, lsa_query_path p, const float *got, const char *who,
                                  lsa_err *err) {
    int at, q;
    const double limit = lsa_stage_limit[lsa_logit_stage[p]],
                 d = lsa_gold_difference(got, o->continued[p], M * N, &at);
    if (d <= limit) return LSA_OK;
    LSA_RET_FAIL(LSA_E_FORMAT, "'%s': '%s.continued' is off by %.3g (limit %g), most at position %lld: %s",
                 who, lsa_query_path_name(p), d, limit, (long long)o->position[at],
                 lsa_gold_difference(got, o->pick[p].score, M * N, &q) <= limit
                     ? "continuation: the scores are not continued to the chunks that follow"
                     : "continuation: the scores are not continued as lsa.continuation says");
}

/* ---- our kernels ---- */

static lsa_status kernel_layer(lsa_stages *out, lsa_ctx *ctx, const lsa_indexer_file *f, int32_t l,
                               const lsa_chain_in *in, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &f->geom;
    const int64_t H = g->n_head, r = g->rank;
    float freq[64], rstd[M], z[M * N], *a = NULL, *u = NULL, *q = NULL, *w = NULL, *raw = NULL, *rope = NULL,
                                       *s = NULL;
    uint8_t *code = NULL;
    memset(out, 0, sizeof *out);
    lsa_rope_freqs(freq, &g->rope);
    LSA_TRY(LSA_NEW(a, M * r, err));
    LSA_TRY(LSA_NEW(u, M * r, err));
    LSA_TRY(LSA_NEW(q, M * H * 128, err));
    LSA_TRY(LSA_NEW(raw, M * H * 128, err));
    LSA_TRY(LSA_NEW(rope, M * H * 128, err));
    LSA_TRY(LSA_NEW(w, M * H, err));
    LSA_TRY(LSA_NEW(s, M * H, err));
    LSA_TRY(LSA_NEW(code, M * H * 128, err));
    const lsa_indexer_act act = {a, rstd, u, q, w};
    LSA_TRY(lsa_indexer_query(ctx, g, f->params, l, M, in->x, in->position, freq, &act, err));
    LSA_TRY(lsa_gold_score(z, ctx, g->n_head, q, w, in->key, false, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_A, a, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_U, u, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_Q, q, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_W, w, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_LOGIT, z, g, err));
    const lsa_gemm_args wb = {.trans_b = true,
                              .m = M,
                              .n = H * 128,
                              .k = r,
                              .alpha = 1,
                              .a = u,
                              .b = f->params + lsa_indexer_tensor_at(g, l, LSA_WQ_B).offset,
                              .c = raw};
    LSA_TRY(lsa_gemm(ctx, &wb, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_RAW, raw, g, err));
    for (int p = 0; p < LSA_QUERY_PATHS; p++) {
        for (int64_t i = 0; i < M; i++) {
            const int64_t at = i * H * 128;
            lsa_query_path_row((lsa_query_path)p, g, freq, in->position[i], raw + at, rope + at, q + at,
                               code + at, s + i * H);
        }
        if (p == LSA_PATH_F32) LSA_TRY(lsa_stages_put(out, LSA_STAGE_ROPE, rope, g, err));
        if (p == LSA_PATH_BF16) {
            LSA_TRY(lsa_stages_put(out, LSA_STAGE_ROPE_BF16, rope, g, err));
            LSA_TRY(lsa_stages_put(out, LSA_STAGE_Q_BF16, q, g, err));
            LSA_TRY(lsa_gold_score(z, ctx, g->n_head, q, w, in->key, false, err));
            LSA_TRY(lsa_stages_put(out, LSA_STAGE_LOGIT_BF16, z, g, err));
        }
    }
    for (int64_t i = 0; i < M * H; i++) w[i] *= s[i]; /* folded, as servers do */
    for (int64_t i = 0; i < M * H * 128; i++) q[i] = lsa_e4m3_to_f32(code[i]);
    LSA_TRY(lsa_gold_score(z, ctx, g->n_head, q, w, in->key, true, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_CODE_FP8, q, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_SCALE_FP8, s, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_W_FP8, w, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_LOGIT_FP8, z, g, err));
done:
    lsa_free(a);
    lsa_free(u);
    lsa_free(q);
    lsa_free(raw);
    lsa_free(rope);
    lsa_free(w);
    lsa_free(s);
    lsa_free(code);
    if (st != LSA_OK) lsa_stages_fini(out);
    return st;
}

lsa_status lsa_conform_kernels(const lsa_indexer_file *f, const char *dir, const char *device, double *worst,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_golden o = {0};
    lsa_stages got[LSA_MAX_CSA] = {{{0}}};
    lsa_ctx *ctx = NULL;
    *worst = 0;
    LSA_TRY(lsa_golden_load(&o, f, dir, err));
    LSA_TRY(lsa_ctx_create(&ctx, device, err));
    for (int32_t l = 0; l < o.n_layer; l++) {
        const lsa_chain_in in = {o.x[l], o.key[l], o.position};
        LSA_TRY(kernel_layer(&got[l], ctx, f, l, &in, err));
        LSA_TRY(lsa_judge_layer(f, &o, l, &got[l], ctx, dir, worst, err));
    }
    for (int p = 0; p < LSA_QUERY_PATHS; p++) {
        const float *logit[LSA_MAX_CSA];
        float score[M * N], continued[M * N], scratch[N];
        uint8_t top[M * N] = {0}, above[M * N];
        for (int32_t l = 0; l < o.n_layer; l++) logit[l] = got[l].v[lsa_logit_stage[p]];
        lsa_gold_combine(score, logit, o.n_layer, f->ensemble);
        LSA_TRY(judge_score(f, &o, (lsa_query_path)p, score, dir, err));
        for (int i = 0; f->geom.reach && i < M; i++)
            lsa_continue(continued + i * N, NULL, score + i * N, N,
                         f->params + lsa_indexer_costs_at(&f->geom), f->geom.reach);
        if (f->geom.reach) LSA_TRY(judge_continued(&o, (lsa_query_path)p, continued, dir, err));
        for (int i = 0; i < M; i++) {
            int32_t sel[N];
            const int64_t n = lsa_topk(score + i * N, N, o.pick[p].k[i], NULL, 0, scratch, sel);
            for (int64_t j = 0; j < n; j++) top[i * N + sel[j]] = 1;
            for (int c = 0; c < N; c++) above[i * N + c] = score[i * N + c] > o.threshold;
        }
        LSA_TRY(judge_mask(&o, (lsa_query_path)p, top, true, dir, err));
        LSA_TRY(judge_mask(&o, (lsa_query_path)p, above, false, dir, err));
    }
done:
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) lsa_stages_fini(&got[l]);
    lsa_golden_fini(&o);
    lsa_ctx_destroy(ctx);
    return st;
}

/* ---- another engine's file ---- */

/* A stage from a tensor in golden shape, or with all ranks and heads. */
static lsa_status take_stage(lsa_stages *out, const lsa_st_tensor *t, lsa_stage s, const lsa_indexer_geom *g,
                             const char *file, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t part[3], whole[3];
    const int32_t nd = lsa_stage_shape(part, s, g, false);
    float *v = NULL;
    lsa_stage_shape(whole, s, g, true);
    const size_t bytes = (size_t)nd * sizeof *part;
    const bool is_part = t->n_dim == nd && !memcmp(t->shape, part, bytes),
               is_whole = t->n_dim == nd && !memcmp(t->shape, whole, bytes);
    if (!is_part && !is_whole)
        LSA_FAIL(
            LSA_E_FORMAT,
            "'%s': tensor '%s' must be [%lld, %lld%s] as in golden.safetensors, or with all ranks and heads [%lld, %lld%s]",
            file, t->name, (long long)part[0], (long long)part[1], nd == 3 ? ", 128" : "",
            (long long)whole[0], (long long)whole[1], nd == 3 ? ", 128" : "");
    LSA_TRY(LSA_NEW(v, t->n_elem, err));
    if (s == LSA_STAGE_CODE_FP8 && (t->dtype == LSA_U8 || t->dtype == LSA_F8_E4M3))
        for (int64_t i = 0; i < t->n_elem; i++) v[i] = lsa_e4m3_to_f32(((const uint8_t *)t->data)[i]);
    else
        LSA_TRY(lsa_st_to_f32(v, t, err));
    if (is_whole) {
        LSA_TRY(lsa_stages_put(out, s, v, g, err));
    } else {
        out->v[s] = v;
        v = NULL;
    }
done:
    lsa_free(v);
    return st;
}

/* Inputs in the file must be those of the golden vectors. */
static lsa_status same_input(const lsa_st_tensor *t, const void *want, size_t n, const char *file,
                             lsa_err *err) {
    if (t->n_bytes != n || memcmp(t->data, want, n))
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "'%s': tensor '%s' is not the one of golden.safetensors: computed from other inputs",
                     file, t->name);
    return LSA_OK;
}

/* Takes one tensor; *known is false if no golden tensor has its name. */
static lsa_status take_tensor(lsa_stages *got, bool *known, const lsa_indexer_file *f, const lsa_golden *o,
                              const lsa_st *golden, const lsa_st_tensor *t, const char *file, lsa_err *err) {
    const lsa_indexer_geom *g = &f->geom;
    char name[48];
    *known = true;
    for (int32_t l = 0; l < g->n_layer; l++)
        for (int s = 0; s < LSA_STAGES; s++) {
            snprintf(name, sizeof name, "l%d.%s", g->ord[l].v, lsa_stage_name((lsa_stage)s));
            if (!strcmp(t->name, name)) return take_stage(&got[l], t, (lsa_stage)s, g, file, err);
        }
    for (int p = 0; p < LSA_QUERY_PATHS; p++) {
        enum { SCORE = 0, TOP, ABOVE, CONTINUED };
        static const char *const what[] = {"score", "top", "above", "continued"};
        for (int i = 0; i < (g->reach ? 4 : 3); i++) {
            const bool mask = i == TOP || i == ABOVE;
            snprintf(name, sizeof name, "%s.%s", lsa_query_path_name((lsa_query_path)p), what[i]);
            if (strcmp(t->name, name)) continue;
            float score[M * N];
            if (t->n_elem != M * N || t->n_dim != 2 || t->shape[0] != M || (mask && t->dtype != LSA_U8))
                LSA_RET_FAIL(LSA_E_FORMAT, "'%s': tensor '%s' must be %s [%d, %d]", file, t->name,
                             mask ? "U8" : "F32", M, N);
            if (mask) return judge_mask(o, (lsa_query_path)p, t->data, i == TOP, file, err);
            const lsa_status st = lsa_st_to_f32(score, t, err);
            if (st != LSA_OK) return st;
            return i == SCORE ? judge_score(f, o, (lsa_query_path)p, score, file, err)
                              : judge_continued(o, (lsa_query_path)p, score, file, err);
        }
    }
    const lsa_st_tensor *same = lsa_st_find(golden, t->name);
    *known = same != NULL;
    return same ? same_input(t, same->data, same->n_bytes, file, err) : LSA_OK;
}

lsa_status lsa_conform_file(const lsa_indexer_file *f, const char *dir, const char *file, double *worst,
                            int64_t *n, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_golden o = {0};
    lsa_stages got[LSA_MAX_CSA] = {{{0}}};
    lsa_st *s = NULL, *golden = NULL;
    lsa_ctx *ctx = NULL;
    char path[LSA_PATH_MAX];
    *worst = 0;
    *n = 0;
    LSA_TRY(lsa_golden_load(&o, f, dir, err));
    LSA_TRY(lsa_path(path, err, "%s/golden.safetensors", dir));
    LSA_TRY(lsa_st_open(&golden, path, err));
    LSA_TRY(lsa_st_open(&s, file, err));
    LSA_TRY(lsa_ctx_create(&ctx, "cpu", err));
    for (int pass = 0; pass < 2; pass++) { /* layers before scores and selections, which follow from them */
        for (int64_t i = 0; i < lsa_st_count(s); i++) {
            const lsa_st_tensor *t = lsa_st_at(s, i);
            bool known;
            if ((t->name[0] == 'l') != (pass == 0)) continue;
            LSA_TRY(take_tensor(got, &known, f, &o, golden, t, file, err));
            if (!known)
                LSA_FAIL(
                    LSA_E_FORMAT,
                    "'%s': tensor '%.60s' has no counterpart in golden.safetensors; layers are named by CSA ordinal (c%d is layer %d)",
                    file, t->name, f->geom.ord[0].v, f->geom.id[0].v);
            ++*n;
        }
        for (int32_t l = 0; pass == 0 && l < o.n_layer; l++)
            LSA_TRY(lsa_judge_layer(f, &o, l, &got[l], ctx, file, worst, err));
    }
    if (*n == 0) LSA_FAIL(LSA_E_FORMAT, "'%s' holds no tensor", file);
done:
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) lsa_stages_fini(&got[l]);
    lsa_st_close(s);
    lsa_st_close(golden);
    lsa_golden_fini(&o);
    lsa_ctx_destroy(ctx);
    return st;
}
