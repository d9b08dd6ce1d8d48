/* lsa-decode validate with the GPU session, run on the CPU. */
#include <stdlib.h>

#include "tests/emulated/emu/emu.h"

extern "C" {
#include "kernels/core/file.h"
#include "tests/testkit/golden_net.h"
#include "tests/testkit/judge_validate.h"
}
#include "kernels/cuda/cuda_state.h"

int main() {
    static cuda_state device;
    lsa_ctx ctx = {LSA_BACKEND_CUDA, &lsa_backend_cpu, &device,
                   "emulated"}; /* memory by the cpu column's calls */
    char dir[] = "/tmp/lsa-emulated.XXXXXX";
    lsa_err err = {};
    lsa_golden net = lsa_golden_default();
    net.head_dim = 64;
    net.index_dim = 128; /* what memory indexers read */
    net.index_head = 4;
    if (!mkdtemp(dir) || lsa_golden_write(dir, &net, LSA_STORE_F32, &err) != LSA_OK) return 1;
    int bad = judge_validate(&ctx, dir, 61, 16, 12);
    bad += lsa_remove_tree(dir, &err) != LSA_OK;
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
