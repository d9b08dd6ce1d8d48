/* Where the time of a run went, for people and for scripts. */
#include <stdio.h>
#include <stdlib.h>

#include "data/dump/run.h"
#include "kernels/core/json.h"
#include "kernels/core/log.h"

static double gpu_sum(const lsa_dump_times *t) { /* copies run beside the rest */
    double s = 0;
    for (int i = 0; i < LSA_GPU_COPIES; i++) s += t->gpu.gpu[i];
    return s;
}

/* The part that is nearest to the whole. */
static const char *what_binds(const lsa_dump_times *t) {
    const double part[] = {gpu_sum(t), t->gpu.gpu[LSA_GPU_COPIES], t->gpu.taps, t->merging, t->sealing};
    static const char *const name[] = {"the GPU", "copies to the host", "the taps", "merging", "sealing"};
    int most = 0;
    for (int i = 1; i < (int)(sizeof part / sizeof *part); i++)
        if (part[i] > part[most]) most = i;
    return name[most];
}

void lsa_dump_log_times(const lsa_dump_times *t) {
    char text[400] = "";
    int at = 0;
    for (int i = 0; i < LSA_GPU_STAGES; i++)
        at += snprintf(text + at, sizeof text - (size_t)at, "%s%s %.2f", i ? ", " : "",
                       lsa_gpu_stage_name((lsa_gpu_stage)i), t->gpu.gpu[i]);
    lsa_info("%.2f s, %.0f tokens/s; %s binds", t->seconds, (double)t->tokens / t->seconds, what_binds(t));
    lsa_info("GPU %.2f s busy: %s", gpu_sum(t), text);
    lsa_info("host, side by side: taps %.2f s, queueing and waiting %.2f s, merging %.2f s, sealing %.2f s",
             t->gpu.taps, t->gpu.wait, t->merging, t->sealing);
}

lsa_status lsa_dump_print_times_json(const lsa_dump_times *t, lsa_err *err) {
    json_t *const gpu = json_object();
    for (int i = 0; i < LSA_GPU_STAGES && t->on_gpu; i++)
        json_object_set_new(gpu, lsa_gpu_stage_name((lsa_gpu_stage)i), json_real(t->gpu.gpu[i]));
    json_t *const o =
        json_pack("{s:f, s:I, s:f, s:f, s:f, s:f, s:o}", "run_seconds", t->seconds, "tokens",
                  (json_int_t)t->tokens, "taps_seconds", t->gpu.taps, "wait_seconds", t->gpu.wait,
                  "merging_seconds", t->merging, "sealing_seconds", t->sealing, "gpu_seconds", gpu);
    char *const line = o ? json_dumps(o, JSON_REAL_PRECISION(9)) : NULL;
    json_decref(o);
    if (!line) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format the times");
    puts(line);
    free(line);
    return LSA_OK;
}
