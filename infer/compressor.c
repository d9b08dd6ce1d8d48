/* Compressors (architecture notes 6): m tokens become one entry by a per-channel softmax over gates.
 *
 * With two roles (CSA) the lo half of a token's channels serves the entry after its own, the hi half its own
 * entry: entry i pools lo of tokens 4i-4..4i-1 and hi of 4i..4i+3. Swapping the halves stays fluent and fails
 * far away. */
#include "infer/engine.h"
#include "infer/numeric.h"

#define MAX_DIM 4096

void lsa_compress_entry(const lsa_engine *e, const compressor_weights *w, const float *proj, int64_t base,
                        int64_t i, float *out) {
    const int64_t c = w->width, kc = (int64_t)w->roles * c, m = w->ratio;
    const int64_t own = m * i - base; /* proj row of the window's first token */
    const int64_t first = w->roles == 2 && i > 0 ? own - m : own, last = own + m;
    float mx[MAX_DIM], sum[MAX_DIM];
    for (int64_t ch = 0; ch < c; ch++) mx[ch] = -INFINITY;
    for (int64_t r = first; r < last; r++) {
        const float *b = proj + r * 2 * kc + kc + (w->roles == 2 && r >= own ? c : 0);
        for (int64_t ch = 0; ch < c; ch++) mx[ch] = fmaxf(mx[ch], b[ch]);
    }
    for (int64_t ch = 0; ch < c; ch++) sum[ch] = out[ch] = 0.0f;
    for (int64_t r = first; r < last; r++) {
        const float *a = proj + r * 2 * kc + (w->roles == 2 && r >= own ? c : 0), *b = a + kc;
        for (int64_t ch = 0; ch < c; ch++) {
            float p = expf(b[ch] - mx[ch]);
            sum[ch] += p;
            out[ch] += p * a[ch];
        }
    }
    for (int64_t ch = 0; ch < c; ch++) out[ch] /= sum[ch];
    lsa_rms(out, out, w->norm, c, e->c.norm_eps);
    float cs[MAX_DIM];
    lsa_rope_angles(cs, e->freq_comp, e->c.rope_dim / 2, m * i);
    lsa_rotate(out, c, cs, e->c.rope_dim / 2, 1.0f);
}
