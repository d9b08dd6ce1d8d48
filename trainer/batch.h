/* Batches: the windows a step asks of a rank's virtual shards (order.h), and their host arrays. */
#ifndef LSA_TRAINER_BATCH_H
#define LSA_TRAINER_BATCH_H

#include "trainer/order.h"

/* Loss weight of a positive with these votes (notes 7.2). */
float lsa_positive_weight(const lsa_recipe *r, const lsa_train_doc *d, int32_t chunk, uint8_t votes);

/* What losses are divided by. */
typedef struct lsa_batch_counts {
    int64_t n_elem, n_pair; /* candidates; positive-negative pairs */
    int64_t n_balanced;     /* positives */
    double row_weights;     /* sum of row_weight, in row order */
} lsa_batch_counts;

typedef struct lsa_batch {
    int64_t m, n, n_key;          /* windows, columns of y, rows of the key pool */
    float *x[LSA_MAX_CSA];        /* [m, d] per joint layer */
    uint8_t *key[LSA_MAX_CSA];    /* [n_key, 132] */
    int64_t *position, *key_base; /* [m] */
    int32_t *n_cand, *cand;       /* [m]; [m, n] if has_cand, else chunks 0..n_cand-1 */
    bool has_cand;
    float *y, *weight; /* [m, n]: labels or target mass; weights (pointwise losses) */
    bool has_prior;    /* what the rows' windows read, borrowed until the source drops the document; and
                          room for its features [m, n] (kernels/prior.h), which lsa_observe fills */
    const lsa_observed **observed;
    float *recent, *memory;
    float *row_weight;      /* [m] kl: 0 without a target, else 1, or the window's mass with loss.by_mass */
    lsa_batch_counts count; /* of all rows: the shards' counts, added in their order */
    int64_t n_shard; /* virtual shards the rows come from, the same number of rows from each, in order */
    lsa_batch_counts *shard;                   /* [n_shard] */
    int64_t *doc, *start;                      /* [m], for messages and traces */
    int64_t cap_m, cap_mn, cap_key, cap_prior; /* room */
} lsa_batch;
void lsa_batch_fini(lsa_batch *b);
void lsa_batch_counts_add(lsa_batch_counts *a, const lsa_batch_counts *b);

/* The rank's windows of the next step, shard after shard, from cursor *c, which moves on. */
LSA_NODISCARD lsa_status lsa_batch_next(lsa_batch *b, lsa_source *s, lsa_order *o, const lsa_recipe *r,
                                        const lsa_indexer_geom *g, lsa_cursor *c, lsa_err *err);
/* Windows [first, first+m) of one document against all their candidates, without labels: evaluation. */
LSA_NODISCARD lsa_status lsa_batch_document(lsa_batch *b, lsa_source *s, int64_t doc, int64_t first,
                                            int64_t m, const lsa_indexer_geom *g, lsa_err *err);

#endif
