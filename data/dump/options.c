/* Options of a dump: defaults, the manifest's record of them, and the rule that follows for a teacher. */
#include "data/dump/options.h"

#include <string.h>

#include "kernels/core/csa_list.h"
#include "kernels/core/hash.h"
#include "kernels/core/version.h"

lsa_dump_opts lsa_dump_defaults(void) {
    return (lsa_dump_opts){.layers = "all",
                           .streams = "f32",
                           .top_p = 0.6,
                           .dense_min = 1e-4,
                           .hidden_stride = 64,
                           .shard_bytes = INT64_C(256) << 20};
}

bool lsa_dump_half_streams(const lsa_dump_opts *o) {
    return !strcmp(o->streams, "bf16");
}

json_t *lsa_dump_opts_to_json(const lsa_dump_opts *o, const char *const path[3], uint64_t docs_hash,
                              int64_t n_doc) {
    char hex[17];
    lsa_hex64(hex, docs_hash);
    json_t *const j = json_pack(
        "{s:s, s:s, s:s?, s:s?, s:s, s:f, s:f, s:I, s:I, s:I, s:I, s:b, s:b, s:b, s:s, s:s, s:I}", "teacher",
        path[0], "tokens", path[1], "needs", path[2], "documents", o->documents, "layers", o->layers, "top_p",
        o->top_p, "dense_min", o->dense_min, "pool", (json_int_t)o->pool, "hidden_stride",
        (json_int_t)o->hidden_stride, "dense_every", (json_int_t)o->dense_every, "shard_bytes",
        (json_int_t)o->shard_bytes, "no_stats", o->no_stats, "sim_fp8", o->sim_fp8, "sim_fp4", o->sim_fp4,
        "lsa_version", lsa_version(), "documents_xxh64", hex, "n_documents", (json_int_t)n_doc);
    if (j && lsa_dump_half_streams(o)) json_object_set_new(j, "streams", json_string(o->streams));
    return j;
}

lsa_status lsa_dump_opts_from_json(lsa_dump_opts *o, const json_t *j, const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    *o = lsa_dump_defaults();
    if (!json_is_object(j) || !json_object_get(j, "teacher"))
        LSA_FAIL(LSA_E_FORMAT,
                 "%s: no 'run' options; these shards were not made by 'lsa-dump run' and cannot be resumed",
                 where);
    LSA_TRY(lsa_json_str(&o->teacher, j, "teacher", where, err));
    LSA_TRY(lsa_json_str(&o->tokens, j, "tokens", where, err));
    o->needs = json_string_value(json_object_get(j, "needs"));
    o->documents = json_string_value(json_object_get(j, "documents"));
    LSA_TRY(lsa_json_str(&o->layers, j, "layers", where, err));
    LSA_TRY(lsa_json_f64(&o->top_p, j, "top_p", where, err));
    LSA_TRY(lsa_json_f64(&o->dense_min, j, "dense_min", where, err));
    LSA_TRY(lsa_json_i64(&o->pool, j, "pool", where, err));
    LSA_TRY(lsa_json_i64(&o->hidden_stride, j, "hidden_stride", where, err));
    LSA_TRY(lsa_json_i64(&o->dense_every, j, "dense_every", where, err));
    LSA_TRY(lsa_json_i64(&o->shard_bytes, j, "shard_bytes", where, err));
    o->no_stats = json_is_true(json_object_get(j, "no_stats"));
    o->sim_fp8 = json_is_true(json_object_get(j, "sim_fp8"));
    o->sim_fp4 = json_is_true(json_object_get(j, "sim_fp4"));
    if (json_object_get(j, "streams")) LSA_TRY(lsa_json_str(&o->streams, j, "streams", where, err));
done:
    return st;
}

lsa_status lsa_dump_make_rule(lsa_dump_rule *r, const lsa_dump_opts *o, const lsa_teacher_config *c,
                              lsa_err *err) {
    lsa_status st = LSA_OK;
    memset(r, 0, sizeof *r);
    r->top_p = o->top_p;
    r->pool = (int32_t)(o->pool ? o->pool : c->index_topk);
    r->hidden_stride = (int32_t)o->hidden_stride;
    r->stats = !o->no_stats;
    r->dense_every = o->dense_every;
    r->dense_min = o->dense_min;
    if (!(o->top_p > 0 && o->top_p <= 1))
        LSA_FAIL(LSA_E_ARG, "--top-p must be in (0, 1], found %g", o->top_p);
    if (o->pool < 0 || o->pool > 4096 || r->pool < 1 || r->pool > 4096)
        LSA_FAIL(LSA_E_ARG, "--pool must be in [1, 4096], found %lld",
                 (long long)(o->pool ? o->pool : c->index_topk));
    if (o->hidden_stride < 1 || o->hidden_stride > 65536)
        LSA_FAIL(LSA_E_ARG, "--hidden-stride must be in [1, 65536], found %lld", (long long)o->hidden_stride);
    if (strcmp(o->streams, "f32") && strcmp(o->streams, "bf16"))
        LSA_FAIL(LSA_E_ARG, "--streams must be f32 or bf16, found '%s'", o->streams);
    if (o->dense_every < 0) LSA_FAIL(LSA_E_ARG, "--dense-every must not be negative");
    if (c->n_csa == 0)
        LSA_FAIL(LSA_E_UNSUPPORTED,
                 "the teacher has no compressed-sparse-attention layer: there is nothing to index");
    if (c->index_head_dim != 128)
        LSA_FAIL(LSA_E_UNSUPPORTED, "the teacher's index keys have %d channels; shards hold keys of 128",
                 c->index_head_dim);
    LSA_TRY(lsa_csa_list(r->has_keys, o->layers, c->n_csa, LSA_E_ARG, "--layers", err));
done:
    return st;
}
