/* A soak of the decoder with tiers, run on the CPU: requests join and leave, all memory comes back. */
#include "tests/emulated/small_net.h"

extern "C" {
#include "tests/testkit/judge_soak.h"
}

int main() {
    lsa_backend counted = counted_backend();
    lsa_ctx ctx = emulated_device(&counted);
    lsa_golden net = small_net();
    net.n_head = net.index_head = net.n_expert = 2; /* small, for many steps */
    net.moe_dim = 16;
    return with_net(net, [&](const char *dir) {
        const int bad = judge_soak(&ctx, dir, 400, 4, 1);
        if (memory_held == 0 && emu::pinned == 0) return bad;
        printf("%lld allocations of the GPU and %lld of pinned memory were not freed\n",
               (long long)memory_held, (long long)emu::pinned);
        return bad + 1;
    });
}
