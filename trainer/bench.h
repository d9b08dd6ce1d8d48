/* lsa-train bench: the GPU step on random documents: its gradient against the `ref` column, its time against
 * the card's ceilings. */
#ifndef LSA_TRAINER_BENCH_H
#define LSA_TRAINER_BENCH_H

#include "kernels/comm/comm.h"
#include "kernels/core/lsa_status.h"
#include "trainer/recipe_keys.h"

typedef struct lsa_bench {
    int64_t layers, heads, rank, hidden, candidates, chunks; /* chunks: of a document */
    int64_t steps;                                           /* timed in each of 5 repeats */
    bool verify, stages;
    lsa_comm *comm;  /* borrowed; ranks of several GPUs, each with windows of its own. NULL: one GPU */
    bool no_overlap; /* gradients are exchanged only after the backward pass */
    lsa_recipe r;    /* loss, sampling, precision, moments */
} lsa_bench;

/* The recipe of the published trainer's best indexer, 8 layers, 128 heads, rank 2048, 2,048 candidates,
 * focal. */
LSA_NODISCARD lsa_status lsa_bench_default(lsa_bench *b, lsa_err *err);

/* One JSON line on stdout a case, of rank 0. Training with b->r.batch windows a step; verify compares loss
 * and gradient of two windows with `ref` and those of a whole batch of the timed graph with `cpu`, and fails
 * with LSA_E_NUMERIC beyond the tolerance (one rank only: with more, tests/gpu/test_gpu_ranks.sh compares
 * runs). */
LSA_NODISCARD lsa_status lsa_bench_train(const lsa_bench *b, const char *device, lsa_err *err);
/* Evaluation of b->r.batch windows against all chunks of a document; verify compares the metrics of eight of
 * them with the `cpu` column. */
LSA_NODISCARD lsa_status lsa_bench_eval(const lsa_bench *b, const char *device, lsa_err *err);

/* Steps on the documents of a shard folder: all of them resident, and with a pool of a quarter of them; says
 * which of step, readers and disk binds. The shape of b besides heads, rank and recipe comes from the shards.
 */
LSA_NODISCARD lsa_status lsa_bench_stream(const lsa_bench *b, const char *data, const char *device,
                                          lsa_err *err);

#endif
