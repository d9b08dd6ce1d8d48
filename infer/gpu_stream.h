/* A teacher's layers streamed from its files to a GPU: a thread reads the stored tensors of the next layer
 * into pinned memory while the GPU computes with the present one. Layers go round: 0, 1, ..., n - 1, 0, ...
 * Internal to infer/gpu_run. One thread at a time. */
#ifndef LSA_INFER_GPU_STREAM_H
#define LSA_INFER_GPU_STREAM_H

#include "infer/engine.h"
#include "kernels/model/gpu_teacher.h"

typedef struct lsa_gpu_stream lsa_gpu_stream;

/* Borrows the engine (opened without layers, or with) and the teacher. LSA_E_FORMAT for tensors that do not
 * fit the configuration. */
LSA_NODISCARD lsa_status lsa_gpu_stream_create(lsa_gpu_stream **out, const lsa_engine *e, lsa_gpu_teacher *t,
                                               lsa_err *err);
void lsa_gpu_stream_destroy(lsa_gpu_stream *s); /* before the teacher; NULL allowed */

/* The next layer, for launches until lsa_gpu_stream_end. LSA_E_FORMAT for numbers that are not finite. */
LSA_NODISCARD lsa_status lsa_gpu_stream_begin(lsa_gpu_layer **layer, lsa_gpu_stream *s, lsa_err *err);
/* Now and then in between: queues the next layer's copy if it has been read. */
LSA_NODISCARD lsa_status lsa_gpu_stream_poll(lsa_gpu_stream *s, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_stream_end(lsa_gpu_stream *s, lsa_err *err);

/* Host layer weights as the GPU teacher wants them: the same pointers. */
lsa_gpu_layer_weights lsa_gpu_weights_of(const layer_weights *w, int32_t ratio);

#endif
