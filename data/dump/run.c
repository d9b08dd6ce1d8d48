/* The dump loop. Invariant: shard boundaries are a function of the documents and options alone, so a run that
 * was killed and resumed writes the same bytes as one that was not.
 *
 * DURABLE: manifest.json is replaced after each sealed shard; a sealed file that it does not name (killed in
 * between) is simply written again. */
#include "data/dump/run.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/dump/inputs.h"
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
    LSA_VEC(lsa_doc_stats) open; /* documents of the shard being gathered */
    int64_t open_bytes;
    lsa_progress progress;
    int64_t done_tokens;
} dump;

static lsa_status seal(dump *d, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_manifest_shard s;
    char file[64];
    if (d->open.len == 0) return LSA_OK;
    snprintf(file, sizeof file, "shard_%05lld.h5", (long long)d->m.shard.len);
    LSA_TRY(lsa_shard_seal(&s, d->out, file, &d->m.info, d->open.data, d->open.len, err));
    LSA_TRY(lsa_manifest_add(&d->m, &s, err));
    LSA_TRY(lsa_manifest_save(&d->m, d->out, err));
    for (int64_t i = 0; i < d->open.len; i++) lsa_doc_stats_fini(&d->open.data[i]);
    d->open.len = 0;
    d->open_bytes = 0;
done:
    return st;
}

/* After every chunk of tokens: Ctrl-C, and the progress line. */
static lsa_status on_chunk(void *user, int64_t n, lsa_err *err) {
    dump *d = user;
    d->done_tokens += n;
    lsa_progress_update(&d->progress, (double)d->done_tokens, NULL);
    if (lsa_stop_requested())
        LSA_RET_FAIL(LSA_E_INTERRUPTED, "stopped after %lld of %lld documents; 'lsa-dump resume %s' goes on",
                     (long long)d->m.info.n_doc, (long long)lsa_docs_count(d->in.docs), d->out);
    return LSA_OK;
}

static lsa_status one_document(dump *d, const lsa_doc *doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(LSA_VEC_RESERVE(d->open, d->open.len + 1, err));
    LSA_TRY(lsa_tap_document(&d->open.data[d->open.len], &d->reader, lsa_engine_config(d->engine),
                             &d->in.load.rule, doc, d->open.len == 0, on_chunk, d, err));
    d->open_bytes += lsa_doc_stats_bytes(&d->open.data[d->open.len], &d->m.info);
    d->open.len++;
done:
    return st;
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
        lsa_warn(
            "the GPU pass has run on emulated kernels only, not yet on a GPU: compare some documents with a dump by --device cpu");
        LSA_TRY(lsa_gpu_run_create(&d->reader.gpu, d->ctx, d->engine, longest, 0, err));
    } else {
        const lsa_session_opts so = {.max_tokens = longest, .chunk = LSA_TAP_CHUNK};
        LSA_TRY(lsa_session_create(&d->reader.session, d->engine, &so, err));
    }
    LSA_TRY(lsa_reader_check(&d->reader, lsa_engine_config(d->engine), &d->in.load.rule, err));
done:
    return st;
}

static lsa_status loop(dump *d, lsa_dump_plan *plan, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n_doc = lsa_docs_count(d->in.docs), first = d->m.info.n_doc;
    if (first > n_doc)
        LSA_FAIL(LSA_E_FORMAT, "'%s': the manifest has %lld documents sealed, the input has %lld", d->out,
                 (long long)first, (long long)n_doc);

    for (int64_t i = 0; i < first; i++) d->done_tokens += lsa_docs_at(d->in.docs, i)->n_token;
    if (first < n_doc)
        LSA_TRY(lsa_dump_measure(plan, &d->reader, &d->in, lsa_docs_at(d->in.docs, first), first, err));
    lsa_dump_log_plan(plan);
    LSA_TRY(lsa_dump_clean(&d->m, d->out, err));
    lsa_progress_begin(&d->progress, "dump", "tokens", (double)plan->tokens, (double)d->done_tokens);
    for (int64_t i = first; i < n_doc; i++) {
        LSA_TRY(one_document(d, lsa_docs_at(d->in.docs, i), err));
        if (d->open_bytes >= d->o->shard_bytes) LSA_TRY(seal(d, err));
    }
    LSA_TRY(seal(d, err));
    d->m.complete = true;
    LSA_TRY(lsa_manifest_save(&d->m, d->out, err));
    lsa_progress_end(&d->progress);
    lsa_info("sealed %lld shards: %lld documents, %lld tokens", (long long)d->m.shard.len,
             (long long)d->m.info.n_doc, (long long)d->m.info.n_token);
done:
    return st;
}

static void dump_fini(dump *d) {
    for (int64_t i = 0; i < d->open.len; i++) lsa_doc_stats_fini(&d->open.data[i]);
    lsa_free(d->open.data);
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
                        lsa_dump_plan *plan, lsa_err *err) {
    lsa_status st = LSA_OK;
    dump d = {.o = o, .out = out, .device = device};
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
    dump d = {.o = &o, .out = out, .device = device};
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
