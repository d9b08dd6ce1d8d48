/* No call of the server ABI allocates: malloc and its family are counted while queries, scores and selections
 * of every mode run. Skipped under sanitizers, which have an allocator of their own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "export/abi/lsa_indexer.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "tests/testkit/export_fixture.h"
#include "tests/testkit/gen.h"

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
static long g_calls; /* of any thread */
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t align, size_t n);
void *malloc(size_t n) {
    __atomic_add_fetch(&g_calls, 1, __ATOMIC_RELAXED);
    return __libc_malloc(n);
}
void *calloc(size_t n, size_t size) {
    __atomic_add_fetch(&g_calls, 1, __ATOMIC_RELAXED);
    return __libc_calloc(n, size);
}
void *realloc(void *p, size_t n) {
    __atomic_add_fetch(&g_calls, 1, __ATOMIC_RELAXED);
    return __libc_realloc(p, n);
}
void *aligned_alloc(size_t align, size_t n) {
    __atomic_add_fetch(&g_calls, 1, __ATOMIC_RELAXED);
    return __libc_memalign(align, n);
}
int posix_memalign(void **out, size_t align, size_t n) {
    __atomic_add_fetch(&g_calls, 1, __ATOMIC_RELAXED);
    *out = __libc_memalign(align, n);
    return *out ? 0 : 12;
}

enum { M = 2, N = 3000, D = 48, LAYERS = 3 };
typedef struct work {
    uint16_t hidden[M * D];
    int64_t position[M], n_chunk[M];
    uint8_t *key;
    lsa_idx_keys keys[M];
    float logit[LAYERS][M][N];
    int32_t id[M][N], n_id[M];
} work;

static void decide(lsa_idx *x, work *w) {
    for (int l = 0; l < LAYERS; l++) {
        assert_int_equal(lsa_idx_query(x, l, M, w->hidden, w->position, NULL, NULL), LSA_IDX_OK);
        assert_int_equal(lsa_idx_score(x, l, M, w->keys, &w->logit[l][0][0], N, NULL, NULL), LSA_IDX_OK);
    }
    for (int mode = 0; mode <= LSA_IDX_CALIBRATED; mode++)
        for (int ensemble = -1; ensemble < 3; ensemble++) {
            const lsa_idx_rule r = {mode, ensemble, 7, 20, 0.1, 0.5f, 3, -1};
            assert_int_equal(lsa_idx_select(x, M, &r, &w->logit[0][0][0], N, w->n_chunk, &w->id[0][0], N,
                                            w->n_id, NULL, NULL),
                             LSA_IDX_OK);
        }
}

static void test_alloc(void **state) {
    (void)state;
    char dir[] = "/tmp/lsa-abi-XXXXXX";
    work *w = LSA_GEN_NEW(work, 1);
    lsa_rng g = lsa_rng_make(8, 8);
    lsa_fixture_export(dir, 5, true);
    w->key = LSA_GEN_NEW(uint8_t, N * 132);
    lsa_gen_keys(w->key, N, &g);
    for (int i = 0; i < M; i++) {
        w->position[i] = 4 * N;
        w->n_chunk[i] = N;
        w->keys[i] = (lsa_idx_keys){w->key, NULL, N};
    }
    for (int path = 0; path < 3; path++) {
        const lsa_idx_options o = {"cpu", path, M, N};
        lsa_idx *x = NULL;
        assert_int_equal(lsa_idx_open(&x, LSA_IDX_ABI, dir, &o, NULL), LSA_IDX_OK);
        decide(x, w); /* OpenMP makes its threads */
        const long before = g_calls;
        for (int i = 0; i < 5; i++) decide(x, w);
        const long calls = g_calls - before;
        assert_int_equal(calls, 0);
        lsa_idx_close(x);
        assert_true(g_calls > 0); /* the counter counts */
    }
    lsa_free(w->key);
    lsa_free(w);
    assert_int_equal(lsa_remove_tree(dir, NULL), LSA_OK);
}
#else
static void test_alloc(void **state) {
    (void)state;
    skip();
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_alloc)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
