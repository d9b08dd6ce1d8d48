/* Sources of lsa-dump import: the first byte says whether the rest is a pickle of a document or the
 * safetensors file of a line. Whatever is in them, reading and building stay inside, and what is built is in
 * order. */
#include "tests/fuzz/scratch.h"

#include "data/dump/import_doc.h"
#include "kernels/core/mem.h"

static json_t *g_line;
static lsa_shards_info g_model = {.hidden = 64, .hidden_stride = 1, .n_csa = 3, .label_min_votes = 1};

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    lsa_err err = {0};
    (void)argc, (void)argv;
    fuzz_scratch();
    g_line = json_pack("{s:s, s:s, s:s, s:i, s:[{s:i, s:i}, {s:i, s:i}], s:s}", "format", "lsa-import/1",
                       "name", "fuzz", "tensors", "t", "first", 6, "layers", "ordinal", 2, "id", 5, "ordinal",
                       0, "id", 1, "hidden", "attn_norm");
    for (int32_t o = 0; o < g_model.n_csa; o++) g_model.csa_id[o].v = 2 * o + 1;
    if (!g_line || lsa_mkdirs(g_scratch, &err) != LSA_OK) abort();
    return 0;
}

static void check(const lsa_doc_stats *s) {
    const lsa_csr *c = &s->labels;
    if (c->begin[0] != 0 || c->begin[c->n_row] != c->n_entry || s->n_key != s->n_token / 4) abort();
    for (int64_t i = 0; i < c->n_row; i++)
        for (int64_t j = c->begin[i]; j < c->begin[i + 1]; j++)
            if (c->chunk[j] < 0 || c->chunk[j] >= lsa_visible(s->first_position + i) || c->votes[j] < 1 ||
                (j > c->begin[i] && c->chunk[j] <= c->chunk[j - 1]))
                abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    char path[128];
    lsa_err err = {0};
    lsa_import_doc d;
    lsa_doc_stats s;
    lsa_shards_info info = g_model;
    if (n < 1) return 0;
    snprintf(path, sizeof path, "%s/t", g_scratch);
    fuzz_write(path, data + 1, n - 1);
    const lsa_status st = data[0] & 1 ? lsa_import_line(&d, g_line, g_scratch, "fuzz:1", &g_model, &err)
                                      : lsa_import_pickle(&d, path, &g_model, &err);
    if (st == LSA_OK) {
        for (int32_t o = 0; o < info.n_csa; o++) info.has_keys[o] = lsa_import_has(&d, o);
        if (lsa_import_build(&s, &d, &info, &err) == LSA_OK) {
            check(&s);
            lsa_doc_stats_fini(&s);
        }
    }
    if (st != LSA_OK && !err.msg[0]) abort();
    lsa_import_close(&d);
    return 0;
}
