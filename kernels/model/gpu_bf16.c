/* Names of the bf16 layer's stages. */
#include "kernels/model/gpu_bf16.h"

const char *lsa_bf16_stage_name(lsa_bf16_stage stage) {
    static const char *const name[LSA_BF16_STAGES] = {"streams_in",  "project", "compress",
                                                      "index",       "attend",  "output",
                                                      "streams_mid", "moe",     "streams_out"};
    return name[stage];
}
