/* Names of faults: see diagnose.h. A layer that differs is computed again with each convention replaced
 * (chain.h); the one that gives the engine's numbers is named. */
#include "export/diagnose.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "export/convention.h"
#include "kernels/core/mem.h"

enum { M = LSA_GOLD_M };

/* Largest allowed difference. Seen with an engine of other sums (f32 numpy), 8 layers of hidden 4096, rank
 * 2048, 128 heads, random weights: 1.4e-6 on the f32 path. On the others a value that lies on a rounding
 * boundary may fall on either side: 9e-5 (bf16), 3e-3 (fp8 logits, where one code is a sixteenth off and
 * heads of both signs cancel). The weakest faults of tests/e2e/test_conformance.py are 4.3e-4 (f32), 2.2e-2
 * (bf16) and 3.7e-2 (fp8) off. */
const double lsa_stage_limit[LSA_STAGES] = {
    [LSA_STAGE_A] = 2e-5,         [LSA_STAGE_U] = 2e-5,          [LSA_STAGE_RAW] = 2e-5,
    [LSA_STAGE_ROPE] = 2e-5,      [LSA_STAGE_Q] = 2e-5,          [LSA_STAGE_W] = 2e-5,
    [LSA_STAGE_LOGIT] = 4e-5,     [LSA_STAGE_RAW_BF16] = 1e-3,   [LSA_STAGE_ROPE_BF16] = 1e-3,
    [LSA_STAGE_Q_BF16] = 1e-3,    [LSA_STAGE_LOGIT_BF16] = 1e-3, [LSA_STAGE_CODE_FP8] = 1e-2,
    [LSA_STAGE_SCALE_FP8] = 1e-3, [LSA_STAGE_W_FP8] = 1e-3,      [LSA_STAGE_LOGIT_FP8] = 1e-2};

/* Where a stage comes from, for a fault that is not in the table. */
static const char *const CAUSE[LSA_STAGES] = {"wq_a, or the hidden vector",
                                              "q_norm",
                                              "wq_b",
                                              "RoPE: base, YaRN constants, angle or position",
                                              "Hadamard",
                                              "weights_proj, its scale, or the hidden vector",
                                              "key codec, ReLU or head sum",
                                              "rounding to bf16 before RoPE",
                                              "RoPE, or rounding to bf16 after it",
                                              "Hadamard",
                                              "key codec, ReLU or head sum",
                                              "the codes",
                                              "scale of a head: max(1e-4, amax)/448",
                                              "head weight times scale",
                                              "key codec, ReLU or head sum"};

double lsa_gold_difference(const float *got, const float *want, int64_t n, int *at) {
    double worst = 0;
    *at = 0;
    for (int i = 0; i < M; i++) {
        double d = 0, w = 0;
        for (int64_t j = i * (n / M); j < (i + 1) * (n / M); j++) {
            d += ((double)got[j] - (double)want[j]) * ((double)got[j] - (double)want[j]);
            w += (double)want[j] * (double)want[j];
        }
        const double r = sqrt(d / fmax(w, 1e-300));
        if (!(r <= worst)) {
            worst = isfinite(r) ? r : (double)INFINITY;
            *at = i;
        }
    }
    return worst;
}

static double stage_difference(const float *got, const float *want, lsa_stage s, const lsa_indexer_geom *g) {
    int at;
    return lsa_gold_difference(got, want, lsa_stage_elems(s, g), &at);
}

/* ---- naming ---- */

/* What gives the engine's numbers. Equal explanations (logits alone do not tell an undivided Hadamard from a
 * missing 1/sqrt(128)) are all kept; a worse one is not. */
typedef struct suspects {
    double best;
    int n;
    struct {
        double d;
        char text[200];
    } s[64];
} suspects;

/* Largest share of a stage's limit by which `cand` misses what the engine gave; above 1: not the fault. */
static double misses(const lsa_stages *got, const lsa_stages *cand, const lsa_indexer_geom *g) {
    double worst = 0;
    for (int s = 0; s < LSA_STAGES; s++) {
        if (!got->v[s]) continue;
        const double d = stage_difference(got->v[s], cand->v[s], (lsa_stage)s, g) / lsa_stage_limit[s];
        if (!(d <= worst)) worst = d;
    }
    return worst;
}

static void suspect(suspects *k, double d, const lsa_convention *c, const char *fmt, ...) LSA_PRINTF(4, 5);
static void suspect(suspects *k, double d, const lsa_convention *c, const char *fmt, ...) {
    if (!(d <= 1) || k->n == (int)(sizeof k->s / sizeof *k->s)) return;
    if (k->n == 0 || d < k->best) k->best = d;
    char *text = k->s[k->n].text;
    const size_t size = sizeof k->s[k->n].text;
    const int n = snprintf(text, size, "%s: %s", c->name, c->text);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text + n, size - (size_t)n, fmt, ap);
    va_end(ap);
    k->s[k->n++].d = d;
}

typedef struct scene {
    const lsa_indexer_file *f;
    const lsa_golden *o;
    int32_t l;
    const lsa_stages *got;
    lsa_ctx *ctx;
} scene;

static lsa_status try_conventions(suspects *k, const scene *c, lsa_err *err) {
    const lsa_indexer_geom *g = &c->f->geom;
    const lsa_chain_in in = {c->o->x[c->l], c->o->key[c->l], c->o->position};
    for (int i = 0; i < LSA_CONVENTIONS; i++) {
        const lsa_convention *v = &lsa_conventions[i];
        double best = (double)INFINITY, value = 0; /* one line a convention: values may give equal tables */
        for (int t = 0; v->fault != LSA_FAULT_NONE && t < v->n; t++) {
            lsa_stages cand;
            const lsa_status st = lsa_chain_run(&cand, c->ctx, g, c->f->params, c->l, &in, v->fault,
                                                lsa_convention_value(v, t, g->n_head), err);
            if (st != LSA_OK) return st;
            const double d = misses(c->got, &cand, g);
            lsa_stages_fini(&cand);
            if (d < best) {
                best = d;
                value = v->v[t];
            }
        }
        char told[40] = "";
        if (v->told) snprintf(told, sizeof told, " (%s %g)", v->told, value);
        suspect(k, best, v, "%s", told);
    }
    return LSA_OK;
}

static lsa_status try_layers(suspects *k, const scene *c, lsa_err *err) {
    const lsa_indexer_geom *g = &c->f->geom;
    const lsa_golden *o = c->o;
    const int32_t a = c->l;
    for (int32_t b = 0; b < g->n_layer; b++) {
        const struct {
            const char *what;
            int32_t w, x, key;
        } mix[] = {{"weights", b, a, a},
                   {"hidden vectors", a, b, a},
                   {"keys", a, a, b},
                   {"weights and hidden vectors", b, b, a},
                   {"weights, hidden vectors and keys", b, b, b}};
        for (int i = 0; b != a && i < 5; i++) {
            lsa_stages cand;
            const lsa_chain_in in = {o->x[mix[i].x], o->key[mix[i].key], o->position};
            const lsa_status st =
                lsa_chain_run(&cand, c->ctx, g, c->f->params, mix[i].w, &in, LSA_FAULT_NONE, 0, err);
            if (st != LSA_OK) return st;
            suspect(k, misses(c->got, &cand, g), &lsa_conventions[LSA_LAYER_MAP],
                    " (%s of c%d; c%d is layer %d)", mix[i].what, g->ord[b].v, g->ord[a].v, g->id[a].v);
            lsa_stages_fini(&cand);
        }
    }
    return LSA_OK;
}

/* The stage of the same meaning on another path, or -1. */
static int same_stage(lsa_stage s, lsa_query_path to) {
    static const int row[][LSA_QUERY_PATHS] = {{LSA_STAGE_RAW, LSA_STAGE_RAW_BF16, -1},
                                               {LSA_STAGE_ROPE, LSA_STAGE_ROPE_BF16, -1},
                                               {LSA_STAGE_Q, LSA_STAGE_Q_BF16, -1},
                                               {LSA_STAGE_LOGIT, LSA_STAGE_LOGIT_BF16, LSA_STAGE_LOGIT_FP8}};
    if (s == LSA_STAGE_A || s == LSA_STAGE_U || s == LSA_STAGE_W) return (int)s;
    for (int i = 0; i < 4; i++)
        if (row[i][lsa_stage_path(s)] == (int)s) return row[i][to];
    return -1;
}

static void try_paths(suspects *k, const scene *c) {
    const lsa_stages *truth = &c->o->at[c->l];
    for (int p = 0; p < LSA_QUERY_PATHS; p++) {
        double worst = 0;
        for (int s = 0; s < LSA_STAGES; s++) {
            if (!c->got->v[s]) continue;
            const int t = same_stage((lsa_stage)s, (lsa_query_path)p);
            const double d = t < 0 ? (double)INFINITY
                                   : stage_difference(c->got->v[s], truth->v[t], (lsa_stage)s, &c->f->geom) /
                                         fmax(lsa_stage_limit[s], lsa_stage_limit[t]);
            if (!(d <= worst)) worst = d;
        }
        suspect(k, worst, &lsa_conventions[LSA_NUMERIC_PATH], " (%s)",
                lsa_query_path_name((lsa_query_path)p));
    }
}

/* No known fault: what the pattern says. */
static void hint(char *out, size_t size, const scene *c, lsa_stage first) {
    const float *got = c->got->v[first], *want = c->o->at[c->l].v[first];
    const int64_t row = lsa_stage_elems(first, &c->f->geom) / M;
    double dot[M], ww[M], dd[M], factor = 0, spread = 0;
    for (int i = 0; i < M; i++) {
        dot[i] = ww[i] = dd[i] = 0;
        for (int64_t j = i * row; j < (i + 1) * row; j++) {
            const double x = (double)got[j], w = (double)want[j];
            dot[i] += x * w, ww[i] += w * w, dd[i] += x * x;
        }
        factor += dot[i] / ww[i] / M;
    }
    for (int i = 0; i < M; i++) /* |got - factor want| / |got| */
        spread = fmax(spread, sqrt(fmax(dd[i] - 2 * factor * dot[i] + factor * factor * ww[i], 0) / dd[i]));
    if (spread <= 1e-3)
        snprintf(out, size, "all numbers are %.6g times the expected ones: a scale", factor);
    else if (sqrt(fmax(dd[0] - 2 * dot[0] + ww[0], 0) / ww[0]) <= lsa_stage_limit[first])
        snprintf(out, size, "position 0 agrees: RoPE's base, YaRN constants, angle or position");
    else
        snprintf(out, size, "look at: %s", CAUSE[first]);
}

/* One layer of an engine against the truth. */
lsa_status lsa_judge_layer(const lsa_indexer_file *f, const lsa_golden *o, int32_t l, const lsa_stages *got,
                           lsa_ctx *ctx, const char *who, double *worst, lsa_err *err) {
    lsa_status st = LSA_OK;
    const scene c = {f, o, l, got, ctx};
    suspects *k = NULL;
    int first = -1, at = 0;
    double d_first = 0;
    for (int s = 0; s < LSA_STAGES; s++) {
        if (!got->v[s]) continue;
        int q;
        const double d =
            lsa_gold_difference(got->v[s], o->at[l].v[s], lsa_stage_elems((lsa_stage)s, &f->geom), &q);
        if (lsa_stage_path((lsa_stage)s) == LSA_PATH_F32 && d > *worst) *worst = d;
        if (!(d <= lsa_stage_limit[s]) && first < 0) {
            first = s;
            d_first = d;
            at = q;
        }
    }
    if (first < 0) goto done;
    char text[512] = "";
    LSA_TRY(LSA_NEW(k, 1, err));
    if (isfinite(d_first)) {
        LSA_TRY(try_conventions(k, &c, err));
        LSA_TRY(try_layers(k, &c, err));
        try_paths(k, &c);
    }
    for (int i = 0; i < k->n; i++)
        if (k->s[i].d <= 3 * k->best + 0.05)
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", *text ? "; or " : "",
                     k->s[i].text);
    if (!*text && !isfinite(d_first))
        snprintf(text, sizeof text, "a number is not finite");
    else if (!*text) {
        const size_t n = (size_t)snprintf(text, sizeof text, "no convention of the table explains it; ");
        hint(text + n, sizeof text - n, &c, (lsa_stage)first);
    }
    LSA_FAIL(LSA_E_FORMAT, "'%s': layer c%d: '%s' is off by %.3g (limit %g), most at position %lld: %s", who,
             f->geom.ord[l].v, lsa_stage_name((lsa_stage)first), d_first, lsa_stage_limit[first],
             (long long)o->position[at], text);
done:
    lsa_free(k);
    return st;
}
