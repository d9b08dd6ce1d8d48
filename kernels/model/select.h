/* Which chunks stay resident: from the layers' logits to a set, by threshold, count, budget or page. The one
 * definition; the GPU's (gpu_retrieve.h) gives the same set for the same logits. Pure, thread-safe.
 *
 * Of n visible chunks, the first `sink` and the last `tail` are forced (always kept; sink first if they
 * meet); the others are evictable. Source: notes of FlashMemory 11.2, 16.9.
 *
 * Score of a chunk, f32, layers added in their order: SUM is the sum of the layers' logits z (not
 * calibrated), with `observed` the prior of the masses (prior.h) added, then continued over `reach` chunks if
 * that is not 0 (continuation.h; all visible chunks lend, forced ones too); MEAN the mean over layers of
 * lsa_sigmoid(z / temperature + offset), the sum divided once; MAX the maximum of the same. A NaN in any
 * layer makes the score NaN, and NaN scores are never kept; -0 equals 0.
 *
 * THRESHOLD keeps evictable chunks with score > t; with `cap` > 0 of those at most the cap highest. TOPK
 * keeps the k highest evictable chunks. BUDGET: TOPK with k = ceil(budget x evictable). Ties go to the lower
 * index.
 *
 * PAGES: chunks 64p .. 64p+63 are page p (the last may be partial). Pages with a forced chunk come first and
 * k is raised to their number; then pages by the number of their chunks with score > t, then by the higher
 * maximum score (NaN skipped), then the lower page.
 *
 * t is `threshold`, or with n_knot > 0 interpolated: knot_length are ascending numbers of visible chunks; in
 * double, linear in log2(n) between knots, constant outside, rounded to f32. */
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
    int64_t k, cap, sink, tail; /* chunks; k: pages in PAGES */
    double budget;              /* in [0, 1] */
    float threshold;            /* in units of the score */
    int32_t n_knot;
    int64_t knot_length[LSA_SELECT_KNOTS];
    float knot_threshold[LSA_SELECT_KNOTS];
    float temperature[LSA_MAX_CSA], offset[LSA_MAX_CSA]; /* MEAN, MAX: > 0, finite */
    int32_t reach;                                       /* SUM only, else 0 */
    float cost[LSA_MAX_REACH];                           /* >= 0, finite */
    /* SUM only, else NULL: [requests] masses of each, f32 [2, observed_ld]: of the window just decoded, then
     * the memory; NULL for a request: nothing was observed. lsa_select takes the first. Memory of the device
     * that selects. */
    const float *const *observed;
    int64_t observed_ld;
    float prior[LSA_PRIOR_WEIGHTS]; /* finite */
} lsa_select_rule;

/* LSA_E_ARG names the field that is out of range. */
LSA_NODISCARD lsa_status lsa_select_check(const lsa_select_rule *r, lsa_err *err);

/* Most ids (or pages, in PAGES mode) that the rule may keep of n chunks. */
int64_t lsa_select_room(const lsa_select_rule *r, int64_t n);

/* A window has ended: the masses `observed` points to, state f32 [2, ld], move on (prior.h), and mass[n] are
 * those of chunks chunk[n], which differ and are in [0, ld). */
void lsa_select_observe(float *state, int64_t ld, int64_t n, const int32_t *chunk, const float *mass);

/* logit: n_layer rows of n logits, row l at logit + l * stride. out: ascending chunk ids (PAGES: page
 * numbers), room for lsa_select_room(r, n). score [n]: the scores are left there; NULL: memory of the call's
 * own. */
LSA_NODISCARD lsa_status lsa_select(int32_t *out, int64_t *n_out, float *score, const lsa_select_rule *r,
                                    const float *logit, int64_t stride, int64_t n, lsa_err *err);

#endif
