/* Where documents of a dump go: gathered to shards, sealed, named in the manifest. Shard boundaries are a
 * function of the documents and shard_bytes alone. One thread adds; sealing is done by it, or by threads of
 * the sink's own (behind), a shard each. */
#ifndef LSA_DATA_DUMP_SINK_H
#define LSA_DATA_DUMP_SINK_H

#include "data/dump/lane.h"
#include "data/manifest.h"
#include "data/shard_write.h"

typedef struct lsa_sink lsa_sink;

/* Borrows the manifest and `out`; m->info but for its counts must be filled. */
LSA_NODISCARD lsa_status lsa_sink_create(lsa_sink **out_sink, lsa_manifest *m, const char *out,
                                         int64_t shard_bytes, bool behind, lsa_err *err);
void lsa_sink_destroy(lsa_sink *s); /* what is not sealed is dropped; NULL allowed */

bool lsa_sink_at_start(
    const lsa_sink *s); /* the next document is the first of a shard: the one with probes */
/* Takes d, and drops its probes unless it is the first of its shard. */
LSA_NODISCARD lsa_status lsa_sink_add(lsa_sink *s, lsa_doc_stats *d, lsa_err *err);
/* Seals the rest and waits. */
LSA_NODISCARD lsa_status lsa_sink_finish(lsa_sink *s, lsa_err *err);
int64_t lsa_sink_sealed(lsa_sink *s); /* documents, from any thread */
double lsa_sink_seconds(lsa_sink *s); /* spent sealing, mean of the threads that do */

#endif
