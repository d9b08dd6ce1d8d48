/* manifest.json of a shard folder: what is in it, which shards are sealed, and how to go on. */
#ifndef LSA_DATA_MANIFEST_H
#define LSA_DATA_MANIFEST_H

#include "data/lsa_shard.h"
#include "kernels/core/json.h"
#include "kernels/core/mem.h"

typedef struct lsa_manifest_shard {
    char file[64];
    int64_t documents, rows, tokens, bytes;
    uint64_t xxh64;
    int64_t head_bytes; /* HDF5's own structures, before the first dataset */
    uint64_t head_xxh64;
} lsa_manifest_shard;

typedef struct lsa_manifest {
    lsa_shards_info info; /* n_doc, n_token, n_row, n_shard are sums over the sealed shards */
    bool complete;        /* every document of the run is sealed */
    json_t *run;          /* options of the dump, owned; what `resume` needs */
    LSA_VEC(lsa_manifest_shard) shard;
} lsa_manifest;

LSA_NODISCARD lsa_status lsa_manifest_load(lsa_manifest *m, const char *dir, lsa_err *err);
/* From text (fuzzing, tests). */
LSA_NODISCARD lsa_status lsa_manifest_parse(lsa_manifest *m, const char *text, size_t n, const char *where,
                                            lsa_err *err);
LSA_NODISCARD lsa_status lsa_manifest_save(const lsa_manifest *m, const char *dir, lsa_err *err);
LSA_NODISCARD lsa_status lsa_manifest_add(lsa_manifest *m, const lsa_manifest_shard *s, lsa_err *err);
void lsa_manifest_fini(lsa_manifest *m);

#endif
