/* GPU training with resident documents: see resident.h. The mistake that would stay silent: overwriting a
 * group of documents while a step that uses it is still running; a bank is refilled only after its last step
 * has ended. */
#include "trainer/resident.h"

#include <pthread.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "trainer/block.h"

enum { READERS = LSA_RESIDENT_READERS, BANKS = 2, EVAL_ROWS = 256, EVAL_Z_BYTES = 1 << 30 };

typedef struct bank {
    int64_t epoch, group; /* what it holds; -1 nothing */
    int64_t last_use;     /* number of steps launched when it was last used */
    bool filling;         /* the job has its documents */
    bool *held;           /* [n_doc] */
} bank;

typedef struct pool { /* of one virtual shard */
    bank bank[BANKS];
    int64_t epoch, group; /* asked last, and its bank */
    int32_t in_use;
} pool;

typedef struct item {
    bank *to;
    int32_t slot;
    int64_t doc, n_window;
} item;

typedef struct job { /* filling banks, of as many virtual shards as want it: a group may be one document */
    bool running;
    item *item; /* [n_doc]: a job fills at most one bank of a shard, and shards share no documents */
    int64_t n, next;
    pthread_t thread[READERS];
    int n_thread, n_started,
        n_done;           /* readers that have taken a block; threads to join; readers that ended */
    pthread_mutex_t lock; /* next, status, and the pool's calls */
    lsa_status st;
    lsa_err err;
} job;

struct lsa_resident {
    lsa_source *s;
    lsa_order *o;
    const lsa_recipe *r;
    lsa_indexer_geom g;
    int64_t n_doc;                     /* training documents: slots a bank */
    lsa_gpu_step *step, *eval, *miner; /* miner: scores training documents for hard negatives */
    lsa_comm *comm;                    /* NULL: one GPU */
    int64_t first, n_shard;            /* virtual shards of this rank */
    pool *pool;                        /* [n_shard]; slot bank * n_doc + document, whatever its shard */
    job job;
    lsa_block block[READERS];
    lsa_gpu_row *row;
    int64_t launched, taken, updates;
    double lr[LSA_GPU_FLIGHT];
    /* evaluation */
    int64_t eval_doc; /* number of documents that stay loaded, from the first asked; 0: one at a time */
    int64_t eval_first;
    bool *eval_held; /* [eval_doc] loaded already */
    lsa_gpu_eval_row *eval_row;
};

/* ---- reading ---- */

static void *reader(void *arg) {
    lsa_resident *const x = arg;
    job *const j = &x->job;
    lsa_err why = {0};
    const lsa_status begun = lsa_gpu_thread_begin(x->step, &why);
    pthread_mutex_lock(&j->lock);
    lsa_block *const block = &x->block[j->n_thread++];
    if (begun != LSA_OK) {
        j->st = begun;
        j->err = why;
    }
    while (j->next < j->n && j->st == LSA_OK) {
        const item *const i = &j->item[j->next++];
        lsa_err err = {0};
        lsa_train_doc d = {0};
        pthread_mutex_unlock(&j->lock);
        lsa_status st = lsa_source_load(&d, x->s, i->doc, &err);
        if (st == LSA_OK) st = lsa_block_build(block, x->s, x->r, &x->g, &d, i->n_window, false, &err);
        lsa_train_doc_fini(&d);
        pthread_mutex_lock(&j->lock);
        if (st == LSA_OK) st = lsa_gpu_pool_put(x->step, i->slot, &block->doc, block->data, &err);
        if (st == LSA_OK) st = lsa_gpu_pool_wait(x->step, &err);
        if (st == LSA_OK) i->to->held[i->doc] = true;
        if (st != LSA_OK && j->st == LSA_OK) {
            j->st = st;
            j->err = err;
        }
    }
    j->n_done++;
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

/* A shard's bank and the group it is to hold, into the next job; none is running. */
static lsa_status add(lsa_resident *x, int64_t v, int32_t b, int64_t epoch, int64_t group, lsa_err *err) {
    lsa_status st = LSA_OK;
    job *const j = &x->job;
    bank *const k = &x->pool[v - x->first].bank[b];
    const int64_t *doc, before = j->n, n = lsa_order_group_docs(x->o, v, epoch, group, &doc);
    k->epoch = k->group = -1;
    for (int64_t i = 0; i < n; i++) {
        item *const to = &j->item[before + i];
        *to = (item){k, (int32_t)(b * x->n_doc + doc[i]), doc[i], 0};
        LSA_TRY(lsa_source_n_window(&to->n_window, x->s, doc[i], err));
    }
    for (int64_t i = 0; i < x->n_doc; i++) {
        if (k->held[i]) LSA_TRY(lsa_gpu_pool_put(x->step, (int32_t)(b * x->n_doc + i), NULL, NULL, err));
        k->held[i] = false;
    }
    j->n = before + n;
    k->epoch = epoch;
    k->group = group;
    k->last_use = -1;
    k->filling = true;
done:
    return st;
}

static lsa_status begin(lsa_resident *x, lsa_err *err) {
    job *const j = &x->job;
    const int64_t threads = lsa_min_i64(READERS, j->n);
    j->next = 0;
    j->n_thread = j->n_done = 0;
    j->st = LSA_OK;
    for (j->n_started = 0; j->n_started < threads; j->n_started++)
        if (pthread_create(&j->thread[j->n_started], NULL, reader, x) != 0) break;
    j->running = j->n_started > 0;
    if (!j->running && j->n > 0) LSA_RET_FAIL(LSA_E_NOMEM, "cannot start a reading thread");
    return LSA_OK;
}

static lsa_status finish(lsa_resident *x, lsa_err *err) {
    job *const j = &x->job;
    if (j->n == 0) return LSA_OK; /* so it is where creating failed */
    for (int i = 0; j->running && i < j->n_started; i++) pthread_join(j->thread[i], NULL);
    const lsa_status st = j->running ? j->st : LSA_OK;
    const bool there = j->running && st == LSA_OK; /* what was added and never begun is not */
    for (int64_t i = 0; i < x->n_shard * BANKS; i++) {
        bank *const k = &x->pool[i / BANKS].bank[i % BANKS];
        if (k->filling && !there) k->epoch = k->group = -1;
        k->filling = false;
    }
    j->running = false;
    j->n = 0;
    if (st != LSA_OK && err) *err = j->err;
    return st;
}

/* The shard's bank that holds a group, if any. */
static int32_t bank_of(const lsa_resident *x, int64_t v, int64_t epoch, int64_t group) {
    const bool one = lsa_order_whole(x->o, v); /* every epoch is the same documents */
    for (int32_t b = 0; b < BANKS; b++) {
        const bank *const k = &x->pool[v - x->first].bank[b];
        if (k->epoch >= 0 && (one || (k->epoch == epoch && k->group == group))) return b;
    }
    return -1;
}

/* Into the next job: a group that no bank of its shard holds. */
static lsa_status claim(lsa_resident *x, int64_t v, int64_t epoch, int64_t group, lsa_err *err) {
    const bank *const k = x->pool[v - x->first].bank;
    const int32_t b = k[0].last_use <= k[1].last_use ? 0 : 1;
    lsa_status st = LSA_OK;
    /* order.h: a step takes no more than two groups of a shard, so none of this step's is lost */
    if (x->taken < k[b].last_use) LSA_TRY(lsa_gpu_wait(x->step, err));
    LSA_TRY(add(x, v, b, epoch, group, err));
done:
    return st;
}

/* Waits until the group is resident. If nobody has begun to read it, as in the first step, it is read now,
 * together with what the shards after v have not either of the rows from `asked` on. */
static lsa_status need(lsa_resident *x, int64_t v, const lsa_place *at, int64_t asked, int32_t *out,
                       lsa_err *err) {
    lsa_status st = LSA_OK;
    int32_t b = bank_of(x, v, at->epoch, at->group);
    if (b < 0) {
        LSA_TRY(finish(x, err));
        LSA_TRY(claim(x, v, at->epoch, at->group, err));
        for (int64_t u = v + 1; u < x->first + x->n_shard; u++) {
            lsa_place next;
            LSA_TRY(lsa_order_at(&next, x->o, u, asked, err));
            if (bank_of(x, u, next.epoch, next.group) < 0) LSA_TRY(claim(x, u, next.epoch, next.group, err));
        }
        LSA_TRY(begin(x, err));
        b = bank_of(x, v, at->epoch, at->group);
    }
    if (x->pool[v - x->first].bank[b].filling) LSA_TRY(finish(x, err));
    *out = b;
done:
    return st;
}

/* Whether all readers of the running job are done, so that another can begin. */
static bool job_over(lsa_resident *x) {
    pthread_mutex_lock(&x->job.lock);
    const bool over = x->job.n_done == x->job.n_started;
    pthread_mutex_unlock(&x->job.lock);
    return over;
}

/* Begins to read the groups after those in use, of every shard whose other bank is free. */
static lsa_status ahead(lsa_resident *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (x->job.running) {
        if (!job_over(x)) return LSA_OK;
        LSA_TRY(finish(x, err));
    }
    for (int64_t v = x->first; v < x->first + x->n_shard; v++) {
        const pool *const p = &x->pool[v - x->first];
        const bank *const other = &p->bank[1 - p->in_use];
        if (lsa_order_whole(x->o, v) || x->taken < other->last_use) continue;
        const bool last = p->group + 1 == lsa_order_groups(x->o, v, p->epoch);
        const int64_t e = p->epoch + last, g = last ? 0 : p->group + 1;
        if (other->epoch == e && other->group == g) continue;
        LSA_TRY(add(x, v, 1 - p->in_use, e, g, err));
    }
    LSA_TRY(begin(x, err));
done:
    return st;
}

/* ---- steps ---- */

lsa_gpu_opts lsa_resident_options(const lsa_recipe *r, int64_t n_slot, int64_t widest) {
    static const lsa_step_loss kind[] = {
        [LSA_LOSS_KL] = LSA_STEP_KL,   [LSA_LOSS_BCE] = LSA_STEP_BCE,       [LSA_LOSS_FOCAL] = LSA_STEP_FOCAL,
        [LSA_LOSS_BPR] = LSA_STEP_BPR, [LSA_LOSS_MARGIN] = LSA_STEP_MARGIN,
    };
    const bool sampled = r->candidates == LSA_CAND_SAMPLED;
    const int64_t most = r->max_pos + lsa_min_i64(r->max_neg, (int64_t)((double)r->max_pos * r->neg_ratio));
    return (lsa_gpu_opts){
        .batch = r->batch,
        .micro = r->micro_batch ? r->micro_batch : r->batch,
        .columns = lsa_max_i64(1, sampled ? lsa_min_i64(most, widest) : widest),
        .max_chunk = lsa_max_i64(1, widest),
        .n_slot = (int32_t)n_slot,
        .sampled = sampled,
        .max_pos = r->max_pos,
        .max_neg = r->max_neg,
        .neg_ratio = r->neg_ratio,
        .hard_share = r->hard_share,
        .hard_k = lsa_min_i64(4096, lsa_max_i64(1, (int64_t)((double)(most - r->max_pos) * r->hard_share))),
        .balance = r->balance,
        .seed = (uint64_t)r->seed,
        .loss = kind[r->loss],
        .on_sum = r->ensemble == LSA_ON_SUM,
        .by_mass = r->by_mass,
        .smoothing = (float)r->smoothing,
        .margin = (float)r->margin,
        .beta1 = (float)r->beta1,
        .beta2 = (float)r->beta2,
        .eps = (float)r->eps,
        .weight_decay = (float)r->weight_decay,
        .clip = (float)r->clip,
        .decay_norm = r->decay_norm,
        .bf16_moments = r->moments == LSA_MOMENTS_BF16,
        .sharded = r->zero1,
        .bf16_gradients = r->exchange == LSA_EXCHANGE_BF16,
        .fp8_query = r->precision == LSA_PRECISION_FP8,
        .portable = r->portable};
}

/* Most chunks that a window of documents [first, last) may choose from, rounded up to whole tiles. */
static int64_t widest_window(const lsa_source *s, int64_t first, int64_t last) {
    int64_t n = 0;
    for (int64_t d = first; d < last; d++)
        n = lsa_max_i64(n, lsa_shards_get_doc(lsa_source_shards(s), d).n_key);
    return lsa_align_up(n, 128);
}

lsa_status lsa_resident_create(lsa_resident **out, lsa_ctx *ctx, lsa_comm *comm, lsa_source *s, lsa_order *o,
                               const lsa_recipe *r, const lsa_indexer_geom *g, const float *params,
                               const float *m, const float *v, int64_t updates, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_resident *x = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(x, 1, err));
    x->s = s;
    x->o = o;
    x->r = r;
    x->g = *g;
    x->n_doc = lsa_source_n_train(s);
    x->updates = updates;
    x->eval_first = -1;
    pthread_mutex_init(&x->job.lock, NULL);
    x->comm = comm && !lsa_comm_is_self(comm) ? comm : NULL;
    x->first = o ? lsa_order_first(o) : 0;
    x->n_shard = o ? lsa_order_share(o) : 0;
    LSA_TRY(LSA_NEW(x->pool, x->n_shard, err));
    for (int64_t i = 0; i < x->n_shard * BANKS; i++) {
        bank *const k = &x->pool[i / BANKS].bank[i % BANKS];
        k->epoch = k->group = -1;
        LSA_TRY(LSA_NEW(k->held, x->n_doc, err));
    }
    LSA_TRY(LSA_NEW(x->job.item, x->n_doc, err));
    LSA_TRY(LSA_NEW(x->row, lsa_max_i64(r->batch, EVAL_ROWS), err));
    LSA_TRY(LSA_NEW(x->eval_row, lsa_gpu_eval_rows(g) * EVAL_ROWS, err));
    lsa_gpu_opts opts =
        lsa_resident_options(r, lsa_max_i64(1, BANKS * x->n_doc), widest_window(s, 0, x->n_doc));
    if (o) {
        opts.comm = x->comm;
        opts.batch = x->n_shard * lsa_order_rows(o);
        opts.micro = r->micro_batch ? r->micro_batch : opts.batch;
        opts.snapshots = !x->comm || lsa_comm_rank(x->comm) == 0;
    }
    LSA_TRY(lsa_gpu_create(&x->step, ctx, g, &opts, params, m, v, updates, err));
    *out = x;
    x = NULL;
done:
    lsa_resident_destroy(x);
    return st;
}

void lsa_resident_destroy(lsa_resident *x) {
    if (!x) return;
    lsa_status ignored = finish(x, NULL);
    (void)ignored;
    lsa_gpu_destroy(x->miner);
    lsa_gpu_destroy(x->eval);
    lsa_gpu_destroy(x->step);
    for (int i = 0; i < READERS; i++) lsa_block_fini(&x->block[i]);
    for (int64_t i = 0; x->pool && i < x->n_shard * BANKS; i++)
        lsa_free(x->pool[i / BANKS].bank[i % BANKS].held);
    lsa_free(x->pool);
    pthread_mutex_destroy(&x->job.lock);
    lsa_free(x->job.item);
    lsa_free(x->row);
    lsa_free(x->eval_row);
    lsa_free(x->eval_held);
    lsa_free(x);
}

/* Windows that fit one block of logits. */
static int64_t rows_for(const lsa_resident *x, int64_t n) {
    return lsa_max_i64(1, lsa_min_i64(EVAL_ROWS, EVAL_Z_BYTES / (x->g.n_layer * n * 4)));
}

/* Ranks the hard negatives of a shard's documents in use anew: when `step` says so, and when a group comes
 * into use. */
static lsa_status mine(lsa_resident *x, int64_t v, int32_t b, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n = lsa_max_i64(128, widest_window(x->s, 0, x->n_doc));
    if (!x->miner) LSA_TRY(lsa_gpu_create_eval(&x->miner, x->step, rows_for(x, n), n, 1, err));
    for (int64_t d = 0; d < x->n_doc; d++) {
        int64_t n_window;
        if (!x->pool[v - x->first].bank[b].held[d]) continue;
        LSA_TRY(lsa_source_n_window(&n_window, x->s, d, err));
        if (n_window) LSA_TRY(lsa_gpu_mine(x->step, x->miner, (int32_t)(b * x->n_doc + d), err));
    }
done:
    return st;
}

lsa_status lsa_resident_launch(lsa_resident *x, lsa_cursor *c, int64_t step, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t rows = lsa_order_rows(x->o);
    for (int64_t v = x->first; v < x->first + x->n_shard; v++) {
        pool *const p = &x->pool[v - x->first];
        for (int64_t i = 0; i < rows; i++) {
            lsa_place at;
            LSA_TRY(lsa_order_at(&at, x->o, v, c->asked + i, err));
            if (i == 0 || at.group != p->group || at.epoch != p->epoch) {
                if (i > 0) p->bank[p->in_use].last_use = x->launched + 1;
                LSA_TRY(need(x, v, &at, c->asked, &p->in_use, err));
                if (x->r->hard_share > 0 && (step % x->r->hard_every == 0 || p->bank[p->in_use].last_use < 0))
                    LSA_TRY(mine(x, v, p->in_use, err));
                p->group = at.group;
                p->epoch = at.epoch;
            }
            x->row[(v - x->first) * rows + i] =
                (lsa_gpu_row){(int32_t)(p->in_use * x->n_doc + at.doc), (int32_t)at.window, at.epoch};
        }
        p->bank[p->in_use].last_use = x->launched + 1;
    }
    c->asked += rows;
    x->lr[x->launched % LSA_GPU_FLIGHT] = lsa_lr(x->r, step);
    LSA_TRY(lsa_gpu_launch(x->step, x->row, x->lr[x->launched % LSA_GPU_FLIGHT], err));
    x->launched++;
    LSA_TRY(ahead(x, err));
done:
    return st;
}

lsa_status lsa_resident_take(lsa_resident *x, lsa_step_result *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_result r;
    LSA_TRY(lsa_gpu_result_take(x->step, &r, err));
    *out = (lsa_step_result){.loss = r.loss,
                             .grad_norm = r.grad_norm,
                             .lr = x->lr[x->taken % LSA_GPU_FLIGHT],
                             .skipped = r.skipped};
    x->updates = r.updates;
    x->taken++;
    if (x->comm) lsa_comm_tick(x->comm, "training");
done:
    return st;
}

int64_t lsa_resident_updates(const lsa_resident *x) {
    return x->updates;
}
lsa_gpu_step *lsa_resident_step(lsa_resident *x) {
    return x->step;
}
lsa_status lsa_resident_hash(lsa_resident *x, uint64_t *out, lsa_err *err) {
    return lsa_gpu_hash(x->step, out, err);
}
lsa_status lsa_resident_snapshot(lsa_resident *x, lsa_err *err) {
    return lsa_gpu_snapshot(x->step, err);
}
lsa_status lsa_resident_snapshot_get(const lsa_resident *x, float *params, float *m, float *v, lsa_err *err) {
    return lsa_gpu_snapshot_get(x->step, params, m, v, err);
}

/* ---- evaluation ---- */

static lsa_status load_eval(lsa_resident *x, int64_t doc, int32_t slot, int64_t n_window, lsa_err *err) {
    lsa_train_doc d = {0};
    lsa_status st = finish(x, err); /* the reader's blocks are free then */
    if (st == LSA_OK) st = lsa_source_load(&d, x->s, doc, err);
    if (st == LSA_OK) st = lsa_block_build(&x->block[0], x->s, x->r, &x->g, &d, n_window, true, err);
    lsa_train_doc_fini(&d);
    if (st == LSA_OK) st = lsa_gpu_pool_put(x->eval, slot, &x->block[0].doc, x->block[0].data, err);
    if (st == LSA_OK) st = lsa_gpu_pool_wait(x->eval, err);
    return st;
}

/* The evaluating step for documents [first, last), which stay loaded if they take less than half the pool. */
static lsa_status open_eval(lsa_resident *x, int64_t first, int64_t last, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t bytes = 0;
    if (x->eval_first == first && x->eval) return LSA_OK;
    lsa_gpu_destroy(x->eval);
    x->eval = NULL;
    const int64_t n = lsa_max_i64(128, widest_window(x->s, first, last));
    const int64_t rows = rows_for(x, n);
    for (int64_t d = first; d < last; d++) bytes += lsa_source_doc_bytes(x->s, d);
    x->eval_doc = bytes < x->r->pool_mib << 19 ? last - first : 0;
    lsa_free(x->eval_held);
    x->eval_held = NULL;
    LSA_TRY(LSA_NEW(x->eval_held, x->eval_doc, err));
    LSA_TRY(lsa_gpu_create_eval(&x->eval, x->step, rows, n, (int32_t)lsa_max_i64(1, x->eval_doc), err));
    x->eval_first = first;
done:
    return st;
}

static void count_row(lsa_scores *s, const lsa_gpu_eval_row *w, int64_t n_cand, bool has_mass) {
    lsa_window_scores c = {
        n_cand, w->n_pos, w->have, w->tp, w->hit_k, {0}, has_mass ? (double)w->total_mass : 0};
    for (int b = 0; has_mass && b <= LSA_EVAL_BUDGETS; b++) c.captured[b] = (double)w->captured[b];
    lsa_scores_window(s, &c);
}

static lsa_status eval_document(void *user, lsa_scores *score, const lsa_eval *e, int64_t doc,
                                int64_t n_window, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_resident *const x = user;
    double budget[LSA_EVAL_BUDGETS + 1];
    const int64_t rows = lsa_gpu_rows(x->eval), at = doc - x->eval_first;
    const int32_t slot = x->eval_doc ? (int32_t)at : 0;
    for (int b = 0; b <= LSA_EVAL_BUDGETS; b++) budget[b] = lsa_eval_budget(x->r, b);
    if (n_window && !(x->eval_doc && x->eval_held[at])) LSA_TRY(load_eval(x, doc, slot, n_window, err));
    if (n_window && x->eval_doc) x->eval_held[at] = true;
    for (int64_t w = 0; w < n_window; w += rows) {
        const int64_t m = lsa_min_i64(rows, n_window - w);
        if (x->comm) lsa_comm_tick(x->comm, "evaluating");
        if (x->comm) LSA_TRY(lsa_comm_check(x->comm, err));
        for (int64_t i = 0; i < m; i++) x->row[i] = (lsa_gpu_row){slot, (int32_t)(w + i), 0};
        LSA_TRY(lsa_gpu_eval(x->eval, m, x->row, (float)x->r->threshold, x->r->topk, LSA_EVAL_BUDGETS + 1,
                             budget, x->eval_row, err));
        for (int64_t i = 0; i < m; i++)
            for (int32_t k = 0; k < e->n; k++) {
                const lsa_gpu_eval_row *row = &x->eval_row[k * m + i];
                count_row(&score[k], row, row->n_cand, e->has_mass);
            }
    }
done:
    return st;
}

lsa_status lsa_resident_evaluate(lsa_eval *e, lsa_resident *x, int64_t first, int64_t last, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_eval_begin(e, x->s, &x->g);
    LSA_TRY(lsa_gpu_share(x->step, err));
    LSA_TRY(open_eval(x, first, last, err));
    LSA_TRY(lsa_eval_documents(e, x->comm, x->s, first, last, eval_document, x, err));
done:
    return st;
}
