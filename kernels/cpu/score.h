/* The indexer's scores and their gradient on the CPU. The ops are internal to kernels/cpu (formulas in
 * ops.h); lsa_cpu_score_cache is for servers. */
#ifndef LSA_KERNELS_CPU_SCORE_H
#define LSA_KERNELS_CPU_SCORE_H

#include "kernels/ops.h"

LSA_NODISCARD lsa_status lsa_cpu_score_fwd(const lsa_indexer_score_fwd_args *a, lsa_err *err);
LSA_NODISCARD lsa_status lsa_cpu_score_bwd(const lsa_indexer_score_bwd_args *a, lsa_err *err);

/* Work memory of one thread, 256 KiB, zeroed before its first use. */
typedef struct lsa_score_work {
    float key[256 * 128], p[256 * 128];
} lsa_score_work;

/* z[n] = logits of chunks 0 .. n-1 for one query (q [n_head,128], w [n_head]) over keys as a server's cache
 * holds them: page NULL: rows of 132 bytes at `data`; else chunk c is entry c % 64 of page page[c / 64] of
 * the pool, 8448 bytes each (64 x 128 codes, then 64 scales). Allocates nothing; uses up to n_work OpenMP
 * threads. A logit has the same bits for rows and pages and does not depend on n or on the threads. */
enum { LSA_CACHE_PAGE_BYTES = 64 * 132 };
void lsa_cpu_score_cache(float *z, int32_t n_head, const float *q, const float *w, const uint8_t *data,
                         const int32_t *page, int64_t n, lsa_score_work *work, int n_work);

#endif
