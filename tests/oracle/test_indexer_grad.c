/* The indexer and its losses against PyTorch autograd in float64 (tests/oracle/make_indexer_fixtures.py), and
 * `ref` against finite differences of itself. Backend: LSA_BACKEND (ref by default here: it is the truth of
 * all op tests). */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "kernels/model/indexer.h"
#include "kernels/ops.h"
#include "tests/testkit/fixture.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/tol.h"

enum { D = 128 };
static const char *const PART[LSA_INDEXER_PARTS] = {"wq_a", "wq_b", "q_norm", "w_proj"};
static lsa_st *g_fixture;

static const char *device(void) {
    return getenv("LSA_BACKEND") ? lsa_gen_backend() : "ref";
}
static void ok(lsa_status st, const lsa_err *err) {
    if (st != LSA_OK) fail_msg("%s", err->msg);
}

/* ---- a net on a backend ---- */
typedef struct net {
    const char *name;
    lsa_indexer_geom g;
    int64_t m, n, n_key, n_param;
    lsa_ctx *c;
    float *p, *grad, *freq, *x, *y, *weight, *target, *z[2], *dz, *dq, *dw, *du;
    lsa_indexer_act act[2];
    uint8_t *key[2];
    int64_t *position, *key_base;
    int32_t *n_cand, *cand;
    double *row_loss;
} net;

/* A fixture tensor in backend memory. */
static void *up(net *t, lsa_dtype dtype, size_t item, const char *what) {
    int64_t n;
    void *host = lsa_fixture_get(g_fixture, dtype, &n, "%s.%s", t->name, what), *dev = NULL;
    lsa_err err = {0};
    ok(lsa_ctx_alloc_(t->c, &dev, n, item, what, &err), &err);
    ok(lsa_ctx_upload(t->c, dev, host, (size_t)n * item, &err), &err);
    free(host);
    return dev;
}
#define ROOM(p, n) ok(LSA_CTX_NEW(t->c, p, n, &err), &err)

static void open_net(net *t, const char *name) {
    lsa_err err = {0};
    int64_t n_shape;
    memset(t, 0, sizeof *t);
    t->name = name;
    t->c = lsa_gen_ctx(device());
    int64_t *shape = lsa_fixture_get(g_fixture, LSA_I64, &n_shape, "%s.shape", name);
    assert_int_equal(n_shape, 7);
    t->g = (lsa_indexer_geom){
        .hidden = (int32_t)shape[0],
        .n_head = (int32_t)shape[1],
        .head_dim = D,
        .rank = (int32_t)shape[2],
        .eps = 1e-6f,
        .n_layer = (int32_t)shape[3],
        .rope = {
            .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1}};
    for (int32_t l = 0; l < t->g.n_layer; l++) t->g.ord[l].v = l, t->g.id[l].v = 2 * l + 1;
    t->m = shape[4], t->n = shape[5], t->n_key = shape[6];
    free(shape);
    t->n_param = lsa_indexer_n_param(&t->g);
    float *host = LSA_GEN_NEW(float, t->n_param);
    for (int32_t l = 0; l < t->g.n_layer; l++)
        for (int k = 0; k < LSA_INDEXER_PARTS; k++) {
            const lsa_indexer_tensor at = lsa_indexer_tensor_at(&t->g, l, (lsa_indexer_part)k);
            int64_t n;
            float *v = lsa_fixture_get(g_fixture, LSA_F32, &n, "%s.l%d.%s", name, l, PART[k]);
            assert_int_equal(n, at.n);
            memcpy(host + at.offset, v, (size_t)n * sizeof *v);
            free(v);
        }
    ROOM(t->p, t->n_param);
    ok(lsa_ctx_upload(t->c, t->p, host, (size_t)t->n_param * 4, &err), &err);
    free(host);
    t->x = up(t, LSA_F32, 4, "x"), t->freq = up(t, LSA_F32, 4, "freq"), t->y = up(t, LSA_F32, 4, "y");
    t->weight = up(t, LSA_F32, 4, "vote_weight"), t->target = up(t, LSA_F32, 4, "target");
    t->position = up(t, LSA_I64, 8, "position"), t->key_base = up(t, LSA_I64, 8, "key_base");
    t->n_cand = up(t, LSA_I32, 4, "n_cand"), t->cand = up(t, LSA_I32, 4, "cand");
    for (int32_t l = 0; l < t->g.n_layer; l++) {
        char what[16];
        snprintf(what, sizeof what, "keys%d", l);
        t->key[l] = up(t, LSA_U8, 1, what);
        ROOM(t->act[l].a, t->m * t->g.rank);
        ROOM(t->act[l].rstd, t->m);
        ROOM(t->act[l].u, t->m * t->g.rank);
        ROOM(t->act[l].q, t->m * t->g.n_head * D);
        ROOM(t->act[l].w, t->m * t->g.n_head);
        ROOM(t->z[l], t->m * t->n);
    }
    ROOM(t->grad, t->n_param);
    ROOM(t->dz, t->m * t->n);
    ROOM(t->dq, t->m * t->g.n_head * D);
    ROOM(t->dw, t->m * t->g.n_head);
    ROOM(t->du, t->m * t->g.rank);
    ROOM(t->row_loss, t->m);
}
static void close_net(net *t) {
    void *p[] = {t->p,  t->grad, t->freq, t->x,        t->y,        t->weight, t->target, t->dz,
                 t->dq, t->dw,   t->du,   t->position, t->key_base, t->n_cand, t->cand,   t->row_loss};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(t->c, p[i]);
    for (int32_t l = 0; l < t->g.n_layer; l++) {
        void *q[] = {t->act[l].a, t->act[l].rstd, t->act[l].u, t->act[l].q, t->act[l].w, t->z[l], t->key[l]};
        for (size_t i = 0; i < sizeof q / sizeof *q; i++) lsa_ctx_free(t->c, q[i]);
    }
}

static void query(net *t, int32_t l) {
    lsa_err err = {0};
    ok(lsa_indexer_query(t->c, &t->g, t->p, l, t->m, t->x, t->position, t->freq, &t->act[l], &err), &err);
}
static void score(net *t, int32_t l, float *z, bool add) {
    lsa_err err = {0};
    ok(lsa_indexer_score_fwd(t->c,
                             &(lsa_indexer_score_fwd_args){t->m, t->g.n_head, D, t->n, t->n_key, t->act[l].q,
                                                           t->act[l].w, t->key[l], t->key_base, t->cand,
                                                           t->n_cand, add, z},
                             &err),
       &err);
}
static void backward(net *t, int32_t l) {
    lsa_err err = {0};
    ok(lsa_indexer_score_bwd(t->c,
                             &(lsa_indexer_score_bwd_args){t->m, t->g.n_head, D, t->n, t->n_key, t->act[l].q,
                                                           t->act[l].w, t->key[l], t->key_base, t->cand,
                                                           t->n_cand, t->dz, t->dq, t->dw},
                             &err),
       &err);
    ok(lsa_indexer_query_bwd(t->c, &t->g, t->p, t->grad, l, t->m, t->x, t->position, t->freq, &t->act[l],
                             t->dq, t->dw, t->du, false, &err),
       &err);
}

/* ---- losses by name ---- */
typedef struct loss_case {
    const char *name;
    enum { POINT, PAIR, KL } kind;
    bool focal, weighted, margin, summed;
    float smoothing;
} loss_case;
static const loss_case LOSS[] = {{"bce", POINT, false, false, false, false, 0},
                                 {"bce_votes", POINT, false, true, false, false, 0},
                                 {"focal", POINT, true, false, false, false, 0},
                                 {"focal_smooth", POINT, true, false, false, false, 0.1f},
                                 {"bce_weight_smooth", POINT, false, true, false, false, 0.1f},
                                 {"focal_weight_smooth", POINT, true, true, false, false, 0.1f},
                                 {"bpr", PAIR, false, false, false, false, 0},
                                 {"margin", PAIR, false, false, true, false, 0},
                                 {"kl", KL, false, false, false, false, 0},
                                 {"kl_weight", KL, false, true, false, false, 0},
                                 {"kl_sum", KL, false, false, false, true, 0}};

/* Loss of z [m,n] into dz and row_loss. weight: elements (pointwise) or rows (kl), used where the case says
 * so. */
static void loss(lsa_ctx *c, const loss_case *k, int64_t m, int64_t n, float scale, const float *z,
                 const float *y, const float *weight, const float *target, const int32_t *n_cand, float *dz,
                 double *row_loss) {
    lsa_err err = {0};
    const float *w = k->weighted ? weight : NULL;
    if (k->kind == POINT)
        ok(lsa_loss_pointwise(
               c,
               &(lsa_loss_pointwise_args){m, n, k->focal, k->smoothing, scale, z, y, w, n_cand, dz, row_loss},
               &err),
           &err);
    else if (k->kind == PAIR)
        ok(lsa_loss_pairwise(
               c, &(lsa_loss_pairwise_args){m, n, k->margin, 1.0f, scale, z, y, n_cand, dz, row_loss}, &err),
           &err);
    else
        ok(lsa_loss_kl(c, &(lsa_loss_kl_args){m, n, scale, z, target, w, n_cand, dz, row_loss}, &err), &err);
}

static void close_to(const char *what, const float *a, const char *fixture) {
    int64_t n;
    float *b = lsa_fixture_get(g_fixture, LSA_F32, &n, "%s", fixture);
    if (!lsa_compare_f32(what, a, b, n, lsa_tol_oracle())) fail_msg("%s", fixture);
    free(b);
}

static double add_rows(net *t) {
    lsa_err err = {0};
    double *rows = LSA_GEN_NEW(double, t->m), sum = 0;
    ok(lsa_ctx_download(t->c, rows, t->row_loss, (size_t)t->m * 8, &err), &err);
    for (int64_t i = 0; i < t->m; i++) sum += rows[i];
    free(rows);
    return sum;
}

/* Forward and backward of one loss; returns it. t->grad holds the gradient. */
static double step(net *t, const loss_case *k, float scale) {
    double sum = 0;
    for (int32_t l = 0; l < t->g.n_layer; l++) query(t, l);
    for (int32_t l = 0; l < t->g.n_layer; l++) {
        score(t, l, t->z[k->summed ? 0 : l], k->summed && l > 0);
        if (k->summed && l + 1 < t->g.n_layer) continue;
        loss(t->c, k, t->m, t->n, scale, t->z[k->summed ? 0 : l], t->y, t->weight, t->target, t->n_cand,
             t->dz, t->row_loss);
        sum += add_rows(t);
        for (int32_t b = k->summed ? 0 : l; b <= l; b++) backward(t, b);
    }
    return sum;
}

static int check_net(const char *name) {
    net net_, *t = &net_;
    lsa_err err = {0};
    int cases = 0;
    open_net(t, name);
    float *z = LSA_GEN_NEW(float, t->m * t->n), *grad = LSA_GEN_NEW(float, t->n_param);
    for (int32_t l = 0; l < t->g.n_layer; l++) {
        char what[64];
        query(t, l);
        score(t, l, t->z[l], false);
        ok(lsa_ctx_download(t->c, z, t->z[l], (size_t)(t->m * t->n) * 4, &err), &err);
        snprintf(what, sizeof what, "%s.z%d", name, l);
        close_to("logits", z, what);
    }
    for (size_t i = 0; i < sizeof LOSS / sizeof *LOSS; i++) {
        double *scale = lsa_fixture_find(g_fixture, LSA_F64, NULL, "%s.%s.scale", name, LOSS[i].name);
        if (!scale) continue;
        double *want = lsa_fixture_get(g_fixture, LSA_F64, NULL, "%s.%s.loss", name, LOSS[i].name);
        const double got = step(t, &LOSS[i], (float)*scale);
        if (!(fabs(got - *want) <= 1e-5 * fabs(*want)))
            fail_msg("%s %s: loss %.9g, PyTorch %.9g", name, LOSS[i].name, got, *want);
        ok(lsa_ctx_download(t->c, grad, t->grad, (size_t)t->n_param * 4, &err), &err);
        for (int32_t l = 0; l < t->g.n_layer; l++)
            for (int k = 0; k < LSA_INDEXER_PARTS; k++) {
                char what[96];
                snprintf(what, sizeof what, "%s.%s.l%d.d_%s", name, LOSS[i].name, l, PART[k]);
                close_to("gradient", grad + lsa_indexer_tensor_at(&t->g, l, (lsa_indexer_part)k).offset,
                         what);
            }
        free(scale), free(want);
        cases++;
    }
    free(z), free(grad);
    close_net(t);
    return cases;
}

static void test_whole_indexer(void **state) {
    (void)state;
    assert_int_equal(check_net("wide"), 1);
    assert_int_equal(check_net("joint"), 8);
}

static void test_losses_alone(void **state) {
    (void)state;
    int cases = 0;
    int64_t *shape = lsa_fixture_get(g_fixture, LSA_I64, NULL, "alone.shape");
    const int64_t m = shape[0], n = shape[1];
    double *scale = lsa_fixture_get(g_fixture, LSA_F64, NULL, "alone.scale");
    float *z = lsa_fixture_get(g_fixture, LSA_F32, NULL, "alone.z"),
          *y = lsa_fixture_get(g_fixture, LSA_F32, NULL, "alone.y"),
          *weight = lsa_fixture_get(g_fixture, LSA_F32, NULL, "alone.weight"),
          *target = lsa_fixture_get(g_fixture, LSA_F32, NULL, "alone.target"),
          *row_weight = lsa_fixture_get(g_fixture, LSA_F32, NULL, "alone.row_weight");
    int32_t *n_cand = lsa_fixture_get(g_fixture, LSA_I32, NULL, "alone.n_cand");
    for (size_t i = 0; i < sizeof LOSS / sizeof *LOSS; i++) {
        double *want = lsa_fixture_find(g_fixture, LSA_F64, NULL, "alone.%s.rows", LOSS[i].name);
        if (!want) continue;
        lsa_rig r;
        float *dz = LSA_GEN_NEW(float, m *n);
        double *rows = LSA_GEN_NEW(double, m);
        char what[64];
        lsa_rig_open(&r, device(), 0);
        const float *w =
            LOSS[i].kind == KL ? lsa_rig_in(&r, row_weight, m, 4) : lsa_rig_in(&r, weight, m * n, 4);
        loss(r.ctx, &LOSS[i], m, n, (float)*scale, lsa_rig_in(&r, z, m * n, 4), lsa_rig_in(&r, y, m * n, 4),
             w, lsa_rig_in(&r, target, m * n, 4), lsa_rig_in(&r, n_cand, m, 4), lsa_rig_out(&r, dz, m * n, 4),
             lsa_rig_out(&r, rows, m, 8));
        lsa_rig_close(&r);
        snprintf(what, sizeof what, "alone.%s.dz", LOSS[i].name);
        close_to("dz", dz, what);
        if (!lsa_compare_f64(LOSS[i].name, rows, want, m, (lsa_tol){1e-12, 1e-5, 0}))
            fail_msg("rows of %s", LOSS[i].name);
        free(dz), free(rows), free(want);
        cases++;
    }
    assert_int_equal(cases, 8);
    free(shape), free(scale), free(z), free(y), free(weight), free(target), free(row_weight), free(n_cand);
}

static void test_small_ops(void **state) {
    (void)state;
    lsa_rig r;
    lsa_err err = {0};
    int64_t *s = lsa_fixture_get(g_fixture, LSA_I64, NULL, "norm.shape");
    const int64_t m = s[0], n = s[1];
    float *x = lsa_fixture_get(g_fixture, LSA_F32, NULL, "norm.x"),
          *g = lsa_fixture_get(g_fixture, LSA_F32, NULL, "norm.g"),
          *dy = lsa_fixture_get(g_fixture, LSA_F32, NULL, "norm.dy"), *y = LSA_GEN_NEW(float, m *n),
          *rstd = LSA_GEN_NEW(float, m), *dx = LSA_GEN_NEW(float, m *n), *dg = LSA_GEN_NEW(float, n);
    lsa_rig_open(&r, device(), 0);
    const float *dx_in = lsa_rig_in(&r, x, m * n, 4), *g_in = lsa_rig_in(&r, g, n, 4);
    float *rstd_out = lsa_rig_out(&r, rstd, m, 4);
    ok(lsa_rmsnorm_fwd(
           r.ctx, &(lsa_rmsnorm_fwd_args){m, n, 1e-6f, dx_in, g_in, lsa_rig_out(&r, y, m * n, 4), rstd_out},
           &err),
       &err);
    ok(lsa_rmsnorm_bwd(r.ctx,
                       &(lsa_rmsnorm_bwd_args){m, n, dx_in, g_in, rstd_out, lsa_rig_in(&r, dy, m * n, 4),
                                               lsa_rig_out(&r, dx, m * n, 4), lsa_rig_out(&r, dg, n, 4),
                                               false},
                       &err),
       &err);
    lsa_rig_close(&r);
    close_to("norm y", y, "norm.y");
    close_to("norm rstd", rstd, "norm.rstd");
    close_to("norm dx", dx, "norm.dx");
    close_to("norm dg", dg, "norm.dg");
    free(s), free(x), free(g), free(dy), free(y), free(rstd), free(dx), free(dg);

    s = lsa_fixture_get(g_fixture, LSA_I64, NULL, "rope.shape");
    int64_t *position = lsa_fixture_get(g_fixture, LSA_I64, NULL, "rope.position");
    float *freq = lsa_fixture_get(g_fixture, LSA_F32, NULL, "rope.freq");
    const lsa_rope rope = {
        .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    float mine[64];
    lsa_rope_freqs(mine, &rope);
    assert_true(lsa_compare_f32("frequencies", mine, freq, rope.dim / 2, (lsa_tol){0, 3e-7, 0}));
    for (int inverse = 0; inverse < 2; inverse++) {
        float *q = lsa_fixture_get(g_fixture, LSA_F32, NULL, inverse ? "rope.dout" : "rope.q");
        lsa_rig_open(&r, device(), 0);
        ok(lsa_rope_hadamard(r.ctx,
                             &(lsa_rope_hadamard_args){s[0], s[1], s[2], s[3], inverse,
                                                       lsa_rig_in(&r, position, s[0], 8),
                                                       lsa_rig_in(&r, freq, s[3] / 2, 4),
                                                       lsa_rig_inout(&r, q, s[0] * s[1] * s[2], 4)},
                             &err),
           &err);
        lsa_rig_close(&r);
        close_to("rope", q, inverse ? "rope.dq" : "rope.out");
        free(q);
    }
    free(s), free(position), free(freq);
}

static void test_adamw(void **state) {
    (void)state;
    lsa_err err = {0};
    int64_t *s = lsa_fixture_get(g_fixture, LSA_I64, NULL, "adamw.shape");
    const int64_t n = s[0], steps = s[1];
    double *c = lsa_fixture_get(g_fixture, LSA_F64, NULL, "adamw.const");
    float *p = lsa_fixture_get(g_fixture, LSA_F32, NULL, "adamw.p0"),
          *g = lsa_fixture_get(g_fixture, LSA_F32, NULL, "adamw.g"), *m = LSA_GEN_NEW(float, n),
          *v = LSA_GEN_NEW(float, n);
    for (int64_t t = 1; t <= steps; t++) {
        lsa_rig r;
        char what[32];
        lsa_rig_open(&r, device(), 0);
        ok(lsa_adamw(r.ctx,
                     &(lsa_adamw_args){n, t, (float)c[0], (float)c[1], (float)c[2], (float)c[3], (float)c[4],
                                       (float)c[5], lsa_rig_in(&r, g + (t - 1) * n, n, 4),
                                       lsa_rig_inout(&r, p, n, 4), lsa_rig_inout(&r, m, n, 4),
                                       lsa_rig_inout(&r, v, n, 4)},
                     &err),
           &err);
        lsa_rig_close(&r);
        snprintf(what, sizeof what, "adamw.p%d", (int)t);
        close_to("parameters", p, what);
    }
    close_to("first moment", m, "adamw.m");
    close_to("second moment", v, "adamw.v");
    free(s), free(c), free(p), free(g), free(m), free(v);
}

/* Central differences of the whole loss, one tensor at a time, along a random direction: the slope must be
 * the gradient's projection. The forward pass rounds to f32 and the ReLU has kinks, so the bound is 1 % of
 * the gradient's norm (seen: 0.1 %); what it guards against is an oracle that shares our misunderstanding
 * of a formula. */
static void test_finite_differences(void **state) {
    (void)state;
    net net_, *t = &net_;
    lsa_err err = {0};
    double worst = 0;
    open_net(t, "joint");
    const double h = 1e-4;
    const float scale = 0.1f;
    lsa_rng rng = lsa_rng_make(99, 1);
    float *p0 = LSA_GEN_NEW(float, t->n_param), *p = LSA_GEN_NEW(float, t->n_param),
          *grad = LSA_GEN_NEW(float, t->n_param), *dir = LSA_GEN_NEW(float, t->n_param);
    ok(lsa_ctx_download(t->c, p0, t->p, (size_t)t->n_param * 4, &err), &err);
    for (size_t i = 0; i < sizeof LOSS / sizeof *LOSS; i++) {
        if (LOSS[i].kind == KL && LOSS[i].weighted) continue; /* row weights: another shape, checked alone */
        ok(lsa_ctx_upload(t->c, t->p, p0, (size_t)t->n_param * 4, &err), &err);
        (void)step(t, &LOSS[i], scale);
        ok(lsa_ctx_download(t->c, grad, t->grad, (size_t)t->n_param * 4, &err), &err);
        for (int part = 0; part < LSA_INDEXER_PARTS * t->g.n_layer; part++) {
            const lsa_indexer_tensor at = lsa_indexer_tensor_at(&t->g, part / LSA_INDEXER_PARTS,
                                                                (lsa_indexer_part)(part % LSA_INDEXER_PARTS));
            double want = 0, norm = 0, value[2];
            lsa_gen_fill(dir, at.n, 1, &rng);
            for (int64_t k = 0; k < at.n; k++) {
                const double g = (double)grad[at.offset + k];
                want += g * (double)dir[k], norm += g * g;
            }
            for (int side = 0; side < 2; side++) {
                memcpy(p, p0, (size_t)t->n_param * 4);
                for (int64_t k = 0; k < at.n; k++) p[at.offset + k] += (float)(side ? -h : h) * dir[k];
                ok(lsa_ctx_upload(t->c, t->p, p, (size_t)t->n_param * 4, &err), &err);
                value[side] = step(t, &LOSS[i], scale);
            }
            const double off = fabs((value[0] - value[1]) / (2 * h) - want) / sqrt(norm);
            if (!(off <= worst)) worst = off;
            if (!(off <= 0.01))
                fail_msg("%s, %s: slope is off by %.2g of the gradient's norm", LOSS[i].name, at.name, off);
        }
    }
    printf("largest distance of a slope from the gradient: %.2g of its norm\n", worst);
    free(p0), free(p), free(grad), free(dir);
    close_net(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_whole_indexer),
                                       cmocka_unit_test(test_losses_alone), cmocka_unit_test(test_small_ops),
                                       cmocka_unit_test(test_adamw),
                                       cmocka_unit_test(test_finite_differences)};
    g_fixture = lsa_fixture_open("tests/fixtures/indexer_grad.safetensors");
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    lsa_st_close(g_fixture);
    return rc;
}
