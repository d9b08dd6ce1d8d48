/* The table of conventions: see convention.h. The names and words are those of EXPORT_FORMAT.md. */
#include "export/convention.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/core/lsa_ids.h"

#define ONE(fault, setting, v)                                                                               \
    LSA_FAULT_##fault, setting, NULL, 1, {                                                                   \
        v                                                                                                    \
    }
#define TOLD(fault, setting, told, n, ...)                                                                   \
    LSA_FAULT_##fault, setting, told, n, {                                                                   \
        __VA_ARGS__                                                                                          \
    }

const lsa_convention lsa_conventions[LSA_CONVENTIONS] = {
    {"no-hadamard", "queries are not turned by Hadamard / sqrt(128), as the stored keys are",
     ONE(HADAMARD, "hadamard", 0)},
    {"hadamard-scale", "Hadamard is not divided by sqrt(128)",
     TOLD(HADAMARD, "hadamard", NULL, 2, 1, 1 / 128.0)},
    {"rope-halves", "RoPE pairs channel i with i + dim/2; pairs are adjacent, 2i with 2i + 1",
     ONE(ROPE_HALVES, "halves", 1)},
    {"rope-first", "RoPE turns the first channels of a head; it is the last", ONE(ROPE_FIRST, "first", 1)},
    {"rope-missing", "queries are not turned by RoPE", ONE(ROPE_TURN, "turn", 0)},
    {"rope-direction", "RoPE turns backwards", ONE(ROPE_TURN, "turn", -1)},
    {"rope-base", "RoPE's base is not that of the file",
     TOLD(ROPE_BASE, "base", "base", 9, 1e4, 4e4, 5e4, 8e4, 1e5, 1.6e5, 5e5, 1e6, 1e7)},
    {"rope-no-yarn", "RoPE's frequencies lack the YaRN blend", ONE(YARN_FACTOR, "factor", 1)},
    {"rope-yarn-factor", "YaRN's factor is not that of the file",
     TOLD(YARN_FACTOR, "factor", "factor", 7, 2, 4, 8, 16, 32, 40, 64)},
    {"rope-yarn-length", "YaRN's original length is not that of the file",
     TOLD(YARN_LENGTH, "original_len", "length", 11, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072,
          163840, 524288, 1048576)},
    {"rope-magnitude", "turned channels are multiplied by YaRN's 0.1 ln(factor) + 1; there is no such factor",
     ONE(YARN_MAGNITUDE, "magnitude", 1)},
    {"rope-angle", "angles are formed in double; they are fp32 products of position and frequency",
     TOLD(ANGLE_DOUBLE, "double", NULL, 2, 1, 2)},
    {"position-shift", "the position is off by one or more",
     TOLD(POSITION_SHIFT, "shift", "by", 6, 1, -1, 2, -2, 64, -64)},
    {"position-clamp", "positions are cut at the end of a RoPE table that is too short",
     TOLD(POSITION_ROWS, "rows", "rows", 7, 4096, 16384, 32768, 65536, 131072, 262144, 524288)},
    {"scale-missing", "head weights lack the factor 1/sqrt(128 H) or a part of it",
     TOLD(SCALE, "scale", NULL, 3, 0, 1, 2)},
    {"scale-heads", "the factor of the head weights was formed with another H",
     TOLD(SCALE, "scale", "H", 8, 2, 4, 8, 16, 32, 64, 128, 256)},
    {"heads-transposed", "q is read as [128, H]; wq_b's rows are [H, 128]", ONE(TRANSPOSED, "transposed", 1)},
    {"hidden-norm", "the hidden vector is normalised once more, or taken before its norm",
     ONE(HIDDEN_NORM, "again", 1)},
    {"hidden-bf16", "the hidden vector is not rounded to bf16", ONE(HIDDEN_LOW_BITS, "low_bits", 1)},
    {"q-norm", "q_norm or its weight is left out", TOLD(Q_NORM, "q_norm", NULL, 3, 0, 1, 2)},
    {"q-norm-eps", "q_norm's eps is not that of the file",
     TOLD(EPS, "eps", "eps", 6, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3)},
    {"relu-missing", "max(0, k . q) is left out: negative products are summed too", ONE(RELU, "relu", 0)},
    {"key-scale", "the scale of the key row is not applied", ONE(KEY_SCALE, "key_scale", 0)},
    {"layer-map",
     "another layer's weights, hidden vectors or keys: layers swapped, or CSA ordinals and layer ids mixed up",
     ONE(NONE, "layer", 0)},
    {"numeric-path", "the numbers are those of another numeric path", ONE(NONE, "path", 0)}};

double lsa_convention_value(const lsa_convention *c, int t, int32_t n_head) {
    if (c->fault != LSA_FAULT_SCALE) return c->v[t];
    if (c->told) return 1 / sqrt(128 * c->v[t]);
    return t == 0 ? 1 : 1 / sqrt(t == 1 ? 128.0 : (double)n_head);
}

/* Values of a row: numbers; for the layers [parts that are taken from it, ordinal]; for the paths names. */
static json_t *values(int i, const lsa_indexer_geom *g) {
    static const char *const parts[] = {"weights", "hidden", "keys", "weights, hidden",
                                        "weights, hidden, keys"};
    json_t *a = json_array();
    for (int32_t l = 0; i == LSA_LAYER_MAP && l < g->n_layer; l++)
        for (int p = 0; p < 5; p++) json_array_append_new(a, json_pack("[s,i]", parts[p], g->ord[l].v));
    for (int p = 0; i == LSA_NUMERIC_PATH && p < LSA_QUERY_PATHS; p++)
        json_array_append_new(a, json_string(lsa_query_path_name((lsa_query_path)p)));
    const lsa_convention *c = &lsa_conventions[i];
    for (int t = 0; c->fault != LSA_FAULT_NONE && t < c->n; t++) {
        const double v = lsa_convention_value(c, t, g->n_head);
        json_array_append_new(a, v == floor(v) ? json_integer((json_int_t)v) : json_real(v));
    }
    return a;
}

lsa_status lsa_conventions_text(char **out, const lsa_indexer_geom *g, lsa_err *err) {
    json_t *table = json_array();
    for (int i = 0; i < LSA_CONVENTIONS; i++) {
        const lsa_convention *c = &lsa_conventions[i];
        json_array_append_new(table, json_pack("[s,s,s,o]", c->name, c->text, c->setting, values(i, g)));
    }
    *out = json_dumps(table, JSON_COMPACT);
    json_decref(table);
    if (!*out) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format the table of conventions");
    return LSA_OK;
}
