/* lsa-decode generate: greedy decoding, token by token, with full attention or with Lookahead Sparse
 * Attention. */
#ifndef LSA_INFER_GENERATE_H
#define LSA_INFER_GENERATE_H

#include "data/indexer_file.h"
#include "infer/lsa_infer.h"

typedef struct lsa_generate_opts {
    int64_t n_prompt, n_new, tau, tail, sink;
    double budget;
    bool full; /* no level 1: everything resident */
} lsa_generate_opts;

typedef struct lsa_generation {
    int32_t *token; /* [n_new], owned */
    int64_t n;
    double prefill_s, decode_s,
        kept_frac; /* kept: mean over decisions of kept/evictable; 1 when nothing was evictable */
    int64_t decisions, misses;
} lsa_generation;

/* Prefill of prompt[n_prompt] with everything resident; then level 1 on the last prompt token, and every
 * window from there (the first ends at the next multiple of tau). */
LSA_NODISCARD lsa_status lsa_generate(lsa_generation *out, const lsa_engine *e,
                                      const lsa_indexer_file *indexer, const int32_t *prompt,
                                      const lsa_generate_opts *o, lsa_err *err);
void lsa_generation_fini(lsa_generation *g);

#endif
