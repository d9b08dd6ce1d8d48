/* Export and import: see write.h. The mistake that would stay silent: mixing up CSA ordinals and layer ids;
 * both are in the metadata and the names use the ordinal. */
#include "export/write.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/ckpt.h"
#include "data/teacher.h"
#include "export/golden.h"
#include "kernels/core/csa_list.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"

static int64_t recipe_int(const json_t *state, const char *key, int64_t dflt) {
    const char *s = json_string_value(json_object_get(json_object_get(state, "recipe"), key));
    return s ? strtoll(s, NULL, 10) : dflt;
}

/* What the file says about where it comes from: the checkpoint's state without what changes nothing for a
 * reader. */
static json_t *provenance(const json_t *state, int64_t step) {
    static const char *const keep[] = {"recipe",         "data_hash",       "teacher", "teacher_hash",
                                       "trained_length", "train_documents", "eval"};
    json_t *o = json_pack("{s:I}", "step", (json_int_t)step);
    for (size_t i = 0; i < sizeof keep / sizeof *keep; i++)
        if (json_object_get(state, keep[i])) json_object_set(o, keep[i], json_object_get(state, keep[i]));
    return o;
}

lsa_status lsa_export_write(const char *ckpt, const char *out, lsa_ensemble ensemble, double threshold,
                            const lsa_export_options *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_ckpt c = {0};
    lsa_indexer_file f = {0};
    LSA_TRY(lsa_export_check_target(out, o->force, err)); /* before the checkpoint is read */
    LSA_TRY(lsa_ckpt_load(&c, ckpt, false, err));
    f = (lsa_indexer_file){.geom = c.geom,
                           .params = c.params,
                           .ensemble = ensemble,
                           .tau = recipe_int(c.state, "window.tau", 64),
                           .tail = recipe_int(c.state, "window.tail", 256),
                           .threshold = threshold,
                           .train = provenance(c.state, c.step)};
    c.params = NULL;
    LSA_TRY(lsa_export_folder(&f, out, o, c.dir, err));
done:
    lsa_indexer_file_fini(&f);
    lsa_ckpt_fini(&c);
    return st;
}

lsa_status lsa_export_verify(const char *indexer, const char *ckpt, double *worst, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_indexer_file f = {0};
    lsa_ckpt c = {0};
    LSA_TRY(lsa_indexer_file_load(&f, indexer, err));
    LSA_TRY(lsa_golden_vectors_check(&f, indexer, "cpu", worst, err));
    if (!ckpt) goto done;
    LSA_TRY(lsa_ckpt_load(&c, ckpt, false, err));
    if (c.geom.n_layer != f.geom.n_layer || lsa_indexer_n_param(&c.geom) != lsa_indexer_n_param(&f.geom))
        LSA_FAIL(LSA_E_FORMAT, "'%s' and checkpoint '%s' have different geometries", indexer, c.dir);
    for (int32_t l = 0; l < f.geom.n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor a = lsa_indexer_tensor_at(&f.geom, l, (lsa_indexer_part)p),
                                     b = lsa_indexer_tensor_at(&c.geom, l, (lsa_indexer_part)p);
            if (strcmp(a.name, b.name) || a.n != b.n ||
                memcmp(f.params + a.offset, c.params + b.offset, (size_t)a.n * sizeof(float)))
                LSA_FAIL(LSA_E_FORMAT, "'%s': tensor %s is not the one of checkpoint '%s'; export again",
                         indexer, a.name, c.dir);
        }
done:
    lsa_ckpt_fini(&c);
    lsa_indexer_file_fini(&f);
    return st;
}

static lsa_status pick_layers(lsa_indexer_geom *g, const lsa_teacher_config *c, const char *layers,
                              lsa_err *err) {
    bool want[LSA_MAX_CSA] = {false};
    const lsa_status st = lsa_csa_list(want, layers, c->n_csa, LSA_E_ARG, "--layers", err);
    if (st != LSA_OK) return st;
    for (int32_t o = 0; o < c->n_csa; o++)
        if (want[o]) {
            g->ord[g->n_layer].v = o;
            g->id[g->n_layer++] = c->csa_id[o];
        }
    return LSA_OK;
}

lsa_status lsa_export_import(const char *dir, const char *out, const char *layers, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_teacher *t = NULL;
    lsa_indexer_geom g = {0};
    float *params = NULL;
    json_t *state = NULL;
    char path[LSA_PATH_MAX], hash[17];
    LSA_TRY(lsa_path(path, err, "%s/ckpt", out));
    if (lsa_exists(path)) LSA_FAIL(LSA_E_ARG, "'%s' already holds checkpoints; choose another --out", out);
    LSA_TRY(lsa_teacher_open(&t, dir, err));
    const lsa_teacher_config *c = lsa_teacher_cfg(t);
    if (c->n_csa == 0)
        LSA_FAIL(LSA_E_UNSUPPORTED, "'%s' has no compressed-sparse-attention layer, so no native indexer",
                 dir);
    g.hidden = c->hidden;
    g.n_head = c->index_n_head;
    g.head_dim = c->index_head_dim;
    g.rank = c->q_rank;
    g.eps = c->norm_eps;
    g.rope = c->rope_compress;
    LSA_TRY(pick_layers(&g, c, layers, err));
    LSA_TRY(lsa_indexer_geom_check(&g, err));
    LSA_TRY(LSA_NEW(params, lsa_indexer_n_param(&g), err));
    for (int32_t l = 0; l < g.n_layer; l++) {
        static const char *const name[] = {"attn.wq_a.weight", "attn.indexer.wq_b.weight",
                                           "attn.q_norm.weight", "attn.indexer.weights_proj.weight"};
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_at(&g, l, (lsa_indexer_part)p);
            char full[128];
            snprintf(full, sizeof full, "layers.%d.%s", g.id[l].v, name[p]);
            LSA_TRY(lsa_teacher_f32(params + x.offset, t, full, x.n_dim == 2 ? x.shape[0] : 1,
                                    x.n_dim == 2 ? x.shape[1] : x.shape[0], err));
        }
    }
    lsa_hex64(hash, lsa_teacher_hash(t));
    state = json_pack("{s:i, s:s, s:s, s:s}", "step", 0, "source", "native indexer", "teacher",
                      lsa_teacher_name(t), "teacher_hash", hash);
    LSA_TRY(lsa_ckpt_save(out, 0, &g, params, NULL, NULL, state, true, 1, 0, err));
done:
    json_decref(state);
    lsa_free(params);
    lsa_teacher_close(t);
    return st;
}
