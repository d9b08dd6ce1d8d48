/* Gathers the statistics of one document while the teacher reads it: see lsa_doc_stats for what comes out. */
#ifndef LSA_DATA_DUMP_TAP_H
#define LSA_DATA_DUMP_TAP_H

#include "data/docs.h"
#include "data/shard_write.h"
#include "infer/gpu_run.h"
#include "infer/lsa_infer.h"

typedef struct lsa_dump_rule {
    double top_p;
    int32_t pool, hidden_stride;
    bool has_keys[LSA_MAX_CSA]; /* store keys and hidden vectors of this ordinal */
    bool stats;
    int64_t dense_every; /* 0: no dense mass; else rows with (position+1) mod dense_every = 0 */
    double dense_min;    /* entries below go into `rest` */
} lsa_dump_rule;

#define LSA_TAP_CHUNK 1024 /* tokens of a forward call; another number rounds differently */

typedef struct lsa_reader { /* what reads documents: one of the two; borrowed */
    lsa_session *session;
    lsa_gpu_run *gpu; /* the selection must be the pool (lsa_reader_check) */
} lsa_reader;
/* LSA_E_CONFIG for a rule that the reader cannot serve. */
LSA_NODISCARD lsa_status lsa_reader_check(const lsa_reader *r, const lsa_teacher_config *c,
                                          const lsa_dump_rule *rule, lsa_err *err);

/* Reads one document (a session is reset first) and gathers its statistics. step (may be NULL) is called now
 * and then with the tokens done since; its error ends the reading. LSA_E_NUMERIC for a result that is not
 * finite. */
LSA_NODISCARD lsa_status lsa_tap_document(lsa_doc_stats *out, const lsa_reader *r,
                                          const lsa_teacher_config *c, const lsa_dump_rule *rule,
                                          const lsa_doc *doc, bool probe,
                                          lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user,
                                          lsa_err *err);

typedef struct lsa_tap_state lsa_tap_state;

/* Memory for a document of n_token tokens. probe: record probe rows. */
LSA_NODISCARD lsa_status lsa_tap_begin(lsa_tap_state **out, const lsa_teacher_config *c,
                                       const lsa_dump_rule *rule, int64_t n_token, bool probe, lsa_err *err);
lsa_taps lsa_tap_callbacks(lsa_tap_state *t);
/* What a GPU run is fed for it: borrowed, as long as the state; the caller sets done and user. */
LSA_NODISCARD lsa_status lsa_tap_gpu_doc(lsa_gpu_doc **out, lsa_tap_state *t, const lsa_doc *doc,
                                         lsa_err *err);
/* Turns what was gathered into `out`, with the keys of the session or, NULL, of the GPU run; the state is
 * freed by lsa_tap_end either way. */
LSA_NODISCARD lsa_status lsa_tap_finish(lsa_doc_stats *out, lsa_tap_state *t, const lsa_session *s,
                                        const lsa_doc *doc, lsa_err *err);
void lsa_tap_end(lsa_tap_state *t);

#endif
