/* Which chunks stay resident: from the layers' logits to a set, by threshold, count, budget or page. The one
 * definition; the GPU's (gpu_retrieve.h) gives the same set for the same logits. Pure, thread-safe.
 *
 * Of n visible chunks, the first `sink` and the last `tail` are forced (always kept); the others are
 * evictable. score(c): SUM  sum over layers of z_l(c)                                  (logits, not
 * calibrated) MEAN mean over layers of sigmoid(z_l(c)/temperature_l + offset_l) MAX  maximum over layers of
 * the same THRESHOLD: evictable chunks with score > t; `cap` > 0: of those at most the cap highest. TOPK: the
 * k highest evictable chunks. BUDGET: as TOPK with k = ceil(budget x evictable). PAGES: chunks 64p .. 64p+63
 * are page p; a page's score is its number of chunks with score > t; the k best pages are kept (forced chunks
 * make their pages come first; k is raised to the number of forced pages), ties by the higher maximum score,
 * then the lower page. Source: notes of FlashMemory 11.2, 16.9. All ties of chunks go to the lower index. NaN
 * scores are never kept. t: `threshold`, or with n_knot > 0 interpolated: knot_length are ascending numbers
 * of visible chunks, linear in log2(n) between knots, constant outside. */
#ifndef LSA_KERNELS_MODEL_SELECT_H
#define LSA_KERNELS_MODEL_SELECT_H

#include <stdint.h>

#include "kernels/core/lsa_ids.h"
#include "kernels/core/lsa_status.h"

typedef enum lsa_select_mode {
    LSA_SELECT_THRESHOLD = 0,
    LSA_SELECT_TOPK,
    LSA_SELECT_BUDGET,
    LSA_SELECT_PAGES
} lsa_select_mode;
typedef enum lsa_score_rule { LSA_SCORE_SUM = 0, LSA_SCORE_MEAN, LSA_SCORE_MAX } lsa_score_rule;

enum { LSA_SELECT_KNOTS = 24, LSA_PAGE_CHUNKS = 64 };

typedef struct lsa_select_rule { /* plain data: passed by value to kernels */
    lsa_select_mode mode;
    lsa_score_rule score;
    int32_t n_layer;
    int64_t k, cap, sink, tail;
    double budget;
    float threshold; /* in units of the score */
    int32_t n_knot;
    int64_t knot_length[LSA_SELECT_KNOTS];
    float knot_threshold[LSA_SELECT_KNOTS];
    float temperature[LSA_MAX_CSA], offset[LSA_MAX_CSA];
} lsa_select_rule;

/* Most ids (or pages, in PAGES mode) that the rule may keep of n chunks. */
int64_t lsa_select_room(const lsa_select_rule *r, int64_t n);

/* logit: n_layer rows of n logits, row l at logit + l * stride. out: ascending chunk ids (PAGES: page
 * numbers), room for lsa_select_room(r, n). score [n] may be NULL; else the scores are left there. */
LSA_NODISCARD lsa_status lsa_select(int32_t *out, int64_t *n_out, float *score, const lsa_select_rule *r,
                                    const float *logit, int64_t stride, int64_t n, lsa_err *err);

#endif
