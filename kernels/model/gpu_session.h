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

/* Room for max_tokens tokens. attend_all: CSA layers attend to every visible chunk instead of the native
 * top-k. */
typedef struct lsa_gpu_session_opts {
    int64_t max_tokens;
    bool attend_all;
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

/* As lsa_gpu_csa_tap, with the layer's place in `layer`; not called with attend_all. */
typedef void lsa_gpu_session_tap(void *user, int32_t layer, const lsa_gpu_csa_rows *rows);

/* Processes token [m] (host, ids inside the vocabulary) after what came before. logits: host [m, vocab], or
 * NULL; last_only: host [1, vocab], of the last token. tap, NULL allowed: once a CSA layer. n_miss, NULL
 * allowed: native choices that were not resident, over tokens and CSA layers. */
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
