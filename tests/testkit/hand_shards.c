/* Hand-made shards: see hand_shards.h. */
#include "tests/testkit/hand_shards.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "data/shard_write.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/rng.h"

const int64_t hand_tokens[HAND_DOCS] = {640, 700, 3, 333, 512};
int64_t hand_first[HAND_DOCS];
struct hand_plant hand_plant;

/* The truth: votes[doc][token][chunk] and mass[doc][layer][token][chunk]. */
static uint8_t g_votes[HAND_DOCS][HAND_LONGEST][HAND_LONGEST / 4];
static float g_mass[HAND_DOCS][HAND_LAYERS][HAND_LONGEST][HAND_LONGEST / 4];

static void put(lsa_csr *c, int64_t row, int32_t chunk, uint8_t votes, uint16_t mass) {
    c->chunk[c->n_entry] = chunk;
    if (c->votes) c->votes[c->n_entry] = votes;
    if (c->mass) c->mass[c->n_entry] = mass;
    if (c->logit) c->logit[c->n_entry] = 0;
    c->begin[row + 1] = ++c->n_entry;
}

static void csr_room(lsa_csr *c, int64_t rows, bool labels) {
    c->n_row = rows;
    assert_int_equal(LSA_NEW(c->begin, rows + 1, NULL), LSA_OK);
    assert_int_equal(LSA_NEW(c->chunk, rows * (HAND_LONGEST / 4), NULL), LSA_OK);
    if (labels) {
        assert_int_equal(LSA_NEW(c->votes, rows * (HAND_LONGEST / 4), NULL), LSA_OK);
    } else {
        assert_int_equal(LSA_NEW(c->logit, rows * (HAND_LONGEST / 4), NULL), LSA_OK);
        assert_int_equal(LSA_NEW(c->mass, rows * (HAND_LONGEST / 4), NULL), LSA_OK);
    }
}

static float planted_mass(uint64_t x, bool planted) {
    return (planted ? 0.008f : 0.001f) * (float)(1 + x);
}

static void make_doc(lsa_doc_stats *d, int64_t doc, int64_t stride) {
    const int64_t T = hand_tokens[doc], first = hand_first[doc];
    lsa_rng r = lsa_rng_make(31, (uint64_t)doc);
    memset(d, 0, sizeof *d);
    snprintf(d->name, sizeof d->name, "hand:%lld", (long long)doc);
    d->n_token = T;
    d->n_key = T / 4;
    d->first_position = first;
    d->n_hidden = T / stride - first / stride;
    csr_room(&d->labels, T - first, true);
    for (int32_t l = 0; l < HAND_LAYERS; l++) {
        assert_int_equal(LSA_NEW(d->key[l], d->n_key * LSA_KEY_BYTES, NULL), LSA_OK);
        assert_int_equal(LSA_NEW(d->hidden[l], d->n_hidden * HAND_HIDDEN, NULL), LSA_OK);
        assert_int_equal(LSA_NEW(d->local_mass[l], T - first, NULL), LSA_OK);
        assert_int_equal(LSA_NEW(d->sink_mass[l], T - first, NULL), LSA_OK);
        csr_room(&d->stats[l], T - first, false);
        for (int64_t c = 0; c < d->n_key; c++) { /* the first two codes name document, layer and chunk */
            uint8_t *key = d->key[l] + c * LSA_KEY_BYTES;
            const float scale = 1;
            key[0] = (uint8_t)(8 * doc + l + 1), key[1] = (uint8_t)(c & 63);
            for (int i = 2; i < 128; i++) /* up to 7.5 in size, both signs */
                key[i] = (uint8_t)(lsa_rng_below(&r, 0x50) | lsa_rng_below(&r, 2) << 7);
            memcpy(key + 128, &scale, sizeof scale);
        }
        for (int64_t i = 0; i < d->n_hidden; i++) /* the vector names its document, layer and position */
            for (int64_t j = 0; j < HAND_HIDDEN; j++)
                d->hidden[l][i * HAND_HIDDEN + j] = lsa_f32_to_bf16((float)(j == 0   ? doc
                                                                            : j == 1 ? l
                                                                            : j == 2 ? first / stride + i
                                                                                     : 0));
    }
    memset(g_votes[doc], 0, sizeof g_votes[doc]);
    for (int l = 0; l < HAND_LAYERS; l++) memset(g_mass[doc][l], 0, sizeof g_mass[doc][l]);
    for (int64_t t = first; t < T; t++) {
        const int64_t row = t - first;
        d->labels.begin[row + 1] = d->labels.n_entry;
        for (int32_t l = 0; l < HAND_LAYERS; l++) d->stats[l].begin[row + 1] = d->stats[l].n_entry;
        const bool planted = doc == hand_plant.doc && t >= hand_plant.begin && t < hand_plant.end;
        for (int32_t c = 0; c < (t + 1) / 4; c++) {
            const uint64_t x = lsa_rng_below(&r, 100);
            const uint8_t v = c == 5 && t % 16 ? 2 : x < 2 ? 2 : x < 5 ? 1 : 0;
            if (v) put(&d->labels, row, c, v, 0);
            g_votes[doc][t][c] = v;
            for (int32_t l = 0; l < HAND_LAYERS; l++) {
                const uint16_t m = lsa_rng_below(&r, 100) < 6
                                       ? lsa_f32_to_f16(planted_mass(lsa_rng_below(&r, 90), planted))
                                       : 0;
                if (m) put(&d->stats[l], row, c, 0, m);
                g_mass[doc][l][t][c] = lsa_f16_to_f32(m);
            }
        }
    }
}

void hand_shards(const char *dir, int32_t stride) {
    lsa_manifest m = {0};
    lsa_manifest_shard s;
    lsa_doc_stats d[HAND_DOCS];
    lsa_err err = {0};
    assert_int_equal(lsa_mkdirs(dir, NULL), LSA_OK);
    snprintf(m.info.teacher, sizeof m.info.teacher, "hand-made");
    m.info.hidden = HAND_HIDDEN, m.info.hidden_stride = stride, m.info.n_csa = HAND_LAYERS,
    m.info.has_stats = true;
    m.info.rope = (lsa_rope){
        .dim = 64, .base = 160000, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    m.info.label_top_p = 0.6, m.info.label_pool = 64;
    for (int32_t l = 0; l < HAND_LAYERS; l++) m.info.csa_id[l].v = 2 * l + 1, m.info.has_keys[l] = true;
    for (int64_t i = 0; i < HAND_DOCS; i++) make_doc(&d[i], i, stride);
    for (int part = 0; part < 2; part++) { /* two shards: documents 0..2 and 3..4 */
        if (lsa_shard_seal(&s, dir, part ? "b.h5" : "a.h5", &m.info, d + 3 * part, part ? 2 : 3, &err) !=
            LSA_OK)
            fail_msg("%s", err.msg);
        assert_int_equal(lsa_manifest_add(&m, &s, NULL), LSA_OK);
    }
    m.complete = true;
    m.run = json_object();
    if (lsa_manifest_save(&m, dir, &err) != LSA_OK) fail_msg("%s", err.msg);
    for (int64_t i = 0; i < HAND_DOCS; i++) lsa_doc_stats_fini(&d[i]);
    lsa_manifest_fini(&m);
}

uint8_t hand_votes(int64_t doc, int64_t a, int64_t b, int64_t c, int64_t min_layers) {
    uint8_t best = 0;
    for (int64_t t = a; t < b; t++)
        if (g_votes[doc][t][c] >= min_layers && g_votes[doc][t][c] > best) best = g_votes[doc][t][c];
    return best;
}
double hand_mass(int64_t doc, int64_t a, int64_t b, int64_t c) {
    return hand_power(doc, a, b, c, 1);
}
double hand_power(int64_t doc, int64_t a, int64_t b, int64_t c, double power) {
    double m = 0;
    for (int l = 0; l < HAND_LAYERS; l++)
        for (int64_t t = a; t < b; t++) m += pow((double)g_mass[doc][l][t][c], power);
    return m;
}
bool hand_trivial(int64_t doc, int64_t c, int64_t min_layers) {
    int64_t n = 0;
    for (int64_t t = 0; t < hand_tokens[doc]; t++) n += g_votes[doc][t][c] >= min_layers;
    return (double)n > 0.8 * (double)hand_tokens[doc];
}
