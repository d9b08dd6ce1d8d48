/* Checkpoints: see ckpt.h and CHECKPOINT_FORMAT.md.
 *
 * Invariant: a directory named step_NNNNNNNN is complete and was read back; `best` and `latest` name only
 * such directories, `best` is moved before `latest` (a crash between the two repeats the steps from `latest`
 * and writes `best` again). The mistake that would stay silent: putting a time, a path or a host name into a
 * file, so that a resumed run no longer equals an uninterrupted one. */
#include "data/ckpt.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/geom_json.h"
#include "data/lsa_safetensors.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

#define FORMAT   "lsa-ckpt/1"
#define MAX_STEP 99999999

/* ---- names ---- */

/* "step_" and at least 8 digits; the number is *step. */
static bool is_step_name(const char *s, int64_t *step) {
    if (strncmp(s, "step_", 5) != 0 || strlen(s) != 13) return false;
    *step = 0;
    for (const char *p = s + 5; *p; p++) {
        if (*p < '0' || *p > '9') return false;
        *step = *step * 10 + (*p - '0');
    }
    return true;
}

/* The step that the small file `path` names; -1 if the file does not exist. */
static lsa_status read_pointer(int64_t *step, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    char *text = NULL;
    size_t n;
    *step = -1;
    if (!lsa_exists(path)) goto done;
    LSA_TRY(lsa_read_file(&text, &n, path, err));
    char *nl = strchr(text, '\n');
    if (nl) *nl = 0;
    if (strlen(text) + (nl ? 1 : 0) != n || !is_step_name(text, step)) {
        *step = -1;
        LSA_FAIL(LSA_E_FORMAT,
                 "'%s' must hold the name of a step directory like step_00001000, found '%.40s'", path, text);
    }
done:
    lsa_free(text);
    return st;
}

static lsa_status write_pointer(const char *dir, const char *name, int64_t step, lsa_err *err) {
    char path[LSA_PATH_MAX], text[32];
    lsa_status st = lsa_path(path, err, "%s/%s", dir, name);
    if (st != LSA_OK) return st;
    int n = snprintf(text, sizeof text, "step_%08lld\n", (long long)step);
    return lsa_write_file(path, text, (size_t)n, err);
}

static bool is_ckpt_dir(const char *dir) {
    char p[LSA_PATH_MAX];
    lsa_err ignored = {0};
    return lsa_path(p, &ignored, "%s/MANIFEST.json", dir) == LSA_OK && lsa_exists(p);
}

static lsa_status from_pointer(char dir[LSA_PATH_MAX], bool *found, const char *base, const char *name,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    int64_t step;
    *found = false;
    LSA_TRY(lsa_path(path, err, "%s/%s", base, name));
    if (lsa_is_dir(path)) goto done;
    LSA_TRY(read_pointer(&step, path, err));
    if (step < 0) goto done;
    LSA_TRY(lsa_path(dir, err, "%s/step_%08lld", base, (long long)step));
    if (!is_ckpt_dir(dir))
        LSA_FAIL(LSA_E_FORMAT, "'%s' names '%s', which is not a complete checkpoint; name another step", path,
                 dir);
    *found = true;
done:
    return st;
}

lsa_status lsa_ckpt_resolve(char dir[LSA_PATH_MAX], const char *arg, lsa_err *err) {
    lsa_status st = LSA_OK;
    char base[LSA_PATH_MAX];
    bool found = false;
    LSA_TRY(lsa_path(dir, err, "%s", arg));
    if (!lsa_exists(arg)) LSA_FAIL(LSA_E_IO, "checkpoint '%s' does not exist", arg);
    if (!lsa_is_dir(arg)) {
        LSA_TRY(lsa_path(base, err, "%s", arg));
        char *slash = strrchr(base, '/');
        const char *name = slash ? slash + 1 : arg;
        if (strcmp(name, "latest") != 0 && strcmp(name, "best") != 0)
            LSA_FAIL(LSA_E_FORMAT,
                     "'%s' is not a checkpoint: expected a step directory, a latest or best file, or a run",
                     arg);
        char file[16];
        snprintf(file, sizeof file, "%s", name);
        if (slash) *slash = 0;
        LSA_TRY(from_pointer(dir, &found, slash ? base : ".", file, err));
        goto done;
    }
    if (is_ckpt_dir(arg)) goto done;
    for (int i = 0; i < 4 && !found; i++) {
        LSA_TRY(lsa_path(base, err, i < 2 ? "%s/ckpt" : "%s", arg));
        LSA_TRY(from_pointer(dir, &found, base, i % 2 ? "latest" : "best", err));
    }
    if (!found)
        LSA_FAIL(LSA_E_FORMAT,
                 "'%s' holds no checkpoint: expected MANIFEST.json, or ckpt/best or ckpt/latest", arg);
done:
    return st;
}

/* ---- cleaning ---- */

static int by_step(const void *a, const void *b) {
    int64_t x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return (x > y) - (x < y);
}

lsa_status lsa_ckpt_clean(const char *run, int64_t keep, int64_t milestone_every, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_VEC(int64_t) steps = {0};
    char base[LSA_PATH_MAX], path[LSA_PATH_MAX], tmp[LSA_PATH_MAX];
    int64_t latest, best;
    DIR *d = NULL;
    LSA_TRY(lsa_path(base, err, "%s/ckpt", run));
    if (!lsa_is_dir(base)) goto done;
    LSA_TRY(lsa_path(path, err, "%s/latest", base));
    LSA_TRY(read_pointer(&latest, path, err));
    LSA_TRY(lsa_path(path, err, "%s/best", base));
    LSA_TRY(read_pointer(&best, path, err));
    d = opendir(base);
    if (!d) LSA_FAIL(LSA_E_IO, "cannot open '%s': %s", base, strerror(errno));
    for (struct dirent *e; (e = readdir(d));) {
        size_t n = strlen(e->d_name);
        int64_t step;
        if (n > 4 && !strcmp(e->d_name + n - 4, ".tmp")) {
            LSA_TRY(lsa_path(path, err, "%s/%s", base, e->d_name));
            LSA_TRY(lsa_remove_tree(path, err));
        } else if (is_step_name(e->d_name, &step)) {
            LSA_TRY(LSA_VEC_RESERVE(steps, steps.len + 1, err));
            steps.data[steps.len++] = step;
        }
    }
    if (keep <= 0 || steps.len <= keep) goto done;
    qsort(steps.data, (size_t)steps.len, sizeof *steps.data, by_step);
    for (int64_t i = 0; i < steps.len - keep; i++) {
        if (steps.data[i] == latest || steps.data[i] == best) continue;
        if (milestone_every > 0 && steps.data[i] % milestone_every == 0) continue;
        /* DURABLE: renamed first, so that a crash leaves garbage, never a step directory with files missing.
         */
        LSA_TRY(lsa_path(path, err, "%s/step_%08lld", base, (long long)steps.data[i]));
        LSA_TRY(lsa_path(tmp, err, "%s/step_%08lld.old.tmp", base, (long long)steps.data[i]));
        LSA_TRY(lsa_rename_durable(path, tmp, err));
        LSA_TRY(lsa_remove_tree(tmp, err));
    }
done:
    if (d) closedir(d);
    lsa_free(steps.data);
    return st;
}

lsa_status lsa_ckpt_older(char dir[LSA_PATH_MAX], const char *run, const char *than, lsa_err *err) {
    lsa_status st = LSA_OK;
    char base[LSA_PATH_MAX];
    const char *slash = strrchr(than, '/');
    int64_t bound, step, newest = -1;
    DIR *d = NULL;
    dir[0] = 0;
    if (!is_step_name(slash ? slash + 1 : than, &bound))
        LSA_FAIL(LSA_E_ARG, "'%s' is not a step directory", than);
    LSA_TRY(lsa_path(base, err, "%s/ckpt", run));
    d = opendir(base);
    if (!d) LSA_FAIL(LSA_E_IO, "cannot open '%s': %s", base, strerror(errno));
    for (struct dirent *e; (e = readdir(d));)
        if (is_step_name(e->d_name, &step) && step < bound && step > newest) newest = step;
    if (newest >= 0) LSA_TRY(lsa_path(dir, err, "%s/step_%08lld", base, (long long)newest));
done:
    if (d) closedir(d);
    return st;
}

/* ---- saving ---- */

static lsa_status check_finite(const float *p, const lsa_indexer_geom *g, const char *what, lsa_err *err) {
    for (int64_t k = 0; k < lsa_indexer_n_tensor(g); k++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_no(g, k);
        for (int64_t i = 0; i < t.n; i++)
            if (!isfinite(p[t.offset + i]))
                LSA_RET_FAIL(LSA_E_NUMERIC,
                             "%s%s: element %lld is %g: a checkpoint holds finite numbers only", what, t.name,
                             (long long)i, (double)p[t.offset + i]);
    }
    return LSA_OK;
}

static void add_entries(lsa_st_entry *e, char (*name)[72], const lsa_indexer_geom *g, const float *p,
                        const char *prefix) {
    for (int64_t n = 0; n < lsa_indexer_n_tensor(g); n++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_no(g, n);
        snprintf(name[n], sizeof name[n], "%s%s", prefix, t.name);
        e[n].name = name[n];
        e[n].dtype = LSA_F32;
        e[n].n_dim = t.n_dim;
        e[n].shape[0] = t.shape[0];
        e[n].shape[1] = t.shape[1];
        e[n].data = p + t.offset;
    }
}

/* Reads a just-written safetensors file back and compares every byte of every tensor. */
static lsa_status read_back(const char *path, const lsa_st_entry *e, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_st *s = NULL;
    LSA_TRY(lsa_st_open(&s, path, err));
    for (int64_t i = 0; i < n; i++) {
        const lsa_st_tensor *t = lsa_st_find(s, e[i].name);
        if (!t || memcmp(t->data, e[i].data, t->n_bytes) != 0)
            LSA_FAIL(LSA_E_IO, "'%s': tensor %s reads back different from what was written: check the disk",
                     path, e[i].name);
    }
done:
    lsa_st_close(s);
    return st;
}

static lsa_status save_tensors(const char *path, const lsa_indexer_geom *g, const float *const *p,
                               const char *const *prefix, int n_set, const char *const *metadata,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t per = lsa_indexer_n_tensor(g);
    lsa_st_entry *e = NULL;
    char(*name)[72] = NULL;
    LSA_TRY(LSA_NEW(e, per * n_set, err));
    LSA_TRY(LSA_NEW(name, per * n_set, err));
    for (int i = 0; i < n_set; i++) add_entries(e + per * i, name + per * i, g, p[i], prefix[i]);
    LSA_TRY(lsa_st_save(path, e, per * n_set, metadata, err));
    LSA_TRY(read_back(path, e, per * n_set, err));
done:
    lsa_free(e);
    lsa_free(name);
    return st;
}

static lsa_status list_file(json_t *files, const char *dir, const char *name, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX], hex[17];
    int64_t size;
    uint64_t h;
    LSA_TRY(lsa_path(path, err, "%s/%s", dir, name));
    LSA_TRY(lsa_file_size(&size, path, err));
    LSA_TRY(lsa_xxh64_file(&h, path, err));
    lsa_hex64(hex, h);
    json_object_set_new(files, name, json_pack("{s:I,s:s}", "bytes", (json_int_t)size, "xxh64", hex));
done:
    return st;
}

lsa_status lsa_ckpt_save(const char *run, int64_t step, const lsa_indexer_geom *g, const float *params,
                         const float *m, const float *v, const json_t *state, bool set_best, int64_t keep,
                         int64_t milestone_every, lsa_err *err) {
    lsa_status st = LSA_OK;
    char base[LSA_PATH_MAX], dir[LSA_PATH_MAX], tmp[LSA_PATH_MAX], path[LSA_PATH_MAX];
    json_t *geom = NULL, *back = NULL, *files = json_object(), *manifest = NULL;
    char *geom_text = NULL;
    if (step < 0 || step > MAX_STEP)
        LSA_FAIL(LSA_E_BUG, "checkpoint step %lld does not fit 8 digits", (long long)step);
    if (!m != !v) LSA_FAIL(LSA_E_BUG, "a checkpoint needs both moments or none");
    LSA_TRY(lsa_indexer_geom_check(g, err));
    LSA_TRY(check_finite(params, g, "", err));
    if (m) LSA_TRY(check_finite(m, g, "m.", err));
    if (v) LSA_TRY(check_finite(v, g, "v.", err));

    LSA_TRY(lsa_path(base, err, "%s/ckpt", run));
    LSA_TRY(lsa_path(dir, err, "%s/step_%08lld", base, (long long)step));
    LSA_TRY(lsa_path(tmp, err, "%s.tmp", dir));
    LSA_TRY(lsa_mkdirs(base, err));
    LSA_TRY(lsa_ckpt_clean(run, 0, 0, err));
    LSA_TRY(lsa_mkdirs(tmp, err));

    LSA_TRY(lsa_geom_to_json(&geom, g, err));
    geom_text = json_dumps(geom, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    if (!geom_text) LSA_FAIL(LSA_E_NOMEM, "cannot format the indexer geometry");
    const char *meta[] = {"lsa.format", FORMAT, "lsa.geometry", geom_text, NULL};
    LSA_TRY(lsa_path(path, err, "%s/model.safetensors", tmp));
    LSA_TRY(save_tensors(path, g, (const float *[]){params}, (const char *[]){""}, 1, meta, err));
    LSA_TRY(list_file(files, tmp, "model.safetensors", err));
    if (m) {
        const char *none[] = {"lsa.format", FORMAT, NULL};
        LSA_TRY(lsa_path(path, err, "%s/optim.safetensors", tmp));
        LSA_TRY(save_tensors(path, g, (const float *[]){m, v}, (const char *[]){"m.", "v."}, 2, none, err));
        LSA_TRY(list_file(files, tmp, "optim.safetensors", err));
    }
    LSA_TRY(lsa_path(path, err, "%s/state.json", tmp));
    LSA_TRY(lsa_json_save(state, path, err));
    LSA_TRY(lsa_json_load(&back, path, err));
    if (!json_is_object(back)) LSA_FAIL(LSA_E_BUG, "checkpoint state must be a JSON object");
    LSA_TRY(list_file(files, tmp, "state.json", err));
    manifest = json_pack("{s:s,s:I,s:O}", "format", FORMAT, "step", (json_int_t)step, "files", files);
    LSA_TRY(lsa_path(path, err, "%s/MANIFEST.json", tmp));
    LSA_TRY(lsa_json_save(manifest, path, err));

    LSA_TRY(lsa_fsync_path(tmp, err));
    LSA_TRY(lsa_replace_dir(tmp, dir, err));
    LSA_TRY(lsa_fsync_path(base, err));
    if (set_best)
        LSA_TRY(write_pointer(base, "best", step, err)); /* before latest: see the head of this file */
    LSA_TRY(write_pointer(base, "latest", step, err));
    LSA_TRY(lsa_ckpt_clean(run, keep, milestone_every, err));
done:
    json_decref(geom);
    json_decref(back);
    json_decref(files);
    json_decref(manifest);
    free(geom_text);
    return st;
}

/* ---- loading ---- */

static lsa_status check_file(const json_t *files, const char *dir, const char *name, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    json_t *f;
    const char *hex;
    int64_t want_size, size;
    uint64_t want, h;
    LSA_TRY(lsa_path(path, err, "%s/MANIFEST.json", dir));
    LSA_TRY(lsa_json_object(&f, files, name, path, err));
    LSA_TRY(lsa_json_i64_in(&want_size, 0, INT64_MAX, f, "bytes", path, err));
    LSA_TRY(lsa_json_str(&hex, f, "xxh64", path, err));
    LSA_TRY(lsa_unhex64(&want, hex, err));
    LSA_TRY(lsa_path(path, err, "%s/%s", dir, name));
    if (!lsa_exists(path)) LSA_FAIL(LSA_E_FORMAT, "'%s' is missing but listed in MANIFEST.json", path);
    LSA_TRY(lsa_file_size(&size, path, err));
    if (size != want_size)
        LSA_FAIL(
            LSA_E_FORMAT,
            "'%s' has %lld bytes, MANIFEST.json says %lld: it was truncated or replaced; use another step",
            path, (long long)size, (long long)want_size);
    LSA_TRY(lsa_xxh64_file(&h, path, err));
    if (h != want)
        LSA_FAIL(LSA_E_FORMAT,
                 "'%s': hash differs from MANIFEST.json: the file was damaged or replaced; use another step",
                 path);
done:
    return st;
}

static lsa_status load_set(float **out, const lsa_st *s, const lsa_indexer_geom *g, const char *prefix,
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(LSA_NEW(*out, lsa_indexer_n_param(g), err));
    for (int64_t i = 0; i < lsa_indexer_n_tensor(g); i++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_no(g, i);
        const lsa_st_tensor *e;
        char name[72];
        snprintf(name, sizeof name, "%s%s", prefix, t.name);
        LSA_TRY(lsa_st_need(&e, s, name, LSA_F32, t.n_dim, t.shape, err));
        memcpy(*out + t.offset, e->data, e->n_bytes);
    }
    LSA_TRY(check_finite(*out, g, prefix, err));
done:
    return st;
}

static lsa_status open_tensors(lsa_st **s, const char *dir, const char *name, int64_t n_tensor,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    LSA_TRY(lsa_path(path, err, "%s/%s", dir, name));
    LSA_TRY(lsa_st_open(s, path, err));
    if (n_tensor >= 0 && lsa_st_count(*s) != n_tensor)
        LSA_FAIL(LSA_E_FORMAT, "'%s' holds %lld tensors, its geometry asks for %lld", path,
                 (long long)lsa_st_count(*s), (long long)n_tensor);
done:
    return st;
}

static lsa_status load_model(lsa_ckpt *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_st *s = NULL;
    json_t *geom = NULL;
    char path[LSA_PATH_MAX];
    LSA_TRY(lsa_path(path, err, "%s/model.safetensors", c->dir));
    LSA_TRY(open_tensors(&s, c->dir, "model.safetensors", -1, err));
    const char *text = lsa_st_metadata(s, "lsa.geometry");
    if (!text) LSA_FAIL(LSA_E_FORMAT, "'%s' has no metadata 'lsa.geometry': not a checkpoint of lsa", path);
    LSA_TRY(lsa_json_parse(&geom, text, strlen(text), path, err));
    LSA_TRY(lsa_geom_from_json(&c->geom, geom, path, err));
    const int64_t n = lsa_indexer_n_tensor(&c->geom);
    if (lsa_st_count(s) != n)
        LSA_FAIL(LSA_E_FORMAT, "'%s' holds %lld tensors, its geometry asks for %lld", path,
                 (long long)lsa_st_count(s), (long long)n);
    LSA_TRY(load_set(&c->params, s, &c->geom, "", err));
    LSA_TRY(lsa_indexer_costs_check(c->params + lsa_indexer_costs_at(&c->geom), c->geom.reach, path, err));
    if (c->geom.prior)
        LSA_TRY(lsa_indexer_prior_check(c->params + lsa_indexer_prior_at(&c->geom), path, err));
done:
    json_decref(geom);
    lsa_st_close(s);
    return st;
}

lsa_status lsa_ckpt_load(lsa_ckpt *out, const char *arg, bool with_optim, lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    json_t *manifest = NULL, *files;
    const char *format;
    lsa_st *s = NULL;
    memset(out, 0, sizeof *out);
    LSA_TRY(lsa_ckpt_resolve(out->dir, arg, err));
    LSA_TRY(lsa_path(path, err, "%s/MANIFEST.json", out->dir));
    LSA_TRY(lsa_json_load(&manifest, path, err));
    LSA_TRY(lsa_json_str(&format, manifest, "format", path, err));
    if (strcmp(format, FORMAT) != 0)
        LSA_FAIL(LSA_E_FORMAT, "'%s': format is '%.40s', this program reads '%s'", path, format, FORMAT);
    LSA_TRY(lsa_json_i64_in(&out->step, 0, MAX_STEP, manifest, "step", path, err));
    LSA_TRY(lsa_json_object(&files, manifest, "files", path, err));
    LSA_TRY(check_file(files, out->dir, "model.safetensors", err));
    LSA_TRY(check_file(files, out->dir, "state.json", err));
    LSA_TRY(load_model(out, err));
    LSA_TRY(lsa_path(path, err, "%s/state.json", out->dir));
    LSA_TRY(lsa_json_load(&out->state, path, err));
    if (!json_is_object(out->state)) LSA_FAIL(LSA_E_FORMAT, "'%s' must hold a JSON object", path);
    if (with_optim) {
        if (!json_object_get(files, "optim.safetensors"))
            LSA_FAIL(LSA_E_FORMAT,
                     "checkpoint '%s' has no optimizer state: it cannot be resumed, only used with --init",
                     out->dir);
        LSA_TRY(check_file(files, out->dir, "optim.safetensors", err));
        LSA_TRY(open_tensors(&s, out->dir, "optim.safetensors", lsa_indexer_n_tensor(&out->geom) * 2, err));
        LSA_TRY(load_set(&out->m, s, &out->geom, "m.", err));
        LSA_TRY(load_set(&out->v, s, &out->geom, "v.", err));
    }
done:
    json_decref(manifest);
    lsa_st_close(s);
    if (st != LSA_OK) lsa_ckpt_fini(out);
    return st;
}

void lsa_ckpt_fini(lsa_ckpt *c) {
    lsa_free(c->params);
    lsa_free(c->m);
    lsa_free(c->v);
    json_decref(c->state);
    memset(c, 0, sizeof *c);
}
