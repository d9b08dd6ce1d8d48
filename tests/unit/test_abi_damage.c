/* A thousand damaged exports, from a fixed seed: header bytes, JSON values, offsets, tensor bytes, lengths.
 * Each is refused with a message or loads and scores finitely (judge_export.h). A failure prints its number;
 * run the program with that number to repeat it alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include <omp.h>

#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "tests/testkit/export_fixture.h"
#include "tests/testkit/gen.h"
#include "tests/testkit/judge_export.h"

enum { CASES = 1000, KINDS = 9, ROOM = 1 << 16 };
static int g_only = -1;

typedef struct file {
    unsigned char *p; /* room for ROOM bytes more */
    size_t n, head;   /* bytes, and of the header with its length */
} file;

static void set_length(file *f) {
    const uint64_t n = f->head - 8;
    memcpy(f->p, &n, 8);
}
/* Puts `text` in the place of n bytes of the header. */
static void replace(file *f, size_t at, size_t n, const char *text) {
    const size_t len = strlen(text);
    memmove(f->p + at + len, f->p + at + n, f->n - at - n);
    memcpy(f->p + at, text, len);
    f->n += len - n;
    f->head += len - n;
    set_length(f);
}
static size_t pick(lsa_rng *g, size_t n) {
    return (size_t)lsa_gen_range(g, 0, (int64_t)n - 1);
}
static bool digit(unsigned char c) {
    return (c >= '0' && c <= '9') || c == '.' || c == '-' || c == 'e' || c == 'E';
}

/* A number of the header, of a tensor's entry or inside the metadata, becomes something absurd. */
static void absurd_number(file *f, lsa_rng *g) {
    static const char *const value[] = {"0",
                                        "-1",
                                        "1",
                                        "2",
                                        "64",
                                        "127",
                                        "1048576",
                                        "65536",
                                        "4294967296",
                                        "9223372036854775807",
                                        "99999999999999999999999",
                                        "1e999",
                                        "1e308",
                                        "1e-308",
                                        "-0.0",
                                        "0.5",
                                        "null",
                                        "true",
                                        "[]",
                                        "{}",
                                        "[[[[[[[[1]]]]]]]]",
                                        "\\\"x\\\"",
                                        "\"x\"",
                                        "NaN",
                                        "1e38",
                                        "3",
                                        "48",
                                        "16",
                                        "8"};
    for (int tries = 0; tries < 10000; tries++) {
        size_t a = 8 + pick(g, f->head - 8), b;
        if (f->p[a] < '0' || f->p[a] > '9') continue;
        while (digit(f->p[a - 1])) a--;
        for (b = a; b < f->head && digit(f->p[b]); b++) {
        }
        replace(f, a, b - a, value[pick(g, sizeof value / sizeof *value)]);
        return;
    }
}

static void floats(file *f, lsa_rng *g, const uint32_t *bits, size_t n) {
    for (int64_t i = lsa_gen_range(g, 1, 3); i > 0; i--)
        memcpy(f->p + f->head + 4 * pick(g, (f->n - f->head) / 4), &bits[pick(g, n)], 4);
}

static void damage(file *f, int kind, lsa_rng *g) {
    static const uint32_t odd[] = {0x7fc00000, 0xffc00001, 0x7f800000, 0xff800000, 0x7f7fffff, 0xff000000};
    static const uint32_t fair[] = {0, 0x80000000, 1, 0x3f800000, 0xc2000000};
    static const char *const junk[] = {
        "", ",", "}", "{", "\"", "\\", "\\u0000", ":", "retrievers.l0.", "\"lsa.", "\xff"};
    switch (kind) {
    case 0: /* header bytes */
        for (int64_t i = lsa_gen_range(g, 1, 4); i > 0; i--)
            f->p[8 + pick(g, f->head - 8)] = (unsigned char)lsa_gen_range(g, 0, 255);
        return;
    case 1: /* truncated */
        f->n = pick(g, f->n);
        return;
    case 2:
        floats(f, g, odd, 6);
        return;
    case 3: /* any tensor byte */
        for (int64_t i = lsa_gen_range(g, 1, 40); i > 0; i--)
            f->p[f->head + pick(g, f->n - f->head)] = (unsigned char)lsa_gen_range(g, 0, 255);
        return;
    case 4:
    case 5:
        for (int64_t i = lsa_gen_range(g, 1, kind == 4 ? 1 : 3); i > 0; i--) absurd_number(f, g);
        return;
    case 6: { /* a piece of the header goes, or junk comes */
        const size_t at = 8 + pick(g, f->head - 8), most = f->head - at;
        replace(f, at, pick(g, most < 60 ? most : 60), junk[pick(g, sizeof junk / sizeof *junk)]);
        return;
    }
    case 7: /* the header's length */
        f->p[pick(g, 8)] = (unsigned char)lsa_gen_range(g, 0, 255);
        return;
    default: /* sound values: must load */
        floats(f, g, fair, 5);
    }
}

static void test_damage(void **state) {
    (void)state;
    char dir[] = "/tmp/lsa-abi-XXXXXX", path[LSA_PATH_MAX], text[LSA_IDX_ERROR];
    int refused[KINDS] = {0}, loaded[KINDS] = {0};
    char *base;
    size_t n;
    uint64_t head;
    lsa_fixture_export(dir, 9, true);
    snprintf(path, sizeof path, "%s/indexer.safetensors", dir);
    assert_int_equal(lsa_read_file(&base, &n, path, NULL), LSA_OK);
    memcpy(&head, base, 8);
    file f = {LSA_GEN_NEW(unsigned char, n + ROOM), 0, 0};
    for (int i = g_only < 0 ? 0 : g_only; i < (g_only < 0 ? CASES : g_only + 1); i++) {
        lsa_rng g = lsa_rng_make(1000, (uint64_t)i);
        const int kind = i % KINDS;
        memcpy(f.p, base, n);
        f.n = n;
        f.head = 8 + head;
        damage(&f, kind, &g);
        FILE *out = fopen(path, "wb");
        if (!out || fwrite(f.p, 1, f.n, out) != f.n || fclose(out)) fail_msg("cannot write %s", path);
        const int verdict = lsa_judge_export(dir, i % 3, text);
        if (g_only >= 0) printf("case %d, kind %d: %d, %s\n", i, kind, verdict, text);
        if (verdict < 0) fail_msg("case %d, kind %d: neither refused nor sound: %s", i, kind, text);
        if (kind == 8 && verdict != 1) fail_msg("case %d: sound values were refused: %s", i, text);
        if ((kind == 1 || kind == 2 || (kind == 7 && memcmp(f.p, base, 8))) && verdict != 0)
            fail_msg("case %d, kind %d: was not seen", i, kind);
        *(verdict ? &loaded[kind] : &refused[kind]) += 1;
    }
    for (int k = 0; k < KINDS; k++) printf("kind %d: %d refused, %d loaded\n", k, refused[k], loaded[k]);
    lsa_free(f.p);
    lsa_free(base);
    assert_int_equal(lsa_remove_tree(dir, NULL), LSA_OK);
}

int main(int argc, char **argv) {
    if (argc > 1) g_only = atoi(argv[1]);
    omp_set_num_threads(1); /* the fixture is too small to share */
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_damage)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
