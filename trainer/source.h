/* Documents for training: read from shards on demand, kept in an LRU cache bounded by a memory budget, and
 * the windows that can be asked of them. One thread. */
#ifndef LSA_TRAINER_SOURCE_H
#define LSA_TRAINER_SOURCE_H

#include "data/lsa_shard.h"
#include "kernels/model/indexer.h"
#include "trainer/observed.h"
#include "trainer/recipe_keys.h"

/* One document in memory. Layers are the recipe's joint layers, in order. */
typedef struct lsa_train_doc {
    int64_t doc; /* number in the shards */
    lsa_shards_doc info;
    int64_t *hidden_pos;           /* [n_hidden] */
    uint16_t *hidden[LSA_MAX_CSA]; /* bf16 [n_hidden, d] per joint layer */
    uint8_t *key[LSA_MAX_CSA];     /* [n_key, 132] per joint layer */
    lsa_csr labels;                /* votes */
    lsa_csr
        mass[LSA_MAX_CSA]; /* per CSA layer of the teacher: native (or dense) mass; empty unless asked for */
    lsa_csr native[LSA_MAX_CSA]; /* native mass where `mass` is dense: what captured mass is measured in */
    lsa_observed observed;       /* with model.prior: what its windows read */
    uint8_t *trivial;            /* [n_key] golden in over 80 % of the tokens; NULL unless asked for */
    int64_t bytes;
} lsa_train_doc;

typedef struct lsa_source lsa_source;

/* geom: joint layers to read; with a prior, documents hold what their windows read. need_mass: native or
 * dense masses are used. */
LSA_NODISCARD lsa_status lsa_source_open(lsa_source **out, const char *shards, const lsa_recipe *r,
                                         const lsa_indexer_geom *geom, bool need_mass, lsa_err *err);
void lsa_source_close(lsa_source *s);
const lsa_shards *lsa_source_shards(const lsa_source *s);

/* Documents [0, n_train) train, the rest are held out. */
int64_t lsa_source_n_train(const lsa_source *s);
int64_t lsa_source_n_doc(const lsa_source *s);

/* Windows of a document that training may ask, from its sizes alone (lookahead) or from its labels
 * (reference). */
LSA_NODISCARD lsa_status lsa_source_n_window(int64_t *out, lsa_source *s, int64_t doc, lsa_err *err);
/* Bytes of the document's keys and hidden vectors in the joint layers, from its sizes alone. */
int64_t lsa_source_doc_bytes(const lsa_source *s, int64_t doc);
/* A document of the caller's own, outside the cache. Thread-safe. */
LSA_NODISCARD lsa_status lsa_source_load(lsa_train_doc *d, const lsa_source *s, int64_t doc, lsa_err *err);
void lsa_train_doc_fini(lsa_train_doc *d);
/* Borrowed until the cache needs the room; `pin` documents asked since lsa_source_unpin are never dropped. */
LSA_NODISCARD lsa_status lsa_source_get(const lsa_train_doc **out, lsa_source *s, int64_t doc, lsa_err *err);
void lsa_source_unpin(lsa_source *s);

/* One window of a document. */
typedef struct lsa_window {
    int64_t start, end; /* tokens [start, end) */
    int64_t query;      /* token whose hidden vector asks */
    int64_t hidden_row; /* its row in hidden */
    int64_t n_cand;     /* candidates are chunks [0, n_cand) */
} lsa_window;
LSA_NODISCARD lsa_status lsa_window_at(lsa_window *w, const lsa_source *s, const lsa_train_doc *d, int64_t i,
                                       lsa_err *err);

/* What a window needs, dense over its candidates: mass [n_cand] (each token's to the power loss.sharpen,
 * summed over tokens and CSA layers, not normalised; NULL to skip) and votes [n_cand] (largest vote of any
 * token, 0 if below min_layers; NULL to skip). Pure, thread-safe. */
void lsa_window_needs(float *mass, uint8_t *votes, const lsa_source *s, const lsa_train_doc *d,
                      const lsa_window *w);
/* Native mass [n_cand], each token's to this power, whatever the training target is. */
void lsa_window_native(float *mass, double power, const lsa_train_doc *d, const lsa_window *w);

#endif
