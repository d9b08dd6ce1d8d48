/* The training loop. Invariant: everything that decides the next step (parameters, moments, cursor, counters,
 * best value) is in the checkpoint; the recipe and the data are named in run.json, written before the first
 * step. */
#include "trainer/run.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "data/ckpt.h"
#include "kernels/core/csa_list.h"
#include "kernels/core/clock.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "trainer/device.h"
#include "trainer/resident.h"
#include "trainer/saver.h"
#include "trainer/tboard.h"
#include "trainer/trace.h"

typedef struct run {
    const lsa_recipe *r;
    const char *out, *data, *init;
    lsa_comm *comm;
    bool lead; /* rank 0: the one that owns the run folder and speaks */
    lsa_ctx *ctx;
    lsa_source *source;
    lsa_order *order;
    lsa_trainer *trainer;   /* op by op, any device; or */
    lsa_resident *resident; /* documents and step on the GPU */
    lsa_indexer_geom g;
    lsa_batch batch;
    lsa_trace *trace;
    lsa_saver *saver;
    lsa_tboard tb;
    FILE *metrics;
    /* state */
    int64_t step, since_best, bad, skipped;
    lsa_cursor cursor; /* after the last step whose result is known */
    int64_t launched;  /* steps started: on a GPU up to one more than step */
    lsa_cursor ahead,
        flight[2]; /* cursor after the last step started; after each step by its number's parity */
    double best;
    bool has_best, stopped; /* stopped: by patience */
    json_t *last_eval;
    /* meters */
    double loss_sum, save_s; /* save_s: steps waited so long for checkpoints */
    int64_t loss_n, saves;
} run;

/* ---- geometry ---- */

static lsa_status make_geom(lsa_indexer_geom *g, const lsa_recipe *r, const lsa_shards_info *f,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    memset(g, 0, sizeof *g);
    g->hidden = f->hidden;
    g->n_head = (int32_t)r->heads;
    g->head_dim = 128;
    g->rank = (int32_t)r->rank;
    g->eps = 1e-6f;
    g->rope = f->rope;
    g->reach = (int32_t)r->reach;
    g->prior = r->prior;
    bool want[LSA_MAX_CSA] = {false};
    LSA_TRY(lsa_csa_list(want, r->layers, f->n_csa, LSA_E_CONFIG, "model.layers", err));
    for (int32_t o = 0; o < f->n_csa; o++) /* all: those the shards hold */
        if (!strcmp(r->layers, "all")) want[o] = f->has_keys[o];
    for (int32_t o = 0; o < f->n_csa; o++)
        if (want[o]) {
            g->ord[g->n_layer].v = o;
            g->id[g->n_layer++] = f->csa_id[o];
        }
    if (g->n_layer == 0)
        LSA_FAIL(LSA_E_CONFIG, "model.layers '%s' selects no layer that the shards hold keys of", r->layers);
    LSA_TRY(lsa_indexer_geom_check(g, err));
done:
    return st;
}

static lsa_status shards_info(lsa_shards_info *f, const char *data, lsa_err *err) {
    lsa_shards *s = NULL;
    lsa_status st = lsa_shards_open(&s, data, err);
    if (st == LSA_OK) *f = *lsa_shards_get_info(s);
    lsa_shards_close(s);
    return st;
}

/* ---- state ---- */

static json_t *state_json(const run *x) {
    char hash[17], teacher[17];
    const lsa_shards_info *f = lsa_shards_get_info(lsa_source_shards(x->source));
    lsa_hex64(hash, lsa_shards_hash(lsa_source_shards(x->source)));
    lsa_hex64(teacher, f->teacher_hash);
    int64_t longest = 0;
    for (int64_t d = 0; d < lsa_source_n_train(x->source); d++) {
        const lsa_shards_doc i = lsa_shards_get_doc(lsa_source_shards(x->source), d);
        if (i.n_token > longest) longest = i.n_token;
    }
    json_t *o = json_pack(
        "{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:b, s:f, s:b, s:o, s:s, s:s, s:s, s:I, s:I}", "step",
        (json_int_t)x->step, "epoch", (json_int_t)lsa_order_epoch(x->order, &x->cursor), "asked",
        (json_int_t)x->cursor.asked, "updates",
        (json_int_t)(x->resident ? lsa_resident_updates(x->resident) : lsa_trainer_updates(x->trainer)),
        "since_best", (json_int_t)x->since_best, "bad", (json_int_t)x->bad, "skipped", (json_int_t)x->skipped,
        "has_best", x->has_best, "best", x->best, "stopped", x->stopped, "recipe",
        lsa_recipe_json(x->r, lsa_recipe_keys, lsa_recipe_n_key), "data_hash", hash, "teacher", f->teacher,
        "teacher_hash", teacher, "trained_length", (json_int_t)longest, "train_documents",
        (json_int_t)lsa_source_n_train(x->source));
    if (x->last_eval) json_object_set_new(o, "eval", json_deep_copy(x->last_eval)); /* the writer's own */
    return o;
}

static lsa_status restore_state(run *x, int64_t *updates, const json_t *o, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    const char *hash;
    char now[17];
    LSA_TRY(lsa_json_i64(&x->step, o, "step", where, err));
    LSA_TRY(lsa_json_i64(&x->cursor.asked, o, "asked", where, err));
    LSA_TRY(lsa_json_i64(updates, o, "updates", where, err));
    LSA_TRY(lsa_json_i64(&x->since_best, o, "since_best", where, err));
    LSA_TRY(lsa_json_i64(&x->bad, o, "bad", where, err));
    LSA_TRY(lsa_json_i64(&x->skipped, o, "skipped", where, err));
    LSA_TRY(lsa_json_f64(&x->best, o, "best", where, err));
    x->has_best = json_is_true(json_object_get(o, "has_best"));
    x->stopped = json_is_true(json_object_get(o, "stopped"));
    x->last_eval = json_incref(json_object_get(o, "eval"));
    LSA_TRY(lsa_json_str(&hash, o, "data_hash", where, err));
    lsa_hex64(now, lsa_shards_hash(lsa_source_shards(x->source)));
    if (strcmp(hash, now))
        LSA_FAIL(LSA_E_FORMAT, "the shards in '%s' are not those of the checkpoint (hash %s, expected %s)",
                 x->data, now, hash);
done:
    return st;
}

/* Waits for the checkpoint that is being written; the other ranks see that this one is alive. */
static lsa_status wait_saved(run *x, lsa_err *err) {
    if (!x->lead) return LSA_OK;
    while (lsa_saver_busy(x->saver)) {
        const struct timespec nap = {0, 2000000};
        lsa_comm_tick(x->comm, "writing a checkpoint");
        nanosleep(&nap, NULL);
    }
    return lsa_saver_wait(x->saver, err);
}

/* The same for all ranks: none leaves before the last checkpoint is whole, and all hear if it is not. */
static lsa_status settle(run *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(wait_saved(x, err));
    LSA_TRY(lsa_comm_barrier(x->comm, err));
done:
    return st;
}

/* Ranks that round differently, or a device that errs, would drift apart unseen. */
static lsa_status agree_on_parameters(run *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    uint64_t hash = 0;
    if (x->resident)
        LSA_TRY(lsa_resident_hash(x->resident, &hash, err));
    else
        hash = lsa_trainer_hash(x->trainer);
    LSA_TRY(lsa_comm_agree(x->comm, "after this step, the parameters", hash, LSA_E_COMM, err));
done:
    return st;
}

static lsa_status from_gpu(void *user, const lsa_snapshot *to, lsa_err *err) {
    return lsa_resident_snapshot_get(user, to->params, to->m, to->v, err);
}

/* Begins a checkpoint: waits for the one before, takes the snapshot (on rank 0, from all); a GPU's way to the
 * host and the writing go on beside the steps. The file does not depend on the number of ranks. */
static lsa_status save(run *x, bool best, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *state = NULL;
    lsa_snapshot s = {0};
    const double t0 = lsa_now_s();
    LSA_TRY(wait_saved(x, err));
    if (x->lead) s = lsa_saver_snapshot(x->saver);
    if (lsa_comm_size(x->comm) > 1) LSA_TRY(agree_on_parameters(x, err));
    LSA_TRY(x->resident ? lsa_resident_snapshot(x->resident, err)
                        : lsa_trainer_get(x->trainer, s.params, s.m, s.v, err));
    if (x->lead) {
        state = state_json(x);
        if (!state) LSA_FAIL(LSA_E_NOMEM, "cannot format the training state");
        LSA_TRY(
            lsa_saver_begin(x->saver, x->step, state, best, x->resident ? from_gpu : NULL, x->resident, err));
    }
    x->saves++;
    x->save_s += lsa_now_s() - t0;
done:
    return st;
}

/* ---- opening ---- */

/* Recipe and data are the same everywhere, or no rank begins. */
static lsa_status agree(run *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    char *text = NULL;
    LSA_TRY(lsa_recipe_text(&text, x->r, lsa_recipe_keys, lsa_recipe_n_key, false, err));
    LSA_TRY(lsa_comm_agree(x->comm, "the recipe", lsa_xxh64(text, strlen(text)), LSA_E_CONFIG, err));
    LSA_TRY(lsa_comm_agree(x->comm, "the content of the shard folder",
                           lsa_shards_hash(lsa_source_shards(x->source)), LSA_E_CONFIG, err));
done:
    lsa_free(text);
    return st;
}

static lsa_status open_run(run *x, const char *device, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_shards_info f;
    LSA_TRY(lsa_recipe_check(x->r, err));
    LSA_TRY(shards_info(&f, x->data, err));
    LSA_TRY(make_geom(&x->g, x->r, &f, err));
    LSA_TRY(lsa_device_open(&x->ctx, device, x->comm, err));
    LSA_TRY(lsa_source_open(&x->source, x->data, x->r, &x->g, x->r->loss == LSA_LOSS_KL || f.has_stats, err));
    LSA_TRY(agree(x, err));
    if (!f.has_stats && x->r->metric == LSA_METRIC_CAPTURED && x->r->val_documents > 0)
        LSA_FAIL(
            LSA_E_CONFIG,
            "eval.metric captured needs native masses, but the shards hold no /stats; use eval.metric: f1 or recall");
    LSA_TRY(
        lsa_order_create(&x->order, x->source, x->r, lsa_comm_rank(x->comm), lsa_comm_size(x->comm), err));
done:
    return st;
}

/* Initial parameters of rank 0: random, or a checkpoint widened to the recipe's geometry; for all ranks. */
static lsa_status initial(run *x, float **params, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_ckpt c = {0};
    LSA_TRY(LSA_NEW(*params, lsa_indexer_n_param(&x->g), err));
    if (!x->lead) goto share;
    if (!x->init) {
        lsa_indexer_init_random(*params, &x->g, (uint64_t)x->r->seed);
        goto share;
    }
    LSA_TRY(lsa_ckpt_load(&c, x->init, false, err));
    const lsa_rope *a = &c.geom.rope, *b = &x->g.rope;
    if (a->dim != b->dim || a->base != b->base || a->factor != b->factor ||
        a->original_len != b->original_len || a->beta_fast != b->beta_fast || a->beta_slow != b->beta_slow)
        LSA_FAIL(LSA_E_CONFIG,
                 "--init '%s': its RoPE constants are not those of the shards: it belongs to another teacher",
                 x->init);
    LSA_TRY(lsa_indexer_widen(*params, &x->g, c.params, &c.geom, (uint64_t)x->r->seed, err));
share:
    LSA_TRY(lsa_comm_broadcast(x->comm, *params, lsa_indexer_n_param(&x->g) * (int64_t)sizeof **params, err));
done:
    lsa_ckpt_fini(&c);
    return st;
}

/* The trainer of the device: on a GPU documents and step stay there, unless f32 op by op is asked for. */
static lsa_status open_trainer(run *x, const float *params, const float *m, const float *v, int64_t updates,
                               lsa_err *err) {
    if (lsa_ctx_kind(x->ctx) != LSA_BACKEND_CUDA || x->r->precision == LSA_PRECISION_F32)
        return lsa_trainer_create(&x->trainer, x->ctx, x->comm, lsa_order_share(x->order), x->r, &x->g,
                                  params, m, v, updates, err);
    if (*x->r->trace) LSA_RET_FAIL(LSA_E_CONFIG, "train.trace on a GPU needs train.precision: f32");
    return lsa_resident_create(&x->resident, x->ctx, x->comm, x->source, x->order, x->r, &x->g, params, m, v,
                               updates, err);
}

static void run_fini(run *x) {
    lsa_saver_destroy(x->saver);
    if (x->metrics) fclose(x->metrics);
    lsa_tboard_close(&x->tb);
    lsa_trace_destroy(x->trace);
    lsa_batch_fini(&x->batch);
    lsa_resident_destroy(x->resident);
    lsa_trainer_destroy(x->trainer);
    lsa_order_destroy(x->order);
    lsa_source_close(x->source);
    lsa_ctx_destroy(x->ctx);
    json_decref(x->last_eval);
}

/* ---- reports ---- */

static void report_step(run *x, const lsa_step_result *s, double windows_per_s) {
    const double loss = x->loss_n ? x->loss_sum / (double)x->loss_n : (double)NAN;
    x->loss_sum = 0;
    x->loss_n = 0;
    if (!x->lead) return;
    fprintf(
        x->metrics,
        "{\"step\": %lld, \"epoch\": %lld, \"loss\": %.9g, \"lr\": %.9g, \"grad_norm\": %.9g, \"windows_per_s\": %.6g, \"skipped\": %lld}\n",
        (long long)x->step, (long long)lsa_order_epoch(x->order, &x->cursor), isfinite(loss) ? loss : -1.0,
        s->lr, isfinite(s->grad_norm) ? s->grad_norm : -1.0, windows_per_s, (long long)x->skipped);
    fflush(x->metrics);
    lsa_tboard_scalar(&x->tb, "train/loss", x->step, loss);
    lsa_tboard_scalar(&x->tb, "train/lr", x->step, s->lr);
    lsa_tboard_scalar(&x->tb, "train/grad_norm", x->step, s->grad_norm);
    lsa_tboard_scalar(&x->tb, "train/windows_per_s", x->step, windows_per_s);
}

/* Held-out documents, or nothing if there are none. Sets *best when this is the best so far. */
static lsa_status evaluate(run *x, bool *best, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_eval e;
    *best = false;
    if (lsa_source_n_train(x->source) == lsa_source_n_doc(x->source)) return LSA_OK;
    const int64_t first = lsa_source_n_train(x->source), last = lsa_source_n_doc(x->source);
    LSA_TRY(x->resident ? lsa_resident_evaluate(&e, x->resident, first, last, err)
                        : lsa_evaluate(&e, x->trainer, x->comm, x->source, x->r, &x->g, first, last, err));
    const double v = lsa_eval_value(&e, x->r);
    *best = !x->has_best || v > x->best;
    if (*best) {
        x->best = v;
        x->has_best = true;
        x->since_best = 0;
    } else {
        x->since_best++;
    }
    json_decref(x->last_eval);
    x->last_eval = lsa_eval_json(&e, x->r);
    if (!x->lead) goto done;
    char *text = json_dumps(x->last_eval, JSON_COMPACT | JSON_REAL_PRECISION(9));
    fprintf(x->metrics, "{\"step\": %lld, \"eval\": %s}\n", (long long)x->step, text ? text : "null");
    fflush(x->metrics);
    free(text);
    const lsa_scores *sum = &e.row[e.n - 1];
    lsa_tboard_scalar(&x->tb, "eval/f1", x->step, lsa_f1(&e.row[e.n - 3]));
    if (e.has_mass)
        lsa_tboard_scalar(&x->tb, "eval/captured", x->step,
                          sum->total_mass > 0 ? sum->captured[LSA_EVAL_BUDGETS] / sum->total_mass : 0);
    lsa_info("step %lld: held-out %s %.4f%s", (long long)x->step,
             x->r->metric == LSA_METRIC_CAPTURED ? "captured mass"
             : x->r->metric == LSA_METRIC_F1     ? "F1"
                                                 : "recall@K",
             v, *best ? " (best)" : "");
done:
    return st;
}

/* ---- the loop ---- */

/* A checkpoint is due after this step. */
static bool due(const lsa_recipe *r, int64_t step) {
    return step % r->save_every == 0 || (r->milestone_every && step % r->milestone_every == 0);
}

/* A step after which the state is looked at: no later one may have begun. */
static bool boundary(const run *x, int64_t step) {
    const lsa_recipe *r = x->r;
    return step == r->steps || due(r, step) || (r->eval_every && step % r->eval_every == 0);
}

/* On a GPU the next step is started before the result of this one is awaited. */
static lsa_status resident_step(run *x, lsa_step_result *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (x->launched == x->step) x->ahead = x->cursor;
    while (x->launched == x->step ||
           (x->launched == x->step + 1 && !boundary(x, x->launched) && !lsa_stop_requested())) {
        LSA_TRY(lsa_resident_launch(x->resident, &x->ahead, x->launched, err));
        x->flight[x->launched++ % 2] = x->ahead;
    }
    LSA_TRY(lsa_resident_take(x->resident, s, err));
    x->cursor = x->flight[x->step % 2];
done:
    return st;
}

static lsa_status one_step(run *x, lsa_step_result *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (x->resident) {
        LSA_TRY(resident_step(x, s, err));
    } else {
        LSA_TRY(lsa_batch_next(&x->batch, x->source, x->order, x->r, &x->g, &x->cursor, err));
        LSA_TRY(lsa_trainer_step(s, x->trainer, &x->batch, x->step, err));
        if (x->trace) LSA_TRY(lsa_trace_add(x->trace, &x->batch, &x->g, s->loss, err));
        x->launched++;
    }
    x->step++;
    if (s->skipped) {
        x->bad++;
        x->skipped++;
        lsa_warn(
            "step %lld: loss %g, gradient norm %g: update skipped (windows up to number %lld of every virtual shard)",
            (long long)x->step, s->loss, s->grad_norm, (long long)x->cursor.asked);
        if (x->bad >= x->r->max_bad)
            LSA_FAIL(
                LSA_E_NUMERIC,
                "%lld steps in a row were not finite; the last checkpoint is good: lower optim.lr and resume from it",
                (long long)x->bad);
    } else {
        x->bad = 0;
        x->loss_sum += s->loss;
        x->loss_n++;
    }
done:
    return st;
}

static lsa_status loop(run *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_recipe *r = x->r;
    lsa_progress p;
    lsa_step_result s = {0};
    double t0 = lsa_now_s();
    int64_t n0 = x->step;
    x->launched = x->step;
    lsa_info(
        "training on %s%s%s: %lld documents (%lld held out), %lld windows an epoch, %.2f M parameters in %d joint layers",
        lsa_ctx_describe(x->ctx), lsa_comm_size(x->comm) > 1 ? ", " : "",
        lsa_comm_size(x->comm) > 1 ? lsa_comm_describe(x->comm) : "",
        (long long)lsa_source_n_train(x->source),
        (long long)(lsa_source_n_doc(x->source) - lsa_source_n_train(x->source)),
        (long long)lsa_order_epoch_windows(x->order), 1e-6 * (double)lsa_indexer_n_param(&x->g),
        x->g.n_layer);
    if (lsa_order_shards(x->order) < r->virtual_shards)
        lsa_info("%lld virtual shards instead of %lld: so few documents have windows",
                 (long long)lsa_order_shards(x->order), (long long)r->virtual_shards);
    lsa_progress_begin(&p, "train", "steps", (double)r->steps, (double)x->step);
    while (x->step < r->steps && !x->stopped) {
        char extra[64];
        LSA_TRY(one_step(x, &s, err));
        snprintf(extra, sizeof extra, "loss %.4f", x->loss_n ? x->loss_sum / (double)x->loss_n : s.loss);
        lsa_progress_update(&p, (double)x->step, extra);
        const bool last = x->step == r->steps;
        if (x->step % r->log_every == 0 || last) {
            const double now = lsa_now_s();
            report_step(x, &s, (double)((x->step - n0) * r->batch) / (now - t0 + 1e-9));
            t0 = now;
            n0 = x->step;
        }
        bool best = false;
        const bool eval = (r->eval_every && x->step % r->eval_every == 0) || last;
        if (eval) {
            LSA_TRY(evaluate(x, &best, err));
            if (r->patience && x->since_best >= r->patience) x->stopped = true;
        }
        bool stop = lsa_stop_requested() && x->launched == x->step;
        LSA_TRY(
            lsa_comm_any(x->comm, &stop, err)); /* a signal may reach the ranks at different steps, or one */
        if (best || x->stopped || stop || last || due(r, x->step)) LSA_TRY(save(x, best, err));
        if (stop)
            LSA_TRY(settle(x, err));
        else if (x->lead)
            LSA_TRY(lsa_saver_poll(x->saver, err));
        if (eval || best || last) t0 = lsa_now_s(), n0 = x->step;
        if (stop && !last)
            LSA_FAIL(LSA_E_INTERRUPTED, "stopped at step %lld of %lld, saved; 'lsa-train resume %s' goes on",
                     (long long)x->step, (long long)r->steps, x->out);
    }
    LSA_TRY(settle(x, err));
    lsa_progress_end(&p);
    if (x->saves) lsa_info("%lld checkpoints; steps waited %.3f s for them", (long long)x->saves, x->save_s);
    if (x->stopped) lsa_info("stopped early: %lld evaluations without improvement", (long long)x->since_best);
    if (x->trace) LSA_TRY(lsa_trace_save(x->trace, r->trace, err));
done:
    return st;
}

static lsa_status open_logs(run *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    LSA_TRY(lsa_path(path, err, "%s/metrics.jsonl", x->out));
    x->metrics = fopen(path, "a");
    if (!x->metrics) LSA_FAIL(lsa_status_from_errno(errno), "cannot open '%s': %s", path, strerror(errno));
    LSA_TRY(lsa_path(path, err, "%s/tb", x->out));
    LSA_TRY(lsa_tboard_open(&x->tb, path, err));
done:
    return st;
}

static lsa_status write_run_files(const run *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX], data[LSA_PATH_MAX], init[LSA_PATH_MAX] = "", *text = NULL;
    json_t *o = NULL;
    if (!realpath(x->data, data)) LSA_FAIL(LSA_E_IO, "cannot find '%s': %s", x->data, strerror(errno));
    if (x->init && !realpath(x->init, init))
        LSA_FAIL(LSA_E_IO, "cannot find '%s': %s", x->init, strerror(errno));
    LSA_TRY(lsa_recipe_text(&text, x->r, lsa_recipe_keys, lsa_recipe_n_key, false, err));
    LSA_TRY(lsa_path(path, err, "%s/recipe.yaml", x->out));
    LSA_TRY(lsa_write_file(path, text, strlen(text), err));
    o = json_pack("{s:s, s:s, s:s?, s:o}", "format", "lsa-run/1", "data", data, "init", x->init ? init : NULL,
                  "recipe", lsa_recipe_json(x->r, lsa_recipe_keys, lsa_recipe_n_key));
    LSA_TRY(lsa_path(path, err, "%s/run.json", x->out));
    LSA_TRY(lsa_json_save(o, path, err));
done:
    json_decref(o);
    lsa_free(text);
    return st;
}

/* Rank 0: a fresh folder with the lock, what the run is, and its logs. */
static lsa_status make_folder(run *x, int *lock, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_mkdirs(x->out, err));
    LSA_TRY(lsa_lock_dir(lock, x->out, err));
    LSA_TRY(write_run_files(x, err));
    LSA_TRY(open_logs(x, err));
    LSA_TRY(lsa_saver_create(&x->saver, x->out, &x->g, x->r->keep, x->r->milestone_every, -1, err));
done:
    return st;
}

lsa_status lsa_train_run(const lsa_recipe *r, const char *data, const char *out, const char *init,
                         const char *device, lsa_comm *comm, lsa_err *err) {
    lsa_status st = LSA_OK;
    run x = {.r = r, .out = out, .data = data, .init = init, .comm = comm, .lead = lsa_comm_rank(comm) == 0};
    char path[LSA_PATH_MAX];
    float *params = NULL;
    int lock = -1;
    LSA_TRY(lsa_path(path, err, "%s/run.json", out));
    if (x.lead && lsa_exists(path))
        LSA_FAIL(LSA_E_ARG,
                 "'%s' already holds a run; 'lsa-train resume %s' goes on with it, or choose another --out",
                 out, out);
    LSA_TRY(open_run(&x, device, err));
    if (*r->trace && r->virtual_shards > 1)
        LSA_FAIL(LSA_E_CONFIG, "train.trace needs data.virtual_shards: 1");
    LSA_TRY(initial(&x, &params, err));
    LSA_TRY(open_trainer(&x, params, NULL, NULL, 0, err));
    if (x.lead) LSA_TRY(make_folder(&x, &lock, err));
    if (*r->trace) LSA_TRY(lsa_trace_create(&x.trace, params, &x.g, err));
    LSA_TRY(loop(&x, err));
done:
    run_fini(&x);
    lsa_free(params);
    lsa_unlock(lock);
    return st;
}

/* The latest checkpoint; or, if that one is damaged, the newest whole one before it. */
static lsa_status load_latest(lsa_ckpt *c, const char *out, const char *latest, lsa_err *err) {
    lsa_status st = LSA_OK;
    char dir[LSA_PATH_MAX], older[LSA_PATH_MAX];
    lsa_err why = {0};
    LSA_TRY(lsa_ckpt_resolve(dir, latest, err));
    while ((st = lsa_ckpt_load(c, dir, true, &why)) == LSA_E_FORMAT) {
        LSA_TRY(lsa_ckpt_older(older, out, dir, err));
        if (!*older) {
            lsa_err_wrap(
                &why,
                "no checkpoint before it is left: restore the file from a copy, or start a new run with --init");
            break;
        }
        lsa_warn("%s; going on from '%s' instead, its steps are done again", why.msg, older);
        LSA_TRY(lsa_path(dir, err, "%s", older));
        why = (lsa_err){0};
    }
    st = why.code;
    if (st != LSA_OK && err && err->code == LSA_OK) *err = why;
done:
    return st;
}

/* The object that rank 0 brings (NULL: none), for all ranks. */
static lsa_status share_json(json_t **o, run *x, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    char *text = NULL, *copy = NULL;
    int64_t n = 0;
    if (x->lead && *o) {
        text = json_dumps(*o, JSON_COMPACT | JSON_REAL_PRECISION(17));
        if (!text) LSA_FAIL(LSA_E_NOMEM, "cannot format '%s'", where);
        n = (int64_t)strlen(text);
    }
    LSA_TRY(lsa_comm_broadcast(x->comm, &n, sizeof n, err));
    if (n == 0 || lsa_comm_size(x->comm) == 1) goto done;
    LSA_TRY(LSA_NEW(copy, n, err));
    if (x->lead) memcpy(copy, text, (size_t)n);
    LSA_TRY(lsa_comm_broadcast(x->comm, copy, n, err));
    if (!x->lead) LSA_TRY(lsa_json_parse(o, copy, (size_t)n, where, err));
done:
    free(text);
    lsa_free(copy);
    return st;
}

static lsa_status share_floats(float **p, run *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n = lsa_indexer_n_param(&x->g);
    if (!*p) LSA_TRY(LSA_NEW(*p, n, err));
    LSA_TRY(lsa_comm_broadcast(x->comm, *p, n * (int64_t)sizeof **p, err));
done:
    return st;
}

/* Rank 0 reads the latest checkpoint, every rank goes on from it; or from the start if there is none yet. */
static lsa_status go_on(run *x, lsa_ckpt *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    int64_t updates = 0;
    LSA_TRY(lsa_path(path, err, "%s/ckpt/latest", x->out));
    if (x->lead) {
        /* a kill may have come before the save's own pruning */
        LSA_TRY(lsa_ckpt_clean(x->out, x->r->keep, x->r->milestone_every, err));
        if (lsa_exists(path)) LSA_TRY(load_latest(c, x->out, path, err));
    }
    LSA_TRY(share_json(&c->state, x, path, err));
    if (!c->state) {
        LSA_TRY(initial(x, &c->params, err));
        LSA_TRY(open_trainer(x, c->params, NULL, NULL, 0, err));
        goto done;
    }
    LSA_TRY(share_floats(&c->params, x, err));
    LSA_TRY(share_floats(&c->m, x, err));
    LSA_TRY(share_floats(&c->v, x, err));
    LSA_TRY(restore_state(x, &updates, c->state, x->lead ? c->dir : path, err));
    LSA_TRY(open_trainer(x, c->params, c->m, c->v, updates, err));
done:
    return st;
}

lsa_status lsa_train_resume(const char *out, const char *device, lsa_comm *comm, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_recipe r;
    run x = {.r = &r, .out = out, .comm = comm, .lead = lsa_comm_rank(comm) == 0};
    json_t *o = NULL;
    lsa_ckpt c = {0};
    char path[LSA_PATH_MAX];
    int lock = -1;
    LSA_TRY(lsa_path(path, err, "%s/run.json", out));
    if (x.lead) {
        if (!lsa_exists(path))
            LSA_FAIL(LSA_E_IO, "'%s' is not a run: it has no run.json; start one with 'lsa-train run'", out);
        LSA_TRY(lsa_json_load(&o, path, err));
        LSA_TRY(lsa_lock_dir(&lock, out, err));
    }
    LSA_TRY(share_json(&o, &x, path, err));
    LSA_TRY(lsa_json_str(&x.data, o, "data", path, err));
    x.init = json_string_value(json_object_get(o, "init"));
    LSA_TRY(
        lsa_recipe_from_json(&r, lsa_recipe_keys, lsa_recipe_n_key, json_object_get(o, "recipe"), path, err));
    LSA_TRY(open_run(&x, device, err));
    LSA_TRY(go_on(&x, &c, err));
    if (x.step >= r.steps || x.stopped) {
        lsa_info("'%s' is finished: nothing to resume", out);
        goto done;
    }
    if (x.lead) {
        LSA_TRY(open_logs(&x, err));
        LSA_TRY(lsa_saver_create(&x.saver, out, &x.g, r.keep, r.milestone_every, c.state ? x.step : -1, err));
    }
    if (*r.trace) lsa_warn("train.trace: a resumed run writes no trace; traces are for short runs in one go");
    LSA_TRY(loop(&x, err));
done:
    lsa_ckpt_fini(&c);
    run_fini(&x);
    json_decref(o);
    lsa_unlock(lock);
    return st;
}

lsa_status lsa_train_eval(lsa_eval *out, lsa_recipe *r, const char *ckpt, const char *data, bool val_only,
                          const char *device, const char *const *set, int n_set, lsa_comm *comm,
                          lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_ckpt c = {0};
    lsa_ctx *ctx = NULL;
    lsa_source *source = NULL;
    lsa_trainer *t = NULL;
    lsa_resident *gpu = NULL;
    lsa_shards_info f;
    LSA_TRY(lsa_ckpt_load(&c, ckpt, false, err));
    if (json_object_get(c.state, "recipe"))
        LSA_TRY(lsa_recipe_from_json(r, lsa_recipe_keys, lsa_recipe_n_key, json_object_get(c.state, "recipe"),
                                     c.dir, err));
    else
        LSA_TRY(lsa_recipe_load(r, lsa_recipe_keys, lsa_recipe_n_key, NULL, NULL, 0, err));
    LSA_TRY(lsa_recipe_set(r, lsa_recipe_keys, lsa_recipe_n_key, set, n_set, err));
    r->prior = c.geom.prior;
    LSA_TRY(lsa_recipe_check(r, err));
    if (!val_only) r->val_documents = 0;
    LSA_TRY(lsa_comm_agree(comm, "the checkpoint",
                           lsa_xxh64(c.params, (size_t)lsa_indexer_n_param(&c.geom) * sizeof *c.params),
                           LSA_E_CONFIG, err));
    LSA_TRY(shards_info(&f, data, err));
    LSA_TRY(lsa_device_open(&ctx, device, comm, err));
    LSA_TRY(lsa_source_open(&source, data, r, &c.geom, f.has_stats, err));
    LSA_TRY(lsa_comm_agree(comm, "the content of the shard folder",
                           lsa_shards_hash(lsa_source_shards(source)), LSA_E_CONFIG, err));
    const int64_t first = val_only ? lsa_source_n_train(source) : 0, last = lsa_source_n_doc(source);
    if (lsa_ctx_kind(ctx) == LSA_BACKEND_CUDA && r->precision != LSA_PRECISION_F32) {
        r->batch = 8; /* the training half of the step is not used */
        r->micro_batch = 0;
        LSA_TRY(lsa_resident_create(&gpu, ctx, comm, source, NULL, r, &c.geom, c.params, NULL, NULL, 0, err));
        LSA_TRY(lsa_resident_evaluate(out, gpu, first, last, err));
    } else {
        LSA_TRY(lsa_trainer_create(&t, ctx, comm, 1, r, &c.geom, c.params, NULL, NULL, 0, err));
        LSA_TRY(lsa_evaluate(out, t, comm, source, r, &c.geom, first, last, err));
    }
    if (out->row[0].n_window == 0)
        LSA_FAIL(LSA_E_CONFIG, "'%s': no document is longer than tail + tau tokens: nothing to evaluate",
                 data);
done:
    lsa_resident_destroy(gpu);
    lsa_trainer_destroy(t);
    lsa_source_close(source);
    lsa_ctx_destroy(ctx);
    lsa_ckpt_fini(&c);
    return st;
}

lsa_status lsa_train_survey(lsa_survey *out, const lsa_recipe *r, const char *data, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_source *source = NULL;
    lsa_shards_info f;
    lsa_indexer_geom g;
    double chunks = 0;
    LSA_TRY(shards_info(&f, data, err));
    LSA_TRY(make_geom(&g, r, &f, err));
    LSA_TRY(lsa_source_open(&source, data, r, &g, false, err));
    *out = (lsa_survey){.n_layer = g.n_layer, .hidden = g.hidden};
    for (int64_t d = 0; d < lsa_source_n_train(source); d++) {
        int64_t n;
        LSA_TRY(lsa_source_n_window(&n, source, d, err));
        const int64_t tokens = lsa_shards_get_doc(lsa_source_shards(source), d).n_token;
        out->windows += n;
        chunks += 0.5 * (double)n * (double)lsa_evictable(tokens, r->exclude_resident ? r->tail : 0);
    }
    if (out->windows == 0)
        LSA_FAIL(LSA_E_CONFIG,
                 "'%s' has no window for this recipe: its documents are shorter than window + tail", data);
    out->chunks = lsa_max_i64(1, (int64_t)(chunks / (double)out->windows));
done:
    lsa_source_close(source);
    return st;
}
