/* Import: see import.h. The mistakes that would stay silent: taking a transformer layer id for a CSA ordinal
 * (l22 for l10), and RoPE constants of another model; so ids come from the model or from DeepSeek-V4-Flash,
 * whose hidden size must match. */
#include "export/import.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/ckpt.h"
#include "data/indexer_file.h"
#include "data/teacher.h"
#include "data/tensor_file.h"
#include "data/weights.h"
#include "export/folder.h"
#include "kernels/core/csa_list.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"

enum { HEAD_DIM = 128, FLASH_HIDDEN = 4096, FLASH_CSA = 21 };

/* Model constants that weights do not tell. */
typedef struct constants {
    int32_t hidden, n_csa;
    float eps;
    lsa_rope rope;
    lsa_layer_id id[LSA_MAX_CSA];
} constants;

/* What an import gathers: geometry and weights, and what an exported file says beside them. */
typedef struct import {
    lsa_indexer_file f;
    const lsa_import_options *o;
    const char *source, *kind; /* kind: what it was, for the checkpoint's state */
    char *note;
    size_t note_bytes;
    constants c;
    bool exported; /* from a file with lsa's metadata */
} import;

static lsa_status constants_of(constants *c, const char *teacher, lsa_err *err) {
    lsa_teacher_config t;
    char path[LSA_PATH_MAX];
    if (!teacher) {
        *c = (constants){
            .hidden = FLASH_HIDDEN, .n_csa = FLASH_CSA, .eps = 1e-6f, .rope = {64, 160000, 16, 65536, 32, 1}};
        for (int32_t i = 0; i < c->n_csa; i++) c->id[i].v = 2 * i + 2;
        return LSA_OK;
    }
    lsa_status st = lsa_path(path, err, "%s/config.json", teacher);
    if (st == LSA_OK) st = lsa_teacher_config_load(&t, path, err);
    if (st != LSA_OK) return st;
    if (t.index_head_dim != HEAD_DIM)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "'%s': index heads of %d channels, only %d are known", path,
                     t.index_head_dim, HEAD_DIM);
    *c = (constants){.hidden = t.hidden, .n_csa = t.n_csa, .eps = t.norm_eps, .rope = t.rope_compress};
    memcpy(c->id, t.csa_id, sizeof c->id);
    return LSA_OK;
}

/* ---- names ---- */

typedef enum scheme { JOINT, SINGLE, PRETRAINED } scheme;

/* The ordinal of retrievers.l{ord}.wq_a.weight, -1 for any other name. */
static int32_t joint_ordinal(const char *name) {
    int ord = -1, end = 0;
    if (sscanf(name, "retrievers.l%9d.wq_a.weight%n", &ord, &end) != 1 || end == 0 || name[end]) return -1;
    return ord;
}

static void tensor_name(char out[96], scheme s, int32_t ord, lsa_indexer_part p) {
    static const char *const single[] = {"wq_a.weight", "wq_b.weight", "q_norm_weight",
                                         "weights_proj.weight"},
                             *const pretrained[] = {"wq_a.weight", "indexer.wq_b.weight", "q_norm.weight",
                                                    "indexer.weights_proj.weight"};
    if (s == JOINT)
        snprintf(out, 96, "retrievers.l%d.%s", ord, single[p]);
    else
        snprintf(out, 96, "%s", s == SINGLE ? single[p] : pretrained[p]);
}

static lsa_status scheme_of(scheme *s, const lsa_tensor_file *file, lsa_err *err) {
    for (int64_t i = 0; i < lsa_tensor_file_count(file); i++)
        if (!strncmp(lsa_tensor_file_at(file, i)->name, "retrievers.", 11)) {
            *s = JOINT;
            return LSA_OK;
        }
    *s = lsa_tensor_file_find(file, "indexer.wq_b.weight") ? PRETRAINED : SINGLE;
    if (*s == PRETRAINED || lsa_tensor_file_find(file, "wq_a.weight") ||
        lsa_tensor_file_find(file, "wq_b.weight"))
        return LSA_OK;
    LSA_RET_FAIL(
        LSA_E_FORMAT,
        "'%s' holds no indexer: expected retrievers.l{ordinal}.wq_a.weight, or wq_a.weight for one layer",
        lsa_tensor_file_path(file));
}

/* ---- layers ---- */

/* Ordinals among have[] that --layers asks for, in order; every listed one must be there. */
static lsa_status choose(import *im, const bool have[LSA_MAX_CSA], lsa_err *err) {
    bool want[LSA_MAX_CSA];
    lsa_indexer_geom *g = &im->f.geom;
    const bool all = !strcmp(im->o->layers, "all");
    lsa_status st = lsa_csa_list(want, im->o->layers, LSA_MAX_CSA, LSA_E_ARG, "--layers", err);
    if (st != LSA_OK) return st;
    g->n_layer = 0;
    for (int32_t i = 0; i < LSA_MAX_CSA; i++) {
        if (!want[i] || (all && !have[i])) continue;
        if (!have[i])
            LSA_RET_FAIL(LSA_E_ARG, "--layers asks for CSA ordinal %d, which '%s' does not hold", i,
                         im->source);
        g->ord[g->n_layer++].v = i;
    }
    if (g->n_layer == 0) LSA_RET_FAIL(LSA_E_FORMAT, "'%s' holds no layer of an indexer", im->source);
    return LSA_OK;
}

/* Layer ids of the chosen ordinals from the constants. */
static lsa_status set_ids(import *im, lsa_err *err) {
    lsa_indexer_geom *g = &im->f.geom;
    for (int32_t l = 0; l < g->n_layer; l++) {
        if (g->ord[l].v >= im->c.n_csa)
            LSA_RET_FAIL(LSA_E_ARG, "CSA ordinal %d: %s has %d CSA layers, ordinals 0 to %d%s", g->ord[l].v,
                         im->o->teacher ? im->o->teacher : "DeepSeek-V4-Flash", im->c.n_csa, im->c.n_csa - 1,
                         im->o->teacher ? "" : "; give --teacher for another model");
        g->id[l] = im->c.id[g->ord[l].v];
    }
    return LSA_OK;
}

/* ---- shapes ---- */

/* Hidden size, heads and rank of the layer that `file` holds under scheme s. */
static lsa_status infer(lsa_indexer_geom *g, const lsa_tensor_file *file, scheme s, int32_t ord,
                        lsa_err *err) {
    char a_name[96], b_name[96];
    tensor_name(a_name, s, ord, LSA_WQ_A);
    tensor_name(b_name, s, ord, LSA_WQ_B);
    const lsa_st_tensor *a = lsa_tensor_file_find(file, a_name), *b = lsa_tensor_file_find(file, b_name);
    const char *path = lsa_tensor_file_path(file);
    if (!a || !b) LSA_RET_FAIL(LSA_E_FORMAT, "'%s': tensor '%s' is missing", path, a ? b_name : a_name);
    if (a->n_dim != 2 || a->shape[0] < 1 || a->shape[1] < 1 || a->shape[0] > 1 << 16 || a->shape[1] > 1 << 20)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s': tensor '%s' is not a matrix [rank, hidden]", path, a_name);
    if (b->n_dim != 2 || b->shape[1] != a->shape[0] || b->shape[0] % HEAD_DIM || b->shape[0] < HEAD_DIM ||
        b->shape[0] > HEAD_DIM * 128)
        LSA_RET_FAIL(
            LSA_E_FORMAT,
            "'%s': tensor '%s': expected [heads * %d, %lld] with at most 128 heads, found [%lld, %lld]", path,
            b_name, HEAD_DIM, (long long)a->shape[0], (long long)b->shape[0],
            (long long)(b->n_dim == 2 ? b->shape[1] : 0));
    g->hidden = (int32_t)a->shape[1];
    g->rank = (int32_t)a->shape[0];
    g->n_head = (int32_t)(b->shape[0] / HEAD_DIM);
    g->head_dim = HEAD_DIM;
    return LSA_OK;
}

/* Geometry of a file without lsa's metadata; the chosen layers are set. Says what it had to assume. */
static lsa_status complete(import *im, const lsa_tensor_file *file, scheme s, lsa_err *err) {
    lsa_indexer_geom *g = &im->f.geom;
    lsa_status st = LSA_OK;
    LSA_TRY(constants_of(&im->c, im->o->teacher, err));
    LSA_TRY(infer(g, file, s, g->ord[0].v, err));
    if (g->hidden != im->c.hidden)
        LSA_FAIL(LSA_E_UNSUPPORTED, "'%s' reads hidden vectors of %d channels, %s has %d%s", im->source,
                 g->hidden, im->o->teacher ? im->o->teacher : "DeepSeek-V4-Flash", im->c.hidden,
                 im->o->teacher ? "" : ": RoPE constants and layer ids are unknown; give --teacher");
    LSA_TRY(set_ids(im, err));
    g->eps = im->c.eps;
    g->rope = im->c.rope;
    snprintf(
        im->note, im->note_bytes,
        "the file says nothing about its model; from %s: layer ids (ordinal %d is layer %d), RoPE base %g, factor %g, "
        "original length %lld, beta %g and %g, eps %g",
        im->o->teacher ? im->o->teacher : "DeepSeek-V4-Flash", g->ord[0].v, g->id[0].v, g->rope.base,
        g->rope.factor, (long long)g->rope.original_len, g->rope.beta_fast, g->rope.beta_slow,
        (double)g->eps);
    LSA_TRY(lsa_indexer_geom_check(g, err));
done:
    return st;
}

static lsa_status read_layer(import *im, int32_t l, const lsa_tensor_file *file, scheme s, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &im->f.geom;
    for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_at(g, l, (lsa_indexer_part)p);
        char name[96];
        tensor_name(name, s, g->ord[l].v, (lsa_indexer_part)p);
        LSA_TRY(lsa_tensor_file_read(im->f.params + t.offset, file, name, t.n_dim, t.shape, err));
    }
done:
    return st;
}

static lsa_status alloc_params(import *im, lsa_err *err) {
    return LSA_NEW(im->f.params, lsa_indexer_n_param(&im->f.geom), err);
}

/* ---- sources ---- */

/* A file that lsa-export wrote: its metadata says everything; a subset of its layers is no longer what was
 * calibrated. */
static lsa_status import_exported(import *im, const lsa_tensor_file *file, scheme s, lsa_err *err) {
    lsa_status st = LSA_OK;
    bool have[LSA_MAX_CSA] = {false};
    lsa_indexer_geom *g = &im->f.geom, all;
    if (im->o->teacher)
        LSA_FAIL(LSA_E_ARG, "'%s' says itself what it belongs to: --teacher is for files that do not",
                 im->source);
    LSA_TRY(lsa_indexer_meta_read(&im->f, file, err));
    all = *g;
    for (int32_t l = 0; l < all.n_layer; l++) have[all.ord[l].v] = true;
    LSA_TRY(choose(im, have, err));
    for (int32_t l = 0, k = 0; l < g->n_layer; l++) {
        while (all.ord[k].v != g->ord[l].v) k++;
        g->id[l] = all.id[k];
    }
    if (g->n_layer != all.n_layer && (im->f.calibration || g->reach || g->prior)) {
        const char *const left[] = {im->f.calibration ? "calibration" : NULL,
                                    g->reach ? "continuation" : NULL,
                                    g->prior ? "observed-mass prior" : NULL};
        char what[80] = "";
        int n = 0;
        for (int i = 0; i < 3; i++) {
            if (!left[i]) continue;
            const size_t at = strlen(what);
            snprintf(what + at, sizeof what - at, "%s%s", n++ ? " and the " : "", left[i]);
        }
        snprintf(im->note, im->note_bytes, "the %s %s made for all %d layers and left out", what,
                 n > 1 ? "were" : "was", all.n_layer);
        g->prior = false;
        json_decref(im->f.calibration);
        im->f.calibration = NULL;
        g->reach = 0;
    }
    if (s != JOINT && g->n_layer != 1)
        LSA_FAIL(LSA_E_FORMAT, "'%s': its metadata names %d layers, its tensors none", im->source,
                 g->n_layer);
    LSA_TRY(lsa_indexer_params_new(&im->f, file, err));
    for (int32_t l = 0; l < g->n_layer; l++) LSA_TRY(read_layer(im, l, file, s, err));
    im->kind = "exported indexer";
    im->exported = true;
done:
    return st;
}

static lsa_status import_file(import *im, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_tensor_file *file = NULL;
    bool have[LSA_MAX_CSA] = {false};
    scheme s;
    LSA_TRY(lsa_tensor_file_open(&file, path, err));
    LSA_TRY(scheme_of(&s, file, err));
    const char *format = lsa_tensor_file_metadata(file, "lsa.format");
    if (format && !strncmp(format, "lsa-ckpt/", 9))
        LSA_FAIL(LSA_E_ARG, "'%s' belongs to a checkpoint already: use its folder", path);
    if (format) {
        LSA_TRY(import_exported(im, file, s, err));
        goto done;
    }
    if (s != JOINT) {
        if (strspn(im->o->layers, "0123456789") != strlen(im->o->layers))
            LSA_FAIL(LSA_E_ARG,
                     "'%s' holds one layer without saying which: give its CSA ordinal by --layers N", path);
        bool any[LSA_MAX_CSA];
        memset(any, 1, sizeof any);
        LSA_TRY(choose(im, any, err));
    } else {
        for (int64_t i = 0; i < lsa_tensor_file_count(file); i++) {
            const int32_t ord = joint_ordinal(lsa_tensor_file_at(file, i)->name);
            if (ord >= LSA_MAX_CSA)
                LSA_FAIL(LSA_E_FORMAT, "'%s': tensor '%s': at most %d CSA layers are known", path,
                         lsa_tensor_file_at(file, i)->name, LSA_MAX_CSA);
            if (ord >= 0) have[ord] = true;
        }
        LSA_TRY(choose(im, have, err));
    }
    LSA_TRY(complete(im, file, s, err));
    LSA_TRY(alloc_params(im, err));
    for (int32_t l = 0; l < im->f.geom.n_layer; l++) LSA_TRY(read_layer(im, l, file, s, err));
    im->kind = "reference file";
done:
    lsa_tensor_file_close(file);
    return st;
}

/* A folder of layer_{id}.safetensors without lsa's metadata: have[ordinal] of every file whose id is a CSA
 * layer's. */
static lsa_status list_layers(bool have[LSA_MAX_CSA], import *im, lsa_err *err) {
    lsa_status st = LSA_OK;
    DIR *d = opendir(im->source);
    if (!d) LSA_FAIL(LSA_E_IO, "cannot open '%s': %s", im->source, strerror(errno));
    for (struct dirent *e; (e = readdir(d));) {
        const int32_t id = lsa_layer_file_id(e->d_name);
        int32_t ord = 0;
        if (id < 0) continue;
        while (ord < im->c.n_csa && im->c.id[ord].v != id) ord++;
        if (ord == im->c.n_csa)
            LSA_FAIL(LSA_E_FORMAT, "'%s/%s': layer %d of %s is not a CSA layer", im->source, e->d_name, id,
                     im->o->teacher ? im->o->teacher : "DeepSeek-V4-Flash");
        have[ord] = true;
    }
done:
    if (d) closedir(d);
    return st;
}

static lsa_status import_layers(import *im, lsa_err *err) {
    lsa_status st = LSA_OK;
    bool have[LSA_MAX_CSA] = {false};
    char path[LSA_PATH_MAX];
    lsa_tensor_file *file = NULL;
    lsa_indexer_geom *g = &im->f.geom;
    LSA_TRY(constants_of(&im->c, im->o->teacher, err));
    LSA_TRY(list_layers(have, im, err));
    LSA_TRY(choose(im, have, err));
    for (int32_t l = 0; l < g->n_layer; l++) {
        scheme s;
        lsa_tensor_file_close(file);
        file = NULL;
        LSA_TRY(lsa_path(path, err, "%s/layer_%02d.safetensors", im->source, im->c.id[g->ord[l].v].v));
        LSA_TRY(lsa_tensor_file_open(&file, path, err));
        LSA_TRY(scheme_of(&s, file, err));
        if (s == JOINT) LSA_FAIL(LSA_E_FORMAT, "'%s' is named for one layer but holds joint names", path);
        if (l == 0) {
            LSA_TRY(complete(im, file, s, err));
            LSA_TRY(alloc_params(im, err));
        }
        LSA_TRY(read_layer(im, l, file, s, err));
    }
    im->kind = "reference layer files";
done:
    lsa_tensor_file_close(file);
    return st;
}

static lsa_status import_teacher(import *im, json_t *state, lsa_err *err) {
    static const char *const name[] = {"attn.wq_a.weight", "attn.indexer.wq_b.weight", "attn.q_norm.weight",
                                       "attn.indexer.weights_proj.weight"};
    lsa_status st = LSA_OK;
    lsa_teacher *t = NULL;
    lsa_indexer_geom *g = &im->f.geom;
    bool have[LSA_MAX_CSA] = {false};
    char hash[17];
    LSA_TRY(lsa_teacher_open(&t, im->source, err));
    const lsa_teacher_config *c = lsa_teacher_cfg(t);
    if (c->n_csa == 0)
        LSA_FAIL(LSA_E_UNSUPPORTED, "'%s' has no compressed-sparse-attention layer, so no native indexer",
                 im->source);
    LSA_TRY(constants_of(&im->c, im->source, err));
    for (int32_t i = 0; i < c->n_csa; i++) have[i] = true;
    LSA_TRY(choose(im, have, err));
    LSA_TRY(set_ids(im, err));
    g->hidden = c->hidden;
    g->n_head = c->index_n_head;
    g->head_dim = c->index_head_dim;
    g->rank = c->q_rank;
    g->eps = c->norm_eps;
    g->rope = c->rope_compress;
    LSA_TRY(lsa_indexer_geom_check(g, err));
    LSA_TRY(alloc_params(im, err));
    for (int32_t l = 0; l < g->n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_at(g, l, (lsa_indexer_part)p);
            char full[128];
            snprintf(full, sizeof full, "layers.%d.%s", g->id[l].v, name[p]);
            LSA_TRY(lsa_teacher_f32(im->f.params + x.offset, t, full, x.n_dim == 2 ? x.shape[0] : 1,
                                    x.n_dim == 2 ? x.shape[1] : x.shape[0], err));
        }
    lsa_hex64(hash, lsa_teacher_hash(t));
    json_object_set_new(state, "teacher", json_string(lsa_teacher_name(t)));
    json_object_set_new(state, "teacher_hash", json_string(hash));
    im->kind = "native indexer";
done:
    lsa_teacher_close(t);
    return st;
}

/* ---- all ---- */

static bool has(const char *dir, const char *name) {
    char path[LSA_PATH_MAX];
    return lsa_path(path, NULL, "%s/%s", dir, name) == LSA_OK && lsa_exists(path);
}

static lsa_status import_any(import *im, json_t *state, lsa_err *err) {
    char path[LSA_PATH_MAX];
    bool layers;
    const char *s = im->source;
    if (!lsa_exists(s)) LSA_RET_FAIL(LSA_E_IO, "'%s' does not exist", s);
    if (!lsa_is_dir(s)) return import_file(im, s, err);
    if (has(s, "indexer.safetensors")) {
        const lsa_status st = lsa_path(path, err, "%s/indexer.safetensors", s);
        return st == LSA_OK ? import_file(im, path, err) : st;
    }
    if (has(s, "config.json")) {
        if (im->o->teacher) LSA_RET_FAIL(LSA_E_ARG, "'%s' is a teacher itself: leave --teacher out", s);
        return import_teacher(im, state, err);
    }
    if (has(s, "ckpt") || has(s, "MANIFEST.json"))
        LSA_RET_FAIL(LSA_E_ARG,
                     "'%s' is a checkpoint already: 'lsa-export write' and 'lsa-train run --init' take it",
                     s);
    const lsa_status st = lsa_has_layer_files(&layers, s, err);
    if (st != LSA_OK) return st;
    if (layers) return import_layers(im, err);
    LSA_RET_FAIL(
        LSA_E_FORMAT,
        "'%s' is neither a model (config.json), nor an exported indexer (indexer.safetensors), nor a folder of "
        "layer_NN.safetensors",
        s);
}

/* What a later export repeats: see lsa_export_write. */
static json_t *exported_state(const lsa_indexer_file *f) {
    json_t *o = json_pack("{s:s, s:s, s:I, s:I, s:f, s:O}", "dtype", lsa_weight_dtype_name(f->dtype),
                          "ensemble", lsa_ensemble_name(f->ensemble), "tau", (json_int_t)f->tau, "tail",
                          (json_int_t)f->tail, "threshold", f->threshold, "train", f->train);
    if (o && f->calibration) json_object_set(o, "calibration", f->calibration);
    return o;
}

lsa_status lsa_export_import(const char *source, const char *out, const lsa_import_options *o, char *note,
                             size_t note_bytes, lsa_err *err) {
    lsa_status st = LSA_OK;
import im = {.o = o, .source = source, .note = note, .note_bytes = note_bytes };
    json_t *state = json_pack("{s:i}", "step", 0);
    char path[LSA_PATH_MAX];
    note[0] = 0;
    LSA_TRY(lsa_path(path, err, "%s/ckpt", out));
    if (lsa_exists(path)) LSA_FAIL(LSA_E_ARG, "'%s' already holds checkpoints; choose another --out", out);
    LSA_TRY(import_any(&im, state, err));
    json_object_set_new(state, "source", json_string(im.kind));
    if (im.exported) {
        for (int i = 0; i < 2; i++) {
            static const char *const key[] = {"teacher", "teacher_hash"};
            json_t *v = json_object_get(im.f.train, key[i]);
            if (v) json_object_set(state, key[i], v);
        }
        json_object_set_new(state, "exported", exported_state(&im.f));
    }
    LSA_TRY(lsa_ckpt_save(out, 0, &im.f.geom, im.f.params, NULL, NULL, state, true, 1, 0, err));
done:
    json_decref(state);
    lsa_indexer_file_fini(&im.f);
    return st;
}
