/* The tiers of compressed rows over a small net, run on the CPU. */
#include <stdlib.h>

#include "tests/emulated/emu/emu.h"

extern "C" {
#include "kernels/core/file.h"
#include "tests/testkit/golden_net.h"
#include "tests/testkit/judge_tiers.h"
}
#include "kernels/cuda/cuda_state.h"

int main() {
    static cuda_state device;
    lsa_ctx ctx = {LSA_BACKEND_CUDA, &lsa_backend_cpu, &device,
                   "emulated"}; /* memory by the cpu column's calls */
    char dir[] = "/tmp/lsa-emulated.XXXXXX";
    lsa_err err = {};
    lsa_golden net = lsa_golden_default();
    net.head_dim = net.index_dim = 64; /* powers of two, as kernels may ask for */
    if (!mkdtemp(dir) || lsa_golden_write(dir, &net, LSA_STORE_F32, &err) != LSA_OK) return 1;
    int bad = 0;
    const judge_plan plan = {76, 41, 30, 16, 5, 20, false}; /* chunks and pages end inside calls */
    bad += judge_tiers(&ctx, dir, &plan, 4);
    const judge_plan tail = {56, 25, 14, 16, 3, 0, false}; /* nothing is resident for being new */
    bad += judge_tiers(&ctx, dir, &tail, 8);
    bad += lsa_remove_tree(dir, &err) != LSA_OK;
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
