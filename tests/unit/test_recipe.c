/* Recipes: defaults, file, overrides; every refusal names the key, the value and what is allowed; the written
 * form reads back as the same recipe. Also: every recipe in recipes/ loads and passes the checks across keys.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <glob.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "trainer/recipe_keys.h"

#define KEYS lsa_recipe_keys, lsa_recipe_n_key

static lsa_recipe parse(const char *text) {
    lsa_recipe r;
    lsa_err err = {0};
    if (lsa_recipe_parse(&r, KEYS, text, strlen(text), "test.yaml", &err) != LSA_OK) fail_msg("%s", err.msg);
    return r;
}

static void refused(const char *text, const char *says) {
    lsa_recipe r;
    lsa_err err = {0};
    if (lsa_recipe_parse(&r, KEYS, text, strlen(text), "test.yaml", &err) != LSA_E_CONFIG)
        fail_msg("accepted: %s", text);
    if (!strstr(err.msg, "test.yaml") || !strstr(err.msg, says))
        fail_msg("for '%s' the message is: %s", text, err.msg);
}

static void test_defaults_and_values(void **s) {
    (void)s;
    lsa_recipe d = parse("");
    assert_int_equal(d.mode, LSA_MODE_LOOKAHEAD);
    assert_int_equal(d.tau, 64);
    assert_int_equal(d.tail, 256);
    assert_int_equal(d.loss, LSA_LOSS_KL);
    assert_true(d.causal && d.exclude_resident);
    lsa_recipe r = parse(
        "# a comment\ntrain:\n  steps: 77   # here too\n  batch: '8'\nloss: {kind: focal, smoothing: 1e-2}\n"
        "optim:\n  lr: 3e-4\nsample:\n  causal: false\n");
    assert_int_equal(r.steps, 77);
    assert_int_equal(r.batch, 8);
    assert_int_equal(r.loss, LSA_LOSS_FOCAL);
    assert_true(r.smoothing == 0.01 && r.lr == 3e-4 && !r.causal);
}

static void test_refusals(void **s) {
    (void)s;
    refused("train:\n  stesp: 5\n", "did you mean 'train.steps'");
    refused("trian:\n  steps: 5\n", "unknown key 'trian'");
    refused("loss:\n  lr: 1\n", "optim.lr");
    refused("train:\n  steps: 1e3\n", "train.steps must be an integer");
    refused("train:\n  steps: 10.5\n", "integer");
    refused("train:\n  steps: 12abc\n", "12abc");
    refused("train:\n  steps: 0\n", "[1,");
    refused("train:\n  steps: 99999999999999999999\n", "integer");
    refused("train:\n  steps: ''\n", "integer");
    refused("optim:\n  lr: nan\n", "number in");
    refused("optim:\n  lr: -1\n", "number in");
    refused("optim:\n  beta1: 1\n", "optim.beta1");
    refused("loss:\n  kind: klx\n", "kl|bce|focal|bpr|margin");
    refused("loss:\n  kind: k\n", "kl|bce|focal|bpr|margin");
    refused("sample:\n  causal: maybe\n", "true or false");
    refused("train:\n  steps: [1, 2]\n", "not a valid recipe");
    refused("train: 5\n", "not a valid recipe");
    refused("train:\n  steps: 5\n bad indent: {\n", "not a valid recipe");
    refused("- a\n- b\n", "not a valid recipe");
}

static void test_overrides(void **s) {
    (void)s;
    lsa_recipe r;
    lsa_err err = {0};
    const char *good[] = {"train.steps=5", "optim.lr=1e-5", "train.steps=6", "train.trace=/tmp/a=b"};
    assert_int_equal(lsa_recipe_load(&r, KEYS, NULL, good, 4, &err), LSA_OK);
    assert_int_equal(r.steps, 6); /* the last one wins */
    assert_true(r.lr == 1e-5);
    assert_string_equal(r.trace, "/tmp/a=b");
    const char *bad[] = {"train.steps", "train.stesp=4", "train.steps=4x", "steps=4", "=4", "train.steps="};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        err = (lsa_err){0};
        if (lsa_recipe_load(&r, KEYS, NULL, &bad[i], 1, &err) != LSA_E_CONFIG)
            fail_msg("accepted --set %s", bad[i]);
    }
    err = (lsa_err){0};
    assert_int_equal(lsa_recipe_load(&r, KEYS, "/nonexistent.yaml", NULL, 0, &err), LSA_E_IO);
}

static void same(const lsa_recipe *a, const lsa_recipe *b) {
    json_t *x = lsa_recipe_json(a, KEYS), *y = lsa_recipe_json(b, KEYS);
    assert_true(json_equal(x, y));
    assert_int_equal(json_object_size(x), lsa_recipe_n_key);
    json_decref(x);
    json_decref(y);
}

static void test_round_trip(void **s) {
    (void)s;
    lsa_recipe
        r = parse(
            "optim:\n  lr: 0.0012345678901234567\n  eps: 3.3e-9\nmodel:\n  layers: 0,2\ntrain:\n  trace: 'x: y #z'\n"),
        b;
    for (int help = 0; help < 2; help++) {
        char *text = NULL;
        assert_int_equal(lsa_recipe_text(&text, &r, KEYS, help, NULL), LSA_OK);
        b = parse(text);
        same(&r, &b);
        assert_true(b.lr == r.lr && b.eps == r.eps);
        assert_string_equal(b.trace, "x: y #z");
        lsa_free(text);
    }
    json_t *o = lsa_recipe_json(&r, KEYS);
    assert_int_equal(lsa_recipe_from_json(&b, KEYS, o, "state", NULL), LSA_OK);
    same(&r, &b);
    json_object_set_new(o, "train.unheard", json_string("1"));
    assert_int_not_equal(lsa_recipe_from_json(&b, KEYS, o, "state", NULL), LSA_OK);
    json_decref(o);
}

/* Found by fuzzing: text that means something in YAML, or cannot be written in one line of it. */
static void test_awkward_text(void **state) {
    (void)state;
    static const char *const text[] = {"99:\\", "it's", "'",   "''",     " a ",   "# no comment", "~",
                                       "null",  "...",  "---", "{a: b}", "\"q\"", "a: b",         "%x",
                                       "&a",    "*a",   "!t",  "|",      "-",     "x\\n"};
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) {
        lsa_recipe a, b;
        lsa_err err = {0};
        char set[64], *yaml = NULL;
        snprintf(set, sizeof set, "train.trace=%s", text[i]);
        const char *const sets[] = {set};
        if (lsa_recipe_load(&a, lsa_recipe_keys, lsa_recipe_n_key, NULL, sets, 1, &err) != LSA_OK ||
            lsa_recipe_text(&yaml, &a, lsa_recipe_keys, lsa_recipe_n_key, i % 2, &err) != LSA_OK ||
            lsa_recipe_parse(&b, lsa_recipe_keys, lsa_recipe_n_key, yaml, strlen(yaml), "again", &err) !=
                LSA_OK)
            fail_msg("%s: %s", text[i], err.msg);
        assert_string_equal(b.trace, text[i]);
        lsa_free(yaml);
    }
    const char *const newline[] = {"train.trace=a\nb"};
    lsa_recipe r;
    assert_int_equal(lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, NULL, newline, 1, NULL),
                     LSA_E_CONFIG);
}

static void test_shipped_recipes(void **s) {
    (void)s;
    glob_t g;
    assert_int_equal(glob("recipes/*.yaml", 0, NULL, &g), 0);
    assert_true(g.gl_pathc >= 4);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        lsa_recipe r;
        lsa_err err = {0};
        if (lsa_recipe_load(&r, KEYS, g.gl_pathv[i], NULL, 0, &err) != LSA_OK ||
            lsa_recipe_check(&r, &err) != LSA_OK)
            fail_msg("%s: %s", g.gl_pathv[i], err.msg);
    }
    globfree(&g);
}

static void test_checks_across_keys(void **s) {
    (void)s;
    const char *bad[] = {"train: {mode: reference}\n", "sample: {causal: false}\n", "loss: {kind: bpr}\n",
                         "optim: {min_lr: 1, lr: 0.1}\n"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        lsa_recipe r = parse(bad[i]);
        lsa_err err = {0};
        if (lsa_recipe_check(&r, &err) != LSA_E_CONFIG) fail_msg("accepted: %s", bad[i]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults_and_values), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_overrides),           cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_awkward_text),        cmocka_unit_test(test_shipped_recipes),
        cmocka_unit_test(test_checks_across_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
