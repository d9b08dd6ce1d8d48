/* Checked, zeroed, 64-byte aligned host allocation. */
#ifndef LSA_KERNELS_CORE_MEM_H
#define LSA_KERNELS_CORE_MEM_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

/* *out = n * size zeroed bytes, or NULL for a zero size; LSA_E_NOMEM names `what`. n < 0 is LSA_E_BUG. */
LSA_NODISCARD lsa_status lsa_alloc_(void **out, int64_t n, size_t size, const char *what, lsa_err *err);
void lsa_free(void *p); /* NULL allowed */

/* Bytes of memory this process may hope for: the machine's, or less if its control group (cgroup v2) says so.
 */
int64_t lsa_host_memory(void);

/* LSA_NEW(p, n, err): p = array of n zeroed elements of *p. */
#define LSA_NEW(p, n, err) lsa_alloc_((void **)&(p), (int64_t)(n), sizeof *(p), #p, (err))

/* A growing array: data points to `cap` elements, `len` of them used. Declare LSA_VEC(int32_t) v = {0}. */
#define LSA_VEC(T)                                                                                           \
    struct {                                                                                                 \
        T *data;                                                                                             \
        int64_t len, cap;                                                                                    \
    }
/* Grows v to hold at least n elements. */
#define LSA_VEC_RESERVE(v, n, err)                                                                           \
    lsa_grow_((void **)&(v).data, &(v).cap, (int64_t)(n), sizeof *(v).data, #v, (err))
LSA_NODISCARD lsa_status lsa_grow_(void **data, int64_t *cap, int64_t n, size_t size, const char *what,
                                   lsa_err *err);

#endif
