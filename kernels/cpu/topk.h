/* The one top-k of the project: larger value first, equal values by lower index. Thread-safe. */
#ifndef LSA_KERNELS_CPU_TOPK_H
#define LSA_KERNELS_CPU_TOPK_H

#include <stdint.h>

/* The min(k, selectable) largest of value[n], ascending by index into sel; returns how many. Entries below
 * n_masked with allowed[c] == 0 cannot be chosen (allowed NULL: all can). scratch has n floats. NaN is never
 * chosen before a number. */
int64_t lsa_topk(const float *value, int64_t n, int64_t k, const uint8_t *allowed, int64_t n_masked,
                 float *scratch, int32_t *sel);

#endif
