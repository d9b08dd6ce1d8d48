/* lsa-decode bench on the CPU: the mini teacher's geometry, every case with its check, level 1, swap-in, a
 * pool of memory; all memory comes back. Times mean nothing here. */
#include "tests/emulated/emu/emu.h"

#include "tests/emulated/no_sm90.h"
#include "tests/emulated/small_net.h"

extern "C" {
#include "infer/bench.h"
}

extern "C" lsa_status lsa_cuda_open(lsa_ctx *, int, lsa_err *) {
    return LSA_E_BUG;
}
extern "C" lsa_status lsa_gpu_batch_time(lsa_gpu_batch *b, lsa_gpu_batch_part part, int32_t, int64_t,
                                         double *seconds, lsa_err *err) {
    *seconds = 1e-6 * (double)lsa_gpu_batch_resident(b);
    return part == LSA_BATCH_STEP ? lsa_gpu_batch_launch(b, part, err) : LSA_OK;
}
extern "C" lsa_status lsa_gpu_batch_steps(lsa_gpu_batch *b, int32_t, double *, lsa_err *err) {
    return lsa_gpu_batch_launch(b, LSA_BATCH_STEP, err);
}

int main() {
    lsa_backend counted = counted_backend();
    lsa_ctx ctx = emulated_device(&counted);
    static lsa_teacher_config c;
    lsa_err err = {};
    int bad = lsa_teacher_config_load(&c, "recipes/mini/teacher/config.json", &err) != LSA_OK;
    lsa_bench_opts o = {};
    o.context[0] = 4096, o.context[1] = 8192, o.n_context = 2;
    o.batch[0] = 1, o.n_batch = 1;
    o.budget = 0.25, o.pool_gb = 0.0025;
    for (int json = 0; json < 2 && !bad; json++) {
        o.json = json;
        if (json) o.budget = 1, o.n_context = 1, o.batch[0] = 2, o.pool_gb = 0;
        bad += lsa_bench(&ctx, &c, &o, &err) != LSA_OK;
    }
    if (memory_held || emu::pinned) {
        printf("%lld device and %lld pinned blocks are still held\n", (long long)memory_held,
               (long long)emu::pinned);
        bad++;
    }
    printf("%s%s\n", bad ? "FAILED " : "ok", err.msg);
    return bad != 0;
}
