/* Cost of a step: see estimate.h. The mistake that would stay silent: a formula that fits the two batches it
 * was made from and nothing else; tests/unit/test_estimate.c holds it against the two it was not made from.
 */
#include "trainer/estimate.h"

#include <jansson.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/csa_list.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/model/indexer.h"

/* ---- the measured step: kernels/PERF.md, "Stages at batch 256 / 1024", 2026-11-25, H100 ---- */

enum { M_LAYERS = 8, M_HEADS = 128, M_RANK = 2048, M_HIDDEN = 4096, M_CANDIDATES = 2048 };
static const double M_WINDOWS[2] = {256, 1024};
static const double M_MS[LSA_PARTS][2] = {
    [LSA_PART_SAMPLES] = {0.115, 0.416}, [LSA_PART_HIDDEN] = {0.011, 0.042},
    [LSA_PART_FORWARD] = {0.341, 1.061}, [LSA_PART_SCORES] = {0.772, 2.990},
    [LSA_PART_WEIGHTS] = {0.804, 1.946}, [LSA_PART_NORM] = {0.450, 0.450},
    [LSA_PART_ADAMW] = {3.55, 3.55},
};
/* Ceilings of those runs: 2,998 to 3,021 GB/s, 785 to 802 TFLOP/s. */
static const double M_COPY = 3010, M_BF16 = 793;
/* AdamW: parameter and two moments read and written, gradient read, bf16 copy written; moments in bf16. */
static const double ADAMW_BYTES = 30, ADAMW_BYTES_BF16 = 22;
static const int V4_FLASH_CSA = 21;
/* NCCL's table, us: a collective, a step inside a node, a step between nodes. */
static const double LAT_BASE = 8.4, LAT_NVLINK = 3.4, LAT_NET = 9.6;
/* Of what runs beside the backward pass, which slows it; two H100s. */
static const double GAINED = 0.5;

/* ---- the machine ---- */

typedef struct machine_key {
    const char *name;
    size_t offset;
    double dflt, lo, hi;
    bool whole;
} machine_key;
#define KEY(name, dflt, lo, hi, whole)                                                                       \
    { #name, offsetof(lsa_machine, name), dflt, lo, hi, whole }
static const machine_key KEYS[] = {
    KEY(gpus, 1, 1, 65536, true),       KEY(nodes, 1, 1, 65536, true),
    KEY(nvlink, 260, 1e-3, 1e6, false), /* two H100s */
    KEY(net, 320, 1e-3, 1e6, false),    /* 0.8 of eight times the nominal 50 */
    KEY(copy, 3010, 1, 1e6, false),     /* M_COPY */
    KEY(bf16, 793, 1, 1e6, false),      /* M_BF16 */
    KEY(hidden, 4096, 1, 65536, true),  KEY(chunks, 32768, 1, 1e9, true),
    KEY(windows, 0, 0, 1e15, true),     KEY(layers, 0, 0, LSA_MAX_CSA, true),
};
enum { N_KEY = sizeof KEYS / sizeof *KEYS };

static double *field(lsa_machine *m, const machine_key *k) {
    return (double *)(void *)((char *)m + k->offset);
}

static lsa_status set_key(lsa_machine *m, const char *name, const char *value, lsa_err *err) {
    char names[128] = "";
    for (int i = 0; i < N_KEY; i++) {
        const machine_key *const k = &KEYS[i];
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "", k->name);
        if (strcmp(k->name, name)) continue;
        char *end;
        const double v = strtod(value, &end);
        if (end == value || *end || !(v >= k->lo && v <= k->hi) || (k->whole && v != floor(v)))
            LSA_RET_FAIL(LSA_E_ARG, "--estimate %s=%.40s: expected %s in [%g, %g]", name, value,
                         k->whole ? "an integer" : "a number", k->lo, k->hi);
        *field(m, k) = v;
        return LSA_OK;
    }
    LSA_RET_FAIL(LSA_E_ARG, "--estimate: unknown key '%.40s'; expected %s", name, names);
}

lsa_status lsa_machine_parse(lsa_machine *m, const char *text, lsa_err *err) {
    for (int i = 0; i < N_KEY; i++) *field(m, &KEYS[i]) = KEYS[i].dflt;
    for (const char *p = text; *p;) {
        char item[128];
        const size_t n = strcspn(p, ",");
        snprintf(item, sizeof item, "%.*s", (int)n, p);
        char *const eq = strchr(item, '=');
        if (!eq) LSA_RET_FAIL(LSA_E_ARG, "--estimate '%.40s': expected key=value,key=value", item);
        *eq = 0;
        lsa_status st = set_key(m, item, eq + 1, err);
        if (st != LSA_OK) return st;
        p += n + (p[n] == ',');
    }
    return LSA_OK;
}

/* ---- the step ---- */

typedef struct shape {
    double layers, heads, rank, hidden, candidates;
} shape;
static const shape MEASURED = {M_LAYERS, M_HEADS, M_RANK, M_HIDDEN, M_CANDIDATES};

static double parameters(const shape *s) {
    return s->layers * (s->rank * s->hidden + 128 * s->heads * s->rank + s->rank + s->heads * s->hidden);
}
/* Work that grows with every window. */
static double slope_work(lsa_part p, const shape *s) {
    switch (p) {
    case LSA_PART_SAMPLES:
        return s->candidates;
    case LSA_PART_HIDDEN:
        return s->layers * s->hidden;
    case LSA_PART_FORWARD:
        return 2 * parameters(s);
    case LSA_PART_SCORES:
        return 768 * s->candidates * s->heads * s->layers;
    case LSA_PART_WEIGHTS:
        return 2 * parameters(s) + 256 * s->layers * s->heads * s->rank;
    default:
        return 0;
    }
}
/* Work that does not: products read or write every parameter, the other stages only start. */
static double start_work(lsa_part p, const shape *s) {
    return p >= LSA_PART_FORWARD && p != LSA_PART_SCORES ? parameters(s) : 1;
}

/* One launch of a stage over n windows, ms. */
static double stage(lsa_part p, const shape *s, const lsa_machine *m, double n) {
    const double slope = (M_MS[p][1] - M_MS[p][0]) / (M_WINDOWS[1] - M_WINDOWS[0]);
    double start = fmax(0, M_MS[p][0] - slope * M_WINDOWS[0]);
    const bool products = p == LSA_PART_FORWARD || p == LSA_PART_SCORES || p == LSA_PART_WEIGHTS;
    start *= start_work(p, s) / start_work(p, &MEASURED) * (M_COPY / m->copy);
    const double work = slope_work(p, &MEASURED) > 0 ? slope_work(p, s) / slope_work(p, &MEASURED) : 0;
    return start + slope * n * work * (products ? M_BF16 / m->bf16 : M_COPY / m->copy);
}

/* ---- rings ---- */

/* `passes` passes of n bytes in one collective, ms. */
static double ring(double n, double passes, const lsa_machine *m) {
    if (m->gpus < 2) return 0;
    const double inter = m->nodes - 1, intra = m->gpus - 1 - inter;
    const double slowest = m->nodes < 2 ? m->nvlink : m->gpus > m->nodes ? fmin(m->nvlink, m->net) : m->net;
    return 1e-3 * (LAT_BASE + passes * (intra * LAT_NVLINK + inter * LAT_NET)) +
           1e-6 * passes * (m->gpus - 1) / m->gpus * n / slowest;
}

/* Gradients of wq_b: their share of the parameters; and of the weight-gradient stage, ms, when they are
 * formed: their product is 2 * 128 H r of the FLOPs of a window and layer. */
static double wq_b(const shape *s) {
    return s->layers * 128 * s->heads * s->rank;
}
static double wq_b_formed(const shape *s, const lsa_machine *m, double n) {
    const double start = stage(LSA_PART_WEIGHTS, s, m, 0), all = stage(LSA_PART_WEIGHTS, s, m, n);
    return start * wq_b(s) / parameters(s) + (all - start) * 2 * wq_b(s) / slope_work(LSA_PART_WEIGHTS, s);
}

static lsa_status joint_layers(int64_t *n, const lsa_recipe *r, const lsa_machine *m, lsa_err *err) {
    lsa_status st = LSA_OK;
    bool want[LSA_MAX_CSA] = {false};
    *n = (int64_t)m->layers;
    if (*n) return LSA_OK;
    LSA_TRY(lsa_csa_list(want, r->layers, strcmp(r->layers, "all") ? LSA_MAX_CSA : V4_FLASH_CSA, LSA_E_CONFIG,
                         "model.layers", err));
    for (int i = 0; i < LSA_MAX_CSA; i++) *n += want[i];
    if (!*n) LSA_FAIL(LSA_E_CONFIG, "model.layers is empty");
done:
    return st;
}

static lsa_status check(const lsa_recipe *r, const lsa_machine *m, lsa_err *err) {
    const int64_t w = (int64_t)m->gpus, n = (int64_t)m->nodes;
    if (w % n)
        LSA_RET_FAIL(LSA_E_CONFIG, "%lld GPUs do not spread evenly over %lld nodes", (long long)w,
                     (long long)n);
    if (r->virtual_shards % w)
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "%lld GPUs do not divide %lld virtual shards: --set data.virtual_shards=%lld (and a "
                     "train.batch that is a multiple)",
                     (long long)w, (long long)r->virtual_shards,
                     (long long)(((r->virtual_shards + w - 1) / w) * w));
    if (r->precision == LSA_PRECISION_F32)
        LSA_RET_FAIL(LSA_E_CONFIG, "train.precision f32 computes op by op; the estimate is of bf16 or fp8");
    return LSA_OK;
}

static int64_t candidates(const lsa_recipe *r, const lsa_machine *m) {
    if (r->candidates == LSA_CAND_ALL) return (int64_t)m->chunks;
    const double neg = fmin(floor((double)r->max_pos * r->neg_ratio), (double)r->max_neg);
    return (int64_t)fmin((double)r->max_pos + neg, m->chunks);
}

/* Norm and update of several GPUs, and what they send each other; n: windows of the last micro-batch. */
static void exchange(lsa_estimate *e, const shape *s, const lsa_recipe *r, const lsa_machine *m, double n) {
    const double w = m->gpus, passes = r->zero1 ? 1 : 2, size = r->exchange == LSA_EXCHANGE_BF16 ? 2 : 4,
                 first = ring(size * wq_b(s), passes, m),
                 second = ring(size * (parameters(s) - wq_b(s)), passes, m),
                 beside = stage(LSA_PART_WEIGHTS, s, m, n) - wq_b_formed(s, m, n);
    e->reduce_ms = first + second;
    e->ms[LSA_PART_REDUCE] = first - GAINED * fmin(first, beside) + second;
    e->ms[LSA_PART_GATHER] = r->zero1 ? ring(2 * parameters(s), 1, m) : 0;
    e->sent_bytes = (w - 1) / w * parameters(s) * (passes * size + (r->zero1 ? 2 : 0));
    e->ms[LSA_PART_NORM] *= size / 4 / w;
    e->ms[LSA_PART_ADAMW] *= 1 - (4 - size) / ADAMW_BYTES;
    if (r->zero1) e->ms[LSA_PART_ADAMW] /= w;
    e->from[LSA_PART_NORM] = LSA_FROM_SCALED;
    if (r->zero1 || size < 4) e->from[LSA_PART_ADAMW] = LSA_FROM_SCALED;
}

lsa_status lsa_estimate_make(lsa_estimate *out, const lsa_recipe *r, const lsa_machine *m, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_estimate e = {0};
    LSA_TRY(check(r, m, err));
    LSA_TRY(joint_layers(&e.n_layer, r, m, err));
    e.candidates = candidates(r, m);
    e.windows_per_gpu = r->batch / (int64_t)m->gpus;
    const shape s = {(double)e.n_layer, (double)r->heads, (double)r->rank, m->hidden, (double)e.candidates};
    e.n_param = (int64_t)parameters(&s);
    const double n = (double)e.windows_per_gpu;
    const double at_once = r->micro_batch ? fmin((double)r->micro_batch, n) : n, rounds = ceil(n / at_once);
    const bool measured = !memcmp(&s, &MEASURED, sizeof s) && m->copy == M_COPY && m->bf16 == M_BF16 &&
                          rounds == 1 && r->precision == LSA_PRECISION_BF16 && n >= 64 && n <= M_WINDOWS[1];
    for (int p = 0; p < LSA_PART_REDUCE; p++) {
        const bool once = p == LSA_PART_SAMPLES || p >= LSA_PART_NORM; /* not for every micro-batch */
        e.ms[p] = once ? stage((lsa_part)p, &s, m, n) : rounds * stage((lsa_part)p, &s, m, n / rounds);
        e.from[p] = measured ? LSA_FROM_MEASURED : LSA_FROM_SCALED;
    }
    if (r->candidates == LSA_CAND_ALL) e.ms[LSA_PART_SAMPLES] = 0;
    if (r->moments == LSA_MOMENTS_BF16) {
        e.ms[LSA_PART_ADAMW] *= ADAMW_BYTES_BF16 / ADAMW_BYTES;
        e.from[LSA_PART_ADAMW] = LSA_FROM_SCALED;
    }
    e.from[LSA_PART_REDUCE] = e.from[LSA_PART_GATHER] = m->nodes < 2 ? LSA_FROM_SCALED : LSA_FROM_ASSUMED;
    if (m->gpus > 1) exchange(&e, &s, r, m, n / rounds);
    for (int p = 0; p < LSA_PARTS; p++) e.step_ms += e.ms[p];
    e.comm_share = (e.ms[LSA_PART_REDUCE] + e.ms[LSA_PART_GATHER]) / e.step_ms;
    e.windows_per_s = 1e3 * (double)r->batch / e.step_ms;
    e.run_hours = (double)r->steps * e.step_ms / 3.6e6;
    e.pass_hours = m->windows / e.windows_per_s / 3600;
    *out = e;
done:
    return st;
}

/* ---- output ---- */

static const char *const PART[LSA_PARTS] = {"samples",
                                            "hidden vectors",
                                            "projections, forward",
                                            "scores, loss, query gradient",
                                            "projections, weight gradients",
                                            "gradient norm",
                                            "AdamW",
                                            "gradients between GPUs, not hidden",
                                            "weights between GPUs"};
static const char *const KEY_OF[LSA_PARTS] = {"samples", "hidden", "forward", "scores", "weight_gradients",
                                              "norm",    "adamw",  "reduce",  "gather"};
static const char *const FROM[] = {"measured", "scaled", "assumed"};

void lsa_estimate_print(const lsa_estimate *e, const lsa_recipe *r, const lsa_machine *m) {
    const bool several = m->gpus > 1;
    printf(
        "%lld joint layers, %lld heads, rank %lld, hidden %.0f: %.1f M parameters; %lld windows a step, up to %lld "
        "candidates each\n",
        (long long)e->n_layer, (long long)r->heads, (long long)r->rank, m->hidden, 1e-6 * (double)e->n_param,
        (long long)r->batch, (long long)e->candidates);
    printf("%.0f GPU%s in %.0f node%s: %lld windows a GPU\n\n%-38s%9s  from\n", m->gpus, several ? "s" : "",
           m->nodes, m->nodes > 1 ? "s" : "", (long long)e->windows_per_gpu, "part", "ms");
    for (int p = 0; p < (several ? LSA_PARTS : LSA_PART_REDUCE); p++)
        if (p != LSA_PART_GATHER || r->zero1) printf("%-38s%9.3f  %s\n", PART[p], e->ms[p], FROM[e->from[p]]);
    printf("%-38s%9.3f\n\n", "step", e->step_ms);
    printf("communication: %.1f %% of the step; each GPU sends %.3f GB a step, %.3f ms if nothing hid it\n",
           100 * e->comm_share, 1e-9 * e->sent_bytes, e->reduce_ms + e->ms[LSA_PART_GATHER]);
    printf("%.0f windows/s; %lld steps: %.3g h (%.0f s)", e->windows_per_s, (long long)r->steps, e->run_hours,
           3600 * e->run_hours);
    if (m->windows > 0)
        printf("; one pass over %.0f windows: %.3g h (%.0f s)", m->windows, e->pass_hours,
               3600 * e->pass_hours);
    printf(
        "\n\nmeasured: a straight line through the stages of kernels/PERF.md (one H100, 2026-11-25, 256 and 1,024 "
        "windows); steps of 64 to 1,024 windows agree within 6 %%\n"
        "scaled:   the same times parameters, FLOPs, or this card's ceilings over an H100's (copy %.0f GB/s, bf16 %.0f "
        "TFLOP/s)\n",
        m->copy, m->bf16);
    if (several)
        printf(
            "links:    rings at %.0f GB/s in a node and %.0f out of it (assumed), NCCL's latencies; half of what runs beside the "
            "backward pass is gained.\nNote: one and two H100s were measured (recipes/SCALING.md); more is a plan.\n",
            m->nvlink, m->net);
    if (e->step_ms < 1) puts("Note: launches are not counted; steps below 1 ms will take longer than this.");
    puts("Left out: reading documents, evaluations, checkpoints.");
}

lsa_status lsa_estimate_print_json(const lsa_estimate *e, const lsa_machine *m, lsa_err *err) {
    json_t *const ms = json_object(), *const from = json_object(), *const machine = json_object();
    for (int p = 0; p < LSA_PARTS; p++) {
        json_object_set_new(ms, KEY_OF[p], json_real(e->ms[p]));
        json_object_set_new(from, KEY_OF[p], json_string(FROM[e->from[p]]));
    }
    for (int i = 0; i < N_KEY; i++) {
        lsa_machine copy = *m;
        json_object_set_new(machine, KEYS[i].name, json_real(*field(&copy, &KEYS[i])));
    }
    json_t *const o = json_pack(
        "{s:o, s:o, s:o, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "machine", machine, "ms", ms,
        "from", from, "parameters", (json_int_t)e->n_param, "candidates", (json_int_t)e->candidates,
        "windows_per_gpu", (json_int_t)e->windows_per_gpu, "step_ms", e->step_ms, "communication_share",
        e->comm_share, "windows_per_s", e->windows_per_s, "reduce_ms", e->reduce_ms, "sent_bytes",
        e->sent_bytes, "run_hours", e->run_hours, "pass_hours", e->pass_hours);
    char *const text = json_dumps(o, JSON_REAL_PRECISION(9));
    json_decref(o);
    if (!text) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format the estimate");
    puts(text);
    free(text);
    return LSA_OK;
}
