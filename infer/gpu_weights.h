/* The engine's geometry and weights as the GPU teacher takes them, and its rows as a session's taps. Not
 * installed. Pure; defined in gpu_run.c. */
#ifndef LSA_INFER_GPU_WEIGHTS_H
#define LSA_INFER_GPU_WEIGHTS_H

#include "infer/engine.h"
#include "kernels/model/gpu_teacher.h"

lsa_gpu_teacher_geom lsa_gpu_geom_of(const lsa_engine *e);
/* Pointers into the engine. */
lsa_gpu_layer_weights lsa_gpu_weights_of(const lsa_engine *e, int32_t layer);
/* Calls taps->csa for every token of the rows, on OpenMP threads. */
void lsa_gpu_tap_rows(const lsa_teacher_config *c, int32_t layer, const lsa_taps *taps,
                      const lsa_gpu_csa_rows *rows);

#endif
