/* Monotonic time in seconds. */
#ifndef LSA_KERNELS_CORE_CLOCK_H
#define LSA_KERNELS_CORE_CLOCK_H

#include <time.h>

static inline double lsa_now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
