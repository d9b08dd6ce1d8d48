/* A batch's memory. Internal to kernels/cuda/decode. See kernels/model/gpu_batch.h.
 *
 * Sizes: B requests, L CSA layers, P pages of a context, R of a reserve, A resident ones, F layers with all
 * index keys (full: L), K the others. Pages of a pool lie slot after slot, the layers of a slot together. */
#ifndef LSA_KERNELS_CUDA_DECODE_BATCH_STATE_H
#define LSA_KERNELS_CUDA_DECODE_BATCH_STATE_H

#include "kernels/cuda/decode/step.h"

extern "C" {
#include "kernels/model/gpu_batch.h"
}

enum { KEY_PAGE = LSA_KEY_BYTES * LSA_PAGE_CHUNKS, BATCH_LISTS = 3 };

struct lsa_gpu_pages { /* pinned */
    uint8_t *rows, *keys;
    int64_t bytes, n_page;
};

struct level1_state {           /* made by the first call (level1.cu) */
    lsa_gpu_keys *keys;         /* [F, B] */
    int32_t *page;              /* [B, P] */
    int64_t *n, *position;      /* [B] */
    uint16_t *hidden;           /* [B, hidden] */
    float *logit;               /* [F, B, 64 P] */
    int32_t *out, *n_out;       /* [B, P] [B] */
    int32_t *host_out, *host_n; /* pinned */
    int32_t n_hidden;
    cudaStream_t stream;
    cudaEvent_t begin, end;
};

struct lsa_gpu_batch {
    lsa_ctx *ctx;
    cuda_state *cs;
    lsa_gpu_batch_opts o;
    lsa_gpu_batch_use use;
    int32_t n_csa, n_full, n_kept;                      /* L, F, K */
    int32_t ord[LSA_MAX_LAYERS];                        /* CSA ordinal of a layer, or -1 */
    int32_t full_at[LSA_MAX_CSA], kept_at[LSA_MAX_CSA]; /* place among F or K layers, or -1 */
    int64_t n_page, reserve, active;
    int32_t row_bytes;
    uint8_t *rows, *keys, *all_keys; /* [B R, L, 64 rows] [B R, K, key page] [B P, F, key page] */
    uint8_t *hca[LSA_MAX_LAYERS], *window[LSA_MAX_LAYERS]; /* [B, entries, row] */
    int32_t *list; /* [3, B, A] of the resident pages: slot, first key page, first key page of all_keys */
    lsa_gpu_keys *layer_keys; /* [L, B] */
    int64_t *n_chunk;         /* [B] */
    lsa_gpu_retriever scorer; /* its queries are the batch's; no weights */
    float *q, *sink, *out, *logit, *best, *part, *stat;
    int32_t *sel, *n_sel, *best_at;
    uint32_t *ticket;
    /* swapping, on the host */
    int32_t *page_in;   /* pinned [B, R] page of a slot, or -1 */
    int32_t *next_list; /* pinned [3, B, A] */
    int2 *move;         /* pinned [B, staging] */
    uint8_t *wanted;    /* pinned [P] */
    cudaStream_t copies;
    cudaEvent_t copy_begin, copied, published;
    level1_state l1;
    cudaGraphExec_t graph[LSA_BATCH_PARTS];
    uint8_t *flush;
    int64_t flush_bytes;
    cudaEvent_t begin, end;
};

lsa_status batch_new(lsa_gpu_batch *b, void **out, int64_t n, size_t size, int64_t *counter, const char *name,
                     lsa_err *err);
lsa_status batch_pinned(void **out, int64_t n, size_t size, lsa_err *err);
#define BATCH_NEW(p, count, kind)                                                                            \
    LSA_TRY(batch_new(b, (void **)&(p), (int64_t)(count), sizeof *(p), &b->use.kind, #p, err))
#define BATCH_PINNED(p, count) LSA_TRY(batch_pinned((void **)&(p), (int64_t)(count), sizeof *(p), err))

/* ---- synthetic.cu ---- */
struct page_fill {
    uint8_t *to;         /* [slots, layers, bytes] */
    const int32_t *page; /* page of a slot; NULL: slot mod n_page */
    int64_t slots, n_page;
    int32_t layers, ord[LSA_MAX_CSA], D, rope; /* D 0: index keys */
};
lsa_status synth_pages(const page_fill *f, cudaStream_t s, lsa_err *err);
/* entries rows one after the other, of layer `layer` */
lsa_status synth_rows(uint8_t *to, int kind, int32_t layer, int64_t entries, int64_t period, int32_t D,
                      int32_t rope, cudaStream_t s, lsa_err *err);
lsa_status synth_queries(lsa_gpu_batch *b, cudaStream_t s, lsa_err *err);
lsa_status synth_hidden(uint16_t *to, int32_t m, int32_t hidden, int32_t cycle, cudaStream_t s, lsa_err *err);

void level1_free(lsa_gpu_batch *b);
void graphs_free(lsa_gpu_batch *b);

#endif
