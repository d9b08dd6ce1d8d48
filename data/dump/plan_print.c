/* A plan for people and for scripts. Bounds are called so ("at most", "at least"), and what this version
 * cannot do is told apart from what it will do. */
#include <stdio.h>
#include <stdlib.h>

#include "data/dump/plan.h"
#include "kernels/core/json.h"
#include "kernels/core/log.h"

static const char *const disk_name[LSA_DISK_PARTS] = {"keys", "hidden", "votes", "stats", "dense", "tables"};
static const char *const host_name[LSA_HOST_PARTS] = {"weights", "sequence", "document", "shard", "program"};

typedef struct text {
    char s[32];
} text;

static text size(double bytes) {
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    text t;
    int u = 0;
    for (; bytes >= 1000 && u < 5; u++) bytes /= 1024;
    snprintf(t.s, sizeof t.s, u && bytes < 100 ? "%.2f %s" : "%.0f %s", bytes, unit[u]);
    return t;
}

static text span(double s) {
    text t;
    if (s < 120)
        snprintf(t.s, sizeof t.s, "%.3g s", s);
    else if (s < 7200)
        snprintf(t.s, sizeof t.s, "%.1f min", s / 60);
    else
        snprintf(t.s, sizeof t.s, "%.1f h", s / 3600);
    return t;
}

void lsa_dump_log_plan(const lsa_dump_plan *p) {
    lsa_info(
        "plan: %lld documents, %lld tokens, longest %lld; at most %s on disk (%s free) and %s of host memory",
        (long long)p->documents, (long long)p->tokens, (long long)p->longest, size((double)p->disk_bytes).s,
        size((double)p->disk_free).s, size((double)p->host_bytes).s);
    if (p->tokens_per_s > 0)
        lsa_info(
            "plan: %.0f tokens/s measured on the first %lld tokens; about %s in all, by the FLOPs of the documents",
            p->tokens_per_s, (long long)p->measured_tokens, span(p->seconds).s);
}

static void print_parts(const char *const *name, const int64_t *v, int n) {
    for (int i = 0; i < n; i++)
        if (v[i]) printf("%s%s %s", i ? ", " : ": ", name[i], size((double)v[i]).s);
}

static void print_streamed(const lsa_dump_plan *p, const lsa_teacher_config *c) {
    const lsa_dump_streamed *s = &p->streamed;
    printf(
        "\nrun --device cuda --stream: weights pass through the GPU layer by layer. Lower bounds, not measured, from bytes at\n"
        "%.1f GB/s (host to GPU) and FLOPs at %.0f TFLOP/s; this version computes in f32 without tensor cores:\n",
        LSA_PLAN_BUS * 1e-9, LSA_PLAN_FLOPS * 1e-12);
    printf("wave       %lld tokens: %d streams of %d in %s, %s a token, fill the host budget of %s\n",
           (long long)s->wave_tokens, c->hc_mult, c->hidden,
           s->token_bytes < 4 * (int64_t)c->hc_mult * c->hidden ? "bf16" : "f32",
           size((double)s->token_bytes).s, size((double)p->host_budget).s);
    if (s->passes == 0) {
        printf(
            "passes     none: one document of %lld tokens exceeds a wave; a larger --host-budget or shorter documents\n",
            (long long)p->longest);
        return;
    }
    printf("passes     %lld over the weights; %s over the bus, streams to the GPU and back once a layer\n",
           (long long)s->passes, size(s->bus_bytes).s);
    printf(
        "GPU        at least %s: two layers in f32, one as stored, embeddings and head; %s are the longest\n"
        "           document's\n",
        size((double)s->gpu_bytes).s, size((double)s->gpu_state).s);
    printf("time       at least %s: arithmetic %s, bus %s\n",
           span(s->flop_seconds > s->bus_seconds ? s->flop_seconds : s->bus_seconds).s,
           span(s->flop_seconds).s, span(s->bus_seconds).s);
}

void lsa_dump_print_plan(const lsa_dump_plan *p, const lsa_teacher_config *c, const char *out) {
    int32_t kinds[3] = {0};
    for (int32_t l = 0; l < c->n_layer; l++) kinds[c->kind[l]]++;
    printf(
        "teacher    %d layers (%d CSA, %d HCA, %d window), hidden %d, %d experts of which %d; %.4g G parameters, %.4g G "
        "multiplied a token\n",
        c->n_layer, kinds[LSA_LAYER_CSA], kinds[LSA_LAYER_HCA], kinds[LSA_LAYER_WINDOW], c->hidden,
        c->n_expert, c->n_expert_tok, p->teacher.params * 1e-9, p->teacher.active * 1e-9);
    printf("weights    %s in %lld tensors as config.json declares them, without MTP\n",
           size((double)p->teacher.bytes).s, (long long)p->teacher.tensors);
    printf("documents  %lld: %lld tokens, longest %lld; %.4g GFLOP a token\n", (long long)p->documents,
           (long long)p->tokens, (long long)p->longest, p->flops / (double)p->tokens * 1e-9);
    printf("disk       at most %s", size((double)p->disk_bytes).s);
    print_parts(disk_name, p->disk, LSA_DISK_PARTS);
    printf("; '%s' has %s free\n", out, size((double)p->disk_free).s);
    printf("host       at most %s", size((double)p->host_bytes).s);
    print_parts(host_name, p->host, LSA_HOST_PARTS);
    printf("; budget %s\n", size((double)p->host_budget).s);
    printf("GPU        none: this is the plan of --device cpu, all weights in memory in f32, read once\n");
    if (p->tokens_per_s > 0)
        printf(
            "time       about %s on this machine's CPU: %.0f tokens/s measured on %lld tokens, the rest by FLOPs\n",
            span(p->seconds).s, p->tokens_per_s, (long long)p->measured_tokens);
    else
        printf("time       unknown: no weights that fit here to measure with\n");
    print_streamed(p, c);
}

static json_t *parts_json(const char *const *name, const int64_t *v, int n) {
    json_t *o = json_object();
    for (int i = 0; i < n; i++) json_object_set_new(o, name[i], json_integer(v[i]));
    return o;
}

lsa_status lsa_dump_print_plan_json(const lsa_dump_plan *p, bool fits, lsa_err *err) {
    const lsa_dump_streamed *s = &p->streamed;
    json_t *o =
        json_pack("{s:b, s:I, s:I, s:I, s:I, s:I, s:o, s:I, s:I, s:o, s:f, s:f, s:I, s:f, s:f, s:f}", "fits",
                  fits, "documents", (json_int_t)p->documents, "tokens", (json_int_t)p->tokens, "longest",
                  (json_int_t)p->longest, "disk_bytes", (json_int_t)p->disk_bytes, "disk_free",
                  (json_int_t)p->disk_free, "disk", parts_json(disk_name, p->disk, LSA_DISK_PARTS),
                  "host_bytes", (json_int_t)p->host_bytes, "host_budget", (json_int_t)p->host_budget, "host",
                  parts_json(host_name, p->host, LSA_HOST_PARTS), "parameters", p->teacher.params,
                  "active_parameters", p->teacher.active, "weight_bytes", (json_int_t)p->teacher.bytes,
                  "flops", p->flops, "tokens_per_s", p->tokens_per_s, "seconds", p->seconds);
    json_t *x =
        json_pack("{s:b, s:I, s:I, s:f, s:I, s:I, s:f, s:f}", "in_this_version", 1, "wave_tokens",
                  (json_int_t)s->wave_tokens, "passes", (json_int_t)s->passes, "bus_bytes", s->bus_bytes,
                  "gpu_bytes", (json_int_t)s->gpu_bytes, "gpu_state", (json_int_t)s->gpu_state,
                  "flop_seconds", s->flop_seconds, "bus_seconds", s->bus_seconds);
    if (s->token_bytes)
        json_object_set_new(o, "streamed", x);
    else
        json_decref(x);
    char *line = o ? json_dumps(o, JSON_REAL_PRECISION(9)) : NULL;
    json_decref(o);
    if (!line) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format the plan");
    puts(line);
    free(line);
    return LSA_OK;
}
