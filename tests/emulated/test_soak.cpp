/* A soak of the decoder with tiers, run on the CPU: requests join and leave, all memory comes back. */
#include <stdlib.h>

#include "tests/emulated/emu/emu.h"

extern "C" {
#include "kernels/core/file.h"
#include "tests/testkit/golden_net.h"
#include "tests/testkit/judge_soak.h"
}
#include "kernels/cuda/cuda_state.h"

static int64_t live; /* allocations */
static lsa_status count_alloc(lsa_ctx *c, void **out, size_t n, const char *what, lsa_err *err) {
    const lsa_status st = lsa_backend_cpu.alloc(c, out, n, what, err);
    live += st == LSA_OK;
    return st;
}
static void count_release(lsa_ctx *c, void *p) {
    live--;
    lsa_backend_cpu.release(c, p);
}

int main() {
    static cuda_state device;
    lsa_backend counted = lsa_backend_cpu;
    counted.alloc = count_alloc;
    counted.release = count_release;
    lsa_ctx ctx = {LSA_BACKEND_CUDA, &counted, &device, "emulated"};
    char dir[] = "/tmp/lsa-emulated.XXXXXX";
    lsa_err err = {};
    lsa_golden net = lsa_golden_default();
    net.head_dim = net.index_dim = 64;
    net.n_head = net.index_head = net.n_expert = 2; /* small, for many steps */
    net.moe_dim = 16;
    if (!mkdtemp(dir) || lsa_golden_write(dir, &net, LSA_STORE_F32, &err) != LSA_OK) return 1;
    int bad = judge_soak(&ctx, dir, 400, 4, 1);
    if (live != 0 || emu::pinned != 0) {
        printf("%lld allocations of the GPU and %lld of pinned memory were not freed\n", (long long)live,
               (long long)emu::pinned);
        bad++;
    }
    bad += lsa_remove_tree(dir, &err) != LSA_OK;
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
