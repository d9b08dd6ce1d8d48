/* The GPU teacher's kernels over the mini teacher, run on the CPU. */
#include "tests/emulated/emu/emu.h"

extern "C" {
#include "tests/testkit/judge_teacher.h"
}
#include "kernels/cuda/cuda_state.h"

int main() {
    static cuda_state device;
    lsa_ctx ctx = {LSA_BACKEND_CUDA, &lsa_backend_cpu, &device,
                   "emulated"}; /* memory by the cpu column's calls */
    int bad =
        judge_teacher(&ctx, "recipes/mini/teacher", 300, 128, false); /* more chunks than are selected */
    bad += judge_teacher(&ctx, "recipes/mini/teacher", 40, 40, true);
    bad += judge_dump(&ctx, "recipes/mini/teacher", 100);
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
