/* The base: the first error wins, exit codes, checked sizes, files that are whole or absent, locks, strict
 * JSON. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/json.h"
#include "kernels/core/lsa_status.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

static char g_dir[] = "/tmp/lsa-core-XXXXXX";
static const char *in_dir(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", g_dir, name);
    return path;
}

static void test_errors(void **s) {
    (void)s;
    lsa_err err = {0};
    errno = ENOENT;
    assert_int_equal(lsa_err_set(&err, LSA_E_IO, "a.c", 1, "first %d", 1), LSA_E_IO);
    assert_int_equal(err.sys, ENOENT);
    assert_int_equal(lsa_err_set(&err, LSA_E_BUG, "b.c", 2, "second"), LSA_E_BUG);
    assert_string_equal(err.msg, "first 1");
    assert_int_equal(err.code, LSA_E_IO);
    lsa_err_wrap(&err, "epoch %d", 3);
    assert_string_equal(err.msg, "epoch 3: first 1");
    assert_int_equal(lsa_err_set(NULL, LSA_E_ARG, "c.c", 3, "nobody listens"), LSA_E_ARG);
    char longer[2000];
    memset(longer, 'x', sizeof longer);
    longer[1999] = 0;
    lsa_err_wrap(&err, "%s", longer);
    assert_true(strlen(err.msg) < sizeof err.msg);
    static const struct {
        lsa_status st;
        int code;
    } want[] = {{LSA_OK, 0},        {LSA_E_ARG, 2},    {LSA_E_CONFIG, 2},
                {LSA_E_FORMAT, 3},  {LSA_E_IO, 1},     {LSA_E_NOSPC, 4},
                {LSA_E_NOMEM, 4},   {LSA_E_DEVICE, 4}, {LSA_E_INTERRUPTED, 5},
                {LSA_E_NUMERIC, 6}, {LSA_E_BUG, 70}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        assert_int_equal(lsa_exit_code(want[i].st), want[i].code);
    assert_int_equal(lsa_status_from_errno(ENOSPC), LSA_E_NOSPC);
    assert_int_equal(lsa_status_from_errno(EFBIG), LSA_E_NOSPC);
    assert_int_equal(lsa_status_from_errno(EACCES), LSA_E_IO);
}

static void test_memory(void **s) {
    (void)s;
    lsa_err err = {0};
    int64_t *p = NULL, out;
    assert_int_equal(LSA_NEW(p, 1000, &err), LSA_OK);
    assert_int_equal((uintptr_t)p % 64, 0);
    for (int i = 0; i < 1000; i++) assert_int_equal(p[i], 0);
    lsa_free(p);
    assert_int_equal(LSA_NEW(p, INT64_MAX, &err), LSA_E_NOMEM);
    assert_null(p);
    assert_non_null(strstr(err.msg, "p"));
    assert_int_equal(LSA_NEW(p, -1, NULL), LSA_E_BUG);
    assert_false(lsa_mul_i64(INT64_MAX, 2, &out));
    assert_false(lsa_add_i64(INT64_MAX, 1, &out));
    assert_true(lsa_mul_i64(1 << 30, 4, &out) && out == INT64_C(1) << 32);
    LSA_VEC(int) v = {0};
    for (int i = 0; i < 1000; i++) {
        assert_int_equal(LSA_VEC_RESERVE(v, v.len + 1, NULL), LSA_OK);
        v.data[v.len++] = i;
    }
    for (int i = 0; i < 1000; i++) assert_int_equal(v.data[i], i);
    lsa_free(v.data);
}

static void test_files(void **s) {
    (void)s;
    lsa_err err = {0};
    char *text = NULL;
    size_t n;
    char path[256];
    snprintf(path, sizeof path, "%s", in_dir("a"));
    assert_int_equal(lsa_write_file(path, "old", 3, &err), LSA_OK);
    /* a full disk: the old content stays, nothing is left beside it */
    struct rlimit was, tight;
    getrlimit(RLIMIT_FSIZE, &was);
    tight = was;
    tight.rlim_cur = 10000;
    signal(SIGXFSZ, SIG_IGN);
    char *big = calloc(1, 100000);
    assert_non_null(big);
    setrlimit(RLIMIT_FSIZE, &tight);
    const lsa_status st = lsa_write_file(path, big, 100000, &err);
    setrlimit(RLIMIT_FSIZE, &was);
    assert_int_equal(st, LSA_E_NOSPC);
    assert_non_null(strstr(err.msg, path));
    free(big);
    assert_int_equal(lsa_read_file(&text, &n, path, NULL), LSA_OK);
    assert_int_equal(n, 3);
    assert_string_equal(text, "old");
    lsa_free(text);
    char tmp[300];
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    assert_false(lsa_exists(tmp));
    lsa_commit c;
    assert_int_equal(lsa_commit_begin(&c, path, NULL), LSA_OK);
    assert_int_equal(lsa_commit_write(&c, "new", 3, NULL), LSA_OK);
    assert_int_equal(lsa_read_file(&text, &n, path, NULL), LSA_OK);
    assert_string_equal(text, "old"); /* until the end */
    lsa_free(text);
    lsa_commit_abort(&c);
    assert_false(lsa_exists(tmp));
    err = (lsa_err){0};
    assert_int_equal(lsa_read_file(&text, &n, in_dir("none"), &err), LSA_E_IO);
    assert_non_null(strstr(err.msg, "none"));
    assert_int_equal(lsa_mkdirs(in_dir("x/y/z"), NULL), LSA_OK);
    assert_true(lsa_is_dir(in_dir("x/y")));
    assert_int_equal(lsa_write_file(in_dir("x/y/z/f"), "", 0, NULL), LSA_OK);
    assert_int_equal(lsa_remove_tree(in_dir("x"), NULL), LSA_OK);
    assert_false(lsa_exists(in_dir("x")));
    assert_int_equal(lsa_remove_tree(in_dir("x"), NULL), LSA_OK);
    lsa_map m;
    assert_int_equal(lsa_map_open(&m, path, NULL), LSA_OK);
    assert_memory_equal(m.data, "old", 3);
    lsa_map_close(&m);
    char buf[8];
    const int fd = open(path, O_RDONLY);
    err = (lsa_err){0};
    assert_int_equal(lsa_pread_all(fd, buf, 8, 0, "a file", &err),
                     LSA_E_FORMAT); /* shorter than it should be */
    assert_non_null(strstr(err.msg, "a file"));
    close(fd);
}

static void test_lock(void **s) {
    (void)s;
    int one = -1, two = -1;
    lsa_err err = {0};
    assert_int_equal(lsa_lock_dir(&one, g_dir, &err), LSA_OK);
    assert_int_not_equal(lsa_lock_dir(&two, g_dir, &err), LSA_OK);
    assert_non_null(strstr(err.msg, g_dir));
    lsa_unlock(one);
    assert_int_equal(lsa_lock_dir(&two, g_dir, NULL), LSA_OK);
    lsa_unlock(two);
}

static void test_json(void **s) {
    (void)s;
    json_t *o = NULL, *sub;
    lsa_err err = {0};
    int64_t i;
    double f;
    const char *text = "{\"a\": 3, \"f\": 2.5, \"s\": \"x\", \"l\": [1]}";
    assert_int_equal(lsa_json_parse(&o, text, strlen(text), "here", &err), LSA_OK);
    assert_int_equal(lsa_json_i64(&i, o, "a", "here", &err), LSA_OK);
    assert_int_equal(i, 3);
    assert_int_equal(lsa_json_f64(&f, o, "a", "here", &err), LSA_OK); /* an integer is a number */
    assert_int_equal(lsa_json_i64_or(&i, 9, o, "none", "here", &err), LSA_OK);
    assert_int_equal(i, 9);
    assert_int_equal(lsa_json_array(&sub, o, "l", "here", &err), LSA_OK);
    const lsa_status bad[] = {
        lsa_json_i64(&i, o, "f", "here", &err), lsa_json_i64(&i, o, "none", "here", NULL),
        lsa_json_i64_in(&i, 4, 9, o, "a", "here", NULL), lsa_json_object(&sub, o, "l", "here", NULL),
        lsa_json_i64_or(&i, 1, o, "s", "here", NULL)};
    for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) assert_int_equal(bad[k], LSA_E_FORMAT);
    assert_true(strstr(err.msg, "here") && strstr(err.msg, "f"));
    json_decref(o);
    static const char *const broken[] = {"", "{", "{\"a\": 1, \"a\": 2}", "{\"a\": 1} x"};
    for (size_t k = 0; k < sizeof broken / sizeof *broken; k++)
        assert_int_equal(lsa_json_parse(&o, broken[k], strlen(broken[k]), "broken", NULL), LSA_E_FORMAT);
    uint64_t h;
    char hex[17];
    lsa_hex64(hex, UINT64_C(0x0123456789abcdef));
    assert_string_equal(hex, "0123456789abcdef");
    assert_int_equal(lsa_unhex64(&h, hex, NULL), LSA_OK);
    assert_true(h == UINT64_C(0x0123456789abcdef));
    assert_int_equal(lsa_unhex64(&h, "0123456789abcdeg", NULL), LSA_E_FORMAT);
    assert_int_equal(lsa_unhex64(&h, "0123", NULL), LSA_E_FORMAT);
    assert_true(lsa_xxh64("", 0) ==
                UINT64_C(0xef46db3751d8e999)); /* the published value of the empty input */
    assert_true(lsa_crc32(lsa_crc32(0, "12345", 5), "6789", 4) ==
                0xcbf43926u); /* the published check value */
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_errors), cmocka_unit_test(test_memory),
                                   cmocka_unit_test(test_files), cmocka_unit_test(test_lock),
                                   cmocka_unit_test(test_json)};
    if (!mkdtemp(g_dir)) return 1;
    const int rc = cmocka_run_group_tests(t, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
