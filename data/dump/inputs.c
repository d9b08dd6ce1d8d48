/* Inputs of a dump and its plan: see inputs.h. */
#include "data/dump/inputs.h"

#include <omp.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/clock.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

lsa_status lsa_dump_inputs_open(lsa_dump_inputs *in, const lsa_dump_opts *o, const char *lengths,
                                lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    memset(in, 0, sizeof *in);
    if (!lsa_is_dir(o->teacher))
        LSA_FAIL(LSA_E_IO, "teacher '%s' is not a folder; give the folder that holds config.json",
                 o->teacher);
    LSA_TRY(lsa_path(path, err, "%s/config.json", o->teacher));
    LSA_TRY(lsa_teacher_config_load(&in->c, path, err));
    in->load = (lsa_dump_load){.c = &in->c,
                               .shard_bytes = o->shard_bytes,
                               .threads = omp_get_max_threads(),
                               .half_streams = lsa_dump_half_streams(o)};
    LSA_TRY(lsa_dump_make_rule(&in->load.rule, o, &in->c, err));
    if (lengths) {
        LSA_TRY(lsa_dump_lengths(&in->length, &in->load.n, lengths, err));
    } else {
        LSA_TRY(lsa_docs_open(&in->docs, o->tokens, o->needs, o->documents, in->c.vocab, err));
        in->load.n = lsa_docs_count(in->docs);
        LSA_TRY(LSA_NEW(in->length, in->load.n, err));
        for (int64_t i = 0; i < in->load.n; i++) in->length[i] = lsa_docs_at(in->docs, i)->n_token;
    }
    in->load.length = in->length;
done:
    return st;
}

void lsa_dump_inputs_close(lsa_dump_inputs *in) {
    lsa_docs_close(in->docs);
    lsa_free(in->length);
    memset(in, 0, sizeof *in);
}

lsa_status lsa_dump_inputs_plan(lsa_dump_plan *p, const lsa_dump_inputs *in, const lsa_dump_opts *o,
                                const char *out, lsa_err *err) {
    lsa_status st = lsa_dump_cost(p, &in->load, err);
    if (st != LSA_OK) return st;
    p->host_budget = o->host_budget ? o->host_budget : lsa_host_memory();
    return lsa_disk_free(&p->disk_free, out, err);
}

lsa_status lsa_dump_measure(lsa_dump_plan *p, const lsa_reader *r, const lsa_dump_inputs *in,
                            const lsa_doc *doc, int64_t first, lsa_err *err) {
    lsa_doc part = *doc;
    lsa_doc_stats stats = {0};
    double flops = 0;
    part.n_token = lsa_min_i64(LSA_TAP_CHUNK, doc->n_token);
    const double t0 = lsa_now_s();
    const lsa_status st = lsa_tap_document(&stats, r, &in->c, &in->load.rule, &part, false, NULL, NULL, err);
    const double dt = lsa_now_s() - t0 + 1e-9;
    lsa_doc_stats_fini(&stats);
    if (r->session) lsa_session_reset(r->session);
    for (int64_t i = first; i < in->load.n; i++)
        flops += lsa_teacher_flops(&in->c, &p->teacher, in->length[i]);
    p->measured_tokens = part.n_token;
    p->tokens_per_s = (double)part.n_token / dt;
    p->seconds = flops / lsa_teacher_flops(&in->c, &p->teacher, part.n_token) * dt;
    return st;
}

/* ---- lsa-dump plan ---- */

/* The first document, or ids that stand for one where only lengths are known. */
static void first_tokens(lsa_doc *doc, int32_t made_up[LSA_TAP_CHUNK], const lsa_dump_inputs *in) {
    if (in->docs) {
        *doc = *lsa_docs_at(in->docs, 0);
        return;
    }
    for (int32_t i = 0; i < LSA_TAP_CHUNK; i++) made_up[i] = (int32_t)((int64_t)i * 7919 % in->c.vocab);
    *doc = (lsa_doc){.name = "made up", .token = made_up, .n_token = in->length[0]};
}

/* Only where weights lie beside config.json. An unfinished download is no reason not to plan. */
static lsa_status measure_here(lsa_dump_plan *p, const lsa_dump_inputs *in, const lsa_dump_opts *o,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_engine *e = NULL;
    lsa_session *s = NULL;
    lsa_doc doc;
    lsa_err why = {0};
    int32_t made_up[LSA_TAP_CHUNK];
    char a[LSA_PATH_MAX], b[LSA_PATH_MAX];
    const lsa_engine_opts eo = {.sim_fp8_kv = o->sim_fp8, .sim_fp4_index = o->sim_fp4};
    LSA_TRY(lsa_path(a, err, "%s/model.safetensors.index.json", o->teacher));
    LSA_TRY(lsa_path(b, err, "%s/model.safetensors", o->teacher));
    if ((!lsa_exists(a) && !lsa_exists(b)) || p->host_bytes > p->host_budget) return LSA_OK;
    if (lsa_engine_open(&e, o->teacher, &eo, &why) != LSA_OK) {
        lsa_warn("the speed is not measured: %s", why.msg);
        goto done;
    }
    first_tokens(&doc, made_up, in);
    const lsa_session_opts so = {.max_tokens = lsa_min_i64(LSA_TAP_CHUNK, doc.n_token),
                                 .chunk = LSA_TAP_CHUNK};
    LSA_TRY(lsa_session_create(&s, e, &so, err));
    LSA_TRY(lsa_dump_measure(p, &(lsa_reader){.session = s}, in, &doc, 0, err));
done:
    lsa_session_destroy(s);
    lsa_engine_close(e);
    return st;
}

lsa_status lsa_dump_plan_command(const lsa_dump_opts *o, const char *lengths, const char *out, bool json,
                                 lsa_err *err) {
    lsa_status st = LSA_OK, fit;
    lsa_dump_inputs in;
    lsa_dump_plan p;
    LSA_TRY(lsa_dump_inputs_open(&in, o, lengths, err));
    LSA_TRY(lsa_dump_inputs_plan(&p, &in, o, out, err));
    lsa_dump_streamed_cost(&p, &in.load);
    LSA_TRY(measure_here(&p, &in, o, err));
    fit = lsa_dump_fits(&p, &in.load, out, NULL);
    if (json)
        LSA_TRY(lsa_dump_print_plan_json(&p, fit == LSA_OK, err));
    else
        lsa_dump_print_plan(&p, &in.c, out);
    fflush(stdout); /* the table before the refusal */
    LSA_TRY(lsa_dump_fits(&p, &in.load, out, err));
done:
    lsa_dump_inputs_close(&in);
    return st;
}
