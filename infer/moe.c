/* Mixture of experts (architecture notes 9): router, chosen experts in ascending id, then the shared expert.
 *
 * Tokens of a block are gathered per expert so that each expert is one matrix product. The routing weight is
 * applied before w2, and the clamp is one-sided for the gate and two-sided for the up projection. */
#include <string.h>

#include "infer/engine.h"
#include "infer/numeric.h"
#include "kernels/cpu/gemm.h"

#define MAX_TOP 64

static float softplus_sqrt(float z) {
    return sqrtf(z > 20.0f ? z : log1pf(expf(z)));
}

/* Expert ids (ascending) and weights of one token. score: router scores [E]. */
static void route(const lsa_engine *e, int32_t layer, int32_t token, int64_t pos, const float *score,
                  const lsa_taps *taps, int32_t *id, float *weight) {
    const lsa_teacher_config *c = &e->c;
    const layer_weights *w = &e->layer[layer];
    const int32_t k = c->n_expert_tok;
    float biased[4096];
    for (int32_t i = 0; i < c->n_expert; i++) biased[i] = score[i] + (w->gate_bias ? w->gate_bias[i] : 0.0f);
    if (w->tid2eid) {
        for (int32_t i = 0; i < k; i++) id[i] = (int32_t)w->tid2eid[(int64_t)token * k + i];
    } else {
        bool used[4096] = {false};
        for (int32_t i = 0; i < k; i++) {
            int32_t best = -1;
            for (int32_t j = 0; j < c->n_expert; j++)
                if (!used[j] && (best < 0 || biased[j] > biased[best])) best = j;
            used[best] = true;
            id[i] = best;
        }
    }
    if (taps && taps->choose_experts)
        taps->choose_experts(taps->user, (lsa_layer_id){layer}, pos, k, id, biased);
    float sum = 0.0f;
    for (int32_t i = 0; i < k; i++) sum += weight[i] = score[id[i]];
    for (int32_t i = 0; i < k; i++) weight[i] = weight[i] / sum * c->route_scale;
}

/* y[row] += w2 (weight * silu(clamp(w1 x)) * clamp(w3 x)) for n gathered tokens; row NULL: rows 0..n-1,
 * weight NULL: ones. */
static void expert(const lsa_engine *e, const layer_weights *w, int32_t id, const float *x,
                   const int32_t *row, const float *weight, int64_t n, workspace *ws, float *y) {
    const int64_t d = e->c.hidden, m = e->c.moe_dim;
    const float lim = e->c.swiglu_limit > 0.0f ? e->c.swiglu_limit : INFINITY;
    lsa_gemm_nt(n, 2 * m, d, 1.0f, x, d, w->w13 + id * 2 * m * d, d, 0.0f, ws->h13, 2 * m);
    for (int64_t t = 0; t < n; t++) {
        const float *g = ws->h13 + t * 2 * m, *u = g + m;
        const float f = weight ? weight[t] : 1.0f;
        for (int64_t i = 0; i < m; i++) {
            float gi = g[i] < lim ? g[i] : lim, ui = u[i] > lim ? lim : u[i] < -lim ? -lim : u[i];
            ws->h[t * m + i] = f * (gi / (1.0f + expf(-gi)) * ui);
        }
    }
    lsa_gemm_nt(n, d, m, 1.0f, ws->h, m, w->w2 + id * d * m, m, 0.0f, ws->gy, d);
    for (int64_t t = 0; t < n; t++) {
        float *o = y + (row ? row[t] : t) * d;
        for (int64_t i = 0; i < d; i++) o[i] += ws->gy[t * d + i];
    }
}

void lsa_moe(const lsa_engine *e, int32_t layer, const float *x, const int32_t *token, int64_t pos, int64_t n,
             workspace *ws, const lsa_taps *taps, float *y) {
    const lsa_teacher_config *c = &e->c;
    const layer_weights *w = &e->layer[layer];
    const int64_t d = c->hidden;
    const int32_t k = c->n_expert_tok;
    int32_t id[LSA_BLOCK][MAX_TOP];
    float weight[LSA_BLOCK][MAX_TOP];
    lsa_gemm_nt(n, c->n_expert, d, 1.0f, x, d, w->gate, d, 0.0f, ws->route, c->n_expert);
    for (int64_t t = 0; t < n; t++) {
        float *s = ws->route + t * c->n_expert;
        for (int32_t i = 0; i < c->n_expert; i++) s[i] = softplus_sqrt(s[i]);
        route(e, layer, token[t], pos + t, s, taps, id[t], weight[t]);
    }
    memset(y, 0, (size_t)(n * d) * sizeof *y);
    for (int32_t x_id = 0; x_id < c->n_expert; x_id++) {
        int32_t row[LSA_BLOCK];
        float wt[LSA_BLOCK];
        int64_t m = 0;
        for (int64_t t = 0; t < n; t++) {
            float sum = 0.0f; /* a hash table may name one expert twice: its weights add up */
            bool hit = false;
            for (int32_t i = 0; i < k; i++)
                if (id[t][i] == x_id) {
                    sum += weight[t][i];
                    hit = true;
                }
            if (!hit) continue;
            memcpy(ws->gx + m * d, x + t * d, (size_t)d * sizeof *x);
            row[m] = (int32_t)t;
            wt[m++] = sum;
        }
        if (m) expert(e, w, x_id, ws->gx, row, wt, m, ws, y);
    }
    expert(e, w, c->n_expert, x, NULL, NULL, n, ws, y);
}
