/* YaRN-blended rotary frequencies. NUMERIC: the blend is done in fp32 like the reference's table, from fp32
 * powers: other roundings move far positions by whole radians. */
#include "kernels/model/rope.h"

#include <math.h>

void lsa_rope_freqs(float *freq, const lsa_rope *r) {
    int32_t half = r->dim / 2;
    double lo = 0, hi = 0;
    if (r->factor != 1.0) {
        const double two_pi = 6.283185307179586476925;
        double c_fast = r->dim * log((double)r->original_len / (r->beta_fast * two_pi)) / (2 * log(r->base));
        double c_slow = r->dim * log((double)r->original_len / (r->beta_slow * two_pi)) / (2 * log(r->base));
        lo = fmax(floor(c_fast), 0);
        hi = fmin(ceil(c_slow), r->dim - 1);
    }
    for (int32_t i = 0; i < half; i++) {
        float f = 1.0f / (float)pow(r->base, (double)(2 * i) / r->dim);
        if (r->factor != 1.0) {
            double span = hi - lo == 0 ? 0.001 : hi - lo;
            float u = (float)fmin(fmax((i - lo) / span, 0), 1);
            f = f / (float)r->factor * u + f * (1.0f - u);
        }
        freq[i] = f;
    }
}
