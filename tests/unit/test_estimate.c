/* The cost estimate against what was measured (kernels/PERF.md: steps that its stages were not fitted to),
 * closed forms of the collectives counted by walking the rings, and what must grow or shrink with what. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "trainer/estimate.h"

/* The recipe of `lsa-train bench`: 8 layers, 128 heads, rank 2048, 2,048 candidates, focal. */
static lsa_recipe bench(int64_t batch) {
    static const char *const set[] = {"model.layers=6,8,10,12,14,16,18,20",
                                      "model.heads=128",
                                      "model.rank=2048",
                                      "sample.candidates=sampled",
                                      "loss.kind=focal",
                                      "loss.on=layer",
                                      "data.virtual_shards=4096"};
    lsa_recipe r;
    lsa_err err = {0};
    if (lsa_recipe_load(&r, lsa_recipe_keys, lsa_recipe_n_key, NULL, set, sizeof set / sizeof *set, &err) !=
        LSA_OK)
        fail_msg("%s", err.msg);
    r.batch = batch;
    return r;
}

static lsa_machine machine(const char *text) {
    lsa_machine m;
    lsa_err err = {0};
    if (lsa_machine_parse(&m, text, &err) != LSA_OK) fail_msg("%s", err.msg);
    return m;
}
static lsa_estimate estimate(const lsa_recipe *r, const char *text) {
    lsa_estimate e;
    lsa_err err = {0};
    const lsa_machine m = machine(text);
    if (lsa_estimate_make(&e, r, &m, &err) != LSA_OK) fail_msg("%s", err.msg);
    return e;
}
static void within(const char *what, double got, double want, double share) {
    if (!(fabs(got - want) <= share * want)) fail_msg("%s: %g, measured %g", what, got, want);
}

static void test_measured_points(void **state) {
    (void)state;
    static const struct {
        int64_t batch;
        double ms;
    } step[] = {{64, 5.247}, {256, 6.009}, {1024, 10.340}};
    lsa_recipe r;
    for (size_t i = 0; i < sizeof step / sizeof *step; i++) {
        r = bench(step[i].batch);
        within("step", estimate(&r, "gpus=1").step_ms, step[i].ms, 0.1);
        within("windows/s", estimate(&r, "gpus=1").windows_per_s, 1e3 * (double)step[i].batch / step[i].ms,
               0.1);
    }
    r = bench(256); /* full candidates, KL */
    r.candidates = LSA_CAND_ALL;
    r.loss = LSA_LOSS_KL;
    r.ensemble = LSA_ON_SUM;
    within("all candidates", estimate(&r, "gpus=1,chunks=32768").step_ms, 17.60, 0.1);
    r = bench(64); /* streamed documents of hidden width 1024 */
    within("hidden 1024", estimate(&r, "gpus=1,hidden=1024").windows_per_s, 14832, 0.1);
}

static void test_stages(void **state) {
    (void)state;
    static const double at_256[] = {0.115, 0.011, 0.341, 0.772, 0.804, 0.450, 3.55},
                        at_1024[] = {0.416, 0.042, 1.061, 2.990, 1.946, 0.450, 3.55};
    lsa_recipe r = bench(256);
    lsa_estimate e = estimate(&r, "gpus=1");
    for (int p = 0; p < 7; p++) {
        within("stage at 256", e.ms[p], at_256[p], 1e-2);
        assert_int_equal(e.from[p], LSA_FROM_MEASURED);
    }
    r = bench(1024);
    e = estimate(&r, "gpus=1");
    for (int p = 0; p < 7; p++) within("stage at 1024", e.ms[p], at_1024[p], 1e-2);
    assert_int_equal(e.n_param, 339755008);
    assert_int_equal(e.candidates, 2048);
    assert_true(e.comm_share == 0 && e.sent_bytes == 0 && e.ms[LSA_PART_REDUCE] == 0);
    r = bench(2048); /* beyond what was measured, and on another card */
    assert_int_equal(estimate(&r, "gpus=1").from[LSA_PART_SCORES], LSA_FROM_SCALED);
    r = bench(256);
    assert_int_equal(estimate(&r, "gpus=1,copy=4270").from[LSA_PART_ADAMW], LSA_FROM_SCALED);
    within("AdamW on another card", estimate(&r, "gpus=1,copy=6020").ms[LSA_PART_ADAMW], 3.55 / 2, 1e-3);
    r.moments = LSA_MOMENTS_BF16;
    within("AdamW with bf16 moments", estimate(&r, "gpus=1").ms[LSA_PART_ADAMW], 3.55 * 22 / 30, 1e-3);
    r = bench(256);
    r.micro_batch = 64; /* the weights are read and their gradients written four times */
    assert_true(estimate(&r, "gpus=1").ms[LSA_PART_WEIGHTS] > 0.804 + 3 * 0.4);
}

/* What one GPU sends in a pass over a ring: in each of w - 1 rounds one piece on to the right. */
static double walked(int64_t w, double bytes) {
    double sent = 0;
    for (int64_t round = 0; round < w - 1; round++) sent += bytes / (double)w;
    return sent;
}

static void test_rings(void **state) {
    (void)state;
    const int64_t size[] = {2, 4, 8, 64, 1024};
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        for (int how = 0; how < 4; how++) {
            const int64_t w = size[i];
            const bool zero1 = how & 1, narrow = how & 2;
            lsa_recipe r = bench(4096);
            char text[64];
            r.zero1 = zero1;
            r.exchange = narrow ? LSA_EXCHANGE_BF16 : LSA_EXCHANGE_F32;
            snprintf(text, sizeof text, "gpus=%lld,nodes=%lld", (long long)w, (long long)(w > 8 ? w / 8 : 1));
            const lsa_estimate e = estimate(&r, text);
            const double p = 339755008, grad = (narrow ? 2 : 4) * p;
            /* gradients: scattered sums, and gathered unless each keeps its own; then bf16 weights */
            const double bytes =
                zero1 ? walked(w, grad) + walked(w, 2 * p) : walked(w, grad) + walked(w, grad);
            within("bytes sent", e.sent_bytes, bytes, 1e-9);
            /* never faster than the slowest link, and by no more than the latencies slower */
            const double wire = 1e-6 * bytes / 260, alone = e.reduce_ms + e.ms[LSA_PART_GATHER],
                         hops = 3 * 8.4e-3 + (zero1 ? 3 : 4) * (double)(w - 1) * (w > 8 ? 9.6e-3 : 3.4e-3);
            assert_true(alone >= wire && alone <= wire + hops * (1 + 1e-9));
            /* the rest of the backward pass shortens it: between a tenth and three tenths of the
             * weight gradients */
            const double left = e.ms[LSA_PART_REDUCE] + e.ms[LSA_PART_GATHER];
            assert_true(left > 0 && left >= alone - e.ms[LSA_PART_WEIGHTS] * 0.3);
            assert_true(left <= alone - fmin(e.ms[LSA_PART_WEIGHTS] / 10, e.reduce_ms / 4));
            assert_true(fabs(e.comm_share - left / e.step_ms) <= 1e-12);
            assert_true(zero1 || e.ms[LSA_PART_GATHER] == 0);
            within("norm", e.ms[LSA_PART_NORM], 0.450 / (double)w / (narrow ? 2 : 1), 1e-9);
        }
    /* one GPU a node: only the network counts */
    lsa_recipe r = bench(4096);
    assert_true(estimate(&r, "gpus=4,nodes=4,nvlink=1,net=50").step_ms ==
                estimate(&r, "gpus=4,nodes=4,nvlink=900,net=50").step_ms);
    /* a wire of no resistance leaves the latencies: those of what is sent last, and half of the others */
    within("latencies", estimate(&r, "gpus=8,nvlink=1000000").ms[LSA_PART_REDUCE],
           1.5 * (8.4e-3 + 14 * 3.4e-3), 0.02);
}

static void test_monotonic(void **state) {
    (void)state;
    lsa_recipe r = bench(4096);
    const char *const slower[] = {"gpus=16,nodes=2", "gpus=16,nodes=2,net=100", "gpus=16,nodes=2,net=25"};
    for (int i = 0; i < 2; i++)
        assert_true(estimate(&r, slower[i]).step_ms < estimate(&r, slower[i + 1]).step_ms);
    double before = 1e9, shared = -1;
    for (int64_t w = 1; w <= 8; w *= 2) { /* the same work on more GPUs: less for each, more to say */
        char text[32];
        snprintf(text, sizeof text, "gpus=%lld", (long long)w);
        const lsa_estimate e = estimate(&r, text);
        const double own = e.step_ms - e.ms[LSA_PART_REDUCE];
        assert_true(own < before && e.sent_bytes > shared);
        assert_int_equal(e.windows_per_gpu * w, 4096);
        before = own;
        shared = e.sent_bytes;
    }
    r.zero1 = true;
    assert_true(estimate(&r, "gpus=8").ms[LSA_PART_ADAMW] < 3.55 / 7.9);
    r.zero1 = false;
    for (int64_t batch = 8; batch < 65536; batch *= 2) {
        const lsa_recipe a = bench(batch), b = bench(2 * batch);
        const lsa_estimate x = estimate(&a, "gpus=8,windows=1000000"),
                           y = estimate(&b, "gpus=8,windows=1000000");
        assert_true(x.step_ms < y.step_ms && x.windows_per_s < y.windows_per_s &&
                    x.pass_hours > y.pass_hours);
        within("hours", y.pass_hours * 3600 * y.windows_per_s, 1e6, 1e-9);
        within("hours of the run", y.run_hours * 3.6e6, (double)b.steps * y.step_ms, 1e-9);
    }
}

static void refuses(const lsa_recipe *r, const char *text, lsa_status code, const char *say) {
    lsa_machine m;
    lsa_estimate e;
    lsa_err err = {0};
    lsa_status st = lsa_machine_parse(&m, text, &err);
    if (st == LSA_OK) st = lsa_estimate_make(&e, r, &m, &err);
    assert_int_equal(st, code);
    if (!strstr(err.msg, say)) fail_msg("'%s' is not in '%s'", say, err.msg);
}

static void test_refusals(void **state) {
    (void)state;
    lsa_recipe r = bench(256);
    const char *const arg[][2] = {
        {"gpu=8", "unknown key 'gpu'"},   {"gpus", "key=value"},      {"gpus=0", "gpus=0"},
        {"gpus=1.5", "an integer"},       {"nvlink=nan", "a number"}, {"nodes=1x", "nodes=1x"},
        {"gpus=8,,nodes=1", "key=value"}, {"net=-1", "net=-1"}};
    for (size_t i = 0; i < sizeof arg / sizeof *arg; i++) refuses(&r, arg[i][0], LSA_E_ARG, arg[i][1]);
    refuses(&r, "gpus=8,nodes=3", LSA_E_CONFIG, "evenly over 3 nodes");
    r.virtual_shards = 8;
    refuses(&r, "gpus=3", LSA_E_CONFIG, "data.virtual_shards=9");
    refuses(&r, "gpus=16,nodes=2", LSA_E_CONFIG, "data.virtual_shards=16");
    r.precision = LSA_PRECISION_F32;
    refuses(&r, "gpus=1", LSA_E_CONFIG, "op by op");
    r = bench(256);
    snprintf(r.layers, sizeof r.layers, "6,99");
    refuses(&r, "gpus=1", LSA_E_CONFIG, "model.layers");
    snprintf(r.layers, sizeof r.layers, "all");
    assert_int_equal(estimate(&r, "").n_layer, 21);
    assert_int_equal(estimate(&r, "layers=5").n_layer, 5);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_measured_points), cmocka_unit_test(test_stages),   cmocka_unit_test(test_rings),
        cmocka_unit_test(test_monotonic),       cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
