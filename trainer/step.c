/* The step: see step.h. NUMERIC: losses come back as one double per row and are added on the host in row
 * order. */
#include "trainer/step.h"

#include <math.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/ops.h"

struct lsa_trainer {
    lsa_ctx *ctx;
    const lsa_recipe *r;
    lsa_indexer_geom g;
    int64_t n_param;
    float *p, *grad, *m, *v, *freq;
    int64_t updates; /* AdamW's t, without skipped steps */
    /* batch arrays, grown when a batch needs more */
    int64_t cap_m, cap_mn, cap_key, cap_cand;
    float *x[LSA_MAX_CSA];
    lsa_indexer_act act[LSA_MAX_CSA];
    uint8_t *key[LSA_MAX_CSA];
    int64_t *position, *key_base;
    int32_t *n_cand, *cand;
    float *y, *weight, *row_weight, *z, *dz, *dq, *dw, *du;
    double *row_loss, *norm;
    double *host_loss;
};

double lsa_lr(const lsa_recipe *r, int64_t step) {
    if (step < r->warmup) return r->lr * (double)(step + 1) / (double)r->warmup;
    if (r->schedule == LSA_SCHED_CONSTANT) return r->lr;
    const int64_t span = lsa_max_i64(1, r->steps - r->warmup);
    const double x = fmin(1.0, (double)(step - r->warmup) / (double)span);
    return r->min_lr + 0.5 * (r->lr - r->min_lr) * (1.0 + cos(3.14159265358979323846 * x));
}

lsa_status lsa_trainer_create(lsa_trainer **out, lsa_ctx *ctx, const lsa_recipe *r, const lsa_indexer_geom *g,
                              const float *params, const float *m, const float *v, int64_t updates,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_trainer *t = NULL;
    float freq[64];
    *out = NULL;
    LSA_TRY(LSA_NEW(t, 1, err));
    t->ctx = ctx;
    t->r = r;
    t->g = *g;
    t->updates = updates;
    t->n_param = lsa_indexer_n_param(g);
    const size_t bytes = (size_t)t->n_param * sizeof(float);
    LSA_TRY(LSA_CTX_NEW(ctx, t->p, t->n_param, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->grad, t->n_param, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->m, t->n_param, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->v, t->n_param, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->norm, 1, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->freq, 64, err));
    lsa_rope_freqs(freq, &g->rope);
    LSA_TRY(lsa_ctx_upload(ctx, t->freq, freq, (size_t)(g->rope.dim / 2) * sizeof *freq, err));
    LSA_TRY(lsa_ctx_upload(ctx, t->p, params, bytes, err));
    if (m) LSA_TRY(lsa_ctx_upload(ctx, t->m, m, bytes, err));
    if (v) LSA_TRY(lsa_ctx_upload(ctx, t->v, v, bytes, err));
    *out = t;
    t = NULL;
done:
    lsa_trainer_destroy(t);
    return st;
}

void lsa_trainer_destroy(lsa_trainer *t) {
    if (!t) return;
    for (int32_t l = 0; l < LSA_MAX_CSA; l++) {
        void *p[] = {t->x[l], t->act[l].a, t->act[l].rstd, t->act[l].u, t->act[l].q, t->act[l].w, t->key[l]};
        for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(t->ctx, p[i]);
    }
    void *p[] = {t->p,        t->grad,   t->m,          t->v,    t->freq,    t->norm,   t->position,
                 t->key_base, t->n_cand, t->row_weight, t->cand, t->y,       t->weight, t->z,
                 t->dz,       t->dq,     t->dw,         t->du,   t->row_loss};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(t->ctx, p[i]);
    lsa_free(t->host_loss);
    lsa_free(t);
}

int64_t lsa_trainer_updates(const lsa_trainer *t) {
    return t->updates;
}

lsa_status lsa_trainer_get(lsa_trainer *t, float *params, float *m, float *v, lsa_err *err) {
    lsa_status st = LSA_OK;
    const size_t bytes = (size_t)t->n_param * sizeof(float);
    if (params) LSA_TRY(lsa_ctx_download(t->ctx, params, t->p, bytes, err));
    if (m) LSA_TRY(lsa_ctx_download(t->ctx, m, t->m, bytes, err));
    if (v) LSA_TRY(lsa_ctx_download(t->ctx, v, t->v, bytes, err));
done:
    return st;
}

lsa_status lsa_trainer_grad(lsa_trainer *t, float *grad, lsa_err *err) {
    return lsa_ctx_download(t->ctx, grad, t->grad, (size_t)t->n_param * sizeof *grad, err);
}

#define ROOM(p, n)                                                                                           \
    do {                                                                                                     \
        lsa_ctx_free(t->ctx, p);                                                                             \
        (p) = NULL;                                                                                          \
        LSA_TRY(LSA_CTX_NEW(t->ctx, p, n, err));                                                             \
    } while (0)

static lsa_status room(lsa_trainer *t, const lsa_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t d = t->g.hidden, r = t->g.rank, H = t->g.n_head, m = b->m;
    if (m > t->cap_m) {
        for (int32_t l = 0; l < t->g.n_layer; l++) {
            ROOM(t->x[l], m * d);
            ROOM(t->act[l].a, m * r);
            ROOM(t->act[l].rstd, m);
            ROOM(t->act[l].u, m * r);
            ROOM(t->act[l].q, m * H * 128);
            ROOM(t->act[l].w, m * H);
        }
        ROOM(t->position, m);
        ROOM(t->key_base, m);
        ROOM(t->n_cand, m);
        ROOM(t->row_weight, m);
        ROOM(t->dq, m * H * 128);
        ROOM(t->dw, m * H);
        ROOM(t->du, m * r);
        ROOM(t->row_loss, m);
        lsa_free(t->host_loss);
        LSA_TRY(LSA_NEW(t->host_loss, m, err));
        t->cap_m = m;
    }
    if (m * b->n > t->cap_mn) {
        ROOM(t->y, m * b->n);
        ROOM(t->weight, m * b->n);
        ROOM(t->z, m * b->n);
        ROOM(t->dz, m * b->n);
        t->cap_mn = m * b->n;
    }
    if (b->has_cand && m * b->n > t->cap_cand) {
        ROOM(t->cand, m * b->n);
        t->cap_cand = m * b->n;
    }
    if (b->n_key > t->cap_key) {
        for (int32_t l = 0; l < t->g.n_layer; l++) ROOM(t->key[l], b->n_key * LSA_KEY_BYTES);
        t->cap_key = b->n_key;
    }
done:
    return st;
}

static lsa_status upload_queries(lsa_trainer *t, const lsa_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    const size_t m = (size_t)b->m;
    LSA_TRY(room(t, b, err));
    for (int32_t l = 0; l < t->g.n_layer; l++) {
        LSA_TRY(lsa_ctx_upload(t->ctx, t->x[l], b->x[l], m * (size_t)t->g.hidden * sizeof(float), err));
        LSA_TRY(lsa_ctx_upload(t->ctx, t->key[l], b->key[l], (size_t)b->n_key * LSA_KEY_BYTES, err));
    }
    LSA_TRY(lsa_ctx_upload(t->ctx, t->position, b->position, m * sizeof *b->position, err));
    LSA_TRY(lsa_ctx_upload(t->ctx, t->key_base, b->key_base, m * sizeof *b->key_base, err));
    LSA_TRY(lsa_ctx_upload(t->ctx, t->n_cand, b->n_cand, m * sizeof *b->n_cand, err));
    if (b->has_cand)
        LSA_TRY(lsa_ctx_upload(t->ctx, t->cand, b->cand, m * (size_t)b->n * sizeof *b->cand, err));
done:
    return st;
}

static lsa_status query(lsa_trainer *t, const lsa_batch *b, int32_t l, lsa_err *err) {
    return lsa_indexer_query(t->ctx, &t->g, t->p, l, b->m, t->x[l], t->position, t->freq, &t->act[l], err);
}

static lsa_status score(lsa_trainer *t, const lsa_batch *b, int32_t l, bool accumulate, lsa_err *err) {
    return lsa_indexer_score_fwd(t->ctx,
                                 &(lsa_indexer_score_fwd_args){b->m, t->g.n_head, 128, b->n, b->n_key,
                                                               t->act[l].q, t->act[l].w, t->key[l],
                                                               t->key_base, b->has_cand ? t->cand : NULL,
                                                               t->n_cand, accumulate, t->z},
                                 err);
}

/* What pointwise losses are divided by. */
static double elements(const lsa_recipe *r, const lsa_batch *b) {
    return fmax(1.0,
                r->balance ? (1.0 + r->neg_ratio) * (double)b->count.n_balanced : (double)b->count.n_elem);
}

/* Loss of t->z into t->dz; adds the rows' losses to *loss. */
static lsa_status loss(lsa_trainer *t, const lsa_batch *b, double part, double *sum, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_recipe *r = t->r;
    switch (r->loss) {
    case LSA_LOSS_KL:
        LSA_TRY(lsa_loss_kl(
            t->ctx,
            &(lsa_loss_kl_args){b->m, b->n,
                                (float)(part / (b->count.row_weights > 0 ? b->count.row_weights : 1.0)), t->z,
                                t->y, r->by_mass ? t->row_weight : NULL, t->n_cand, t->dz, t->row_loss},
            err));
        break;
    case LSA_LOSS_BCE:
    case LSA_LOSS_FOCAL:
        LSA_TRY(lsa_loss_pointwise(t->ctx,
                                   &(lsa_loss_pointwise_args){b->m, b->n, r->loss == LSA_LOSS_FOCAL,
                                                              (float)r->smoothing,
                                                              (float)(part / elements(r, b)), t->z, t->y,
                                                              t->weight, t->n_cand, t->dz, t->row_loss},
                                   err));
        break;
    default:
        LSA_TRY(lsa_loss_pairwise(
            t->ctx,
            &(lsa_loss_pairwise_args){b->m, b->n, r->loss == LSA_LOSS_MARGIN, (float)r->margin,
                                      (float)(part / (double)lsa_max_i64(1, b->count.n_pair)), t->z, t->y,
                                      t->n_cand, t->dz, t->row_loss},
            err));
    }
    LSA_TRY(lsa_ctx_download(t->ctx, t->host_loss, t->row_loss, (size_t)b->m * sizeof *t->host_loss, err));
    for (int64_t i = 0; i < b->m; i++) *sum += t->host_loss[i];
done:
    return st;
}

static lsa_status backward(lsa_trainer *t, const lsa_batch *b, int32_t l, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_indexer_score_bwd(t->ctx,
                                  &(lsa_indexer_score_bwd_args){b->m, t->g.n_head, 128, b->n, b->n_key,
                                                                t->act[l].q, t->act[l].w, t->key[l],
                                                                t->key_base, b->has_cand ? t->cand : NULL,
                                                                t->n_cand, t->dz, t->dq, t->dw},
                                  err));
    LSA_TRY(lsa_indexer_query_bwd(t->ctx, &t->g, t->p, t->grad, l, b->m, t->x[l], t->position, t->freq,
                                  &t->act[l], t->dq, t->dw, t->du, false, err));
done:
    return st;
}

static lsa_status update(lsa_trainer *t, double lr, double scale, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_recipe *r = t->r;
    t->updates++;
    for (int32_t l = 0; l < t->g.n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_at(&t->g, l, (lsa_indexer_part)p);
            const double wd = p == LSA_Q_NORM && !r->decay_norm ? 0.0 : r->weight_decay;
            LSA_TRY(lsa_adamw(t->ctx,
                              &(lsa_adamw_args){x.n, t->updates, (float)lr, (float)r->beta1, (float)r->beta2,
                                                (float)r->eps, (float)wd, (float)scale, t->grad + x.offset,
                                                t->p + x.offset, t->m + x.offset, t->v + x.offset},
                              err));
        }
done:
    return st;
}

lsa_status lsa_trainer_step(lsa_step_result *out, lsa_trainer *t, const lsa_batch *b, int64_t step,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    const int32_t L = t->g.n_layer;
    double norm2 = 0;
    *out = (lsa_step_result){.lr = lsa_lr(t->r, step)};
    LSA_TRY(upload_queries(t, b, err));
    LSA_TRY(lsa_ctx_upload(t->ctx, t->y, b->y, (size_t)(b->m * b->n) * sizeof *b->y, err));
    if (t->r->loss == LSA_LOSS_KL && t->r->by_mass)
        LSA_TRY(
            lsa_ctx_upload(t->ctx, t->row_weight, b->row_weight, (size_t)b->m * sizeof *b->row_weight, err));
    if (t->r->loss != LSA_LOSS_KL)
        LSA_TRY(lsa_ctx_upload(t->ctx, t->weight, b->weight, (size_t)(b->m * b->n) * sizeof *b->weight, err));
    for (int32_t l = 0; l < L; l++) LSA_TRY(query(t, b, l, err));
    if (t->r->ensemble == LSA_ON_SUM) {
        for (int32_t l = 0; l < L; l++) LSA_TRY(score(t, b, l, l > 0, err));
        LSA_TRY(loss(t, b, 1.0, &out->loss, err));
        for (int32_t l = 0; l < L; l++) LSA_TRY(backward(t, b, l, err));
    } else {
        for (int32_t l = 0; l < L; l++) {
            LSA_TRY(score(t, b, l, false, err));
            LSA_TRY(loss(t, b, 1.0 / L, &out->loss, err));
            LSA_TRY(backward(t, b, l, err));
        }
    }
    LSA_TRY(lsa_sumsq(t->ctx, &(lsa_sumsq_args){t->n_param, t->grad, t->norm}, err));
    LSA_TRY(lsa_ctx_download(t->ctx, &norm2, t->norm, sizeof norm2, err));
    out->grad_norm = sqrt(norm2);
    out->skipped = !isfinite(out->loss) || !isfinite(out->grad_norm);
    if (out->skipped) goto done;
    const double scale =
        t->r->clip > 0 && out->grad_norm > t->r->clip ? t->r->clip / (out->grad_norm + 1e-6) : 1.0;
    LSA_TRY(update(t, out->lr, scale, err));
done:
    return st;
}

lsa_status lsa_trainer_score(lsa_trainer *t, const lsa_batch *b, float *z, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(upload_queries(t, b, err));
    for (int32_t l = 0; l < t->g.n_layer; l++) {
        LSA_TRY(query(t, b, l, err));
        LSA_TRY(score(t, b, l, false, err));
        LSA_TRY(lsa_ctx_download(t->ctx, z + l * b->m * b->n, t->z, (size_t)(b->m * b->n) * sizeof *z, err));
    }
done:
    return st;
}
