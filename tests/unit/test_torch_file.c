/* torch.save archives: what is written is read; no lie of the zip directory or of the pickle passes, nothing
 * in a pickle is ever run, and no prefix or flipped byte of a good file makes the reader step outside it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "data/torch_file.h"
#include "data/zip.h"
#include "kernels/core/file.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/memory_sink.h"

static const float g_x[6] = {1, -2, 3, 4, 5, 6};

static lsa_status emit_src(const lsa_tensor_out *t, lsa_sink *to, lsa_err *err) {
    return lsa_sink_put(to, t->src, (size_t)lsa_tensor_out_bytes(t), err);
}
static lsa_status emit_twin(const lsa_tensor_out *t, lsa_sink *to, lsa_err *err) {
    return emit_src(t, to, err);
}

static lsa_memory make_good(void) {
    static const uint16_t bf[4] = {0x3f80, 0xc000, 0, 0x4040};
    const lsa_tensor_out t[] = {{"a.weight", LSA_F32, 2, {2, 3}, emit_src, g_x, 0},
                                {"b", LSA_BF16, 1, {4}, emit_src, bf, 0},
                                {"l0.freqs_cis", LSA_C64, 2, {1, 3}, emit_twin, g_x, 0},
                                {"l1.freqs_cis", LSA_C64, 2, {1, 3}, emit_twin, g_x, 0}};
    lsa_memory m = {0};
    lsa_sink to = lsa_sink_memory(&m);
    lsa_err err = {0};
    if (lsa_torch_emit(&to, "indexer", t, 4, "{\"k\":\"v\"}", &err) != LSA_OK) fail_msg("%s", err.msg);
    return m;
}

static void test_round_trip(void **state) {
    (void)state;
    lsa_memory m = make_good(), again = make_good();
    lsa_torch *t = NULL;
    lsa_zip z;
    lsa_err err = {0};
    float x[8];
    size_t n;
    assert_int_equal(m.n, again.n);
    assert_memory_equal(m.data, again.data, m.n);
    if (lsa_torch_open_memory(&t, m.data, m.n, "good", &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_int_equal(lsa_torch_count(t), 4);
    const lsa_st_tensor *a = lsa_torch_find(t, "a.weight"), *b = lsa_torch_find(t, "b");
    assert_non_null(a), assert_non_null(b);
    assert_int_equal(a->n_dim, 2), assert_int_equal(a->shape[0], 2), assert_int_equal(a->shape[1], 3);
    assert_int_equal(lsa_torch_to_f32(x, t, a, &err), LSA_OK);
    assert_memory_equal(x, g_x, sizeof g_x);
    assert_int_equal(lsa_torch_to_f32(x, t, b, &err), LSA_OK);
    assert_true(x[0] == 1 && x[1] == -2 && x[2] == 0 && x[3] == 3);
    const char *note = lsa_torch_note(t, &n);
    assert_int_equal(n, 9), assert_memory_equal(note, "{\"k\":\"v\"}", 9);
    /* two tables, one storage; all data aligned for mapping */
    assert_ptr_equal(lsa_torch_find(t, "l0.freqs_cis")->data, lsa_torch_find(t, "l1.freqs_cis")->data);
    assert_int_equal(lsa_zip_open(&z, m.data, m.n, "good", &err), LSA_OK);
    assert_int_equal(z.n, 8);
    for (int64_t i = 0; i < z.n; i++) {
        assert_int_equal((z.entry[i].data - m.data) % 64, 0);
        assert_int_equal(lsa_zip_check(&z.entry[i], "good", &err), LSA_OK);
    }
    lsa_zip_close(&z);
    lsa_torch_close(t);
    free(m.data), free(again.data);
}

/* ---- pickles written by hand ---- */

#define TYPE    "ctorch\nFloatStorage\n"
#define REBUILD "ctorch._utils\n_rebuild_tensor_v2\n"
#define HOOKS   "ccollections\nOrderedDict\n)R"
#define STORAGE                                                                                              \
    "(X\7\0\0\0storage" TYPE "X\1\0\0\0"                                                                     \
    "0"                                                                                                      \
    "X\3\0\0\0"                                                                                              \
    "cpuK\6tQ"
#define TENSOR(offset, shape, stride) REBUILD "(" STORAGE offset shape stride "\x89" HOOKS "tR"
#define GOOD                          TENSOR("K\0", "K\2K\3\x86", "K\3K\1\x86")
#define DICT(x)                       "\x80\2}(" x "u."
#define A                             "X\1\0\0\0a"

static lsa_memory archive(const void *pickle, size_t n) {
    lsa_memory m = {0};
    lsa_sink to = lsa_sink_memory(&m);
    lsa_zip_out z = {.to = &to};
    lsa_err err = {0};
    if (lsa_zip_add_bytes(&z, "x/data.pkl", pickle, n, &err) != LSA_OK ||
        lsa_zip_add_bytes(&z, "x/data/0", g_x, sizeof g_x, &err) != LSA_OK || lsa_zip_end(&z, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    return m;
}

/* text NULL: must open, with `count` tensors. */
static void pickle(const void *p, size_t n, const char *text, int64_t count) {
    lsa_memory m = archive(p, n);
    lsa_torch *t = NULL;
    lsa_err err = {0};
    const lsa_status st = lsa_torch_open_memory(&t, m.data, m.n, "hand", &err);
    if (text && (st == LSA_OK || !strstr(err.msg, text)))
        fail_msg("%s: '%s' does not hold '%s'", lsa_status_name(st), err.msg, text);
    if (!text && st != LSA_OK) fail_msg("%s", err.msg);
    if (!text) assert_int_equal(lsa_torch_count(t), count);
    lsa_torch_close(t);
    free(m.data);
}
#define REFUSE(p, text)  pickle(p, sizeof(p) - 1, text, 0)
#define ACCEPT(p, count) pickle(p, sizeof(p) - 1, NULL, count)

static void test_pickles(void **state) {
    (void)state;
    ACCEPT(DICT(A GOOD), 1);
    ACCEPT("\x80\2" HOOKS "(" A GOOD "u}(X\1\0\0\0kNub.", 1); /* a state dict with attributes */
    ACCEPT(DICT(A GOOD "X\1\0\0\0eK\3"
                       "X\1\0\0\0fG\0\0\0\0\0\0\0\0"),
           1); /* other values are passed over */
    ACCEPT("\x80\2}(X\5\0\0\0epochK\3X\13\0\0\0model_state}(" A GOOD "uX\3\0\0\0opt}K\0]q\1K\1asu.", 1);
    ACCEPT(DICT(A TENSOR("K\0", "K\1K\6\x86", "M\xe7\3K\1\x86")),
           1); /* the stride of one row means nothing */
    ACCEPT(DICT(A TENSOR("K\4", "K\2\x85", "K\1\x85")), 1);
    /* nothing but tensors */
    REFUSE("\x80\2cos\nsystem\nX\2\0\0\0id\x85R.", "os.system");
    REFUSE("\x80\2cbuiltins\neval\nX\1\0\0\0"
           "1\x85R.",
           "builtins.eval");
    REFUSE("\x80\2ctorch\nload\n.", "torch.load");
    REFUSE("\x80\2ctorch._utils\n_rebuild_tensor_v3\n.", "_rebuild_tensor_v3");
    REFUSE("\x80\2i__main__\nX\n.", "0x69");
    REFUSE("\x80\2}\x81.", "0x81");
    REFUSE("\x80\4}.", "protocol 4");
    REFUSE("\x80\2" HOOKS "K\1\x85R.", "constructor");
    REFUSE("\x80\2K\1K\2\x85R.", "constructor");
    REFUSE("\x80\2c" A, "global");
    /* shapes and strides */
    REFUSE(DICT(A TENSOR("K\0", "K\3K\3\x86", "K\3K\1\x86")), "leave its storage");
    REFUSE(DICT(A TENSOR("K\1", "K\2K\3\x86", "K\3K\1\x86")), "leave its storage");
    REFUSE(DICT(A TENSOR("J\xff\xff\xff\xff", "K\2K\3\x86", "K\3K\1\x86")), "leave its storage");
    REFUSE(DICT(A TENSOR("K\0", "K\2K\3\x86", "K\1K\2\x86")), "contiguous"); /* transposed */
    REFUSE(DICT(A TENSOR("K\0", "K\2K\3\x86", "K\0K\1\x86")), "contiguous"); /* expanded: rows overlap */
    REFUSE(DICT(A TENSOR("K\0", "K\2K\3\x86", "K\2K\1\x86")), "contiguous"); /* overlapping */
    REFUSE(DICT(A TENSOR("K\0", "J\xff\xff\xff\xffK\3\x86", "K\3K\1\x86")), "not a count");
    REFUSE(DICT(A TENSOR("K\0", "K\2K\3\x86", "K\3\x85")), "strides");
    REFUSE(DICT(A TENSOR("K\0", "\x8a\10\0\0\0\0\0\0\0\x40\x8a\10\0\0\0\0\0\0\0\x40\x86",
                         "\x8a\10\0\0\0\0\0\0\0\x40K\1\x86")),
           "overflows");
    REFUSE(DICT(A TENSOR("K\0", "(K\1K\1K\1K\1K\1K\1K\1K\1K\1t", "(K\1K\1K\1K\1K\1K\1K\1K\1K\1t")),
           "dimensions");
    REFUSE(DICT(A REBUILD "(" STORAGE "K\0tR"), "wrong arguments");
    REFUSE(DICT(A REBUILD "(K\1K\0)) \x89" HOOKS "tR"), "");
    /* storages */
    REFUSE(DICT(A REBUILD "((X\7\0\0\0storage" TYPE "X\1\0\0\0"
                          "9X\3\0\0\0cpuK\6tQK\0K\6\x85K\1\x85\x89" HOOKS "tR"),
           "no storage");
    REFUSE(DICT(A REBUILD "((X\7\0\0\0storage" TYPE "X\1\0\0\0"
                          "0X\3\0\0\0cpuK\7tQK\0K\6\x85K\1\x85\x89" HOOKS "tR"),
           "24 bytes");
    REFUSE(DICT(A REBUILD "((X\7\0\0\0storage" TYPE "X\5\0\0\0../up"
                          "X\3\0\0\0cpuK\6tQK\0K\6\x85K\1\x85\x89" HOOKS "tR"),
           "usable key");
    REFUSE(DICT(A "X\6\0\0\0moduleQ"), "storage");
    REFUSE(DICT(A "(X\7\0\0\0storage" TYPE "X\1\0\0\0"
                  "0X\3\0\0\0cpuJ\xff\xff\xff\xfftQ"),
           "storage");
    /* structure */
    REFUSE(DICT(A GOOD A GOOD), "twice");
    REFUSE(DICT("K\1" GOOD), "not a name");
    REFUSE(DICT("X\0\0\0\0" GOOD), "not a name");
    REFUSE(DICT(A), "dict");
    REFUSE("\x80\2}.", "no tensor");
    REFUSE("\x80\2]" GOOD "a.", "dict of tensors");
    REFUSE("\x80\2" GOOD ".", "dict of tensors");
    REFUSE("\x80\2.", "one value");
    REFUSE("\x80\2}}.", "one value");
    REFUSE("\x80\2(.", "dict of tensors");
    REFUSE("\x80\2}a.", "not a list");
    REFUSE("\x80\2a.", "empty stack");
    REFUSE("\x80\2(\x85.", "mark");
    REFUSE("\x80\2}t.", "never opened");
    REFUSE("\x80\2h\5.", "never kept");
    REFUSE("\x80\2}r\xff\xff\xff\x7f.", "numbers a value wrongly");
    REFUSE("\x80\2X\xff\xff\xff\x7f"
           "a",
           "truncated");
    REFUSE("\x80\2\x8a\xff", "255 bytes");
    REFUSE("\x80\2K\1}b.", "attributes");
    REFUSE("", "truncated");
    const char whole[] = DICT(A GOOD);
    for (size_t n = 0; n < sizeof whole - 1; n++) pickle(whole, n, "hand: ", 0);
}

/* A million lists, one in the other, and a list in itself: a matter of memory, not of stack. */
static void test_nesting(void **state) {
    (void)state;
    const size_t deep = 1000000;
    char *p = malloc(2 * deep + 3);
    assert_non_null(p);
    memcpy(p, "\x80\2", 2);
    memset(p + 2, ']', deep);
    memset(p + 2 + deep, 'a', deep);
    p[1 + 2 * deep] = '.';
    pickle(p, 2 * deep + 2, "dict of tensors", 0);
    free(p);
    ACCEPT(DICT(A GOOD "X\1\0\0\0s]q\1h\1a"), 1);
    REFUSE("\x80\2}q\1(X\13\0\0\0model_stateh\1u.", "no tensor");
}

/* ---- damaged archives ---- */

/* Opens and reads everything; true if all of it passed. */
static bool read_all(const unsigned char *p, size_t n) {
    lsa_torch *t = NULL;
    lsa_err err = {0};
    float x[8];
    if (lsa_torch_open_memory(&t, p, n, "damaged", &err) != LSA_OK) {
        assert_true(err.msg[0] != 0);
        return false;
    }
    bool ok = true;
    for (int64_t i = 0; i < lsa_torch_count(t); i++) {
        const lsa_st_tensor *e = lsa_torch_at(t, i);
        if (e->dtype != LSA_C64 && e->n_elem <= 8) ok = lsa_torch_to_f32(x, t, e, NULL) == LSA_OK && ok;
    }
    lsa_torch_close(t);
    return ok;
}

static size_t find(const lsa_memory *m, const void *what, size_t n, int skip) {
    for (size_t i = 0; i + n <= m->n; i++)
        if (!memcmp(m->data + i, what, n) && skip-- == 0) return i;
    fail_msg("pattern not found");
    return 0;
}

static void damaged(size_t at_of_central, size_t field, unsigned char value, const char *text) {
    lsa_memory m = make_good();
    lsa_torch *t = NULL;
    lsa_err err = {0};
    m.data[find(&m, "PK\1\2", 4, (int)at_of_central) + field] = value;
    const lsa_status st = lsa_torch_open_memory(&t, m.data, m.n, "damaged", &err);
    if (st == LSA_OK || !strstr(err.msg, text))
        fail_msg("field %zu: '%s' does not hold '%s'", field, err.msg, text);
    free(m.data);
}

static void test_archives(void **state) {
    (void)state;
    lsa_memory m = make_good();
    for (size_t n = 0; n < m.n; n++) /* every prefix, from memory of exactly that size */
        if (n < 300 || n % 7 == 0 || n + 300 > m.n) {
            unsigned char *cut = malloc(n + 1);
            assert_non_null(cut);
            memcpy(cut, m.data, n);
            assert_false(read_all(cut, n));
            free(cut);
        }
    for (size_t i = 0; i < m.n; i++) /* every byte; some do not matter (dates, padding) */
        for (int k = 0; k < 3; k++) {
            const unsigned char flip[] = {1, 0x80, 0xff};
            m.data[i] ^= flip[k];
            (void)read_all(m.data, m.n);
            m.data[i] ^= flip[k];
        }
    assert_true(read_all(m.data, m.n));
    const size_t x = find(&m, g_x, sizeof g_x, 0);
    m.data[x] ^= 1; /* a value changed */
    assert_false(read_all(m.data, m.n));
    m.data[x] ^= 1;
    m.data[find(&m, "little", 6, 0)] = 'b';
    assert_false(read_all(m.data, m.n));
    free(m.data);
    damaged(0, 16, 0x77, "CRC");          /* of data.pkl */
    damaged(0, 10, 8, "compressed");      /* deflate */
    damaged(0, 8, 1, "encrypted");        /* flag */
    damaged(0, 20, 1, "sizes do not");    /* compressed size */
    damaged(1, 45, 0x7f, "local header"); /* offset outside */
    damaged(1, 42, 0x01, "local header"); /* offset into the middle */
    damaged(0, 46, 'j', "does not agree");
    damaged(2, 28, 0, "does not agree"); /* name of no bytes */
    damaged(2, 30, 0xff, "");            /* extra field over the next entry */
    m = make_good();                     /* the last entry one byte longer than there is */
    unsigned char *last = m.data + find(&m, "PK\1\2", 4, 7);
    lsa_zip zip;
    lsa_err e = {0};
    last[20] = last[24] = 41;
    assert_int_equal(lsa_zip_open(&zip, m.data, m.n, "long", &e), LSA_E_FORMAT);
    assert_non_null(strstr(e.msg, "do not fit"));
    free(m.data);
    const char *text[] = {"x/data.pkl", "y/data.pkl"};
    for (int two = 0; two < 2; two++) { /* the same entry twice; two archives in one */
        lsa_memory d = {0};
        lsa_sink to = lsa_sink_memory(&d);
        lsa_zip_out z = {.to = &to};
        lsa_torch *t = NULL;
        lsa_err err = {0};
        for (int i = 0; i < 2; i++)
            assert_int_equal(lsa_zip_add_bytes(&z, text[i * two], "abc", 3, &err), LSA_OK);
        assert_int_equal(lsa_zip_end(&z, &err), LSA_OK);
        assert_int_equal(lsa_torch_open_memory(&t, d.data, d.n, "two", &err), LSA_E_FORMAT);
        assert_non_null(strstr(err.msg, two ? "2 entries" : "twice"));
        free(d.data);
    }
}

/* ---- more than 4 GiB: zip64 sizes and offsets, in a file that is mostly a hole ---- */

enum { BLOCK = 1 << 22 };
static char g_zero[BLOCK];

static lsa_status emit_huge(const void *arg, lsa_sink *to, lsa_err *err) {
    lsa_status st = LSA_OK;
    (void)arg;
    for (int i = 0; st == LSA_OK && i < 1025; i++) st = lsa_sink_put(to, g_zero, BLOCK, err);
    return st;
}
static lsa_status put_sparse(void *user, const void *data, size_t n, lsa_err *err) {
    const int fd = *(const int *)user;
    (void)err;
    if (data == g_zero ? lseek(fd, (off_t)n, SEEK_CUR) < 0 : write(fd, data, n) != (ssize_t)n)
        return LSA_E_IO;
    return LSA_OK;
}

static void test_zip64(void **state) {
    (void)state;
    char path[] = "/tmp/lsa-zip64-XXXXXX";
    int fd = mkstemp(path);
    lsa_sink to = {put_sparse, &fd, 0};
    lsa_zip_out z = {.to = &to};
    lsa_zip in;
    lsa_map map;
    lsa_err err = {0};
    assert_true(fd >= 0);
    if (lsa_zip_add_bytes(&z, "a/first", "first", 5, &err) != LSA_OK ||
        lsa_zip_add(&z, "a/huge", emit_huge, NULL, &err) != LSA_OK ||
        lsa_zip_add_bytes(&z, "a/last", "last", 4, &err) != LSA_OK || lsa_zip_end(&z, &err) != LSA_OK)
        fail_msg("%s", err.msg);
    close(fd);
    assert_int_equal(lsa_map_open(&map, path, &err), LSA_OK);
    if (lsa_zip_open(&in, map.data, map.n_bytes, path, &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_int_equal(lsa_zip_find(&in, "a/huge")->size, 1025 * (uint64_t)BLOCK);
    const lsa_zip_entry *last = lsa_zip_find(&in, "a/last");
    assert_true(last->offset > UINT32_MAX);
    assert_memory_equal(last->data, "last", 4);
    assert_int_equal(lsa_zip_check(last, path, &err), LSA_OK);
    lsa_zip_close(&in);
    lsa_map_close(&map);
    if (getenv("LSA_KEEP_ZIP64")) /* for a look with other tools */
        printf("kept %s\n", path);
    else
        unlink(path);
}

int main(void) {
    const struct CMUnitTest t[] = {cmocka_unit_test(test_round_trip), cmocka_unit_test(test_pickles),
                                   cmocka_unit_test(test_nesting), cmocka_unit_test(test_archives),
                                   cmocka_unit_test(test_zip64)};
    return cmocka_run_group_tests(t, NULL, NULL);
}
