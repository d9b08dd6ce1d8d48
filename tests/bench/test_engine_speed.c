/* Tokens per second of the teacher's forward pass on the mini teacher: one JSON line per case. Never gates on
 * time. */
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "infer/lsa_infer.h"
#include "kernels/core/clock.h"

static double run(const lsa_engine *e, int64_t n, int64_t chunk, uint64_t *sum) {
    lsa_err err = {0};
    lsa_session *s = NULL;
    lsa_session_opts o = {.max_tokens = n, .chunk = chunk};
    int32_t *token = malloc((size_t)chunk * sizeof *token);
    float *logits = malloc((size_t)chunk * (size_t)lsa_engine_config(e)->vocab * sizeof *logits);
    if (!token || !logits || lsa_session_create(&s, e, &o, &err) != LSA_OK) exit(1);
    double t0 = lsa_now_s();
    for (int64_t t = 0; t < n; t += chunk) {
        for (int64_t i = 0; i < chunk; i++) token[i] = (int32_t)(((t + i) * 2654435761u >> 7) % 2040 + 6);
        if (lsa_session_forward(s, token, chunk, logits, false, NULL, &err) != LSA_OK) exit(1);
        *sum += (uint64_t)(int64_t)(logits[0] * 1000.0f);
    }
    double dt = lsa_now_s() - t0;
    lsa_session_destroy(s);
    free(token);
    free(logits);
    return dt;
}

int main(void) {
    lsa_err err = {0};
    lsa_engine *e = NULL;
    if (lsa_engine_open(&e, "recipes/mini/teacher", NULL, &err) != LSA_OK) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    const int64_t shape[][2] = {{4096, 512}, {4096, 64}};
    for (size_t i = 0; i < 2; i++) {
        uint64_t sum = 0;
        double dt = run(e, shape[i][0], shape[i][1], &sum);
        printf(
            "{\"bench\": \"teacher_forward\", \"tokens\": %lld, \"chunk\": %lld, \"threads\": %d, \"tokens_per_s\": %.0f, \"checksum\": %llu}\n",
            (long long)shape[i][0], (long long)shape[i][1], omp_get_max_threads(), (double)shape[i][0] / dt,
            (unsigned long long)sum);
    }
    lsa_engine_close(e);
    return 0;
}
