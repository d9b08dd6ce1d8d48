/* The engine's geometry and weights as the GPU teacher takes them. Not installed. Pure; defined in gpu_run.c.
 */
#ifndef LSA_INFER_GPU_WEIGHTS_H
#define LSA_INFER_GPU_WEIGHTS_H

#include "infer/engine.h"
#include "kernels/model/gpu_teacher.h"

lsa_gpu_teacher_geom lsa_gpu_geom_of(const lsa_engine *e);
lsa_gpu_teacher_geom lsa_gpu_geom_of_config(const lsa_teacher_config *c, bool sim_fp8_kv, bool sim_fp4_index);
/* Pointers of e and of w. */
lsa_gpu_teacher_tables lsa_gpu_tables_of(const lsa_engine *e);
lsa_gpu_layer_weights lsa_gpu_weights_of(const layer_weights *w, int32_t ratio);

#endif
