/* Safetensors: what is written is read; every lie of a header is refused, with the tensor's name, before a
 * byte is used. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/lsa_safetensors.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"

static char g_path[] = "/tmp/lsa-st-XXXXXX";

static void test_round_trip(void **state) {
    (void)state;
    lsa_err err = {0};
    lsa_st *s = NULL;
    const float a[6] = {1, -2, 3, 4, 5, 6};
    const uint16_t b[2] = {0x3f80, 0xc000};
    const uint8_t k[3] = {7, 8, 9};
    const lsa_st_entry e[] = {{"z.weight", LSA_F32, 2, {2, 3}, a},
                              {"b", LSA_BF16, 1, {2}, b},
                              {"empty", LSA_F32, 2, {0, 4}, a},
                              {"k", LSA_U8, 1, {3}, k}};
    const char *meta[] = {"who", "a \"quoted\" \\ name\n", NULL};
    assert_int_equal(lsa_st_save(g_path, e, 4, meta, &err), LSA_OK);
    assert_int_equal(lsa_st_open(&s, g_path, &err), LSA_OK);
    assert_int_equal(lsa_st_count(s), 4);
    assert_string_equal(lsa_st_metadata(s, "who"), meta[1]);
    assert_null(lsa_st_metadata(s, "nobody"));
    const lsa_st_tensor *t = lsa_st_find(s, "z.weight");
    float f[6];
    assert_non_null(t);
    assert_memory_equal(t->data, a, sizeof a);
    assert_int_equal((uintptr_t)t->data % 8, 0);
    t = lsa_st_find(s, "b");
    assert_int_equal(lsa_st_to_f32(f, t, &err), LSA_OK);
    assert_true(f[0] == 1 && f[1] == -2);
    assert_null(lsa_st_find(s, "c"));
    assert_int_equal(lsa_st_need(&t, s, "z.weight", LSA_F32, 2, (int64_t[]){2, -1}, &err), LSA_OK);
    assert_int_equal(lsa_st_need(&t, s, "z.weight", LSA_F32, 2, (int64_t[]){3, 3}, &err), LSA_E_FORMAT);
    assert_non_null(strstr(err.msg, "z.weight"));
    err = (lsa_err){0};
    assert_int_equal(lsa_st_need(&t, s, "z.weight", LSA_BF16, 2, (int64_t[]){2, 3}, &err), LSA_E_FORMAT);
    err = (lsa_err){0};
    assert_int_equal(lsa_st_need(&t, s, "gone", LSA_F32, 1, (int64_t[]){1}, &err), LSA_E_FORMAT);
    assert_non_null(strstr(err.msg, "gone"));
    lsa_st_close(s);
    char *one = NULL, *two = NULL; /* equal input, equal bytes */
    size_t n1, n2;
    assert_int_equal(lsa_read_file(&one, &n1, g_path, NULL), LSA_OK);
    assert_int_equal(lsa_st_save(g_path, e, 4, meta, &err), LSA_OK);
    assert_int_equal(lsa_read_file(&two, &n2, g_path, NULL), LSA_OK);
    assert_int_equal(n1, n2);
    assert_memory_equal(one, two, n1);
    lsa_free(one), lsa_free(two);
}

/* A file of the given header and `body` zero bytes; stated overrides the header's length. */
static void refuse(const char *header, size_t body, int64_t stated, const char *text) {
    lsa_err err = {0};
    lsa_st *s = NULL;
    const size_t n = strlen(header), all = 8 + n + body;
    char *p = calloc(1, all);
    const uint64_t len = stated >= 0 ? (uint64_t)stated : (uint64_t)n;
    assert_non_null(p);
    memcpy(p, &len, 8);
    memcpy(p + 8, header, n);
    const lsa_status st = lsa_st_open_memory(&s, p, all, "lie", &err);
    if (st != LSA_E_FORMAT || !strstr(err.msg, text))
        fail_msg("%.60s: %s, '%s' does not hold '%s'", header, lsa_status_name(st), err.msg, text);
    assert_null(s);
    free(p);
}

static void test_lies(void **state) {
    (void)state;
    refuse("{}", 0, INT64_MAX, "lie");
    refuse("{}", 0, 3, "lie");
    refuse("{\"a\":", 0, -1, "lie");
    refuse("[1]", 0, -1, "lie");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 8, -1, "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,16]}}", 8, -1, "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 8, -1, "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, -1, "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 8, -1, "a");
    refuse("{\"a\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, -1, "F33");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, -1, "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 8, -1,
           "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2,1,1,1,1,1,1,1,1],\"data_offsets\":[0,8]}}", 8, -1, "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":\"2\",\"data_offsets\":[0,8]}}", 8, -1, "a");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, -1, "a");
    refuse(
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}",
        8, -1, "b");
    refuse(
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
        8, -1, "a");
    lsa_st *s = NULL;
    lsa_err err = {0};
    assert_int_equal(lsa_st_open_memory(&s, "abc", 3, "short", &err), LSA_E_FORMAT);
    err = (lsa_err){0};
    assert_int_equal(lsa_st_open(&s, "/nowhere/x.safetensors", &err), LSA_E_IO);
    assert_non_null(strstr(err.msg, "x.safetensors"));
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_round_trip), cmocka_unit_test(test_lies)};
    const int fd = mkstemp(g_path);
    if (fd < 0) return 1;
    const int rc = cmocka_run_group_tests(t, NULL, NULL);
    if (lsa_remove_tree(g_path, NULL) != LSA_OK) return 1;
    return rc;
}
