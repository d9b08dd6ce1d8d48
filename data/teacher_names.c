/* A tensor by its original name, whatever spelling the file uses: original, transformers' modules, or the
 * mixture that save_pretrained writes (architecture notes 11.3, 12.1). */
#include <stdio.h>
#include <string.h>

#include "data/teacher_internal.h"

/* Original suffix (after "layers.N.") -> transformers module suffix. Prefix matches end at '*'. */
static const char *const layer_map[][2] = {
    {"attn_norm.weight", "input_layernorm.weight"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"},
    {"hc_attn_fn", "attn_hc.fn"},
    {"hc_attn_base", "attn_hc.base"},
    {"hc_attn_scale", "attn_hc.scale"},
    {"hc_ffn_fn", "ffn_hc.fn"},
    {"hc_ffn_base", "ffn_hc.base"},
    {"hc_ffn_scale", "ffn_hc.scale"},
    {"attn.wq_a.weight", "self_attn.q_a_proj.weight"},
    {"attn.q_norm.weight", "self_attn.q_a_norm.weight"},
    {"attn.wq_b.weight", "self_attn.q_b_proj.weight"},
    {"attn.wkv.weight", "self_attn.kv_proj.weight"},
    {"attn.kv_norm.weight", "self_attn.kv_norm.weight"},
    {"attn.attn_sink", "self_attn.sinks"},
    {"attn.wo_a.weight", "self_attn.o_a_proj.weight"},
    {"attn.wo_b.weight", "self_attn.o_b_proj.weight"},
    {"attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight"},
    {"attn.compressor.wgate.weight", "self_attn.compressor.gate_proj.weight"},
    {"attn.compressor.ape", "self_attn.compressor.position_bias"},
    {"attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight"},
    {"attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"},
    {"attn.indexer.weights_proj.weight", "self_attn.compressor.indexer.scorer.weights_proj.weight"},
    {"attn.indexer.compressor.wkv.weight", "self_attn.compressor.indexer.kv_proj.weight"},
    {"attn.indexer.compressor.wgate.weight", "self_attn.compressor.indexer.gate_proj.weight"},
    {"attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"},
    {"attn.indexer.compressor.norm.weight", "self_attn.compressor.indexer.kv_norm.weight"},
    {"ffn.gate.weight", "mlp.gate.weight"},
    {"ffn.gate.bias", "mlp.gate.e_score_correction_bias"},
    {"ffn.gate.tid2eid", "mlp.gate.tid2eid"},
    {"ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight"},
    {"ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight"},
    {"ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"},
};

static const char *const global_map[][2] = {
    {"embed.weight", "model.embed_tokens.weight"}, {"head.weight", "lm_head.weight"},
    {"norm.weight", "model.norm.weight"},          {"hc_head_fn", "model.hc_head.hc_fn"},
    {"hc_head_base", "model.hc_head.hc_base"},     {"hc_head_scale", "model.hc_head.hc_scale"},
};

static const lsa_st_tensor *find_exact(const lsa_teacher *t, const char *name) {
    for (int32_t i = 0; i < t->n_file; i++) {
        const lsa_st_tensor *x = lsa_st_find(t->file[i], name);
        if (x) return x;
    }
    return NULL;
}

static const lsa_st_tensor *find_model(const lsa_teacher *t, const char *name) {
    const lsa_st_tensor *x = find_exact(t, name);
    if (x) return x;
    char full[LSA_TENSOR_NAME + 8];
    snprintf(full, sizeof full, "model.%s", name);
    return find_exact(t, full);
}

const lsa_st_tensor *lsa_teacher_find(const lsa_teacher *t, const char *name) {
    const lsa_st_tensor *x = find_model(t, name);
    if (x) return x;
    for (size_t i = 0; i < sizeof global_map / sizeof *global_map; i++)
        if (!strcmp(name, global_map[i][0])) return find_model(t, global_map[i][1]);
    int layer, at = 0;
    if (sscanf(name, "layers.%d.%n", &layer, &at) != 1 || at == 0) return NULL;
    const char *suffix = name + at;
    char alt[LSA_TENSOR_NAME];
    for (size_t i = 0; !x && i < sizeof layer_map / sizeof *layer_map; i++) {
        if (strcmp(suffix, layer_map[i][0])) continue;
        snprintf(alt, sizeof alt, "layers.%d.%s", layer, layer_map[i][1]);
        x = find_model(t, alt);
    }
    if (!x && !strcmp(suffix, "attn.kv_norm.weight")) { /* save_pretrained's spelling of the mixture */
        snprintf(alt, sizeof alt, "layers.%d.attn.norm.weight", layer);
        x = find_model(t, alt);
    }
    return x;
}

/* The scale that belongs to a quantised tensor: a sibling of the name under which the tensor is stored. */
const lsa_st_tensor *lsa_teacher_find_scale(const lsa_teacher *t, const char *stored) {
    static const char *const tail[] = {".scale", ".weight_scale_inv", ".weight_scale"};
    size_t n = strlen(stored);
    if (n > 7 && !strcmp(stored + n - 7, ".weight")) n -= 7;
    for (size_t i = 0; i < sizeof tail / sizeof *tail; i++) {
        char s[LSA_TENSOR_NAME + 32];
        snprintf(s, sizeof s, "%.*s%s", (int)(n < LSA_TENSOR_NAME ? n : LSA_TENSOR_NAME), stored, tail[i]);
        const lsa_st_tensor *x = find_exact(t, s);
        if (x) return x;
    }
    return NULL;
}

/* transformers stacks the experts: gate_up_proj [E, 2*moe, d] (w1 rows first), down_proj [E, d, moe]. A view
 * of one. */
bool lsa_teacher_find_stacked(lsa_st_tensor *view, const lsa_st_tensor **parent, const lsa_teacher *t,
                              const char *name) {
    int layer, expert, w, at = 0;
    if (sscanf(name, "layers.%d.ffn.experts.%d.w%d.weight%n", &layer, &expert, &w, &at) != 3 || !at ||
        name[at])
        return false;
    char alt[LSA_TENSOR_NAME];
    snprintf(alt, sizeof alt, "layers.%d.mlp.experts.%s", layer, w == 2 ? "down_proj" : "gate_up_proj");
    const lsa_st_tensor *x = find_model(t, alt);
    if (!x || x->n_dim != 3 || expert < 0 || expert >= x->shape[0] || lsa_dtype_bytes(x->dtype) < 2)
        return false;
    int64_t rows = w == 2 ? x->shape[1] : x->shape[1] / 2, cols = x->shape[2];
    int64_t first = (int64_t)expert * x->shape[1] + (w == 3 ? rows : 0);
    if (parent) *parent = x;
    *view = *x;
    view->n_dim = 2;
    view->shape[0] = rows;
    view->shape[1] = cols;
    view->n_elem = rows * cols;
    view->n_bytes = (size_t)view->n_elem * lsa_dtype_bytes(x->dtype);
    view->data = (const unsigned char *)x->data + (size_t)(first * cols) * lsa_dtype_bytes(x->dtype);
    return true;
}
