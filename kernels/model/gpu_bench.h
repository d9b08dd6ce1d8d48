/* A teacher layer of full size on one GPU, without a model: weights of true shape and storage type are made
 * on the device from a hash, decoded to bf16 as a dump would, and documents of random streams pass the bf16
 * layer.
 *
 * Errors as in gpu_bf16.h; LSA_E_NOMEM where the memory cap would be passed. One thread (plus one of its own
 * while weights are streamed). */
#ifndef LSA_KERNELS_MODEL_GPU_BENCH_H
#define LSA_KERNELS_MODEL_GPU_BENCH_H

#include "kernels/model/gpu_bf16.h"

typedef struct lsa_layer_bench_layer { /* a kind of layer */
    int32_t ratio, roles;              /* roles 2: CSA */
    bool hash;                         /* experts by token id */
} lsa_layer_bench_layer;

typedef struct lsa_layer_bench lsa_layer_bench;
/* Room for documents of max_tokens, `chunk` at a time. *bytes: device memory that it takes; with out NULL
 * only that. stores: 2 lets lsa_layer_bench_stream fill one place for stored weights while the other is read;
 * else 1. */
LSA_NODISCARD lsa_status lsa_layer_bench_create(lsa_layer_bench **out, int64_t *bytes, lsa_ctx *ctx,
                                                const lsa_gpu_teacher_geom *g, const float *freq_main,
                                                const float *freq_comp, int64_t max_tokens, int64_t chunk,
                                                int stores, lsa_err *err);
void lsa_layer_bench_destroy(lsa_layer_bench *b); /* NULL allowed */

/* What the card does: bf16 products of 8,192^3 (FLOP/s) and copies within its memory (bytes/s, both ways). */
LSA_NODISCARD lsa_status lsa_layer_bench_ceilings(lsa_layer_bench *b, double *flops, double *bandwidth,
                                                  lsa_err *err);

/* Makes the weights of a kind and decodes them: bytes as stored, seconds of the decoding. */
LSA_NODISCARD lsa_status lsa_layer_bench_weights(lsa_layer_bench *b, const lsa_layer_bench_layer *l,
                                                 int64_t *stored, double *seconds, lsa_err *err);

/* A document of n tokens through the layer whose weights were made last: seconds without the events between
 * the stages (the shorter of `runs`), seconds by stage of one more run, and a checksum of the streams. */
LSA_NODISCARD lsa_status lsa_layer_bench_run(lsa_layer_bench *b, const lsa_layer_bench_layer *l, int64_t n,
                                             int runs, double *seconds, double stage[LSA_BF16_STAGES],
                                             uint64_t *checksum, lsa_err *err);

/* n layers one after the other over a wave of `wave` tokens in documents of `document`: the stored weights of
 * a layer come through a pinned ring at `rate` bytes/s while the layer before is computed; every document's
 * streams come from pinned memory and go back. All layers have the shape of *l. */
typedef struct lsa_layer_bench_wave {
    double seconds, waited, decoded; /* from the first layer's weights on; waiting for later ones; decoding */
    double first_load;            /* seconds until the first layer's weights were there: not in `seconds` */
    int64_t tokens, stored_bytes; /* of one layer */
} lsa_layer_bench_wave;
LSA_NODISCARD lsa_status lsa_layer_bench_stream(lsa_layer_bench *b, const lsa_layer_bench_layer *l,
                                                int layers, int64_t wave, int64_t document, double rate,
                                                lsa_layer_bench_wave *out, lsa_err *err);

/* The most device memory that was in use on the card during these calls, other programs' included. */
int64_t lsa_layer_bench_peak(const lsa_layer_bench *b);

#endif
