/* Recomputing documents of a dump: see recheck.h. The mistake that would stay silent: comparing fewer values
 * than are stored; every array of the document goes through one of the compare functions, and they count. */
#include "data/dump/recheck.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "data/dump/options.h"
#include "data/lsa_shard.h"
#include "data/manifest.h"
#include "kernels/core/dtype.h"
#include "kernels/core/hash.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"

typedef struct recheck {
    lsa_manifest m;
    lsa_shards *shards;
    lsa_engine *engine;
    lsa_ctx *ctx;
    lsa_reader reader;
    lsa_docs *docs;
    lsa_dump_rule rule;
    int64_t *pick; /* [n] ascending */
    int64_t n, values, bad_documents;
    lsa_progress progress;
    int64_t done_tokens;
    /* of the document at hand */
    int64_t doc, different;
} recheck;

/* One stored array of a document against the recomputed one. */
typedef struct part {
    const char *name;
    int32_t ord; /* -1: of no layer */
    int64_t n, bad, first;
    double worst;
} part;

static void report(recheck *r, const part *p) {
    char layer[24] = "";
    r->values += p->n;
    r->different += p->bad;
    if (p->bad == 0) return;
    if (p->ord >= 0) snprintf(layer, sizeof layer, " of layer c%d", p->ord);
    lsa_warn(
        "document %lld ('%s'): %lld of %lld %s%s differ from the teacher, first number %lld, largest difference %g",
        (long long)r->doc, lsa_shards_get_doc(r->shards, r->doc).name, (long long)p->bad, (long long)p->n,
        p->name, layer, (long long)p->first, p->worst);
}

static void differ(part *p, int64_t i, double a, double b) {
    const double d = fabs(a - b);
    if (p->bad++ == 0) p->first = i;
    if (!(d <= p->worst)) p->worst = d; /* NaN wins */
}

static void compare_u16(recheck *r, const char *name, int32_t ord, const uint16_t *a, const uint16_t *b,
                        int64_t n, float (*value)(uint16_t)) {
    part p = {.name = name, .ord = ord, .n = n};
    for (int64_t i = 0; i < n; i++)
        if (a[i] != b[i]) differ(&p, i, (double)value(a[i]), (double)value(b[i]));
    report(r, &p);
}

static float bf16_value(uint16_t x) {
    return lsa_bf16_to_f32(x);
}
static float f16_value(uint16_t x) {
    return lsa_f16_to_f32(x);
}

static void compare_keys(recheck *r, int32_t ord, const uint8_t *a, const uint8_t *b, int64_t n) {
    part p = {.name = "index keys", .ord = ord, .n = n};
    float x[128], y[128];
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *ka = a + i * LSA_KEY_BYTES, *kb = b + i * LSA_KEY_BYTES;
        if (!memcmp(ka, kb, LSA_KEY_BYTES)) continue;
        double worst = 0, at[2] = {0, 0};
        lsa_key_decode(x, ka);
        lsa_key_decode(y, kb);
        for (int k = 0; k < 128; k++)
            if (!(fabs((double)x[k] - (double)y[k]) <= worst))
                worst = fabs((double)x[k] - (double)y[k]), at[0] = (double)x[k], at[1] = (double)y[k];
        differ(&p, i, at[0], at[1]);
    }
    report(r, &p);
}

/* Rows of chunk ids: a row differs if its length or any of its chunks does; one row counts once. Values are
 * compared where the rows agree. */
static bool same_row(const lsa_csr *a, const lsa_csr *b, int64_t i) {
    const int64_t n = a->begin[i + 1] - a->begin[i];
    return n == b->begin[i + 1] - b->begin[i] &&
           (n == 0 || !memcmp(a->chunk + a->begin[i], b->chunk + b->begin[i], (size_t)n * sizeof *a->chunk));
}

static lsa_status compare_rows(recheck *r, const char *name, int32_t ord, const lsa_csr *a, const lsa_csr *b,
                               lsa_err *err) {
    part p = {.name = name, .ord = ord, .n = a->n_row};
    if (a->n_row != b->n_row)
        LSA_RET_FAIL(LSA_E_FORMAT, "document %lld: %lld rows of %s are stored, the teacher gives %lld",
                     (long long)r->doc, (long long)a->n_row, name, (long long)b->n_row);
    for (int64_t i = 0; i < a->n_row; i++) {
        if (same_row(a, b, i)) continue;
        differ(&p, i, (double)(a->begin[i + 1] - a->begin[i]), (double)(b->begin[i + 1] - b->begin[i]));
    }
    report(r, &p);
    return LSA_OK;
}

/* The f16 value of every entry in rows that agree. */
static void compare_entries(recheck *r, const char *name, int32_t ord, const lsa_csr *a, const lsa_csr *b,
                            const uint16_t *x, const uint16_t *y) {
    part p = {.name = name, .ord = ord};
    for (int64_t i = 0; i < a->n_row; i++) {
        if (!same_row(a, b, i)) continue;
        for (int64_t j = a->begin[i], k = b->begin[i]; j < a->begin[i + 1]; j++, k++, p.n++)
            if (x[j] != y[k]) differ(&p, j, (double)f16_value(x[j]), (double)f16_value(y[k]));
    }
    report(r, &p);
}

static void compare_votes(recheck *r, const lsa_csr *a, const lsa_csr *b) {
    part p = {.name = "vote counts", .ord = -1};
    for (int64_t i = 0; i < a->n_row; i++) {
        if (!same_row(a, b, i)) continue;
        for (int64_t j = a->begin[i], k = b->begin[i]; j < a->begin[i + 1]; j++, k++, p.n++)
            if (a->votes[j] != b->votes[k]) differ(&p, j, a->votes[j], b->votes[k]);
    }
    report(r, &p);
}

static lsa_status compare_layer(recheck *r, int32_t o, const lsa_doc_stats *got, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_shards_info *f = lsa_shards_get_info(r->shards);
    const lsa_shards_doc d = lsa_shards_get_doc(r->shards, r->doc);
    const lsa_csa_ord ord = {o};
    int64_t *pos = NULL;
    uint16_t *hidden = NULL, *local = NULL, *sink = NULL;
    uint8_t *key = NULL;
    lsa_csr c = {0};
    if (f->has_keys[o]) {
        LSA_TRY(lsa_shards_keys(&key, r->shards, r->doc, ord, err));
        compare_keys(r, o, key, got->key[o], d.n_key);
        LSA_TRY(lsa_shards_hidden(&pos, &hidden, r->shards, r->doc, ord, err));
        compare_u16(r, "numbers of hidden vectors", o, hidden, got->hidden[o], d.n_hidden * f->hidden,
                    bf16_value);
    }
    if (f->has_stats) {
        LSA_TRY(lsa_shards_stats(&c, r->shards, r->doc, ord, err));
        LSA_TRY(compare_rows(r, "rows of selected chunks", o, &c, &got->stats[o], err));
        compare_entries(r, "native logits", o, &c, &got->stats[o], c.logit, got->stats[o].logit);
        compare_entries(r, "native masses", o, &c, &got->stats[o], c.mass, got->stats[o].mass);
        LSA_TRY(lsa_shards_local_mass(&local, &sink, r->shards, r->doc, ord, err));
        compare_u16(r, "masses of the window", o, local, got->local_mass[o], d.n_row, f16_value);
        compare_u16(r, "masses of the sink", o, sink, got->sink_mass[o], d.n_row, f16_value);
    }
    if (f->has_dense) {
        lsa_csr_fini(&c);
        LSA_TRY(lsa_shards_dense(&c, r->shards, r->doc, ord, err));
        LSA_TRY(compare_rows(r, "rows of dense masses", o, &c, &got->dense[o], err));
        compare_entries(r, "dense masses", o, &c, &got->dense[o], c.mass, got->dense[o].mass);
        compare_u16(r, "dense masses that were cut", o, c.rest, got->dense[o].rest, c.n_row, f16_value);
    }
done:
    lsa_free(pos);
    lsa_free(hidden);
    lsa_free(local);
    lsa_free(sink);
    lsa_free(key);
    lsa_csr_fini(&c);
    return st;
}

static lsa_status on_chunk(void *user, int64_t n, lsa_err *err) {
    recheck *r = user;
    r->done_tokens += n;
    lsa_progress_update(&r->progress, (double)r->done_tokens, NULL);
    if (lsa_stop_requested()) LSA_RET_FAIL(LSA_E_INTERRUPTED, "stopped; nothing was changed");
    return LSA_OK;
}

static lsa_status one_document(recheck *r, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_doc_stats got = {0};
    lsa_csr labels = {0};
    const lsa_shards_info *f = lsa_shards_get_info(r->shards);
    const lsa_shards_doc d = lsa_shards_get_doc(r->shards, r->doc);
    r->different = 0;
    LSA_TRY(lsa_tap_document(&got, &r->reader, lsa_engine_config(r->engine), &r->rule,
                             lsa_docs_at(r->docs, r->doc), false, on_chunk, r, err));
    if (d.n_row != got.n_token || d.n_key != got.n_key || d.n_hidden != got.n_hidden)
        LSA_FAIL(
            LSA_E_FORMAT,
            "document %lld ('%s'): the shards hold %lld rows, %lld keys and %lld hidden vectors, the teacher "
            "gives %lld, %lld and %lld",
            (long long)r->doc, d.name, (long long)d.n_row, (long long)d.n_key, (long long)d.n_hidden,
            (long long)got.n_token, (long long)got.n_key, (long long)got.n_hidden);
    LSA_TRY(lsa_shards_labels(&labels, r->shards, r->doc, err));
    LSA_TRY(compare_rows(r, "rows of voted chunks", -1, &labels, &got.labels, err));
    compare_votes(r, &labels, &got.labels);
    for (int32_t o = 0; o < f->n_csa; o++) LSA_TRY(compare_layer(r, o, &got, err));
    r->bad_documents += r->different > 0;
done:
    lsa_csr_fini(&labels);
    lsa_doc_stats_fini(&got);
    return st;
}

/* Every sealed document is the one at its place in the token file. */
static lsa_status check_tokens(const recheck *r, const char *tokens, lsa_err *err) {
    const int64_t n = lsa_shards_get_info(r->shards)->n_doc;
    int64_t bad = 0, first = -1;
    if (lsa_docs_count(r->docs) < n)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s' holds %lld documents, the shards %lld: not the tokens of this dump",
                     tokens, (long long)lsa_docs_count(r->docs), (long long)n);
    for (int64_t i = 0; i < n; i++) {
        const lsa_doc *d = lsa_docs_at(r->docs, i);
        const lsa_shards_doc s = lsa_shards_get_doc(r->shards, i);
        if (d->n_token == s.n_token &&
            lsa_xxh64(d->token, (size_t)d->n_token * sizeof *d->token) == s.token_xxh64)
            continue;
        if (bad++ == 0) first = i;
    }
    if (bad)
        LSA_RET_FAIL(
            LSA_E_FORMAT,
            "'%s': the tokens of %lld of %lld documents are not those that were dumped, first document %lld "
            "('%s'); give the file of the dump with --tokens",
            tokens, (long long)bad, (long long)n, (long long)first,
            lsa_shards_get_doc(r->shards, first).name);
    return LSA_OK;
}

/* n of the sealed documents, by Floyd's method: each set equally likely. */
static lsa_status draw(recheck *r, const lsa_recheck_opts *o, lsa_err *err) {
    const int64_t all = lsa_shards_get_info(r->shards)->n_doc;
    lsa_rng g = lsa_rng_make((uint64_t)o->seed, 0x7265636865636bu);
    bool *in = NULL;
    r->n = lsa_min_i64(o->n, all);
    lsa_status st = LSA_OK;
    LSA_TRY(LSA_NEW(in, all, err));
    LSA_TRY(LSA_NEW(r->pick, r->n, err));
    for (int64_t j = all - r->n; j < all; j++) {
        const int64_t k = (int64_t)lsa_rng_below(&g, (uint64_t)j + 1);
        in[in[k] ? j : k] = true;
    }
    for (int64_t i = 0, n = 0; i < all; i++)
        if (in[i]) r->pick[n++] = i;
done:
    lsa_free(in);
    return st;
}

static lsa_status open_all(recheck *r, const char *dir, const lsa_recheck_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_dump_opts d;
    LSA_TRY(lsa_manifest_load(&r->m, dir, err));
    LSA_TRY(lsa_dump_opts_from_json(&d, r->m.run, dir, err));
    if (lsa_dump_half_streams(&d))
        LSA_FAIL(
            LSA_E_UNSUPPORTED,
            "'%s' was dumped with --streams bf16, which rounds between layers: a recheck, which keeps f32, "
            "cannot compare; dump some of its documents again instead",
            dir);
    if (o->teacher) d.teacher = o->teacher;
    if (o->tokens) d.tokens = o->tokens;
    if (o->needs) d.needs = o->needs;
    LSA_TRY(lsa_shards_open(&r->shards, dir, err));
    const lsa_shards_info *f = lsa_shards_get_info(r->shards);
    LSA_TRY(lsa_docs_open(&r->docs, d.tokens, d.needs, d.documents, 0, err));
    LSA_TRY(check_tokens(r, d.tokens, err));
    const lsa_engine_opts eo = {.sim_fp8_kv = d.sim_fp8, .sim_fp4_index = d.sim_fp4};
    LSA_TRY(lsa_engine_open(&r->engine, d.teacher, &eo, err));
    const lsa_teacher_config *c = lsa_engine_config(r->engine);
    if (lsa_teacher_hash(lsa_engine_teacher(r->engine)) != f->teacher_hash || c->n_csa != f->n_csa ||
        c->hidden != f->hidden)
        LSA_FAIL(LSA_E_FORMAT,
                 "'%s' is not the teacher of these shards ('%s'): other config.json or weights; give it with "
                 "--teacher",
                 d.teacher, f->teacher);
    LSA_TRY(lsa_dump_make_rule(&r->rule, &d, c, err));
    /* the shards decide what there is to compare */
    r->rule.hidden_stride = f->hidden_stride;
    r->rule.stats = f->has_stats;
    memcpy(r->rule.has_keys, f->has_keys, sizeof f->has_keys);
    if (f->has_dense != (r->rule.dense_every > 0))
        LSA_FAIL(LSA_E_FORMAT, "'%s': the manifest's options and its shards disagree about dense masses",
                 dir);
done:
    return st;
}

static lsa_status run(recheck *r, const lsa_recheck_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_session_opts so = {.chunk = LSA_TAP_CHUNK};
    int64_t tokens = 0;
    LSA_TRY(draw(r, o, err));
    for (int64_t i = 0; i < r->n; i++) {
        const int64_t n = lsa_docs_at(r->docs, r->pick[i])->n_token;
        so.max_tokens = lsa_max_i64(so.max_tokens, n);
        tokens += n;
    }
    LSA_TRY(lsa_ctx_create(&r->ctx, o->device ? o->device : "cpu", err));
    LSA_TRY(lsa_ctx_kind(r->ctx) == LSA_BACKEND_CUDA
                ? lsa_gpu_run_create(&r->reader.gpu, r->ctx, r->engine, so.max_tokens, 0, false, err)
                : lsa_session_create(&r->reader.session, r->engine, &so, err));
    LSA_TRY(lsa_reader_check(&r->reader, lsa_engine_config(r->engine), &r->rule, err));
    lsa_progress_begin(&r->progress, "recheck", "tokens", (double)tokens, 0);
    for (int64_t i = 0; i < r->n; i++) {
        r->doc = r->pick[i];
        LSA_TRY(one_document(r, err));
    }
    lsa_progress_end(&r->progress);
    if (r->bad_documents)
        LSA_FAIL(
            LSA_E_FORMAT,
            "%lld of %lld rechecked documents differ from what the teacher gives; the shards are wrong, or "
            "another device, CPU or build made them (then differences are many and tiny): dump again",
            (long long)r->bad_documents, (long long)r->n);
done:
    return st;
}

lsa_status lsa_dump_recheck(int64_t *values, const char *dir, const lsa_recheck_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    recheck r = {0};
    *values = 0;
    LSA_TRY(open_all(&r, dir, o, err));
    LSA_TRY(run(&r, o, err));
    *values = r.values;
done:
    lsa_free(r.pick);
    lsa_session_destroy(r.reader.session);
    lsa_gpu_run_destroy(r.reader.gpu);
    lsa_ctx_destroy(r.ctx);
    lsa_docs_close(r.docs);
    lsa_engine_close(r.engine);
    lsa_shards_close(r.shards);
    lsa_manifest_fini(&r.m);
    return st;
}
