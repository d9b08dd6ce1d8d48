/* Conformance vectors, golden.safetensors `lsa-golden/2`: inputs and the value after every stage on every
 * numeric path, so that any engine can find its own mistake. Names and shapes: EXPORT_FORMAT.md. Truth is
 * chain.h on the `ref` backend. The mistake that would stay silent: inputs on which a wrong convention gives
 * the same numbers; so positions are 0, small, beyond YaRN's original length and near a million, one hidden
 * vector is small enough for eps to matter, and two keys are equal, one is zero. */
#ifndef LSA_EXPORT_GOLDEN_H
#define LSA_EXPORT_GOLDEN_H

#include "data/indexer_file.h"
#include "export/chain.h"

typedef struct lsa_gold_selection { /* one numeric path: [M, KEYS], k [M] */
    float score[LSA_GOLD_M * LSA_GOLD_KEYS];
    int32_t k[LSA_GOLD_M];
    uint8_t top[LSA_GOLD_M * LSA_GOLD_KEYS];   /* 1: among the k highest scores, ties to the lower index */
    uint8_t above[LSA_GOLD_M * LSA_GOLD_KEYS]; /* 1: score strictly above the threshold */
} lsa_gold_selection;

typedef struct lsa_golden { /* host, owned; layers by joint index */
    int32_t n_layer;
    int64_t position[LSA_GOLD_M];
    float *x[LSA_MAX_CSA];      /* [M, hidden] */
    uint8_t *key[LSA_MAX_CSA];  /* [KEYS, 132] */
    lsa_stages at[LSA_MAX_CSA]; /* all stages */
    lsa_gold_selection pick[LSA_QUERY_PATHS];
    float continued[LSA_QUERY_PATHS][LSA_GOLD_M * LSA_GOLD_KEYS]; /* of the score (no mass observed), with a
                                                                   continuation */
    float threshold;
} lsa_golden;

enum { LSA_GOLD_TWIN_LOW = 11, LSA_GOLD_TWIN_HIGH = 37, LSA_GOLD_ZERO = 23 }; /* equal keys; the zero key */

/* Writes dir/golden.safetensors, from dir/indexer.safetensors' parameters in f, and dir/check_indexer.py.
 * Equal parameters give equal bytes. */
LSA_NODISCARD lsa_status lsa_golden_vectors_write(const lsa_indexer_file *f, const char *dir, lsa_err *err);
/* Reads them back. LSA_E_FORMAT if the file is of another version, damaged, or made from another indexer. */
LSA_NODISCARD lsa_status lsa_golden_load(lsa_golden *out, const lsa_indexer_file *f, const char *dir,
                                         lsa_err *err);
void lsa_golden_fini(lsa_golden *g);

/* score [M, KEYS] from the layers' logits [n_layer] on one path, temperature 1, offset 0. */
void lsa_gold_combine(float *score, const float *const *logit, int32_t n_layer, lsa_ensemble e);

#endif
