/* The two layer numberings of DeepSeek-V4, as two types so that the compiler refuses a mix-up.
 *
 * A CSA ordinal counts compressed-sparse-attention layers in forward order (0..20 in V4-Flash); a layer id is
 * the transformer layer (0..42). Names in indexer files use the ordinal (`retrievers.l{ord}.*`). */
#ifndef LSA_IDS_H
#define LSA_IDS_H

#include <stdint.h>

typedef struct lsa_csa_ord {
    int32_t v;
} lsa_csa_ord;

typedef struct lsa_layer_id {
    int32_t v;
} lsa_layer_id;

#define LSA_MAX_LAYERS 128 /* transformer layers a model may have */
#define LSA_MAX_CSA    64  /* CSA layers a model may have */
#define LSA_CHUNK      4   /* tokens per chunk: the compression ratio of a CSA layer */
#define LSA_KEY_BYTES  132 /* one index key row: 128 E4M3 codes, then one little-endian fp32 scale */
#define LSA_MAX_REACH  64  /* following chunks that a score may continue to (kernels/continuation.h) */

/* Observed-mass prior (kernels/prior.h). */
#define LSA_PRIOR_WEIGHTS 2
#define LSA_PRIOR_DECAY   0.9f  /* of the memory, a window */
#define LSA_PRIOR_UNIT    1e-3f /* mass at which a feature leaves its linear part */

/* Chunks visible to the query token at 0-based `position`. */
static inline int64_t lsa_visible(int64_t position) {
    return (position + 1) / LSA_CHUNK;
}

/* First chunk that is always resident for the window that starts at token `s` (tail in tokens): chunks below
 * it are evictable. s - tail may be negative: then nothing is evictable. */
static inline int64_t lsa_evictable(int64_t s, int64_t tail) {
    return s > tail ? (s - tail) / LSA_CHUNK : 0;
}

/* Chunks kept out of `evictable` at a budget in [0, 1]: ceil(budget * evictable), exact for decimal budgets.
 */
static inline int64_t lsa_budget_chunks(double budget, int64_t evictable) {
    double x = budget * (double)evictable;
    int64_t k = (int64_t)x;
    return x - (double)k > 1e-9 ? k + 1 : k;
}

#endif
