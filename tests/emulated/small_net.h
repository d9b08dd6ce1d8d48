/* What the tests of emulated GPU kernels over whole nets begin with: a device whose memory is the host's, and
 * a small net with every kind of layer in a folder of its own. */
#ifndef LSA_TESTS_EMULATED_SMALL_NET_H
#define LSA_TESTS_EMULATED_SMALL_NET_H

#include <stdlib.h>

#include "tests/emulated/emu/emu.h"

extern "C" {
#include "kernels/core/file.h"
#include "tests/testkit/golden_net.h"
}
#include "kernels/cuda/cuda_state.h"

/* backend: whose calls give memory; the cpu column's, or ones that count. */
static inline lsa_ctx emulated_device(const lsa_backend *backend = &lsa_backend_cpu) {
    static cuda_state device;
    return {LSA_BACKEND_CUDA, backend, &device, "emulated"};
}

/* The cpu column's memory, counted: blocks that are held. */
static int64_t memory_held;
static inline lsa_backend counted_backend() {
    lsa_backend b = lsa_backend_cpu;
    b.alloc = [](lsa_ctx *c, void **out, size_t n, const char *what, lsa_err *err) {
        const lsa_status st = lsa_backend_cpu.alloc(c, out, n, what, err);
        memory_held += st == LSA_OK;
        return st;
    };
    b.release = [](lsa_ctx *c, void *p) {
        memory_held -= p != NULL;
        lsa_backend_cpu.release(c, p);
    };
    return b;
}

/* Heads in powers of two, as kernels may ask for. */
static inline lsa_golden small_net() {
    lsa_golden net = lsa_golden_default();
    net.head_dim = net.index_dim = 64;
    return net;
}

/* Writes the net to a new folder, calls judge(folder), removes it and says how it went: main's exit code. */
template <typename JUDGE> static int with_net(const lsa_golden &net, JUDGE judge) {
    char dir[] = "/tmp/lsa-emulated.XXXXXX";
    lsa_err err = {};
    if (!mkdtemp(dir) || lsa_golden_write(dir, &net, LSA_STORE_F32, &err) != LSA_OK) return 1;
    int bad = judge(dir);
    bad += lsa_remove_tree(dir, &err) != LSA_OK;
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}

#endif
