/* The import loop. Everything is read in C, pickles too: one command, no Python, no second copy of terabytes
 * on disk, and nothing of a pickle is ever run (data/pickle.h).
 *
 * Invariant: what is in the manifest was checked whole. DURABLE: manifest.json is replaced after each sealed
 * shard and says after which input it goes on. */
#include "data/dump/import.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/dump/import_doc.h"
#include "data/dump/run.h"
#include "data/teacher.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/version.h"

typedef struct item {
    char *label;  /* path, or path:line */
    json_t *line; /* NULL: a pickle */
} item;

typedef struct importer {
    const lsa_import_opts *o;
    const char *out;
    char *from[LSA_MULTI_MAX], *teacher; /* absolute */
    LSA_VEC(item) item;
    lsa_manifest m;
    LSA_VEC(lsa_doc_stats) open;
    int64_t open_bytes, skipped, top_k;
    const char *kind; /* of hidden vectors; NULL: none are kept */
    bool settled;     /* layers, label rule and kind are those of the first document */
    bool keyless;     /* some hidden vectors were left out for want of keys */
    int lock;         /* -1 before anything is written */
} importer;

lsa_import_opts lsa_import_defaults(void) {
    return (lsa_import_opts){
        .top_p = 0.6, .min_votes = 3, .hidden_stride = 1, .shard_bytes = INT64_C(256) << 20};
}

/* ---- options ---- */

static lsa_status check_opts(const lsa_import_opts *o, lsa_err *err) {
    if (!(o->top_p > 0 && o->top_p <= 1))
        LSA_RET_FAIL(LSA_E_ARG, "--top-p must be in (0, 1], found %g", o->top_p);
    if (o->pool < 0 || o->pool > 1 << 20)
        LSA_RET_FAIL(LSA_E_ARG, "--pool must be in [1, %d], found %lld", 1 << 20, (long long)o->pool);
    if (o->min_votes < 1 || o->min_votes > LSA_MAX_CSA)
        LSA_RET_FAIL(LSA_E_ARG, "--min-votes must be in [1, %d], found %lld", LSA_MAX_CSA,
                     (long long)o->min_votes);
    if (o->hidden_stride < 1 || o->hidden_stride > 65536)
        LSA_RET_FAIL(LSA_E_ARG, "--hidden-stride must be in [1, 65536], found %lld",
                     (long long)o->hidden_stride);
    return LSA_OK;
}

static json_t *opts_to_json(const importer *x) {
    const lsa_import_opts *o = x->o;
    json_t *from = json_array();
    for (int i = 0; i < o->from.n; i++) json_array_append_new(from, json_string(x->from[i]));
    json_t *j = json_pack("{s:o, s:s, s:f, s:I, s:I, s:I, s:I, s:b}", "from", from, "teacher", x->teacher,
                          "top_p", o->top_p, "pool", (json_int_t)o->pool, "min_votes",
                          (json_int_t)o->min_votes, "hidden_stride", (json_int_t)o->hidden_stride,
                          "shard_bytes", (json_int_t)o->shard_bytes, "skip_bad", o->skip_bad);
    return json_array_size(from) == (size_t)o->from.n
               ? json_pack("{s:o, s:s}", "import", j, "lsa_version", lsa_version())
               : NULL;
}

static lsa_status opts_from_json(lsa_import_opts *o, const json_t *run, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *j, *from;
    *o = lsa_import_defaults();
    LSA_TRY(lsa_json_object(&j, run, "import", where, err));
    LSA_TRY(lsa_json_array(&from, j, "from", where, err));
    for (size_t i = 0; i < json_array_size(from) && i < LSA_MULTI_MAX; i++) {
        o->from.v[i] = json_string_value(json_array_get(from, i));
        o->from.n++;
        if (!o->from.v[i]) LSA_FAIL(LSA_E_FORMAT, "%s: run.import.from[%zu] is not a path", where, i);
    }
    LSA_TRY(lsa_json_str(&o->teacher, j, "teacher", where, err));
    LSA_TRY(lsa_json_f64(&o->top_p, j, "top_p", where, err));
    LSA_TRY(lsa_json_i64(&o->pool, j, "pool", where, err));
    LSA_TRY(lsa_json_i64(&o->min_votes, j, "min_votes", where, err));
    LSA_TRY(lsa_json_i64(&o->hidden_stride, j, "hidden_stride", where, err));
    LSA_TRY(lsa_json_i64(&o->shard_bytes, j, "shard_bytes", where, err));
    o->skip_bad = json_is_true(json_object_get(j, "skip_bad"));
    LSA_TRY(check_opts(o, err));
done:
    return st;
}

/* ---- inputs ---- */

static bool ends_with(const char *s, const char *tail) {
    const size_t n = strlen(s), k = strlen(tail);
    return n > k && !strcmp(s + n - k, tail);
}

static lsa_status copy_string(char **out, const char *s, lsa_err *err) {
    const lsa_status st = lsa_alloc_((void **)out, (int64_t)strlen(s) + 1, 1, "a path", err);
    if (st == LSA_OK) memcpy(*out, s, strlen(s) + 1);
    return st;
}

static lsa_status add_item(importer *x, const char *label, json_t *line, lsa_err *err) {
    lsa_status st = LSA_VEC_RESERVE(x->item, x->item.len + 1, err);
    if (st != LSA_OK) return st;
    item *i = &x->item.data[x->item.len];
    *i = (item){0};
    st = copy_string(&i->label, label, err);
    if (st != LSA_OK) return st;
    i->line = json_incref(line);
    x->item.len++;
    return LSA_OK;
}

static int by_label(const void *a, const void *b) {
    return strcmp(((const item *)a)->label, ((const item *)b)->label);
}

static lsa_status add_folder(importer *x, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t before = x->item.len;
    char file[LSA_PATH_MAX];
    DIR *dir = opendir(path);
    if (!dir) LSA_RET_FAIL(LSA_E_IO, "cannot open '%s': %s", path, strerror(errno));
    for (struct dirent *e; (e = readdir(dir));) {
        if (strncmp(e->d_name, "doc_", 4) || !ends_with(e->d_name, ".pkl")) continue;
        LSA_TRY(lsa_path(file, err, "%s/%s", path, e->d_name));
        LSA_TRY(add_item(x, file, NULL, err));
    }
    if (x->item.len == before) LSA_FAIL(LSA_E_ARG, "--from '%s': the folder holds no doc_*.pkl", path);
    qsort(x->item.data + before, (size_t)(x->item.len - before), sizeof(item), by_label);
done:
    closedir(dir);
    return st;
}

static lsa_status add_lines(importer *x, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t before = x->item.len;
    char *text = NULL, where[LSA_PATH_MAX + 32];
    size_t n;
    json_t *o = NULL;
    int64_t number = 1;
    LSA_TRY(lsa_read_file(&text, &n, path, err));
    for (char *p = text, *end = text + n; p < end; number++) {
        char *nl = memchr(p, '\n', (size_t)(end - p));
        const size_t len = nl ? (size_t)(nl - p) : (size_t)(end - p);
        snprintf(where, sizeof where, "%s:%lld", path, (long long)number);
        if (strspn(p, " \t\r") < len) {
            LSA_TRY(lsa_json_parse(&o, p, len, where, err));
            LSA_TRY(add_item(x, where, o, err));
            json_decref(o);
            o = NULL;
        }
        p += len + 1;
    }
    if (x->item.len == before) LSA_FAIL(LSA_E_FORMAT, "%s: no documents", path);
done:
    json_decref(o);
    lsa_free(text);
    return st;
}

static lsa_status absolute(char **out, const char *path, lsa_err *err) {
    char buf[LSA_PATH_MAX];
    if (!realpath(path, buf)) LSA_RET_FAIL(LSA_E_IO, "cannot find '%s': %s", path, strerror(errno));
    return copy_string(out, buf, err);
}

static lsa_status list_inputs(importer *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int i = 0; i < x->o->from.n; i++) {
        LSA_TRY(absolute(&x->from[i], x->o->from.v[i], err));
        const char *path = x->from[i];
        if (lsa_is_dir(path))
            LSA_TRY(add_folder(x, path, err));
        else if (ends_with(path, ".jsonl"))
            LSA_TRY(add_lines(x, path, err));
        else if (ends_with(path, ".pkl"))
            LSA_TRY(add_item(x, path, NULL, err));
        else
            LSA_FAIL(LSA_E_ARG, "--from '%s' is neither a folder of doc_*.pkl nor a .pkl or .jsonl file",
                     path);
    }
done:
    return st;
}

/* ---- the model ---- */

static lsa_status has_weights(bool *yes, const char *dir, lsa_err *err) {
    *yes = false;
    DIR *d = opendir(dir);
    if (!d) LSA_RET_FAIL(LSA_E_IO, "cannot open '%s': %s", dir, strerror(errno));
    for (struct dirent *e; (e = readdir(d));) *yes = *yes || ends_with(e->d_name, ".safetensors");
    closedir(d);
    return LSA_OK;
}

static lsa_status identity(lsa_shards_info *f, const char *dir, const char *config, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_teacher *t = NULL;
    char *text = NULL;
    size_t n;
    bool weights;
    const char *slash = strrchr(dir, '/');
    snprintf(f->teacher, sizeof f->teacher, "%.95s", slash ? slash + 1 : dir);
    LSA_TRY(has_weights(&weights, dir, err));
    if (weights) {
        LSA_TRY(lsa_teacher_open(&t, dir, err));
        f->teacher_hash = lsa_teacher_hash(t);
    } else {
        LSA_TRY(lsa_read_file(&text, &n, config, err));
        f->teacher_hash = lsa_xxh64(text, n);
    }
done:
    lsa_teacher_close(t);
    lsa_free(text);
    return st;
}

static lsa_status read_model(importer *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_teacher_config c;
    lsa_shards_info *f = &x->m.info;
    char path[LSA_PATH_MAX];
    LSA_TRY(absolute(&x->teacher, x->o->teacher, err));
    LSA_TRY(lsa_path(path, err, "%s/config.json", x->teacher));
    LSA_TRY(lsa_teacher_config_load(&c, path, err));
    if (c.n_csa == 0 || c.index_head_dim != LSA_KEY_BYTES - 4)
        LSA_FAIL(LSA_E_UNSUPPORTED,
                 "%s: %d CSA layers with index keys of %d channels; shards hold keys of %d", path, c.n_csa,
                 c.index_head_dim, LSA_KEY_BYTES - 4);
    LSA_TRY(identity(f, x->teacher, path, err));
    f->hidden = c.hidden;
    f->hidden_stride = (int32_t)x->o->hidden_stride;
    f->n_csa = c.n_csa;
    memcpy(f->csa_id, c.csa_id, sizeof f->csa_id);
    f->rope = c.rope_compress;
    f->label_top_p = x->o->top_p;
    f->label_pool = (int32_t)(x->o->pool ? x->o->pool : c.index_topk);
    f->label_min_votes = (int32_t)x->o->min_votes;
done:
    return st;
}

/* ---- documents ---- */

/* Which tensor the hidden vectors are that the shards keep. */
static const char *kept_kind(const importer *x, const lsa_import_doc *d) {
    for (int32_t o = 0; o < x->m.info.n_csa; o++)
        if (lsa_import_has(d, o)) return d->kind;
    return NULL;
}

/* Layers, label rule and kind of hidden vectors are those of the first document; every other must agree. */
static void settle(importer *x, const lsa_import_doc *d) {
    lsa_shards_info *f = &x->m.info;
    for (int32_t o = 0; o < f->n_csa; o++) {
        f->has_keys[o] = lsa_import_has(d, o);
        x->keyless = x->keyless || (d->layer[o].hidden && !d->layer[o].key);
    }
    if (d->top_k) { /* every selected entry is a vote: no prefix of the mass ever exceeds 1 */
        f->label_top_p = 1;
        f->label_pool = (int32_t)d->top_k;
        f->label_min_votes = 1;
    }
    x->kind = kept_kind(x, d);
    x->top_k = d->top_k;
    x->settled = true;
}

static lsa_status check_same(const importer *x, const lsa_import_doc *d, lsa_err *err) {
    const lsa_shards_info *f = &x->m.info;
    for (int32_t o = 0; o < f->n_csa; o++)
        if (f->has_keys[o] != lsa_import_has(d, o))
            LSA_RET_FAIL(LSA_E_FORMAT,
                         "%s: the layer map differs: CSA layer %d has %s here, unlike the documents before",
                         d->where, o,
                         f->has_keys[o] ? "no keys and hidden vectors" : "keys and hidden vectors");
    if (d->top_k != x->top_k)
        LSA_RET_FAIL(
            LSA_E_FORMAT,
            "%s: labels by another rule than those of the documents before: a selection of %lld, before %lld (0: votes)",
            d->where, (long long)d->top_k, (long long)x->top_k);
    const char *kind = kept_kind(x, d);
    if (!!kind != !!x->kind || (kind && strcmp(kind, x->kind)))
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: hidden vectors are '%s', those of the documents before '%s'",
                     d->where, kind ? kind : "none", x->kind ? x->kind : "none");
    return LSA_OK;
}

static lsa_status read_item(importer *x, lsa_import_doc *d, const item *i, lsa_err *err) {
    if (!i->line) return lsa_import_pickle(d, i->label, &x->m.info, err);
    char dir[LSA_PATH_MAX];
    snprintf(dir, sizeof dir, "%.*s", (int)(strrchr(i->label, '/') - i->label), i->label);
    return lsa_import_line(d, i->line, dir, i->label, &x->m.info, err);
}

static lsa_status one_document(importer *x, const item *i, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_import_doc d;
    lsa_doc_stats s = {0};
    const importer before = *x;
    LSA_TRY(read_item(x, &d, i, err));
    if (x->settled)
        LSA_TRY(check_same(x, &d, err));
    else
        settle(x, &d);
    LSA_TRY(lsa_import_build(&s, &d, &x->m.info, err));
    LSA_TRY(LSA_VEC_RESERVE(x->open, x->open.len + 1, err));
    x->open.data[x->open.len++] = s;
    x->open_bytes += lsa_doc_stats_bytes(&s, &x->m.info);
    memset(&s, 0, sizeof s);
done:
    if (st != LSA_OK && !before.settled) x->m.info = before.m.info, x->settled = false;
    lsa_doc_stats_fini(&s);
    lsa_import_close(&d);
    return st;
}

/* ---- shards ---- */

/* The folder comes into being with the first shard. */
static lsa_status create(importer *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (x->lock >= 0) return LSA_OK;
    LSA_TRY(lsa_mkdirs(x->out, err));
    LSA_TRY(lsa_lock_dir(&x->lock, x->out, err));
    LSA_TRY(lsa_dump_check_fresh(x->out, err));
    x->m.run = opts_to_json(x);
    if (!x->m.run)
        LSA_FAIL(LSA_E_ARG, "the paths of --from and --teacher must be UTF-8, so that resume finds them");
    if (x->kind) json_object_set_new(x->m.run, "hidden", json_string(x->kind));
    json_object_set_new(x->m.run, "top_k", json_integer((json_int_t)x->top_k));
    LSA_TRY(lsa_manifest_save(&x->m, x->out, err));
done:
    return st;
}

static lsa_status seal(importer *x, int64_t last, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_manifest_shard s;
    char file[64];
    if (x->open.len == 0) return LSA_OK;
    LSA_TRY(create(x, err));
    snprintf(file, sizeof file, "shard_%05lld.h5", (long long)x->m.shard.len);
    LSA_TRY(lsa_shard_seal(&s, x->out, file, &x->m.info, x->open.data, x->open.len, err));
    LSA_TRY(lsa_manifest_add(&x->m, &s, err));
    json_object_set_new(x->m.run, "after", json_string(x->item.data[last].label));
    json_object_set_new(x->m.run, "skipped", json_integer((json_int_t)x->skipped));
    LSA_TRY(lsa_manifest_save(&x->m, x->out, err));
    while (x->open.len) lsa_doc_stats_fini(&x->open.data[--x->open.len]);
    x->open_bytes = 0;
done:
    return st;
}

/* What no recording of this kind holds, so that nobody looks for it later. */
static void say_what_is_missing(const importer *x) {
    const lsa_shards_info *f = &x->m.info;
    int32_t keyed = 0;
    for (int32_t o = 0; o < f->n_csa; o++) keyed += f->has_keys[o];
    lsa_info(
        "not in the source: native logits and attention masses (/stats): no loss.kind kl, no eval.metric "
        "captured; train on votes (recipes/reference.yaml, or loss.kind focal or bce with loss.on layer)");
    if (keyed == 0)
        lsa_warn("not in the source: index keys. The shards hold votes only and cannot be trained on; add "
                 "index_keys.{ordinal} (data/IMPORT_FORMAT.md)");
    else
        lsa_info("keys and hidden vectors of %d of the model's %d CSA layers", keyed, f->n_csa);
    if (x->keyless)
        lsa_warn(
            "hidden vectors of CSA layers without index keys were left out: nothing can be scored there");
    if (x->kind && strcmp(x->kind, "attn_norm"))
        lsa_warn(
            "hidden vectors are '%s', not the attention input after its norm: an indexer trained on them can "
            "only be served by an engine that hands it the same tensor",
            x->kind);
    if (f->label_min_votes > 1)
        lsa_info("chunks with fewer than %d votes were not recorded: sample.min_layers %d or more",
                 f->label_min_votes, f->label_min_votes);
}

static lsa_status finish(importer *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(seal(x, x->item.len - 1, err));
    if (x->m.shard.len == 0)
        LSA_FAIL(LSA_E_FORMAT, "none of the %lld documents passed; nothing was written",
                 (long long)x->item.len);
    x->m.complete = true;
    json_object_set_new(x->m.run, "skipped", json_integer((json_int_t)x->skipped));
    LSA_TRY(lsa_manifest_save(&x->m, x->out, err));
    lsa_info("imported %lld documents, %lld labelled tokens into %lld shards; %lld documents left out",
             (long long)x->m.info.n_doc, (long long)x->m.info.n_row, (long long)x->m.shard.len,
             (long long)x->skipped);
    say_what_is_missing(x);
done:
    return st;
}

static lsa_status loop(importer *x, int64_t first, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_progress p;
    const int64_t n = x->item.len;
    lsa_progress_begin(&p, "import", "documents", (double)n, (double)first);
    for (int64_t i = first; i < n; i++) {
        lsa_err bad = {0};
        if (lsa_stop_requested())
            LSA_FAIL(LSA_E_INTERRUPTED,
                     x->lock >= 0 ? "stopped at document %lld of %lld; 'lsa-dump resume %s' goes on"
                                  : "stopped at document %lld of %lld, before the first shard of "
                                    "'%s' was whole: nothing was written",
                     (long long)i, (long long)n, x->out);
        st = one_document(x, &x->item.data[i], &bad);
        const bool refused = st == LSA_E_FORMAT || st == LSA_E_UNSUPPORTED; /* not: disk, memory */
        if (refused && x->o->skip_bad) {
            lsa_warn("left out: %s", bad.msg);
            x->skipped++;
            st = LSA_OK;
        } else if (refused && x->lock >= 0)
            lsa_info(
                "the shards before this document are sealed: repair or remove the file and 'lsa-dump resume %s'; "
                "--skip-bad leaves such documents out",
                x->out);
        if (st != LSA_OK) LSA_FAIL(st, "%s", bad.msg);
        if (x->open_bytes >= x->o->shard_bytes) LSA_TRY(seal(x, i, err));
        lsa_progress_update(&p, (double)(i + 1), NULL);
    }
    LSA_TRY(finish(x, err));
    lsa_progress_end(&p);
done:
    return st;
}

static void import_fini(importer *x) {
    while (x->open.len) lsa_doc_stats_fini(&x->open.data[--x->open.len]);
    lsa_free(x->open.data);
    for (int64_t i = 0; i < x->item.len; i++) {
        lsa_free(x->item.data[i].label);
        json_decref(x->item.data[i].line);
    }
    lsa_free(x->item.data);
    for (int i = 0; i < LSA_MULTI_MAX; i++) lsa_free(x->from[i]);
    lsa_free(x->teacher);
    lsa_manifest_fini(&x->m);
    lsa_unlock(x->lock);
}

lsa_status lsa_import_run(const lsa_import_opts *o, const char *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    importer x = {.o = o, .out = out, .lock = -1};
    LSA_TRY(check_opts(o, err));
    LSA_TRY(lsa_dump_check_fresh(out, err));
    LSA_TRY(read_model(&x, err));
    LSA_TRY(list_inputs(&x, err));
    LSA_TRY(loop(&x, 0, err));
done:
    import_fini(&x);
    return st;
}

lsa_status lsa_import_made(bool *yes, const char *out, lsa_err *err) {
    lsa_manifest m;
    const lsa_status st = lsa_manifest_load(&m, out, err);
    *yes = st == LSA_OK && json_object_get(m.run, "import");
    if (st == LSA_OK) lsa_manifest_fini(&m);
    return st;
}

/* Where the manifest says it goes on. */
static lsa_status find_after(int64_t *first, const importer *x, lsa_err *err) {
    const char *after = json_string_value(json_object_get(x->m.run, "after"));
    *first = 0;
    if (!after) return LSA_OK;
    for (int64_t i = 0; i < x->item.len && *first == 0; i++)
        if (!strcmp(x->item.data[i].label, after)) *first = i + 1;
    if (*first == 0)
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "'%s': the import stopped after '%s', which is not there any more; start a new one",
                     x->out, after);
    return LSA_OK;
}

/* The model read anew must be the one that the shards were made with; what the first document settled is
 * taken from the manifest. */
static lsa_status restore(importer *x, const lsa_manifest *old, lsa_err *err) {
    lsa_shards_info *f = &x->m.info;
    const lsa_shards_info *g = &old->info;
    if (f->teacher_hash != g->teacher_hash || f->n_csa != g->n_csa || f->hidden != g->hidden)
        LSA_RET_FAIL(LSA_E_FORMAT, "the model in '%s' changed since the import began; start a new one",
                     x->teacher);
    x->m.info = *g;
    x->m.run = json_incref(old->run);
    x->skipped = (int64_t)json_integer_value(json_object_get(old->run, "skipped"));
    x->top_k = (int64_t)json_integer_value(json_object_get(old->run, "top_k"));
    x->kind = json_string_value(json_object_get(old->run, "hidden"));
    x->settled = true;
    const lsa_status st = LSA_VEC_RESERVE(x->m.shard, old->shard.len, err);
    if (st != LSA_OK) return st;
    for (int64_t i = 0; i < old->shard.len; i++) x->m.shard.data[i] = old->shard.data[i];
    x->m.shard.len = old->shard.len;
    return LSA_OK;
}

lsa_status lsa_import_resume(const char *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_import_opts o;
    lsa_manifest old = {0};
    importer x = {.o = &o, .out = out, .lock = -1};
    int64_t first;
    LSA_TRY(lsa_lock_dir(&x.lock, out, err));
    LSA_TRY(lsa_manifest_load(&old, out, err));
    if (old.complete) {
        lsa_info("'%s' is complete: nothing to resume", out);
        goto done;
    }
    LSA_TRY(opts_from_json(&o, old.run, out, err));
    LSA_TRY(read_model(&x, err));
    LSA_TRY(restore(&x, &old, err));
    LSA_TRY(list_inputs(&x, err));
    LSA_TRY(find_after(&first, &x, err));
    LSA_TRY(lsa_dump_clean(&x.m, out, err));
    LSA_TRY(loop(&x, first, err));
done:
    import_fini(&x);
    lsa_manifest_fini(&old);
    return st;
}
