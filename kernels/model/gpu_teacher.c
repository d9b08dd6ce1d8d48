/* Names of the GPU teacher's stages, the same in every build. */
#include "kernels/model/gpu_teacher.h"

const char *lsa_gpu_stage_name(lsa_gpu_stage stage) {
    static const char *const name[LSA_GPU_STAGES] = {"streams", "project", "compress",   "index", "attend",
                                                     "moe",     "weights", "statistics", "copies"};
    return name[stage];
}
