/* The exported indexer: see indexer_file.h. Reader and writer share the metadata keys, so they cannot drift
 * apart. */
#include "data/indexer_file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/geom_json.h"
#include "data/lsa_safetensors.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"

#define FORMAT "lsa-indexer/1"

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

lsa_status lsa_indexer_file_save(const lsa_indexer_file *f, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_st_entry e[LSA_MAX_CSA * LSA_INDEXER_PARTS];
    char name[LSA_MAX_CSA * LSA_INDEXER_PARTS][64], path[LSA_PATH_MAX],
        *geom_text = NULL, *select_text = NULL, *train_text = NULL, *calib_text = NULL;
    json_t *geom = NULL, *select = NULL;
    const size_t flags = JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17);
    int64_t n = 0;
    LSA_TRY(lsa_indexer_geom_check(&f->geom, err));
    for (int32_t l = 0; l < f->geom.n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++, n++) {
            const lsa_indexer_tensor t = lsa_indexer_tensor_at(&f->geom, l, (lsa_indexer_part)p);
            snprintf(name[n], sizeof name[n], "%s", t.name);
            e[n] = (lsa_st_entry){name[n], LSA_F32, t.n_dim, {t.shape[0], t.shape[1]}, f->params + t.offset};
        }
    LSA_TRY(lsa_geom_to_json(&geom, &f->geom, err));
    select = json_pack("{s:s, s:I, s:I, s:f}", "ensemble", ENSEMBLE[f->ensemble], "tau", (json_int_t)f->tau,
                       "tail", (json_int_t)f->tail, "threshold", f->threshold);
    geom_text = json_dumps(geom, flags);
    select_text = json_dumps(select, flags);
    train_text = f->train ? json_dumps(f->train, flags) : strdup("{}");
    if (f->calibration) calib_text = json_dumps(f->calibration, flags);
    if (!geom_text || !select_text || !train_text || (f->calibration && !calib_text))
        LSA_FAIL(LSA_E_NOMEM, "cannot format the metadata of the indexer");
    const char *meta[] = {"format",
                          "pt",
                          "lsa.format",
                          FORMAT,
                          "lsa.geometry",
                          geom_text,
                          "lsa.select",
                          select_text,
                          "lsa.train",
                          train_text,
                          calib_text ? "lsa.calibration" : NULL,
                          calib_text,
                          NULL};
    LSA_TRY(lsa_path(path, err, "%s/indexer.safetensors", dir));
    LSA_TRY(lsa_st_save(path, e, n, meta, err));
done:
    free(geom_text);
    free(select_text);
    free(train_text);
    free(calib_text);
    json_decref(geom);
    json_decref(select);
    return st;
}

static lsa_status read_meta(json_t **out, const lsa_st *s, const char *key, const char *path, lsa_err *err) {
    const char *text = lsa_st_metadata(s, key);
    *out = NULL;
    if (!text)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s' has no metadata '%s': it was not exported by lsa-export", path, key);
    return lsa_json_parse(out, text, strlen(text), key, err);
}

/* No tensor beside those of the parameter table (that none is missing is seen when they are read). */
static lsa_status check_names(const lsa_st *s, const lsa_indexer_geom *g, const char *path, lsa_err *err) {
    for (int64_t i = 0; i < lsa_st_count(s); i++) {
        bool known = false;
        for (int k = 0; k < g->n_layer * LSA_INDEXER_PARTS; k++)
            known = known || !strcmp(lsa_st_at(s, i)->name,
                                     lsa_indexer_tensor_at(g, k / LSA_INDEXER_PARTS,
                                                           (lsa_indexer_part)(k % LSA_INDEXER_PARTS))
                                         .name);
        if (!known)
            LSA_RET_FAIL(LSA_E_FORMAT, "'%s': tensor '%.80s' does not belong to its geometry", path,
                         lsa_st_at(s, i)->name);
    }
    return LSA_OK;
}

lsa_status lsa_indexer_file_load(lsa_indexer_file *f, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_st *s = NULL;
    json_t *geom = NULL, *select = NULL;
    char path[LSA_PATH_MAX];
    const char *ensemble, *format;
    memset(f, 0, sizeof *f);
    LSA_TRY(lsa_path(path, err, "%s/indexer.safetensors", dir));
    if (!lsa_exists(path))
        LSA_FAIL(
            LSA_E_IO,
            "'%s' is not an exported indexer: it has no indexer.safetensors; make one with 'lsa-export write'",
            dir);
    LSA_TRY(lsa_st_open(&s, path, err));
    format = lsa_st_metadata(s, "lsa.format");
    if (!format || strcmp(format, FORMAT))
        LSA_FAIL(LSA_E_FORMAT, "'%s': format is '%.40s', this program reads %s", path,
                 format ? format : "none", FORMAT);
    LSA_TRY(read_meta(&geom, s, "lsa.geometry", path, err));
    LSA_TRY(lsa_geom_from_json(&f->geom, geom, path, err));
    LSA_TRY(read_meta(&select, s, "lsa.select", path, err));
    LSA_TRY(lsa_json_str(&ensemble, select, "ensemble", path, err));
    if (lsa_ensemble_parse(&f->ensemble, ensemble, NULL) != LSA_OK)
        LSA_FAIL(LSA_E_FORMAT, "'%s': ensemble '%.40s' is unknown", path, ensemble);
    LSA_TRY(lsa_json_i64_in(&f->tau, 1, 1 << 20, select, "tau", path, err));
    LSA_TRY(lsa_json_i64_in(&f->tail, 0, INT64_C(1) << 32, select, "tail", path, err));
    LSA_TRY(lsa_json_f64(&f->threshold, select, "threshold", path, err));
    LSA_TRY(read_meta(&f->train, s, "lsa.train", path, err));
    if (lsa_st_metadata(s, "lsa.calibration"))
        LSA_TRY(read_meta(&f->calibration, s, "lsa.calibration", path, err));
    LSA_TRY(check_names(s, &f->geom, path, err));
    int64_t bytes; /* before memory is taken for a damaged geometry: a number needs a byte at least */
    LSA_TRY(lsa_file_size(&bytes, path, err));
    if (lsa_indexer_n_param(&f->geom) > bytes)
        LSA_FAIL(LSA_E_FORMAT, "'%s': its geometry asks for %lld numbers, the file has %lld bytes", path,
                 (long long)lsa_indexer_n_param(&f->geom), (long long)bytes);
    LSA_TRY(LSA_NEW(f->params, lsa_indexer_n_param(&f->geom), err));
    for (int32_t l = 0; l < f->geom.n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor t = lsa_indexer_tensor_at(&f->geom, l, (lsa_indexer_part)p);
            const lsa_st_tensor *x;
            LSA_TRY(lsa_st_need(&x, s, t.name, LSA_F32, t.n_dim, t.shape, err));
            memcpy(f->params + t.offset, x->data, x->n_bytes);
            for (int64_t i = 0; i < t.n; i++)
                if (!isfinite(f->params[t.offset + i]))
                    LSA_FAIL(LSA_E_FORMAT, "'%s': tensor %s: element %lld is not finite", path, t.name,
                             (long long)i);
        }
done:
    json_decref(geom);
    json_decref(select);
    lsa_st_close(s);
    if (st != LSA_OK) {
        lsa_err_wrap(err, "indexer '%s'", dir);
        lsa_indexer_file_fini(f);
    }
    return st;
}
