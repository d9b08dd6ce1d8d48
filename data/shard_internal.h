/* Shared by the shard writer, reader and checker. */
#ifndef LSA_DATA_SHARD_INTERNAL_H
#define LSA_DATA_SHARD_INTERNAL_H

#include "data/h5.h"
#include "data/lsa_shard.h"
#include "data/manifest.h"

#define LSA_MAX_PROBE 8

/* What reading does not need but verify checks: positions are consecutive, visible = floor((position+1)/4),
 * masses of the sliding window and of the sink lie in [0, 1]. */
LSA_NODISCARD lsa_status lsa_shards_check_rows(const lsa_shards *s, int64_t doc, lsa_err *err);

/* Reads every dataset of one file and compares it with its xxh64 attribute. Each may be NULL: *head_bytes,
 * where the first dataset begins (LSA_E_BUG unless the datasets fill the file from there to its end, so that
 * no HDF5 structure lies behind); *whole, the hash of the file. By lsa_shard_threads() threads. */
LSA_NODISCARD lsa_status lsa_shard_check_hashes(int64_t *head_bytes, uint64_t *whole, const char *path,
                                                lsa_err *err);

/* Threads for one shard: hashes are bound by memory, and several shards are sealed at once. */
int lsa_shard_threads(void);

/* The head of a shard, all of HDF5's own structures, against the manifest. Before HDF5 opens the file: its
 * parser is not safe on damaged structures (1.10 reads and writes out of bounds). */
LSA_NODISCARD lsa_status lsa_shard_check_head(const char *path, const lsa_manifest_shard *m, lsa_err *err);
LSA_NODISCARD lsa_status lsa_shard_hash_head(uint64_t *xxh64, const char *path, int64_t head_bytes,
                                             lsa_err *err);

/* Calls fn for every dataset path of a file, in a fixed order. */
LSA_NODISCARD lsa_status lsa_h5_each(lsa_h5_reader *r,
                                     lsa_status (*fn)(void *user, const char *name, lsa_err *err), void *user,
                                     lsa_err *err);
/* Like lsa_h5_find, for a dataset of any type and shape: bytes, offset and hash. */
LSA_NODISCARD lsa_status lsa_h5_find_any(lsa_h5_reader *r, const char *name, int64_t *n_bytes,
                                         int64_t *offset, uint64_t *xxh64, lsa_err *err);

#endif
