/* Event files: the framing is checked here byte by byte (lengths and CRC32C of known answers), the content by
 * TensorBoard's own reader when the test interpreter has it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "trainer/tboard.h"

static char g_dir[64];

static uint32_t crc32c(const unsigned char *p, size_t n) { /* from the polynomial's definition, bit by bit */
    uint32_t c = ~0u;
    for (size_t i = 0; i < n; i++)
        for (int b = 0; b < 8; b++) {
            const uint32_t bit = (c ^ (uint32_t)(p[i] >> b)) & 1u;
            c = (c >> 1) ^ (bit ? 0x82F63B78u : 0u);
        }
    return ~c;
}
static uint32_t masked(const unsigned char *p, size_t n) {
    const uint32_t c = crc32c(p, n);
    return ((c >> 15) | (c << 17)) + 0xA282EAD8u;
}

static void write_events(void) {
    lsa_tboard t;
    lsa_err err = {0};
    char dir[80];
    snprintf(dir, sizeof dir, "%s/tb", g_dir);
    if (lsa_tboard_open(&t, dir, &err) != LSA_OK) fail_msg("%s", err.msg);
    for (int64_t i = 0; i < 300; i++) lsa_tboard_scalar(&t, "train/loss", i, 1.0 / (double)(i + 1));
    lsa_tboard_scalar(&t, "eval/a/tag/that/is/rather/long/so/that/lengths/need/care/0123456789/0123456789",
                      INT64_C(5000000000), -2.5);
    lsa_tboard_close(&t);
}

static void test_framing(void **s) {
    (void)s;
    glob_t g;
    char pattern[96], *text;
    size_t n, at = 0, records = 0;
    assert_int_equal(crc32c((const unsigned char *)"123456789", 9),
                     0xE3069283u); /* the check value of CRC-32C */
    write_events();
    snprintf(pattern, sizeof pattern, "%s/tb/*tfevents*", g_dir);
    assert_int_equal(glob(pattern, 0, NULL, &g), 0);
    assert_int_equal(g.gl_pathc, 1);
    assert_int_equal(lsa_read_file(&text, &n, g.gl_pathv[0], NULL), LSA_OK);
    const unsigned char *p = (const unsigned char *)text;
    while (at < n) {
        uint64_t len;
        uint32_t a, b;
        assert_true(n - at >= 16);
        memcpy(&len, p + at, 8);
        memcpy(&a, p + at + 8, 4);
        assert_true(a == masked(p + at, 8));
        assert_true(len <= n - at - 16);
        memcpy(&b, p + at + 12 + len, 4);
        assert_true(b == masked(p + at + 12, (size_t)len));
        at += 16 + (size_t)len;
        records++;
    }
    assert_int_equal(records, 302);
    lsa_free(text);
    globfree(&g);
}

static void test_reader(void **s) {
    (void)s;
    static const char script[] =
        "import sys, math\n"
        "try:\n"
        "    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "except ImportError:\n"
        "    sys.exit(77)\n"
        "a = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0})\n"
        "a.Reload()\n"
        "tags = a.Tags()['scalars']\n"
        "x = a.Scalars('train/loss')\n"
        "assert len(tags) == 2 and len(x) == 300, (tags, len(x))\n"
        "assert all(e.step == i and math.isclose(e.value, 1 / (i + 1), rel_tol=1e-6) for i, e in enumerate(x))\n"
        "y = a.Scalars([t for t in tags if t.startswith('eval')][0])\n"
        "assert y[0].step == 5000000000 and y[0].value == -2.5, y\n";
    char path[80], cmd[512];
    const char *python = getenv("LSA_PYTHON");
    snprintf(path, sizeof path, "%s/read.py", g_dir);
    assert_int_equal(lsa_write_file(path, script, sizeof script - 1, NULL), LSA_OK);
    snprintf(cmd, sizeof cmd, "'%s' '%s' '%s/tb'", python ? python : "python3", path, g_dir);
    const int rc = system(cmd);
    if (rc == 77 * 256) {
        print_message("skipped: the test interpreter has no tensorboard\n");
        skip();
    }
    assert_int_equal(rc, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_framing), cmocka_unit_test(test_reader)};
    snprintf(g_dir, sizeof g_dir, "/tmp/lsa-tb-XXXXXX");
    if (!mkdtemp(g_dir)) return 1;
    const int rc = cmocka_run_group_tests(tests, NULL, NULL);
    if (lsa_remove_tree(g_dir, NULL) != LSA_OK) return 1;
    return rc;
}
