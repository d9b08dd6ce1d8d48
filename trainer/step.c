/* The step: see step.h. NUMERIC: losses come back as one double per row and are added on the host in row
 * order. */
#include "trainer/step.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/hash.h"
#include "kernels/ops.h"
#include "trainer/observer.h"
#include "trainer/reduce.h"

struct lsa_trainer {
    lsa_ctx *ctx;
    lsa_comm *comm;     /* NULL: one rank */
    lsa_reduce *reduce; /* NULL: one rank with one part, or a GPU */
    int64_t n_part;     /* gradients formed apart */
    bool sharded;       /* m and v hold this rank's slices only */
    const lsa_recipe *r;
    lsa_indexer_geom g;
    int64_t n_param;
    float *p, *grad, *m, *v, *freq;
    int64_t updates; /* AdamW's t, without skipped steps */
    /* batch arrays, grown when a batch needs more */
    int64_t cap_m, cap_mn, cap_key, cap_cand;
    float *recent, *memory; /* features of the observed mass; NULL without a prior */
    float *x[LSA_MAX_CSA];
    lsa_indexer_act act[LSA_MAX_CSA];
    uint8_t *key[LSA_MAX_CSA];
    int64_t *position, *key_base;
    int32_t *n_cand, *cand;
    float *y, *weight, *row_weight, *z, *dz, *dq, *dw, *du;
    float *zc;     /* continued scores, then their gradient; NULL without a continuation */
    uint8_t *from; /* the distance that won */
    double *row_loss, *norm;
    float *host_z; /* with a prior: the summed logits */
    int64_t cap_host_z;
    double *host_loss, *part_loss; /* part_loss [n_part] */
};

double lsa_lr(const lsa_recipe *r, int64_t step) {
    if (step < r->warmup) return r->lr * (double)(step + 1) / (double)r->warmup;
    if (r->schedule == LSA_SCHED_CONSTANT) return r->lr;
    const int64_t span = lsa_max_i64(1, r->steps - r->warmup);
    const double x = fmin(1.0, (double)(step - r->warmup) / (double)span);
    return r->min_lr + 0.5 * (r->lr - r->min_lr) * (1.0 + cos(3.14159265358979323846 * x));
}

/* Moments from host memory: all, or this rank's slices. */
static lsa_status upload_moments(lsa_trainer *t, float *to, const float *from, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_slice *s;
    if (!from) goto done;
    if (!t->sharded) {
        LSA_TRY(lsa_ctx_upload(t->ctx, to, from, (size_t)t->n_param * sizeof *to, err));
        goto done;
    }
    const int64_t n = lsa_reduce_slices(t->reduce, &s);
    for (int64_t i = 0; i < n; i++)
        LSA_TRY(lsa_ctx_upload(t->ctx, to + s[i].at, from + s[i].begin,
                               (size_t)(s[i].end - s[i].begin) * sizeof *to, err));
done:
    return st;
}

lsa_status lsa_trainer_create(lsa_trainer **out, lsa_ctx *ctx, lsa_comm *comm, int64_t n_shard,
                              const lsa_recipe *r, const lsa_indexer_geom *g, const float *params,
                              const float *m, const float *v, int64_t updates, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_trainer *t = NULL;
    float freq[64];
    const bool host = lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA, many = comm && lsa_comm_size(comm) > 1;
    *out = NULL;
    if (!host && many)
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "train.precision f32 works on one GPU; several take bf16 or fp8 (or pass --device cpu)");
    LSA_TRY(LSA_NEW(t, 1, err));
    t->ctx = ctx;
    t->comm = comm;
    t->r = r;
    t->g = *g;
    t->updates = updates;
    t->n_param = lsa_indexer_n_param(g);
    t->n_part = host && comm ? n_shard : 1;
    t->sharded = r->zero1 && many;
    if (t->n_part > 1 || many)
        LSA_TRY(lsa_reduce_create(&t->reduce, comm, g, (int)t->n_part, t->sharded, err));
    const int64_t n_moment = t->sharded ? lsa_reduce_owned(t->reduce) : t->n_param;
    LSA_TRY(LSA_CTX_NEW(ctx, t->p, t->n_param, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->grad, t->n_param, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->m, n_moment, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->v, n_moment, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->norm, 1, err));
    LSA_TRY(LSA_CTX_NEW(ctx, t->freq, 64, err));
    LSA_TRY(LSA_NEW(t->part_loss, t->n_part, err));
    lsa_rope_freqs(freq, &g->rope);
    LSA_TRY(lsa_ctx_upload(ctx, t->freq, freq, (size_t)(g->rope.dim / 2) * sizeof *freq, err));
    LSA_TRY(lsa_ctx_upload(ctx, t->p, params, (size_t)t->n_param * sizeof *params, err));
    LSA_TRY(upload_moments(t, t->m, m, err));
    LSA_TRY(upload_moments(t, t->v, v, err));
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
    void *p[] = {t->p,      t->grad,       t->m,        t->v,  t->freq,   t->norm,   t->position, t->key_base,
                 t->n_cand, t->row_weight, t->cand,     t->y,  t->weight, t->z,      t->dz,       t->dq,
                 t->dw,     t->du,         t->row_loss, t->zc, t->from,   t->recent, t->memory};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_ctx_free(t->ctx, p[i]);
    lsa_free(t->host_loss);
    lsa_free(t->host_z);
    lsa_free(t->part_loss);
    lsa_reduce_destroy(t->reduce);
    lsa_free(t);
}

int64_t lsa_trainer_updates(const lsa_trainer *t) {
    return t->updates;
}

lsa_status lsa_trainer_get(lsa_trainer *t, float *params, float *m, float *v, lsa_err *err) {
    lsa_status st = LSA_OK;
    const size_t bytes = (size_t)t->n_param * sizeof(float);
    if (params) LSA_TRY(lsa_ctx_download(t->ctx, params, t->p, bytes, err));
    if (t->sharded) {
        LSA_TRY(lsa_reduce_collect(t->reduce, t->m, m, err));
        LSA_TRY(lsa_reduce_collect(t->reduce, t->v, v, err));
        goto done;
    }
    if (m) LSA_TRY(lsa_ctx_download(t->ctx, m, t->m, bytes, err));
    if (v) LSA_TRY(lsa_ctx_download(t->ctx, v, t->v, bytes, err));
done:
    return st;
}

uint64_t lsa_trainer_hash(const lsa_trainer *t) {
    return lsa_xxh64(t->p, (size_t)t->n_param * sizeof *t->p);
}

lsa_status lsa_trainer_costs(lsa_trainer *t, float costs[LSA_MAX_REACH], lsa_err *err) {
    return t->g.reach ? lsa_ctx_download(t->ctx, costs, t->p + lsa_indexer_costs_at(&t->g),
                                         (size_t)t->g.reach * sizeof *costs, err)
                      : LSA_OK;
}

lsa_status lsa_trainer_prior(lsa_trainer *t, float weight[LSA_PRIOR_WEIGHTS], lsa_err *err) {
    return t->g.prior ? lsa_ctx_download(t->ctx, weight, t->p + lsa_indexer_prior_at(&t->g),
                                         LSA_PRIOR_WEIGHTS * sizeof *weight, err)
                      : LSA_OK;
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
        if (t->g.reach) ROOM(t->zc, m * b->n);
        if (t->g.reach) ROOM(t->from, m * b->n);
        if (t->g.prior) ROOM(t->recent, m * b->n);
        if (t->g.prior) ROOM(t->memory, m * b->n);
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

/* The activations from row i on. */
static lsa_indexer_act act_at(const lsa_trainer *t, int32_t l, int64_t i) {
    const lsa_indexer_act *a = &t->act[l];
    const int64_t r = t->g.rank, H = t->g.n_head;
    return (lsa_indexer_act){a->a + i * r, a->rstd + i, a->u + i * r, a->q + i * H * 128, a->w + i * H};
}

static lsa_status query_rows(lsa_trainer *t, int32_t l, int64_t i, int64_t m, lsa_err *err) {
    const lsa_indexer_act act = act_at(t, l, i);
    return lsa_indexer_query(t->ctx, &t->g, t->p, l, m, t->x[l] + i * t->g.hidden, t->position + i, t->freq,
                             &act, err);
}

/* Work on one part of a batch of m rows a part. */
typedef lsa_status (*part_fn)(lsa_trainer *t, int32_t l, int64_t p, int64_t m, lsa_err *err);

/* NUMERIC: part by part, because a matrix product may round a row differently among other rows. With enough
 * parts for the threads, parts run at the same time; else the threads work inside each. */
static lsa_status each_part(lsa_trainer *t, int32_t l, int64_t m, part_fn f, lsa_err *err) {
    lsa_status st = LSA_OK;
    const bool apart = t->n_part > 1 && 2 * t->n_part > omp_get_max_threads();
#pragma omp parallel for schedule(dynamic, 1) if (apart)
    for (int64_t p = 0; p < t->n_part; p++) {
        lsa_err why = {0};
        const lsa_status got = f(t, l, p, m, &why);
        if (got != LSA_OK) {
#pragma omp critical
            {
                st = got;
                if (err && err->code == LSA_OK) *err = why;
            }
        }
    }
    return st;
}

static lsa_status query_part(lsa_trainer *t, int32_t l, int64_t p, int64_t m, lsa_err *err) {
    return query_rows(t, l, p * m, m, err);
}

static lsa_status query(lsa_trainer *t, const lsa_batch *b, int32_t l, lsa_err *err) {
    return each_part(t, l, b->m / t->n_part, query_part, err);
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
static double elements(const lsa_recipe *r, const lsa_batch_counts *n) {
    return fmax(1.0, r->balance ? (1.0 + r->neg_ratio) * (double)n->n_balanced : (double)n->n_elem);
}

/* Counts of the batches of all ranks, added in the order of the virtual shards. */
static lsa_status all_counts(lsa_batch_counts *out, lsa_trainer *t, const lsa_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_batch_counts *all = NULL;
    *out = b->count;
    if (!t->comm || lsa_comm_size(t->comm) == 1) return LSA_OK;
    const int64_t n = lsa_comm_size(t->comm) * b->n_shard;
    LSA_TRY(LSA_NEW(all, n, err));
    LSA_TRY(lsa_comm_all_gather(t->comm, b->shard, all, b->n_shard * (int64_t)sizeof *all, err));
    *out = (lsa_batch_counts){0};
    for (int64_t i = 0; i < n; i++) lsa_batch_counts_add(out, &all[i]);
done:
    lsa_free(all);
    return st;
}

/* Loss of z into dz; adds the rows' losses to their parts'. n: counts of the whole step. */
static lsa_status loss(lsa_trainer *t, const lsa_batch *b, const lsa_batch_counts *n, double part,
                       const float *z, float *dz, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_recipe *r = t->r;
    switch (r->loss) {
    case LSA_LOSS_KL:
        LSA_TRY(lsa_loss_kl(
            t->ctx,
            &(lsa_loss_kl_args){b->m, b->n, (float)(part / (n->row_weights > 0 ? n->row_weights : 1.0)), z,
                                t->y, r->by_mass ? t->row_weight : NULL, t->n_cand, dz, t->row_loss},
            err));
        break;
    case LSA_LOSS_BCE:
    case LSA_LOSS_FOCAL:
        LSA_TRY(
            lsa_loss_pointwise(t->ctx,
                               &(lsa_loss_pointwise_args){b->m, b->n, r->loss == LSA_LOSS_FOCAL,
                                                          (float)r->smoothing, (float)(part / elements(r, n)),
                                                          z, t->y, t->weight, t->n_cand, dz, t->row_loss},
                               err));
        break;
    default:
        LSA_TRY(lsa_loss_pairwise(t->ctx,
                                  &(lsa_loss_pairwise_args){b->m, b->n, r->loss == LSA_LOSS_MARGIN,
                                                            (float)r->margin,
                                                            (float)(part / (double)lsa_max_i64(1, n->n_pair)),
                                                            z, t->y, t->n_cand, dz, t->row_loss},
                                  err));
    }
    LSA_TRY(lsa_ctx_download(t->ctx, t->host_loss, t->row_loss, (size_t)b->m * sizeof *t->host_loss, err));
    for (int64_t i = 0; i < b->m; i++) t->part_loss[i / (b->m / t->n_part)] += t->host_loss[i];
done:
    return st;
}

/* The weight gradient of one part, into its buffer. */
static lsa_status backward_part(lsa_trainer *t, int32_t l, int64_t p, int64_t m, lsa_err *err) {
    const lsa_indexer_act act = act_at(t, l, p * m);
    lsa_indexer_geom one = t->g; /* of this layer alone: the buffer begins with its parameters */
    one.n_layer = 1;
    one.reach = 0;
    one.prior = false;
    return lsa_indexer_query_bwd(t->ctx, &one, t->p + lsa_indexer_tensor_at(&t->g, l, LSA_WQ_A).offset,
                                 lsa_reduce_part(t->reduce, (int)p), 0, m, t->x[l] + p * m * t->g.hidden,
                                 t->position + p * m, t->freq, &act, t->dq + p * m * t->g.n_head * 128,
                                 t->dw + p * m * t->g.n_head, t->du + p * m * t->g.rank, false, err);
}

static lsa_status backward(lsa_trainer *t, const lsa_batch *b, int32_t l, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_indexer_score_bwd(t->ctx,
                                  &(lsa_indexer_score_bwd_args){b->m, t->g.n_head, 128, b->n, b->n_key,
                                                                t->act[l].q, t->act[l].w, t->key[l],
                                                                t->key_base, b->has_cand ? t->cand : NULL,
                                                                t->n_cand, t->dz, t->dq, t->dw},
                                  err));
    if (t->comm) lsa_comm_tick(t->comm, "training");
    if (t->reduce) {
        LSA_TRY(each_part(t, l, b->m / t->n_part, backward_part, err));
        LSA_TRY(lsa_reduce_layer(t->reduce, l, t->grad, err));
    } else {
        LSA_TRY(lsa_indexer_query_bwd(t->ctx, &t->g, t->p, t->grad, l, b->m, t->x[l], t->position, t->freq,
                                      &t->act[l], t->dq, t->dw, t->du, false, err));
    }
done:
    return st;
}

/* ---- prior and continuation: parameters behind all layers, rows apart from each other as everywhere ---- */

static lsa_status add_prior(lsa_trainer *t, const lsa_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    const size_t bytes = (size_t)(b->m * b->n) * sizeof(float);
    float weight[LSA_PRIOR_WEIGHTS], cost[LSA_MAX_REACH];
    if (b->m * b->n > t->cap_host_z) {
        lsa_free(t->host_z);
        t->host_z = NULL;
        LSA_TRY(LSA_NEW(t->host_z, b->m * b->n, err));
        t->cap_host_z = b->m * b->n;
    }
    LSA_TRY(lsa_ctx_download(t->ctx, t->host_z, t->z, bytes, err));
    LSA_TRY(lsa_trainer_prior(t, weight, err));
    LSA_TRY(lsa_trainer_costs(t, cost, err));
    LSA_TRY(lsa_observe(NULL, b, &(lsa_observe_args){t->host_z, 1, 0, t->r->budget, weight, cost, t->g.reach},
                        err));
    LSA_TRY(lsa_ctx_upload(t->ctx, t->recent, b->recent, bytes, err));
    LSA_TRY(lsa_ctx_upload(t->ctx, t->memory, b->memory, bytes, err));
    LSA_TRY(lsa_prior_fwd(t->ctx,
                          &(lsa_prior_fwd_args){b->m, b->n, t->recent, t->memory,
                                                t->p + lsa_indexer_prior_at(&t->g), t->n_cand, t->z},
                          err));
done:
    return st;
}

static lsa_status continue_scores(lsa_trainer *t, const lsa_batch *b, lsa_err *err) {
    return lsa_continuation_fwd(t->ctx,
                                &(lsa_continuation_fwd_args){b->m, b->n, t->g.reach, t->z,
                                                             t->p + lsa_indexer_costs_at(&t->g), t->n_cand,
                                                             t->zc, t->from},
                                err);
}

/* Rows [i, i + m): t->zc (the gradient) into t->dz, and the gradient of the costs into dcost. */
static lsa_status lend_rows(lsa_trainer *t, int64_t n, int64_t i, int64_t m, float *dcost, lsa_err *err) {
    return lsa_continuation_bwd(t->ctx,
                                &(lsa_continuation_bwd_args){m, n, t->g.reach, t->from + i * n, t->zc + i * n,
                                                             t->n_cand + i, t->dz + i * n, dcost},
                                err);
}

/* Rows [i, i + m): the gradient of what the loss saw into t->dz, and of everything behind the layers into d.
 */
static lsa_status extra_rows(lsa_trainer *t, int64_t n, int64_t i, int64_t m, float *d, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (t->g.reach) LSA_TRY(lend_rows(t, n, i, m, d, err));
    if (t->g.prior)
        LSA_TRY(lsa_prior_bwd(t->ctx,
                              &(lsa_prior_bwd_args){m, n, t->recent + i * n, t->memory + i * n, t->dz + i * n,
                                                    t->n_cand + i, d + t->g.reach},
                              err));
done:
    return st;
}

static lsa_status extra_backward(lsa_trainer *t, const lsa_batch *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t m = b->m / t->n_part;
    if (!t->reduce) return extra_rows(t, b->n, 0, b->m, t->grad + lsa_indexer_costs_at(&t->g), err);
    for (int64_t p = 0; p < t->n_part; p++)
        LSA_TRY(extra_rows(t, b->n, p * m, m, lsa_reduce_part(t->reduce, (int)p), err));
    LSA_TRY(lsa_reduce_layer(t->reduce, t->g.n_layer, t->grad, err));
done:
    return st;
}

/* Costs [begin, end) of the flat parameters back to where they are defined. */
static lsa_status project_costs(lsa_trainer *t, int64_t begin, int64_t end, lsa_err *err) {
    lsa_status st = LSA_OK;
    float b[LSA_MAX_REACH];
    const size_t bytes = (size_t)(end - begin) * sizeof *b;
    LSA_TRY(lsa_ctx_download(t->ctx, b, t->p + begin, bytes, err));
    for (int64_t j = 0; j < end - begin; j++)
        if (b[j] < 0) b[j] = 0;
    LSA_TRY(lsa_ctx_upload(t->ctx, t->p + begin, b, bytes, err));
done:
    return st;
}

/* AdamW on elements [begin, end) of tensor `no`; their moments begin at `at`. */
static lsa_status update_range(lsa_trainer *t, int64_t no, int64_t begin, int64_t end, int64_t at, double lr,
                               double scale, lsa_err *err) {
    const lsa_recipe *r = t->r;
    const bool extra = begin >= lsa_indexer_costs_at(&t->g), norm = no % LSA_INDEXER_PARTS == LSA_Q_NORM;
    const double wd = extra || (norm && !r->decay_norm) ? 0.0 : r->weight_decay;
    return lsa_adamw(t->ctx,
                     &(lsa_adamw_args){end - begin, t->updates, (float)lr, (float)r->beta1, (float)r->beta2,
                                       (float)r->eps, (float)wd, (float)scale, t->grad + begin, t->p + begin,
                                       t->m + at, t->v + at},
                     err);
}

static lsa_status update(lsa_trainer *t, double lr, double scale, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_slice whole = {0, t->n_param, 0}, *slice = &whole;
    const int64_t n = t->sharded ? lsa_reduce_slices(t->reduce, &slice) : 1;
    t->updates++;
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < lsa_indexer_n_tensor(&t->g); k++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_no(&t->g, k);
            const int64_t begin = lsa_max_i64(slice[i].begin, x.offset),
                          end = lsa_min_i64(slice[i].end, x.offset + x.n);
            if (begin >= end) continue;
            LSA_TRY(update_range(t, k, begin, end, slice[i].at + begin - slice[i].begin, lr, scale, err));
            if (begin >= lsa_indexer_costs_at(&t->g) && begin < lsa_indexer_prior_at(&t->g))
                LSA_TRY(project_costs(t, begin, end, err));
        }
    if (t->sharded) LSA_TRY(lsa_reduce_share(t->reduce, t->p, err));
done:
    return st;
}

/* Loss and gradient norm over all parts of all ranks. */
static lsa_status totals(lsa_step_result *out, lsa_trainer *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    double norm2 = 0;
    if (t->reduce) {
        LSA_TRY(lsa_reduce_totals(&norm2, &out->loss, t->reduce, t->grad, t->part_loss, err));
    } else {
        out->loss = t->part_loss[0];
        LSA_TRY(lsa_sumsq(t->ctx, &(lsa_sumsq_args){t->n_param, t->grad, t->norm}, err));
        LSA_TRY(lsa_ctx_download(t->ctx, &norm2, t->norm, sizeof norm2, err));
    }
    out->grad_norm = sqrt(norm2);
done:
    return st;
}

lsa_status lsa_trainer_step(lsa_step_result *out, lsa_trainer *t, const lsa_batch *b, int64_t step,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    const int32_t L = t->g.n_layer;
    lsa_batch_counts n;
    *out = (lsa_step_result){.lr = lsa_lr(t->r, step)};
    memset(t->part_loss, 0, (size_t)t->n_part * sizeof *t->part_loss);
    LSA_TRY(all_counts(&n, t, b, err));
    LSA_TRY(upload_queries(t, b, err));
    LSA_TRY(lsa_ctx_upload(t->ctx, t->y, b->y, (size_t)(b->m * b->n) * sizeof *b->y, err));
    if (t->r->loss == LSA_LOSS_KL && t->r->by_mass)
        LSA_TRY(
            lsa_ctx_upload(t->ctx, t->row_weight, b->row_weight, (size_t)b->m * sizeof *b->row_weight, err));
    if (t->r->loss != LSA_LOSS_KL)
        LSA_TRY(lsa_ctx_upload(t->ctx, t->weight, b->weight, (size_t)(b->m * b->n) * sizeof *b->weight, err));
    for (int32_t l = 0; l < L; l++) LSA_TRY(query(t, b, l, err));
    if (t->comm) lsa_comm_tick(t->comm, "training");
    if (t->r->ensemble == LSA_ON_SUM) {
        for (int32_t l = 0; l < L; l++) LSA_TRY(score(t, b, l, l > 0, err));
        if (t->g.prior) LSA_TRY(add_prior(t, b, err));
        if (t->g.reach) LSA_TRY(continue_scores(t, b, err));
        LSA_TRY(t->g.reach ? loss(t, b, &n, 1.0, t->zc, t->zc, err) : loss(t, b, &n, 1.0, t->z, t->dz, err));
        if (lsa_indexer_n_extra(&t->g)) LSA_TRY(extra_backward(t, b, err));
        for (int32_t l = 0; l < L; l++) LSA_TRY(backward(t, b, l, err));
    } else {
        for (int32_t l = 0; l < L; l++) {
            LSA_TRY(score(t, b, l, false, err));
            LSA_TRY(loss(t, b, &n, 1.0 / L, t->z, t->dz, err));
            LSA_TRY(backward(t, b, l, err));
        }
    }
    LSA_TRY(totals(out, t, err));
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
        LSA_TRY(query_rows(t, l, 0, b->m, err));
        LSA_TRY(score(t, b, l, false, err));
        LSA_TRY(lsa_ctx_download(t->ctx, z + l * b->m * b->n, t->z, (size_t)(b->m * b->n) * sizeof *z, err));
    }
done:
    return st;
}
