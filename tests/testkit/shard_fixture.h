/* Four made-up documents of 40, 3, 64 and 9 tokens (the second has no chunk and no hidden vector) in two
 * shards, with every dataset of the format; the third document carries probes. For tests that include cmocka.
 */
#ifndef LSA_TESTS_TESTKIT_SHARD_FIXTURE_H
#define LSA_TESTS_TESTKIT_SHARD_FIXTURE_H

#include "data/shard_write.h"

#define FIX_HIDDEN 16
#define FIX_STRIDE 8
#define FIX_DOCS   4

typedef struct shard_fixture {
    char dir[128];
    lsa_shards_info f;
    lsa_doc_stats d[FIX_DOCS];
} shard_fixture;

/* A folder for all fixtures of a test program, and its removal. 0 is success, as cmocka's setup wants. */
int shard_fixture_begin(void **state);
int shard_fixture_end(void **state);

shard_fixture shard_fixture_make(const char *name);
void shard_fixture_free(shard_fixture *x);
/* Documents 0,1 and 2,3 into shard_00000.h5 and shard_00001.h5, and manifest.json. */
void shard_fixture_seal(const shard_fixture *x);
/* "dir/name", valid until the next call. */
const char *shard_fixture_path(const shard_fixture *x, const char *name);

/* The expression succeeds; or it fails with this code and a message that holds `text`. */
extern lsa_err fix_err;
#define FIX_OK(expr)                                                                                         \
    do {                                                                                                     \
        fix_err = (lsa_err){0};                                                                              \
        if ((expr) != LSA_OK) fail_msg("%s: %s", #expr, fix_err.msg);                                        \
    } while (0)
#define FIX_REFUSE(expr, want, text)                                                                         \
    do {                                                                                                     \
        fix_err = (lsa_err){0};                                                                              \
        assert_int_equal((expr), want);                                                                      \
        if (!strstr(fix_err.msg, text)) fail_msg("%s: '%s' does not hold '%s'", #expr, fix_err.msg, text);   \
    } while (0)

#endif
