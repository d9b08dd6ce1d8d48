/* CUDA kernels on the CPU, for machines without a GPU: blocks one after the other, the threads of a block as
 * fibers that change places at barriers and warp exchanges. Finds wrong indices, missing barriers that
 * deadlock, masks that lie, wrong sums; not races, not alignment, nothing of tensor cores or asynchronous
 * copies. Fibers run in one fixed order. Sources go through translate.py first. Stops the program with a
 * message on a broken rule. C++17. */
#ifndef LSA_TESTS_EMULATED_EMU_EMU_H
#define LSA_TESTS_EMULATED_EMU_EMU_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emu {
extern int current; /* thread of the block */
extern uint3 thread_index[1024], block_index;
extern char *dynamic;  /* extern __shared__ arrays */
extern int64_t pinned; /* allocations of cudaHostAlloc that are not freed */
extern uint64_t warp_value[32][32];

void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()> &kernel);
void barrier();
/* All lanes of the mask meet: first with their values, then again before anyone goes on to the next exchange.
 */
void meet(unsigned mask, uint64_t value);
void part();

template <typename T> inline uint64_t bits(T v) {
    uint64_t u = 0;
    static_assert(sizeof v <= sizeof u, "8 bytes at most");
    memcpy(&u, &v, sizeof v);
    return u;
}
template <typename T> inline T from(uint64_t u) {
    T v;
    memcpy(&v, &u, sizeof v);
    return v;
}
inline int lane() {
    return current & 31;
}
inline uint64_t *values() {
    return warp_value[current >> 5];
}
template <typename T> inline T exchange(unsigned mask, T v, int source, bool in) {
    meet(mask, bits(v));
    const T r = in ? from<T>(values()[source & 31]) : v;
    part();
    return r;
}
} // namespace emu

extern dim3 blockDim, gridDim;
#define threadIdx       (emu::thread_index[emu::current])
#define blockIdx        (emu::block_index)
#define __syncthreads() emu::barrier()

static inline void __syncwarp(unsigned m = 0xffffffffu) {
    emu::meet(m, 0);
    emu::part();
}
template <typename T> static inline T __shfl_sync(unsigned m, T v, int s) {
    return emu::exchange(m, v, s, true);
}
template <typename T> static inline T __shfl_xor_sync(unsigned m, T v, int o) {
    return emu::exchange(m, v, emu::lane() ^ o, true);
}
template <typename T> static inline T __shfl_up_sync(unsigned m, T v, int o) {
    return emu::exchange(m, v, emu::lane() - o, emu::lane() >= o);
}
template <typename T> static inline T __shfl_down_sync(unsigned m, T v, int o) {
    return emu::exchange(m, v, emu::lane() + o, emu::lane() + o < 32);
}
template <typename F> static inline unsigned emu_vote(unsigned m, uint64_t v, F counts) {
    unsigned r = 0;
    emu::meet(m, v);
    for (int i = 0; i < 32; i++)
        if ((m >> i & 1) && counts(emu::values()[i])) r |= 1u << i;
    emu::part();
    return r;
}
static inline unsigned __ballot_sync(unsigned m, int p) {
    return emu_vote(m, p != 0, [](uint64_t x) { return x != 0; });
}
template <typename T> static inline unsigned __match_any_sync(unsigned m, T v) {
    const uint64_t mine = emu::bits(v);
    return emu_vote(m, mine, [mine](uint64_t x) { return x == mine; });
}
static inline unsigned __reduce_max_sync(unsigned m, unsigned v) {
    unsigned r = 0;
    emu_vote(m, v, [&r](uint64_t x) {
        r = x > r ? (unsigned)x : r;
        return false;
    });
    return r;
}
static inline unsigned __reduce_min_sync(unsigned m, unsigned v) {
    return ~__reduce_max_sync(m, ~v);
}
static inline unsigned __activemask() { /* alone: allowed, if slow */
    return 1u << emu::lane();
}

template <typename T> static inline T atomicAdd(T *p, T v) {
    const T old = *p;
    *p = old + v;
    return old;
}
template <typename T> static inline T atomicMax(T *p, T v) {
    const T old = *p;
    *p = v > old ? v : old;
    return old;
}
template <typename T> static inline T __ldcs(const T *p) {
    return *p;
}
template <typename T, typename U> static inline void __stcs(T *p, U v) {
    *p = v;
}
template <typename T> static inline T __ldcg(const T *p) {
    return *p;
}
static inline void __threadfence() { /* blocks run one after the other */
}
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t which) {
    const uint64_t both = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= (uint32_t)(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return r;
}
static inline float emu_rounded(float x) { /* no fused product */
    volatile float r = x;
    return r;
}
static inline float __fadd_rn(float a, float b) {
    return emu_rounded(a + b);
}
static inline float __fsub_rn(float a, float b) {
    return emu_rounded(a - b);
}
static inline float __fmul_rn(float a, float b) {
    return emu_rounded(a * b);
}
static inline float __fdiv_rn(float a, float b) {
    return emu_rounded(a / b);
}
static inline float __fdividef(float a, float b) {
    return a / b;
}
static inline double __dadd_rn(double a, double b) {
    volatile double r = a + b;
    return r;
}
static inline double __dmul_rn(double a, double b) {
    volatile double r = a * b;
    return r;
}
#define __expf(x) expf(x)
static inline uint32_t __float_as_uint(float x) {
    return emu::from<uint32_t>(emu::bits(x));
}
static inline float __uint_as_float(uint32_t x) {
    return emu::from<float>(x);
}
static inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return (uint32_t)((uint64_t)a * b >> 32);
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
using std::isfinite;
using std::isnan;
template <typename A, typename B> static inline auto min(A a, B b) -> decltype(a + b) {
    return a < b ? a : b;
}
template <typename A, typename B> static inline auto max(A a, B b) -> decltype(a + b) {
    return a > b ? a : b;
}

/* kernels/cuda/mma.cuh by exchanges between lanes. */
#define LSA_KERNELS_CUDA_MMA_CUH
static inline void mma_f16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
    static uint32_t held[32][32][6];
    const auto value = [](uint32_t pair, int i) {
        const uint16_t bits = (uint16_t)(pair >> 16 * i);
        __half h;
        memcpy(&h, &bits, sizeof h);
        return __half2float(h);
    };
    uint32_t(*const warp)[6] = held[emu::current >> 5];
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(warp[emu::lane()], mine, sizeof mine);
    emu::meet(0xffffffffu, 0);
    const int g = emu::lane() >> 2, t = emu::lane() & 3;
    for (int i = 0; i < 4; i++) { /* row g + 8 (i / 2), column 2 t + i % 2 */
        for (int k = 0; k < 16; k++) {
            const int at = k % 8 / 2, late = k / 8; /* lane of the group, second half of the depth */
            c[i] += value(warp[g * 4 + at][2 * late + i / 2], k % 2) *
                    value(warp[(2 * t + i % 2) * 4 + at][4 + late], k % 2);
        }
    }
    emu::part();
}

static inline void emu_matrices(uint32_t r[4], const void *row, bool transposed) {
    static const uint16_t *held[32][32];
    const uint16_t **const warp = held[emu::current >> 5];
    warp[emu::lane()] = (const uint16_t *)row;
    emu::meet(0xffffffffu, 0);
    const int g = emu::lane() >> 2, t = emu::lane() & 3;
    for (int i = 0; i < 4; i++) {
        const uint16_t *const *const m = warp + 8 * i;
        r[i] = transposed ? m[2 * t][g] | (uint32_t)m[2 * t + 1][g] << 16
                          : m[g][2 * t] | (uint32_t)m[g][2 * t + 1] << 16;
    }
    emu::part();
}
static inline void load_matrices(uint32_t r[4], const void *row) {
    emu_matrices(r, row, false);
}
static inline void load_transposed(uint32_t r[4], const void *row) {
    emu_matrices(r, row, true);
}
static inline void copy_16(void *to, const void *from, bool there) {
    if (there)
        memcpy(to, from, 16);
    else
        memset(to, 0, 16);
}
static inline void copy_end(void) {}
static inline void copy_wait(void) {}

/* The runtime: device memory is host memory, a stream runs at once. */
#define cudaLaunchKernelEx                             emu_launch_ex
#define cudaSetDevice(device)                          cudaSuccess
#define cudaFuncSetAttribute(kernel, attribute, value) cudaSuccess
template <typename... P, typename... V>
static cudaError_t emu_launch_ex(const cudaLaunchConfig_t *c, void (*kernel)(P...), V... v) {
    emu::launch(c->gridDim, c->blockDim, c->dynamicSmemBytes, [&] { kernel(v...); });
    return cudaSuccess;
}

#endif
