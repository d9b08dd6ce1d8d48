/* Checked integer arithmetic and small integer helpers. Element counts are int64_t, byte sizes size_t. */
#ifndef LSA_KERNELS_CORE_NUM_H
#define LSA_KERNELS_CORE_NUM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* True if the product or sum fits; *out is then set. */
static inline bool lsa_mul_i64(int64_t a, int64_t b, int64_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool lsa_add_i64(int64_t a, int64_t b, int64_t *out) {
    return !__builtin_add_overflow(a, b, out);
}
static inline int64_t lsa_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
static inline int64_t lsa_align_up(int64_t a, int64_t b) {
    return lsa_ceil_div(a, b) * b;
}
static inline int64_t lsa_min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t lsa_max_i64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

#endif
