/* FLOP of a layer by kind (lsa-dump bench) against sums written out by hand for V4-Flash, and the model's
 * total. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "data/dump/bench.h"

static void same(double got, double expected) {
    assert_true(fabs(got - expected) < 1e-3);
}

static void test_flash(void **state) {
    (void)state;
    static lsa_teacher_config c;
    lsa_err err = {0};
    assert_int_equal(lsa_teacher_config_load(&c, "tests/fixtures/v4-flash/config.json", &err), LSA_OK);
    const lsa_layer_flops csa = lsa_layer_flops_of(&c, LSA_LAYER_CSA, 4, 4),
                          hca = lsa_layer_flops_of(&c, LSA_LAYER_HCA, 128, 256),
                          window = lsa_layer_flops_of(&c, LSA_LAYER_WINDOW, 0, 3);
    /* wx: 1024 + 512 rows, compressor 2 x 1024, indexer 4 x 128 + 64; wq: 32768 + 8192 rows */
    same(csa.project, 2 * (4096.0 * (1536 + 2048 + 576) + 1024.0 * 40960));
    same(hca.project, 2 * (4096.0 * (1536 + 1024) + 1024.0 * 32768));
    same(window.project, 2 * (4096.0 * 1536 + 1024.0 * 32768));
    /* of 4 tokens only the last sees a chunk; rows 1 2 3 4 and that one */
    same(csa.index, 2 * 64.0 * 128 / 4);
    same(csa.attend, 4 * 32768.0 * 11 / 4);
    /* 1 + ... + 128, then 128 times 128; 128 tokens see one entry, the last sees two */
    same(hca.attend, 4 * 32768.0 * (8256 + 16384 + 130) / 256);
    same(window.output, 2 * (8192.0 * 4096 * 2));
    same(window.moe, 2 * 4096.0 * 256 + 6 * 4096.0 * 2048 * 7);
    double all = 0;
    for (int32_t l = 0; l < c.n_layer; l++) {
        const lsa_layer_flops f = lsa_layer_flops_of(&c, c.kind[l], c.ratio[l], 32768);
        all += f.project + f.index + f.attend + f.output + f.moe + f.streams;
    }
    assert_true(all > 28e9 && all < 32e9);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_flash)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
