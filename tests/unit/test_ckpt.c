/* Checkpoints: what is saved loads back bit for bit, equal content gives equal files, pointers and pruning,
 * and every kind of damage gives one error. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/ckpt.h"
#include "data/geom_json.h"
#include "data/lsa_safetensors.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/core/rng.h"

static char g_dir[64];

static lsa_indexer_geom geometry(void) {
    lsa_indexer_geom g = {.hidden = 24, .n_head = 3, .head_dim = 128, .rank = 5, .eps = 1e-6f, .n_layer = 2};
    g.rope = (lsa_rope){
        .dim = 64, .base = 160000.5, .factor = 16, .original_len = 65536, .beta_fast = 32, .beta_slow = 1};
    g.ord[0].v = 1, g.id[0].v = 4;
    g.ord[1].v = 7, g.id[1].v = 16;
    return g;
}

static float *numbers(int64_t n, uint64_t seed) {
    float *p = NULL;
    lsa_rng r = lsa_rng_make(seed, 5);
    assert_int_equal(LSA_NEW(p, n, NULL), LSA_OK);
    for (int64_t i = 0; i < n; i++) p[i] = lsa_rng_uniform(&r) - 0.5f;
    return p;
}

typedef struct fixture {
    char run[128];
    lsa_indexer_geom g;
    int64_t n;
    float *p, *m, *v;
    json_t *state;
} fixture;

static fixture make(const char *name) {
    fixture f = {.g = geometry()};
    f.n = lsa_indexer_n_param(&f.g);
    f.p = numbers(f.n, 1), f.m = numbers(f.n, 2), f.v = numbers(f.n, 3);
    f.state = json_pack("{s:i,s:f}", "step", 12, "best", 0.1 + 0.2);
    snprintf(f.run, sizeof f.run, "%s/%s", g_dir, name);
    return f;
}
static void unmake(fixture *f) {
    lsa_free(f->p);
    lsa_free(f->m);
    lsa_free(f->v);
    json_decref(f->state);
}
static void save(const fixture *f, int64_t step, bool best, int64_t keep) {
    lsa_err err = {0};
    if (lsa_ckpt_save(f->run, step, &f->g, f->p, f->m, f->v, f->state, best, keep, 0, &err) != LSA_OK)
        fail_msg("%s", err.msg);
}
static bool there(const fixture *f, const char *name) {
    char p[LSA_PATH_MAX];
    assert_int_equal(lsa_path(p, NULL, "%s/ckpt/%s", f->run, name), LSA_OK);
    return lsa_exists(p);
}

static void test_round_trip(void **s) {
    (void)s;
    fixture f = make("round");
    lsa_ckpt c;
    lsa_err err = {0};
    save(&f, 12, false, 0);
    assert_int_equal(lsa_ckpt_load(&c, f.run, true, &err), LSA_OK);
    assert_int_equal(c.step, 12);
    assert_memory_equal(c.params, f.p, (size_t)f.n * sizeof(float));
    assert_memory_equal(c.m, f.m, (size_t)f.n * sizeof(float));
    assert_memory_equal(c.v, f.v, (size_t)f.n * sizeof(float));
    assert_true(json_equal(c.state, f.state)); /* doubles come back exactly */
    assert_int_equal(c.geom.hidden, 24);
    assert_int_equal(c.geom.ord[1].v, 7);
    assert_int_equal(c.geom.id[1].v, 16);
    assert_true(c.geom.rope.base == 160000.5 && c.geom.eps == 1e-6f && c.geom.rope.original_len == 65536);
    lsa_ckpt_fini(&c);
    unmake(&f);
}

/* The exported names and shapes, and nothing else, in model.safetensors. */
static void test_names(void **s) {
    (void)s;
    fixture f = make("names");
    char path[LSA_PATH_MAX];
    lsa_st *st = NULL;
    const lsa_st_tensor *t;
    save(&f, 1, false, 0);
    assert_int_equal(lsa_path(path, NULL, "%s/ckpt/step_00000001/model.safetensors", f.run), LSA_OK);
    assert_int_equal(lsa_st_open(&st, path, NULL), LSA_OK);
    assert_int_equal(lsa_st_count(st), 8);
    assert_int_equal(lsa_st_need(&t, st, "retrievers.l7.wq_b.weight", LSA_F32, 2, (int64_t[]){384, 5}, NULL),
                     LSA_OK);
    assert_int_equal(lsa_st_need(&t, st, "retrievers.l1.q_norm_weight", LSA_F32, 1, (int64_t[]){5}, NULL),
                     LSA_OK);
    assert_int_equal(
        lsa_st_need(&t, st, "retrievers.l1.weights_proj.weight", LSA_F32, 2, (int64_t[]){3, 24}, NULL),
        LSA_OK);
    lsa_st_close(st);
    unmake(&f);
}

/* The costs of a continuation are one more tensor, with its moments; a cost that cannot be is refused. */
static void test_continuation(void **s) {
    (void)s;
    fixture f = make("continuation");
    lsa_ckpt c;
    lsa_st *st = NULL;
    const lsa_st_tensor *t;
    lsa_err err = {0};
    char path[LSA_PATH_MAX];
    lsa_free(f.p), lsa_free(f.m), lsa_free(f.v);
    const int64_t costs = f.n;
    f.g.reach = 16;
    f.n = lsa_indexer_n_param(&f.g);
    assert_int_equal(f.n, costs + 16);
    f.p = numbers(f.n, 1), f.m = numbers(f.n, 2), f.v = numbers(f.n, 3);
    for (int64_t j = 0; j < 16; j++) f.p[costs + j] = 0.25f * (float)j;
    save(&f, 12, false, 0);
    assert_int_equal(lsa_ckpt_load(&c, f.run, true, &err), LSA_OK);
    assert_int_equal(c.geom.reach, 16);
    assert_memory_equal(c.params, f.p, (size_t)f.n * sizeof(float));
    assert_memory_equal(c.m, f.m, (size_t)f.n * sizeof(float));
    assert_memory_equal(c.v, f.v, (size_t)f.n * sizeof(float));
    assert_int_equal(lsa_path(path, NULL, "%s/model.safetensors", c.dir), LSA_OK);
    assert_int_equal(lsa_st_open(&st, path, NULL), LSA_OK);
    assert_int_equal(lsa_st_count(st), 9);
    assert_int_equal(lsa_st_need(&t, st, "continuation", LSA_F32, 1, (int64_t[]){16}, NULL), LSA_OK);
    lsa_st_close(st);
    lsa_ckpt_fini(&c);
    f.p[costs + 3] = -1e-3f;
    save(&f, 13, false, 0);
    assert_int_equal(lsa_ckpt_load(&c, f.run, false, &err), LSA_E_FORMAT);
    assert_non_null(strstr(err.msg, "b_4"));
    unmake(&f);
}

/* So are the weights of the observed-mass prior, with a continuation and without. */
static void test_prior(void **s) {
    (void)s;
    for (int reach = 0; reach < 5; reach += 4) {
        fixture f = make(reach ? "prior" : "prior-alone");
        lsa_ckpt c;
        lsa_st *st = NULL;
        const lsa_st_tensor *t;
        lsa_err err = {0};
        char path[LSA_PATH_MAX];
        lsa_free(f.p), lsa_free(f.m), lsa_free(f.v);
        const int64_t layers = f.n;
        f.g.reach = reach;
        f.g.prior = true;
        f.n = lsa_indexer_n_param(&f.g);
        assert_int_equal(f.n, layers + reach + 2);
        f.p = numbers(f.n, 1), f.m = numbers(f.n, 2), f.v = numbers(f.n, 3);
        for (int j = 0; j < reach; j++) f.p[layers + j] = 1;
        save(&f, 12, false, 0);
        if (lsa_ckpt_load(&c, f.run, true, &err) != LSA_OK) fail_msg("%s", err.msg);
        assert_true(c.geom.prior && c.geom.reach == reach);
        assert_memory_equal(c.params, f.p, (size_t)f.n * sizeof(float));
        assert_memory_equal(c.m, f.m, (size_t)f.n * sizeof(float));
        assert_memory_equal(c.v, f.v, (size_t)f.n * sizeof(float));
        assert_int_equal(lsa_path(path, NULL, "%s/model.safetensors", c.dir), LSA_OK);
        assert_int_equal(lsa_st_open(&st, path, NULL), LSA_OK);
        assert_int_equal(lsa_st_count(st), 9 + (reach > 0));
        assert_int_equal(lsa_st_need(&t, st, "prior", LSA_F32, 1, (int64_t[]){2}, NULL), LSA_OK);
        lsa_st_close(st);
        lsa_ckpt_fini(&c);
        f.p[f.n - 1] = NAN;
        assert_int_equal(lsa_ckpt_save(f.run, 13, &f.g, f.p, f.m, f.v, f.state, false, 0, 0, &err),
                         LSA_E_NUMERIC);
        assert_non_null(strstr(err.msg, "prior: element 1"));
        unmake(&f);
    }
}

static void test_equal_bytes(void **s) {
    (void)s;
    fixture a = make("one"), b = make("two");
    const char *file[] = {"model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"};
    save(&a, 3, false, 0);
    save(&b, 3, false, 0);
    for (int i = 0; i < 4; i++) {
        char pa[LSA_PATH_MAX], pb[LSA_PATH_MAX];
        uint64_t ha, hb;
        assert_int_equal(lsa_path(pa, NULL, "%s/ckpt/step_00000003/%s", a.run, file[i]), LSA_OK);
        assert_int_equal(lsa_path(pb, NULL, "%s/ckpt/step_00000003/%s", b.run, file[i]), LSA_OK);
        assert_int_equal(lsa_xxh64_file(&ha, pa, NULL), LSA_OK);
        assert_int_equal(lsa_xxh64_file(&hb, pb, NULL), LSA_OK);
        assert_true(ha == hb);
    }
    unmake(&a);
    unmake(&b);
}

static void resolves(const char *arg, const char *tail) {
    char dir[LSA_PATH_MAX];
    lsa_err err = {0};
    if (lsa_ckpt_resolve(dir, arg, &err) != LSA_OK) fail_msg("%s", err.msg);
    if (strlen(dir) < strlen(tail) || strcmp(dir + strlen(dir) - strlen(tail), tail) != 0)
        fail_msg("'%s' means '%s'", arg, dir);
}

static void test_pointers_and_keep(void **s) {
    (void)s;
    fixture f = make("keep");
    char p[LSA_PATH_MAX];
    save(&f, 10, true, 2);
    save(&f, 20, false, 2);
    save(&f, 30, false, 2);
    save(&f, 40, false, 2);
    assert_true(there(&f, "step_00000010")); /* best stays */
    assert_false(there(&f, "step_00000020"));
    assert_true(there(&f, "step_00000030") && there(&f, "step_00000040"));
    resolves(f.run, "step_00000010");
    snprintf(p, sizeof p, "%s/ckpt/latest", f.run);
    resolves(p, "step_00000040");
    snprintf(p, sizeof p, "%s/ckpt/step_00000030", f.run);
    resolves(p, "step_00000030");
    snprintf(p, sizeof p, "%s/ckpt/best", f.run);
    assert_int_equal(unlink(p), 0);
    resolves(f.run, "step_00000040");
    unmake(&f);
}

/* Multiples of milestone_every stay; the step before another is the newest older directory. */
static void test_milestones_and_older(void **s) {
    (void)s;
    fixture f = make("miles");
    char dir[LSA_PATH_MAX], p[LSA_PATH_MAX];
    for (int64_t step = 10; step <= 60; step += 10)
        assert_int_equal(lsa_ckpt_save(f.run, step, &f.g, f.p, f.m, f.v, f.state, false, 1, 20, NULL),
                         LSA_OK);
    for (int step = 10; step <= 60; step += 10) {
        snprintf(p, sizeof p, "step_%08d", step);
        assert_int_equal(there(&f, p), step % 20 == 0);
    }
    snprintf(p, sizeof p, "%s/ckpt/step_00000060", f.run);
    assert_int_equal(lsa_ckpt_older(dir, f.run, p, NULL), LSA_OK);
    assert_non_null(strstr(dir, "step_00000040"));
    assert_int_equal(lsa_ckpt_older(dir, f.run, "step_00000020", NULL), LSA_OK);
    assert_int_equal(dir[0], 0);
    unmake(&f);
}

/* A step that exists is replaced whole, and garbage of an interrupted save goes. */
static void test_again_over_garbage(void **s) {
    (void)s;
    fixture f = make("again");
    char p[LSA_PATH_MAX];
    lsa_ckpt c;
    save(&f, 5, false, 0);
    snprintf(p, sizeof p, "%s/ckpt/step_00000006.tmp", f.run);
    assert_int_equal(lsa_mkdirs(p, NULL), LSA_OK);
    snprintf(p, sizeof p, "%s/ckpt/step_00000006.tmp/model.safetensors", f.run);
    assert_int_equal(lsa_write_file(p, "half", 4, NULL), LSA_OK);
    f.p[0] = 42.0f;
    save(&f, 5, false, 0);
    assert_false(there(&f, "step_00000006.tmp"));
    assert_false(there(&f, "step_00000005.tmp"));
    assert_int_equal(lsa_ckpt_load(&c, f.run, true, NULL), LSA_OK);
    assert_true(c.params[0] == 42.0f);
    lsa_ckpt_fini(&c);
    unmake(&f);
}

static void test_non_finite_is_refused(void **s) {
    (void)s;
    fixture f = make("nan");
    lsa_err err = {0};
    f.v[7] = NAN;
    assert_int_equal(lsa_ckpt_save(f.run, 1, &f.g, f.p, f.m, f.v, f.state, false, 0, 0, &err), LSA_E_NUMERIC);
    assert_false(there(&f, "step_00000001") || there(&f, "latest"));
    unmake(&f);
}

static void test_import_has_no_moments(void **s) {
    (void)s;
    fixture f = make("import");
    lsa_ckpt c;
    lsa_err err = {0};
    assert_int_equal(lsa_ckpt_save(f.run, 0, &f.g, f.p, NULL, NULL, f.state, true, 0, 0, &err), LSA_OK);
    assert_int_equal(lsa_ckpt_load(&c, f.run, false, &err), LSA_OK);
    assert_null(c.m);
    lsa_ckpt_fini(&c);
    assert_int_equal(lsa_ckpt_load(&c, f.run, true, &err), LSA_E_FORMAT);
    assert_non_null(strstr(err.msg, "optimizer"));
    unmake(&f);
}

static void change_byte(const char *path, int64_t at, bool cut) {
    char *text;
    size_t n;
    assert_int_equal(lsa_read_file(&text, &n, path, NULL), LSA_OK);
    text[at < 0 ? (int64_t)n + at : at] ^= 1;
    assert_int_equal(lsa_write_file(path, text, cut ? n / 2 : n, NULL), LSA_OK);
    lsa_free(text);
}

static void test_damage(void **s) {
    (void)s;
    const struct {
        const char *file;
        int64_t at;
        bool cut;
        const char *says;
    } bad[] = {{"model.safetensors", -3, false, "hash"}, {"model.safetensors", -3, true, "bytes"},
               {"optim.safetensors", -3, false, "hash"}, {"state.json", 4, false, "hash"},
               {"MANIFEST.json", 0, false, "JSON"},      {"MANIFEST.json", 5, true, "JSON"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char name[16], path[LSA_PATH_MAX];
        lsa_ckpt c;
        lsa_err err = {0};
        snprintf(name, sizeof name, "bad%zu", i);
        fixture f = make(name);
        save(&f, 9, false, 0);
        snprintf(path, sizeof path, "%s/ckpt/step_00000009/%s", f.run, bad[i].file);
        change_byte(path, bad[i].at, bad[i].cut);
        assert_int_equal(lsa_ckpt_load(&c, f.run, true, &err), LSA_E_FORMAT);
        if (!strstr(err.msg, bad[i].says)) fail_msg("case %zu says: %s", i, err.msg);
        assert_null(c.params);
        unmake(&f);
    }
}

static void test_bad_pointer(void **s) {
    (void)s;
    fixture f = make("pointer");
    const char *text[] = {"../../elsewhere\n", "step_1\n", "", "step_00000077\n", "step_00000009\nmore\n"};
    char path[LSA_PATH_MAX], dir[LSA_PATH_MAX];
    save(&f, 9, false, 0);
    snprintf(path, sizeof path, "%s/ckpt/latest", f.run);
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) {
        lsa_err err = {0};
        assert_int_equal(lsa_write_file(path, text[i], strlen(text[i]), NULL), LSA_OK);
        if (lsa_ckpt_resolve(dir, f.run, &err) != LSA_E_FORMAT) fail_msg("'%s' was accepted", text[i]);
    }
    lsa_err err = {0};
    assert_int_equal(lsa_ckpt_resolve(dir, g_dir, &err), LSA_E_FORMAT);
    assert_int_equal(lsa_ckpt_resolve(dir, "/nonexistent/run", NULL), LSA_E_IO);
    unmake(&f);
}

static void test_bad_geometry(void **s) {
    (void)s;
    lsa_indexer_geom g = geometry(), back;
    json_t *o = NULL;
    assert_int_equal(lsa_geom_to_json(&o, &g, NULL), LSA_OK);
    assert_int_equal(lsa_geom_from_json(&back, o, "test", NULL), LSA_OK);
    json_object_set_new(o, "n_head", json_integer(129));
    assert_int_equal(lsa_geom_from_json(&back, o, "test", NULL), LSA_E_FORMAT);
    json_object_set_new(o, "n_head", json_real(3.0));
    assert_int_equal(lsa_geom_from_json(&back, o, "test", NULL), LSA_E_FORMAT);
    json_object_set_new(o, "n_head", json_integer(3));
    json_array_clear(json_object_get(o, "layers"));
    assert_int_equal(lsa_geom_from_json(&back, o, "test", NULL), LSA_E_FORMAT);
    json_decref(o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_continuation),
        cmocka_unit_test(test_prior),
        cmocka_unit_test(test_equal_bytes),
        cmocka_unit_test(test_pointers_and_keep),
        cmocka_unit_test(test_milestones_and_older),
        cmocka_unit_test(test_again_over_garbage),
        cmocka_unit_test(test_non_finite_is_refused),
        cmocka_unit_test(test_import_has_no_moments),
        cmocka_unit_test(test_damage),
        cmocka_unit_test(test_bad_pointer),
        cmocka_unit_test(test_bad_geometry),
    };
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-ckpt-XXXXXX");
    if (!mkdtemp(g_dir)) return 1;
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
