/* One document of somebody else's recording, as lsa-dump import sees it: borrowed arrays, whatever file they
 * lie in, and the step from there to what a shard holds, with every check that the recorder may have left
 * out. Layouts: data/IMPORT_FORMAT.md. */
#ifndef LSA_DATA_DUMP_IMPORT_DOC_H
#define LSA_DATA_DUMP_IMPORT_DOC_H

#include "data/lsa_safetensors.h"
#include "data/pickle.h"
#include "data/shard_write.h"
#include "kernels/core/file.h"
#include "kernels/core/json.h"

#define LSA_IMPORT_MAX_FILES 4

/* Layer of a document: hidden vector of row r begins at element r * step of `hidden`. */
typedef struct lsa_import_layer {
    const unsigned char *hidden; /* NULL: none */
    lsa_dtype dtype;             /* of hidden: BF16, F16 or F32 */
    int64_t step;
    const unsigned char *key; /* u8 [n_key, 132]; NULL: none */
    int64_t n_key;
} lsa_import_layer;

typedef struct lsa_import_doc {
    char name[96], where[LSA_PATH_MAX + 32]; /* where: file (and line), for messages */
    int64_t first, n_row; /* rows are the tokens first .. first+n_row-1, the last of the document */
    uint64_t token_xxh64; /* 0: unknown */
    const char *kind;     /* which tensor the hidden vectors are: "attn_norm", ...; NULL without any */
    lsa_import_layer layer[LSA_MAX_CSA];
    /* either the votes of every row, or what each CSA layer selected (top_k > 0) */
    lsa_st_tensor begin, chunk, votes; /* integers [n_row+1], [M], [M] */
    lsa_st_tensor topk;                /* integers [n_row, n_csa, top_k], -1: none */
    int64_t top_k;
    /* what is open */
    lsa_map map;
    lsa_pickle_tensor *entry;
    lsa_st *file[LSA_IMPORT_MAX_FILES];
} lsa_import_doc;

/* Both leave `d` for lsa_import_close, whatever they return. model: hidden, n_csa and csa_id are used.
 * LSA_E_FORMAT names file and object. */
LSA_NODISCARD lsa_status lsa_import_pickle(lsa_import_doc *d, const char *path, const lsa_shards_info *model,
                                           lsa_err *err);
/* o: a line of a JSONL file; file names in it are relative to `dir`. */
LSA_NODISCARD lsa_status lsa_import_line(lsa_import_doc *d, const json_t *o, const char *dir,
                                         const char *where, const lsa_shards_info *model, lsa_err *err);
void lsa_import_close(lsa_import_doc *d);

/* Keys and hidden vectors there for this CSA layer? */
static inline bool lsa_import_has(const lsa_import_doc *d, int32_t ord) {
    return d->layer[ord].hidden && d->layer[ord].key;
}

/* Copies what the shards of `info` hold of the document. Refused: a key count that does not belong to the
 * tokens, keys and hidden vectors that are not finite, labels outside the document, not causal, twice in a
 * row or with an impossible vote. */
LSA_NODISCARD lsa_status lsa_import_build(lsa_doc_stats *out, const lsa_import_doc *d,
                                          const lsa_shards_info *info, lsa_err *err);

#endif
