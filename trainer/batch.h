/* Batches: which windows a step asks (a pure function of seed and cursor), and their host arrays. */
#ifndef LSA_TRAINER_BATCH_H
#define LSA_TRAINER_BATCH_H

#include "trainer/source.h"

/* Where training stands: a cursor, not generator state. */
typedef struct lsa_cursor {
    int64_t epoch, index; /* index: windows of the epoch already asked */
} lsa_cursor;

typedef struct lsa_order lsa_order;
LSA_NODISCARD lsa_status lsa_order_create(lsa_order **out, lsa_source *s, const lsa_recipe *r, lsa_err *err);
void lsa_order_destroy(lsa_order *o);
int64_t lsa_order_epoch_windows(const lsa_order *o);
/* Document and window number of the cursor's position; moves the cursor on by one. */
LSA_NODISCARD lsa_status lsa_order_next(int64_t *doc, int64_t *window, lsa_order *o, lsa_cursor *c,
                                        lsa_err *err);

/* Groups of an epoch: documents in memory together (train.pool_mib); group of the cursor's index, number of
 * groups, documents. The list is borrowed until the order moves to another epoch. */
int64_t lsa_order_group(const lsa_order *o, int64_t index);
int64_t lsa_order_groups(lsa_order *o, int64_t epoch);
int64_t lsa_order_group_docs(lsa_order *o, int64_t epoch, int64_t g, const int64_t **doc);

/* Loss weight of a positive with these votes (notes 7.2). */
float lsa_positive_weight(const lsa_recipe *r, const lsa_train_doc *d, int32_t chunk, uint8_t votes);

typedef struct lsa_batch {
    int64_t m, n, n_key;          /* windows, columns of y, rows of the key pool */
    float *x[LSA_MAX_CSA];        /* [m, d] per joint layer */
    uint8_t *key[LSA_MAX_CSA];    /* [n_key, 132] */
    int64_t *position, *key_base; /* [m] */
    int32_t *n_cand, *cand;       /* [m]; [m, n] if has_cand, else chunks 0..n_cand-1 */
    bool has_cand;
    float *y, *weight;      /* [m, n]: labels or target mass; weights (pointwise losses) */
    int64_t n_elem, n_pair; /* candidates in all; positive-negative pairs in all */
    int64_t n_balanced;     /* positives in all */
    float *row_weight;      /* [m] kl: 0 without a target, else 1, or the window's mass with loss.by_mass */
    double row_weights;     /* their sum */
    int64_t *doc, *start;   /* [m], for messages and traces */
    int64_t cap_m, cap_mn, cap_key; /* room */
} lsa_batch;
void lsa_batch_fini(lsa_batch *b);

/* The next r->batch windows of the order, from cursor *c, which moves on. */
LSA_NODISCARD lsa_status lsa_batch_next(lsa_batch *b, lsa_source *s, lsa_order *o, const lsa_recipe *r,
                                        const lsa_indexer_geom *g, lsa_cursor *c, lsa_err *err);
/* Windows [first, first+m) of one document against all their candidates, without labels: evaluation. */
LSA_NODISCARD lsa_status lsa_batch_document(lsa_batch *b, lsa_source *s, int64_t doc, int64_t first,
                                            int64_t m, const lsa_indexer_geom *g, lsa_err *err);

#endif
