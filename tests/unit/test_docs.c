/* Tokenised documents: every way of cutting, every input that must be refused, and the identity hash. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/docs.h"
#include "kernels/core/file.h"

static char g_dir[64] = "/tmp/lsa-docs.XXXXXX";

static const char *put(const char *name, const void *data, size_t n) {
    static char path[64][128];
    static int turn;
    char *p = path[turn++ % 64];
    snprintf(p, sizeof path[0], "%s/%s", g_dir, name);
    assert_int_equal(lsa_write_file(p, data, n, NULL), LSA_OK);
    return p;
}
#define PUT_U16(name, ...)   put(name, (const uint16_t[]){__VA_ARGS__}, sizeof((const uint16_t[]){__VA_ARGS__}))
#define PUT_TEXT(name, text) put(name, text, strlen(text))

static lsa_docs *open_ok(const char *tokens, const char *needs, const char *range) {
    lsa_docs *d = NULL;
    lsa_err err = {0};
    if (lsa_docs_open(&d, tokens, needs, range, 0, &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_non_null(d);
    return d;
}
/* Fails with this code, and the message holds `text`. */
static void refuse(const char *tokens, const char *needs, const char *range, int64_t vocab, lsa_status code,
                   const char *text) {
    lsa_docs *d = (lsa_docs *)1;
    lsa_err err = {0};
    assert_int_equal(lsa_docs_open(&d, tokens, needs, range, vocab, &err), code);
    assert_null(d);
    if (!strstr(err.msg, text)) fail_msg("'%s' does not hold '%s'", err.msg, text);
}
static void check(const lsa_docs *d, int64_t i, int64_t index, int64_t n, int32_t first, int32_t last) {
    const lsa_doc *x = lsa_docs_at(d, i);
    assert_non_null(x);
    assert_int_equal(x->index, index);
    assert_int_equal(x->n_token, n);
    assert_int_equal(x->token[0], first);
    assert_int_equal(x->token[n - 1], last);
}

static void test_cut_by_zero(void **s) {
    (void)s;
    const char *p = PUT_U16("a.u16", 0, 5, 6, 0, 7, 0, 65535);
    lsa_docs *d = open_ok(p, NULL, NULL);
    assert_int_equal(lsa_docs_count(d), 3);
    assert_int_equal(lsa_docs_tokens(d), 7);
    check(d, 0, 0, 3, 0, 6);
    check(d, 1, 1, 2, 0, 7);
    check(d, 2, 2, 2, 0, 65535);
    assert_string_equal(lsa_docs_at(d, 1)->name, "a.u16:1");
    assert_false(lsa_docs_at(d, 0)->has_needs);
    assert_null(lsa_docs_at(d, 3));
    assert_null(lsa_docs_at(d, -1));
    lsa_docs_close(d);
    d = open_ok(PUT_U16("b.u16", 9, 8, 7), NULL, NULL); /* no id 0: one document */
    assert_int_equal(lsa_docs_count(d), 1);
    check(d, 0, 0, 3, 9, 7);
    lsa_docs_close(d);
    d = open_ok(PUT_U16("c.u16", 9, 8, 0, 7), NULL,
                NULL); /* what stands before the first id 0 is a document too */
    assert_int_equal(lsa_docs_count(d), 2);
    check(d, 1, 1, 2, 0, 7);
    lsa_docs_close(d);
    const uint32_t wide[] = {0, 70000, 0, 3};
    d = open_ok(put("d.u32", wide, sizeof wide), NULL, NULL);
    assert_int_equal(lsa_docs_count(d), 2);
    check(d, 0, 0, 2, 0, 70000);
    lsa_docs_close(d);
}

static void test_range(void **s) {
    (void)s;
    const char *p = PUT_U16("r.u16", 0, 1, 0, 2, 0, 3);
    const struct {
        const char *range;
        int64_t first, count;
    } ok[] = {{"0:3", 0, 3}, {"1:2", 1, 1}, {":2", 0, 2}, {"1:", 1, 2}, {":", 0, 3}};
    for (size_t i = 0; i < sizeof ok / sizeof *ok; i++) {
        lsa_docs *d = open_ok(p, NULL, ok[i].range);
        assert_int_equal(lsa_docs_count(d), ok[i].count);
        assert_int_equal(lsa_docs_at(d, 0)->index, ok[i].first);
        assert_int_equal(lsa_docs_tokens(d), 2 * ok[i].count);
        lsa_docs_close(d);
    }
    const char *const bad[] = {
        "2:2", "2:1", "0:4", "3:", "1", "", "a:b", "1:2:3", "-1:2", "0:99999999999999999999", " :"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refuse(p, NULL, bad[i], 0, LSA_E_ARG, "--documents");
}

static void test_needs(void **s) {
    (void)s;
    /* id 0 inside documents: with an index it must not cut */
    const char *p = PUT_U16("n.u16", 4, 0, 6, 7, 8, 0, 10, 11, 12, 13);
    const char *j = PUT_TEXT(
        "n.jsonl",
        "{\"document\":0,\"start\":0,\"tokens\":6,\"facts\":[[0,5],[1,2]],\"replays\":[[0,4,2],[1,2,2]]}\n"
        "\n{\"start\":6,\"tokens\":4,\"facts\":[],\"replays\":[]}\n");
    lsa_docs *d = open_ok(p, j, NULL);
    assert_int_equal(lsa_docs_count(d), 2);
    check(d, 0, 0, 6, 4, 0);
    check(d, 1, 1, 4, 10, 13);
    const lsa_doc *x = lsa_docs_at(d, 0);
    assert_true(x->has_needs);
    assert_int_equal(x->n_fact, 2);
    assert_int_equal(x->fact[0].question, 2); /* ascending by question */
    assert_int_equal(x->fact[0].statement, 1);
    assert_int_equal(x->fact[1].question, 5);
    assert_int_equal(x->n_replay, 2);
    assert_int_equal(x->replay[0].dest, 2);
    assert_int_equal(x->replay[1].len, 2);
    assert_int_equal(lsa_docs_at(d, 1)->n_fact, 0);
    lsa_docs_close(d);
}

static void test_wrong_needs(void **s) {
    (void)s;
    const char *p = PUT_U16("w.u16", 0, 1, 2, 3);
    const struct {
        const char *text, *says;
    } bad[] = {
        {"{\"start\":0,\"tokens\":5,\"facts\":[],\"replays\":[]}", "another file"},
        {"{\"start\":4,\"tokens\":1,\"facts\":[],\"replays\":[]}", "another file"},
        {"{\"start\":-1,\"tokens\":2,\"facts\":[],\"replays\":[]}", "another file"},
        {"{\"start\":9223372036854775807,\"tokens\":9223372036854775807,\"facts\":[],\"replays\":[]}",
         "another file"},
        {"{\"start\":0,\"tokens\":0,\"facts\":[],\"replays\":[]}", "empty"},
        {"{\"start\":0,\"tokens\":4,\"facts\":[[1]],\"replays\":[]}", "2 numbers"},
        {"{\"start\":0,\"tokens\":4,\"facts\":[[1,5]],\"replays\":[]}", "offset in [0, 4]"},
        {"{\"start\":0,\"tokens\":4,\"facts\":[[1,\"2\"]],\"replays\":[]}", "offset in [0, 4]"},
        {"{\"start\":0,\"tokens\":4,\"facts\":[],\"replays\":[[0,1]]}", "3 numbers"},
        {"{\"start\":0,\"tokens\":4,\"facts\":[]}", "'replays' is missing"},
        {"{\"start\":\"0\",\"tokens\":4}", "'start' must be an integer"},
        {"{\"tokens\":4}", "'start' is missing"},
        {"[1,2]", "expected an object"},
        {"{\"start\":0,", "not valid JSON"},
        {"", "no documents"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *j = PUT_TEXT("w.jsonl", bad[i].text);
        refuse(p, j, NULL, 0, LSA_E_FORMAT, bad[i].says);
    }
    refuse(p, put("zero.jsonl", "{}\n\0{}\n", 7), NULL, 0, LSA_E_FORMAT, "zero byte");
}

static void test_jsonl(void **s) {
    (void)s;
    const char *p = PUT_TEXT("t.jsonl", "{\"tokens\":[5,0,7],\"name\":\"first\"}\n  \n{\"tokens\":[9]}\n");
    lsa_docs *d = open_ok(p, NULL, NULL);
    assert_int_equal(lsa_docs_count(d), 2);
    check(d, 0, 0, 3, 5, 7);
    check(d, 1, 1, 1, 9, 9);
    assert_string_equal(lsa_docs_at(d, 0)->name, "first");
    assert_string_equal(lsa_docs_at(d, 1)->name, "t.jsonl:1");
    lsa_docs_close(d);
    refuse(PUT_TEXT("e.jsonl", "{\"tokens\":[1]}\n{\"tokens\":[]}\n"), NULL, NULL, 0, LSA_E_FORMAT,
           "document 1 is empty");
    refuse(PUT_TEXT("e.jsonl", "{\"tokens\":[1,-1]}\n"), NULL, NULL, 0, LSA_E_FORMAT, "tokens[1]");
    refuse(PUT_TEXT("e.jsonl", "{\"tokens\":[1,2.5]}\n"), NULL, NULL, 0, LSA_E_FORMAT, "tokens[1]");
    refuse(PUT_TEXT("e.jsonl", "{\"ids\":[1]}\n"), NULL, NULL, 0, LSA_E_FORMAT, "'tokens' is missing");
    refuse(PUT_TEXT("e.jsonl", "\n"), NULL, NULL, 0, LSA_E_FORMAT, "no documents");
    refuse(p, p, NULL, 0, LSA_E_ARG, "--needs");
    refuse(p, NULL, NULL, 9, LSA_E_FORMAT, "token 0 is 9");
}

/* Many lines: the token array grows while earlier documents are already known. */
static void test_long_jsonl(void **s) {
    (void)s;
    char *text = calloc(1, 4000 * 64), *at = text;
    for (int i = 0; i < 4000; i++) at += sprintf(at, "{\"tokens\":[%d,%d,%d]}\n", i, i + 1, i + 2);
    lsa_docs *d = open_ok(put("long.jsonl", text, (size_t)(at - text)), NULL, NULL);
    assert_int_equal(lsa_docs_count(d), 4000);
    for (int i = 0; i < 4000; i++) check(d, i, i, 3, i, i + 2);
    lsa_docs_close(d);
    free(text);
}

static void test_bad_files(void **s) {
    (void)s;
    refuse(put("odd.u16", "\1\0\2", 3), NULL, NULL, 0, LSA_E_FORMAT, "truncated");
    refuse(put("odd.u32", "\1\0\0\0\2\0", 6), NULL, NULL, 0, LSA_E_FORMAT, "truncated");
    refuse(put("none.u16", "", 0), NULL, NULL, 0, LSA_E_FORMAT, "no tokens");
    refuse(put("big.u32", "\377\377\377\377", 4), NULL, NULL, 0, LSA_E_FORMAT, "not an id");
    refuse("/nonexistent/x.u16", NULL, NULL, 0, LSA_E_IO, "/nonexistent/x.u16");
    const char *p = PUT_U16("v.u16", 0, 63, 0, 64);
    refuse(p, "/nonexistent/x.jsonl", NULL, 0, LSA_E_IO, "/nonexistent/x.jsonl");
    refuse(p, NULL, NULL, 64, LSA_E_FORMAT, "document 1, token 1 is 64");
    lsa_docs *d = NULL;
    assert_int_equal(lsa_docs_open(&d, p, NULL, "0:1", 64, NULL),
                     LSA_OK); /* outside the range nothing is judged */
    lsa_docs_close(d);
}

/* The hash tells tokens, boundaries and range apart, and nothing else. */
static void test_hash(void **s) {
    (void)s;
    lsa_docs *d[6] = {open_ok(PUT_U16("h1.u16", 0, 1, 2, 0, 3), NULL, NULL),
                      open_ok(PUT_U16("h2.u16", 0, 1, 2, 0, 3), NULL, NULL),
                      open_ok(PUT_U16("h3.u16", 0, 1, 2, 0, 4), NULL, NULL),
                      open_ok(PUT_U16("h4.u16", 0, 1, 0, 2, 3), NULL, NULL),
                      open_ok(PUT_U16("h5.u16", 0, 1, 2, 0, 3), NULL, "0:1"),
                      open_ok(PUT_U16("h6.u16", 0, 1, 2), NULL, NULL)};
    uint64_t h[6];
    for (int i = 0; i < 6; i++) h[i] = lsa_docs_hash(d[i]);
    assert_true(h[0] == h[1]);
    assert_true(h[4] == h[5]);
    assert_true(h[0] != h[2] && h[0] != h[3] && h[0] != h[4] && h[2] != h[3]);
    for (int i = 0; i < 6; i++) lsa_docs_close(d[i]);
    lsa_docs_close(NULL);
}

static int setup(void **s) {
    (void)s;
    return mkdtemp(g_dir) ? 0 : -1;
}
static int teardown(void **s) {
    (void)s;
    return lsa_remove_tree(g_dir, NULL) == LSA_OK ? 0 : -1;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cut_by_zero), cmocka_unit_test(test_range),
                                       cmocka_unit_test(test_needs),       cmocka_unit_test(test_wrong_needs),
                                       cmocka_unit_test(test_jsonl),       cmocka_unit_test(test_long_jsonl),
                                       cmocka_unit_test(test_bad_files),   cmocka_unit_test(test_hash)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
