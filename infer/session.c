/* One timeline: state that carries over between calls, and the forward pass of a call (see engine.h for its
 * regions).
 *
 * The mistake that would stay silent: reading a row that this call has not written yet. Regions end with a
 * barrier, and the window and projection buffers keep the last rows of the call before in front of the new
 * ones. */
#include <omp.h>
#include <string.h>

#include "infer/engine.h"
#include "infer/numeric.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/topk.h"

/* ---- memory ---- */

static void ws_free(workspace *w) {
    void *p[] = {w->z,   w->xp,    w->qr,   w->qq,        w->tile,  w->logit, w->select,
                 w->sel, w->score, w->mass, w->sel_logit, w->dense, w->o,     w->g,
                 w->y,   w->h13,   w->h,    w->gx,        w->gy,    w->route};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    lsa_free(w->row);
}

static lsa_status ws_make(workspace *w, const lsa_session *s, lsa_err *err) {
    const lsa_teacher_config *c = &s->e->c;
    lsa_status st = LSA_OK;
    int64_t B = LSA_BLOCK, n = c->hc_mult, nx = 0, m = s->max_chunk + 1, rows = c->window + 1;
    int64_t hca = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        nx = lsa_max_i64(nx, s->e->layer[l].nx);
        if (c->kind[l] == LSA_LAYER_HCA) hca = lsa_max_i64(hca, s->o.max_tokens / c->ratio[l]);
    }
    rows += lsa_max_i64(hca, s->o.attend_all ? m : lsa_min_i64(m, c->index_topk));
    const int64_t HD = (int64_t)c->n_head * c->head_dim, ID = (int64_t)c->index_n_head * c->index_head_dim;
    LSA_TRY(LSA_NEW(w->z, B * n * (n + 2), err));
    LSA_TRY(LSA_NEW(w->xp, B * nx, err));
    LSA_TRY(LSA_NEW(w->qr, B * c->q_rank, err));
    LSA_TRY(LSA_NEW(w->qq, B * (HD + ID), err));
    LSA_TRY(LSA_NEW(w->tile, B * c->index_n_head * LSA_KEY_TILE, err));
    LSA_TRY(LSA_NEW(w->logit, B * m, err));
    LSA_TRY(LSA_NEW(w->select, m, err));
    LSA_TRY(LSA_NEW(w->sel, m, err));
    LSA_TRY(LSA_NEW(w->score, c->n_head * lsa_max_i64(rows, m), err));
    LSA_TRY(LSA_NEW(w->mass, lsa_max_i64(rows, m), err));
    LSA_TRY(LSA_NEW(w->sel_logit, lsa_max_i64(rows, m), err));
    LSA_TRY(LSA_NEW(w->dense, m, err));
    LSA_TRY(lsa_alloc_((void **)&w->row, rows, sizeof *w->row, "row list", err));
    LSA_TRY(LSA_NEW(w->o, B * HD, err));
    LSA_TRY(LSA_NEW(w->g, B * c->o_groups * c->o_rank, err));
    LSA_TRY(LSA_NEW(w->y, B * c->hidden, err));
    LSA_TRY(LSA_NEW(w->h13, B * 2 * c->moe_dim, err));
    LSA_TRY(LSA_NEW(w->h, B * c->moe_dim, err));
    LSA_TRY(LSA_NEW(w->gx, B * c->hidden, err));
    LSA_TRY(LSA_NEW(w->gy, B * c->hidden, err));
    LSA_TRY(LSA_NEW(w->route, B * c->n_expert, err));
done:
    return st;
}

/* One workspace per thread that the next call may use. */
static lsa_status ws_need(lsa_session *s, int32_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (n <= s->n_ws) return LSA_OK;
    workspace *w = NULL;
    LSA_TRY(LSA_NEW(w, n, err));
    if (s->n_ws) memcpy(w, s->ws, (size_t)s->n_ws * sizeof *w);
    lsa_free(s->ws);
    s->ws = w;
    while (s->n_ws < n) {
        s->n_ws++; /* counted first: destroy frees a half-made one */
        LSA_TRY(ws_make(&w[s->n_ws - 1], s, err));
    }
done:
    return st;
}

static lsa_status layer_make(lsa_session *s, int32_t l, lsa_err *err) {
    const lsa_teacher_config *c = &s->e->c;
    layer_state *t = &s->layer[l];
    const layer_weights *w = &s->e->layer[l];
    lsa_status st = LSA_OK;
    LSA_TRY(LSA_NEW(t->win, (c->window + s->o.chunk) * c->head_dim, err));
    if (c->kind[l] == LSA_LAYER_WINDOW) goto done;
    t->hist = (int64_t)w->comp.roles * c->ratio[l];
    LSA_TRY(LSA_NEW(t->proj, (t->hist + s->o.chunk) * 2 * w->comp.roles * w->comp.width, err));
    LSA_TRY(LSA_NEW(t->row, (s->o.max_tokens / c->ratio[l] + 1) * c->head_dim, err));
    if (c->kind[l] != LSA_LAYER_CSA) goto done;
    LSA_TRY(LSA_NEW(t->iproj, (t->hist + s->o.chunk) * 4 * c->index_head_dim, err));
    LSA_TRY(LSA_NEW(t->key, (s->max_chunk + 1) * c->index_head_dim, err));
    LSA_TRY(LSA_NEW(t->hidden, c->hidden, err));
done:
    return st;
}

lsa_status lsa_session_create(lsa_session **out, const lsa_engine *e, const lsa_session_opts *opts,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_session *s = NULL;
    const lsa_teacher_config *c = &e->c;
    *out = NULL;
    if (opts->max_tokens < 1 || opts->max_tokens > (INT64_C(1) << 31) || opts->chunk < 0)
        LSA_RET_FAIL(LSA_E_ARG, "session: max_tokens %lld must be in [1, 2^31], chunk %lld not negative",
                     (long long)opts->max_tokens, (long long)opts->chunk);
    LSA_TRY(lsa_alloc_((void **)&s, 1, sizeof *s, "session", err));
    s->e = e;
    s->o = *opts;
    if (s->o.chunk == 0) s->o.chunk = 512;
    s->o.chunk = lsa_min_i64(s->o.chunk, s->o.max_tokens);
    s->max_chunk = s->o.max_tokens / LSA_CHUNK;
    const int64_t N = s->o.chunk, n = c->hc_mult;
    LSA_TRY(LSA_NEW(s->X, N * n * c->hidden, err));
    LSA_TRY(LSA_NEW(s->x, N * c->hidden, err));
    LSA_TRY(LSA_NEW(s->coef, N * n * (n + 2), err));
    LSA_TRY(LSA_NEW(s->q, N * c->n_head * c->head_dim, err));
    LSA_TRY(LSA_NEW(s->iq, N * c->index_n_head * c->index_head_dim, err));
    LSA_TRY(LSA_NEW(s->iw, N * c->index_n_head, err));
    LSA_TRY(LSA_NEW(s->cs_main, N * c->rope_dim, err));
    LSA_TRY(LSA_NEW(s->cs_comp, N * c->rope_dim, err));
    for (int32_t l = 0; l < c->n_layer; l++) LSA_TRY(layer_make(s, l, err));
    *out = s;
    s = NULL;
done:
    lsa_session_destroy(s);
    return st;
}

void lsa_session_destroy(lsa_session *s) {
    if (!s) return;
    for (int32_t i = 0; i < s->n_ws; i++) ws_free(&s->ws[i]);
    for (int32_t l = 0; l < s->e->c.n_layer; l++) {
        layer_state *t = &s->layer[l];
        void *p[] = {t->win, t->proj, t->iproj, t->row, t->key, t->hidden};
        for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    }
    void *p[] = {s->X, s->x, s->coef, s->q, s->iq, s->iw, s->cs_main, s->cs_comp, s->ws};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    lsa_free(s);
}

void lsa_session_reset(lsa_session *s) {
    s->pos =
        0; /* rows of the sequence before are never read: windows and histories are bounded by position 0 */
    s->resident = NULL;
    s->n_masked = 0;
}

int64_t lsa_session_position(const lsa_session *s) {
    return s->pos;
}

void lsa_session_set_resident(lsa_session *s, const uint8_t *resident, int64_t n_masked) {
    s->resident = resident;
    s->n_masked = resident ? n_masked : 0;
}

const float *lsa_session_keys(const lsa_session *s, lsa_csa_ord ord, int64_t *n) {
    *n = s->pos / LSA_CHUNK;
    return s->layer[s->e->c.csa_id[ord.v].v].key;
}

const float *lsa_session_hidden(const lsa_session *s, lsa_csa_ord ord) {
    return s->layer[s->e->c.csa_id[ord.v].v].hidden;
}

/* ---- the pieces of a layer ---- */

/* Region "project": tokens [t0, t0+n) of the call. */
static void project(lsa_session *s, int32_t l, int64_t t0, int64_t n, bool last, workspace *ws) {
    const lsa_engine *e = s->e;
    const lsa_teacher_config *c = &e->c;
    const layer_weights *w = &e->layer[l];
    layer_state *st = &s->layer[l];
    const int64_t d = c->hidden, D = c->head_dim, nz = (int64_t)c->hc_mult * (c->hc_mult + 2), H = c->n_head;
    const int64_t Hi = c->index_n_head, Di = c->index_head_dim, HD = H * D;
    const int32_t half = c->rope_dim / 2;
    const float *cs = (c->kind[l] == LSA_LAYER_WINDOW ? s->cs_main : s->cs_comp) + t0 * c->rope_dim;
    const bool csa = c->kind[l] == LSA_LAYER_CSA;
    float *x = s->x + t0 * d;

    lsa_mhc_collapse(e, &w->hc_attn, s->X + t0 * c->hc_mult * d, n, ws->z, s->coef + t0 * nz, x);
    for (int64_t t = 0; t < n; t++) lsa_rms(x + t * d, x + t * d, w->attn_norm, d, c->norm_eps);
    if (last && csa) memcpy(st->hidden, x + (n - 1) * d, (size_t)d * sizeof *x);
    lsa_gemm_nt(n, w->nx, d, 1.0f, x, d, w->wx, d, 0.0f, ws->xp, w->nx);

    for (int64_t t = 0; t < n; t++) {
        const float *xp = ws->xp + t * w->nx;
        lsa_rms(ws->qr + t * c->q_rank, xp, w->q_norm, c->q_rank, c->norm_eps);
        float *kv = st->win + (c->window + t0 + t) * D;
        lsa_rms(kv, xp + w->at_kv, w->kv_norm, D, c->norm_eps);
        lsa_rotate(kv, D, cs + t * c->rope_dim, half, 1.0f);
        if (e->opts.sim_fp8_kv) lsa_sim_fp8(kv, D - c->rope_dim);
        if (w->at_cv >= 0) {
            const int64_t kc = (int64_t)w->comp.roles * w->comp.width;
            float *p = st->proj + (st->hist + t0 + t) * 2 * kc;
            const float *ape = w->comp.ape + (s->pos + t0 + t) % w->comp.ratio * kc;
            memcpy(p, xp + w->at_cv, (size_t)kc * sizeof *p);
            for (int64_t i = 0; i < kc; i++) p[kc + i] = xp[w->at_cg + i] + ape[i];
        }
        if (csa) {
            const int64_t kc = 2 * Di;
            float *p = st->iproj + (st->hist + t0 + t) * 2 * kc;
            const float *ape = w->icomp.ape + (s->pos + t0 + t) % LSA_CHUNK * kc;
            memcpy(p, xp + w->at_iv, (size_t)kc * sizeof *p);
            for (int64_t i = 0; i < kc; i++) p[kc + i] = xp[w->at_ig + i] + ape[i];
            const float f = 1.0f / sqrtf((float)(Di * Hi));
            for (int64_t h = 0; h < Hi; h++) s->iw[(t0 + t) * Hi + h] = xp[w->at_iw + h] * f;
        }
    }
    const int64_t nq = HD + (csa ? Hi * Di : 0);
    lsa_gemm_nt(n, nq, c->q_rank, 1.0f, ws->qr, c->q_rank, w->wq, c->q_rank, 0.0f, ws->qq, nq);
    for (int64_t t = 0; t < n; t++) {
        const float *ct = cs + t * c->rope_dim;
        for (int64_t h = 0; h < H; h++) {
            float *q = s->q + (t0 + t) * HD + h * D;
            lsa_rms(q, ws->qq + t * nq + h * D, NULL, D, c->norm_eps);
            lsa_rotate(q, D, ct, half, 1.0f);
        }
        for (int64_t h = 0; csa && h < Hi; h++) {
            float *q = s->iq + ((t0 + t) * Hi + h) * Di;
            memcpy(q, ws->qq + t * nq + HD + h * Di, (size_t)Di * sizeof *q);
            lsa_rotate(q, Di, ct, half, 1.0f);
            lsa_hadamard(q, (int32_t)Di);
            if (e->opts.sim_fp4_index) lsa_sim_fp4(q, Di);
        }
    }
}

/* Region "compress": entry i of layer l. */
static void compress(lsa_session *s, int32_t l, int64_t i) {
    const lsa_engine *e = s->e;
    const lsa_teacher_config *c = &e->c;
    const layer_weights *w = &e->layer[l];
    layer_state *st = &s->layer[l];
    const int64_t base = s->pos - st->hist;
    float *row = st->row + i * c->head_dim;
    lsa_compress_entry(e, &w->comp, st->proj, base, i, row);
    if (e->opts.sim_fp8_kv) lsa_sim_fp8(row, c->head_dim - c->rope_dim);
    if (c->kind[l] != LSA_LAYER_CSA) return;
    float *key = st->key + i * c->index_head_dim;
    lsa_compress_entry(e, &w->icomp, st->iproj, base, i, key);
    lsa_hadamard(key, c->index_head_dim);
    if (e->opts.sim_fp4_index) lsa_sim_fp4(key, c->index_head_dim);
}

/* Selection of one CSA token into ws->sel; *n_miss counts native choices that are not resident. */
static int32_t choose(const lsa_session *s, int32_t l, int64_t pos, const float *logit, int64_t n_vis,
                      workspace *ws, const lsa_taps *taps, int32_t *n_miss) {
    *n_miss = 0;
    if (s->o.attend_all) {
        for (int64_t i = 0; i < n_vis; i++) ws->sel[i] = (int32_t)i;
        return (int32_t)n_vis;
    }
    const int32_t k = s->e->c.index_topk;
    int32_t n = (int32_t)lsa_topk(logit, n_vis, k, NULL, 0, ws->select, ws->sel);
    if (s->resident) {
        for (int32_t i = 0; i < n; i++) *n_miss += ws->sel[i] < s->n_masked && !s->resident[ws->sel[i]];
        if (*n_miss) n = (int32_t)lsa_topk(logit, n_vis, k, s->resident, s->n_masked, ws->select, ws->sel);
    }
    if (taps && taps->choose_chunks) taps->choose_chunks(taps->user, (lsa_layer_id){l}, pos, n, ws->sel);
    return n;
}

/* Attention of token t of the call; logit is NULL outside CSA layers. */
static void attend_token(lsa_session *s, int32_t l, int64_t t, const float *logit, const lsa_taps *taps,
                         workspace *ws, float *o) {
    const lsa_engine *e = s->e;
    const lsa_teacher_config *c = &e->c;
    const layer_weights *w = &e->layer[l];
    const layer_state *st = &s->layer[l];
    const int64_t pos = s->pos + t, D = c->head_dim, n_win = lsa_min_i64(pos + 1, c->window);
    const float *win = st->win + (c->window + t - n_win + 1) * D, *q = s->q + t * c->n_head * D;
    int64_t n_row = n_win, n_vis = 0;
    int32_t n_sel = 0, n_miss = 0;
    for (int64_t i = 0; i < n_win; i++) ws->row[i] = win + i * D;
    if (c->kind[l] == LSA_LAYER_HCA) {
        n_vis = (pos + 1) / c->ratio[l];
        for (int64_t i = 0; i < n_vis; i++) ws->row[n_row++] = st->row + i * D;
    } else if (c->kind[l] == LSA_LAYER_CSA) {
        n_vis = lsa_visible(pos);
        n_sel = choose(s, l, pos, logit, n_vis, ws, taps, &n_miss);
        for (int32_t i = 0; i < n_sel; i++) ws->row[n_row++] = st->row + ws->sel[i] * D;
    }
    float sink = lsa_attend_rows(e, w, q, ws->row, n_row, ws->score, o);
    if (c->kind[l] != LSA_LAYER_CSA || !taps || !taps->csa) return;

    float in_window = 0.0f;
    const float f = 1.0f / (float)c->n_head;
    for (int64_t i = 0; i < n_row; i++) {
        float m = 0.0f;
        for (int64_t h = 0; h < c->n_head; h++) m += ws->score[h * n_row + i];
        if (i < n_win)
            in_window += m * f;
        else
            ws->mass[i - n_win] = m * f;
    }
    for (int32_t i = 0; i < n_sel; i++) ws->sel_logit[i] = logit[ws->sel[i]];
    lsa_csa_ord ord = {c->csa_ord[l]};
    bool dense = taps->want_dense && taps->want_dense(taps->user, ord, pos);
    if (dense) lsa_dense_mass(e, w, q, ws->row, n_win, st->row, n_vis, ws->score, ws->dense);
    lsa_tap_csa tap = {.ord = ord,
                       .layer = {l},
                       .position = pos,
                       .n_visible = n_vis,
                       .hidden = s->x + t * c->hidden,
                       .logit = logit,
                       .n_sel = n_sel,
                       .sel = ws->sel,
                       .sel_logit = ws->sel_logit,
                       .mass = ws->mass,
                       .window_mass = in_window,
                       .sink_mass = sink,
                       .n_miss = n_miss,
                       .iq = s->iq + t * c->index_n_head * c->index_head_dim,
                       .iw = s->iw + t * c->index_n_head,
                       .dense_mass = dense ? ws->dense : NULL};
    taps->csa(taps->user, &tap);
}

/* Region "attend": attention and MoE of tokens [t0, t0+n). */
static void attend(lsa_session *s, int32_t l, const int32_t *token, int64_t t0, int64_t n,
                   const lsa_taps *taps, workspace *ws) {
    const lsa_engine *e = s->e;
    const lsa_teacher_config *c = &e->c;
    const layer_weights *w = &e->layer[l];
    const int64_t d = c->hidden, HD = (int64_t)c->n_head * c->head_dim, ns = c->hc_mult, nz = ns * (ns + 2);
    const int64_t G = c->o_groups, gw = HD / G, R = c->o_rank, ld = s->max_chunk + 1;
    const float *cs = (c->kind[l] == LSA_LAYER_WINDOW ? s->cs_main : s->cs_comp) + t0 * c->rope_dim;
    const bool csa = c->kind[l] == LSA_LAYER_CSA;
    float *X = s->X + t0 * ns * d, *x = s->x + t0 * d, *coef = s->coef + t0 * nz;

    if (csa && !s->o.attend_all)
        lsa_index_logits(e, &s->layer[l], s->iq + t0 * c->index_n_head * c->index_head_dim,
                         s->iw + t0 * c->index_n_head, n, lsa_visible(s->pos + t0 + n - 1), ws->tile,
                         ws->logit, ld);
    for (int64_t t = 0; t < n; t++) {
        float *o = ws->o + t * HD;
        attend_token(s, l, t0 + t, ws->logit + t * ld, taps, ws, o);
        for (int64_t h = 0; h < c->n_head; h++)
            lsa_rotate(o + h * c->head_dim, c->head_dim, cs + t * c->rope_dim, c->rope_dim / 2, -1.0f);
    }
    for (int64_t g = 0; g < G; g++)
        lsa_gemm_nt(n, R, gw, 1.0f, ws->o + g * gw, HD, w->wo_a + g * R * gw, gw, 0.0f, ws->g + g * R, G * R);
    lsa_gemm_nt(n, d, G * R, 1.0f, ws->g, G * R, w->wo_b, G * R, 0.0f, ws->y, d);
    lsa_mhc_expand(e, coef, ws->y, n, X);

    lsa_mhc_collapse(e, &w->hc_ffn, X, n, ws->z, coef, x);
    for (int64_t t = 0; t < n; t++) lsa_rms(x + t * d, x + t * d, w->ffn_norm, d, c->norm_eps);
    lsa_moe(e, l, x, token + t0, s->pos + t0, n, ws, taps, ws->y);
    lsa_mhc_expand(e, coef, ws->y, n, X);
}

/* ---- the call ---- */

static void start_tokens(lsa_session *s, const int32_t *token, int64_t t0, int64_t n) {
    const lsa_engine *e = s->e;
    const int64_t d = e->c.hidden, ns = e->c.hc_mult;
    for (int64_t t = t0; t < t0 + n; t++) {
        for (int64_t j = 0; j < ns; j++)
            memcpy(s->X + (t * ns + j) * d, e->embed + token[t] * d, (size_t)d * sizeof(float));
        lsa_rope_angles(s->cs_main + t * e->c.rope_dim, e->freq_main, e->c.rope_dim / 2, s->pos + t);
        lsa_rope_angles(s->cs_comp + t * e->c.rope_dim, e->freq_comp, e->c.rope_dim / 2, s->pos + t);
    }
}

static void finish_tokens(lsa_session *s, int64_t t0, int64_t n, workspace *ws, float *logits) {
    const lsa_engine *e = s->e;
    const int64_t d = e->c.hidden, V = e->c.vocab;
    lsa_mhc_head(e, s->X + t0 * e->c.hc_mult * d, n, ws->z, ws->y);
    for (int64_t t = 0; t < n; t++) lsa_rms(ws->y + t * d, ws->y + t * d, e->norm, d, e->c.norm_eps);
    lsa_gemm_nt(n, V, d, 1.0f, ws->y, d, e->head, d, 0.0f, logits, V);
}

/* Moves the last rows of the call to the front, where the next call expects them. */
static void keep_history(lsa_session *s, int64_t n) {
    const lsa_teacher_config *c = &s->e->c;
    for (int32_t l = 0; l < c->n_layer; l++) {
        layer_state *t = &s->layer[l];
        const int64_t D = c->head_dim,
                      kc = 2 * (int64_t)s->e->layer[l].comp.roles * s->e->layer[l].comp.width;
        memmove(t->win, t->win + n * D, (size_t)(c->window * D) * sizeof(float));
        if (t->proj) memmove(t->proj, t->proj + n * kc, (size_t)(t->hist * kc) * sizeof(float));
        if (t->iproj)
            memmove(t->iproj, t->iproj + n * 4 * c->index_head_dim,
                    (size_t)(t->hist * 4 * c->index_head_dim) * sizeof(float));
    }
}

lsa_status lsa_session_forward(lsa_session *s, const int32_t *token, int64_t n, float *logits, bool last_only,
                               const lsa_taps *taps, lsa_err *err) {
    const lsa_teacher_config *c = &s->e->c;
    if (n < 0 || n > s->o.chunk || s->pos + n > s->o.max_tokens)
        LSA_RET_FAIL(LSA_E_ARG, "forward: %lld tokens at position %lld; at most %lld a call and %lld in all",
                     (long long)n, (long long)s->pos, (long long)s->o.chunk, (long long)s->o.max_tokens);
    for (int64_t t = 0; t < n; t++)
        if (token[t] < 0 || token[t] >= c->vocab)
            LSA_RET_FAIL(LSA_E_ARG, "token %d at position %lld is outside the vocabulary [0, %d)", token[t],
                         (long long)(s->pos + t), c->vocab);
    if (n == 0) return LSA_OK;
    lsa_status st = ws_need(s, omp_in_parallel() ? 1 : omp_get_max_threads(), err);
    if (st != LSA_OK) return st;
    const int64_t n_block = lsa_ceil_div(n, LSA_BLOCK);
#define EACH_BLOCK(call)                                                                                     \
    _Pragma("omp for schedule(dynamic, 1)") for (int64_t b = 0; b < n_block; b++) {                          \
        int64_t t0 = b * LSA_BLOCK, m = lsa_min_i64(LSA_BLOCK, n - t0);                                      \
        call;                                                                                                \
    }
#pragma omp parallel if (n_block > 1)
    {
        workspace *ws = &s->ws[omp_in_parallel() && s->n_ws > 1 ? omp_get_thread_num() : 0];
        EACH_BLOCK(start_tokens(s, token, t0, m))
        for (int32_t l = 0; l < c->n_layer; l++) {
            EACH_BLOCK(project(s, l, t0, m, t0 + m == n, ws))
            if (c->ratio[l]) {
                const int64_t first = s->pos / c->ratio[l], last = (s->pos + n) / c->ratio[l];
#pragma omp for schedule(static)
                for (int64_t i = first; i < last; i++) compress(s, l, i);
            }
            EACH_BLOCK(attend(s, l, token, t0, m, taps, ws))
        }
        if (logits && !last_only) {
            EACH_BLOCK(finish_tokens(s, t0, m, ws, logits + t0 * c->vocab))
        }
    }
    if (logits && last_only) finish_tokens(s, n - 1, 1, &s->ws[0], logits);
    keep_history(s, n);
    s->pos += n;
    return LSA_OK;
}
