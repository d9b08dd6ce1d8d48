/* lsa-decode validate with the GPU session, run on the CPU. */
#include "tests/emulated/small_net.h"

extern "C" {
#include "tests/testkit/judge_validate.h"
}

int main() {
    lsa_ctx ctx = emulated_device();
    lsa_golden net = small_net();
    net.index_dim = 128; /* what memory indexers read */
    net.index_head = 4;
    return with_net(net, [&](const char *dir) { return judge_validate(&ctx, dir, 61, 16, 12); });
}
