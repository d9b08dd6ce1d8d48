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
    lsa_lane *merging;               /* of documents read by a GPU */
    LSA_VEC(struct flight *) flying; /* fed and not yet there */
    bool stream;
    int64_t wave_tokens;
    lsa_status given; /* of handing documents on */
    lsa_err why;
    lsa_gpu_times before; /* the first document */
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
    struct dump *d;
    const lsa_doc *doc;
    lsa_tap_state *taps;
    int64_t bytes;
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
    dump *const d = f->d;
    lsa_err why = {0};
    for (int64_t i = 0; i < d->flying.len; i++)
        if (d->flying.data[i] == f) d->flying.data[i] = d->flying.data[--d->flying.len];
    const lsa_status st = lsa_lane_give(d->merging, f, f->bytes, &why);
    if (st != LSA_OK && d->given == LSA_OK) d->given = st, d->why = why;
}

/* What the lane said when something was given to it. */
static lsa_status given(const dump *d, lsa_err *err) {
    if (d->given != LSA_OK && err && err->code == LSA_OK) *err = d->why;
    return d->given;
}

static lsa_status take_off(lsa_gpu_doc **out, dump *d, const lsa_doc *doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    flight *f = NULL;
    LSA_TRY(LSA_VEC_RESERVE(d->flying, d->flying.len + 1, err));
    LSA_TRY(LSA_NEW(f, 1, err));
    *f = (flight){.d = d, .doc = doc, .bytes = lsa_dump_flight_bytes(&d->in.load, doc->n_token)};
    d->flying.data[d->flying.len++] = f;
    LSA_TRY(lsa_tap_begin(&f->taps, lsa_engine_config(d->engine), &d->in.load.rule, doc->n_token, true, err));
    LSA_TRY(lsa_tap_gpu_doc(out, f->taps, doc, err));
    (*out)->done = arrived;
    (*out)->user = f;
done:
    return st;
}

/* Documents [first, last) through the GPU. */
static lsa_status feed(dump *d, int64_t first, int64_t last, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_doc **g = NULL;
    int64_t bytes = 0;
    for (int64_t i = first; i < last; i++)
        bytes += lsa_dump_flight_bytes(&d->in.load, lsa_docs_at(d->in.docs, i)->n_token);
    if (!lsa_lane_try(d->merging, bytes)) {
        LSA_TRY(lsa_gpu_run_drain(d->reader.gpu, err)); /* what is waited for must be able to arrive */
        LSA_TRY(lsa_lane_reserve(d->merging, bytes, err));
    }
    LSA_TRY(LSA_NEW(g, last - first, err));
    for (int64_t i = first; i < last; i++)
        LSA_TRY(take_off(&g[i - first], d, lsa_docs_at(d->in.docs, i), err));
    LSA_TRY(lsa_gpu_run_feed(d->reader.gpu, g, last - first, on_chunk, d, err));
    LSA_TRY(given(d, err));
done:
    lsa_free(g);
    return st;
}

/* The documents that pass the layers with the first one: it alone, if the weights stay on the GPU. */
static int64_t wave_end(const dump *d, int64_t first, int64_t n) {
    int64_t i = first + 1, tokens = lsa_docs_at(d->in.docs, first)->n_token;
    for (; d->stream && i < n; i++) {
        tokens += lsa_docs_at(d->in.docs, i)->n_token;
        if (tokens > d->wave_tokens) break;
    }
    return i;
}

static lsa_status by_gpu(dump *d, int64_t first, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK, ended;
    int64_t longest = 0;
    for (int64_t i = first; i < n; i++) longest = lsa_max_i64(longest, lsa_docs_at(d->in.docs, i)->n_token);
    const int64_t room = LSA_DUMP_IN_FLIGHT + lsa_dump_flight_bytes(&d->in.load, longest);
    LSA_TRY(lsa_gpu_run_times(d->reader.gpu, &d->before, err));
    LSA_TRY(lsa_lane_create(&d->merging, "merging", room, merge, drop_flight, d, err));
    for (int64_t i = first, end; i < n; i = end) {
        end = wave_end(d, i, n);
        LSA_TRY(feed(d, i, end, err));
    }
done:
    ended = lsa_gpu_run_drain(d->reader.gpu, st == LSA_OK ? err : NULL);
    if (st == LSA_OK) st = ended;
    if (st == LSA_OK) st = given(d, err);
    for (int64_t i = 0; i < d->flying.len; i++)
        drop_flight(d->flying.data[i]); /* of a run that was stopped */
    d->flying.len = 0;
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
    const lsa_engine_opts eo = {
        .sim_fp8_kv = d->o->sim_fp8, .sim_fp4_index = d->o->sim_fp4, .without_layers = d->stream};
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

/* Opens the device. Weights are streamed if that was asked for, or if they do not fit its memory; the plan
 * then counts what streaming keeps in host memory instead of all weights. */
static lsa_status open_device(dump *d, lsa_dump_plan *plan, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t room = 0;
    const int64_t all = plan->host[LSA_HOST_WEIGHTS];
    LSA_TRY(lsa_ctx_create(&d->ctx, d->device, err));
    d->stream = d->o->stream;
    const bool half = lsa_dump_half_streams(d->o);
    if (lsa_ctx_kind(d->ctx) != LSA_BACKEND_CUDA) {
        if (d->stream || d->o->wave_tokens || half || d->o->streams_dir)
            LSA_FAIL(LSA_E_ARG,
                     "--stream, --wave-tokens, --streams bf16 and --streams-dir belong to --device cuda");
        goto done;
    }
    lsa_dump_plan_beside(plan, &d->in.load);
    LSA_TRY(lsa_gpu_free_bytes(&room, d->ctx, err));
    d->stream = d->stream || all > room / 5 * 4;
    if (!d->stream) {
        if (d->o->wave_tokens || half || d->o->streams_dir)
            LSA_FAIL(LSA_E_ARG, "--wave-tokens, --streams bf16 and --streams-dir belong to --stream");
        goto done;
    }
    lsa_dump_plan_streaming(plan, &d->in.load);
    d->wave_tokens = d->o->wave_tokens ? d->o->wave_tokens : plan->streamed.wave_tokens;
    lsa_info(
        "plan: weights (%.1f GiB in f32, the GPU has %.1f GiB free) pass layer by layer, %lld tokens at a time",
        (double)all / 0x1p30, (double)room / 0x1p30, (long long)d->wave_tokens);
done:
    return st;
}

/* Before anything is written: a rule that the device does not serve. */
static lsa_status open_reader(dump *d, int64_t longest, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (lsa_ctx_kind(d->ctx) == LSA_BACKEND_CUDA) {
        LSA_TRY(lsa_gpu_run_create(&d->reader.gpu, d->ctx, d->engine, longest, 0, d->stream, err));
        lsa_gpu_run_park(d->reader.gpu, lsa_dump_half_streams(d->o), d->o->streams_dir);
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
    for (int i = 0; i < LSA_GPU_STAGES; i++) t->gpu.gpu[i] -= d->before.gpu[i];
    t->gpu.taps -= d->before.taps;
    t->gpu.wait -= d->before.wait;
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
    if (d->m.info.n_doc != n_doc)
        LSA_FAIL(LSA_E_BUG, "%lld of %lld documents were sealed", (long long)d->m.info.n_doc,
                 (long long)n_doc);
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
    lsa_free(d->flying.data);
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
    LSA_TRY(open_device(&d, plan, err));
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

lsa_status lsa_dump_resume(const char *out, const char *device, const lsa_dump_opts *how, lsa_err *err) {
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
    o.stream = how->stream, o.streams_dir = how->streams_dir, o.wave_tokens = how->wave_tokens,
    o.host_budget = how->host_budget;
    LSA_TRY(lsa_dump_inputs_open(&d.in, &o, NULL, err));
    LSA_TRY(lsa_dump_inputs_plan(&plan, &d.in, &o, out, err));
    LSA_TRY(open_device(&d, &plan, err));
    LSA_TRY(open_teacher(&d, err));
    LSA_TRY(lsa_json_str(&want, d.m.run, "documents_xxh64", out, err));
    lsa_hex64(hex, lsa_docs_hash(d.in.docs));
    if (strcmp(hex, want))
        LSA_FAIL(LSA_E_FORMAT, "the documents in '%s' changed since the dump began; start a new dump",
                 o.tokens);
    if (lsa_teacher_hash(lsa_engine_teacher(d.engine)) != d.m.info.teacher_hash)
        LSA_FAIL(LSA_E_FORMAT, "the teacher in '%s' changed since the dump began; start a new dump",
                 o.teacher);
    LSA_TRY(open_reader(&d, plan.longest, err));
    LSA_TRY(loop(&d, &plan, err));
done:
    dump_fini(&d);
    lsa_unlock(lock);
    return st;
}
