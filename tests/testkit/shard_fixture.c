/* Documents for the shard tests: see shard_fixture.h. Everything is a function of the document's number. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/h5.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/num.h"
#include "kernels/core/rng.h"
#include "tests/testkit/shard_fixture.h"

static const int64_t LEN[FIX_DOCS] = {40, 3, 64, 9};
static char g_dir[64];
lsa_err fix_err;

int shard_fixture_begin(void **state) {
    (void)state;
    lsa_h5_init();
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-shard.XXXXXX");
    return mkdtemp(g_dir) ? 0 : -1;
}
int shard_fixture_end(void **state) {
    (void)state;
    return lsa_remove_tree(g_dir, NULL) == LSA_OK ? 0 : -1;
}

static lsa_shards_info make_info(void) {
    lsa_shards_info f = {.teacher = "made up",
                         .teacher_hash = 0x123456789abcdef0u,
                         .hidden = FIX_HIDDEN,
                         .hidden_stride = FIX_STRIDE};
    f.n_csa = 3;
    f.csa_id[0].v = 1, f.csa_id[1].v = 3, f.csa_id[2].v = 8;
    f.has_keys[0] = f.has_keys[2] = true;
    f.has_stats = f.has_dense = true;
    f.rope = (lsa_rope){
        .dim = 64, .base = 160000, .factor = 16, .original_len = 4096, .beta_fast = 32, .beta_slow = 1};
    f.label_top_p = 0.6;
    f.label_pool = 64;
    return f;
}

/* About a third of the visible chunks in every row. */
static void make_csr(lsa_csr *c, int64_t n_row, int64_t every, lsa_rng *r, bool votes, bool logit) {
    c->n_row = n_row;
    FIX_OK(LSA_NEW(c->begin, n_row + 1, &fix_err));
    FIX_OK(LSA_NEW(c->chunk, n_row * 20, &fix_err));
    if (votes) FIX_OK(LSA_NEW(c->votes, n_row * 20, &fix_err));
    if (logit) FIX_OK(LSA_NEW(c->logit, n_row * 20, &fix_err));
    if (!votes) FIX_OK(LSA_NEW(c->mass, n_row * 20, &fix_err));
    for (int64_t i = 0; i < n_row; i++) {
        const int64_t vis = lsa_visible((i + 1) * every - 1);
        for (int32_t k = 0; k < vis; k++) {
            if (lsa_rng_below(r, 3)) continue;
            if (votes) c->votes[c->n_entry] = (uint8_t)(1 + lsa_rng_below(r, 3));
            if (logit) c->logit[c->n_entry] = lsa_f32_to_f16(8.0f * lsa_rng_uniform(r) - 4.0f);
            if (!votes) c->mass[c->n_entry] = lsa_f32_to_f16(lsa_rng_uniform(r) / 32.0f);
            c->chunk[c->n_entry++] = k;
        }
        c->begin[i + 1] = c->n_entry;
    }
}

static void make_doc(lsa_doc_stats *d, const lsa_shards_info *f, int64_t n, uint64_t seed) {
    lsa_rng r = lsa_rng_make(seed, 1);
    memset(d, 0, sizeof *d);
    snprintf(d->name, sizeof d->name, "doc:%d", (int)seed);
    d->n_token = n;
    d->n_key = n / LSA_CHUNK;
    d->n_hidden = n / FIX_STRIDE;
    d->token_xxh64 = seed * 0x9E3779B97F4A7C15u;
    make_csr(&d->labels, n, 1, &r, true, false);
    for (int32_t o = 0; o < f->n_csa; o++) {
        make_csr(&d->stats[o], n, 1, &r, false, true);
        make_csr(&d->dense[o], n / 5, 5, &r, false, false);
        FIX_OK(LSA_NEW(d->dense[o].row, n / 5, &fix_err));
        FIX_OK(LSA_NEW(d->dense[o].rest, n / 5, &fix_err));
        for (int64_t i = 0; i < n / 5; i++)
            d->dense[o].row[i] = 5 * i + 4, d->dense[o].rest[i] = lsa_f32_to_f16(0.01f);
        FIX_OK(LSA_NEW(d->local_mass[o], n, &fix_err));
        FIX_OK(LSA_NEW(d->sink_mass[o], n, &fix_err));
        for (int64_t i = 0; i < n; i++) d->local_mass[o][i] = lsa_f32_to_f16(lsa_rng_uniform(&r));
        if (!f->has_keys[o]) continue;
        FIX_OK(LSA_NEW(d->key[o], d->n_key * LSA_KEY_BYTES, &fix_err));
        FIX_OK(LSA_NEW(d->hidden[o], d->n_hidden * FIX_HIDDEN, &fix_err));
        for (int64_t i = 0; i < d->n_key; i++) {
            float k[128];
            for (int j = 0; j < 128; j++) k[j] = lsa_rng_uniform(&r) - 0.5f;
            lsa_key_encode(d->key[o] + i * LSA_KEY_BYTES, k);
        }
        for (int64_t i = 0; i < d->n_hidden * FIX_HIDDEN; i++)
            d->hidden[o][i] = lsa_f32_to_bf16(lsa_rng_uniform(&r));
    }
}

/* Native logits as the teacher would have them: from the decoded keys, plus what fp8 took away. */
static void make_probe(lsa_doc_stats *d, const lsa_shards_info *f, uint64_t seed) {
    lsa_rng r = lsa_rng_make(seed, 2);
    const int64_t heads = 2, at[2] = {d->n_token / 2, d->n_token - 1};
    d->probe_heads = (int32_t)heads;
    d->n_probe = 2;
    FIX_OK(LSA_NEW(d->probe_row, 2, &fix_err));
    for (int p = 0; p < 2; p++) d->probe_row[p] = at[p];
    d->n_probe_logit = lsa_visible(at[0]) + lsa_visible(at[1]);
    for (int32_t o = 0; o < f->n_csa; o++) {
        if (!f->has_keys[o]) continue;
        FIX_OK(LSA_NEW(d->probe_iq[o], 2 * heads * 128, &fix_err));
        FIX_OK(LSA_NEW(d->probe_iw[o], 2 * heads, &fix_err));
        FIX_OK(LSA_NEW(d->probe_logit[o], d->n_probe_logit, &fix_err));
        for (int64_t i = 0; i < 2 * heads * 128; i++) d->probe_iq[o][i] = lsa_rng_uniform(&r) - 0.3f;
        for (int64_t i = 0; i < 2 * heads; i++) d->probe_iw[o][i] = lsa_rng_uniform(&r);
        float *out = d->probe_logit[o], key[128];
        for (int p = 0; p < 2; p++)
            for (int64_t c = 0; c < lsa_visible(at[p]); c++) {
                lsa_key_decode(key, d->key[o] + c * LSA_KEY_BYTES);
                float z = 0;
                for (int64_t h = 0; h < heads; h++) {
                    float dot = 0;
                    for (int j = 0; j < 128; j++) dot += d->probe_iq[o][(p * heads + h) * 128 + j] * key[j];
                    if (dot > 0) z += d->probe_iw[o][p * heads + h] * dot;
                }
                *out++ = z + 1e-4f * lsa_rng_uniform(&r);
            }
    }
}

shard_fixture shard_fixture_make(const char *name) {
    shard_fixture x = {.f = make_info()};
    snprintf(x.dir, sizeof x.dir, "%s/%s", g_dir, name);
    FIX_OK(lsa_mkdirs(x.dir, &fix_err));
    for (int i = 0; i < FIX_DOCS; i++) make_doc(&x.d[i], &x.f, LEN[i], (uint64_t)i + 1);
    make_probe(&x.d[2], &x.f, 7);
    return x;
}
void shard_fixture_free(shard_fixture *x) {
    for (int i = 0; i < FIX_DOCS; i++) lsa_doc_stats_fini(&x->d[i]);
}
void shard_fixture_seal(const shard_fixture *x) {
    lsa_manifest m = {.info = x->f, .complete = true, .run = json_object()};
    for (int i = 0; i < 2; i++) {
        lsa_manifest_shard s;
        char file[32];
        snprintf(file, sizeof file, "shard_%05d.h5", i);
        FIX_OK(lsa_shard_seal(&s, x->dir, file, &x->f, x->d + 2 * i, 2, &fix_err));
        FIX_OK(lsa_manifest_add(&m, &s, &fix_err));
    }
    FIX_OK(lsa_manifest_save(&m, x->dir, &fix_err));
    lsa_manifest_fini(&m);
}
const char *shard_fixture_path(const shard_fixture *x, const char *name) {
    static char p[512];
    snprintf(p, sizeof p, "%s/%s", x->dir, name);
    return p;
}
