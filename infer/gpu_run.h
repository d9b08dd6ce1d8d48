/* The engine's documents on a GPU (kernels/model/gpu_teacher.h), layer after layer: weights resident there in
 * fp32, or streamed from the teacher's files, a wave of documents passing each layer; both give the same
 * bits. Same taps as a session; not tokens one by one, and no resident sets. One thread at a time; taps run
 * on OpenMP threads, each (layer, position) once. Errors as gpu_teacher.h. */
#ifndef LSA_INFER_GPU_RUN_H
#define LSA_INFER_GPU_RUN_H

#include "infer/lsa_infer.h"
#include "kernels/ctx.h"
#include "kernels/model/gpu_teacher.h"

typedef struct lsa_gpu_run lsa_gpu_run;

/* Borrows ctx (CUDA) and the engine. Documents of at most max_tokens, computed chunk tokens at a time (0:
 * LSA_GPU_RUN_CHUNK); the results do not depend on it but for the rounding of products. stream: the engine
 * may have been opened without layers. */
LSA_NODISCARD lsa_status lsa_gpu_run_create(lsa_gpu_run **out, lsa_ctx *ctx, const lsa_engine *e,
                                            int64_t max_tokens, int64_t chunk, bool stream, lsa_err *err);
void lsa_gpu_run_destroy(lsa_gpu_run *x); /* NULL allowed */

enum { LSA_GPU_RUN_CHUNK = 8192 }; /* tokens at a time */

/* Streamed, before the first document: what documents leave between two layers is kept as bf16 (rounded after
 * every layer; else f32, the same bits as resident), and in a file in `dir` (borrowed) without a name; NULL:
 * in pinned memory. Copies from and to a file do not run beside the computing. */
void lsa_gpu_run_park(lsa_gpu_run *x, bool half, const char *dir);

typedef struct lsa_gpu_doc lsa_gpu_doc;
typedef struct lsa_gpu_row_user { /* whose rows: the run's */
    lsa_gpu_run *run;
    lsa_gpu_doc *doc;
    int32_t ord;
} lsa_gpu_row_user;

/* A document on its way. The caller's, and unmoved, until `done` was called (or the run destroyed). */
struct lsa_gpu_doc {
    const int32_t *token; /* [n], read while it is fed */
    int64_t n;
    const int64_t *probe; /* [n_probe] ascending: where taps get logit, iq and iw (else NULL) */
    int32_t n_probe;
    int64_t hidden_stride, dense_every; /* positions with (position + 1) mod this = 0 get them; 0: none */
    const lsa_taps *taps; /* csa as a session calls it, but for the above; other hooks are not asked. NULL */
    float *key[LSA_MAX_CSA];  /* [n/4, Di] as lsa_session_keys, filled with the taps; or NULL */
    void (*done)(void *user); /* after the last tap, in the order of the documents, by the thread that feeds
                                 or drains; or NULL */
    void *user;
    /* the run's own */
    int64_t left; /* CSA layers not yet seen to the end, and one until all are queued */
    lsa_gpu_row_user rows[LSA_MAX_CSA];
};

/* Queues documents [n], each from position 0, and calls taps of these and of earlier ones as their rows
 * arrive. Streamed: they pass each layer together. step (NULL allowed) is called after every layer of a
 * document with its share of the tokens; its error ends the reading. */
LSA_NODISCARD lsa_status lsa_gpu_run_feed(lsa_gpu_run *x, lsa_gpu_doc *const *doc, int64_t n,
                                          lsa_status (*step)(void *user, int64_t n, lsa_err *err), void *user,
                                          lsa_err *err);
/* Until every document fed is done. */
LSA_NODISCARD lsa_status lsa_gpu_run_drain(lsa_gpu_run *x, lsa_err *err);
/* Next-token logits of tokens [first, first + m) of the document fed last, m at most the chunk: host [m,
 * vocab]. */
LSA_NODISCARD lsa_status lsa_gpu_run_logits(lsa_gpu_run *x, int64_t first, int64_t m, float *logits,
                                            lsa_err *err);

/* Where the time went. gpu: by stage (lsa_gpu_stage_name); taps: the host's calls of them; wait: for rows or
 * for the GPU to take more. */
typedef struct lsa_gpu_times {
    double gpu[LSA_GPU_STAGES], taps, wait;
} lsa_gpu_times;
LSA_NODISCARD lsa_status lsa_gpu_run_times(lsa_gpu_run *x, lsa_gpu_times *out, lsa_err *err);

#endif
