/* Optional files of an export: see variants.h. Each is one function from the indexer to a sink, used to write
 * and to check. The mistake that would stay silent: an .pt in fp8, whose scales the reference server passes
 * over; so files without scales hold fp8 values in bf16, which represents them exactly. */
#include "export/variants.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/torch_file.h"
#include "data/weights.h"
#include "export/gguf.h"
#include "kernels/core/mem.h"

/* freqs_cis [n, rope/2] complex64: cos and sin of fl32(fl32(position) * freq). */
static lsa_status emit_freqs(const lsa_tensor_out *t, lsa_sink *to, lsa_err *err) {
    float freq[64], row[128];
    lsa_status st = LSA_OK;
    lsa_rope_freqs(freq, t->src);
    for (int64_t pos = 0; st == LSA_OK && pos < t->shape[0]; pos++) {
        for (int64_t i = 0; i < t->shape[1]; i++) {
            const float angle = (float)pos * freq[i];
            row[2 * i] = (float)cos((double)angle);
            row[2 * i + 1] = (float)sin((double)angle);
        }
        st = lsa_sink_put(to, row, (size_t)t->shape[1] * 8, err);
    }
    return st;
}

/* The metadata of the safetensors file as one JSON object of strings. */
static lsa_status make_note(char **out, const lsa_indexer_file *f, lsa_err *err) {
    lsa_indexer_meta meta;
    *out = NULL;
    lsa_status st = lsa_indexer_meta_make(&meta, f, err);
    if (st != LSA_OK) return st;
    json_t *o = json_object();
    for (int i = 0; meta.pair[i]; i += 2) json_object_set_new(o, meta.pair[i], json_string(meta.pair[i + 1]));
    *out = json_dumps(o, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(o);
    lsa_indexer_meta_fini(&meta);
    if (!*out) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format the note of indexer.pt");
    return LSA_OK;
}

static lsa_status emit_pt(lsa_sink *to, const lsa_indexer_file *f, const lsa_export_options *o, int32_t layer,
                          lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &f->geom;
    const lsa_dtype dtype = f->dtype == LSA_F32 ? LSA_F32 : LSA_BF16;
    lsa_tensor_out *t = NULL;
    char *note = NULL;
    int64_t n = 0;
    (void)layer;
    LSA_TRY(LSA_NEW(t, g->n_layer * (LSA_INDEXER_PARTS + 1), err));
    for (int32_t l = 0; l < g->n_layer; l++) {
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            const lsa_indexer_tensor x = lsa_indexer_tensor_at(g, l, (lsa_indexer_part)p);
            t[n++] = lsa_weight_out(x.name, f->params, g, l, (lsa_indexer_part)p, dtype);
        }
        if (!o->pt_freqs || !g->rope.dim) continue;
        t[n] = (lsa_tensor_out){.dtype = LSA_C64,
                                .n_dim = 2,
                                .shape = {o->pt_freqs, g->rope.dim / 2},
                                .emit = emit_freqs,
                                .src = &g->rope};
        snprintf(t[n++].name, sizeof t->name, "retrievers.l%d.freqs_cis", g->ord[l].v);
    }
    LSA_TRY(make_note(&note, f, err));
    LSA_TRY(lsa_torch_emit(to, "indexer", t, n, note, err));
done:
    free(note);
    lsa_free(t);
    return st;
}

/* One layer as an indexer of its own; what was learned or calibrated for all of them together is left out. */
static lsa_status emit_layer(lsa_sink *to, const lsa_indexer_file *f, const lsa_export_options *o,
                             int32_t layer, lsa_err *err) {
    lsa_indexer_file one = *f;
    (void)o;
    one.params = f->params + lsa_indexer_tensor_at(&f->geom, layer, LSA_WQ_A).offset;
    one.geom.n_layer = 1;
    one.geom.reach = 0;
    one.geom.prior = false;
    one.geom.ord[0] = f->geom.ord[layer];
    one.geom.id[0] = f->geom.id[layer];
    one.calibration = NULL;
    return lsa_indexer_file_emit(to, &one, false, err);
}

static lsa_status emit_gguf(lsa_sink *to, const lsa_indexer_file *f, const lsa_export_options *o,
                            int32_t layer, lsa_err *err) {
    (void)o, (void)layer;
    return lsa_gguf_emit(to, f, err);
}

typedef lsa_status (*emit_file)(lsa_sink *, const lsa_indexer_file *, const lsa_export_options *, int32_t,
                                lsa_err *);

static lsa_status write_file(const char *path, emit_file emit, const lsa_indexer_file *f,
                             const lsa_export_options *o, int32_t layer, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_commit c = {.fd = -1};
    LSA_TRY(lsa_commit_begin(&c, path, err));
    lsa_sink to = lsa_sink_commit(&c);
    LSA_TRY(emit(&to, f, o, layer, err));
    LSA_TRY(lsa_commit_end(&c, err));
done:
    lsa_commit_abort(&c);
    return st;
}

static lsa_status check_file(const char *path, emit_file emit, const lsa_indexer_file *f,
                             const lsa_export_options *o, int32_t layer, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_compare c = {0};
    LSA_TRY(lsa_compare_open(&c, path, err));
    lsa_sink to = lsa_sink_compare(&c);
    LSA_TRY(emit(&to, f, o, layer, err));
    LSA_TRY(lsa_compare_end(&c, err));
done:
    lsa_compare_close(&c);
    return st;
}

static lsa_status each(const lsa_indexer_file *f, const char *dir, const lsa_export_options *o,
                       lsa_status (*use)(const char *, emit_file, const lsa_indexer_file *,
                                         const lsa_export_options *, int32_t, lsa_err *),
                       lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    if (o->pt) {
        LSA_TRY(lsa_path(path, err, "%s/indexer.pt", dir));
        LSA_TRY(use(path, emit_pt, f, o, 0, err));
    }
    for (int32_t l = 0; o->per_layer && l < f->geom.n_layer; l++) {
        LSA_TRY(lsa_path(path, err, "%s/layer_%02d.safetensors", dir, f->geom.id[l].v));
        LSA_TRY(use(path, emit_layer, f, o, l, err));
    }
    if (o->gguf) {
        LSA_TRY(lsa_path(path, err, "%s/indexer.gguf", dir));
        LSA_TRY(use(path, emit_gguf, f, o, 0, err));
    }
done:
    return st;
}

lsa_status lsa_variants_write(const lsa_indexer_file *f, const char *dir, const lsa_export_options *o,
                              lsa_err *err) {
    return each(f, dir, o, write_file, err);
}

lsa_status lsa_variants_check(const lsa_indexer_file *f, const char *dir, const lsa_export_options *o,
                              lsa_err *err) {
    return each(f, dir, o, check_file, err);
}
