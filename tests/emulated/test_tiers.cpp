/* The tiers of compressed rows over a small net, run on the CPU. */
#include "tests/emulated/small_net.h"

extern "C" {
#include "tests/testkit/judge_tiers.h"
}

int main() {
    lsa_ctx ctx = emulated_device();
    return with_net(small_net(), [&](const char *dir) {
        const judge_plan plan = {76, 41, 30, 16, 5, 20, false}; /* chunks and pages end inside calls */
        const judge_plan tail = {56, 25, 14, 16, 3, 0, false};  /* nothing is resident for being new */
        const int bad = judge_tiers(&ctx, dir, &plan, 4);
        return bad + judge_tiers(&ctx, dir, &tail, 8);
    });
}
