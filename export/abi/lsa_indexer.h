/* The memory indexer for servers: load an export of lsa-export, score chunks, choose the resident set.
 *
 *     query    hidden vector and position of a request -> query of a joint layer (kept in the handle)
 *     score    index keys of a request                 -> one logit for each visible chunk
 *     select   logits of all joint layers              -> the chunk ids or pages to keep on the GPU
 *     observe  what attention read in a window         -> the state of a request that select_observed adds
 *
 * C99 and C++11, nothing but this header and liblsa_indexer. A worked example: export/abi/README.md. Every
 * function returns 0 or a code (LSA_IDX_E_*) and then leaves one message in error[LSA_IDX_ERROR] (NULL: no
 * message; empty on success). Nothing is printed. Nothing is allocated after open and clone (on a CPU handle
 * the OpenMP runtime makes a calling thread's helpers at its first call).
 *
 * Threads: a handle serves one call at a time (on a GPU also one stream at a time); handles made by
 * lsa_idx_clone share the weights and may be used in parallel. Cloning and lsa_idx_get_info only read, so
 * they may run beside a call on the same handle.
 *
 * Memory: on a CPU handle all arrays are host memory and calls return when they are done (stream is ignored).
 * On a CUDA handle all arrays, key descriptors included, are memory of its device and calls only launch on
 * the stream (a cudaStream_t; NULL: the default stream), so they may be captured into a CUDA graph and
 * replayed with new contents of the same arrays. Rules and scalars are host values, copied at the call.
 * Arrays are aligned to their element; m = 0 is a valid call that does nothing.
 *
 * Checks: scalars, pointers and alignment on both devices. What arrays hold (positions, numbers of chunks,
 * pages, masses) is checked on the CPU only; a GPU cuts a request's chunks at ld and max_chunks and trusts
 * its pages and states. A hidden vector that is not finite is no error: its logits are NaN on both devices
 * and lsa_idx_select never keeps a NaN, so that such a request is left with its sink and tail (in page mode
 * other pages fill up k).
 *
 * Determinism: the same call on the same contents gives the same bits on one device, whatever the threads.
 * Selection from equal logits is the same set on every device.
 *
 * Conventions (positions, RoPE, Hadamard, scales): the folder's README.md; replay golden.safetensors to prove
 * them. Formulas: FlashMemory-DeepSeek-V4, arXiv 2606.09079. */
#ifndef LSA_INDEXER_H
#define LSA_INDEXER_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define LSA_IDX_API __attribute__((visibility("default")))
#else
#define LSA_IDX_API
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
    int32_t ensemble;                  /* LSA_IDX_SUM ...: the one the export was made for */
    int32_t calibrated;                /* 1: thresholds by budget are known (LSA_IDX_CALIBRATED) */
    int64_t tau, tail;                 /* tokens: a decision lasts tau; the newest tail are always resident */
    int64_t trained_length;            /* longest position seen in training, 0 if unknown */
    int64_t device_bytes, host_bytes;  /* of this handle, weights included */
} lsa_idx_info;

/* folder: what `lsa-export write` made. A file that is damaged, or of a format this library does not know, is
 * refused. The caller closes *out; on failure it is NULL. */
LSA_IDX_API int lsa_idx_open(lsa_idx **out, int32_t abi, const char *folder, const lsa_idx_options *options,
                             char *error);
LSA_IDX_API int lsa_idx_clone(lsa_idx **out, const lsa_idx *x, char *error);
LSA_IDX_API void lsa_idx_close(lsa_idx *x); /* NULL allowed; the weights go with the last handle */
LSA_IDX_API void lsa_idx_get_info(const lsa_idx *x, lsa_idx_info *out);

/* Queries of joint layer `layer` (0 .. n_layer-1) for m requests: hidden bf16 [m, hidden] (the attention
 * input of that layer after its norm, of the newest token), position [m] of that token, from 0. They stay in
 * the handle until the layer's next query. */
LSA_IDX_API int lsa_idx_query(lsa_idx *x, int32_t layer, int32_t m, const uint16_t *hidden,
                              const int64_t *position, void *stream, char *error);

/* Index keys of one request in one layer: rows of 132 bytes (128 e4m3 codes, then the f32 scale), or pages of
 * 8448 bytes (codes of 64 chunks, then their 64 scales). */
typedef struct lsa_idx_keys {
    const uint8_t *data; /* row 0 (4-byte aligned), or the pool of pages (16-byte aligned) */
    const int32_t *page; /* NULL: rows. Else chunk c is entry c % 64 of page page[c / 64] of the pool */
    int64_t n_chunk; /* visible chunks: floor((position + 1) / 4), at most ld and max_chunks; 0 is valid */
} lsa_idx_keys;

/* logit f32 [m, ld]: chunk c of request i at i * ld + c, by the layer's latest queries, which must have been
 * of at least m requests; the rest of a row is left as it is. keys [m]. */
LSA_IDX_API int lsa_idx_score(lsa_idx *x, int32_t layer, int32_t m, const lsa_idx_keys *keys, float *logit,
                              int64_t ld, void *stream, char *error);

enum { LSA_IDX_SUM = 0, LSA_IDX_MEAN, LSA_IDX_MAX, LSA_IDX_EXPORTED = -1 };
enum {
    LSA_IDX_THRESHOLD = 0, /* score > threshold, at most `cap` of them (0: no cap) */
    LSA_IDX_TOPK,          /* the k highest */
    LSA_IDX_BUDGET,        /* the ceil(budget * evictable) highest */
    LSA_IDX_PAGES,         /* the k pages of 64 chunks with the most chunks above the threshold */
    LSA_IDX_CALIBRATED     /* as THRESHOLD, with the export's threshold for `budget` at this context length */
};
/* Evictable: all visible chunks but the first `sink` and the newest `tail`, which are always kept. The score
 * of a chunk is the sum of the layers' logits, or the mean or maximum over layers of sigmoid(logit /
 * temperature + offset) with the export's calibration (1 and 0 without). An export whose training learned a
 * continuation is ranked by max over j of sum(c - j) - b_j, which select forms from all visible chunks, sink
 * and tail included; it knows no mean or maximum (LSA_IDX_E_CONFIG). */
typedef struct lsa_idx_rule {
    int32_t mode;     /* LSA_IDX_THRESHOLD ... */
    int32_t ensemble; /* LSA_IDX_SUM, MEAN, MAX, or EXPORTED: the export's own */
    int64_t k;        /* TOPK: evictable chunks; PAGES: pages, those of sink and tail included */
    int64_t cap;      /* THRESHOLD, CALIBRATED */
    double budget;    /* BUDGET: in [0, 1]. CALIBRATED, and PAGES with threshold NAN: inside the range of the
                         calibration's table, between whose budgets thresholds are linear in log(budget) */
    float threshold;  /* THRESHOLD, PAGES; in units of the score. NAN in PAGES: the one of `budget` */
    int64_t sink;     /* chunks */
    int64_t tail;     /* chunks; -1: what the export was trained with (a quarter of info's, rounded up) */
} lsa_idx_rule;

/* Kept chunks of m requests, ascending, sink and tail included (PAGES: ascending page numbers). logit
 * [n_layer, m, ld]; n_chunk [m]; out [m, ld_out]; n_out [m]. Ties go to the lower index; pages rank by their
 * number of chunks above the threshold, then by their highest score, then the lower number. What does not fit
 * ld_out is left out, highest ids first (then n_out is ld_out): give it room for the newest chunks. Uses no
 * queries: logits may be of another step or handle. */
LSA_IDX_API int lsa_idx_select(lsa_idx *x, int32_t m, const lsa_idx_rule *rule, const float *logit,
                               int64_t ld, const int64_t *n_chunk, int32_t *out, int64_t ld_out,
                               int32_t *n_out, void *stream, char *error);

/* 1: the export was trained with an observed-mass prior: report what attention read (observe) and select with
 * it (select_observed). lsa_idx_select of such an export ranks without; the model card says what that loses.
 */
LSA_IDX_API int lsa_idx_has_prior(const lsa_idx *x);

/* The state of one request, the caller's own memory: f32 [2, ld], the masses of the window just decoded, then
 * a decayed memory of the windows before; all 0 when the request begins. Call observe when a window has
 * ended, before the select of the next: chunk [n] (each at most once, in [0, ld)) and mass [n], the attention
 * probability on the chunk, mean over all CSA layers, heads and tokens of the window, those that did not
 * select it counting 0; chunks left out have none. A prompt is observed as windows cut at multiples of info's
 * tau, the last one shorter, with what its prefill attended to. LSA_IDX_E_CONFIG: an export without a prior.
 */
LSA_IDX_API int lsa_idx_observe(lsa_idx *x, float *state, int64_t ld, int64_t n, const int32_t *chunk,
                                const float *mass, void *stream, char *error);

/* As lsa_idx_select, with state [m]: one state for each request, f32 [2, ld_state], ld_state at least its
 * n_chunk (on a GPU not checked), or NULL: nothing observed. The export's prior of the masses is added to the
 * sum of the logits, before a continuation. */
LSA_IDX_API int lsa_idx_select_observed(lsa_idx *x, int32_t m, const lsa_idx_rule *rule, const float *logit,
                                        int64_t ld, const int64_t *n_chunk, const float *const *state,
                                        int64_t ld_state, int32_t *out, int64_t ld_out, int32_t *n_out,
                                        void *stream, char *error);

#ifdef __cplusplus
}
#endif
#endif
