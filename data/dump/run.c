/* The dump loop. Invariant: shard boundaries are a function of the documents and options alone, so a run that
 * was killed and resumed writes the same bytes as one that was not.
 *
 * With a GPU four things go on at once: the GPU computes, this thread queues its work and hands arriving rows
 * to the taps (on OpenMP threads), a second thread merges documents whose rows are all there, a third seals.
 */
#include "data/dump/run.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/dump/inputs.h"
#include "data/dump/lane.h"
#include "data/dump/sink.h"
#include "kernels/core/clock.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

typedef struct dump {
    const lsa_dump_opts *o;
    const char *out;
    lsa_engine *engine;
    const char *device;
    lsa_ctx *ctx;
    lsa_reader reader;
    lsa_dump_inputs in;
    lsa_manifest m;
    lsa_sink *sink;
    lsa_lane *merging;   /* of documents read by a GPU */
    struct flight *last; /* fed and not yet there */
    lsa_dump_times *times;
    lsa_progress progress;
    int64_t done_tokens;
} dump;

/* After every chunk of tokens: Ctrl-C, and the progress line. */
static lsa_status on_chunk(void *user, int64_t n, lsa_err *err) {
    dump *d = user;
    d->done_tokens += n;
    lsa_progress_update(&d->progress, (double)d->done_tokens, NULL);
    if (lsa_stop_requested())
        LSA_RET_FAIL(LSA_E_INTERRUPTED, "stopped after %lld of %lld documents; 'lsa-dump resume %s' goes on",
                     (long long)lsa_sink_sealed(d->sink), (long long)lsa_docs_count(d->in.docs), d->out);
    return LSA_OK;
}

static lsa_status by_session(dump *d, int64_t first, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int64_t i = first; i < n; i++) {
        lsa_doc_stats x;
        LSA_TRY(lsa_tap_document(&x, &d->reader, lsa_engine_config(d->engine), &d->in.load.rule,
                                 lsa_docs_at(d->in.docs, i), lsa_sink_at_start(d->sink), on_chunk, d, err));
        LSA_TRY(lsa_sink_add(d->sink, &x, err));
    }
done:
    return st;
}

/* ---- with a GPU ---- */

typedef struct flight { /* a document between its first layer and the sink */
    dump *d;
    const lsa_doc *doc;
    lsa_tap_state *taps;
    int64_t bytes;
    lsa_status *given; /* of handing it on; where it failed */
    lsa_err *err;
} flight;

static void drop_flight(void *item) {
    flight *const f = item;
    if (f) lsa_tap_end(f->taps);
    lsa_free(f);
}

static lsa_status merge(void *user, void *item, lsa_err *err) {
    dump *const d = user;
    flight *const f = item;
    lsa_doc_stats x;
    const lsa_status st = lsa_tap_finish(&x, f->taps, NULL, f->doc, err);
    return st == LSA_OK ? lsa_sink_add(d->sink, &x, err) : st;
}

static void arrived(void *user) {
    flight *const f = user;
    lsa_err why = {0};
    lsa_err *const err = f->err;
    lsa_status *const given = f->given;
    if (f->d->last == f) f->d->last = NULL;
    const lsa_status st = lsa_lane_give(f->d->merging, f, f->bytes, &why);
    if (st != LSA_OK && *given == LSA_OK) *given = st, *err = why;
}

/* As tap.c holds it, and once more merged. */
static int64_t flight_bytes(const dump *d, int64_t n) {
    const lsa_teacher_config *c = lsa_engine_config(d->engine);
    const lsa_dump_rule *r = &d->in.load.rule;
    return n * c->n_csa * (4 * (int64_t)r->pool + (r->stats ? 16 * (int64_t)c->index_topk : 0) + 200);
}

static lsa_status feed(dump *d, const lsa_doc *doc, lsa_status *given, lsa_err *why, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_doc *g;
    flight *f = NULL;
    const int64_t bytes = flight_bytes(d, doc->n_token);
    if (!lsa_lane_try(d->merging, bytes)) {
        LSA_TRY(lsa_gpu_run_drain(d->reader.gpu, err)); /* what is waited for must be able to arrive */
        LSA_TRY(lsa_lane_reserve(d->merging, bytes, err));
    }
    LSA_TRY(LSA_NEW(f, 1, err));
    *f = (flight){.d = d, .doc = doc, .bytes = bytes, .given = given, .err = why};
    LSA_TRY(lsa_tap_begin(&f->taps, lsa_engine_config(d->engine), &d->in.load.rule, doc->n_token, true, err));
    LSA_TRY(lsa_tap_gpu_doc(&g, f->taps, doc, err));
    g->done = arrived;
    g->user = f;
    d->last = f; /* until arrived hands it on */
    f = NULL;
    LSA_TRY(lsa_gpu_run_feed(d->reader.gpu, g, on_chunk, d, err));
    if (*given != LSA_OK) {
        if (err && err->code == LSA_OK) *err = *why;
        st = *given;
    }
done:
    drop_flight(f);
    return st;
}

#define IN_FLIGHT (INT64_C(1) << 30) /* bytes; one document alone may have more */

static lsa_status by_gpu(dump *d, int64_t first, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK, given = LSA_OK, ended;
    lsa_err why = {0};
    LSA_TRY(lsa_lane_create(&d->merging, "merging", IN_FLIGHT, merge, drop_flight, d, err));
    for (int64_t i = first; i < n; i++) LSA_TRY(feed(d, lsa_docs_at(d->in.docs, i), &given, &why, err));
done:
    ended = lsa_gpu_run_drain(d->reader.gpu, st == LSA_OK ? err : NULL);
    if (st == LSA_OK) st = ended;
    if (st == LSA_OK && given != LSA_OK) {
        if (err && err->code == LSA_OK) *err = why;
        st = given;
    }
    drop_flight(d->last); /* of a run that was stopped */
    d->last = NULL;
    ended = lsa_lane_finish(d->merging, st != LSA_OK, err);
    return st != LSA_OK ? st : ended;
}

static void fill_info(lsa_shards_info *f, const dump *d) {
    const lsa_teacher_config *c = lsa_engine_config(d->engine);
    const lsa_teacher *t = lsa_engine_teacher(d->engine);
    snprintf(f->teacher, sizeof f->teacher, "%.95s", lsa_teacher_name(t));
    f->teacher_hash = lsa_teacher_hash(t);
    f->hidden = c->hidden;
    f->hidden_stride = d->in.load.rule.hidden_stride;
    f->n_csa = c->n_csa;
    memcpy(f->csa_id, c->csa_id, sizeof f->csa_id);
    memcpy(f->has_keys, d->in.load.rule.has_keys, sizeof f->has_keys);
    f->has_stats = d->in.load.rule.stats;
    f->has_dense = d->in.load.rule.dense_every > 0;
    f->rope = c->rope_compress;
    f->label_top_p = d->in.load.rule.top_p;
    f->label_pool = d->in.load.rule.pool;
}

static lsa_status open_teacher(dump *d, lsa_err *err) {
    const lsa_engine_opts eo = {.sim_fp8_kv = d->o->sim_fp8, .sim_fp4_index = d->o->sim_fp4};
    const lsa_status st = lsa_engine_open(&d->engine, d->o->teacher, &eo, err);
    if (st == LSA_OK && *lsa_teacher_note(lsa_engine_teacher(d->engine)))
        lsa_warn("%s", lsa_teacher_note(lsa_engine_teacher(d->engine)));
    return st;
}

/* *.tmp is garbage by definition; a shard that the manifest does not name was sealed but not recorded. */
lsa_status lsa_dump_clean(const lsa_manifest *m, const char *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    DIR *dir = opendir(out);
    if (!dir) LSA_RET_FAIL(LSA_E_IO, "cannot open '%s': %s", out, strerror(errno));
    for (struct dirent *e; (e = readdir(dir));) {
        size_t n = strlen(e->d_name);
        bool junk = n > 4 && !strcmp(e->d_name + n - 4, ".tmp");
        if (!strncmp(e->d_name, "shard_", 6) && n > 3 && !strcmp(e->d_name + n - 3, ".h5")) {
            junk = true;
            for (int64_t i = 0; i < m->shard.len; i++)
                junk = junk && strcmp(e->d_name, m->shard.data[i].file);
        }
        if (!junk) continue;
        char path[LSA_PATH_MAX];
        LSA_TRY(lsa_path(path, err, "%s/%s", out, e->d_name));
        LSA_TRY(lsa_remove_tree(path, err));
    }
done:
    closedir(dir);
    return st;
}

/* Before anything is written: a GPU that is not there, or a rule that it does not serve. */
static lsa_status open_reader(dump *d, int64_t longest, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_ctx_create(&d->ctx, d->device, err));
    if (lsa_ctx_kind(d->ctx) == LSA_BACKEND_CUDA) {
        LSA_TRY(lsa_gpu_run_create(&d->reader.gpu, d->ctx, d->engine, longest, 0, err));
    } else {
        const lsa_session_opts so = {.max_tokens = longest, .chunk = LSA_TAP_CHUNK};
        LSA_TRY(lsa_session_create(&d->reader.session, d->engine, &so, err));
    }
    LSA_TRY(lsa_reader_check(&d->reader, lsa_engine_config(d->engine), &d->in.load.rule, err));
done:
    return st;
}

/* What the time went into; GPU stages and the other threads run side by side. */
static lsa_status tell_times(dump *d, double seconds, int64_t tokens, lsa_err *err) {
    lsa_dump_times *const t = d->times;
    lsa_status st = LSA_OK;
    t->seconds = seconds;
    t->tokens = tokens;
    t->sealing = lsa_sink_seconds(d->sink);
    if (!d->reader.gpu) return LSA_OK;
    t->merging = lsa_lane_seconds(d->merging);
    LSA_TRY(lsa_gpu_run_times(d->reader.gpu, &t->gpu, err));
    t->on_gpu = true;
    lsa_dump_log_times(t);
done:
    return st;
}

static lsa_status loop(dump *d, lsa_dump_plan *plan, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n_doc = lsa_docs_count(d->in.docs), first = d->m.info.n_doc;
    double start;
    int64_t before;
    if (first > n_doc)
        LSA_FAIL(LSA_E_FORMAT, "'%s': the manifest has %lld documents sealed, the input has %lld", d->out,
                 (long long)first, (long long)n_doc);

    for (int64_t i = 0; i < first; i++) d->done_tokens += lsa_docs_at(d->in.docs, i)->n_token;
    if (first < n_doc)
        LSA_TRY(lsa_dump_measure(plan, &d->reader, &d->in, lsa_docs_at(d->in.docs, first), first, err));
    before = d->done_tokens;
    lsa_dump_log_plan(plan);
    LSA_TRY(lsa_dump_clean(&d->m, d->out, err));
    lsa_progress_begin(&d->progress, "dump", "tokens", (double)plan->tokens, (double)d->done_tokens);
    LSA_TRY(lsa_sink_create(&d->sink, &d->m, d->out, d->o->shard_bytes, d->reader.gpu != NULL, err));
    start = lsa_now_s();
    LSA_TRY(d->reader.gpu ? by_gpu(d, first, n_doc, err) : by_session(d, first, n_doc, err));
    LSA_TRY(lsa_sink_finish(d->sink, err));
    d->m.complete = true;
    LSA_TRY(lsa_manifest_save(&d->m, d->out, err));
    lsa_progress_end(&d->progress);
    lsa_info("sealed %lld shards: %lld documents, %lld tokens", (long long)d->m.shard.len,
             (long long)d->m.info.n_doc, (long long)d->m.info.n_token);
    LSA_TRY(tell_times(d, lsa_now_s() - start, d->done_tokens - before, err));
done:
    return st;
}

static void dump_fini(dump *d) {
    lsa_lane_destroy(d->merging); /* before the sink that it feeds */
    lsa_sink_destroy(d->sink);
    lsa_session_destroy(d->reader.session);
    lsa_gpu_run_destroy(d->reader.gpu);
    lsa_ctx_destroy(d->ctx);
    lsa_dump_inputs_close(&d->in);
    lsa_engine_close(d->engine);
    lsa_manifest_fini(&d->m);
}

/* Paths are stored absolute, so that resume works from any folder. */
static lsa_status absolute(char out[LSA_PATH_MAX], const char *path, lsa_err *err) {
    if (!realpath(path, out)) LSA_RET_FAIL(LSA_E_IO, "cannot find '%s': %s", path, strerror(errno));
    return LSA_OK;
}

/* A folder that `run` may fill: no manifest, and no shards that lost theirs (they would be taken for
 * garbage). */
lsa_status lsa_dump_check_fresh(const char *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    DIR *dir = NULL;
    LSA_TRY(lsa_path(path, err, "%s/manifest.json", out));
    if (lsa_exists(path)) {
        lsa_manifest old;
        LSA_TRY(lsa_manifest_load(&old, out, err));
        const bool complete = old.complete;
        lsa_manifest_fini(&old);
        LSA_FAIL(LSA_E_ARG,
                 complete ? "'%s' already holds a complete dump; choose another --out or delete it"
                          : "'%s' holds a dump that was interrupted; 'lsa-dump resume' goes on with it",
                 out);
    }
    dir = opendir(out);
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (!strncmp(e->d_name, "shard_", 6))
            LSA_FAIL(LSA_E_ARG, "'%s' holds '%s' but no manifest.json; choose another --out or delete it",
                     out, e->d_name);
done:
    if (dir) closedir(dir);
    return st;
}

lsa_status lsa_dump_run(const lsa_dump_opts *o, const char *out, const char *device, bool dry_run,
                        lsa_dump_plan *plan, lsa_dump_times *times, lsa_err *err) {
    lsa_status st = LSA_OK;
    dump d = {.o = o, .out = out, .device = device, .times = times};
    memset(times, 0, sizeof *times);
    int lock = -1;
    char abs[3][LSA_PATH_MAX];
    memset(plan, 0, sizeof *plan);
    if (!dry_run) LSA_TRY(lsa_dump_check_fresh(out, err));
    LSA_TRY(absolute(abs[0], o->teacher, err));
    LSA_TRY(absolute(abs[1], o->tokens, err));
    if (o->needs) LSA_TRY(absolute(abs[2], o->needs, err));
    LSA_TRY(lsa_dump_inputs_open(&d.in, o, NULL, err));
    LSA_TRY(lsa_dump_inputs_plan(plan, &d.in, o, out, err));
    LSA_TRY(lsa_dump_fits(plan, &d.in.load, out, err));
    LSA_TRY(open_teacher(&d, err));
    if (dry_run) {
        lsa_dump_log_plan(plan);
        goto done;
    }
    LSA_TRY(open_reader(&d, plan->longest, err));
    LSA_TRY(lsa_mkdirs(out, err));
    LSA_TRY(lsa_lock_dir(&lock, out, err));
    LSA_TRY(lsa_dump_check_fresh(out, err)); /* again, now that nobody else can start */
    fill_info(&d.m.info, &d);
    const char *const paths[3] = {abs[0], abs[1], o->needs ? abs[2] : NULL};
    d.m.run = lsa_dump_opts_to_json(o, paths, lsa_docs_hash(d.in.docs), lsa_docs_count(d.in.docs));
    if (!d.m.run)
        LSA_FAIL(LSA_E_ARG,
                 "the paths of teacher, tokens and needs must be UTF-8, so that resume finds them");
    LSA_TRY(lsa_manifest_save(&d.m, out, err));
    LSA_TRY(loop(&d, plan, err));
done:
    dump_fini(&d);
    lsa_unlock(lock);
    return st;
}

lsa_status lsa_dump_resume(const char *out, const char *device, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_dump_opts o;
    lsa_dump_times times = {0};
    dump d = {.o = &o, .out = out, .device = device, .times = &times};
    lsa_dump_plan plan = {0};
    int lock = -1;
    char hex[17];
    const char *want;
    LSA_TRY(
        lsa_manifest_load(&d.m, out, err)); /* says it is a dump at all, before a lock file is made in it */
    LSA_TRY(lsa_lock_dir(&lock, out, err));
    lsa_manifest_fini(&d.m);
    LSA_TRY(lsa_manifest_load(&d.m, out, err)); /* the state that nobody else can change any more */
    if (d.m.complete) {
        lsa_info("'%s' is complete: nothing to resume", out);
        goto done;
    }
    LSA_TRY(lsa_dump_opts_from_json(&o, d.m.run, out, err));
    LSA_TRY(lsa_dump_inputs_open(&d.in, &o, NULL, err));
    LSA_TRY(open_teacher(&d, err));
    LSA_TRY(lsa_json_str(&want, d.m.run, "documents_xxh64", out, err));
    lsa_hex64(hex, lsa_docs_hash(d.in.docs));
    if (strcmp(hex, want))
        LSA_FAIL(LSA_E_FORMAT, "the documents in '%s' changed since the dump began; start a new dump",
                 o.tokens);
    if (lsa_teacher_hash(lsa_engine_teacher(d.engine)) != d.m.info.teacher_hash)
        LSA_FAIL(LSA_E_FORMAT, "the teacher in '%s' changed since the dump began; start a new dump",
                 o.teacher);
    LSA_TRY(lsa_dump_inputs_plan(&plan, &d.in, &o, out, err));
    LSA_TRY(open_reader(&d, plan.longest, err));
    LSA_TRY(loop(&d, &plan, err));
done:
    dump_fini(&d);
    lsa_unlock(lock);
    return st;
}
