/* Geometry as JSON: see geom_json.h. Apart from ckpt.c so that the shared library for servers, which reads
 * exports only, does not carry checkpoints. */
#include "data/geom_json.h"

#include <string.h>

lsa_status lsa_geom_to_json(json_t **out, const lsa_indexer_geom *g, lsa_err *err) {
    json_t *layers = json_array();
    *out = NULL;
    for (int32_t i = 0; i < g->n_layer; i++)
        json_array_append_new(layers, json_pack("{s:i,s:i}", "ordinal", g->ord[i].v, "id", g->id[i].v));
    const lsa_rope *r = &g->rope;
    *out =
        json_pack("{s:i,s:i,s:i,s:i,s:f,s:{s:i,s:f,s:f,s:I,s:f,s:f},s:o}", "hidden", g->hidden, "n_head",
                  g->n_head, "head_dim", g->head_dim, "rank", g->rank, "eps", (double)g->eps, "rope", "dim",
                  r->dim, "base", r->base, "factor", r->factor, "original_len", (json_int_t)r->original_len,
                  "beta_fast", r->beta_fast, "beta_slow", r->beta_slow, "layers", layers);
    if (!*out) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format the indexer geometry");
    if (g->reach) json_object_set_new(*out, "continuation", json_integer(g->reach));
    if (g->prior) json_object_set_new(*out, "prior", json_true());
    return LSA_OK;
}

static lsa_status get_i32(int32_t *out, int64_t hi, const json_t *o, const char *key, const char *where,
                          lsa_err *err) {
    int64_t v;
    lsa_status st = lsa_json_i64_in(&v, 0, hi, o, key, where, err);
    *out = (int32_t)v;
    return st;
}

lsa_status lsa_geom_from_json(lsa_indexer_geom *g, const json_t *o, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    json_t *rope, *layers;
    double eps;
    lsa_err inner = {0};
    memset(g, 0, sizeof *g);
    LSA_TRY(get_i32(&g->hidden, 1 << 20, o, "hidden", where, err));
    LSA_TRY(get_i32(&g->n_head, 1 << 20, o, "n_head", where, err));
    LSA_TRY(get_i32(&g->head_dim, 1 << 20, o, "head_dim", where, err));
    LSA_TRY(get_i32(&g->rank, 1 << 20, o, "rank", where, err));
    LSA_TRY(lsa_json_f64(&eps, o, "eps", where, err));
    g->eps = (float)eps;
    LSA_TRY(lsa_json_object(&rope, o, "rope", where, err));
    LSA_TRY(get_i32(&g->rope.dim, 1 << 20, rope, "dim", where, err));
    LSA_TRY(lsa_json_f64(&g->rope.base, rope, "base", where, err));
    LSA_TRY(lsa_json_f64(&g->rope.factor, rope, "factor", where, err));
    LSA_TRY(lsa_json_i64_in(&g->rope.original_len, 0, INT64_C(1) << 40, rope, "original_len", where, err));
    LSA_TRY(lsa_json_f64(&g->rope.beta_fast, rope, "beta_fast", where, err));
    LSA_TRY(lsa_json_f64(&g->rope.beta_slow, rope, "beta_slow", where, err));
    LSA_TRY(lsa_json_array(&layers, o, "layers", where, err));
    size_t n = json_array_size(layers);
    if (n < 1 || n > LSA_MAX_CSA)
        LSA_FAIL(LSA_E_FORMAT, "%s: 'layers' must have 1 to %d entries, found %zu", where, LSA_MAX_CSA, n);
    g->n_layer = (int32_t)n;
    for (size_t i = 0; i < n; i++) {
        const json_t *l = json_array_get(layers, i);
        LSA_TRY(get_i32(&g->ord[i].v, LSA_MAX_CSA - 1, l, "ordinal", where, err));
        LSA_TRY(get_i32(&g->id[i].v, LSA_MAX_LAYERS - 1, l, "id", where, err));
    }
    if (json_object_get(o, "continuation"))
        LSA_TRY(get_i32(&g->reach, LSA_MAX_REACH, o, "continuation", where, err));
    g->prior = json_is_true(json_object_get(o, "prior"));
    if (lsa_indexer_geom_check(g, &inner) != LSA_OK) LSA_FAIL(LSA_E_FORMAT, "%s: %s", where, inner.msg);
done:
    return st;
}
