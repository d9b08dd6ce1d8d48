/* The teacher and decoder engine: DeepSeek-V4 forward on the CPU, numeric tier A (fp32), for any geometry.
 *
 * An engine is the loaded weights: immutable, shared by threads. A session is one sequence (one timeline of
 * KV rows, compressor state, index keys): one thread at a time; several sessions may run at once. A forward
 * call parallelises over fixed blocks of tokens with OpenMP (serial inside an outer parallel region), so
 * results do not depend on the number of threads. Source of every formula: the architecture notes of
 * DeepSeek-V4, sections 2 to 9. */
#ifndef LSA_INFER_H
#define LSA_INFER_H

#include <stdbool.h>
#include <stdint.h>

#include "data/teacher.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/core/lsa_status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lsa_engine lsa_engine;
typedef struct lsa_session lsa_session;

typedef struct lsa_engine_opts {
    bool sim_fp8_kv;     /* fp8 simulation of window and compressed KV rows (5.2, 6.3) */
    bool sim_fp4_index;  /* fp4 simulation of index queries and keys (2.4, 7) */
    bool without_layers; /* only what is outside the layers is loaded: for a GPU that streams them; no session
                          */
} lsa_engine_opts;

LSA_NODISCARD lsa_status lsa_engine_open(lsa_engine **out, const char *dir, const lsa_engine_opts *opts,
                                         lsa_err *err);
void lsa_engine_close(lsa_engine *e);
const lsa_teacher_config *lsa_engine_config(const lsa_engine *e);
const lsa_teacher *lsa_engine_teacher(const lsa_engine *e);

/* What a CSA layer did for one token. All pointers are valid during the callback only. */
typedef struct lsa_tap_csa {
    lsa_csa_ord ord;
    lsa_layer_id layer;
    int64_t position;    /* of the token */
    int64_t n_visible;   /* T_4(position) */
    const float *hidden; /* [hidden] attn_norm output: what the indexers read */
    const float
        *logit;    /* [n_visible] native indexer logits, fp32, before any mask; see gpu_run.h for when NULL */
    int32_t n_sel; /* selected entries, ascending by chunk */
    const int32_t *sel;     /* [n_sel] */
    const float *sel_logit; /* [n_sel] their native logits */
    const float *mass;      /* [n_sel] attention probability, mean over heads */
    float window_mass, sink_mass;
    int32_t n_miss; /* entries of the native top-k over all visible chunks that were not resident; 0 without a
                       set */
    const float *iq;         /* [index_n_head, index_head_dim] native query after RoPE and Hadamard */
    const float *iw;         /* [index_n_head] scaled head weights */
    const float *dense_mass; /* [n_visible] counterfactual mass over all visible chunks (15.1), or NULL */
} lsa_tap_csa;

/* Callbacks run on worker threads, several at once, never twice for the same (layer, position); they must
 * only touch state owned by that pair. Any pointer may be NULL. */
typedef struct lsa_taps {
    void *user;
    void (*csa)(void *user, const lsa_tap_csa *t);
    bool (*want_dense)(void *user, lsa_csa_ord ord,
                       int64_t position); /* compute dense_mass for this token? */
    /* Test hooks: may overwrite the selection (n entries of sel, ascending) or the routed experts of a token.
     */
    void (*choose_chunks)(void *user, lsa_layer_id layer, int64_t position, int32_t n, int32_t *sel);
    void (*choose_experts)(void *user, lsa_layer_id layer, int64_t position, int32_t n, int32_t *expert,
                           const float *score /* [n_expert] router score + bias */);
} lsa_taps;

/* Room for max_tokens tokens; forward calls may have at most `chunk` tokens (0: 512). attend_all: every
 * visible chunk is attended instead of the native top-k (the `dense` policy). */
typedef struct lsa_session_opts {
    int64_t max_tokens;
    int64_t chunk;
    bool attend_all;
} lsa_session_opts;
LSA_NODISCARD lsa_status lsa_session_create(lsa_session **out, const lsa_engine *e,
                                            const lsa_session_opts *opts, lsa_err *err);
void lsa_session_destroy(lsa_session *s);
void lsa_session_reset(lsa_session *s);             /* empty sequence, position 0 */
int64_t lsa_session_position(const lsa_session *s); /* tokens processed so far */

/* Processes tokens[n] after what came before. logits: [n, vocab] f32, or NULL. last_only: logits is [1,
 * vocab], of the last token. LSA_E_ARG for an id outside the vocabulary (naming offset and id) or too many
 * tokens. */
LSA_NODISCARD lsa_status lsa_session_forward(lsa_session *s, const int32_t *tokens, int64_t n, float *logits,
                                             bool last_only, const lsa_taps *taps, lsa_err *err);

/* Resident set of the CSA layers from now on: chunk c < n_masked is selectable iff resident[c] != 0; chunks
 * >= n_masked are all selectable. The bytes are borrowed until the next call. NULL: everything is resident.
 */
void lsa_session_set_resident(lsa_session *s, const uint8_t *resident, int64_t n_masked);

/* Host bytes before anything is loaded: the weights in fp32, and a session with the workspaces of n_thread
 * threads. */
LSA_NODISCARD lsa_status lsa_engine_bytes(int64_t *out, const lsa_teacher_config *c, lsa_err *err);
int64_t lsa_session_bytes(const lsa_teacher_config *c, const lsa_session_opts *o, int32_t n_thread);

/* Index keys of a CSA layer, fp32 [n, 128] after RoPE and Hadamard (and the fp4 simulation if on); n =
 * position/4. Borrowed until the next forward or reset. Rows never change once written. */
const float *lsa_session_keys(const lsa_session *s, lsa_csa_ord ord, int64_t *n);
/* Hidden vector (attn_norm output) of the last processed token in a CSA layer, [hidden]. Borrowed likewise.
 */
const float *lsa_session_hidden(const lsa_session *s, lsa_csa_ord ord);
/* Bytes of this session's CSA KV rows and index keys per chunk and layer as a server would store them (584 +
 * 132 at head size 512). */
int64_t lsa_server_row_bytes(const lsa_teacher_config *c);

#ifdef __cplusplus
}
#endif
#endif
