/* A model folder under its original tensor names: finds a tensor whatever spelling the file uses, and
 * dequantises it.
 *
 * Dispatch is on the stored dtype, never on the name. The mistake that would stay silent: a scale that is not
 * found (the weights would still look plausible), so quantised tensors without their scale are refused. */
#include "data/teacher.h"

#include <stdio.h>
#include <string.h>

#include "data/lsa_safetensors.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/json.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

#define MAX_FILES 512
#define NAME_MAX_ 256

struct lsa_teacher {
    lsa_teacher_config cfg;
    char name[128];
    uint64_t hash;
    int32_t n_file;
    lsa_st *file[MAX_FILES];
};

/* ---- names ---- */

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
    char full[NAME_MAX_ + 8];
    snprintf(full, sizeof full, "model.%s", name);
    return find_exact(t, full);
}

static const lsa_st_tensor *find(const lsa_teacher *t, const char *name) {
    const lsa_st_tensor *x = find_model(t, name);
    if (x) return x;
    for (size_t i = 0; i < sizeof global_map / sizeof *global_map; i++)
        if (!strcmp(name, global_map[i][0])) return find_model(t, global_map[i][1]);
    int layer, at = 0;
    if (sscanf(name, "layers.%d.%n", &layer, &at) != 1 || at == 0) return NULL;
    const char *suffix = name + at;
    char alt[NAME_MAX_];
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
static const lsa_st_tensor *find_scale(const lsa_teacher *t, const char *stored) {
    static const char *const tail[] = {".scale", ".weight_scale_inv", ".weight_scale"};
    size_t n = strlen(stored);
    if (n > 7 && !strcmp(stored + n - 7, ".weight")) n -= 7;
    for (size_t i = 0; i < sizeof tail / sizeof *tail; i++) {
        char s[NAME_MAX_ + 32];
        snprintf(s, sizeof s, "%.*s%s", (int)(n < NAME_MAX_ ? n : NAME_MAX_), stored, tail[i]);
        const lsa_st_tensor *x = find_exact(t, s);
        if (x) return x;
    }
    return NULL;
}

/* transformers stacks the experts: gate_up_proj [E, 2*moe, d] (w1 rows first), down_proj [E, d, moe]. A view
 * of one. */
static bool find_stacked(lsa_st_tensor *view, const lsa_teacher *t, const char *name) {
    int layer, expert, w, at = 0;
    if (sscanf(name, "layers.%d.ffn.experts.%d.w%d.weight%n", &layer, &expert, &w, &at) != 3 || !at ||
        name[at])
        return false;
    char alt[NAME_MAX_];
    snprintf(alt, sizeof alt, "layers.%d.mlp.experts.%s", layer, w == 2 ? "down_proj" : "gate_up_proj");
    const lsa_st_tensor *x = find_model(t, alt);
    if (!x || x->n_dim != 3 || expert < 0 || expert >= x->shape[0] || lsa_dtype_bytes(x->dtype) < 2)
        return false;
    int64_t rows = w == 2 ? x->shape[1] : x->shape[1] / 2, cols = x->shape[2];
    int64_t first = (int64_t)expert * x->shape[1] + (w == 3 ? rows : 0);
    *view = *x;
    view->n_dim = 2;
    view->shape[0] = rows;
    view->shape[1] = cols;
    view->n_elem = rows * cols;
    view->n_bytes = (size_t)view->n_elem * lsa_dtype_bytes(x->dtype);
    view->data = (const unsigned char *)x->data + (size_t)(first * cols) * lsa_dtype_bytes(x->dtype);
    return true;
}

bool lsa_teacher_has(const lsa_teacher *t, const char *name) {
    lsa_st_tensor view;
    return find(t, name) || find_stacked(&view, t, name);
}

/* ---- values ---- */

static float scale_at(const lsa_st_tensor *s, int64_t i) {
    const unsigned char *p = s->data;
    if (s->dtype == LSA_F8_E8M0 || s->dtype == LSA_U8) return lsa_e8m0_to_f32(p[i]);
    float f;
    memcpy(&f, p + 4 * (size_t)i, 4);
    return f;
}

static lsa_status check_scale(const lsa_st_tensor *s, const char *name, int64_t rows, int64_t cols,
                              lsa_err *err) {
    if (!s)
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "tensor '%s' is quantised but its scale (.scale or .weight_scale_inv) is missing", name);
    if (s->dtype != LSA_F8_E8M0 && s->dtype != LSA_F32 && s->dtype != LSA_U8)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "scale of '%s' is %s, expected F8_E8M0 or F32", name,
                     lsa_dtype_name(s->dtype));
    if (s->n_dim != 2 || s->shape[0] != rows || s->shape[1] != cols)
        LSA_RET_FAIL(LSA_E_FORMAT, "scale of '%s' must be [%lld,%lld], found %lld elements", name,
                     (long long)rows, (long long)cols, (long long)s->n_elem);
    return LSA_OK;
}

static lsa_status dequant_fp8(float *dst, const lsa_teacher *t, const lsa_st_tensor *x, int64_t rows,
                              int64_t cols, lsa_err *err) {
    const lsa_st_tensor *s = find_scale(t, x->name);
    int64_t bc = lsa_ceil_div(cols, 128);
    lsa_status st = check_scale(s, x->name, lsa_ceil_div(rows, 128), bc, err);
    if (st != LSA_OK) return st;
    const unsigned char *p = x->data;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t b = 0; b < bc; b++) {
            float f = scale_at(s, i / 128 * bc + b);
            for (int64_t j = b * 128; j < lsa_min_i64(cols, b * 128 + 128); j++)
                dst[i * cols + j] = lsa_e4m3_table[p[i * cols + j]] * f;
        }
    return LSA_OK;
}

static lsa_status dequant_fp4(float *dst, const lsa_teacher *t, const lsa_st_tensor *x, int64_t rows,
                              int64_t cols, lsa_err *err) {
    const lsa_st_tensor *s = find_scale(t, x->name);
    if (cols % 32)
        LSA_RET_FAIL(LSA_E_FORMAT, "tensor '%s': %lld fp4 columns are not a multiple of 32", x->name,
                     (long long)cols);
    lsa_status st = check_scale(s, x->name, rows, cols / 32, err);
    if (st != LSA_OK) return st;
    const unsigned char *p = x->data;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            unsigned byte = p[(i * cols + j) / 2];
            dst[i * cols + j] =
                lsa_e2m1_table[j % 2 ? byte >> 4 : byte & 15u] * scale_at(s, i * (cols / 32) + j / 32);
        }
    return LSA_OK;
}

lsa_status lsa_teacher_f32(float *dst, const lsa_teacher *t, const char *name, int64_t rows, int64_t cols,
                           lsa_err *err) {
    lsa_st_tensor view;
    const lsa_st_tensor *x = find(t, name);
    if (!x && find_stacked(&view, t, name)) x = &view;
    if (!x)
        LSA_RET_FAIL(LSA_E_FORMAT, "tensor '%s' is missing from model '%s' under every known spelling", name,
                     t->name);
    int64_t r = x->n_dim == 2 ? x->shape[0] : 1, c = x->n_dim == 2   ? x->shape[1]
                                                     : x->n_dim == 1 ? x->shape[0]
                                                                     : 0;
    bool packed = (x->dtype == LSA_I8 || x->dtype == LSA_U8) && r == rows && c * 2 == cols;
    if (!packed && (r != rows || c != cols))
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "tensor '%s': config.json needs [%lld,%lld], the file has %d dimensions, [%lld,%lld]",
                     x->name, (long long)rows, (long long)cols, x->n_dim, (long long)r, (long long)c);
    if (packed || x->dtype == LSA_F4) return dequant_fp4(dst, t, x, rows, cols, err);
    if (x->dtype == LSA_F8_E4M3) return dequant_fp8(dst, t, x, rows, cols, err);
    if (x->dtype == LSA_F32 || x->dtype == LSA_BF16 || x->dtype == LSA_F16) return lsa_st_to_f32(dst, x, err);
    LSA_RET_FAIL(LSA_E_UNSUPPORTED, "tensor '%s' is %s; expected F32, BF16, F16, F8_E4M3 or packed FP4",
                 x->name, lsa_dtype_name(x->dtype));
}

lsa_status lsa_teacher_i64(int64_t *dst, const lsa_teacher *t, const char *name, int64_t rows, int64_t cols,
                           lsa_err *err) {
    const lsa_st_tensor *x = find(t, name);
    if (!x) LSA_RET_FAIL(LSA_E_FORMAT, "tensor '%s' is missing from model '%s'", name, t->name);
    if (x->n_dim != 2 || x->shape[0] != rows || x->shape[1] != cols ||
        (x->dtype != LSA_I64 && x->dtype != LSA_I32))
        LSA_RET_FAIL(LSA_E_FORMAT,
                     "tensor '%s': expected I64 or I32 [%lld,%lld], found %s with %lld elements", x->name,
                     (long long)rows, (long long)cols, lsa_dtype_name(x->dtype), (long long)x->n_elem);
    const unsigned char *p = x->data;
    for (int64_t i = 0; i < x->n_elem; i++) {
        int32_t small;
        if (x->dtype == LSA_I64)
            memcpy(&dst[i], p + 8 * (size_t)i, 8);
        else {
            memcpy(&small, p + 4 * (size_t)i, 4);
            dst[i] = small;
        }
    }
    return LSA_OK;
}

/* ---- opening ---- */

static lsa_status add_file(lsa_teacher *t, const char *dir, const char *file, lsa_err *err) {
    char path[LSA_PATH_MAX];
    if (strchr(file, '/')) LSA_RET_FAIL(LSA_E_FORMAT, "%s: shard name '%s' must not contain '/'", dir, file);
    if (t->n_file == MAX_FILES)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "%s: more than %d safetensors files", dir, MAX_FILES);
    lsa_status st = lsa_path(path, err, "%s/%s", dir, file);
    if (st == LSA_OK) st = lsa_st_open(&t->file[t->n_file], path, err);
    if (st == LSA_OK) t->n_file++;
    return st;
}

static lsa_status add_files(lsa_teacher *t, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *index = NULL, *map, *seen = json_object();
    char path[LSA_PATH_MAX];
    LSA_TRY(lsa_path(path, err, "%s/model.safetensors.index.json", dir));
    if (!lsa_exists(path)) {
        LSA_TRY(add_file(t, dir, "model.safetensors", err));
        goto done;
    }
    LSA_TRY(lsa_json_load(&index, path, err));
    LSA_TRY(lsa_json_object(&map, index, "weight_map", path, err));
    const char *tensor;
    json_t *v;
    json_object_foreach(map, tensor, v) {
        const char *file = json_string_value(v);
        if (!file) LSA_FAIL(LSA_E_FORMAT, "%s: weight_map['%s'] is not a string", path, tensor);
        if (json_object_get(seen, file)) continue;
        json_object_set_new(seen, file, json_true());
        LSA_TRY(add_file(t, dir, file, err));
    }
done:
    json_decref(index);
    json_decref(seen);
    return st;
}

static void set_identity(lsa_teacher *t, const char *dir, const char *config, size_t n_config) {
    char trimmed[LSA_PATH_MAX];
    snprintf(trimmed, sizeof trimmed, "%s", dir);
    for (size_t n = strlen(trimmed); n > 1 && trimmed[n - 1] == '/'; n--) trimmed[n - 1] = 0;
    const char *slash = strrchr(trimmed, '/');
    snprintf(t->name, sizeof t->name, "%.127s", slash ? slash + 1 : trimmed);
    uint64_t h = lsa_xxh64(config, n_config);
    uint64_t sum = 0; /* order of files and tensors must not matter */
    for (int32_t i = 0; i < t->n_file; i++)
        for (int64_t j = 0; j < lsa_st_count(t->file[i]); j++) {
            const lsa_st_tensor *x = lsa_st_at(t->file[i], j);
            size_t n = x->n_bytes < 256 ? x->n_bytes : 256;
            uint64_t k[3] = {lsa_xxh64(x->name, strlen(x->name)), (uint64_t)x->n_bytes,
                             lsa_xxh64(x->data, n)};
            sum += lsa_xxh64(k, sizeof k);
        }
    uint64_t both[2] = {h, sum};
    t->hash = lsa_xxh64(both, sizeof both);
}

lsa_status lsa_teacher_open(lsa_teacher **out, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_teacher *t = NULL;
    char path[LSA_PATH_MAX], *text = NULL;
    size_t n;
    *out = NULL;
    LSA_TRY(lsa_alloc_((void **)&t, 1, sizeof *t, "teacher", err));
    if (!lsa_is_dir(dir))
        LSA_FAIL(LSA_E_IO, "teacher '%s' is not a folder; give the folder that holds config.json", dir);
    LSA_TRY(lsa_path(path, err, "%s/config.json", dir));
    LSA_TRY(lsa_teacher_config_load(&t->cfg, path, err));
    LSA_TRY(lsa_read_file(&text, &n, path, err));
    LSA_TRY(add_files(t, dir, err));
    set_identity(t, dir, text, n);
    *out = t;
    t = NULL;
done:
    lsa_free(text);
    lsa_teacher_close(t);
    return st;
}

void lsa_teacher_close(lsa_teacher *t) {
    if (!t) return;
    for (int32_t i = 0; i < t->n_file; i++) lsa_st_close(t->file[i]);
    lsa_free(t);
}

const lsa_teacher_config *lsa_teacher_cfg(const lsa_teacher *t) {
    return &t->cfg;
}
const char *lsa_teacher_name(const lsa_teacher *t) {
    return t->name;
}
uint64_t lsa_teacher_hash(const lsa_teacher *t) {
    return t->hash;
}
