/* Scores by tiles: decode a tile of keys, multiply it with one query's heads, apply ReLU and head weights.
 *
 * Floor of one query and layer: 2*n*H*128 FLOP forward, three times that backward (the product is
 * recomputed); a tile of 256 keys (128 KiB in fp32) and its products stay in the second-level cache. One
 * thread owns a query, so sums have one order. */
#include "kernels/cpu/score.h"

#include <omp.h>
#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/cpu/gemm.h"
#include "kernels/ref/rows.h"

enum { TILE = 256, D = 128 };

static void decode_key(float *key, const uint8_t *code, const uint8_t *scale_bytes) {
    float scale;
    memcpy(&scale, scale_bytes, 4);
    for (int x = 0; x < D; x++) key[x] = lsa_e4m3_table[code[x]] * scale;
}

static void decode_tile(float *key, const uint8_t *keys, const int64_t *key_base, const int32_t *cand,
                        int64_t n, int64_t n_key, int64_t i, int64_t j0, int64_t nj) {
    for (int64_t j = 0; j < nj; j++) {
        const uint8_t *row = keys + lsa_key_row(key_base, cand, n, n_key, i, j0 + j) * LSA_KEY_BYTES;
        decode_key(key + j * D, row, row + D);
    }
}

static float head_sum(const float *w, const float *p, int64_t n_head) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t h = 0; h < n_head; h++) sum += w[h] * (p[h] < 0.0f ? 0.0f : p[h]);
    return sum;
}

static void fwd_query(const lsa_indexer_score_fwd_args *a, int64_t i, lsa_score_work *s) {
    const int64_t H = a->n_head;
    const float *w = a->w + i * H;
    float *z = a->z + i * a->n;
    for (int64_t j0 = 0; j0 < a->n_cand[i]; j0 += TILE) {
        const int64_t nj = lsa_min_i64(TILE, a->n_cand[i] - j0);
        decode_tile(s->key, a->keys, a->key_base, a->cand, a->n, a->n_key, i, j0, nj);
        lsa_gemm_nt(nj, H, D, 1.0f, s->key, D, a->q + i * H * D, D, 0.0f, s->p, H);
        for (int64_t j = 0; j < nj; j++) {
            const float sum = head_sum(w, s->p + j * H, H);
            z[j0 + j] = a->accumulate ? z[j0 + j] + sum : sum;
        }
    }
    for (int64_t j = a->n_cand[i]; j < a->n && !a->accumulate; j++) z[j] = 0.0f;
}

static void bwd_query(const lsa_indexer_score_bwd_args *a, int64_t i, lsa_score_work *s) {
    const int64_t H = a->n_head;
    const float *w = a->w + i * H, *dz = a->dz + i * a->n;
    float *dq = a->dq + i * H * D, *dw = a->dw + i * H;
    memset(dq, 0, (size_t)(H * D) * sizeof *dq);
    memset(dw, 0, (size_t)H * sizeof *dw);
    for (int64_t j0 = 0; j0 < a->n_cand[i]; j0 += TILE) {
        const int64_t nj = lsa_min_i64(TILE, a->n_cand[i] - j0);
        decode_tile(s->key, a->keys, a->key_base, a->cand, a->n, a->n_key, i, j0, nj);
        lsa_gemm_nt(nj, H, D, 1.0f, s->key, D, a->q + i * H * D, D, 0.0f, s->p, H);
        for (int64_t j = 0; j < nj; j++) {
            float *p = s->p + j * H;
            const float g = dz[j0 + j];
            for (int64_t h = 0; h < H; h++) {
                dw[h] += g * (p[h] < 0.0f ? 0.0f : p[h]);
                p[h] = p[h] > 0.0f ? g * w[h] : 0.0f;
            }
        }
        lsa_gemm_tn(H, D, nj, 1.0f, s->p, H, s->key, D, 1.0f, dq, D);
    }
}

/* One scratch per thread, then queries one by one. */
#define EACH_QUERY(a, call)                                                                                  \
    lsa_score_work *s = NULL;                                                                                \
    const int nt = omp_in_parallel() ? 1 : omp_get_max_threads();                                            \
    lsa_status st = LSA_NEW(s, nt, err);                                                                     \
    if (st != LSA_OK) return st;                                                                             \
    _Pragma("omp parallel for schedule(dynamic, 1) num_threads(nt)") for (int64_t i = 0; i < (a)->m; i++)    \
        call((a), i, &s[omp_get_thread_num() < nt ? omp_get_thread_num() : 0]);                              \
    lsa_free(s);                                                                                             \
    return LSA_OK

lsa_status lsa_cpu_score_fwd(const lsa_indexer_score_fwd_args *a, lsa_err *err) {
    EACH_QUERY(a, fwd_query);
}
lsa_status lsa_cpu_score_bwd(const lsa_indexer_score_bwd_args *a, lsa_err *err) {
    EACH_QUERY(a, bwd_query);
}

/* Always a whole tile, whose rows behind the last chunk are left from another: a product of fewer rows may
 * add in another order. */
void lsa_cpu_score_cache(float *z, int32_t n_head, const float *q, const float *w, const uint8_t *data,
                         const int32_t *page, int64_t n, lsa_score_work *work, int n_work) {
    enum { PAGE = 64 };
    const int64_t n_tile = lsa_ceil_div(n, TILE);
    int nt = omp_in_parallel() ? 1 : omp_get_max_threads();
    nt = nt < n_work ? nt : n_work;
    nt = nt < n_tile ? nt : n_tile < 1 ? 1 : (int)n_tile;
#pragma omp parallel for schedule(dynamic, 1) num_threads(nt)
    for (int64_t t = 0; t < n_tile; t++) {
        lsa_score_work *s = &work[nt > 1 ? omp_get_thread_num() : 0];
        const int64_t c0 = t * TILE, nc = lsa_min_i64(TILE, n - c0);
        for (int64_t j = 0; j < nc; j++) {
            const int64_t c = c0 + j, e = c % PAGE;
            const uint8_t *row = data + c * LSA_KEY_BYTES,
                          *base = page ? data + (int64_t)page[c / PAGE] * LSA_CACHE_PAGE_BYTES : NULL;
            decode_key(s->key + j * D, page ? base + e * D : row, page ? base + PAGE * D + 4 * e : row + D);
        }
        lsa_gemm_nt(TILE, n_head, D, 1.0f, s->key, D, q, D, 0.0f, s->p, n_head);
        for (int64_t j = 0; j < nc; j++) z[c0 + j] = head_sum(w, s->p + j * n_head, n_head);
    }
}
