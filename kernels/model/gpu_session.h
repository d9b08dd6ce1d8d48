/* A sequence on one GPU that goes on, tokens by tokens: the sliding windows, compressor histories, compressed
 * rows and index keys of every layer stay there between calls. Arithmetic and kernels of the GPU teacher
 * (kernels/model/gpu_teacher.h), whose tables and workspace a session borrows; formulas as there.
 *
 * NUMERIC: as the GPU teacher. Calls of the same lengths give the same bits; other lengths may round matrix
 * products differently. A resident set that leaves nothing out gives the bits of no set at all. Errors: as
 * gpu_teacher.h. Sessions of one teacher take turns: one call at a time. */
#ifndef LSA_KERNELS_MODEL_GPU_SESSION_H
#define LSA_KERNELS_MODEL_GPU_SESSION_H

#include "kernels/core/lsa_ids.h"
#include "kernels/model/gpu_teacher.h"

typedef struct lsa_gpu_session lsa_gpu_session;

/* How the compressed rows and index keys of CSA layers are kept. SERVER and TIERED hold the same bytes, so
 * they give the same bits. A row of D channels is D - rope E4M3 codes, rope bf16, an E8M0 scale for every 64
 * codes, zeros up to a multiple of 8 scales: 584 bytes at D = 512 (notes 13.1, row after row); a key is Di
 * E4M3 codes and an f32 scale (13.2). The codes hold exactly what sim_fp8_kv makes of a row; its rotary
 * channels are rounded to bf16 besides. */
typedef enum lsa_gpu_storage {
    LSA_GPU_ROWS_F32 = 0, /* f32 on the GPU, as computed */
    LSA_GPU_ROWS_SERVER,  /* encoded, all on the GPU */
    LSA_GPU_ROWS_TIERED   /* encoded, all in pinned host memory; the GPU holds a reserve of pages */
} lsa_gpu_storage;

/* Room for max_tokens tokens. attend_all (F32 only): CSA layers attend to every visible chunk instead of the
 * native top-k. TIERED: the reserve holds `reserve` pages of `page` chunks, rows and keys of all CSA layers,
 * this session's own and never more; index keys of the CSA layers (by ordinal) in keys_on_gpu stay on the GPU
 * whole, for a memory indexer. */
typedef struct lsa_gpu_session_opts {
    int64_t max_tokens;
    bool attend_all;
    lsa_gpu_storage storage;
    int64_t reserve;
    int32_t page;
    bool keys_on_gpu[LSA_MAX_CSA];
} lsa_gpu_session_opts;

/* Borrows the teacher and its layers [n_layer], in forward order. Calls may have as many tokens as the
 * teacher's chunk. */
LSA_NODISCARD lsa_status lsa_gpu_session_create(lsa_gpu_session **out, lsa_gpu_teacher *t,
                                                lsa_gpu_layer *const *layer, int32_t n_layer,
                                                const lsa_gpu_session_opts *o, lsa_err *err);
void lsa_gpu_session_destroy(lsa_gpu_session *s);           /* NULL allowed; before its teacher and layers */
void lsa_gpu_session_reset(lsa_gpu_session *s);             /* empty sequence, position 0, no resident set */
int64_t lsa_gpu_session_position(const lsa_gpu_session *s); /* tokens processed so far */

/* Level 2 from now on: of chunks c < n_masked those with resident[c] != 0 can be selected, and all chunks >=
 * n_masked. Host bytes, copied. NULL: everything is resident. */
LSA_NODISCARD lsa_status lsa_gpu_session_set_resident(lsa_gpu_session *s, const uint8_t *resident,
                                                      int64_t n_masked, lsa_err *err);

/* TIERED: what a set means for the tiers. Pages with a resident chunk, those of chunks >= n_masked and the
 * one that is being filled are on the GPU; the missing ones are copied there by one launch on a stream of its
 * own, and calls that follow wait for it. LSA_E_NOMEM, the former set unchanged, if they are more than the
 * reserve holds. Until the first set (prefill) and after NULL attention reads host memory and all chunks are
 * scored; with a set only resident chunks are scored, and misses are unknown (-1). Pages of chunks formed
 * under a set take free places of the reserve: forward is LSA_E_NOMEM, before it computes anything, when
 * there are none.
 *
 * Prefetch: starts to copy what a later set will miss into free places, while calls that follow still run
 * with the present set; as many pages as there are places. */
LSA_NODISCARD lsa_status lsa_gpu_session_prefetch(lsa_gpu_session *s, const uint8_t *resident,
                                                  int64_t n_masked, lsa_err *err);

/* Bytes as allocated, of this session; swapped: copied from host memory to the reserve so far. */
typedef struct lsa_gpu_session_use {
    int64_t rows, keys, keys_level1; /* GPU: CSA rows and keys (a reserve, or all); keys_on_gpu */
    int64_t other;                   /* GPU: windows, compressor histories, HCA rows, page table */
    int64_t work;                    /* GPU: workspace of calls, which sessions could share */
    int64_t host;                    /* pinned */
    int64_t swapped, pages_resident; /* pages that hold something */
} lsa_gpu_session_use;
void lsa_gpu_session_count(const lsa_gpu_session *s, lsa_gpu_session_use *out);

/* What a CSA layer (by its place) did for tokens [first, first + m): host arrays of the session, valid during
 * the call. Rows of sel, logit and mass are top-k long, n_sel [m] entries of them count, ascending by chunk.
 */
typedef struct lsa_gpu_session_rows {
    int32_t layer;
    int64_t first, m, top_k;
    const int32_t *sel, *n_sel;
    const int32_t *n_miss;     /* [m] native choices that were not resident; NULL: unknown */
    const float *logit, *mass; /* native logits of the selected entries; attention mass, mean of heads */
    const float *window_mass, *sink_mass; /* [m] */
    const float *hidden;                  /* [m, d] attention input after its norm */
} lsa_gpu_session_rows;
/* Once a CSA layer and call; not with attend_all. */
typedef void lsa_gpu_session_tap(void *user, const lsa_gpu_session_rows *rows);

/* Processes token [m] (host, ids inside the vocabulary) after what came before. logits: host [m, vocab], or
 * NULL; last_only: host [1, vocab], of the last token. tap, NULL allowed. n_miss, NULL
 * allowed: native choices that were not resident, over tokens and CSA layers; -1 if unknown. */
LSA_NODISCARD lsa_status lsa_gpu_session_forward(lsa_gpu_session *s, const int32_t *token, int64_t m,
                                                 float *logits, bool last_only, lsa_gpu_session_tap *tap,
                                                 void *user, int64_t *n_miss, lsa_err *err);

/* Index keys [first, last) of a CSA layer (by its place), last <= position/4: host [last - first, Di], after
 * RoPE and Hadamard. */
LSA_NODISCARD lsa_status lsa_gpu_session_keys(lsa_gpu_session *s, int32_t layer, int64_t first, int64_t last,
                                              float *key, lsa_err *err);
/* Attention input after its norm of the last token processed, in a CSA layer: host [d]. */
LSA_NODISCARD lsa_status lsa_gpu_session_hidden(lsa_gpu_session *s, int32_t layer, float *hidden,
                                                lsa_err *err);

#endif
