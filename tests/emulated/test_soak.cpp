/* A soak of the decoder with tiers, run on the CPU: requests join and leave, all memory comes back. */
#include "tests/emulated/small_net.h"

extern "C" {
#include "tests/testkit/judge_soak.h"
}

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
    lsa_backend counted = lsa_backend_cpu;
    counted.alloc = count_alloc;
    counted.release = count_release;
    lsa_ctx ctx = emulated_device(&counted);
    lsa_golden net = small_net();
    net.n_head = net.index_head = net.n_expert = 2; /* small, for many steps */
    net.moe_dim = 16;
    return with_net(net, [&](const char *dir) {
        const int bad = judge_soak(&ctx, dir, 400, 4, 1);
        if (live == 0 && emu::pinned == 0) return bad;
        printf("%lld allocations of the GPU and %lld of pinned memory were not freed\n", (long long)live,
               (long long)emu::pinned);
        return bad + 1;
    });
}
