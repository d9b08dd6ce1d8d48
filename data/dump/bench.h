/* lsa-dump bench: what a layer of each kind takes on this GPU at a model's true size, from its config.json
 * alone. */
#ifndef LSA_DATA_DUMP_BENCH_H
#define LSA_DATA_DUMP_BENCH_H

#include <stdbool.h>
#include <stdint.h>

#include "data/teacher.h"

typedef struct lsa_layer_bench_opts {
    const char *config, *device;
    int64_t memory_cap;  /* bytes on the GPU */
    int64_t wave_tokens; /* of the streaming test; 0: without it */
    int64_t chunk;       /* tokens at a time; 0: the most that fits, up to 32,768 */
    double source_rate;  /* bytes/s that weights are read at in the streaming test */
    bool json;           /* a line of JSON a case and one for all */
} lsa_layer_bench_opts;
LSA_NODISCARD lsa_status lsa_layer_bench_command(const lsa_layer_bench_opts *o, lsa_err *err);

/* FLOP of a token in a layer, mean over the positions of a document of n tokens: what the products need,
 * whatever a kernel makes of it. */
typedef struct lsa_layer_flops {
    double project, index, attend, output, moe, streams;
} lsa_layer_flops;
lsa_layer_flops lsa_layer_flops_of(const lsa_teacher_config *c, lsa_layer_kind kind, int32_t ratio,
                                   int64_t n);

#endif
