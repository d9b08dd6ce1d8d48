/* config.json of a DeepSeek-V4 model, in the hub's spelling (compress_ratios, rope_scaling), in the inference
 * package's short names where they differ, and in transformers' (layer_types, compress_rates,
 * rope_parameters).
 *
 * The mistake that would stay silent: a default for a missing number. Only numbers that the field's own files
 * leave out have one; everything else is required. */
#include <string.h>

#include "data/teacher.h"
#include "kernels/core/json.h"

typedef struct reader {
    const json_t *o;
    const char *where;
    lsa_err *err;
} reader;

/* A required integer in [lo, hi] under one of two spellings. */
static lsa_status need_int(int32_t *out, const reader *r, const char *key, const char *alt, int64_t lo,
                           int64_t hi) {
    int64_t v;
    const char *k = !json_object_get(r->o, key) && alt && json_object_get(r->o, alt) ? alt : key;
    lsa_status st = lsa_json_i64_in(&v, lo, hi, r->o, k, r->where, r->err);
    *out = (int32_t)v;
    return st;
}

static lsa_status opt_f32(float *out, double dflt, const reader *r, const char *key, const char *alt) {
    double v;
    const char *k = !json_object_get(r->o, key) && alt && json_object_get(r->o, alt) ? alt : key;
    lsa_status st = lsa_json_f64_or(&v, dflt, r->o, k, r->where, r->err);
    *out = (float)v;
    return st;
}

static lsa_status read_sizes(lsa_teacher_config *c, const reader *r) {
    lsa_status st = LSA_OK;
    lsa_err *err = r->err;
    const int64_t big = 1 << 20;
    LSA_TRY(need_int(&c->hidden, r, "hidden_size", "dim", 1, big));
    LSA_TRY(need_int(&c->n_layer, r, "num_hidden_layers", "n_layers", 1, LSA_MAX_LAYERS));
    LSA_TRY(need_int(&c->n_head, r, "num_attention_heads", "n_heads", 1, 1024));
    LSA_TRY(need_int(&c->head_dim, r, "head_dim", NULL, 2, 4096));
    LSA_TRY(need_int(&c->rope_dim, r, "qk_rope_head_dim", "rope_head_dim", 2, c->head_dim));
    LSA_TRY(need_int(&c->q_rank, r, "q_lora_rank", NULL, 1, big));
    LSA_TRY(need_int(&c->o_groups, r, "o_groups", NULL, 1, c->n_head));
    LSA_TRY(need_int(&c->o_rank, r, "o_lora_rank", NULL, 1, big));
    LSA_TRY(need_int(&c->window, r, "sliding_window", "window_size", 1, big));
    LSA_TRY(need_int(&c->index_n_head, r, "index_n_heads", NULL, 1, 1024));
    LSA_TRY(need_int(&c->index_head_dim, r, "index_head_dim", NULL, 2, 1024));
    LSA_TRY(need_int(&c->index_topk, r, "index_topk", NULL, 1, big));
    LSA_TRY(need_int(&c->n_expert, r, "n_routed_experts", NULL, 1, 4096));
    LSA_TRY(need_int(&c->n_expert_tok, r, "num_experts_per_tok", "n_activated_experts", 1, c->n_expert));
    LSA_TRY(need_int(&c->moe_dim, r, "moe_intermediate_size", "moe_inter_dim", 1, big));
    LSA_TRY(need_int(&c->hc_mult, r, "hc_mult", NULL, 1, 16));
    LSA_TRY(need_int(&c->hc_iters, r, "hc_sinkhorn_iters", NULL, 1, 1000));
    LSA_TRY(need_int(&c->vocab, r, "vocab_size", NULL, 2, 1 << 24));
    int64_t v;
    LSA_TRY(lsa_json_i64_or(&v, 1, r->o, "n_shared_experts", r->where, err));
    if (v != 1)
        LSA_FAIL(LSA_E_UNSUPPORTED, "%s: n_shared_experts is %lld, only 1 is known", r->where, (long long)v);
    c->n_shared = 1;
    LSA_TRY(lsa_json_i64_or(&c->max_position, 1048576, r->o, "max_position_embeddings", r->where, err));
    LSA_TRY(opt_f32(&c->hc_eps, 1e-6, r, "hc_eps", NULL));
    LSA_TRY(opt_f32(&c->norm_eps, 1e-6, r, "rms_norm_eps", "norm_eps"));
    LSA_TRY(opt_f32(&c->route_scale, 1.0, r, "routed_scaling_factor", "route_scale"));
    LSA_TRY(opt_f32(&c->swiglu_limit, 0.0, r, "swiglu_limit", NULL));
    if (c->rope_dim % 2) LSA_FAIL(LSA_E_FORMAT, "%s: rotary dimension %d is odd", r->where, c->rope_dim);
    if (c->n_head % c->o_groups)
        LSA_FAIL(LSA_E_FORMAT, "%s: o_groups %d does not divide %d heads", r->where, c->o_groups, c->n_head);
    if (c->index_head_dim & (c->index_head_dim - 1))
        LSA_FAIL(LSA_E_FORMAT, "%s: index_head_dim %d is not a power of two", r->where, c->index_head_dim);
    if (c->rope_dim > c->index_head_dim)
        LSA_FAIL(LSA_E_FORMAT, "%s: rotary dimension %d exceeds index_head_dim %d", r->where, c->rope_dim,
                 c->index_head_dim);
done:
    return st;
}

static void set_kind(lsa_teacher_config *c, int32_t l, int64_t ratio) {
    c->ratio[l] = (int32_t)ratio;
    c->kind[l] = ratio == 0 ? LSA_LAYER_WINDOW : ratio == LSA_CHUNK ? LSA_LAYER_CSA : LSA_LAYER_HCA;
}

static lsa_status read_layers(lsa_teacher_config *c, const reader *r) {
    lsa_status st = LSA_OK;
    lsa_err *err = r->err;
    json_t *ratios = json_object_get(r->o, "compress_ratios"), *types = json_object_get(r->o, "layer_types");
    if (!ratios && !types)
        LSA_FAIL(LSA_E_FORMAT, "%s: neither compress_ratios nor layer_types is given", r->where);
    if (types) {
        json_t *rates;
        int64_t csa, hca;
        LSA_TRY(lsa_json_object(&rates, r->o, "compress_rates", r->where, err));
        LSA_TRY(lsa_json_i64_in(&csa, 1, 1 << 20, rates, "compressed_sparse_attention", r->where, err));
        LSA_TRY(lsa_json_i64_in(&hca, 1, 1 << 20, rates, "heavily_compressed_attention", r->where, err));
        if (csa != LSA_CHUNK)
            LSA_FAIL(LSA_E_UNSUPPORTED, "%s: CSA compress rate %lld, only 4 is known", r->where,
                     (long long)csa);
        if (hca == LSA_CHUNK)
            LSA_FAIL(LSA_E_UNSUPPORTED, "%s: HCA compress rate 4 cannot be told from CSA", r->where);
        if (json_array_size(types) < (size_t)c->n_layer)
            LSA_FAIL(LSA_E_FORMAT, "%s: layer_types has %zu entries for %d layers", r->where,
                     json_array_size(types), c->n_layer);
        for (int32_t l = 0; l < c->n_layer; l++) {
            const char *t = json_string_value(json_array_get(types, (size_t)l));
            if (t && !strcmp(t, "sliding_attention"))
                set_kind(c, l, 0);
            else if (t && !strcmp(t, "compressed_sparse_attention"))
                set_kind(c, l, csa);
            else if (t && !strcmp(t, "heavily_compressed_attention"))
                set_kind(c, l, hca);
            else
                LSA_FAIL(LSA_E_UNSUPPORTED, "%s: layer_types[%d] is '%s', not a DeepSeek-V4 layer kind",
                         r->where, l, t ? t : "?");
        }
    } else {
        if (json_array_size(ratios) < (size_t)c->n_layer)
            LSA_FAIL(LSA_E_FORMAT, "%s: compress_ratios has %zu entries for %d layers", r->where,
                     json_array_size(ratios), c->n_layer);
        for (int32_t l = 0; l < c->n_layer; l++) {
            const json_t *v = json_array_get(ratios, (size_t)l);
            int64_t x = json_is_integer(v) ? (int64_t)json_integer_value(v) : -1;
            if (x < 0 || x > 1 << 20)
                LSA_FAIL(LSA_E_FORMAT, "%s: compress_ratios[%d] must be an integer >= 0", r->where, l);
            if (x > 0 && x < LSA_CHUNK)
                LSA_FAIL(LSA_E_UNSUPPORTED,
                         "%s: compression ratio %lld belongs to DeepSeek-V4.1, which is not supported",
                         r->where, (long long)x);
            set_kind(c, l, x);
        }
    }
    for (int32_t l = 0; l < c->n_layer; l++) {
        c->csa_ord[l] = -1;
        if (c->kind[l] != LSA_LAYER_CSA) continue;
        if (c->n_csa == LSA_MAX_CSA)
            LSA_FAIL(LSA_E_UNSUPPORTED, "%s: more than %d CSA layers", r->where, LSA_MAX_CSA);
        c->csa_ord[l] = c->n_csa;
        c->csa_id[c->n_csa++].v = l;
    }
    json_t *mlp = json_object_get(r->o, "mlp_layer_types");
    if (mlp) {
        for (int32_t l = 0; l < c->n_layer; l++) {
            const char *t = json_string_value(json_array_get(mlp, (size_t)l));
            if (!t || (strcmp(t, "hash_moe") && strcmp(t, "moe")))
                LSA_FAIL(LSA_E_UNSUPPORTED, "%s: mlp_layer_types[%d] is '%s', expected hash_moe or moe",
                         r->where, l, t ? t : "?");
            c->hash_moe[l] = !strcmp(t, "hash_moe");
        }
    } else {
        LSA_TRY(need_int(&c->n_hash_layer, r, "num_hash_layers", "n_hash_layers", 0, c->n_layer));
        for (int32_t l = 0; l < c->n_hash_layer; l++) c->hash_moe[l] = true;
    }
    c->n_hash_layer = 0;
    for (int32_t l = 0; l < c->n_layer; l++) c->n_hash_layer += c->hash_moe[l];
done:
    return st;
}

static lsa_status read_yarn(lsa_rope *r, const json_t *o, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_json_f64_or(&r->factor, 1.0, o, "factor", where, err));
    LSA_TRY(lsa_json_i64_or(&r->original_len, 65536, o, "original_max_position_embeddings", where, err));
    LSA_TRY(lsa_json_f64_or(&r->beta_fast, 32, o, "beta_fast", where, err));
    LSA_TRY(lsa_json_f64_or(&r->beta_slow, 1, o, "beta_slow", where, err));
done:
    return st;
}

static lsa_status read_rope(lsa_teacher_config *c, const reader *r) {
    lsa_status st = LSA_OK;
    lsa_err *err = r->err;
    lsa_rope *m = &c->rope_main, *z = &c->rope_compress;
    *m =
        (lsa_rope){.dim = c->rope_dim, .factor = 1.0, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    *z = *m;
    json_t *params = json_object_get(r->o, "rope_parameters");
    json_t *pm = json_object_get(params, "main"), *pc = json_object_get(params, "compress");
    LSA_TRY(lsa_json_f64_or(&m->base, 10000.0, r->o, "rope_theta", r->where, err));
    LSA_TRY(lsa_json_f64_or(&z->base, 160000.0, r->o, "compress_rope_theta", r->where, err));
    if (pm) LSA_TRY(lsa_json_f64_or(&m->base, m->base, pm, "rope_theta", r->where, err));
    if (pc) {
        LSA_TRY(lsa_json_f64_or(&z->base, z->base, pc, "rope_theta", r->where, err));
        LSA_TRY(read_yarn(z, pc, r->where, err));
    } else if (json_object_get(r->o, "rope_scaling")) {
        LSA_TRY(read_yarn(z, json_object_get(r->o, "rope_scaling"), r->where, err));
    } else if (json_object_get(r->o, "rope_factor")) {
        LSA_TRY(read_yarn(z, r->o, r->where, err));
        LSA_TRY(lsa_json_f64(&z->factor, r->o, "rope_factor", r->where, err));
        LSA_TRY(lsa_json_i64(&z->original_len, r->o, "original_seq_len", r->where, err));
    } else {
        LSA_FAIL(LSA_E_FORMAT,
                 "%s: no rope_parameters.compress and no rope_scaling: the YaRN constants are unknown",
                 r->where);
    }
    if (!(m->base > 1) || !(z->base > 1) || !(z->factor >= 1) || z->original_len < 1 || !(z->beta_fast > 0) ||
        !(z->beta_slow > 0))
        LSA_FAIL(LSA_E_FORMAT, "%s: RoPE constants out of range", r->where);
done:
    return st;
}

/* The hub says quantization_config and expert_dtype; the inference package dtype "fp8". Experts are fp4 in
 * every quantised release but the base models, which say so. */
static lsa_status read_storage(lsa_teacher_config *c, const reader *r) {
    lsa_err *err = r->err;
    const json_t *q = json_object_get(r->o, "quantization_config");
    const char *dtype = json_string_value(json_object_get(r->o, "dtype")),
               *expert = json_string_value(json_object_get(r->o, "expert_dtype"));
    const bool fp8 = json_is_object(q) || (dtype && !strcmp(dtype, "fp8"));
    c->matrix_dtype = fp8 ? LSA_F8_E4M3 : LSA_BF16;
    c->expert_dtype = !fp8 ? LSA_BF16 : expert && !strcmp(expert, "fp8") ? LSA_F8_E4M3 : LSA_F4;
    if (expert && strcmp(expert, "fp4") && strcmp(expert, "fp8") && strcmp(expert, "bf16"))
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "%s: expert_dtype is '%.40s', expected fp4, fp8 or bf16", r->where,
                     expert);
    if (expert && !strcmp(expert, "bf16")) c->expert_dtype = LSA_BF16;
    return LSA_OK;
}

/* DeepSeek-V4.1 shares names with V4 and means other mathematics: any of its marks is enough. */
static bool is_v41(const json_t *root) {
    const char *arch = json_string_value(json_array_get(json_object_get(root, "architectures"), 0)),
               *type = json_string_value(json_object_get(root, "model_type"));
    return (arch && (strstr(arch, "V41") || strstr(arch, "V4_1"))) ||
           (type && (strstr(type, "v41") || strstr(type, "v4_1"))) || json_object_get(root, "text_config") ||
           json_object_get(root, "kv_source_layer_ids") || json_object_get(root, "index_source_layer_ids");
}

lsa_status lsa_teacher_config_load(lsa_teacher_config *out, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *root = NULL;
    memset(out, 0, sizeof *out);
    LSA_TRY(lsa_json_load(&root, path, err));
    if (is_v41(root))
        LSA_FAIL(LSA_E_UNSUPPORTED,
                 "%s: this is a DeepSeek-V4.1 model; only V4 (Flash, Pro and their geometry) is supported",
                 path);
    reader r = {root, path, err};
    LSA_TRY(read_sizes(out, &r));
    LSA_TRY(read_layers(out, &r));
    LSA_TRY(read_rope(out, &r));
    LSA_TRY(read_storage(out, &r));
done:
    json_decref(root);
    return st;
}
