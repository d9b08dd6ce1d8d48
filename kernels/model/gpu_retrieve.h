/* The indexer at serving time on one GPU: queries from hidden vectors, logits of all visible chunks, the set
 * to keep. No allocation and no host synchronisation after create; every call only launches on the given
 * stream, so calls can be captured into a CUDA graph. All arrays are device memory unless said otherwise.
 *
 * One retriever belongs to one thread and one stream at a time; a clone shares the weights and has work
 * memory of its own. Errors: LSA_E_NOMEM, LSA_E_DEVICE, LSA_E_ARG, LSA_E_CONFIG, LSA_E_UNSUPPORTED without
 * CUDA. */
#ifndef LSA_KERNELS_MODEL_GPU_RETRIEVE_H
#define LSA_KERNELS_MODEL_GPU_RETRIEVE_H

#include "kernels/ctx.h"
#include "kernels/model/indexer.h"
#include "kernels/model/query_path.h"
#include "kernels/model/select.h"

typedef struct lsa_gpu_retriever lsa_gpu_retriever;

/* Keys of one request in one layer, an element of a device array. Codec e4m3_f32. */
typedef struct lsa_gpu_keys {
    const uint8_t *data; /* rows: [n_chunk, 132], 4-byte aligned. pages: pool of 8448-byte pages (64 x 128
                            codes, then 64 f32 scales), 16-byte aligned */
    const int32_t *page; /* NULL: rows. Else chunk c is entry c % 64 of page page[c / 64] */
    int64_t n_chunk;     /* visible chunks */
} lsa_gpu_keys;

/* ctx: a CUDA context, must outlive it. params: host f32, flat. max_batch: most requests of a call;
 * max_chunks: most visible chunks of a request. portable: never the sm_90 kernels (tests). */
LSA_NODISCARD lsa_status lsa_gpu_retriever_create(lsa_gpu_retriever **out, lsa_ctx *ctx,
                                                  const lsa_indexer_geom *g, const float *params,
                                                  lsa_query_path path, int32_t max_batch, int64_t max_chunks,
                                                  bool portable, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_retriever_clone(lsa_gpu_retriever **out, const lsa_gpu_retriever *x,
                                                 lsa_err *err);
void lsa_gpu_retriever_destroy(
    lsa_gpu_retriever *x); /* NULL allowed; weights go with the last of the clones */

int64_t lsa_gpu_retriever_bytes(const lsa_gpu_retriever *x); /* device memory, shared weights included */

/* Query of joint layer `layer` (0 .. n_layer-1) for m requests: hidden bf16 [m, d], position i64 [m]. It
 * stays in the retriever, one for each layer. stream: a cudaStream_t, NULL for the default stream. */
LSA_NODISCARD lsa_status lsa_gpu_retriever_query(lsa_gpu_retriever *x, int32_t layer, int32_t m,
                                                 const uint16_t *hidden, const int64_t *position,
                                                 void *stream, lsa_err *err);
/* logit [m, ld]: of chunks 0 .. n_chunk-1 of each request, by the layer's latest query; the rest of a row is
 * left as it is. keys [m]: device. A request with more than ld or max_chunks chunks is cut there. */
LSA_NODISCARD lsa_status lsa_gpu_retriever_score(lsa_gpu_retriever *x, int32_t layer, int32_t m,
                                                 const lsa_gpu_keys *keys, float *logit, int64_t ld,
                                                 void *stream, lsa_err *err);
/* A window of one request has ended: state f32 [2, ld] as in select.h moves on, and mass[n] are the masses of
 * chunks chunk[n], which differ; an id outside [0, ld) is passed over. */
LSA_NODISCARD lsa_status lsa_gpu_retriever_observe(lsa_gpu_retriever *x, float *state, int64_t ld, int64_t n,
                                                   const int32_t *chunk, const float *mass, void *stream,
                                                   lsa_err *err);
/* logit [n_layer, m, ld] (layer stride m * ld), n_chunk i64 [m]; out i32 [m, ld_out], n_out i32 [m]. What
 * does not fit ld_out is left out, highest ids first. rule: host, copied. */
LSA_NODISCARD lsa_status lsa_gpu_retriever_select(lsa_gpu_retriever *x, int32_t m,
                                                  const lsa_select_rule *rule, const float *logit, int64_t ld,
                                                  const int64_t *n_chunk, int32_t *out, int64_t ld_out,
                                                  int32_t *n_out, void *stream, lsa_err *err);

#endif
