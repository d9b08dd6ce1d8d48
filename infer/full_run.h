/* The full run of one document: every chunk resident, native top-k. It is what the other policies are
 * measured against: the true mass of every window, and the log-probabilities for agreement and KL.
 *
 * Filled by lsa_full_run_make in one thread (its forward calls are parallel unless inside a parallel region);
 * read-only afterwards, so any number of jobs may share it. */
#ifndef LSA_INFER_FULL_RUN_H
#define LSA_INFER_FULL_RUN_H

#include "infer/decoder.h"
#include "infer/policy.h"

enum { LSA_MAX_TAU = 4096 }; /* tokens a window may last */

/* What is counted for a policy and budget; sums, so that documents add up. */
typedef struct lsa_result {
    lsa_policy policy;
    double budget; /* < 0: not applicable */
    int64_t documents, tokens, windows;
    double nll[LSA_N_PART]; /* nats */
    int64_t n[LSA_N_PART];  /* predicted tokens */
    int64_t recalled, agree, n_kl, misses, kept, evictable;
    double kl, captured, total_mass;
    double gpu_bytes; /* over windows: resident chunks (kept, tail, sink) x CSA layers x bytes of a KV row and
                         index key on a server */
    double level1_bytes; /* over windows: index keys of evicted chunks that the memory indexer still reads
                            every window */
    bool has_needs;
    /* from the allocations of sessions on a GPU, 0 elsewhere; the largest of the documents */
    int64_t rows_bytes, keys_bytes, host_bytes; /* CSA rows and index keys on the GPU; pinned memory */
    int64_t swapped_bytes;                      /* copied from host memory to the GPU's reserve, in all */
    bool misses_unknown;                        /* only resident chunks were scored */
} lsa_result;
/* Adds what the decoder's session allocated. */
void lsa_count_memory(lsa_result *r, lsa_decoder *d);

typedef struct lsa_full_run {
    const lsa_doc *doc; /* borrowed */
    const lsa_teacher_config *c;
    uint8_t *part;  /* [n_token] of lsa_token_parts */
    int64_t cap;    /* entries kept per token and layer */
    int32_t *sel;   /* [n_csa, n_token, cap] selected chunks */
    float *mass;    /* the same: their attention mass */
    int32_t *n_sel; /* [n_csa, n_token] */
    float *logp;    /* [n_token, vocab] log-probabilities after token t, or NULL: no KL */
    int32_t *top1;  /* [n_token] arg max after token t */
} lsa_full_run;

/* Runs doc, on the CPU (gpu NULL, calls of 1,024 tokens) or a GPU (calls of tau, as the policies that are
 * compared with it: the same bits where nothing is evicted; encoded: rows and keys in the server's codecs); r
 * gets the counts of the full policy with windows of tau and the evictable chunks that `tail` gives.
 * keep_logits: fill logp. LSA_E_INTERRUPTED after a signal. */
LSA_NODISCARD lsa_status lsa_full_run_make(lsa_full_run *f, lsa_result *r, const lsa_engine *e,
                                           lsa_gpu_model *gpu, bool encoded, const lsa_doc *doc, int64_t tau,
                                           int64_t tail, bool keep_logits, lsa_err *err);
void lsa_full_run_fini(lsa_full_run *f);

/* mass[n]: native mass of tokens [s, e) summed over them and all CSA layers, on chunks below n. */
void lsa_window_mass(float *mass, const lsa_full_run *f, int64_t s, int64_t e, int64_t n);

/* Counts logits[n, vocab] after tokens s .. s+n-1, which predict tokens s+1 .. s+n (the last of the document
 * predicts nothing). */
void lsa_count_logits(lsa_result *r, const lsa_full_run *f, const float *logits, int64_t s, int64_t n);

#endif
