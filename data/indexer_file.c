/* The exported indexer: see indexer_file.h. Reader and writer share the metadata keys, so they cannot drift
 * apart. */
#include "data/indexer_file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/geom_json.h"
#include "data/weights.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"

#define FORMAT "lsa-indexer/1"

enum { N_TEXT = sizeof((lsa_indexer_meta){0}.text) / sizeof(char *) };
static const char *const ENSEMBLE[] = {"sum", "mean", "max"};

const char *lsa_ensemble_name(lsa_ensemble e) {
    return ENSEMBLE[e];
}

lsa_status lsa_ensemble_parse(lsa_ensemble *out, const char *s, lsa_err *err) {
    for (int i = 0; i < 3; i++)
        if (!strcmp(s, ENSEMBLE[i])) {
            *out = (lsa_ensemble)i;
            return LSA_OK;
        }
    LSA_RET_FAIL(LSA_E_ARG, "ensemble '%.40s' is unknown; expected sum, mean or max", s);
}

void lsa_indexer_file_fini(lsa_indexer_file *f) {
    lsa_free(f->params);
    json_decref(f->train);
    json_decref(f->calibration);
    memset(f, 0, sizeof *f);
}

void lsa_indexer_meta_fini(lsa_indexer_meta *m) {
    for (int i = 0; i < N_TEXT; i++) free(m->text[i]);
    memset(m, 0, sizeof *m);
}

json_t *lsa_indexer_costs_json(const lsa_indexer_file *f) {
    if (!f->geom.reach) return NULL;
    json_t *b = json_array();
    const float *cost = f->params + lsa_indexer_costs_at(&f->geom);
    for (int32_t j = 0; j < f->geom.reach; j++) json_array_append_new(b, json_real((double)cost[j]));
    return json_pack("{s:o}", "b", b);
}

json_t *lsa_indexer_prior_json(const lsa_indexer_file *f) {
    if (!f->geom.prior) return NULL;
    const float *w = f->params + lsa_indexer_prior_at(&f->geom);
    return json_pack("{s:[f, f], s:f, s:f}", "weights", (double)w[0], (double)w[1], "decay",
                     (double)LSA_PRIOR_DECAY, "unit", (double)LSA_PRIOR_UNIT);
}

lsa_status lsa_indexer_meta_make(lsa_indexer_meta *m, const lsa_indexer_file *f, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *part[N_TEXT] = {NULL,
                            NULL,
                            f->train ? json_incref(f->train) : json_object(),
                            json_incref(f->calibration),
                            lsa_indexer_costs_json(f),
                            lsa_indexer_prior_json(f)};
    static const char *const key[] = {"lsa.geometry",    "lsa.select",       "lsa.train",
                                      "lsa.calibration", "lsa.continuation", "lsa.prior"};
    int n = 0;
    memset(m, 0, sizeof *m);
    LSA_TRY(lsa_geom_to_json(&part[0], &f->geom, err));
    part[1] = json_pack("{s:s, s:I, s:I, s:f}", "ensemble", ENSEMBLE[f->ensemble], "tau", (json_int_t)f->tau,
                        "tail", (json_int_t)f->tail, "threshold", f->threshold);
    const char *fixed[] = {"format", "pt", "lsa.format", FORMAT, "lsa.dtype", lsa_dtype_name(f->dtype)};
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) m->pair[n++] = fixed[i];
    for (int i = 0; i < N_TEXT; i++) {
        if (i >= 3 && !part[i]) continue; /* not calibrated, no continuation, no prior */
        m->text[i] = json_dumps(part[i], JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
        if (!m->text[i]) LSA_FAIL(LSA_E_NOMEM, "cannot format the metadata of the indexer");
        m->pair[n++] = key[i];
        m->pair[n++] = m->text[i];
    }
done:
    for (int i = 0; i < N_TEXT; i++) json_decref(part[i]);
    if (st != LSA_OK) lsa_indexer_meta_fini(m);
    return st;
}

lsa_status lsa_indexer_file_emit(lsa_sink *to, const lsa_indexer_file *f, bool joint, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &f->geom;
    lsa_indexer_meta meta = {0};
    lsa_tensor_out *t = NULL;
    int64_t n = 0;
    LSA_TRY(lsa_indexer_geom_check(g, err));
    if (!joint && g->n_layer != 1) LSA_FAIL(LSA_E_BUG, "names without a layer for %d layers", g->n_layer);
    LSA_TRY(LSA_NEW(t, g->n_layer * LSA_INDEXER_PARTS * 2, err));
    for (int32_t l = 0; l < g->n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_at(g, l, (lsa_indexer_part)p);
            const char *name = joint ? x.name : strchr(strchr(x.name, '.') + 1, '.') + 1;
            t[n++] = lsa_weight_out(name, f->params, g, l, (lsa_indexer_part)p, f->dtype);
            if (t[n - 1].dtype != LSA_F8_E4M3) continue;
            t[n++] = lsa_weight_scale_out(name, f->params, g, l, (lsa_indexer_part)p);
        }
    LSA_TRY(lsa_indexer_meta_make(&meta, f, err));
    LSA_TRY(lsa_st_emit(to, t, n, meta.pair, err));
done:
    lsa_indexer_meta_fini(&meta);
    lsa_free(t);
    return st;
}

lsa_status lsa_indexer_file_save(const lsa_indexer_file *f, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_commit c = {.fd = -1};
    char path[LSA_PATH_MAX];
    LSA_TRY(lsa_path(path, err, "%s/indexer.safetensors", dir));
    LSA_TRY(lsa_commit_begin(&c, path, err));
    lsa_sink to = lsa_sink_commit(&c);
    LSA_TRY(lsa_indexer_file_emit(&to, f, true, err));
    LSA_TRY(lsa_commit_end(&c, err));
done:
    lsa_commit_abort(&c);
    return st;
}

static lsa_status read_meta(json_t **out, const lsa_tensor_file *s, const char *key, lsa_err *err) {
    const char *text = lsa_tensor_file_metadata(s, key), *path = lsa_tensor_file_path(s);
    *out = NULL;
    if (!text)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s' has no metadata '%s': it was not exported by lsa-export", path, key);
    return lsa_json_parse(out, text, strlen(text), key, err);
}

static lsa_status read_dtype(lsa_dtype *out, const char *name, const char *path, lsa_err *err) {
    static const lsa_dtype all[] = {LSA_F32, LSA_BF16, LSA_F8_E4M3};
    *out = LSA_F32; /* files from before the key */
    if (!name) return LSA_OK;
    for (int i = 0; i < 3; i++)
        if (!strcmp(name, lsa_dtype_name(all[i]))) {
            *out = all[i];
            return LSA_OK;
        }
    LSA_RET_FAIL(LSA_E_FORMAT, "'%s': metadata 'lsa.dtype' is '%.40s'; expected F32, BF16 or F8_E4M3", path,
                 name);
}

lsa_status lsa_indexer_meta_read(lsa_indexer_file *f, const lsa_tensor_file *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *geom = NULL, *select = NULL;
    const char *ensemble, *path = lsa_tensor_file_path(s),
                          *format = lsa_tensor_file_metadata(s, "lsa.format");
    if (!format || strcmp(format, FORMAT))
        LSA_FAIL(LSA_E_FORMAT, "'%s': format is '%.40s', this program reads %s", path,
                 format ? format : "none", FORMAT);
    LSA_TRY(read_dtype(&f->dtype, lsa_tensor_file_metadata(s, "lsa.dtype"), path, err));
    LSA_TRY(read_meta(&geom, s, "lsa.geometry", err));
    LSA_TRY(lsa_geom_from_json(&f->geom, geom, path, err));
    LSA_TRY(read_meta(&select, s, "lsa.select", err));
    LSA_TRY(lsa_json_str(&ensemble, select, "ensemble", path, err));
    if (lsa_ensemble_parse(&f->ensemble, ensemble, NULL) != LSA_OK)
        LSA_FAIL(LSA_E_FORMAT, "'%s': ensemble '%.40s' is unknown", path, ensemble);
    LSA_TRY(lsa_json_i64_in(&f->tau, 1, 1 << 20, select, "tau", path, err));
    LSA_TRY(lsa_json_i64_in(&f->tail, 0, INT64_C(1) << 32, select, "tail", path, err));
    LSA_TRY(lsa_json_f64(&f->threshold, select, "threshold", path, err));
    LSA_TRY(read_meta(&f->train, s, "lsa.train", err));
    if (lsa_tensor_file_metadata(s, "lsa.calibration"))
        LSA_TRY(read_meta(&f->calibration, s, "lsa.calibration", err));
    if (!f->geom.reach != !lsa_tensor_file_metadata(s, "lsa.continuation"))
        LSA_FAIL(LSA_E_FORMAT,
                 "'%s': 'lsa.geometry' and 'lsa.continuation' disagree on whether there is a continuation",
                 path);
    if (!f->geom.prior != !lsa_tensor_file_metadata(s, "lsa.prior"))
        LSA_FAIL(LSA_E_FORMAT, "'%s': 'lsa.geometry' and 'lsa.prior' disagree on whether there is a prior",
                 path);
    if (f->geom.prior && f->ensemble != LSA_ENSEMBLE_SUM)
        LSA_FAIL(LSA_E_FORMAT, "'%s': a prior belongs to ensemble sum, found %s", path, ensemble);
    if (f->geom.reach && f->ensemble != LSA_ENSEMBLE_SUM)
        LSA_FAIL(LSA_E_FORMAT, "'%s': a continuation belongs to ensemble sum, found %s", path, ensemble);
done:
    json_decref(geom);
    json_decref(select);
    return st;
}

/* The weights of the prior into w; its constants must be ours. */
static lsa_status read_prior(float w[LSA_PRIOR_WEIGHTS], const lsa_tensor_file *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *o = NULL, *weights;
    const char *path = lsa_tensor_file_path(s);
    double decay, unit;
    LSA_TRY(read_meta(&o, s, "lsa.prior", err));
    LSA_TRY(lsa_json_array(&weights, o, "weights", path, err));
    LSA_TRY(lsa_json_f64(&decay, o, "decay", path, err));
    LSA_TRY(lsa_json_f64(&unit, o, "unit", path, err));
    if (json_array_size(weights) != LSA_PRIOR_WEIGHTS)
        LSA_FAIL(LSA_E_FORMAT, "'%s': 'lsa.prior' has %zu weights, expected %d", path,
                 json_array_size(weights), LSA_PRIOR_WEIGHTS);
    if ((float)decay != LSA_PRIOR_DECAY || (float)unit != LSA_PRIOR_UNIT)
        LSA_FAIL(
            LSA_E_FORMAT,
            "'%s': 'lsa.prior' was trained with decay %g and unit %g, this program applies %g and %g: use "
            "the version of lsa that wrote it",
            path, decay, unit, (double)LSA_PRIOR_DECAY, (double)LSA_PRIOR_UNIT);
    for (int k = 0; k < LSA_PRIOR_WEIGHTS; k++) {
        const json_t *v = json_array_get(weights, (size_t)k);
        w[k] = json_is_number(v) ? (float)json_number_value(v) : NAN;
    }
    LSA_TRY(lsa_indexer_prior_check(w, path, err));
done:
    json_decref(o);
    return st;
}

lsa_status lsa_indexer_params_new(lsa_indexer_file *f, const lsa_tensor_file *s, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *o = NULL, *b;
    const char *path = lsa_tensor_file_path(s);
    float *cost;
    LSA_TRY(LSA_NEW(f->params, lsa_indexer_n_param(&f->geom), err));
    if (f->geom.prior) LSA_TRY(read_prior(f->params + lsa_indexer_prior_at(&f->geom), s, err));
    if (!f->geom.reach) goto done;
    LSA_TRY(read_meta(&o, s, "lsa.continuation", err));
    LSA_TRY(lsa_json_array(&b, o, "b", path, err));
    if ((int64_t)json_array_size(b) != f->geom.reach)
        LSA_FAIL(LSA_E_FORMAT, "'%s': 'lsa.continuation' has %zu costs, 'lsa.geometry' says %d", path,
                 json_array_size(b), f->geom.reach);
    cost = f->params + lsa_indexer_costs_at(&f->geom);
    for (int32_t j = 0; j < f->geom.reach; j++) {
        const json_t *v = json_array_get(b, (size_t)j);
        cost[j] = json_is_number(v) ? (float)json_number_value(v) : NAN;
    }
    LSA_TRY(lsa_indexer_costs_check(cost, f->geom.reach, path, err));
done:
    json_decref(o);
    return st;
}

/* Tensor i is one of the parameter table, in the dtype that the metadata says, or the scales of one. */
static lsa_status check_tensor(const lsa_st_tensor *t, const lsa_indexer_file *f, const char *path,
                               lsa_err *err) {
    char scale[80];
    for (int32_t l = 0; l < f->geom.n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_at(&f->geom, l, (lsa_indexer_part)p);
            const lsa_dtype want = p == LSA_Q_NORM ? LSA_F32 : f->dtype;
            snprintf(scale, sizeof scale, "%s_scale", x.name);
            if (want == LSA_F8_E4M3 && !strcmp(t->name, scale)) return LSA_OK;
            if (strcmp(t->name, x.name)) continue;
            if (t->dtype != want)
                LSA_RET_FAIL(LSA_E_FORMAT, "'%s': tensor '%s': expected %s, found %s", path, x.name,
                             lsa_dtype_name(want), lsa_dtype_name(t->dtype));
            return LSA_OK;
        }
    LSA_RET_FAIL(LSA_E_FORMAT, "'%s': tensor '%.80s' does not belong to its geometry", path, t->name);
}

lsa_status lsa_indexer_file_load(lsa_indexer_file *f, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_tensor_file *s = NULL;
    char path[LSA_PATH_MAX];
    memset(f, 0, sizeof *f);
    LSA_TRY(lsa_path(path, err, "%s/indexer.safetensors", dir));
    if (!lsa_exists(path))
        LSA_FAIL(
            LSA_E_IO,
            "'%s' is not an exported indexer: it has no indexer.safetensors; make one with 'lsa-export write'",
            dir);
    LSA_TRY(lsa_tensor_file_open(&s, path, err));
    LSA_TRY(lsa_indexer_meta_read(f, s, err));
    for (int64_t i = 0; i < lsa_tensor_file_count(s); i++)
        LSA_TRY(check_tensor(lsa_tensor_file_at(s, i), f, path, err));
    int64_t bytes; /* before memory is taken for a damaged geometry: a number needs a byte at least */
    LSA_TRY(lsa_file_size(&bytes, path, err));
    if (lsa_indexer_costs_at(&f->geom) > bytes)
        LSA_FAIL(LSA_E_FORMAT, "'%s': its geometry asks for %lld numbers, the file has %lld bytes", path,
                 (long long)lsa_indexer_costs_at(&f->geom), (long long)bytes);
    LSA_TRY(lsa_indexer_params_new(f, s, err));
    for (int32_t l = 0; l < f->geom.n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor t = lsa_indexer_tensor_at(&f->geom, l, (lsa_indexer_part)p);
            LSA_TRY(lsa_tensor_file_read(f->params + t.offset, s, t.name, t.n_dim, t.shape, err));
        }
done:
    lsa_tensor_file_close(s);
    if (st != LSA_OK) {
        lsa_err_wrap(err, "indexer '%s'", dir);
        lsa_indexer_file_fini(f);
    }
    return st;
}
