/* See judge_bf16.h. */
#include "tests/testkit/judge_bf16.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct rig {
    lsa_ctx *ctx;
    lsa_gpu_teacher_geom g;
    lsa_bf16_weights dev, host; /* the same weights twice */
    void *mem[64];              /* pairs: device, host */
    int n_mem;
    uint64_t seed;
    const float *freq;
} rig;

static double uniform(rig *r) {
    r->seed = r->seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(r->seed >> 40) * 0x1p-23 - 1;
}
static float widened(uint16_t b) {
    const uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
static uint16_t narrowed(double x) {
    const float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
static double rounded(double x) {
    return (double)widened(narrowed(x));
}

static void must(lsa_status st, const lsa_err *err) {
    if (st == LSA_OK) return;
    fprintf(stderr, "judge_bf16: %s\n", err->msg);
    exit(1);
}
static void *to_device(rig *r, const void *host, int64_t n, size_t size) {
    lsa_err err = {0};
    void *dev = NULL;
    must(lsa_ctx_alloc_(r->ctx, &dev, n, size, "weights", &err), &err);
    must(lsa_ctx_upload(r->ctx, dev, host, (size_t)n * size, &err), &err);
    return dev;
}
static void *keep(rig *r, void *host, int64_t n, size_t size) {
    void *const dev = to_device(r, host, n, size);
    r->mem[r->n_mem++] = dev;
    r->mem[r->n_mem++] = host;
    return dev;
}
static void matrix(rig *r, const uint16_t **dev, const uint16_t **host, int64_t rows, int64_t cols) {
    uint16_t *const x = malloc((size_t)(rows * cols) * sizeof *x);
    for (int64_t i = 0; i < rows * cols; i++) x[i] = narrowed(1.7 / sqrt((double)cols) * uniform(r));
    *host = x;
    *dev = keep(r, x, rows * cols, sizeof *x);
}
static void vector(rig *r, const float **dev, const float **host, int64_t n, double mean, double spread) {
    float *const x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(mean + spread * uniform(r));
    *host = x;
    *dev = keep(r, x, n, sizeof *x);
}

static void make_weights(rig *r, int32_t ratio, int32_t roles, bool hash) {
    const lsa_gpu_teacher_geom *g = &r->g;
    const int64_t d = g->hidden, s = g->hc_mult, nz = s * (s + 2), D = g->head_dim, Di = g->index_head_dim,
                  Hi = g->index_n_head, HD = (int64_t)g->n_head * D, M = g->moe_dim, E = g->n_expert,
                  GR = (int64_t)g->o_groups * g->o_rank, c = roles * D;
    lsa_bf16_weights *const w = &r->dev, *const h = &r->host;
    const bool csa = roles == 2;
    w->ratio = ratio, w->roles = roles;
    w->at_kv = g->q_rank;
    w->at_cv = ratio ? w->at_kv + (int32_t)D : -1;
    w->at_cg = ratio ? w->at_cv + (int32_t)c : -1;
    w->at_iv = csa ? w->at_cg + (int32_t)c : -1;
    w->at_ig = csa ? w->at_iv + 2 * (int32_t)Di : -1;
    w->at_iw = csa ? w->at_ig + 2 * (int32_t)Di : -1;
    w->nx = (int32_t)(g->q_rank + D + 2 * c + (csa ? 4 * Di + Hi : 0));
    *h = *w;
    matrix(r, &w->attn_fn, &h->attn_fn, 3 * nz, s * d); /* any three parts */
    matrix(r, &w->ffn_fn, &h->ffn_fn, 3 * nz, s * d);
    vector(r, &w->attn_base, &h->attn_base, nz, 0, 0.8);
    vector(r, &w->attn_scale, &h->attn_scale, 3, 0.7, 0.3);
    vector(r, &w->ffn_base, &h->ffn_base, nz, 0, 0.8);
    vector(r, &w->ffn_scale, &h->ffn_scale, 3, 0.7, 0.3);
    vector(r, &w->attn_norm, &h->attn_norm, d, 1, 0.3);
    vector(r, &w->ffn_norm, &h->ffn_norm, d, 1, 0.3);
    vector(r, &w->q_norm, &h->q_norm, g->q_rank, 1, 0.3);
    vector(r, &w->kv_norm, &h->kv_norm, D, 1, 0.3);
    vector(r, &w->sink, &h->sink, g->n_head, 0, 1.2);
    matrix(r, &w->wx, &h->wx, w->nx, d);
    matrix(r, &w->wq, &h->wq, HD + (csa ? Hi * Di : 0), g->q_rank);
    matrix(r, &w->wo_a, &h->wo_a, GR, HD / g->o_groups);
    matrix(r, &w->wo_b, &h->wo_b, d, GR);
    if (ratio) {
        vector(r, &w->ape, &h->ape, ratio * c, 0, 1.4);
        vector(r, &w->comp_norm, &h->comp_norm, D, 1, 0.3);
    }
    if (csa) {
        vector(r, &w->iape, &h->iape, ratio * 2 * Di, 0, 1.4);
        vector(r, &w->icomp_norm, &h->icomp_norm, Di, 1, 0.3);
    }
    matrix(r, &w->gate, &h->gate, E, d);
    if (hash) {
        const int64_t n = (int64_t)g->vocab * g->n_expert_tok;
        int64_t *const id = malloc((size_t)n * sizeof *id);
        for (int64_t i = 0; i < n; i++) id[i] = (int64_t)((uniform(r) + 1) / 2 * (double)E); /* also twice */
        h->tid2eid = id;
        w->tid2eid = keep(r, id, n, sizeof *id);
    } else {
        vector(r, &w->gate_bias, &h->gate_bias, E, 0, 0.1);
    }
    matrix(r, &w->w13, &h->w13, (E + 1) * 2 * M, d);
    matrix(r, &w->w2, &h->w2, (E + 1) * d, M);
}

/* ---- formulas ---- */

static double dot(const uint16_t *w, const double *x, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += (double)widened(w[i]) * x[i];
    return s;
}
static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}
/* x [n] = bf16(w x / rms) */
static void norm(double *x, const float *w, int64_t n, double eps) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += x[i] * x[i];
    const double f = 1 / sqrt(s / (double)n + eps);
    for (int64_t i = 0; i < n; i++) x[i] = rounded((w ? (double)w[i] : 1) * x[i] * f);
}
static void rotate(const rig *r, double *x, int64_t n, int64_t pos, int sign) {
    double *const v = x + n - r->g.rope_dim;
    for (int i = 0; i < r->g.rope_dim / 2; i++) {
        const float angle = (float)pos * r->freq[i];
        const double c = cos((double)angle), s = sign * sin((double)angle), a = v[2 * i], b = v[2 * i + 1];
        v[2 * i] = rounded(a * c - b * s);
        v[2 * i + 1] = rounded(a * s + b * c);
    }
}
static void hadamard(double *x, int64_t n) {
    for (int64_t h = 1; h < n; h *= 2)
        for (int64_t i = 0; i < n; i++)
            if (!(i & h)) {
                const double a = x[i], b = x[i + h];
                x[i] = a + b, x[i + h] = a - b;
            }
    for (int64_t i = 0; i < n; i++) x[i] = rounded(x[i] / sqrt((double)n));
}
/* Groups with a power-of-two scale: E4M3 (3 bits, from 2^-6 on) or E2M1 (1 bit, from 1 on). */
static void simulate(double *x, int64_t n, int64_t group, double least, double top, int bits, int lowest) {
    for (int64_t g = 0; g < n; g += group) {
        double most = least;
        for (int64_t i = g; i < g + group; i++) most = fmax(most, fabs(x[i]));
        const double scale = exp2(ceil(log2(most / top)));
        for (int64_t i = g; i < g + group; i++) {
            const double v = fmin(fabs(x[i]) / scale, top);
            const double step = exp2(fmax(v > 0 ? floor(log2(v)) : lowest, lowest) - bits);
            x[i] = rounded(copysign(fmin(rint(v / step) * step, top) * scale, x[i]));
        }
    }
}

/* coef [nz] and the normed collapse x [d] of streams X. */
static void collapse(const rig *r, const double *X, const uint16_t *fn, const float *base, const float *scale,
                     const float *w, double *coef, double *x) {
    const int64_t s = r->g.hc_mult, d = r->g.hidden, nz = s * (s + 2);
    double sq = 0;
    for (int64_t i = 0; i < s * d; i++) sq += X[i] * X[i];
    const double f = 1 / sqrt(sq / (double)(s * d) + (double)r->g.norm_eps), eps = (double)r->g.hc_eps;
    for (int64_t i = 0; i < nz; i++) {
        double z = 0;
        for (int part = 0; part < 3; part++) z += dot(fn + (part * nz + i) * s * d, X, s * d);
        z = z * f * (double)scale[i < s ? 0 : i < 2 * s ? 1 : 2] + (double)base[i];
        coef[i] = i < s ? sigmoid(z) + 1e-6 : i < 2 * s ? 2 * sigmoid(z) : z;
    }
    double *const C = coef + 2 * s;
    for (int64_t j = 0; j < s; j++) {
        double sum = 0;
        for (int64_t k = 0; k < s; k++) sum += C[j * s + k] = exp(C[j * s + k]);
        for (int64_t k = 0; k < s; k++) C[j * s + k] = C[j * s + k] / sum + eps;
    }
    for (int it = 0; it < r->g.hc_iters; it++) {
        for (int64_t j = 0; it && j < s; j++) {
            double sum = eps;
            for (int64_t k = 0; k < s; k++) sum += C[j * s + k];
            for (int64_t k = 0; k < s; k++) C[j * s + k] /= sum;
        }
        for (int64_t k = 0; k < s; k++) {
            double sum = eps;
            for (int64_t j = 0; j < s; j++) sum += C[j * s + k];
            for (int64_t j = 0; j < s; j++) C[j * s + k] /= sum;
        }
    }
    for (int64_t i = 0; i < d; i++) {
        double y = 0;
        for (int64_t j = 0; j < s; j++) y += coef[j] * X[j * d + i];
        x[i] = rounded(y);
    }
    norm(x, w, d, (double)r->g.norm_eps);
}
static void expand(const rig *r, double *X, const double *coef, const double *y) {
    const int64_t s = r->g.hc_mult, d = r->g.hidden;
    const double *const post = coef + s, *const C = post + s;
    for (int64_t i = 0; i < d; i++) {
        double out[8];
        for (int64_t k = 0; k < s; k++) {
            out[k] = post[k] * y[i];
            for (int64_t j = 0; j < s; j++) out[k] += C[j * s + k] * X[j * d + i];
        }
        for (int64_t k = 0; k < s; k++) X[k * d + i] = rounded(out[k]);
    }
}

/* Entry i from values and gates [tokens, 2 kc]. */
static void pool(const rig *r, const double *proj, int64_t i, int64_t c, const float *w, bool key,
                 double *out) {
    const int64_t ratio = r->host.ratio, roles = r->host.roles, kc = roles * c, own = i * ratio,
                  first = roles == 2 && i > 0 ? own - ratio : own;
    for (int64_t ch = 0; ch < c; ch++) {
        double sum = 0, all = 0;
        for (int64_t t = first; t < own + ratio; t++) {
            const double *const x = proj + t * 2 * kc + (roles == 2 && t >= own ? c : 0) + ch;
            const double e = exp(x[kc]);
            sum += e;
            all += e * x[0];
        }
        out[ch] = rounded(all / sum);
    }
    norm(out, w, c, (double)r->g.norm_eps);
    rotate(r, out, c, own, 1);
    if (key) hadamard(out, c);
    if (!key && r->g.sim_fp8_kv) simulate(out, c - r->g.rope_dim, 64, 1e-4, 448, 3, -6);
    if (key && r->g.sim_fp4_index) simulate(out, c, 32, 6 * 0x1p-126, 6, 1, 0);
}

static void moe(const rig *r, const double *x, int32_t token, double *y) {
    const lsa_gpu_teacher_geom *g = &r->g;
    const lsa_bf16_weights *w = &r->host;
    const int64_t d = g->hidden, M = g->moe_dim, E = g->n_expert, k = g->n_expert_tok;
    double *const score = malloc((size_t)E * sizeof *score), *const h = malloc((size_t)M * sizeof *h),
                  sum = 0;
    int64_t id[16];
    for (int64_t e = 0; e < E; e++) score[e] = sqrt(log1p(exp(dot(w->gate + e * d, x, d))));
    for (int64_t j = 0; j < k; j++) {
        id[j] = w->tid2eid ? w->tid2eid[token * k + j] : -1;
        for (int64_t e = 0; e < E && !w->tid2eid; e++) {
            bool used = false;
            for (int64_t i = 0; i < j; i++) used = used || id[i] == e;
            if (!used && (id[j] < 0 ||
                          score[e] + (double)w->gate_bias[e] > score[id[j]] + (double)w->gate_bias[id[j]]))
                id[j] = e;
        }
        sum += score[id[j]];
    }
    memset(y, 0, (size_t)d * sizeof *y);
    for (int64_t e = 0; e <= E; e++) {
        double weight = e == E ? 1 : 0;
        for (int64_t j = 0; j < k; j++)
            if (id[j] == e) weight += score[e] / sum * (double)g->route_scale;
        if (weight == 0) continue;
        for (int64_t i = 0; i < M; i++) {
            const double limit = (double)g->swiglu_limit,
                         a = fmin(rounded(dot(w->w13 + (e * 2 * M + i) * d, x, d)), limit),
                         b = fmax(-limit, fmin(limit, rounded(dot(w->w13 + (e * 2 * M + M + i) * d, x, d))));
            h[i] = rounded(weight * a * sigmoid(a) * b);
        }
        for (int64_t i = 0; i < d; i++) y[i] += rounded(dot(w->w2 + (e * d + i) * M, h, M));
    }
    for (int64_t i = 0; i < d; i++) y[i] = rounded(y[i]);
    free(score);
    free(h);
}

typedef struct document { /* what all tokens leave behind */
    double *X, *coef, *x, *xp, *win, *proj, *iproj, *row, *key;
} document;

static void project(const rig *r, document *o, int64_t n) {
    const lsa_gpu_teacher_geom *g = &r->g;
    const lsa_bf16_weights *w = &r->host;
    const int64_t d = g->hidden, s = g->hc_mult, nz = s * (s + 2), D = g->head_dim, Di = g->index_head_dim,
                  kc = w->roles * D, ikc = 2 * Di;
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t t = 0; t < n; t++) {
        double *const x = o->x + t * d, *const xp = o->xp + t * w->nx, *const kv = o->win + t * D;
        collapse(r, o->X + t * s * d, w->attn_fn, w->attn_base, w->attn_scale, w->attn_norm, o->coef + t * nz,
                 x);
        for (int64_t i = 0; i < w->nx; i++) xp[i] = dot(w->wx + i * d, x, d);
        for (int64_t i = 0; i < D; i++) kv[i] = rounded(xp[w->at_kv + i]);
        norm(kv, w->kv_norm, D, (double)g->norm_eps);
        rotate(r, kv, D, t, 1);
        if (g->sim_fp8_kv) simulate(kv, D - g->rope_dim, 64, 1e-4, 448, 3, -6);
        for (int64_t i = 0; i < kc && w->ratio; i++) {
            o->proj[t * 2 * kc + i] = xp[w->at_cv + i];
            o->proj[t * 2 * kc + kc + i] = xp[w->at_cg + i] + (double)w->ape[t % w->ratio * kc + i];
        }
        for (int64_t i = 0; i < ikc && w->roles == 2; i++) {
            o->iproj[t * 2 * ikc + i] = xp[w->at_iv + i];
            o->iproj[t * 2 * ikc + ikc + i] = xp[w->at_ig + i] + (double)w->iape[t % w->ratio * ikc + i];
        }
    }
    for (int64_t i = 0; w->ratio && i < n / w->ratio; i++) {
        pool(r, o->proj, i, D, w->comp_norm, false, o->row + i * D);
        if (w->roles == 2) pool(r, o->iproj, i, Di, w->icomp_norm, true, o->key + i * Di);
    }
}

/* One token from attention on: its streams in X; what was selected in sel (CSA), with masses. */
static void token_on(const rig *r, const document *o, int64_t t, int32_t token, double *X, int32_t *sel,
                     double *mass, double part[2]) {
    const lsa_gpu_teacher_geom *g = &r->g;
    const lsa_bf16_weights *w = &r->host;
    const int64_t d = g->hidden, s = g->hc_mult, nz = s * (s + 2), D = g->head_dim, Di = g->index_head_dim,
                  H = g->n_head, Hi = g->index_n_head, HD = H * D, width = HD / g->o_groups, R = g->o_rank,
                  GR = g->o_groups * R, n_win = t + 1 < g->window ? t + 1 : g->window,
                  visible = w->ratio ? (t + 1) / w->ratio : 0;
    const double *const xp = o->xp + t * w->nx;
    double *const qr = malloc((size_t)g->q_rank * sizeof *qr), *const q = malloc((size_t)HD * sizeof *q),
                  *const z = malloc((size_t)(visible + 1) * sizeof *z),
                  *const y = malloc((size_t)d * sizeof *y), *const og = malloc((size_t)GR * sizeof *og),
                  *const p = malloc((size_t)(n_win + visible) * sizeof *p);
    int64_t n_sel = visible;
    for (int64_t i = 0; i < g->q_rank; i++) qr[i] = rounded(xp[i]);
    norm(qr, w->q_norm, g->q_rank, (double)g->norm_eps);
    for (int64_t h = 0; h < H; h++) {
        for (int64_t i = 0; i < D; i++)
            q[h * D + i] = rounded(dot(w->wq + (h * D + i) * g->q_rank, qr, g->q_rank));
        norm(q + h * D, NULL, D, (double)g->norm_eps);
        rotate(r, q + h * D, D, t, 1);
    }
    for (int64_t k = 0; k < visible; k++) z[k] = 0, sel[k] = (int32_t)k;
    for (int64_t h = 0; h < Hi && w->roles == 2; h++) {
        double iq[1024];
        for (int64_t i = 0; i < Di; i++)
            iq[i] = rounded(dot(w->wq + (HD + h * Di + i) * g->q_rank, qr, g->q_rank));
        rotate(r, iq, Di, t, 1);
        hadamard(iq, Di);
        if (g->sim_fp4_index) simulate(iq, Di, 32, 6 * 0x1p-126, 6, 1, 0);
        const double iw = rounded(xp[w->at_iw + h]) / sqrt((double)(Hi * Di));
        for (int64_t k = 0; k < visible; k++) {
            double v = 0;
            for (int64_t i = 0; i < Di; i++) v += iq[i] * o->key[k * Di + i];
            z[k] += iw * fmax(v, 0);
        }
    }
    if (w->roles == 2 && visible > g->index_topk) {
        n_sel = 0;
        for (int64_t k = 0; k < visible; k++) {
            int64_t better = 0;
            for (int64_t j = 0; j < visible; j++) better += z[j] > z[k] || (z[j] == z[k] && j < k);
            if (better < g->index_topk) sel[n_sel++] = (int32_t)k;
        }
    }
    for (int64_t i = 0; i < n_sel; i++) mass[i] = 0;
    part[0] = part[1] = 0;
    for (int64_t h = 0; h < H; h++) {
        double most = (double)w->sink[h], sum = 0, *const head = q + h * D;
        for (int64_t i = 0; i < n_win + n_sel; i++) {
            const double *const row =
                i < n_win ? o->win + (t - n_win + 1 + i) * D : o->row + sel[i - n_win] * D;
            p[i] = 0;
            for (int64_t c = 0; c < D; c++) p[i] += head[c] * row[c];
            p[i] /= sqrt((double)D);
            most = fmax(most, p[i]);
        }
        for (int64_t i = 0; i < n_win + n_sel; i++) sum += p[i] = exp(p[i] - most);
        sum += exp((double)w->sink[h] - most);
        part[1] += exp((double)w->sink[h] - most) / sum / (double)H;
        memset(head, 0, (size_t)D * sizeof *head);
        for (int64_t i = 0; i < n_win + n_sel; i++) {
            const double *const row =
                i < n_win ? o->win + (t - n_win + 1 + i) * D : o->row + sel[i - n_win] * D;
            *(i < n_win ? part : mass + i - n_win) += p[i] / sum / (double)H;
            for (int64_t c = 0; c < D; c++) head[c] += p[i] / sum * row[c];
        }
        for (int64_t c = 0; c < D; c++) head[c] = rounded(head[c]);
        rotate(r, head, D, t, -1);
    }
    for (int64_t i = 0; i < GR; i++) og[i] = rounded(dot(w->wo_a + i * width, q + i / R * width, width));
    for (int64_t i = 0; i < d; i++) y[i] = rounded(dot(w->wo_b + i * GR, og, GR));
    memcpy(X, o->X + t * s * d, (size_t)(s * d) * sizeof *X);
    expand(r, X, o->coef + t * nz, y);
    double coef[80];
    double *const x = malloc((size_t)d * sizeof *x);
    collapse(r, X, w->ffn_fn, w->ffn_base, w->ffn_scale, w->ffn_norm, coef, x);
    moe(r, x, token, y);
    expand(r, X, coef, y);
    free(x), free(qr), free(q), free(z), free(y), free(og), free(p);
}

typedef struct verdict {
    double off, size, mass_off, mass_size;
    int64_t apart, selected, tokens, rerouted; /* rerouted: tokens that a near tie sent to another expert */
} verdict;

static void compare_token(const rig *r, const document *o, int64_t t, int32_t token, const uint16_t *got,
                          const int32_t *sel, int32_t n_sel, const float *mass, float window, float sink,
                          verdict *v) {
    const int64_t width = (int64_t)r->g.hc_mult * r->g.hidden,
                  visible = r->host.ratio ? (t + 1) / r->host.ratio : 0;
    double *const X = malloc((size_t)width * sizeof *X), *const m = malloc((size_t)(visible + 1) * sizeof *m),
                  part[2];
    int32_t *const want = malloc((size_t)(visible + 1) * sizeof *want);
    token_on(r, o, t, token, X, want, m, part);
    double off = 0, size = 0;
    for (int64_t i = 0; i < width; i++) {
        const double d = (double)widened(got[i]) - X[i];
        off += d * d;
        size += X[i] * X[i];
    }
    v->tokens++;
    if (off > 4e-4 * size) {
        v->rerouted++;
    } else {
        v->off += off;
        v->size += size;
    }
    if (r->host.roles == 2) {
        const int64_t n = visible < r->g.index_topk ? visible : r->g.index_topk;
        v->selected += n;
        if (n_sel != n) v->apart += n;
        for (int64_t i = 0, j = 0; i < n && n_sel == n; i++) {
            while (j < n && want[j] < sel[i]) j++;
            if (j == n || want[j] != sel[i]) {
                v->apart++;
                continue;
            }
            const double d = (double)mass[i] - m[j];
            v->mass_off += d * d;
            v->mass_size += m[j] * m[j];
        }
        v->mass_off += pow((double)window - part[0], 2) + pow((double)sink - part[1], 2);
        v->mass_size += part[0] * part[0] + part[1] * part[1];
    }
    free(X), free(m), free(want);
}

static double *room(int64_t n) {
    return calloc((size_t)n + 1, sizeof(double));
}

int judge_bf16(lsa_ctx *ctx, const lsa_gpu_teacher_geom *g, int32_t ratio, int32_t roles, bool hash,
               int64_t n, int64_t chunk, int64_t every) {
    lsa_err err = {0};
    if (chunk > n) chunk = n;
    rig made = {.ctx = ctx, .g = *g, .seed = (uint64_t)(n + ratio)}, *const r = &made;
    const int64_t s = g->hc_mult, d = g->hidden, width = s * d, D = g->head_dim, Di = g->index_head_dim,
                  top = g->index_topk;
    float *const freq = malloc((size_t)g->rope_dim * sizeof *freq);
    for (int i = 0; i < g->rope_dim / 2; i++) freq[i] = powf(10000, -2.0f * (float)i / (float)g->rope_dim);
    r->freq = freq;
    make_weights(r, ratio, roles, hash);
    uint16_t *const X = malloc((size_t)(n * width) * sizeof *X);
    int32_t *const token = malloc((size_t)n * sizeof *token), *const sel = malloc((size_t)(chunk * top) * 4),
                   *const n_sel = malloc((size_t)chunk * 4);
    float *const mass = malloc((size_t)(chunk * top) * 4), *const part = malloc((size_t)(2 * chunk) * 4);
    document o = {room(n * width),     room(n * s * (s + 2)), room(n * d),
                  room(n * r->dev.nx), room(n * D),           room(n * 2 * roles * D),
                  room(n * 4 * Di),    room((n / 4 + 1) * D), room((n / 4 + 1) * Di)};
    for (int64_t i = 0; i < n * width; i++) o.X[i] = (double)widened(X[i] = narrowed(1.7 * uniform(r)));
    for (int64_t i = 0; i < n; i++) token[i] = (int32_t)((i * i * 7 + 3 * i + 1) % g->vocab);
    project(r, &o, n);
    lsa_bf16 *b = NULL;
    uint16_t *dX = to_device(r, X, n * width, sizeof *X);
    int32_t *dt = to_device(r, token, n, sizeof *token);
    must(lsa_bf16_create(&b, ctx, g, freq, freq, n, chunk, &err), &err);
    verdict v = {0};
    for (int64_t p = 0; p < n; p += chunk) {
        const int64_t m = n - p < chunk ? n - p : chunk;
        must(lsa_bf16_layer(b, &r->dev, dX + p * width, dt + p, p, m, &err), &err);
        const lsa_bf16_rows rows = lsa_bf16_selected(b);
        must(lsa_ctx_download(ctx, X + p * width, dX + p * width, (size_t)(m * width) * sizeof *X, &err),
             &err);
        must(lsa_ctx_download(ctx, sel, rows.sel, (size_t)(m * top) * 4, &err), &err);
        must(lsa_ctx_download(ctx, n_sel, rows.n_sel, (size_t)m * 4, &err), &err);
        must(lsa_ctx_download(ctx, mass, rows.mass, (size_t)(m * top) * 4, &err), &err);
        must(lsa_ctx_download(ctx, part, rows.part, (size_t)(2 * chunk) * 4, &err), &err);
        for (int64_t t = (p + every - 1) / every * every; t < p + m; t += every) {
            const int64_t i = t - p;
            compare_token(r, &o, t, token[t], X + t * width, sel + i * top, n_sel[i], mass + i * top, part[i],
                          part[m + i], &v);
        }
    }
    lsa_bf16_destroy(b);
    const double rms = sqrt(v.off / v.size), mass_rms = v.mass_size > 0 ? sqrt(v.mass_off / v.mass_size) : 0,
                 apart = v.selected ? (double)v.apart / (double)v.selected : 0;
    /* orders of f32 sums flip bf16 roundings, codes of the simulations and near ties of experts and chunks */
    const bool sims = g->sim_fp8_kv || g->sim_fp4_index, ok = rms < 1e-2 && mass_rms < (sims ? 3e-2 : 1e-2) &&
                                                              apart < (sims ? 0.05 : 0.02) &&
                                                              v.rerouted <= v.tokens / 20 + 1;
    printf(
        "bf16 layer, ratio %d, %d x %d, %lld tokens by %lld%s%s: streams rms %.2g, %lld of %lld tokens apart, "
        "%.2g %% of %lld selections, masses rms %.2g%s\n",
        ratio, g->n_head, g->head_dim, (long long)n, (long long)chunk, hash ? ", experts by token" : "",
        sims ? ", simulations" : "", rms, (long long)v.rerouted, (long long)v.tokens, 100 * apart,
        (long long)v.selected, mass_rms, ok ? "" : "  FAILED");
    lsa_ctx_free(ctx, dX);
    lsa_ctx_free(ctx, dt);
    for (int i = 0; i < r->n_mem; i += 2) lsa_ctx_free(ctx, r->mem[i]), free(r->mem[i + 1]);
    free(freq), free(X), free(token), free(sel), free(n_sel), free(mass), free(part);
    free(o.X), free(o.coef), free(o.x), free(o.xp), free(o.win), free(o.proj), free(o.iproj), free(o.row),
        free(o.key);
    return !ok;
}
