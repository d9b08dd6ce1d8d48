/* A decode step's attention path for a batch of requests on one GPU, over caches in a server's codecs: level
 * 2 (index logits and top-k of each request's pages), attention of the CSA layers, attention of the HCA and
 * window layers, level 1 and the swap-in of pages. Caches and queries are synthetic (synthetic.h) and the
 * context does not grow: this measures, it does not decode. Projections and experts are not there.
 *
 * A page is 64 chunks. Full attention has all pages of a request on the GPU; otherwise a reserve of them, of
 * which `staging` are free for the next set; the rest are resident and listed in ascending order. The layers
 * that level 1 reads have all index keys on the GPU, and level 2 reads those.
 *
 * One thread. Everything runs on the context's stream, but for level 1 and copies, which have streams of
 * their own. Errors: LSA_E_ARG, LSA_E_UNSUPPORTED, LSA_E_NOMEM, LSA_E_DEVICE. */
#ifndef LSA_KERNELS_MODEL_GPU_BATCH_H
#define LSA_KERNELS_MODEL_GPU_BATCH_H

#include "kernels/core/lsa_ids.h"
#include "kernels/ctx.h"
#include "kernels/model/gpu_retrieve.h"

typedef struct lsa_gpu_batch_opts {
    int32_t n_layer, ratio[LSA_MAX_LAYERS]; /* 0, 4 (CSA) or the HCA ratio */
    int32_t n_head, head_dim, rope_dim, window, index_n_head, index_head_dim, top_k;
    int32_t batch;
    int64_t tokens;                        /* of every request, a multiple of 256 and of the HCA ratios */
    int64_t reserve, staging;              /* pages of a request; reserve 0: full attention */
    int32_t n_memory, memory[LSA_MAX_CSA]; /* CSA ordinals of level 1's layers, ascending; not for full */
    bool portable;                         /* never the sm_90 kernels (tests) */
} lsa_gpu_batch_opts;

/* Bytes on the GPU, as allocated. kv: what a server keeps for requests. */
typedef struct lsa_gpu_batch_use {
    int64_t rows, keys, keys_level1, hca, window, tables; /* kv */
    int64_t work;
} lsa_gpu_batch_use;
static inline int64_t lsa_gpu_batch_kv(const lsa_gpu_batch_use *u) {
    return u->rows + u->keys + u->keys_level1 + u->hca + u->window + u->tables;
}

/* Pinned host memory with all pages of rows and index keys of a document of `tokens` tokens; all requests of
 * all batches copy from it. o: the layers. */
typedef struct lsa_gpu_pages lsa_gpu_pages;
LSA_NODISCARD lsa_status lsa_gpu_pages_create(lsa_gpu_pages **out, lsa_ctx *ctx, const lsa_gpu_batch_opts *o,
                                              lsa_err *err);
void lsa_gpu_pages_destroy(lsa_gpu_pages *p); /* NULL allowed */
int64_t lsa_gpu_pages_bytes(const lsa_gpu_pages *p);

typedef struct lsa_gpu_batch lsa_gpu_batch;
/* Borrows ctx (CUDA). At first every request has pages spread evenly. */
LSA_NODISCARD lsa_status lsa_gpu_batch_create(lsa_gpu_batch **out, lsa_ctx *ctx, const lsa_gpu_batch_opts *o,
                                              lsa_err *err);
void lsa_gpu_batch_destroy(lsa_gpu_batch *b); /* NULL allowed */
const lsa_gpu_batch_use *lsa_gpu_batch_count(const lsa_gpu_batch *b);

/* SCORE, TOPK, ATTEND: of all CSA layers; CSA: these three layer by layer; OTHER: attention of HCA and window
 * layers; STEP: all layers in their order. */
typedef enum lsa_gpu_batch_part {
    LSA_BATCH_SCORE = 0,
    LSA_BATCH_TOPK,
    LSA_BATCH_ATTEND,
    LSA_BATCH_CSA,
    LSA_BATCH_OTHER,
    LSA_BATCH_STEP,
    LSA_BATCH_PARTS
} lsa_gpu_batch_part;
LSA_NODISCARD lsa_status lsa_gpu_batch_launch(lsa_gpu_batch *b, lsa_gpu_batch_part part, lsa_err *err);
/* One layer: score, top-k and attention, or attention. */
LSA_NODISCARD lsa_status lsa_gpu_batch_layer(lsa_gpu_batch *b, int32_t layer, lsa_err *err);
/* Median of n replays of a CUDA graph of the part, in seconds; before each, `flush` bytes are written, which
 * empties the L2 cache as other layers' weights would. */
LSA_NODISCARD lsa_status lsa_gpu_batch_time(lsa_gpu_batch *b, lsa_gpu_batch_part part, int32_t n,
                                            int64_t flush, double *seconds, lsa_err *err);
/* n steps one after the other, as graphs; seconds: all of them. */
LSA_NODISCARD lsa_status lsa_gpu_batch_steps(lsa_gpu_batch *b, int32_t n, double *seconds, lsa_err *err);

/* Level 1 over all chunks of every request, by synthetic hidden vectors of window `cycle`, beside what the
 * batch computes; then *page [batch, *ld] and *n [batch] (host, valid until the next call) are the chosen
 * pages. seconds: of its stream. x: of n_memory layers, for at least batch requests. */
LSA_NODISCARD lsa_status lsa_gpu_batch_level1(lsa_gpu_batch *b, lsa_gpu_retriever *x, int32_t hidden,
                                              int32_t cycle, const int32_t **page, int64_t *ld,
                                              const int32_t **n, double *seconds, lsa_err *err);
/* Of each request's wanted pages [batch, ld] those that are not resident, at most `staging`, lowest first,
 * begin to take the places of pages that are no longer wanted: copies on a stream of their own. moved: bytes.
 */
LSA_NODISCARD lsa_status lsa_gpu_batch_swap(lsa_gpu_batch *b, const lsa_gpu_pages *from, const int32_t *page,
                                            int64_t ld, const int32_t *n, int64_t *moved, lsa_err *err);
/* What was swapped in is resident from the next launch on. seconds: of the copies; waits for them only if
 * seconds is not NULL. */
LSA_NODISCARD lsa_status lsa_gpu_batch_publish(lsa_gpu_batch *b, double *seconds, lsa_err *err);

/* What the last launch left, for checks: waits. Arrays of the caller. */
typedef struct lsa_gpu_batch_view {
    int64_t n_page;       /* resident pages of the request */
    int32_t *page;        /* [n_page], ascending */
    float *logit;         /* [64 n_page] of the last CSA layer that was scored */
    int32_t *sel, *n_sel; /* [top_k]: positions in the list of resident chunks; [1] */
    float *out;           /* [n_head, head_dim] of the last attention */
} lsa_gpu_batch_view;
int64_t lsa_gpu_batch_resident(const lsa_gpu_batch *b); /* n_page */
LSA_NODISCARD lsa_status lsa_gpu_batch_see(lsa_gpu_batch *b, int32_t request, lsa_gpu_batch_view *v,
                                           lsa_err *err);

#endif
