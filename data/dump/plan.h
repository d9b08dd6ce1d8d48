/* What a dump takes, before anything is loaded: disk, host memory and time, from config.json, the lengths of
 * the documents and the options; and a refusal that names what would make it fit. */
#ifndef LSA_DATA_DUMP_PLAN_H
#define LSA_DATA_DUMP_PLAN_H

#include "data/dump/options.h"
#include "data/teacher_tensors.h"

/* Bytes on disk. Votes and dense masses depend on the teacher and are upper bounds; the rest is exact, but
 * for the number of shards. */
typedef enum lsa_disk_part {
    LSA_DISK_KEYS = 0,
    LSA_DISK_HIDDEN,
    LSA_DISK_VOTES,
    LSA_DISK_STATS,
    LSA_DISK_DENSE,
    LSA_DISK_TABLES, /* documents, rows, probes, HDF5's own structures */
    LSA_DISK_PARTS
} lsa_disk_part;

/* Bytes of host memory, upper bounds, added up although not all peak at once. */
typedef enum lsa_host_part {
    LSA_HOST_WEIGHTS = 0, /* all of them, fp32 */
    LSA_HOST_SEQUENCE,    /* state of the longest document */
    LSA_HOST_DOCUMENT,    /* its statistics while they are gathered */
    LSA_HOST_SHARD,       /* documents of the open shard */
    LSA_HOST_PROGRAM,     /* tokens, BLAS buffers, code */
    LSA_HOST_PARTS
} lsa_host_part;

/* A pass that reads the weights layer by layer for a wave of documents, activations kept in host memory (run
 * --stream): bounds from bytes and arithmetic, for choosing machines. */
typedef struct lsa_dump_streamed {
    int64_t wave_tokens, token_bytes; /* tokens whose residual streams (f32) fill the host budget */
    int64_t passes;                   /* over the weights; 0: one document alone exceeds the budget */
    double bus_bytes;                 /* weights once a pass, streams to the GPU and back once a layer */
    int64_t gpu_bytes;                /* the largest layer, as stored and twice in f32; tables; the next: */
    int64_t gpu_state;                /* streams, rows and index logits of the longest document */
    double flop_seconds, bus_seconds; /* at the rates below */
} lsa_dump_streamed;
#define LSA_PLAN_FLOPS 67e12  /* f32 peak of an H100 by its data sheet */
#define LSA_PLAN_BUS   54.6e9 /* bytes/s, pinned host memory to an H100, measured */

typedef struct lsa_dump_plan {
    int64_t documents, tokens, longest;
    int64_t disk[LSA_DISK_PARTS], disk_bytes, disk_free;
    int64_t host[LSA_HOST_PARTS], host_bytes, host_budget;
    lsa_teacher_size teacher;
    double flops;                 /* of the whole dump */
    double tokens_per_s, seconds; /* measured, and for all documents by their FLOPs; 0 if not */
    int64_t measured_tokens;
    lsa_dump_streamed streamed;
} lsa_dump_plan;

/* What the sums are made of. */
typedef struct lsa_dump_load {
    const lsa_teacher_config *c;
    lsa_dump_rule rule;
    int64_t shard_bytes;
    bool half_streams;     /* streamed weights: bf16 between two layers */
    const int64_t *length; /* [n] tokens of each document */
    int64_t n;
    int32_t threads;
} lsa_dump_load;

/* Everything but disk_free, host_budget, the measured and the streamed part. Pure. */
LSA_NODISCARD lsa_status lsa_dump_cost(lsa_dump_plan *p, const lsa_dump_load *load, lsa_err *err);
/* The part of it that depends on documents and options: disk, and host but for the weights. */
LSA_NODISCARD lsa_status lsa_dump_bytes(lsa_dump_plan *p, const lsa_dump_load *load, lsa_err *err);
/* Streaming's host memory instead of all weights: two layers as stored, and what is outside the layers; half
 * of what the budget then leaves holds a wave: f32 streams and statistics. */
void lsa_dump_plan_streaming(lsa_dump_plan *p, const lsa_dump_load *load);
/* With a GPU: shards that are being sealed, and documents between the GPU and the open shard. */
#define LSA_DUMP_SEALING   3
#define LSA_DUMP_IN_FLIGHT (INT64_C(1) << 30) /* bytes, beside the longest document */
/* A document of n tokens there, keys and hidden vectors among the rest: an upper bound. */
int64_t lsa_dump_flight_bytes(const lsa_dump_load *load, int64_t n);
void lsa_dump_plan_beside(lsa_dump_plan *p, const lsa_dump_load *load);
/* From p->host_budget. */
void lsa_dump_streamed_cost(lsa_dump_plan *p, const lsa_dump_load *load);

/* Fits p->disk_free (LSA_E_NOSPC) and p->host_budget (LSA_E_NOMEM); the message names every single change
 * that would make it fit, each checked by the same sums. `out`: the folder, for the message. */
LSA_NODISCARD lsa_status lsa_dump_fits(const lsa_dump_plan *p, const lsa_dump_load *load, const char *out,
                                       lsa_err *err);

/* "40x65536,8x1048576" -> lengths, freed by lsa_free. */
LSA_NODISCARD lsa_status lsa_dump_lengths(int64_t **length, int64_t *n, const char *text, lsa_err *err);

/* The summary that `run` logs, the full table on stdout, the same as one line of JSON. */
void lsa_dump_log_plan(const lsa_dump_plan *p);
void lsa_dump_print_plan(const lsa_dump_plan *p, const lsa_teacher_config *c, const char *out);
LSA_NODISCARD lsa_status lsa_dump_print_plan_json(const lsa_dump_plan *p, bool fits, lsa_err *err);

#endif
