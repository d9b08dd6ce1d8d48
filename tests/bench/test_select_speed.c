/* Time of one selection at 131,072 chunks (512 K tokens) and 3 layers, on one thread: one JSON line a case.
 * The output is checked by tests/unit/test_select.c; here only its size. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/core/clock.h"
#include "kernels/core/mem.h"
#include "kernels/model/select.h"
#include "tests/testkit/gen.h"

enum { N = 131072, LAYERS = 3, REPEAT = 41 };

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(void) {
    static const char *const mode[] = {"threshold", "topk", "budget", "pages"}, *const rule[] = {
                                                                                    "sum", "mean", "max"};
    float *z = LSA_GEN_NEW(float, LAYERS *N), *score = LSA_GEN_NEW(float, N);
    int32_t *id = LSA_GEN_NEW(int32_t, N);
    lsa_rng g = lsa_rng_make(5, 5);
    lsa_gen_fill(z, LAYERS * N, 3, &g);
    for (int m = 0; m < 4; m++)
        for (int s = 0; s < 3; s++) {
            lsa_select_rule r = {.mode = (lsa_select_mode)m,
                                 .score = (lsa_score_rule)s,
                                 .n_layer = LAYERS,
                                 .k = m == LSA_SELECT_PAGES ? 192 : 13107,
                                 .tail = 2048,
                                 .budget = 0.1,
                                 .threshold = 0.9f};
            double time[REPEAT];
            int64_t n_out = 0;
            for (int l = 0; l < LAYERS; l++) r.temperature[l] = 1;
            for (int i = 0; i < REPEAT; i++) {
                const double t0 = lsa_now_s();
                if (lsa_select(id, &n_out, score, &r, z, N, N, NULL) != LSA_OK || n_out < 1) return 1;
                time[i] = lsa_now_s() - t0;
            }
            qsort(time, REPEAT, sizeof *time, ascending);
            printf(
                "{\"bench\": \"select\", \"chunks\": %d, \"layers\": %d, \"mode\": \"%s\", \"score\": \"%s\", \"kept\": %lld, "
                "\"median_ms\": %.3f, \"worst_ms\": %.3f}\n",
                N, LAYERS, mode[m], rule[s], (long long)n_out, time[REPEAT / 2] * 1e3,
                time[REPEAT - 1] * 1e3);
        }
    lsa_free(z), lsa_free(score), lsa_free(id);
    return 0;
}
