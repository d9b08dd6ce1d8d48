/* The engine's documents on a GPU: weights resident there in fp32, a document layer after layer
 * (kernels/model/gpu_teacher.h). Same taps as a session; not tokens one by one, and no resident sets. One
 * thread at a time; taps run on OpenMP threads, each (layer, position) once. Errors as gpu_teacher.h. */
#ifndef LSA_INFER_GPU_RUN_H
#define LSA_INFER_GPU_RUN_H

#include "infer/lsa_infer.h"
#include "kernels/ctx.h"

typedef struct lsa_gpu_run lsa_gpu_run;

/* Borrows ctx (CUDA) and the engine. Documents of at most max_tokens, computed chunk tokens at a time (0:
 * LSA_GPU_RUN_CHUNK); the results do not depend on it but for the rounding of products. */
LSA_NODISCARD lsa_status lsa_gpu_run_create(lsa_gpu_run **out, lsa_ctx *ctx, const lsa_engine *e,
                                            int64_t max_tokens, int64_t chunk, lsa_err *err);
void lsa_gpu_run_destroy(lsa_gpu_run *x); /* NULL allowed */

/* Reads token [n] from position 0. taps->csa is called as by a session, but logit, iq and iw are NULL except
 * at the positions probe [n_probe], ascending; dense_mass is there where (position + 1) mod dense_every = 0
 * (0: nowhere). The other hooks are not asked. step (NULL allowed) is called after every layer with its share
 * of the n tokens; its error ends the reading. */
LSA_NODISCARD lsa_status lsa_gpu_run_document(lsa_gpu_run *x, const int32_t *token, int64_t n,
                                              const int64_t *probe, int32_t n_probe, int64_t dense_every,
                                              const lsa_taps *taps,
                                              lsa_status (*step)(void *user, int64_t n, lsa_err *err),
                                              void *user, lsa_err *err);
/* Next-token logits of tokens [first, first + m) of the last document, m <= LSA_GPU_RUN_CHUNK: host [m,
 * vocab]. */
enum { LSA_GPU_RUN_CHUNK = 2048 }; /* tokens at a time */
LSA_NODISCARD lsa_status lsa_gpu_run_logits(lsa_gpu_run *x, int64_t first, int64_t m, float *logits,
                                            lsa_err *err);
/* As lsa_session_keys, of the last document. */
const float *lsa_gpu_run_keys(const lsa_gpu_run *x, lsa_csa_ord ord, int64_t *n);

#endif
