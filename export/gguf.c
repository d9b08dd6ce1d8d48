/* GGUF v3: see gguf.h. Little-endian; counts and lengths are u64; dimensions run from the densest to the
 * outermost, so a [rows, cols] matrix is written as {cols, rows}: the mistake that would stay silent for
 * square ones. */
#include "export/gguf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/weights.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

enum { ALIGN = 32, T_U32 = 4, T_I32 = 5, T_F32 = 6, T_STRING = 8, T_ARRAY = 9, T_F64 = 12 };
enum { GGML_F32 = 0, GGML_BF16 = 30, FILE_F32 = 0, FILE_BF16 = 32 };

typedef struct kv {
    const char *key;
    int type;
    uint64_t u;       /* T_U32 */
    double x;         /* T_F32, T_F64 */
    const char *s;    /* T_STRING; NULL: the file has no such key */
    const int32_t *v; /* T_ARRAY of T_I32, u of them */
} kv;

static lsa_status put_string(lsa_sink *to, const char *s, lsa_err *err) {
    const lsa_status st = lsa_sink_uint(to, strlen(s), 8, err);
    return st == LSA_OK ? lsa_sink_put(to, s, strlen(s), err) : st;
}

static bool in_file(const kv *k) {
    return k->type != T_STRING || k->s;
}

static lsa_status put_kv(lsa_sink *to, const kv *k, lsa_err *err) {
    lsa_status st = LSA_OK;
    const float f = (float)k->x;
    LSA_TRY(put_string(to, k->key, err));
    LSA_TRY(lsa_sink_uint(to, (uint64_t)k->type, 4, err));
    switch (k->type) {
    case T_U32:
        LSA_TRY(lsa_sink_uint(to, k->u, 4, err));
        break;
    case T_F32:
        LSA_TRY(lsa_sink_put(to, &f, sizeof f, err));
        break;
    case T_F64:
        LSA_TRY(lsa_sink_put(to, &k->x, sizeof k->x, err));
        break;
    case T_STRING:
        LSA_TRY(put_string(to, k->s, err));
        break;
    default:
        LSA_TRY(lsa_sink_uint(to, T_I32, 4, err));
        LSA_TRY(lsa_sink_uint(to, k->u, 8, err));
        LSA_TRY(lsa_sink_put(to, k->v, (size_t)k->u * sizeof *k->v, err));
    }
done:
    return st;
}

/* Tensor infos, padding, data: each tensor begins at a multiple of ALIGN of the data section. */
static lsa_status put_tensors(lsa_sink *to, const lsa_tensor_out *t, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t offset = 0;
    for (int64_t i = 0; i < n; i++) {
        LSA_TRY(put_string(to, t[i].name, err));
        LSA_TRY(lsa_sink_uint(to, (uint64_t)t[i].n_dim, 4, err));
        for (int32_t d = t[i].n_dim; d-- > 0;) LSA_TRY(lsa_sink_uint(to, (uint64_t)t[i].shape[d], 8, err));
        LSA_TRY(lsa_sink_uint(to, t[i].dtype == LSA_BF16 ? GGML_BF16 : GGML_F32, 4, err));
        LSA_TRY(lsa_sink_uint(to, (uint64_t)offset, 8, err));
        offset += lsa_align_up(lsa_tensor_out_bytes(&t[i]), ALIGN);
    }
    LSA_TRY(lsa_sink_zeros(to, lsa_align_up(to->n_bytes, ALIGN) - to->n_bytes, err));
    for (int64_t i = 0; i < n; i++) {
        LSA_TRY(t[i].emit(&t[i], to, err));
        LSA_TRY(lsa_sink_zeros(to, lsa_align_up(to->n_bytes, ALIGN) - to->n_bytes, err));
    }
done:
    return st;
}

lsa_status lsa_gguf_emit(lsa_sink *to, const lsa_indexer_file *f, lsa_err *err) {
    static const char *const part[] = {"wq_a.weight", "wq_b.weight", "q_norm.weight", "weights_proj.weight"};
    lsa_status st = LSA_OK;
    const lsa_indexer_geom *g = &f->geom;
    const lsa_rope *r = &g->rope;
    const lsa_dtype dtype = f->dtype == LSA_F32 ? LSA_F32 : LSA_BF16;
    lsa_tensor_out *t = NULL;
    int32_t ord[LSA_MAX_CSA], id[LSA_MAX_CSA];
    json_t *costs = lsa_indexer_costs_json(f), *weights = lsa_indexer_prior_json(f);
    char *train = json_dumps(f->train, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17)),
         *calibration = json_dumps(f->calibration, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17)),
         *continuation = json_dumps(costs, JSON_COMPACT | JSON_REAL_PRECISION(17)),
         *prior = json_dumps(weights, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17)), name[96];
    const char *teacher = json_string_value(json_object_get(f->train, "teacher"));
    int64_t n = 0, n_kv = 0;
    for (int32_t l = 0; l < g->n_layer; l++) ord[l] = g->ord[l].v, id[l] = g->id[l].v;
    const uint64_t layers = (uint64_t)g->n_layer;
    const kv all[] = {
        {.key = "general.architecture", T_STRING, .s = "memidx"},
        {.key = "general.type", T_STRING, .s = "adapter"},
        {.key = "general.name", T_STRING, .s = teacher ? teacher : "DeepSeek-V4"},
        {.key = "general.description", T_STRING, .s = "Memory indexer for Lookahead Sparse Attention"},
        {.key = "general.file_type", T_U32, dtype == LSA_F32 ? FILE_F32 : FILE_BF16},
        {.key = "general.alignment", T_U32, ALIGN},
        {.key = "memidx.format", T_STRING, .s = "lsa-memidx/1"},
        {.key = "memidx.weight_type", T_STRING, .s = lsa_weight_dtype_name(f->dtype)},
        {.key = "memidx.embedding_length", T_U32, (uint64_t)g->hidden},
        {.key = "memidx.head_count", T_U32, (uint64_t)g->n_head},
        {.key = "memidx.head_dim", T_U32, (uint64_t)g->head_dim},
        {.key = "memidx.rank", T_U32, (uint64_t)g->rank},
        {.key = "memidx.layer_norm_rms_epsilon", T_F32, .x = (double)g->eps},
        {.key = "memidx.layers.ordinal", T_ARRAY, layers, .v = ord},
        {.key = "memidx.layers.id", T_ARRAY, layers, .v = id},
        {.key = "memidx.rope.dimension_count", T_U32, (uint64_t)r->dim},
        {.key = "memidx.rope.channels", T_STRING, .s = "last"},
        {.key = "memidx.rope.pairs", T_STRING, .s = "adjacent"},
        {.key = "memidx.rope.freq_base", T_F32, .x = r->base},
        {.key = "memidx.rope.scaling.type", T_STRING, .s = r->factor == 1 ? "none" : "yarn"},
        {.key = "memidx.rope.scaling.factor", T_F32, .x = r->factor},
        {.key = "memidx.rope.scaling.original_context_length", T_U32, (uint64_t)r->original_len},
        {.key = "memidx.rope.scaling.yarn_beta_fast", T_F32, .x = r->beta_fast},
        {.key = "memidx.rope.scaling.yarn_beta_slow", T_F32, .x = r->beta_slow},
        {.key = "memidx.rope.scaling.attn_factor", T_F32, .x = 1},
        {.key = "memidx.rope.angle", T_STRING, .s = "f32(f32(position) * f32(freq))"},
        {.key = "memidx.rotation", T_STRING, .s = "hadamard (Sylvester order) / sqrt(head_dim), after rope"},
        {.key = "memidx.head_weight_scale", T_STRING, .s = "1/sqrt(head_dim * head_count)"},
        {.key = "memidx.logit", T_STRING, .s = "sum over heads of w * max(0, k . q)"},
        {.key = "memidx.key_codec", T_STRING, .s = "e4m3_f32"},
        {.key = "memidx.ensemble", T_STRING, .s = lsa_ensemble_name(f->ensemble)},
        {.key = "memidx.window", T_U32, (uint64_t)f->tau},
        {.key = "memidx.tail", T_U32, (uint64_t)f->tail},
        {.key = "memidx.threshold", T_F64, .x = f->threshold},
        {.key = "memidx.train", T_STRING, .s = train ? train : "{}"},
        {.key = "memidx.calibration", T_STRING, .s = calibration},
        {.key = "memidx.continuation", T_STRING, .s = continuation},
        {.key = "memidx.prior", T_STRING, .s = prior},
    };
    const int64_t n_all = (int64_t)(sizeof all / sizeof *all);
    for (int64_t i = 0; i < n_all; i++) n_kv += in_file(&all[i]);
    LSA_TRY(LSA_NEW(t, g->n_layer * LSA_INDEXER_PARTS, err));
    for (int32_t l = 0; l < g->n_layer; l++)
        for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
            snprintf(name, sizeof name, "blk.%d.memidx.%s", g->id[l].v, part[p]);
            t[n++] = lsa_weight_out(name, f->params, g, l, (lsa_indexer_part)p, dtype);
        }
    LSA_TRY(lsa_sink_put(to, "GGUF", 4, err));
    LSA_TRY(lsa_sink_uint(to, 3, 4, err));
    LSA_TRY(lsa_sink_uint(to, (uint64_t)n, 8, err));
    LSA_TRY(lsa_sink_uint(to, (uint64_t)n_kv, 8, err));
    for (int64_t i = 0; i < n_all; i++)
        if (in_file(&all[i])) LSA_TRY(put_kv(to, &all[i], err));
    LSA_TRY(put_tensors(to, t, n, err));
done:
    free(train);
    free(calibration);
    free(continuation);
    free(prior);
    json_decref(costs);
    json_decref(weights);
    lsa_free(t);
    return st;
}
