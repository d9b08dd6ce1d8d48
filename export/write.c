/* Export: see write.h. The mistake that would stay silent: mixing up CSA ordinals and layer ids;
 * both are in the metadata and the names use the ordinal. */
#include "export/write.h"

#include <stdlib.h>
#include <string.h>

#include "data/ckpt.h"
#include "data/weights.h"
#include "export/conform.h"
#include "export/variants.h"
#include "kernels/core/mem.h"

static int64_t recipe_int(const json_t *state, const char *key, int64_t dflt) {
    const char *s = json_string_value(json_object_get(json_object_get(state, "recipe"), key));
    return s ? strtoll(s, NULL, 10) : dflt;
}

/* What the file says about where it comes from: the checkpoint's state without what changes nothing for a
 * reader. */
static json_t *provenance(const json_t *state, int64_t step) {
    static const char *const keep[] = {"source",       "recipe",         "data_hash",       "teacher",
                                       "teacher_hash", "trained_length", "train_documents", "eval"};
    json_t *o = json_pack("{s:I}", "step", (json_int_t)step);
    for (size_t i = 0; i < sizeof keep / sizeof *keep; i++)
        if (json_object_get(state, keep[i])) json_object_set(o, keep[i], json_object_get(state, keep[i]));
    return o;
}

/* What the export says that the checkpoint was imported from, into *f; ex NULL: the defaults. */
static lsa_status read_exported(lsa_indexer_file *f, const json_t *ex, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    const char *ensemble, *dtype;
    if (!ex) goto done;
    LSA_TRY(lsa_json_str(&ensemble, ex, "ensemble", where, err));
    LSA_TRY(lsa_ensemble_parse(&f->ensemble, ensemble, err));
    LSA_TRY(lsa_json_str(&dtype, ex, "dtype", where, err));
    LSA_TRY(lsa_weight_dtype_parse(&f->dtype, dtype, err));
    LSA_TRY(lsa_json_i64_in(&f->tau, 1, 1 << 20, ex, "tau", where, err));
    LSA_TRY(lsa_json_i64_in(&f->tail, 0, INT64_C(1) << 32, ex, "tail", where, err));
    LSA_TRY(lsa_json_f64(&f->threshold, ex, "threshold", where, err));
    LSA_TRY(lsa_json_object(&f->train, ex, "train", where, err));
    f->calibration = json_object_get(ex, "calibration");
done:
    return st;
}

lsa_status lsa_export_write(const char *ckpt, const char *out, const lsa_export_rule *rule,
                            const lsa_export_options *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_ckpt c = {0};
    lsa_indexer_file f = {0}; /* borrows until the end */
    json_t *train = NULL;
    LSA_TRY(lsa_export_check_target(out, o->force, err)); /* before the checkpoint is read */
    LSA_TRY(lsa_ckpt_load(&c, ckpt, false, err));
    train = provenance(c.state, c.step);
    f = (lsa_indexer_file){.geom = c.geom,
                           .params = c.params,
                           .tau = recipe_int(c.state, "window.tau", 64),
                           .tail = recipe_int(c.state, "window.tail", 256),
                           .threshold = 0.5,
                           .train = train};
    LSA_TRY(read_exported(&f, json_object_get(c.state, "exported"), c.dir, err));
    if (rule->ensemble) f.ensemble = *rule->ensemble;
    if (c.geom.reach && f.ensemble != LSA_ENSEMBLE_SUM)
        LSA_FAIL(
            LSA_E_CONFIG,
            "'%s' was trained with a continuation, which belongs to the sum of the logits: --ensemble %s "
            "would leave it out; export the sum",
            c.dir, lsa_ensemble_name(f.ensemble));
    if (c.geom.prior && f.ensemble != LSA_ENSEMBLE_SUM)
        LSA_FAIL(LSA_E_CONFIG,
                 "'%s' was trained with an observed-mass prior, which belongs to the sum of the logits: "
                 "--ensemble %s would leave it out; export the sum",
                 c.dir, lsa_ensemble_name(f.ensemble));
    if (rule->threshold) f.threshold = *rule->threshold;
    if (rule->dtype) {
        if (*rule->dtype != f.dtype) f.calibration = NULL; /* measured on other weights */
        f.dtype = *rule->dtype;
    }
    lsa_weights_round(c.params, &c.geom, f.dtype);
    if (o->licence) json_object_set_new(f.train, "licence", json_string(o->licence));
    LSA_TRY(lsa_export_folder(&f, out, o, c.dir, err));
done:
    json_decref(train);
    lsa_ckpt_fini(&c);
    return st;
}

lsa_status lsa_export_verify(const char *indexer, const char *ckpt, double *worst, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_indexer_file f = {0};
    lsa_ckpt c = {0};
    lsa_export_options o;
    LSA_TRY(lsa_indexer_file_load(&f, indexer, err));
    LSA_TRY(lsa_conform_kernels(&f, indexer, "cpu", worst, err));
    LSA_TRY(lsa_export_options_of(&o, indexer, err));
    LSA_TRY(lsa_variants_check(&f, indexer, &o, err));
    if (!ckpt) goto done;
    LSA_TRY(lsa_ckpt_load(&c, ckpt, false, err));
    if (c.geom.n_layer != f.geom.n_layer || lsa_indexer_n_param(&c.geom) != lsa_indexer_n_param(&f.geom))
        LSA_FAIL(LSA_E_FORMAT, "'%s' and checkpoint '%s' have different geometries", indexer, c.dir);
    lsa_weights_round(c.params, &c.geom, f.dtype);
    for (int64_t i = 0; i < lsa_indexer_n_tensor(&f.geom); i++) {
        const lsa_indexer_tensor a = lsa_indexer_tensor_no(&f.geom, i), b = lsa_indexer_tensor_no(&c.geom, i);
        if (strcmp(a.name, b.name) || a.n != b.n ||
            memcmp(f.params + a.offset, c.params + b.offset, (size_t)a.n * sizeof(float)))
            LSA_FAIL(LSA_E_FORMAT, "'%s': tensor %s is not the one of checkpoint '%s'; export again", indexer,
                     a.name, c.dir);
    }
done:
    lsa_ckpt_fini(&c);
    lsa_indexer_file_fini(&f);
    return st;
}
