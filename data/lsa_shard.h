/* Shards of teacher attention statistics, format lsa-shard/1: reading. Layout and meaning:
 * data/SHARD_FORMAT.md.
 *
 * A folder of sealed HDF5 files plus manifest.json. Documents are numbered 0..n_doc-1 over all shards in
 * manifest order. open() validates manifest, file sizes and every dataset's type, shape and offset (hashes
 * are checked by lsa_shards_verify); the read functions pread at dataset offsets, allocate their results
 * (lsa_free) and are thread-safe. Chunk ids are checked to be in range on every read: LSA_E_FORMAT names
 * file, dataset, row, expected, found. */
#ifndef LSA_SHARD_H
#define LSA_SHARD_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/lsa_ids.h"
#include "kernels/core/lsa_status.h"
#include "kernels/model/rope.h"

typedef struct lsa_shards_info {
    char teacher[96]; /* name */
    uint64_t teacher_hash;
    int32_t hidden;                   /* width of hidden vectors */
    int32_t hidden_stride;            /* hidden vectors at positions with (position+1) mod stride = 0 */
    int32_t n_csa;                    /* all CSA layers of the teacher: the voters */
    lsa_layer_id csa_id[LSA_MAX_CSA]; /* layer id per ordinal */
    bool has_keys[LSA_MAX_CSA];       /* keys and hidden vectors stored for this ordinal? */
    bool has_stats, has_dense;
    lsa_rope rope;           /* compressed layers */
    double label_top_p;      /* votes: smallest prefix of the softmax over the pool with mass > top_p */
    int32_t label_pool;      /* pool: this many largest native logits */
    int32_t label_min_votes; /* chunks with fewer votes were left out (imports); 1 or 0: none were */
    int64_t n_doc, n_token, n_row, n_shard;
} lsa_shards_info;

typedef struct lsa_shards_doc {
    char name[96];
    int64_t n_token; /* tokens of the document */
    int64_t n_key;   /* chunks: floor(n_token/4) */
    int64_t n_row;   /* labelled tokens, consecutive from first_position */
    int64_t first_position;
    int64_t n_hidden; /* hidden vectors */
    int32_t shard;
    uint64_t token_xxh64; /* of its ids as i32 */
} lsa_shards_doc;

typedef struct lsa_shards lsa_shards;

LSA_NODISCARD lsa_status lsa_shards_open(lsa_shards **out, const char *dir, lsa_err *err);
void lsa_shards_close(lsa_shards *s);
const lsa_shards_info *lsa_shards_get_info(const lsa_shards *s);
lsa_shards_doc lsa_shards_get_doc(const lsa_shards *s, int64_t doc);
const char *lsa_shards_path(const lsa_shards *s, int32_t i); /* file of a shard, borrowed */
uint64_t lsa_shards_hash(const lsa_shards *s); /* over the manifest's shard hashes: identity of the data */

/* keys: u8 [n_key, 132]. */
LSA_NODISCARD lsa_status lsa_shards_keys(uint8_t **out, const lsa_shards *s, int64_t doc, lsa_csa_ord ord,
                                         lsa_err *err);
/* positions i64 [n_hidden] ascending, vectors bf16 [n_hidden, hidden]. */
LSA_NODISCARD lsa_status lsa_shards_hidden(int64_t **position, uint16_t **hidden, const lsa_shards *s,
                                           int64_t doc, lsa_csa_ord ord, lsa_err *err);

/* Sparse rows of one document: entries of row i are begin[i] .. begin[i+1]-1, begin[0] = 0. */
typedef struct lsa_csr {
    int64_t n_row, n_entry;
    int64_t *begin;  /* [n_row+1] */
    int32_t *chunk;  /* [n_entry], ascending inside a row */
    uint8_t *votes;  /* labels only */
    uint16_t *logit; /* stats only, f16 */
    uint16_t *mass;  /* stats: native mass; dense: dense mass; f16 */
    int64_t *row;    /* dense only: row number of each sampled row, [n_row] */
    uint16_t *rest;  /* dense only: mass that was cut, f16 [n_row] */
} lsa_csr;
void lsa_csr_fini(lsa_csr *c);
LSA_NODISCARD lsa_status lsa_shards_labels(lsa_csr *out, const lsa_shards *s, int64_t doc, lsa_err *err);
LSA_NODISCARD lsa_status lsa_shards_stats(lsa_csr *out, const lsa_shards *s, int64_t doc, lsa_csa_ord ord,
                                          lsa_err *err);
LSA_NODISCARD lsa_status lsa_shards_dense(lsa_csr *out, const lsa_shards *s, int64_t doc, lsa_csa_ord ord,
                                          lsa_err *err);

/* Mass on the sliding window and on the sink, f16 [n_row] each. */
LSA_NODISCARD lsa_status lsa_shards_local_mass(uint16_t **local, uint16_t **sink, const lsa_shards *s,
                                               int64_t doc, lsa_csa_ord ord, lsa_err *err);

/* Full check of a folder: sizes, XXH64 of files and datasets, CSR structure, ranges, votes <= n_csa, masses
 * in [0,1], native logits of the probe rows recomputed from keys. First fault wins. */
LSA_NODISCARD lsa_status lsa_shards_verify(const char *dir, lsa_err *err);

#endif
