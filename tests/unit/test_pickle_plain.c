/* Plain pickles of tensors, written by hand opcode by opcode as torch 2.5 writes them: what is in them
 * arrives, no lie about a storage passes, nothing is run, and no prefix or flipped bit makes the reader step
 * outside. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "data/pickle.h"
#include "kernels/core/mem.h"

/* ---- bytes ---- */

typedef struct bytes {
    unsigned char p[2048];
    size_t n;
} bytes;

static void put(bytes *b, const char *s, size_t n) {
    assert_true(b->n + n <= sizeof b->p);
    memcpy(b->p + b->n, s, n);
    b->n += n;
}
#define PUT(b, s) put((b), (s), sizeof(s) - 1)

#define MAGIC   "\x80\2\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
#define VERSION "\x80\2M\xe9\3."
#define INFO(little)                                                                                         \
    "\x80\2}q\0(X\x10\0\0\0protocol_versionq\1M\xe9\3X\x0d\0\0\0little_endianq\2" little                     \
    "X\x0a\0\0\0type_sizesq\3}q\4(X\5\0\0\0shortq\5K\2X\3\0\0\0intq\6K\4X\4\0\0\0longq\7K\4uu."
#define STORAGE(n)                                                                                           \
    "\x80\2(X\7\0\0\0storageq\0ctorch\nFloatStorage\nq\1X\2\0\0\0"                                           \
    "77q\2X\3\0\0\0cpuq\3K" n "Ntq\4Q."
#define KEYS                                                                                                 \
    "\x80\2]q\0X\2\0\0\0"                                                                                    \
    "77q\1a."
#define COUNT   "\6\0\0\0\0\0\0\0"
#define NUMBERS "\0\0\x80\x3f\0\0\0\x40\0\0\x40\x40\0\0\x80\x40\0\0\xa0\x40\0\0\xc0\x40" /* 1 to 6 */
#define STREAM  MAGIC VERSION INFO("\x88") STORAGE("\6") KEYS COUNT NUMBERS

#define HEAD    "\x80\4\x95\0\0\0\0\0\0\0\0}\x94"
#define REBUILD "\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x94\x93\x94"
#define LOAD    "\x8c\x0dtorch.storage\x94\x8c\x10_load_from_bytes\x94\x93\x94"
#define REST                                                                                                 \
    "\x94\x85\x94R\x94K\0K\2K\3\x86\x94K\3K\1\x86\x94\x89\x8c\x0b"                                           \
    "collections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94t\x94R\x94"

/* A dict of one tensor "a" [2, 3] whose storage is these bytes. */
static bytes one_tensor(const char *stream, size_t n) {
    bytes b = {.n = 0};
    const char size[4] = {(char)(n & 255), (char)(n >> 8), 0, 0};
    PUT(&b, HEAD "\x8c\1a\x94" REBUILD "(" LOAD "B");
    put(&b, size, 4);
    put(&b, stream, n);
    PUT(&b, REST "s.");
    return b;
}

/* Reads from memory of exactly that size. text NULL: must be good. */
static void read(const unsigned char *p, size_t n, const char *text) {
    unsigned char *cut = malloc(n ? n : 1);
    lsa_pickle_tensor *t = NULL;
    int64_t k = 0;
    lsa_err err = {0};
    assert_non_null(cut);
    if (n) memcpy(cut, p, n);
    const lsa_status st = lsa_pickle_plain(&t, &k, cut, n, "hand", &err);
    if (text && (st == LSA_OK || !strstr(err.msg, text) || strncmp(err.msg, "hand: ", 6)))
        fail_msg("%s: '%s' does not hold '%s'", lsa_status_name(st), err.msg, text);
    if (!text && st != LSA_OK) fail_msg("%s", err.msg);
    if (st != LSA_OK) assert_true(!t && k == 0);
    for (int64_t i = 0; i < k; i++) {
        const size_t width = lsa_dtype_bytes(t[i].dtype);
        assert_true(t[i].offset >= 0 && t[i].n_elem >= 0 && t[i].n_elem <= t[i].storage_n - t[i].offset);
        const unsigned char *end = t[i].data + (size_t)t[i].storage_n * width;
        assert_true(t[i].data >= cut && end <= cut + n);
    }
    lsa_free(t);
    free(cut);
}
#define READ(s, text) read((const unsigned char *)(s), sizeof(s) - 1, text)

static void stream(const char *s, size_t n, const char *text) {
    const bytes b = one_tensor(s, n);
    read(b.p, b.n, text);
}
#define STREAMED(s, text) stream((s), sizeof(s) - 1, text)

/* ---- what is read ---- */

static void test_good(void **state) {
    (void)state;
    const bytes b = one_tensor(STREAM, sizeof(STREAM) - 1);
    lsa_pickle_tensor *t;
    int64_t n;
    lsa_err err = {0};
    if (lsa_pickle_plain(&t, &n, b.p, b.n, "hand", &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_int_equal(n, 1);
    assert_string_equal(t->name, "a");
    assert_int_equal(t->dtype, LSA_F32);
    assert_true(t->n_dim == 2 && t->shape[0] == 2 && t->shape[1] == 3 && t->n_elem == 6 && t->offset == 0);
    assert_memory_equal(t->data, NUMBERS, 24);
    lsa_free(t);
    /* an archive's pickle is another thing, and the other way round */
    assert_int_equal(lsa_pickle_tensors(&t, &n, b.p, b.n, "hand", &err), LSA_E_UNSUPPORTED);
    READ(
        "\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"
        "0X\3\0\0\0cpuK\6tQK\0K\6\x85K\1\x85\x89)tRs.",
        "outside");
}

static void test_streams(void **state) {
    (void)state;
    STREAMED(STREAM, NULL);
    STREAMED("", "do not begin");
    STREAMED("PK\3\4" STREAM, "do not begin");
    STREAMED(MAGIC "\x80\2M\xea\3." INFO("\x88") STORAGE("\6") KEYS COUNT NUMBERS, "protocol than 1001");
    STREAMED(MAGIC VERSION INFO("\x89") STORAGE("\6") KEYS COUNT NUMBERS, "big-endian");
    STREAMED(MAGIC VERSION "\x80\2}." STORAGE("\6") KEYS COUNT NUMBERS, "big-endian");
    STREAMED(MAGIC VERSION INFO("\x88") "\x80\2(X\7\0\0\0storagectorch\nFloatStorage\nX\2\0\0\0"
                                        "77X\3\0\0\0cpuK\6K\0tQ." KEYS COUNT NUMBERS,
             "not a tensor storage"); /* a view */
    STREAMED(MAGIC VERSION INFO("\x88") "\x80\2K\1." KEYS COUNT NUMBERS, "without a storage");
    STREAMED(MAGIC VERSION INFO("\x88") STORAGE("\6") "\x80\2]." COUNT NUMBERS, "exactly one");
    STREAMED(MAGIC VERSION INFO("\x88") STORAGE("\6") "\x80\2]X\2\0\0\0"
                                                      "78a." COUNT NUMBERS,
             "exactly one");
    STREAMED(MAGIC VERSION INFO("\x88") STORAGE("\6") KEYS "\7\0\0\0\0\0\0\0" NUMBERS, "its bytes are 7");
    STREAMED(MAGIC VERSION INFO("\x88") STORAGE("\7") KEYS "\7\0\0\0\0\0\0\0" NUMBERS, "7 elements");
    STREAMED(STREAM "x", "its bytes are 6, 25");
    STREAMED(MAGIC VERSION INFO("\x88") STORAGE("\5") KEYS
             "\5\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
             "leave its storage");
    /* nothing but a storage is made there */
    STREAMED(MAGIC "\x80\2cos\nsystem\nX\2\0\0\0id\x85R.", "os.system");
    STREAMED(MAGIC VERSION INFO("\x88") "\x80\2ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes");
    STREAMED(MAGIC VERSION INFO("\x88") "\x80\4K\1.", "protocol 4");
    STREAMED(MAGIC VERSION INFO("\x88") "\x80\2\x8c\1a.", "0x8c");
}

static void test_pickles(void **state) {
    (void)state;
    READ("\x80\4\x8c\5posix\x94\x8c\6system\x94\x93\x94\x8c\2id\x94\x85\x94R\x94.", "posix.system");
    READ("\x80\4\x8c\5torch\x8c\4load\x93.", "torch.load");
    READ("\x80\3cbuiltins\neval\nX\1\0\0\0"
         "1\x85R.",
         "builtins.eval");
    READ("\x80\4K\1\x8c\4load\x93.", "not a name");
    READ("\x80\4\x93.", "empty stack");
    READ("\x80\4" LOAD "K\1\x85R.", "not bytes");
    READ("\x80\4" LOAD ")R.", "not bytes");
    READ("\x80\6}.", "protocol 6");
    READ("\x80\1}.", "protocol 1");
    READ("\x80\4}\x94.", "no tensor");
    READ("\x80\4\x94.", "numbers a value wrongly");
    READ("\x80\4\x8e\xff\xff\xff\xff\xff\xff\xff\xff"
         "abc",
         "truncated");
    READ("\x80\4"
         "B\4\0\0\0abc",
         "truncated");
    READ("\x80\4\x8c\4abc", "truncated");
    READ("\x80\4\x96.", "0x96"); /* a bytearray */
    READ("\x80\4(i__main__\nX\n.", "0x69");
    /* the same bytes for two storages: torch never does that, and reading them for each would take its time
     */
    bytes b = {.n = 0};
    const char size[4] = {(char)((sizeof(STREAM) - 1) & 255), (char)((sizeof(STREAM) - 1) >> 8), 0, 0};
    PUT(&b, HEAD LOAD "B");
    put(&b, size, 4);
    PUT(&b, STREAM "q\x20\x85R" LOAD "h\x20\x85R.");
    read(b.p, b.n, "not bytes");
}

static void test_damage(void **state) {
    (void)state;
    const bytes b = one_tensor(STREAM, sizeof(STREAM) - 1);
    for (size_t n = 0; n < b.n; n++) read(b.p, n, "");
    for (size_t i = 0; i < b.n; i++)
        for (int bit = 0; bit < 8; bit++) { /* may be good or not; read() looks at the bounds */
            bytes x = b;
            lsa_pickle_tensor *t;
            int64_t n;
            lsa_err err = {0};
            x.p[i] ^= (unsigned char)(1 << bit);
            const lsa_status st = lsa_pickle_plain(&t, &n, x.p, x.n, "hand", &err);
            lsa_free(t);
            read(x.p, x.n, st == LSA_OK ? NULL : "");
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),
        cmocka_unit_test(test_streams),
        cmocka_unit_test(test_pickles),
        cmocka_unit_test(test_damage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
