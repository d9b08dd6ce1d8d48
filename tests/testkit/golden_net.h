/* The golden net: a tiny DeepSeek-V4 (5 layers, every branch) whose parameters are functions of their names,
 * so that an implementation anywhere can make the same one. Values: architecture notes 19.1 and 20. */
#ifndef LSA_TESTS_TESTKIT_GOLDEN_NET_H
#define LSA_TESTS_TESTKIT_GOLDEN_NET_H

#include <stdint.h>

#include "kernels/core/lsa_status.h"

/* Geometry knobs for variants; lsa_golden_default is the published net. */
typedef struct lsa_golden {
    int32_t dim, n_head, head_dim, rope_dim, q_rank, o_groups, o_rank, index_head, index_dim, index_topk;
    int32_t n_expert, moe_dim, vocab, window;
} lsa_golden;
lsa_golden lsa_golden_default(void);
/* 256-wide variant whose matrices suit 128 x 128 scale blocks and index keys of 128 channels. */
lsa_golden lsa_golden_wide(void);

typedef enum lsa_golden_store {
    LSA_STORE_F32 = 0,      /* original names, F32 */
    LSA_STORE_MODULES,      /* transformers' module names, stacked experts, F32 */
    LSA_STORE_BF16,         /* original names under "model.", BF16 */
    LSA_STORE_FP8_E8M0,     /* matrices F8_E4M3 with E8M0 block scales, experts packed FP4; the rest F32 */
    LSA_STORE_FP8_F32,      /* matrices and experts F8_E4M3 with F32 block scales */
    LSA_STORE_DEQUANT_E8M0, /* what LSA_STORE_FP8_E8M0 means, stored as F32 */
    LSA_STORE_DEQUANT_F32,
    LSA_STORE_DEQUANT_BF16
} lsa_golden_store;

/* Writes dir/config.json and dir/model.safetensors. */
LSA_NODISCARD lsa_status lsa_golden_write(const char *dir, const lsa_golden *g, lsa_golden_store store,
                                          lsa_err *err);

/* Token t of the published sequence. */
static inline int32_t lsa_golden_token(int64_t t) {
    return (int32_t)((7 * t * t + 3 * t + 1) % 64);
}

#endif
