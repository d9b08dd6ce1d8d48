/* A made-up teacher whose golden chunks are known: shards to test and to take first steps with.
 *
 * Every chunk has a topic. The last token before each window of 64 announces a topic in its hidden vector;
 * the window's tokens then need exactly the older chunks of that topic. Key rows hold a fixed linear image of
 * the topic in their non-rotary channels, Hadamard-rotated and fp8-coded as real ones. Topics are spread
 * evenly, so recency cannot solve it. With hidden_stride 1 token t carries the topic of the window that holds
 * token t+1. */
#ifndef LSA_DATA_DUMP_SYNTH_H
#define LSA_DATA_DUMP_SYNTH_H

#include "kernels/core/lsa_status.h"
#include <stdint.h>

typedef struct lsa_synth_opts {
    int64_t docs, tokens, layers, hidden, topics, hidden_stride, shard_bytes, seed;
    double noise; /* standard deviation of key and hidden noise */
} lsa_synth_opts;
lsa_synth_opts lsa_synth_defaults(void);

/* Writes shards, manifest.json and golden.jsonl (one line a document: for each window the golden chunks). */
LSA_NODISCARD lsa_status lsa_synth(const lsa_synth_opts *o, const char *out, lsa_err *err);

#endif
