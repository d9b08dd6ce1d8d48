/* Top-k by quickselect: see topk.h. The mistake that would stay silent: taking ties in the order that the
 * selection left. */
#include "kernels/cpu/topk.h"

#include <string.h>

#include "kernels/core/num.h"

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
        if (k <= j)
            hi = j;
        else if (k >= i)
            lo = i;
        else
            return v[k];
    }
    return v[k];
}

int64_t lsa_topk(const float *value, int64_t n, int64_t k, const uint8_t *allowed, int64_t n_masked,
                 float *scratch, int32_t *sel) {
    int64_t m = allowed ? lsa_min_i64(n_masked, n) : 0, n_can = 0;
    for (int64_t c = 0; c < m; c++)
        if (allowed[c]) scratch[n_can++] = value[c];
    memcpy(scratch + n_can, value + m, (size_t)(n - m) * sizeof *scratch);
    n_can += n - m;
    int64_t n_sel = 0;
    if (k <= 0) return 0;
    if (n_can <= k) {
        for (int64_t c = 0; c < n; c++)
            if (c >= m || allowed[c]) sel[n_sel++] = (int32_t)c;
        return n_sel;
    }
    float bound = kth_largest(scratch, n_can, k - 1);
    int64_t above = 0;
    for (int64_t c = 0; c < n; c++) above += (c >= m || allowed[c]) && value[c] > bound;
    int64_t ties = k - above; /* the lowest indices among those equal to the bound */
    for (int64_t c = 0; c < n; c++) {
        if (c < m && !allowed[c]) continue;
        if (value[c] > bound || (value[c] == bound && ties-- > 0)) sel[n_sel++] = (int32_t)c;
    }
    return n_sel;
}
