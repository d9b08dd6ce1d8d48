/* Level 1 of Lookahead Sparse Attention: at a window's start the memory indexer scores every evictable chunk
 * from the hidden vectors of the token before, and a rule keeps some of them.
 *
 * One recall belongs to one session and one thread. Source: FlashMemory notes 5.1, 11.1; definitions in the
 * design, 1 and 2. */
#ifndef LSA_INFER_RECALL_H
#define LSA_INFER_RECALL_H

#include "data/indexer_file.h"
#include "infer/lsa_infer.h"
#include "kernels/ctx.h"

typedef struct lsa_recall lsa_recall;

/* Refuses an indexer whose hidden size or layers are not the teacher's (LSA_E_CONFIG). */
LSA_NODISCARD lsa_status lsa_recall_check(const lsa_indexer_file *file, const lsa_teacher_config *c,
                                          lsa_err *err);

/* file is borrowed. max_chunk: chunks the session may reach; pending: tokens that may be processed before
 * their windows end (lsa_recall_end_window). Checks as above. */
LSA_NODISCARD lsa_status lsa_recall_create(lsa_recall **out, const lsa_indexer_file *file,
                                           const lsa_engine *e, int64_t max_chunk, int64_t pending,
                                           lsa_err *err);
void lsa_recall_destroy(lsa_recall *r);
void lsa_recall_reset(lsa_recall *r); /* with the session */

/* What level 2 read, for an indexer with an observed-mass prior (kernels/prior.h; otherwise both do nothing).
 * observe is for the tap of CSA layers (lsa_taps) and may run on several worker threads. end_window: the
 * oldest n tokens not yet in a window were one, of any length: the state moves on. Decoding ends a window
 * wherever it decides anew. A prompt has windows too: cut at multiples of tau, the last one shorter, with
 * what the prefill attended to; so that the first decision after it already knows what was in use. */
void lsa_recall_observe(lsa_recall *r, const lsa_tap_csa *t);
void lsa_recall_end_window(lsa_recall *r, int64_t n);

/* What a window's query reads of a sequence, by the indexer's layers: the sequence's position, its index keys
 * [position/4, 128] (of which those encoded before are not read again) and the hidden vector of the last
 * token. */
typedef struct lsa_recall_input {
    int64_t position;
    const float *key[LSA_MAX_CSA], *hidden[LSA_MAX_CSA];
} lsa_recall_input;

/* score[n]: ensemble score (observed mass added and continued, if the indexer says so) of chunks 0..n-1 for
 * the window that starts at the session's position; n <= position/4. */
LSA_NODISCARD lsa_status lsa_recall_score(lsa_recall *r, const lsa_session *s, float *score, int64_t n,
                                          lsa_err *err);
LSA_NODISCARD lsa_status lsa_recall_score_input(lsa_recall *r, const lsa_recall_input *in, float *score,
                                                int64_t n, lsa_err *err);

/* Which chunks stay: exactly one of budget (0..1), top_k (> 0) or threshold (>= 0 on the sigmoid of the
 * score; strictly above) decides, the others negative. The first `sink` chunks always stay. */
typedef struct lsa_keep_rule {
    double budget, threshold;
    int64_t top_k, sink;
} lsa_keep_rule;
/* kept[n] = 1 or 0; scratch n floats, sel n ints; returns how many are kept. Ties to the lower index.
 * is_logit: the score is a logit (sum), so a threshold compares its sigmoid. */
int64_t lsa_keep(uint8_t *kept, const float *score, int64_t n, const lsa_keep_rule *rule, bool is_logit,
                 float *scratch, int32_t *sel);

#endif
