/* The planted teacher: see synth.h. Everything is a function of the seed and of (document, chunk, window). */
#include "data/dump/synth.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "data/shard_write.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"

enum { WINDOW = 64, CONTENT = 64 }; /* content lives in the channels that RoPE leaves alone */

lsa_synth_opts lsa_synth_defaults(void) {
    return (lsa_synth_opts){.docs = 16,
                            .tokens = 2048,
                            .layers = 3,
                            .hidden = 64,
                            .topics = 24,
                            .hidden_stride = 64,
                            .shard_bytes = INT64_C(256) << 20,
                            .seed = 1,
                            .noise = 0.05};
}

static float normal(lsa_rng *r) {
    float u = lsa_rng_uniform(r) + 0x1p-25f, v = lsa_rng_uniform(r);
    return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}

typedef struct maker {
    const lsa_synth_opts *o;
    float *topic_hidden; /* [topics, hidden] */
    float *topic_key;    /* [layers, topics, 128] */
} maker;

static int64_t chunk_topic(const maker *m, int64_t doc, int64_t chunk) {
    lsa_rng r = lsa_rng_make(lsa_mix64((uint64_t)m->o->seed, 11), lsa_mix64((uint64_t)doc, (uint64_t)chunk));
    return (int64_t)lsa_rng_below(&r, (uint64_t)m->o->topics);
}
static int64_t window_topic(const maker *m, int64_t doc, int64_t window) {
    lsa_rng r = lsa_rng_make(lsa_mix64((uint64_t)m->o->seed, 12), lsa_mix64((uint64_t)doc, (uint64_t)window));
    return (int64_t)lsa_rng_below(&r, (uint64_t)m->o->topics);
}

static void hadamard128(float *x) {
    for (int h = 1; h < 128; h *= 2)
        for (int i = 0; i < 128; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    for (int i = 0; i < 128; i++) x[i] *= 0.08838834764f;
}

static lsa_status maker_init(maker *m, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_synth_opts *o = m->o;
    LSA_TRY(LSA_NEW(m->topic_hidden, o->topics * o->hidden, err));
    LSA_TRY(LSA_NEW(m->topic_key, o->layers * o->topics * 128, err));
    lsa_rng r = lsa_rng_make((uint64_t)o->seed, 1);
    for (int64_t i = 0; i < o->topics * o->hidden; i++) m->topic_hidden[i] = normal(&r);
    for (int64_t i = 0; i < o->layers * o->topics; i++)
        for (int64_t j = 0; j < CONTENT; j++) m->topic_key[i * 128 + j] = normal(&r);
done:
    return st;
}

/* Statistics of token t: the golden chunks share 0.8 of the mass, two stray chunks 0.1; each layer misses
 * some golden ones. */
static lsa_status token_rows(const maker *m, lsa_doc_stats *d, int64_t doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_synth_opts *o = m->o;
    const int64_t n = o->tokens, n_chunk = n / LSA_CHUNK;
    LSA_VEC(int32_t) lab = {0};
    LSA_VEC(uint8_t) votes = {0};
    lsa_csr *L = &d->labels;
    int32_t *topic = NULL;
    LSA_TRY(LSA_NEW(topic, n_chunk, err));
    for (int64_t c = 0; c < n_chunk; c++) topic[c] = (int32_t)chunk_topic(m, doc, c);
    L->n_row = n;
    LSA_TRY(LSA_NEW(L->begin, n + 1, err));
    for (int32_t l = 0; l < o->layers; l++) {
        d->stats[l].n_row = n;
        LSA_TRY(LSA_NEW(d->stats[l].begin, n + 1, err));
        LSA_TRY(LSA_NEW(d->local_mass[l], n, err));
        LSA_TRY(LSA_NEW(d->sink_mass[l], n, err));
    }
    int64_t cap[LSA_MAX_CSA][3] = {{0}};
    for (int64_t t = 0; t < n; t++) {
        const int64_t vis = lsa_visible(t), want = window_topic(m, doc, t / WINDOW),
                      start = t / WINDOW * WINDOW / LSA_CHUNK;
        lsa_rng r = lsa_rng_make(lsa_mix64((uint64_t)o->seed, 13), lsa_mix64((uint64_t)doc, (uint64_t)t));
        int64_t stray[2] = {-1, -1};
        for (int i = 0; i < 2 && vis > 0; i++) stray[i] = (int64_t)lsa_rng_below(&r, (uint64_t)vis);
        int64_t n_gold = 0;
        for (int64_t c = 0; c < lsa_min_i64(start, vis); c++) n_gold += topic[c] == want;
        for (int64_t c = 0; c < vis; c++) {
            const bool gold = c < start && topic[c] == want, odd = c == stray[0] || c == stray[1];
            if (!gold && !odd) continue;
            uint8_t v = 0;
            for (int32_t l = 0; l < o->layers; l++) {
                if (gold ? lsa_rng_below(&r, 8) == 0 : l != 0)
                    continue; /* a layer overlooks one golden chunk in eight */
                v++;
                lsa_csr *s = &d->stats[l];
                LSA_TRY(lsa_grow_((void **)&s->chunk, &cap[l][0], s->n_entry + 1, sizeof *s->chunk, "stats",
                                  err));
                LSA_TRY(lsa_grow_((void **)&s->logit, &cap[l][1], s->n_entry + 1, sizeof *s->logit, "stats",
                                  err));
                LSA_TRY(
                    lsa_grow_((void **)&s->mass, &cap[l][2], s->n_entry + 1, sizeof *s->mass, "stats", err));
                s->chunk[s->n_entry] = (int32_t)c;
                s->logit[s->n_entry] = lsa_f32_to_f16(gold ? 4.0f : 0.5f);
                s->mass[s->n_entry++] = lsa_f32_to_f16(gold ? 0.8f / (float)n_gold : 0.05f);
            }
            if (v == 0) continue;
            LSA_TRY(LSA_VEC_RESERVE(lab, lab.len + 1, err));
            LSA_TRY(LSA_VEC_RESERVE(votes, lab.len + 1, err));
            lab.data[lab.len] = (int32_t)c;
            votes.data[lab.len++] = v;
        }
        L->begin[t + 1] = lab.len;
        for (int32_t l = 0; l < o->layers; l++) {
            d->stats[l].begin[t + 1] = d->stats[l].n_entry;
            d->local_mass[l][t] = lsa_f32_to_f16(0.08f);
            d->sink_mass[l][t] = lsa_f32_to_f16(0.02f);
        }
    }
    L->n_entry = lab.len;
    L->chunk = lab.data;
    L->votes = votes.data;
    lab.data = NULL;
    votes.data = NULL;
done:
    lsa_free(topic);
    lsa_free(lab.data);
    lsa_free(votes.data);
    return st;
}

static lsa_status make_doc(const maker *m, lsa_doc_stats *d, int64_t doc, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_synth_opts *o = m->o;
    memset(d, 0, sizeof *d);
    snprintf(d->name, sizeof d->name, "synth:%lld", (long long)doc);
    d->n_token = o->tokens;
    d->n_key = o->tokens / LSA_CHUNK;
    d->n_hidden = o->tokens / o->hidden_stride;
    d->token_xxh64 = lsa_mix64((uint64_t)o->seed, (uint64_t)doc);
    for (int32_t l = 0; l < o->layers; l++) {
        lsa_rng r = lsa_rng_make(lsa_mix64((uint64_t)o->seed, 14), lsa_mix64((uint64_t)doc, (uint64_t)l));
        LSA_TRY(LSA_NEW(d->key[l], d->n_key * LSA_KEY_BYTES, err));
        LSA_TRY(LSA_NEW(d->hidden[l], d->n_hidden * o->hidden, err));
        for (int64_t c = 0; c < d->n_key; c++) {
            float k[128];
            const float *t = m->topic_key + (l * o->topics + chunk_topic(m, doc, c)) * 128;
            for (int i = 0; i < 128; i++) k[i] = t[i] + (float)o->noise * normal(&r);
            hadamard128(k);
            lsa_key_encode(d->key[l] + c * LSA_KEY_BYTES, k);
        }
        for (int64_t i = 0; i < d->n_hidden; i++) {
            const int64_t pos = (i + 1) * o->hidden_stride - 1;
            const float *t = m->topic_hidden + window_topic(m, doc, (pos + 1) / WINDOW) * o->hidden;
            for (int64_t j = 0; j < o->hidden; j++)
                d->hidden[l][i * o->hidden + j] = lsa_f32_to_bf16(t[j] + (float)o->noise * normal(&r));
        }
    }
    LSA_TRY(token_rows(m, d, doc, err));
done:
    if (st != LSA_OK) lsa_doc_stats_fini(d);
    return st;
}

static lsa_status write_golden(const maker *m, const char *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_commit c = {.fd = -1};
    char path[LSA_PATH_MAX], s[64];
    LSA_TRY(lsa_path(path, err, "%s/golden.jsonl", out));
    LSA_TRY(lsa_commit_begin(&c, path, err));
    for (int64_t doc = 0; doc < m->o->docs; doc++) {
        int n = snprintf(s, sizeof s, "{\"document\":%lld,\"windows\":[", (long long)doc);
        LSA_TRY(lsa_commit_write(&c, s, (size_t)n, err));
        for (int64_t w = 0; w < m->o->tokens / WINDOW; w++) {
            bool first = true;
            LSA_TRY(lsa_commit_write(&c, w ? ",[" : "[", w ? 2 : 1, err));
            for (int64_t k = 0; k < w * WINDOW / LSA_CHUNK; k++) {
                if (chunk_topic(m, doc, k) != window_topic(m, doc, w)) continue;
                n = snprintf(s, sizeof s, "%s%lld", first ? "" : ",", (long long)k);
                LSA_TRY(lsa_commit_write(&c, s, (size_t)n, err));
                first = false;
            }
            LSA_TRY(lsa_commit_write(&c, "]", 1, err));
        }
        LSA_TRY(lsa_commit_write(&c, "]}\n", 3, err));
    }
    LSA_TRY(lsa_commit_end(&c, err));
done:
    lsa_commit_abort(&c);
    return st;
}

static lsa_status check_opts(const lsa_synth_opts *o, lsa_err *err) {
    const struct {
        const char *name;
        int64_t v, lo, hi;
    } range[] = {{"--docs", o->docs, 1, 1 << 20},         {"--tokens", o->tokens, 1, 1 << 20},
                 {"--layers", o->layers, 1, LSA_MAX_CSA}, {"--hidden", o->hidden, 1, 1 << 16},
                 {"--topics", o->topics, 1, 4096},        {"--hidden-stride", o->hidden_stride, 1, 65536}};
    for (size_t i = 0; i < sizeof range / sizeof *range; i++)
        if (range[i].v < range[i].lo || range[i].v > range[i].hi)
            LSA_RET_FAIL(LSA_E_ARG, "%s must be in [%lld, %lld], found %lld", range[i].name,
                         (long long)range[i].lo, (long long)range[i].hi, (long long)range[i].v);
    return LSA_OK;
}

lsa_status lsa_synth(const lsa_synth_opts *o, const char *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_manifest m = {0};
    maker mk = {.o = o};
    LSA_VEC(lsa_doc_stats) docs = {0};
    int64_t bytes = 0;
    char path[LSA_PATH_MAX];
    LSA_TRY(check_opts(o, err));
    LSA_TRY(lsa_path(path, err, "%s/manifest.json", out));
    if (lsa_exists(path))
        LSA_FAIL(LSA_E_ARG, "'%s' already holds shards; choose another --out or delete it", out);
    LSA_TRY(lsa_mkdirs(out, err));
    LSA_TRY(maker_init(&mk, err));
    lsa_shards_info *f = &m.info;
    snprintf(f->teacher, sizeof f->teacher, "synth");
    f->teacher_hash = lsa_mix64((uint64_t)o->seed, 99);
    f->hidden = (int32_t)o->hidden;
    f->hidden_stride = (int32_t)o->hidden_stride;
    f->n_csa = (int32_t)o->layers;
    for (int32_t l = 0; l < f->n_csa; l++) {
        f->csa_id[l].v = 2 * l + 1;
        f->has_keys[l] = true;
    }
    f->has_stats = true;
    f->rope = (lsa_rope){
        .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    f->label_top_p = 0.6;
    f->label_pool = 64;
    for (int64_t d = 0; d < o->docs; d++) {
        LSA_TRY(LSA_VEC_RESERVE(docs, docs.len + 1, err));
        LSA_TRY(make_doc(&mk, &docs.data[docs.len], d, err));
        bytes += lsa_doc_stats_bytes(&docs.data[docs.len++], f);
        if (bytes < o->shard_bytes && d + 1 < o->docs) continue;
        lsa_manifest_shard s;
        char file[64];
        snprintf(file, sizeof file, "shard_%05lld.h5", (long long)m.shard.len);
        LSA_TRY(lsa_shard_seal(&s, out, file, f, docs.data, docs.len, err));
        LSA_TRY(lsa_manifest_add(&m, &s, err));
        while (docs.len) lsa_doc_stats_fini(&docs.data[--docs.len]);
        bytes = 0;
    }
    m.complete = true;
    m.run = json_pack("{s:s, s:I}", "synth", "planted topics", "seed", (json_int_t)o->seed);
    LSA_TRY(write_golden(&mk, out, err));
    LSA_TRY(lsa_manifest_save(&m, out, err));
done:
    while (docs.len) lsa_doc_stats_fini(&docs.data[--docs.len]);
    lsa_free(docs.data);
    lsa_free(mk.topic_hidden);
    lsa_free(mk.topic_key);
    lsa_manifest_fini(&m);
    return st;
}
