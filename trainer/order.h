/* Which windows a step asks: a pure function of recipe, data and cursor, whatever the number of ranks.
 *
 * Documents are dealt to V virtual shards (data.virtual_shards), balanced by windows, once. Every step takes
 * the same number of windows from each shard, in the shard's own endless sequence: epoch after epoch, each a
 * permutation of the shard's documents. Shards differ by some windows, so each begins its next epoch when its
 * own windows are used up: none is dropped, none is asked twice in an epoch of its shard. A rank owns
 * consecutive whole shards; one thread. */
#ifndef LSA_TRAINER_ORDER_H
#define LSA_TRAINER_ORDER_H

#include "trainer/source.h"

/* Where training stands: a cursor, not generator state. */
typedef struct lsa_cursor {
    int64_t asked; /* windows already asked of every virtual shard */
} lsa_cursor;

typedef struct lsa_place {
    int64_t doc, window;  /* window of the document */
    int64_t epoch, group; /* of the shard; group: documents that are in memory together (train.pool_mib) */
} lsa_place;

typedef struct lsa_order lsa_order;
/* Rank `rank` of `size`. LSA_E_CONFIG if there is no window, or if `size` does not divide the shards.
 * With fewer documents that have windows than shards, the largest divisor of V that they fill is used. */
LSA_NODISCARD lsa_status lsa_order_create(lsa_order **out, lsa_source *s, const lsa_recipe *r, int rank,
                                          int size, lsa_err *err);
void lsa_order_destroy(lsa_order *o);
int64_t lsa_order_epoch_windows(const lsa_order *o); /* of all shards */
int64_t lsa_order_shards(const lsa_order *o);        /* V in use */
int64_t lsa_order_first(const lsa_order *o);         /* first shard of this rank */
int64_t lsa_order_share(const lsa_order *o);         /* number of shards of this rank */
int64_t lsa_order_rows(const lsa_order *o);          /* windows a step takes from each shard */
/* Passes over all windows that lie before the last one asked. */
int64_t lsa_order_epoch(const lsa_order *o, const lsa_cursor *c);

/* Window k >= 0 of a shard's sequence. */
LSA_NODISCARD lsa_status lsa_order_at(lsa_place *out, lsa_order *o, int64_t shard, int64_t k, lsa_err *err);

/* Whether all of a shard's documents are in memory together: they fit its part of the pool, or have fewer
 * windows than two steps take. Else an epoch has groups, each of at least as many windows as a step takes (if
 * need be past the pool's size): their number, and the documents of one (borrowed until the shard moves to
 * another epoch). */
bool lsa_order_whole(const lsa_order *o, int64_t shard);
int64_t lsa_order_groups(lsa_order *o, int64_t shard, int64_t epoch);
int64_t lsa_order_group_docs(lsa_order *o, int64_t shard, int64_t epoch, int64_t g, const int64_t **doc);

/* to[i] = which of n_to parts gets work i: the largest first, each to the part with the least so far, ties to
 * the lower number. */
LSA_NODISCARD lsa_status lsa_deal(int32_t *to, const int64_t *work, int64_t n, int64_t n_to, lsa_err *err);

#endif
