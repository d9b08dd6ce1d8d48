/* An exported folder that is written again from itself, as calibration does: the same files, the same bytes;
 * and weights that are not those of the files' type are noticed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/weights.h"
#include "export/folder.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "tests/testkit/gen.h"

static char g_dir[] = "/tmp/lsa-folder-XXXXXX";
static const char *const g_file[] = {"indexer.safetensors", "golden.safetensors",   "README.md",
                                     "indexer.pt",          "layer_04.safetensors", "layer_08.safetensors",
                                     "indexer.gguf",        "check_indexer.py",     NULL};

static lsa_indexer_file make(lsa_dtype t, int32_t reach, bool prior) {
    lsa_indexer_file f = {.geom = {.hidden = 32,
                                   .n_head = 2,
                                   .head_dim = 128,
                                   .rank = 8,
                                   .eps = 1e-6f,
                                   .rope = {64, 160000, 16, 65536, 32, 1},
                                   .n_layer = 2,
                                   .ord = {{1}, {3}},
                                   .id = {{4}, {8}},
                                   .reach = reach,
                                   .prior = prior},
                          .dtype = t,
                          .tau = 64,
                          .tail = 256,
                          .threshold = 0.25};
    lsa_err err = {0};
    assert_int_equal(
        lsa_alloc_((void **)&f.params, lsa_indexer_n_param(&f.geom), sizeof(float), "params", &err), LSA_OK);
    lsa_indexer_init_random(f.params, &f.geom, 5);
    for (int32_t j = 0; j < reach; j++) f.params[lsa_indexer_costs_at(&f.geom) + j] = 0.1f * (float)j;
    for (int k = 0; prior && k < 2; k++) f.params[lsa_indexer_prior_at(&f.geom) + k] = k ? -0.3f : 1.0f / 3;
    f.train = json_object();
    return f;
}

static void hashes(uint64_t *h, const char *dir) {
    char path[LSA_PATH_MAX];
    lsa_err err = {0};
    for (int i = 0; g_file[i]; i++) {
        assert_int_equal(lsa_path(path, &err, "%s/%s", dir, g_file[i]), LSA_OK);
        if (lsa_xxh64_file(&h[i], path, &err) != LSA_OK) fail_msg("%s", err.msg);
    }
}

static void test_rewrite(void **state) {
    (void)state;
    const lsa_dtype type[] = {LSA_F32, LSA_BF16, LSA_F8_E4M3};
    for (int i = 0; i < 3; i++) {
        char dir[LSA_PATH_MAX];
        lsa_err err = {0};
        uint64_t a[9], b[9];
        lsa_export_options o = {.pt = true, .pt_freqs = i * 7, .per_layer = true, .gguf = true}, found;
        lsa_indexer_file f = make(type[i], 8 * i, i != 1), back;
        lsa_weights_round(f.params, &f.geom, f.dtype);
        assert_int_equal(lsa_path(dir, &err, "%s/%d", g_dir, i), LSA_OK);
        if (lsa_export_folder(&f, dir, &o, NULL, &err) != LSA_OK) fail_msg("%s", err.msg);
        hashes(a, dir);
        assert_int_equal(lsa_export_options_of(&found, dir, &err), LSA_OK);
        assert_true(found.pt && found.per_layer && found.gguf && found.pt_freqs == i * 7 && !found.force);
        assert_int_equal(lsa_indexer_file_load(&back, dir, &err), LSA_OK);
        assert_int_equal(back.dtype, type[i]);
        assert_int_equal(back.geom.reach, 8 * i);
        assert_int_equal(back.geom.prior, i != 1);
        assert_memory_equal(back.params, f.params, (size_t)lsa_indexer_n_param(&f.geom) * sizeof(float));
        assert_int_equal(lsa_export_folder(&back, dir, &found, NULL, &err),
                         LSA_E_ARG); /* not without force */
        err = (lsa_err){0};
        found.force = true;
        if (lsa_export_folder(&back, dir, &found, NULL, &err) != LSA_OK) fail_msg("%s", err.msg);
        hashes(b, dir);
        assert_memory_equal(a, b, 7 * sizeof *a);
        found = (lsa_export_options){.force = true}; /* fewer files: the others go */
        assert_int_equal(lsa_export_folder(&back, dir, &found, NULL, &err), LSA_OK);
        assert_int_equal(lsa_export_options_of(&found, dir, &err), LSA_OK);
        assert_false(found.pt || found.per_layer || found.gguf);
        lsa_indexer_file_fini(&f);
        lsa_indexer_file_fini(&back);
    }
}

/* Vectors made from weights that the file cannot hold: refused when it is read back, and nothing is left. */
static void test_not_rounded(void **state) {
    (void)state;
    lsa_indexer_file f = make(LSA_BF16, 0, true);
    char dir[LSA_PATH_MAX], tmp[LSA_PATH_MAX];
    lsa_err err = {0};
    assert_int_equal(lsa_path(dir, &err, "%s/rough", g_dir), LSA_OK);
    assert_int_equal(lsa_path(tmp, &err, "%s/rough.tmp", g_dir), LSA_OK);
    assert_int_equal(lsa_export_folder(&f, dir, &(lsa_export_options){0}, NULL, &err), LSA_E_FORMAT);
    assert_false(lsa_exists(dir) || lsa_exists(tmp));
    lsa_indexer_file_fini(&f);
}

/* A continuation and a prior are read whole or not at all: nobody gets the weights without by mistake. */
static void test_extra_damaged(void **state) {
    (void)state;
    static const struct {
        const char *from, *to, *message; /* from and to of one length: the header keeps its own */
    } bad[] = {{"\\\"b\\\":[0", "\\\"c\\\":[0", "'b'"},
               {"\\\"continuation\\\":4", "\\\"continuation\\\":3", "4 costs"},
               {"\\\"continuation\\\":4", "\\\"continuatioN\\\":4", "disagree"},
               {"lsa.continuation", "lsa.continuatioN", "disagree"},
               {"\\\"sum\\\"", "\\\"max\\\"", "belongs to ensemble sum"},
               {"0.75", "-0.5", "b_2"},
               {"0.75", "1e99", "b_2"},
               {"0.75", "null", "b_2"},
               {"\\\"prior\\\":true", "\\\"prioR\\\":true", "disagree"},
               {"lsa.prior", "lsa.prioR", "disagree"},
               {"\\\"decay\\\":0.8", "\\\"decay\\\":0.7", "this program applies 0.9 and 0.001"},
               {"[0.3333333432674408", "[3e39              ", "w_1"},
               {"\\\"weights\\\":[0.3", "\\\"weights\\\":[0,3", "3 weights"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        lsa_indexer_file f = make(LSA_F32, 4, true), back;
        char dir[LSA_PATH_MAX], path[LSA_PATH_MAX], *text = NULL;
        size_t n;
        lsa_err err = {0};
        for (int j = 0; j < 4; j++) f.params[lsa_indexer_costs_at(&f.geom) + j] = j == 1 ? 0.75f : 0;
        assert_int_equal(lsa_path(dir, &err, "%s/bad%zu", g_dir, i), LSA_OK);
        assert_int_equal(lsa_path(path, &err, "%s/indexer.safetensors", dir), LSA_OK);
        assert_int_equal(lsa_mkdirs(dir, &err), LSA_OK);
        assert_int_equal(lsa_indexer_file_save(&f, dir, &err), LSA_OK);
        assert_int_equal(lsa_read_file(&text, &n, path, &err), LSA_OK);
        char *at = memmem(text, n, bad[i].from, strlen(bad[i].from));
        assert_non_null(at);
        assert_int_equal(strlen(bad[i].from), strlen(bad[i].to));
        memcpy(at, bad[i].to, strlen(bad[i].to));
        assert_int_equal(lsa_write_file(path, text, n, &err), LSA_OK);
        assert_int_equal(lsa_indexer_file_load(&back, dir, &err), LSA_E_FORMAT);
        if (!strstr(err.msg, bad[i].message)) fail_msg("%s: %s", bad[i].to, err.msg);
        lsa_free(text);
        lsa_indexer_file_fini(&f);
    }
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_rewrite), cmocka_unit_test(test_not_rounded),
                                   cmocka_unit_test(test_extra_damaged)};
    if (!mkdtemp(g_dir)) return 1;
    const int rc = cmocka_run_group_tests(t, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
