/* Makes the golden net as a model folder: see golden_net.h. Shares no code with the loader it tests, except
 * the safetensors writer and the small-float encoders (which have their own tests). */
#include "tests/testkit/golden_net.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/lsa_safetensors.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"

static const int RATIO[] = {0, 4, 16, 4, 16};
enum { N_LAYER = 5, MAX_T = 1024, TOP = 2, STREAMS = 4 };

lsa_golden lsa_golden_default(void) {
    return (lsa_golden){48, 4, 80, 16, 24, 2, 12, 16, 32, 4, 8, 32, 64, 8};
}
lsa_golden lsa_golden_wide(void) {
    return (lsa_golden){256, 4, 128, 64, 128, 2, 128, 8, 128, 4, 4, 128, 64, 8};
}

static uint64_t word(const char *name, uint64_t i) {
    uint64_t h = 0xcbf29ce484222325u;
    for (const char *p = name; *p; p++) h = (h ^ (unsigned char)*p) * 0x100000001b3u;
    uint64_t y = h + (i + 1) * 0x9E3779B97F4A7C15u;
    y = (y ^ (y >> 30)) * 0xBF58476D1CE4E5B9u;
    y = (y ^ (y >> 27)) * 0x94D049BB133111EBu;
    return y ^ (y >> 31);
}

static bool ends(const char *s, const char *tail) {
    size_t n = strlen(s), m = strlen(tail);
    return n >= m && !strcmp(s + n - m, tail);
}

static void fill(float *x, const char *name, int64_t n, int64_t in) {
    double a = 0, b;
    if (ends(name, "norm.weight"))
        a = 1, b = 0.3;
    else if (strstr(name, "attn_sink"))
        b = 1.2;
    else if (ends(name, "ape"))
        b = 1.4;
    else if (strstr(name, "hc_") && ends(name, "_scale"))
        a = 1, b = 0.3;
    else if (strstr(name, "hc_") && ends(name, "_base"))
        b = 0.8;
    else if (ends(name, "gate.bias"))
        b = 0.3;
    else if (!strcmp(name, "embed.weight"))
        b = 1.7;
    else if (strstr(name, "experts."))
        b = 5.2 / sqrt((double)in);
    else
        b = 2.6 / sqrt((double)in);
    float fb = (float)b;
    for (int64_t i = 0; i < n; i++) {
        float u = (float)((double)(word(name, (uint64_t)i) >> 40) * 0x1p-23 - 1.0);
        x[i] = (float)a + fb * u;
    }
}

typedef struct maker {
    lsa_golden_store store;
    lsa_st_entry e[MAX_T];
    char name[MAX_T][112];
    void *owned[MAX_T];
    int64_t n;
    lsa_err *err;
} maker;

static lsa_status put(maker *m, const char *name, lsa_dtype t, int64_t rows, int64_t cols, void *data) {
    if (m->n == MAX_T) return lsa_err_set(m->err, LSA_E_BUG, __FILE__, __LINE__, "too many tensors");
    int64_t i = m->n++;
    snprintf(m->name[i], sizeof m->name[i], "%s", name);
    m->owned[i] = data;
    m->e[i] = (lsa_st_entry){m->name[i], t, rows ? 2 : 1, {rows ? rows : cols, cols}, data};
    return LSA_OK;
}

/* Quantises a matrix by 128 x 128 blocks to E4M3, or rows of 32 to FP4; writes back what the codes mean. */
static lsa_status quantise(maker *m, const char *name, float *x, int64_t rows, int64_t cols, bool fp4,
                           bool e8m0, bool emit) {
    lsa_status st = LSA_OK;
    lsa_err *err = m->err;
    const int64_t br = fp4 ? 1 : 128, bc = fp4 ? 32 : 128, nr = (rows + br - 1) / br,
                  nc = (cols + bc - 1) / bc;
    uint8_t *code, *es;
    float *fs;
    LSA_TRY(LSA_NEW(code, rows * cols, err));
    LSA_TRY(LSA_NEW(es, nr * nc, err));
    LSA_TRY(LSA_NEW(fs, nr * nc, err));
    for (int64_t b = 0; b < nr * nc; b++) {
        int64_t r0 = b / nc * br, c0 = b % nc * bc;
        float amax = 1e-6f;
        for (int64_t r = r0; r < r0 + br && r < rows; r++)
            for (int64_t c = c0; c < c0 + bc && c < cols; c++) amax = fmaxf(amax, fabsf(x[r * cols + c]));
        float s = amax / (fp4 ? 6.0f : 448.0f);
        if (e8m0) {
            s = lsa_pow2_ceil(s);
            es[b] = (uint8_t)(lsa_f32_bits(s) >> 23);
        }
        fs[b] = s;
        for (int64_t r = r0; r < r0 + br && r < rows; r++)
            for (int64_t c = c0; c < c0 + bc && c < cols; c++) {
                float v = x[r * cols + c] / s;
                uint8_t k = fp4 ? lsa_f32_to_e2m1(v) : lsa_f32_to_e4m3(v);
                if (fp4)
                    code[(r * cols + c) / 2] = (uint8_t)(code[(r * cols + c) / 2] | (c % 2 ? k << 4 : k));
                else
                    code[r * cols + c] = k;
                x[r * cols + c] = (fp4 ? lsa_e2m1_table[k] : lsa_e4m3_table[k]) * s;
            }
    }
    if (!emit) {
        lsa_free(code), lsa_free(es), lsa_free(fs);
        return LSA_OK;
    }
    char scale[112];
    snprintf(scale, sizeof scale, "%.*s%s", (int)(strlen(name) - 7), name,
             e8m0 ? ".scale" : ".weight_scale_inv");
    LSA_TRY(put(m, name, fp4 ? LSA_I8 : LSA_F8_E4M3, rows, fp4 ? cols / 2 : cols, code));
    if (e8m0) {
        LSA_TRY(put(m, scale, LSA_F8_E8M0, nr, nc, es));
        lsa_free(fs);
    } else {
        LSA_TRY(put(m, scale, LSA_F32, nr, nc, fs));
        lsa_free(es);
    }
done:
    return st;
}

/* One parameter by its original name; rows 0 means a vector of cols. */
static lsa_status param(maker *m, const char *name, int64_t rows, int64_t cols) {
    lsa_status st = LSA_OK;
    float *x = NULL;
    const int64_t n = (rows ? rows : 1) * cols;
    LSA_TRY(LSA_NEW(x, n, m->err));
    fill(x, name, n, cols);
    const bool layer = !strncmp(name, "layers.", 7), expert = strstr(name, ".experts.") != NULL;
    const bool matrix = layer && rows >= 64 && cols >= 64 && ends(name, ".weight") &&
                        !strstr(name, "compressor") && !strstr(name, "weights_proj") &&
                        !strstr(name, "gate.");
    const lsa_golden_store s = m->store;
    if (matrix && (s == LSA_STORE_FP8_E8M0 || s == LSA_STORE_DEQUANT_E8M0 || s == LSA_STORE_FP8_F32 ||
                   s == LSA_STORE_DEQUANT_F32)) {
        const bool e8m0 = s == LSA_STORE_FP8_E8M0 || s == LSA_STORE_DEQUANT_E8M0,
                   emit = s == LSA_STORE_FP8_E8M0 || s == LSA_STORE_FP8_F32;
        LSA_TRY(quantise(m, name, x, rows, cols, e8m0 && expert, e8m0, emit));
        if (emit) {
            lsa_free(x);
            return LSA_OK;
        }
    }
    if (s == LSA_STORE_BF16) {
        uint16_t *h;
        char full[128];
        LSA_TRY(LSA_NEW(h, n, m->err));
        for (int64_t i = 0; i < n; i++) h[i] = lsa_f32_to_bf16(x[i]);
        lsa_free(x);
        snprintf(full, sizeof full, "%s%s", strcmp(name, "head.weight") ? "model." : "", name);
        return put(m, full, LSA_BF16, rows, cols, h);
    }
    if (s == LSA_STORE_DEQUANT_BF16)
        for (int64_t i = 0; i < n; i++) x[i] = lsa_round_bf16(x[i]);
    LSA_TRY(put(m, name, LSA_F32, rows, cols, x));
done:
    return st;
}

static lsa_status hash_table(maker *m, const char *name, int64_t vocab, int64_t E) {
    int64_t *x;
    lsa_status st = LSA_NEW(x, vocab * TOP, m->err);
    if (st != LSA_OK) return st;
    for (int64_t r = 0; r < vocab; r++) {
        x[2 * r] = (int64_t)(word(name, (uint64_t)(2 * r)) % (uint64_t)E);
        x[2 * r + 1] = (x[2 * r] + 1 + (int64_t)(word(name, (uint64_t)(2 * r + 1)) % (uint64_t)(E - 1))) % E;
    }
    return put(m, name, LSA_I64, vocab, TOP, x);
}

static lsa_status make(maker *m, const lsa_golden *g) {
    lsa_status st = LSA_OK;
    char s[112];
    const int64_t d = g->dim, HD = (int64_t)g->n_head * g->head_dim;
#define P(rows, cols, ...)                                                                                   \
    do {                                                                                                     \
        snprintf(s, sizeof s, __VA_ARGS__);                                                                  \
        LSA_TRY(param(m, s, rows, cols));                                                                    \
    } while (0)
    P(g->vocab, d, "embed.weight");
    P(g->vocab, d, "head.weight");
    P(0, d, "norm.weight");
    P(STREAMS, STREAMS * d, "hc_head_fn");
    P(0, STREAMS, "hc_head_base");
    P(0, 1, "hc_head_scale");
    for (int l = 0; l < N_LAYER; l++) {
        const char *part[] = {"attn", "ffn"};
        for (int i = 0; i < 2; i++) {
            P(0, d, "layers.%d.%s_norm.weight", l, part[i]);
            P(STREAMS * (STREAMS + 2), STREAMS * d, "layers.%d.hc_%s_fn", l, part[i]);
            P(0, STREAMS * (STREAMS + 2), "layers.%d.hc_%s_base", l, part[i]);
            P(0, 3, "layers.%d.hc_%s_scale", l, part[i]);
        }
        P(g->q_rank, d, "layers.%d.attn.wq_a.weight", l);
        P(0, g->q_rank, "layers.%d.attn.q_norm.weight", l);
        P(HD, g->q_rank, "layers.%d.attn.wq_b.weight", l);
        P(g->head_dim, d, "layers.%d.attn.wkv.weight", l);
        P(0, g->head_dim, "layers.%d.attn.kv_norm.weight", l);
        P(0, g->n_head, "layers.%d.attn.attn_sink", l);
        P((int64_t)g->o_groups * g->o_rank, HD / g->o_groups, "layers.%d.attn.wo_a.weight", l);
        P(d, (int64_t)g->o_groups * g->o_rank, "layers.%d.attn.wo_b.weight", l);
        if (RATIO[l]) {
            int64_t kc = (RATIO[l] == 4 ? 2 : 1) * (int64_t)g->head_dim;
            P(kc, d, "layers.%d.attn.compressor.wkv.weight", l);
            P(kc, d, "layers.%d.attn.compressor.wgate.weight", l);
            P(RATIO[l], kc, "layers.%d.attn.compressor.ape", l);
            P(0, g->head_dim, "layers.%d.attn.compressor.norm.weight", l);
        }
        if (RATIO[l] == 4) {
            P((int64_t)g->index_head * g->index_dim, g->q_rank, "layers.%d.attn.indexer.wq_b.weight", l);
            P(g->index_head, d, "layers.%d.attn.indexer.weights_proj.weight", l);
            P(2 * (int64_t)g->index_dim, d, "layers.%d.attn.indexer.compressor.wkv.weight", l);
            P(2 * (int64_t)g->index_dim, d, "layers.%d.attn.indexer.compressor.wgate.weight", l);
            P(4, 2 * (int64_t)g->index_dim, "layers.%d.attn.indexer.compressor.ape", l);
            P(0, g->index_dim, "layers.%d.attn.indexer.compressor.norm.weight", l);
        }
        P(g->n_expert, d, "layers.%d.ffn.gate.weight", l);
        if (l == 0) {
            snprintf(s, sizeof s,
                     m->store == LSA_STORE_BF16 ? "model.layers.%d.ffn.gate.tid2eid"
                                                : "layers.%d.ffn.gate.tid2eid",
                     l);
            LSA_TRY(hash_table(m, "layers.0.ffn.gate.tid2eid", g->vocab, g->n_expert));
            snprintf(m->name[m->n - 1], sizeof m->name[0], "%s", s);
        } else {
            P(0, g->n_expert, "layers.%d.ffn.gate.bias", l);
        }
        for (int x = 0; x <= g->n_expert; x++) {
            char who[32];
            if (x < g->n_expert)
                snprintf(who, sizeof who, "experts.%d", x);
            else
                snprintf(who, sizeof who, "shared_experts");
            P(g->moe_dim, d, "layers.%d.ffn.%s.w1.weight", l, who);
            P(d, g->moe_dim, "layers.%d.ffn.%s.w2.weight", l, who);
            P(g->moe_dim, d, "layers.%d.ffn.%s.w3.weight", l, who);
        }
    }
done:
    return st;
}

/* Renames to transformers' modules and stacks the experts. */
static void rename_one(char *name, size_t n, const char *from, const char *to) {
    char *p = strstr(name, from);
    if (!p) return;
    char rest[112];
    snprintf(rest, sizeof rest, "%s", p + strlen(from));
    snprintf(p, n - (size_t)(p - name), "%s%s", to, rest);
}

static lsa_status to_modules(maker *m, const lsa_golden *g) {
    static const char *const map[][2] = {
        {"attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj"},
        {"attn.indexer.compressor.wgate", "self_attn.compressor.indexer.gate_proj"},
        {"attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"},
        {"attn.indexer.compressor.norm", "self_attn.compressor.indexer.kv_norm"},
        {"attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"},
        {"attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"},
        {".attn.compressor.wkv", ".self_attn.compressor.kv_proj"},
        {".attn.compressor.wgate", ".self_attn.compressor.gate_proj"},
        {".attn.compressor.ape", ".self_attn.compressor.position_bias"},
        {".attn.compressor.norm", ".self_attn.compressor.kv_norm"},
        {".attn_norm", ".input_layernorm"},
        {".ffn_norm", ".post_attention_layernorm"},
        {".hc_attn_", ".attn_hc."},
        {".hc_ffn_", ".ffn_hc."},
        {".attn.wq_a", ".self_attn.q_a_proj"},
        {".attn.q_norm", ".self_attn.q_a_norm"},
        {".attn.wq_b", ".self_attn.q_b_proj"},
        {".attn.wkv", ".self_attn.kv_proj"},
        {".attn.kv_norm", ".self_attn.kv_norm"},
        {".attn.attn_sink", ".self_attn.sinks"},
        {".attn.wo_a", ".self_attn.o_a_proj"},
        {".attn.wo_b", ".self_attn.o_b_proj"},
        {".ffn.gate.bias", ".mlp.gate.e_score_correction_bias"},
        {".ffn.shared_experts.w1", ".mlp.shared_experts.gate_proj"},
        {".ffn.shared_experts.w3", ".mlp.shared_experts.up_proj"},
        {".ffn.shared_experts.w2", ".mlp.shared_experts.down_proj"},
        {".ffn.gate", ".mlp.gate"},
    };
    lsa_status st = LSA_OK;
    const int64_t w = (int64_t)g->moe_dim * g->dim, E = g->n_expert;
    for (int l = 0; l < N_LAYER; l++) {
        float *gu, *dn;
        LSA_TRY(LSA_NEW(gu, E * 2 * w, m->err));
        LSA_TRY(LSA_NEW(dn, E * w, m->err));
        for (int64_t i = 0; i < m->n; i++) {
            int ll, x, k;
            if (sscanf(m->name[i], "layers.%d.ffn.experts.%d.w%d.weight", &ll, &x, &k) != 3 || ll != l)
                continue;
            memcpy(k == 2 ? dn + x * w : gu + (2 * x + (k == 3)) * w, m->owned[i], (size_t)w * sizeof *gu);
            m->name[i][0] = 0;
        }
        char s[112];
        snprintf(s, sizeof s, "model.layers.%d.mlp.experts.gate_up_proj", l);
        LSA_TRY(put(m, s, LSA_F32, E * 2 * g->moe_dim, g->dim, gu));
        m->e[m->n - 1].n_dim = 3;
        memcpy(m->e[m->n - 1].shape, (int64_t[3]){E, 2 * g->moe_dim, g->dim}, 3 * sizeof(int64_t));
        snprintf(s, sizeof s, "model.layers.%d.mlp.experts.down_proj", l);
        LSA_TRY(put(m, s, LSA_F32, E * g->dim, g->moe_dim, dn));
        m->e[m->n - 1].n_dim = 3;
        memcpy(m->e[m->n - 1].shape, (int64_t[3]){E, g->dim, g->moe_dim}, 3 * sizeof(int64_t));
    }
    int64_t n = 0;
    for (int64_t i = 0; i < m->n; i++) {
        if (!m->name[i][0]) {
            lsa_free(m->owned[i]);
            continue;
        }
        char *s = m->name[i];
        if (!strncmp(s, "layers.", 7)) {
            for (size_t k = 0; k < sizeof map / sizeof *map; k++) {
                char before[112];
                snprintf(before, sizeof before, "%s", s);
                rename_one(s, sizeof m->name[i], map[k][0], map[k][1]);
                if (strcmp(before, s)) break;
            }
            char full[128];
            snprintf(full, sizeof full, "model.%s", s);
            snprintf(s, sizeof m->name[i], "%.111s", full);
        } else {
            static const char *const top[][2] = {
                {"embed.weight", "model.embed_tokens.weight"}, {"head.weight", "lm_head.weight"},
                {"norm.weight", "model.norm.weight"},          {"hc_head_fn", "model.hc_head.hc_fn"},
                {"hc_head_base", "model.hc_head.hc_base"},     {"hc_head_scale", "model.hc_head.hc_scale"}};
            for (size_t k = 0; k < sizeof top / sizeof *top; k++)
                if (!strcmp(s, top[k][0])) {
                    snprintf(s, sizeof m->name[i], "%s", top[k][1]);
                    break;
                }
        }
        if (n != i) {
            memcpy(m->name[n], m->name[i], sizeof m->name[n]);
            m->e[n] = m->e[i];
            m->owned[n] = m->owned[i];
        }
        m->e[n].name = m->name[n];
        n++;
    }
    m->n = n;
done:
    return st;
}

static int write_config(char *buf, size_t n, const lsa_golden *g) {
    return snprintf(
        buf, n,
        "{\"architectures\": [\"DeepseekV4ForCausalLM\"], \"vocab_size\": %d, \"dim\": %d, \"n_layers\": 5, "
        "\"n_heads\": %d, \"head_dim\": %d, \"rope_head_dim\": %d, \"q_lora_rank\": %d, \"o_groups\": %d, "
        "\"o_lora_rank\": %d, \"window_size\": %d, \"index_n_heads\": %d, \"index_head_dim\": %d, \"index_topk\": %d, "
        "\"n_routed_experts\": %d, \"n_activated_experts\": 2, \"n_shared_experts\": 1, \"moe_inter_dim\": %d, "
        "\"n_hash_layers\": 1, \"hc_mult\": 4, \"hc_sinkhorn_iters\": 20, \"hc_eps\": 1e-6, \"norm_eps\": 1e-6, "
        "\"route_scale\": 1.5, \"swiglu_limit\": 1.0, \"compress_ratios\": [0, 4, 16, 4, 16, 0], "
        "\"rope_theta\": 10000, \"compress_rope_theta\": 160000, \"rope_factor\": 16, \"original_seq_len\": 64, "
        "\"beta_fast\": 32, \"beta_slow\": 1}\n",
        g->vocab, g->dim, g->n_head, g->head_dim, g->rope_dim, g->q_rank, g->o_groups, g->o_rank, g->window,
        g->index_head, g->index_dim, g->index_topk, g->n_expert, g->moe_dim);
}

lsa_status lsa_golden_write(const char *dir, const lsa_golden *g, lsa_golden_store store, lsa_err *err) {
    lsa_status st = LSA_OK;
    maker *m = NULL;
    char path[LSA_PATH_MAX], text[2048];
    LSA_TRY(LSA_NEW(m, 1, err));
    m->store = store;
    m->err = err;
    LSA_TRY(lsa_mkdirs(dir, err));
    LSA_TRY(make(m, g));
    if (store == LSA_STORE_MODULES) LSA_TRY(to_modules(m, g));
    LSA_TRY(lsa_path(path, err, "%s/config.json", dir));
    int n = write_config(text, sizeof text, g);
    LSA_TRY(lsa_write_file(path, text, (size_t)n, err));
    LSA_TRY(lsa_path(path, err, "%s/model.safetensors", dir));
    LSA_TRY(lsa_st_save(path, m->e, m->n, NULL, err));
done:
    if (m)
        for (int64_t i = 0; i < m->n; i++) lsa_free(m->owned[i]);
    lsa_free(m);
    return st;
}
