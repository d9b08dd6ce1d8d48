/* Host allocation: see mem.h. Zeroed memory keeps results independent of what the heap held before. */
#include "kernels/core/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/core/num.h"

lsa_status lsa_alloc_(void **out, int64_t n, size_t size, const char *what, lsa_err *err) {
    *out = NULL;
    int64_t bytes;
    if (n < 0) LSA_RET_FAIL(LSA_E_BUG, "allocating %s: negative count %lld", what, (long long)n);
    if (n == 0) return LSA_OK;
    if (!lsa_mul_i64(n, (int64_t)size, &bytes) || bytes > INT64_MAX - 64)
        LSA_RET_FAIL(LSA_E_NOMEM, "allocating %s: %lld elements of %zu bytes overflow", what, (long long)n,
                     size);
    void *p = aligned_alloc(64, (size_t)lsa_align_up(bytes, 64));
    if (!p)
        LSA_RET_FAIL(LSA_E_NOMEM, "allocating %s: %.1f MiB refused; lower the batch, cache or chunk size",
                     what, (double)bytes / 1048576.0);
    memset(p, 0, (size_t)bytes);
    *out = p;
    return LSA_OK;
}

int64_t lsa_host_memory(void) {
    int64_t n = (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE);
    long long limit;
    FILE *f =
        fopen("/sys/fs/cgroup/memory.max", "re"); /* "max" or a number; the root group has no such file */
    if (f && fscanf(f, "%lld", &limit) == 1) n = lsa_min_i64(n, limit);
    if (f) fclose(f);
    return n;
}

void lsa_free(void *p) {
    free(p);
}

lsa_status lsa_grow_(void **data, int64_t *cap, int64_t n, size_t size, const char *what, lsa_err *err) {
    if (n <= *cap) return LSA_OK;
    int64_t want = lsa_max_i64(n, lsa_max_i64(64, *cap + *cap / 2));
    void *p = NULL;
    lsa_status st = lsa_alloc_(&p, want, size, what, err);
    if (st != LSA_OK) return st;
    if (*cap) memcpy(p, *data, (size_t)*cap * size);
    free(*data);
    *data = p;
    *cap = want;
    return LSA_OK;
}
