/* The lightning indexer (architecture notes 7): logits of all visible chunks. */
#include "infer/engine.h"
#include "infer/numeric.h"
#include "kernels/core/num.h"
#include "kernels/cpu/gemm.h"

void lsa_index_logits(const lsa_engine *e, const layer_state *l, const float *iq, const float *iw, int64_t n,
                      int64_t n_key, float *tile, float *logit, int64_t ld) {
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
