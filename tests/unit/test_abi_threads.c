/* Clones work in parallel: four threads, each with its own clone and inputs, give what one thread gives;
 * clones are made and closed meanwhile. Run it under the tsan preset with OMP_NUM_THREADS=1. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "export/abi/lsa_indexer.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "tests/testkit/export_fixture.h"
#include "tests/testkit/gen.h"

enum { THREADS = 4, ROUNDS = 20, N = 600, D = 48, LAYERS = 3 };

typedef struct job {
    const lsa_idx *from;
    uint8_t *key; /* shared, read only */
    uint16_t hidden[ROUNDS][D];
    float logit[ROUNDS][LAYERS][N];
    int32_t id[ROUNDS][N], n_id[ROUNDS];
    int failed;
} job;

static void *work(void *arg) {
    job *j = arg;
    lsa_idx *x = NULL;
    j->failed += lsa_idx_clone(&x, j->from, NULL) != LSA_IDX_OK;
    for (int i = 0; i < ROUNDS && !j->failed; i++) {
        const int64_t n = N - 17 * i, position = 4 * n + 1;
        const lsa_idx_keys k = {j->key, NULL, n};
        const lsa_idx_rule r = {.mode = LSA_IDX_TOPK, .ensemble = LSA_IDX_MAX, .k = 50, .tail = 8};
        lsa_idx *y = NULL;
        for (int l = 0; l < LAYERS; l++) {
            j->failed += lsa_idx_query(x, l, 1, j->hidden[i], &position, NULL, NULL) != LSA_IDX_OK;
            j->failed += lsa_idx_score(x, l, 1, &k, j->logit[i][l], N, NULL, NULL) != LSA_IDX_OK;
        }
        j->failed += lsa_idx_select(x, 1, &r, j->logit[i][0], N, &n, j->id[i], N, &j->n_id[i], NULL, NULL) !=
                     LSA_IDX_OK;
        j->failed +=
            lsa_idx_clone(&y, x, NULL) != LSA_IDX_OK; /* counts handles up and down among the others */
        lsa_idx_close(y);
    }
    lsa_idx_close(x);
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    char dir[] = "/tmp/lsa-abi-XXXXXX", error[LSA_IDX_ERROR];
    job *one = LSA_GEN_NEW(job, THREADS), *all = LSA_GEN_NEW(job, THREADS);
    uint8_t *key = LSA_GEN_NEW(uint8_t, N * 132);
    lsa_rng g = lsa_rng_make(21, 1);
    lsa_idx *x = NULL;
    pthread_t thread[THREADS];
    const lsa_idx_options o = {"cpu", LSA_IDX_FP8, 1, N};
    lsa_fixture_export(dir, 7, true);
    if (lsa_idx_open(&x, LSA_IDX_ABI, dir, &o, error)) fail_msg("%s", error);
    lsa_gen_keys(key, N, &g);
    for (int t = 0; t < THREADS; t++) {
        one[t].from = x;
        one[t].key = key;
        for (int i = 0; i < ROUNDS; i++)
            for (int k = 0; k < D; k++) one[t].hidden[i][k] = lsa_f32_to_bf16(lsa_gen_normal(&g));
    }
    memcpy(all, one, THREADS * sizeof *all);
    for (int t = 0; t < THREADS; t++) work(&one[t]);
    for (int t = 0; t < THREADS; t++) assert_int_equal(pthread_create(&thread[t], NULL, work, &all[t]), 0);
    for (int t = 0; t < THREADS; t++) assert_int_equal(pthread_join(thread[t], NULL), 0);
    for (int t = 0; t < THREADS; t++) {
        assert_int_equal(one[t].failed + all[t].failed, 0);
        assert_memory_equal(&one[t], &all[t], sizeof one[t]);
        assert_int_equal(one[t].n_id[0], 58);
    }
    lsa_idx_close(x);
    lsa_free(one), lsa_free(all), lsa_free(key);
    assert_int_equal(lsa_remove_tree(dir, NULL), LSA_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_threads)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
