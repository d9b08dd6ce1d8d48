/* The GPU session's kernels over a small net with every kind of layer, run on the CPU. */
#include "tests/emulated/small_net.h"

extern "C" {
#include "tests/testkit/judge_session.h"
}

int main() {
    lsa_ctx ctx = emulated_device();
    return with_net(small_net(), [&](const char *dir) {
        /* windows and histories of HCA layers wrap several times */
        const judge_plan plain = {120, 56, 33, 16, 9, 20, false}, sim = {60, 30, 30, 16, 3, 12, true};
        const int bad = judge_session(&ctx, dir, &plain);
        return bad + judge_session(&ctx, dir, &sim);
    });
}
