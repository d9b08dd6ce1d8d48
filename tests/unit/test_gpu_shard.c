/* Slices of the parameters: on every number of ranks they part each tensor, lie where a reduce-scatter of the
 * tensor puts them, and start at whole fours. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "kernels/model/gpu_shard.h"

static lsa_indexer_geom geom(int32_t hidden, int32_t rank, int32_t heads) {
    return (lsa_indexer_geom){
        .hidden = hidden, .n_head = heads, .head_dim = 128, .rank = rank, .eps = 1e-6f, .n_layer = 2};
}

static void check(const lsa_indexer_geom *g, int size) {
    const int64_t n = lsa_indexer_n_param(g) / g->n_layer;
    uint8_t *const seen = calloc((size_t)n, 1);
    assert_non_null(seen);
    for (int rank = 0; rank < size; rank++) {
        lsa_gpu_shard s;
        lsa_err err = {0};
        int64_t at = 0;
        if (lsa_gpu_shard_make(&s, g, rank, size, &err) != LSA_OK) fail_msg("%s", err.msg);
        for (int i = 0; i < s.n_piece; i++) {
            const lsa_gpu_piece p = s.piece[i];
            const lsa_indexer_tensor t = lsa_indexer_tensor_at(g, 0, (lsa_indexer_part)i);
            assert_true(p.first % 4 == 0 && p.n % 4 == 0 && p.at == at && p.n > 0);
            assert_int_equal(p.gain, i == LSA_Q_NORM);
            assert_int_equal(p.first, p.gain ? t.offset : t.offset + rank * p.n);
            for (int64_t k = p.first; k < p.first + p.n; k++) seen[k]++;
            at += p.n;
        }
        assert_int_equal(s.own, at);
    }
    for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_at(g, 0, (lsa_indexer_part)p);
        for (int64_t k = t.offset; k < t.offset + t.n; k++)
            assert_int_equal(seen[k], p == LSA_Q_NORM ? size : 1);
    }
    free(seen);
}

static void test_slices(void **state) {
    (void)state;
    const lsa_indexer_geom mini = geom(256, 256, 32), odd = geom(24, 8, 8);
    for (int size = 1; size <= 64; size *= 2) check(&mini, size);
    for (int size = 1; size <= 16; size *= 2) check(&odd, size);
}

static void test_refused(void **state) {
    (void)state;
    const lsa_indexer_geom mini = geom(256, 256, 32), odd = geom(24, 8, 8);
    lsa_gpu_shard s;
    lsa_err err = {0};
    assert_int_equal(lsa_gpu_shard_make(&s, &mini, 0, 3, &err), LSA_E_CONFIG);
    assert_non_null(strstr(err.msg, "start 2 ranks"));
    err = (lsa_err){0};
    assert_int_equal(lsa_gpu_shard_make(&s, &odd, 0, 32, &err), LSA_E_CONFIG);
    assert_non_null(strstr(err.msg, "start 16 ranks"));
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_slices), cmocka_unit_test(test_refused)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
