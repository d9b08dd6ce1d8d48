/* The GPU session's kernels over a small net with every kind of layer, run on the CPU. */
#include <stdlib.h>

#include "tests/emulated/emu/emu.h"

extern "C" {
#include "kernels/core/file.h"
#include "tests/testkit/golden_net.h"
#include "tests/testkit/judge_session.h"
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
    /* windows and histories of HCA layers wrap several times */
    const judge_plan plain = {120, 56, 33, 16, 9, 20, false}, sim = {60, 30, 30, 16, 3, 12, true};
    bad += judge_session(&ctx, dir, &plain);
    bad += judge_session(&ctx, dir, &sim);
    bad += lsa_remove_tree(dir, &err) != LSA_OK;
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
