/* Tokenised documents: token files (u16 or u32 little-endian, by extension .u16/.u32) and JSONL of ids, cut
 * by the index of planted needs, by field, or by id 0.
 *
 * Rules: with --needs the index alone cuts (planted documents contain id 0); else a JSONL file has one
 * document per line
 * ({"tokens": [...]} with an optional "name"); else documents start at token id 0, and a file without id 0 is
 * one document. Immutable after open, thread-safe. */
#ifndef LSA_DATA_DOCS_H
#define LSA_DATA_DOCS_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

typedef struct lsa_fact {
    int64_t statement, question; /* offsets p and q inside the document */
} lsa_fact;
typedef struct lsa_replay {
    int64_t source, dest, len;
} lsa_replay;

typedef struct lsa_doc {
    int64_t index; /* number in the file */
    char name[96]; /* "<file>:<index>" or the JSONL name */
    int64_t n_token;
    const int32_t *token; /* borrowed */
    int64_t n_fact, n_replay;
    const lsa_fact *fact;     /* ascending by question; empty without needs */
    const lsa_replay *replay; /* ascending by dest */
    bool has_needs;
} lsa_doc;

/* Documents [*first, *last) of n that a --documents value means; LSA_E_ARG as below. */
LSA_NODISCARD lsa_status lsa_docs_range(int64_t *first, int64_t *last, const char *range, int64_t n,
                                        lsa_err *err);

typedef struct lsa_docs lsa_docs;

/* `range` is "A:B" (half-open, from 0; either side may be empty) or NULL. An empty document, an id >= vocab
 * (0: no check), an index that does not fit the file are LSA_E_FORMAT; an empty or reversed range is
 * LSA_E_ARG. */
LSA_NODISCARD lsa_status lsa_docs_open(lsa_docs **out, const char *tokens, const char *needs,
                                       const char *range, int64_t vocab, lsa_err *err);
void lsa_docs_close(lsa_docs *d);
int64_t lsa_docs_count(const lsa_docs *d); /* inside the range */
const lsa_doc *lsa_docs_at(const lsa_docs *d, int64_t i);
int64_t lsa_docs_tokens(const lsa_docs *d); /* sum over the range */
uint64_t lsa_docs_hash(const lsa_docs *d);  /* XXH64 of the tokens and boundaries in the range */

#endif
