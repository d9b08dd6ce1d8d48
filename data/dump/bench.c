/* See bench.h. */
#include "data/dump/bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "infer/gpu_weights.h"
#include "kernels/core/json.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/model/gpu_bench.h"

enum { KINDS = 3, CONTEXTS = 2, WAVE_LAYERS = 3 };
static const int64_t CONTEXT[CONTEXTS] = {32768, 131072};
static const char *const KIND[KINDS] = {"window", "csa", "hca"}; /* as lsa_layer_kind */

lsa_layer_flops lsa_layer_flops_of(const lsa_teacher_config *c, lsa_layer_kind kind, int32_t ratio,
                                   int64_t n) {
    const double d = c->hidden, HD = (double)c->n_head * c->head_dim, D = c->head_dim, Di = c->index_head_dim,
                 Hi = c->index_n_head, GR = (double)c->o_groups * c->o_rank, s = c->hc_mult,
                 roles = kind == LSA_LAYER_CSA   ? 2
                         : kind == LSA_LAYER_HCA ? 1
                                                 : 0;
    double rows = 0, visible = 0; /* sums over positions */
    for (int64_t p = 0; p < n; p++) {
        const double comp = ratio ? (double)((p + 1) / ratio) : 0;
        rows += fmin((double)(p + 1), c->window) + (kind == LSA_LAYER_CSA ? fmin(comp, c->index_topk) : comp);
        visible += kind == LSA_LAYER_CSA ? comp : 0;
    }
    const double index_rows = kind == LSA_LAYER_CSA ? 4 * Di + Hi : 0;
    return (lsa_layer_flops){.project = 2 * (d * (c->q_rank + D + 2 * roles * D + index_rows) +
                                             c->q_rank * (HD + (kind == LSA_LAYER_CSA ? Hi * Di : 0))),
                             .index = 2 * Hi * Di * visible / (double)n,
                             .attend = 4 * HD * rows / (double)n,
                             .output = 2 * (GR * (HD / c->o_groups) + d * GR),
                             .moe =
                                 2 * d * c->n_expert + 6 * d * c->moe_dim * (c->n_expert_tok + c->n_shared),
                             .streams = 2 * 2 * s * d * s * (s + 2)};
}

typedef struct result {
    bool there;
    lsa_layer_bench_layer layer;
    int32_t layers; /* of this kind in the model */
    int64_t stored;
    double decode; /* seconds */
    double seconds[CONTEXTS], stage[CONTEXTS][LSA_BF16_STAGES];
    uint64_t checksum[CONTEXTS];
} result;

static lsa_status print_line(json_t *o, lsa_err *err) {
    char *const line = o ? json_dumps(o, JSON_REAL_PRECISION(6)) : NULL;
    json_decref(o);
    if (!line) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format the results");
    puts(line);
    fflush(stdout);
    free(line);
    return LSA_OK;
}

static double total(lsa_layer_flops f) {
    return f.project + f.index + f.attend + f.output + f.moe + f.streams;
}

/* TFLOP/s of a stage, 0 where it does nothing. */
static double rate(double flops, int64_t n, double seconds) {
    return seconds > 0 ? flops * (double)n / seconds * 1e-12 : 0;
}

static lsa_status print_case(const lsa_layer_bench_opts *o, const lsa_teacher_config *c, const result *r,
                             int kind, int at, double ceiling, double bandwidth, lsa_err *err) {
    const int64_t n = CONTEXT[at];
    const lsa_layer_flops f = lsa_layer_flops_of(c, (lsa_layer_kind)kind, r->layer.ratio, n);
    const double *const s = r->stage[at], seconds = r->seconds[at], all = rate(total(f), n, seconds),
                        streams = s[LSA_BF16_STREAMS_IN] + s[LSA_BF16_STREAMS_MID] + s[LSA_BF16_STREAMS_OUT],
                        /* read and written once in each of two sublayers */
        floor = (double)n * 4 * c->hc_mult * c->hidden * 2 / bandwidth;
    if (!o->json) {
        printf(
            "%-6s %7lld tokens  %9.0f tokens/s  %6.1f TFLOP/s (%4.1f %% of the ceiling)  checksum %016llx\n",
            KIND[kind], (long long)n, (double)n / seconds, all, 100 * all * 1e12 / ceiling,
            (unsigned long long)r->checksum[at]);
        printf("       us a token:");
        for (int i = 0; i < LSA_BF16_STAGES; i++)
            printf(" %s %.3f", lsa_bf16_stage_name((lsa_bf16_stage)i), 1e6 * s[i] / (double)n);
        printf(
            "\n       TFLOP/s: project %.0f, index %.0f, attend %.0f, output %.0f, moe %.0f; streams at %.0f %% of "
            "their bandwidth floor\n",
            rate(f.project, n, s[LSA_BF16_PROJECT]), rate(f.index, n, s[LSA_BF16_INDEX]),
            rate(f.attend, n, s[LSA_BF16_ATTEND]), rate(f.output, n, s[LSA_BF16_OUTPUT]),
            rate(f.moe, n, s[LSA_BF16_MOE]), 100 * floor / streams);
        fflush(stdout);
        return LSA_OK;
    }
    json_t *const us = json_object();
    for (int i = 0; i < LSA_BF16_STAGES; i++)
        json_object_set_new(us, lsa_bf16_stage_name((lsa_bf16_stage)i), json_real(1e6 * s[i] / (double)n));
    char sum[17];
    snprintf(sum, sizeof sum, "%016llx", (unsigned long long)r->checksum[at]);
    return print_line(
        json_pack("{s:s, s:s, s:I, s:f, s:f, s:f, s:f, s:o, s:{s:f, s:f, s:f, s:f, s:f}, s:f, s:I, s:f, s:s}",
                  "case", "layer", "kind", KIND[kind], "context", (json_int_t)n, "tokens_per_second",
                  (double)n / seconds, "gflop_per_token", total(f) * 1e-9, "tflops", all,
                  "fraction_of_flop_floor", all * 1e12 / ceiling, "us_per_token", us, "stage_tflops",
                  "project", rate(f.project, n, s[LSA_BF16_PROJECT]), "index",
                  rate(f.index, n, s[LSA_BF16_INDEX]), "attend", rate(f.attend, n, s[LSA_BF16_ATTEND]),
                  "output", rate(f.output, n, s[LSA_BF16_OUTPUT]), "moe", rate(f.moe, n, s[LSA_BF16_MOE]),
                  "streams_fraction_of_floor", floor / streams, "stored_bytes", (json_int_t)r->stored,
                  "decode_seconds", r->decode, "checksum", sum),
        err);
}

/* The last layer of each kind stands for it. */
static void kinds_of(result out[KINDS], const lsa_teacher_config *c) {
    for (int32_t l = 0; l < c->n_layer; l++) {
        result *const r = &out[c->kind[l]];
        r->there = true;
        r->layers++;
        r->layer = (lsa_layer_bench_layer){c->ratio[l],
                                           c->kind[l] == LSA_LAYER_CSA   ? 2
                                           : c->kind[l] == LSA_LAYER_HCA ? 1
                                                                         : 0,
                                           c->hash_moe[l]};
    }
}

/* The largest chunk under the cap, with two places for stored weights if they fit. */
static lsa_status fit(int64_t *chunk, int *stores, int64_t *bytes, const lsa_layer_bench_opts *o,
                      lsa_ctx *ctx, const lsa_gpu_teacher_geom *g, int64_t tokens, lsa_err *err) {
    const int64_t own = INT64_C(1) << 30; /* the CUDA context, cuBLASLt's kernels */
    for (*stores = 2; *stores > 0; --*stores)
        for (*chunk = o->chunk ? o->chunk : 32768; *chunk >= 4096 || *chunk == o->chunk; *chunk /= 2) {
            const lsa_status st =
                lsa_layer_bench_create(NULL, bytes, ctx, g, NULL, NULL, tokens, *chunk, *stores, err);
            if (st != LSA_OK) return st;
            if (*bytes + own <= o->memory_cap) return LSA_OK;
            if (o->chunk) break;
        }
    LSA_RET_FAIL(LSA_E_NOMEM, "a layer with its buffers takes %.1f GiB, --memory-cap is %.1f GiB",
                 (double)(*bytes + own) / 0x1p30, (double)o->memory_cap / 0x1p30);
}

static lsa_status stream(const lsa_layer_bench_opts *o, lsa_layer_bench *b, const result *r, int64_t chunk,
                         lsa_layer_bench_wave *w, lsa_err *err) {
    const int64_t n = lsa_min_i64(chunk, CONTEXT[0]);
    int64_t stored;
    double seconds;
    lsa_status st = lsa_layer_bench_weights(b, &r->layer, &stored, &seconds, err);
    if (st == LSA_OK)
        st = lsa_layer_bench_stream(b, &r->layer, WAVE_LAYERS, o->wave_tokens, n, o->source_rate, w, err);
    return st;
}

static lsa_status print_all(const lsa_layer_bench_opts *o, const result *r, const lsa_layer_bench_wave *w,
                            int64_t chunk, int64_t peak, double ceiling, double bandwidth, const char *device,
                            lsa_err *err) {
    double projected[CONTEXTS];
    const double wave = o->wave_tokens ? (double)o->wave_tokens : 1048576;
    for (int at = 0; at < CONTEXTS; at++) {
        double each = 0; /* seconds a token, decoding spread over a wave */
        for (int k = 0; k < KINDS; k++)
            if (r[k].there)
                each += r[k].layers * (r[k].seconds[at] / (double)CONTEXT[at] + r[k].decode / wave);
        projected[at] = 1 / each;
    }
    const double waiting = w->tokens ? w->waited / w->seconds : 0,
                 streamed = w->tokens ? WAVE_LAYERS * (double)w->tokens / w->seconds : 0;
    if (o->json)
        return print_line(
            json_pack(
                "{s:s, s:s, s:s, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:{s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:I}}",
                "case", "all", "device", device, "config", o->config, "chunk", (json_int_t)chunk,
                "ceiling_tflops", ceiling * 1e-12, "bandwidth_gbs", bandwidth * 1e-9,
                "projected_tokens_per_second_32k", projected[0], "projected_tokens_per_second_128k",
                projected[1], "peak_gib", (double)peak / 0x1p30, "memory_cap_gib",
                (double)o->memory_cap / 0x1p30, "streaming", "wave_tokens", (json_int_t)w->tokens, "seconds",
                w->seconds, "layer_tokens_per_second", streamed, "waiting_share", waiting, "waited_seconds",
                w->waited, "decode_seconds", w->decoded, "first_load_seconds", w->first_load, "stored_bytes",
                (json_int_t)w->stored_bytes),
            err);
    printf(
        "%s: bf16 products %.0f TFLOP/s, memory %.0f GB/s; %lld tokens at a time; peak %.1f GiB of a cap of %.1f\n",
        device, ceiling * 1e-12, bandwidth * 1e-9, (long long)chunk, (double)peak / 0x1p30,
        (double)o->memory_cap / 0x1p30);
    printf("whole model, projected: %.0f tokens/s at %lld tokens a document, %.0f at %lld\n", projected[0],
           (long long)CONTEXT[0], projected[1], (long long)CONTEXT[1]);
    if (w->tokens)
        printf(
            "streaming %d CSA layers of %.2f GB at %.1f GB/s over %lld tokens: %.2f s, waiting %.1f %%, decoding "
            "%.1f %%, %.0f tokens/s a layer\n",
            WAVE_LAYERS, (double)w->stored_bytes * 1e-9, o->source_rate * 1e-9, (long long)w->tokens,
            w->seconds, 100 * waiting, 100 * w->decoded / w->seconds, streamed);
    else
        printf("streaming: not measured (%s)\n",
               o->wave_tokens ? "no CSA layer, or no room for a second layer's stored weights"
                              : "--wave-tokens 0");
    return LSA_OK;
}

lsa_status lsa_layer_bench_command(const lsa_layer_bench_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_teacher_config *c = NULL;
    lsa_ctx *ctx = NULL;
    lsa_layer_bench *b = NULL;
    float *freq_main = NULL, *freq_comp = NULL;
    result r[KINDS] = {0};
    lsa_layer_bench_wave wave = {0};
    int64_t chunk = 0, bytes = 0;
    int stores = 0;
    double ceiling = 0, bandwidth = 0;
    LSA_TRY(LSA_NEW(c, 1, err));
    LSA_TRY(lsa_teacher_config_load(c, o->config, err));
    if (o->memory_cap < 1 || o->wave_tokens < 0 || o->chunk < 0 || !(o->source_rate > 0))
        LSA_FAIL(
            LSA_E_ARG,
            "--memory-cap and --source-rate must be positive, --wave-tokens and --chunk-tokens not negative");
    LSA_TRY(lsa_ctx_create(&ctx, o->device, err));
    LSA_TRY(LSA_NEW(freq_main, c->rope_dim / 2, err));
    LSA_TRY(LSA_NEW(freq_comp, c->rope_dim / 2, err));
    lsa_rope_freqs(freq_main, &c->rope_main);
    lsa_rope_freqs(freq_comp, &c->rope_compress);
    const lsa_gpu_teacher_geom g = lsa_gpu_geom_of_config(c, true, true);
    LSA_TRY(fit(&chunk, &stores, &bytes, o, ctx, &g, CONTEXT[CONTEXTS - 1], err));
    lsa_info("%.1f GiB on the GPU, %lld tokens at a time", (double)bytes / 0x1p30, (long long)chunk);
    LSA_TRY(lsa_layer_bench_create(&b, &bytes, ctx, &g, freq_main, freq_comp, CONTEXT[CONTEXTS - 1], chunk,
                                   stores, err));
    LSA_TRY(lsa_layer_bench_ceilings(b, &ceiling, &bandwidth, err));
    kinds_of(r, c);
    for (int k = 0; k < KINDS; k++) {
        if (!r[k].there) continue;
        LSA_TRY(lsa_layer_bench_weights(b, &r[k].layer, &r[k].stored, &r[k].decode, err));
        for (int at = 0; at < CONTEXTS; at++) {
            LSA_TRY(lsa_layer_bench_run(b, &r[k].layer, CONTEXT[at], at ? 1 : 3, &r[k].seconds[at],
                                        r[k].stage[at], &r[k].checksum[at], err));
            LSA_TRY(print_case(o, c, &r[k], k, at, ceiling, bandwidth, err));
        }
    }
    if (o->wave_tokens && stores == 2 && r[LSA_LAYER_CSA].there)
        LSA_TRY(stream(o, b, &r[LSA_LAYER_CSA], chunk, &wave, err));
    LSA_TRY(print_all(o, r, &wave, chunk, lsa_layer_bench_peak(b), ceiling, bandwidth, lsa_ctx_describe(ctx),
                      err));
done:
    lsa_layer_bench_destroy(b);
    lsa_ctx_destroy(ctx);
    lsa_free(freq_main);
    lsa_free(freq_comp);
    lsa_free(c);
    return st;
}
