/* The memory indexer for servers: load an export of lsa-export, score chunks, choose the resident set.
 *
 *     query    hidden vector and position of a request -> query of a joint layer (kept in the handle)
 *     score    index keys of a request                 -> one logit for each visible chunk
 *     select   logits of all joint layers              -> the chunk ids or pages to keep on the GPU
 *
 * C99 and C++11, nothing but this header and liblsa_indexer. Every function returns 0 or a code (LSA_IDX_E_*)
 * and then leaves one message in error[LSA_IDX_ERROR] (NULL: no message). Nothing is printed; nothing is
 * allocated after open and clone.
 *
 * Threads: a handle serves one call at a time (on a GPU also one stream at a time); handles made by
 * lsa_idx_clone share the weights and may be used in parallel.
 *
 * Memory: on a CPU handle all arrays are host memory and calls return when they are done (stream is ignored).
 * On a CUDA handle all arrays, key descriptors included, are device memory and calls only launch on the
 * stream (a cudaStream_t; NULL: the default stream), so they may be captured into a CUDA graph and replayed
 * with new contents of the same arrays. Rules and scalars are host values, copied at the call.
 *
 * Conventions (positions, RoPE, Hadamard, scales): the folder's README.md; replay golden.safetensors to prove
 * them. Formulas: FlashMemory-DeepSeek-V4, arXiv 2606.09079. */
#ifndef LSA_INDEXER_H
#define LSA_INDEXER_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LSA_IDX_ABI   1   /* given to lsa_idx_open; another number is refused */
#define LSA_IDX_ERROR 768 /* bytes of a message */

enum {
    LSA_IDX_OK = 0,
    LSA_IDX_E_ARG,         /* a wrong argument */
    LSA_IDX_E_CONFIG,      /* the export does not fit the options */
    LSA_IDX_E_FORMAT,      /* the export is damaged or of another format */
    LSA_IDX_E_IO,          /* the operating system refused a read */
    LSA_IDX_E_NOMEM,       /* out of host or device memory */
    LSA_IDX_E_DEVICE,      /* GPU missing or failing */
    LSA_IDX_E_UNSUPPORTED, /* valid, but this build does not do it */
    LSA_IDX_E_BUG          /* our own invariant broken */
};

/* Numeric path of the queries: f32; rounded to bf16 around RoPE; and on top of that e4m3 codes with one scale
 * a head, as the reference server's paged kernel reads them. */
enum { LSA_IDX_F32 = 0, LSA_IDX_BF16, LSA_IDX_FP8 };

typedef struct lsa_idx lsa_idx;

typedef struct lsa_idx_options {
    const char *device; /* "cpu", "cuda" or "cuda:N" */
    int32_t path;       /* LSA_IDX_* */
    int32_t max_batch;  /* most requests in one call, 1..4096 */
    int64_t max_chunks; /* most visible chunks of a request (a quarter of its tokens) */
} lsa_idx_options;

typedef struct lsa_idx_info {
    int32_t hidden, n_head, head_dim, rank, n_layer;
    int32_t ordinal[64], layer_id[64]; /* of the joint layers: CSA ordinal and transformer layer */
    int32_t ensemble;                  /* LSA_IDX_SUM ...: the rule the export was made for */
    int32_t calibrated;                /* 1: thresholds by budget are known (LSA_IDX_CALIBRATED) */
    int64_t tau, tail;                 /* tokens: a decision lasts tau; the newest tail are always resident */
    int64_t trained_length;            /* longest position seen in training, 0 if unknown */
    int64_t device_bytes, host_bytes;  /* of this handle, weights included */
} lsa_idx_info;

int lsa_idx_open(lsa_idx **out, int32_t abi, const char *folder, const lsa_idx_options *options, char *error);
int lsa_idx_clone(lsa_idx **out, const lsa_idx *x, char *error);
void lsa_idx_close(lsa_idx *x); /* NULL allowed */
void lsa_idx_get_info(const lsa_idx *x, lsa_idx_info *out);

/* Queries of joint layer `layer` (0 .. n_layer-1) for m requests: hidden bf16 [m, hidden] (the attention
 * input of that layer after its norm, of the newest token), position [m] of that token. */
int lsa_idx_query(lsa_idx *x, int32_t layer, int32_t m, const uint16_t *hidden, const int64_t *position,
                  void *stream, char *error);

/* Index keys of one request in one layer: rows of 132 bytes (128 e4m3 codes, then the f32 scale), or pages of
 * 8448 bytes (codes of 64 chunks, then their 64 scales). */
typedef struct lsa_idx_keys {
    const uint8_t *data; /* row 0 (4-byte aligned), or the pool of pages (16-byte aligned) */
    const int32_t *page; /* NULL: rows. Else chunk c is entry c % 64 of page page[c / 64] of the pool */
    int64_t n_chunk;     /* visible chunks: floor((position + 1) / 4) */
} lsa_idx_keys;

/* logit f32 [m, ld]: chunk c of request i at i * ld + c, by the layer's latest queries. */
int lsa_idx_score(lsa_idx *x, int32_t layer, int32_t m, const lsa_idx_keys *keys, float *logit, int64_t ld,
                  void *stream, char *error);

enum { LSA_IDX_SUM = 0, LSA_IDX_MEAN, LSA_IDX_MAX, LSA_IDX_EXPORTED = -1 };
enum {
    LSA_IDX_THRESHOLD = 0, /* score > threshold, at most `cap` of them (0: no cap) */
    LSA_IDX_TOPK,          /* the k highest */
    LSA_IDX_BUDGET,        /* the ceil(budget * evictable) highest */
    LSA_IDX_PAGES,         /* the k pages of 64 chunks with the most chunks above the threshold */
    LSA_IDX_CALIBRATED     /* as THRESHOLD, with the export's threshold for `budget` at this context length */
};
typedef struct lsa_idx_rule {
    int32_t mode;     /* LSA_IDX_THRESHOLD ... */
    int32_t ensemble; /* score of a chunk: sum of logits, mean or maximum of sigmoids; or LSA_IDX_EXPORTED */
    int64_t k;        /* TOPK: chunks, PAGES: pages (forced ones included) */
    int64_t cap;      /* THRESHOLD, CALIBRATED */
    double
        budget; /* BUDGET, CALIBRATED; PAGES with threshold NAN: budget whose calibrated threshold counts */
    float threshold; /* THRESHOLD, PAGES; in units of the score. NAN in PAGES: calibrated */
    int64_t sink;    /* chunks at the start that are always kept */
    int64_t tail;    /* newest chunks that are always kept; -1: what the export was trained with */
} lsa_idx_rule;

/* Kept chunks of m requests, ascending, sink and tail included (PAGES: ascending page numbers). logit
 * [n_layer, m, ld]; n_chunk [m]; out [m, ld_out]; n_out [m]. Ties go to the lower index. What does not fit
 * ld_out is left out, highest ids first (then n_out is ld_out). */
int lsa_idx_select(lsa_idx *x, int32_t m, const lsa_idx_rule *rule, const float *logit, int64_t ld,
                   const int64_t *n_chunk, int32_t *out, int64_t ld_out, int32_t *n_out, void *stream,
                   char *error);

#ifdef __cplusplus
}
#endif
#endif
