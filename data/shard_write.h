/* Writing shards: one document's statistics gathered in memory, then a whole shard at once. Layout:
 * SHARD_FORMAT.md. */
#ifndef LSA_DATA_SHARD_WRITE_H
#define LSA_DATA_SHARD_WRITE_H

#include "data/lsa_shard.h"
#include "data/manifest.h"

/* Room for HDF5's own structures: for each layer, and once more; objects and hashes of a layer take about 10
 * KiB. */
#define LSA_SHARD_HEAD_PER_LAYER (24 << 10)

/* Statistics of one document. Every array is owned by the struct (lsa_free). Rows are the tokens at positions
 * first_position..n_token-1: all of them in a dump, the answer alone in what engines record. */
typedef struct lsa_doc_stats {
    char name[96];
    int64_t n_token, n_key, first_position;
    uint64_t token_xxh64;
    uint8_t *key[LSA_MAX_CSA]; /* [n_key, 132] or NULL */
    int64_t n_hidden;
    uint16_t *hidden[LSA_MAX_CSA]; /* bf16 [n_hidden, d] or NULL */
    lsa_csr labels;
    lsa_csr stats[LSA_MAX_CSA];
    uint16_t *local_mass[LSA_MAX_CSA], *sink_mass[LSA_MAX_CSA]; /* f16 [rows] */
    lsa_csr dense[LSA_MAX_CSA];
    /* probe rows: native queries and full logits, for verify */
    int64_t n_probe, n_probe_logit;
    int64_t *probe_row;                                   /* [n_probe] */
    float *probe_iq[LSA_MAX_CSA], *probe_iw[LSA_MAX_CSA]; /* [n_probe, heads*128], [n_probe, heads] */
    float *probe_logit[LSA_MAX_CSA]; /* rows of visible(probe_row) values, one after the other */
    int32_t probe_heads;
} lsa_doc_stats;
void lsa_doc_stats_fini(lsa_doc_stats *d);

/* Bytes a document will take in a shard, before it exists: what shard boundaries and the disk budget are made
 * of. */
int64_t lsa_doc_stats_bytes(const lsa_doc_stats *d, const lsa_shards_info *info);

/* Writes dir/file from n documents: temporary name, close, read back and compare every hash, fsync, rename,
 * fsync. out gets sizes and hash for the manifest. On failure nothing is left under the final name. */
LSA_NODISCARD lsa_status lsa_shard_seal(lsa_manifest_shard *out, const char *dir, const char *file,
                                        const lsa_shards_info *info, const lsa_doc_stats *docs, int64_t n,
                                        lsa_err *err);

#endif
