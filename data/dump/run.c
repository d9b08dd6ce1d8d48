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

#include "kernels/core/csa_list.h"
#include "kernels/core/clock.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/version.h"

#define CHUNK 1024

lsa_dump_opts lsa_dump_defaults(void) {
    return (lsa_dump_opts){.layers = "all",
                           .top_p = 0.6,
                           .dense_min = 1e-4,
                           .hidden_stride = 64,
                           .shard_bytes = INT64_C(256) << 20};
}

/* ---- options <-> manifest ---- */

static json_t *opts_to_json(const lsa_dump_opts *o, const char *const path[3], uint64_t docs_hash,
                            int64_t n_doc) {
    char hex[17];
    lsa_hex64(hex, docs_hash);
    return json_pack(
        "{s:s, s:s, s:s?, s:s?, s:s, s:f, s:f, s:I, s:I, s:I, s:I, s:b, s:b, s:b, s:s, s:s, s:I}", "teacher",
        path[0], "tokens", path[1], "needs", path[2], "documents", o->documents, "layers", o->layers, "top_p",
        o->top_p, "dense_min", o->dense_min, "pool", (json_int_t)o->pool, "hidden_stride",
        (json_int_t)o->hidden_stride, "dense_every", (json_int_t)o->dense_every, "shard_bytes",
        (json_int_t)o->shard_bytes, "no_stats", o->no_stats, "sim_fp8", o->sim_fp8, "sim_fp4", o->sim_fp4,
        "lsa_version", lsa_version(), "documents_xxh64", hex, "n_documents", (json_int_t)n_doc);
}

static lsa_status opts_from_json(lsa_dump_opts *o, const json_t *j, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    *o = lsa_dump_defaults();
    if (!json_is_object(j) || !json_object_get(j, "teacher"))
        LSA_FAIL(LSA_E_FORMAT,
                 "%s: no 'run' options; these shards were not made by 'lsa-dump run' and cannot be resumed",
                 where);
    LSA_TRY(lsa_json_str(&o->teacher, j, "teacher", where, err));
    LSA_TRY(lsa_json_str(&o->tokens, j, "tokens", where, err));
    o->needs = json_string_value(json_object_get(j, "needs"));
    o->documents = json_string_value(json_object_get(j, "documents"));
    LSA_TRY(lsa_json_str(&o->layers, j, "layers", where, err));
    LSA_TRY(lsa_json_f64(&o->top_p, j, "top_p", where, err));
    LSA_TRY(lsa_json_f64(&o->dense_min, j, "dense_min", where, err));
    LSA_TRY(lsa_json_i64(&o->pool, j, "pool", where, err));
    LSA_TRY(lsa_json_i64(&o->hidden_stride, j, "hidden_stride", where, err));
    LSA_TRY(lsa_json_i64(&o->dense_every, j, "dense_every", where, err));
    LSA_TRY(lsa_json_i64(&o->shard_bytes, j, "shard_bytes", where, err));
    o->no_stats = json_is_true(json_object_get(j, "no_stats"));
    o->sim_fp8 = json_is_true(json_object_get(j, "sim_fp8"));
    o->sim_fp4 = json_is_true(json_object_get(j, "sim_fp4"));
done:
    return st;
}

static lsa_status make_rule(lsa_dump_rule *r, const lsa_dump_opts *o, const lsa_teacher_config *c,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    memset(r, 0, sizeof *r);
    r->top_p = o->top_p;
    r->pool = (int32_t)(o->pool ? o->pool : c->index_topk);
    r->hidden_stride = (int32_t)o->hidden_stride;
    r->stats = !o->no_stats;
    r->dense_every = o->dense_every;
    r->dense_min = o->dense_min;
    if (!(o->top_p > 0 && o->top_p <= 1))
        LSA_FAIL(LSA_E_ARG, "--top-p must be in (0, 1], found %g", o->top_p);
    if (o->pool < 0 || o->pool > 4096 || r->pool < 1 || r->pool > 4096)
        LSA_FAIL(LSA_E_ARG, "--pool must be in [1, 4096], found %lld",
                 (long long)(o->pool ? o->pool : c->index_topk));
    if (o->hidden_stride < 1 || o->hidden_stride > 65536)
        LSA_FAIL(LSA_E_ARG, "--hidden-stride must be in [1, 65536], found %lld", (long long)o->hidden_stride);
    if (o->dense_every < 0) LSA_FAIL(LSA_E_ARG, "--dense-every must not be negative");
    if (c->n_csa == 0)
        LSA_FAIL(LSA_E_UNSUPPORTED,
                 "the teacher has no compressed-sparse-attention layer: there is nothing to index");
    if (c->index_head_dim != 128)
        LSA_FAIL(LSA_E_UNSUPPORTED, "the teacher's index keys have %d channels; shards hold keys of 128",
                 c->index_head_dim);
    LSA_TRY(lsa_csa_list(r->has_keys, o->layers, c->n_csa, LSA_E_ARG, "--layers", err));
done:
    return st;
}

/* ---- plan ---- */

static void fill_plan(lsa_dump_plan *p, const lsa_docs *d, const lsa_teacher_config *c,
                      const lsa_dump_rule *r) {
    p->documents = lsa_docs_count(d);
    p->tokens = lsa_docs_tokens(d);
    for (int64_t i = 0; i < p->documents; i++)
        p->longest = lsa_max_i64(p->longest, lsa_docs_at(d, i)->n_token);
    int64_t keyed = 0, per_row = 12 + 8 + 5 * c->n_csa * lsa_min_i64(r->pool, c->index_topk) / 2;
    for (int32_t o = 0; o < c->n_csa; o++) keyed += r->has_keys[o];
    if (r->stats) per_row += (12 + 8 * (int64_t)c->index_topk) * c->n_csa;
    p->disk_bytes = p->tokens * per_row + p->tokens * keyed * LSA_KEY_BYTES / LSA_CHUNK +
                    p->tokens / r->hidden_stride * keyed * c->hidden * 2;
    if (r->dense_every) p->disk_bytes += p->tokens / r->dense_every * c->n_csa * 2048 * 6;
    /* one document's gathered rows, the session's rows, the open shard twice (gathered, then joined column by
     * column) */
    p->host_bytes = p->longest * c->n_csa * (4 * (int64_t)r->pool + 8 * (int64_t)c->index_topk) +
                    p->longest / LSA_CHUNK * c->n_csa * 4 * (c->head_dim + 128) + (INT64_C(512) << 20);
}

void lsa_dump_print_plan(const lsa_dump_plan *p) {
    lsa_info(
        "plan: %lld documents, %lld tokens, longest %lld; at most %.2f GiB on disk (%.1f GiB free), about %.1f GiB of host memory",
        (long long)p->documents, (long long)p->tokens, (long long)p->longest, (double)p->disk_bytes / 0x1p30,
        (double)p->disk_free / 0x1p30, (double)p->host_bytes / 0x1p30);
    if (p->tokens_per_s > 0)
        lsa_info(
            "plan: %.0f tokens/s measured on the first tokens, about %.0f s in all (long documents are slower)",
            p->tokens_per_s, p->seconds);
}

static lsa_status check_disk(lsa_dump_plan *p, const char *out, lsa_err *err) {
    lsa_status st = lsa_disk_free(&p->disk_free, out, err);
    if (st == LSA_OK && p->disk_bytes > p->disk_free)
        LSA_RET_FAIL(
            LSA_E_NOSPC,
            "the dump may need %.2f GiB, '%s' has %.2f GiB free; take fewer --documents, a larger --hidden-stride, --no-stats, or another disk",
            (double)p->disk_bytes / 0x1p30, out, (double)p->disk_free / 0x1p30);
    return st;
}

lsa_status lsa_dump_make_plan(lsa_dump_plan *plan, const lsa_dump_opts *o, const char *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_teacher_config c;
    lsa_dump_rule r;
    lsa_docs *d = NULL;
    char path[LSA_PATH_MAX];
    memset(plan, 0, sizeof *plan);
    LSA_TRY(lsa_path(path, err, "%s/config.json", o->teacher));
    LSA_TRY(lsa_teacher_config_load(&c, path, err));
    LSA_TRY(make_rule(&r, o, &c, err));
    LSA_TRY(lsa_docs_open(&d, o->tokens, o->needs, o->documents, c.vocab, err));
    fill_plan(plan, d, &c, &r);
    LSA_TRY(check_disk(plan, out, err));
done:
    lsa_docs_close(d);
    return st;
}

/* ---- the loop ---- */

typedef struct dump {
    const lsa_dump_opts *o;
    const char *out;
    lsa_engine *engine;
    lsa_session *session;
    lsa_docs *docs;
    lsa_dump_rule rule;
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

static lsa_status one_document(dump *d, const lsa_doc *doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_tap_state *tap = NULL;
    LSA_TRY(lsa_tap_begin(&tap, lsa_engine_config(d->engine), &d->rule, doc->n_token, d->open.len == 0, err));
    const lsa_taps taps = lsa_tap_callbacks(tap);
    lsa_session_reset(d->session);
    for (int64_t t = 0; t < doc->n_token; t += CHUNK) {
        const int64_t n = lsa_min_i64(CHUNK, doc->n_token - t);
        if (lsa_stop_requested())
            LSA_FAIL(LSA_E_INTERRUPTED, "stopped after %lld of %lld documents; 'lsa-dump resume %s' goes on",
                     (long long)d->m.info.n_doc, (long long)lsa_docs_count(d->docs), d->out);
        LSA_TRY(lsa_session_forward(d->session, doc->token + t, n, NULL, false, &taps, err));
        d->done_tokens += n;
        lsa_progress_update(&d->progress, (double)d->done_tokens, NULL);
    }
    LSA_TRY(LSA_VEC_RESERVE(d->open, d->open.len + 1, err));
    LSA_TRY(lsa_tap_finish(&d->open.data[d->open.len], tap, d->session, doc, err));
    d->open_bytes += lsa_doc_stats_bytes(&d->open.data[d->open.len], &d->m.info);
    d->open.len++;
done:
    lsa_tap_end(tap);
    return st;
}

/* Speed on the first tokens of the first document still to do. */
static lsa_status measure(dump *d, lsa_dump_plan *p, int64_t left, lsa_err *err) {
    const lsa_doc *doc = lsa_docs_at(d->docs, d->m.info.n_doc);
    const int64_t n = lsa_min_i64(CHUNK, doc->n_token);
    double t0 = lsa_now_s();
    lsa_status st = lsa_session_forward(d->session, doc->token, n, NULL, false, NULL, err);
    lsa_session_reset(d->session);
    p->tokens_per_s = (double)n / (lsa_now_s() - t0 + 1e-9);
    p->seconds = (double)left / p->tokens_per_s;
    return st;
}

static void fill_info(lsa_shards_info *f, const dump *d) {
    const lsa_teacher_config *c = lsa_engine_config(d->engine);
    const lsa_teacher *t = lsa_engine_teacher(d->engine);
    snprintf(f->teacher, sizeof f->teacher, "%.95s", lsa_teacher_name(t));
    f->teacher_hash = lsa_teacher_hash(t);
    f->hidden = c->hidden;
    f->hidden_stride = d->rule.hidden_stride;
    f->n_csa = c->n_csa;
    memcpy(f->csa_id, c->csa_id, sizeof f->csa_id);
    memcpy(f->has_keys, d->rule.has_keys, sizeof f->has_keys);
    f->has_stats = d->rule.stats;
    f->has_dense = d->rule.dense_every > 0;
    f->rope = c->rope_compress;
    f->label_top_p = d->rule.top_p;
    f->label_pool = d->rule.pool;
}

static lsa_status open_inputs(dump *d, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_engine_opts eo = {.sim_fp8_kv = d->o->sim_fp8, .sim_fp4_index = d->o->sim_fp4};
    LSA_TRY(lsa_engine_open(&d->engine, d->o->teacher, &eo, err));
    const lsa_teacher_config *c = lsa_engine_config(d->engine);
    LSA_TRY(make_rule(&d->rule, d->o, c, err));
    LSA_TRY(lsa_docs_open(&d->docs, d->o->tokens, d->o->needs, d->o->documents, c->vocab, err));
done:
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

static lsa_status loop(dump *d, lsa_dump_plan *plan, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n_doc = lsa_docs_count(d->docs), first = d->m.info.n_doc;
    if (first > n_doc)
        LSA_FAIL(LSA_E_FORMAT, "'%s': the manifest has %lld documents sealed, the input has %lld", d->out,
                 (long long)first, (long long)n_doc);
    lsa_session_opts so = {.max_tokens = plan->longest, .chunk = CHUNK};
    LSA_TRY(lsa_session_create(&d->session, d->engine, &so, err));
    for (int64_t i = 0; i < first; i++) d->done_tokens += lsa_docs_at(d->docs, i)->n_token;
    if (first < n_doc) LSA_TRY(measure(d, plan, plan->tokens - d->done_tokens, err));
    lsa_dump_print_plan(plan);
    LSA_TRY(lsa_dump_clean(&d->m, d->out, err));
    lsa_progress_begin(&d->progress, "dump", "tokens", (double)plan->tokens, (double)d->done_tokens);
    for (int64_t i = first; i < n_doc; i++) {
        LSA_TRY(one_document(d, lsa_docs_at(d->docs, i), err));
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
    lsa_session_destroy(d->session);
    lsa_docs_close(d->docs);
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

lsa_status lsa_dump_run(const lsa_dump_opts *o, const char *out, bool dry_run, lsa_dump_plan *plan,
                        lsa_err *err) {
    lsa_status st = LSA_OK;
    dump d = {.o = o, .out = out};
    int lock = -1;
    char abs[3][LSA_PATH_MAX];
    memset(plan, 0, sizeof *plan);
    if (!dry_run) LSA_TRY(lsa_dump_check_fresh(out, err));
    LSA_TRY(absolute(abs[0], o->teacher, err));
    LSA_TRY(absolute(abs[1], o->tokens, err));
    if (o->needs) LSA_TRY(absolute(abs[2], o->needs, err));
    LSA_TRY(open_inputs(&d, err));
    fill_plan(plan, d.docs, lsa_engine_config(d.engine), &d.rule);
    LSA_TRY(check_disk(plan, out, err));
    if (dry_run) {
        lsa_dump_print_plan(plan);
        goto done;
    }
    LSA_TRY(lsa_mkdirs(out, err));
    LSA_TRY(lsa_lock_dir(&lock, out, err));
    LSA_TRY(lsa_dump_check_fresh(out, err)); /* again, now that nobody else can start */
    fill_info(&d.m.info, &d);
    const char *const paths[3] = {abs[0], abs[1], o->needs ? abs[2] : NULL};
    d.m.run = opts_to_json(o, paths, lsa_docs_hash(d.docs), lsa_docs_count(d.docs));
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

lsa_status lsa_dump_resume(const char *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_dump_opts o;
    dump d = {.o = &o, .out = out};
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
    LSA_TRY(opts_from_json(&o, d.m.run, out, err));
    LSA_TRY(open_inputs(&d, err));
    LSA_TRY(lsa_json_str(&want, d.m.run, "documents_xxh64", out, err));
    lsa_hex64(hex, lsa_docs_hash(d.docs));
    if (strcmp(hex, want))
        LSA_FAIL(LSA_E_FORMAT, "the documents in '%s' changed since the dump began; start a new dump",
                 o.tokens);
    if (lsa_teacher_hash(lsa_engine_teacher(d.engine)) != d.m.info.teacher_hash)
        LSA_FAIL(LSA_E_FORMAT, "the teacher in '%s' changed since the dump began; start a new dump",
                 o.teacher);
    fill_plan(&plan, d.docs, lsa_engine_config(d.engine), &d.rule);
    plan.disk_free = 0;
    LSA_TRY(lsa_disk_free(&plan.disk_free, out, err));
    LSA_TRY(loop(&d, &plan, err));
done:
    dump_fini(&d);
    lsa_unlock(lock);
    return st;
}
