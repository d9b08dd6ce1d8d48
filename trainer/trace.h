/* The exact samples of every step, for an outside oracle (recipe key train.trace). Grows with the run: for
 * short runs. */
#ifndef LSA_TRAINER_TRACE_H
#define LSA_TRAINER_TRACE_H

#include "trainer/batch.h"

typedef struct lsa_trace lsa_trace;
LSA_NODISCARD lsa_status lsa_trace_create(lsa_trace **out, const float *params, const lsa_indexer_geom *g,
                                          lsa_err *err);
void lsa_trace_destroy(lsa_trace *t);
LSA_NODISCARD lsa_status lsa_trace_add(lsa_trace *t, const lsa_batch *b, const lsa_indexer_geom *g,
                                       double loss, lsa_err *err);
/* Safetensors: params; loss [steps]; per step s: s.n_cand, s.position, s.doc [m], s.cand (key rows) [m, n],
 * s.y, s.weight [m, n], s.x.{layer} [m, d]; keys.{doc}.{layer} u8 [n_key, 132] once a document. */
LSA_NODISCARD lsa_status lsa_trace_save(const lsa_trace *t, const char *path, lsa_err *err);

#endif
