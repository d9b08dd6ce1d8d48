/* The lightning indexer (architecture notes 7): logits of all visible chunks and the top-k with a fixed tie rule:
 * larger logit first, then lower index. */
#include <string.h>

#include "infer/engine.h"
#include "infer/numeric.h"
#include "kernels/core/num.h"
#include "kernels/cpu/gemm.h"

void lsa_index_logits(const lsa_engine *e, const layer_state *l, const float *iq, const float *iw, int64_t n, int64_t n_key,
                      float *tile, float *logit, int64_t ld) {
    const int64_t h = e->c.index_n_head, d = e->c.index_head_dim;
    for (int64_t k0 = 0; k0 < n_key; k0 += LSA_KEY_TILE) {
        int64_t nk = lsa_min_i64(LSA_KEY_TILE, n_key - k0);
        lsa_gemm_nt(n * h, nk, d, 1.0f, iq, d, l->key + k0 * d, d, 0.0f, tile, LSA_KEY_TILE);
        for (int64_t t = 0; t < n; t++) {
            float *out = logit + t * ld + k0;
            for (int64_t s = 0; s < nk; s++) out[s] = 0.0f;
            for (int64_t j = 0; j < h; j++) {
                const float *p = tile + (t * h + j) * LSA_KEY_TILE;
                const float w = iw[t * h + j];
                for (int64_t s = 0; s < nk; s++) out[s] += w * (p[s] > 0.0f ? p[s] : 0.0f);
            }
        }
    }
}

/* Value of rank k (0-based, descending) of v[n]; v is permuted. Median-of-three quickselect. */
static float kth_largest(float *v, int64_t n, int64_t k) {
    int64_t lo = 0, hi = n - 1;
    while (lo < hi) {
        float a = v[lo], b = v[(lo + hi) / 2], c = v[hi];
        float p = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        int64_t i = lo, j = hi;
        while (i <= j) {
            while (v[i] > p) i++;
            while (v[j] < p) j--;
            if (i <= j) {
                float x = v[i];
                v[i++] = v[j];
                v[j--] = x;
            }
        }
        if (k <= j) hi = j;
        else if (k >= i) lo = i;
        else return v[k];
    }
    return v[k];
}

int32_t lsa_select_topk(const float *logit, int64_t n, int32_t k, const uint8_t *resident, int64_t n_masked, float *scratch,
                        int32_t *sel) {
    int64_t m = resident ? lsa_min_i64(n_masked, n) : 0, n_can = 0;
    for (int64_t c = 0; c < m; c++)
        if (resident[c]) scratch[n_can++] = logit[c];
    memcpy(scratch + n_can, logit + m, (size_t)(n - m) * sizeof *scratch);
    n_can += n - m;
    int32_t n_sel = 0;
    if (n_can <= k) {
        for (int64_t c = 0; c < n; c++)
            if (c >= m || resident[c]) sel[n_sel++] = (int32_t)c;
        return n_sel;
    }
    float bound = kth_largest(scratch, n_can, k - 1);
    int32_t above = 0;
    for (int64_t c = 0; c < n; c++) above += (c >= m || resident[c]) && logit[c] > bound;
    int32_t ties = k - above; /* the lowest indices among those equal to the bound */
    for (int64_t c = 0; c < n; c++) {
        if (c < m && !resident[c]) continue;
        if (logit[c] > bound || (logit[c] == bound && ties-- > 0)) sel[n_sel++] = (int32_t)c;
    }
    return n_sel;
}
