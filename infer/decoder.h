/* A session wherever it runs: on the CPU (lsa_session) or on one GPU (kernels/model/gpu_session.h). Same
 * definitions, same results but for rounding.
 *
 * CPU decoders: one thread at a time each, several at once. Those of one GPU model take turns: one call at a
 * time. Errors: as lsa_session_forward and gpu_session.h. */
#ifndef LSA_INFER_DECODER_H
#define LSA_INFER_DECODER_H

#include "infer/lsa_infer.h"
#include "infer/recall.h"
#include "kernels/ctx.h"

/* An engine's weights on a GPU, and the workspace of calls of at most `chunk` tokens. Borrows both. */
typedef struct lsa_gpu_model lsa_gpu_model;
LSA_NODISCARD lsa_status lsa_gpu_model_create(lsa_gpu_model **out, lsa_ctx *ctx, const lsa_engine *e,
                                              int64_t chunk, lsa_err *err);
void lsa_gpu_model_destroy(lsa_gpu_model *g); /* NULL allowed; after its decoders */

typedef struct lsa_decoder lsa_decoder;
struct lsa_gpu_session_opts;
struct lsa_gpu_session;

/* gpu NULL: on the CPU; else on that model's GPU, calls then have at most the model's chunk of tokens
 * whatever o->chunk says. */
LSA_NODISCARD lsa_status lsa_decoder_open(lsa_decoder **out, const lsa_engine *e, lsa_gpu_model *gpu,
                                          const lsa_session_opts *o, lsa_err *err);
/* On the model's GPU, with a storage (kernels/model/gpu_session.h); the session, for its tiers, stays the
 * decoder's. */
LSA_NODISCARD lsa_status lsa_decoder_open_gpu(lsa_decoder **out, const lsa_engine *e, lsa_gpu_model *gpu,
                                              const struct lsa_gpu_session_opts *o, lsa_err *err);
struct lsa_gpu_session *lsa_decoder_gpu(lsa_decoder *d); /* NULL on the CPU */
void lsa_decoder_reset(lsa_decoder *d);                  /* empty sequence, position 0 */
void lsa_decoder_close(lsa_decoder *d);                  /* NULL allowed */
int64_t lsa_decoder_position(const lsa_decoder *d);

/* As lsa_session_forward with all logits. taps, NULL allowed: only csa is asked for, and on a GPU without
 * logit, iq, iw and dense_mass, and never when every chunk is attended. n_miss, NULL allowed: misses of the
 * call, over tokens and CSA layers; -1 if unknown (tiers). */
LSA_NODISCARD lsa_status lsa_decoder_forward(lsa_decoder *d, const int32_t *token, int64_t n, float *logits,
                                             const lsa_taps *taps, int64_t *n_miss, lsa_err *err);
/* As lsa_session_set_resident; the bytes are borrowed until the next call. */
LSA_NODISCARD lsa_status lsa_decoder_set_resident(lsa_decoder *d, const uint8_t *resident, int64_t n_masked,
                                                  lsa_err *err);
/* What level 1 reads for the window that starts at the position, in the CSA layers [n_ord]. Borrowed until
 * the next call. */
LSA_NODISCARD lsa_status lsa_decoder_recall_input(lsa_decoder *d, const lsa_csa_ord *ord, int32_t n_ord,
                                                  lsa_recall_input *out, lsa_err *err);

#endif
