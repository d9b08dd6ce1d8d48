/* The chain of stages: see chain.h. The mistake that would stay silent: a fault that leaves every number as
 * it was (eps where activations are large, RoPE at position 0); the inputs of golden.c are made to show each.
 */
#include "export/chain.h"

#include <math.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/ops.h"

enum { M = LSA_GOLD_M, N = LSA_GOLD_KEYS };

typedef enum kind { RANK, HEAD, WEIGHT, LOGIT } kind;
static const struct {
    const char *name;
    lsa_query_path path;
    kind kind;
    lsa_dtype dtype;
} STAGE[LSA_STAGES] = {{"a", LSA_PATH_F32, RANK, LSA_F32},
                       {"u", LSA_PATH_F32, RANK, LSA_F32},
                       {"raw", LSA_PATH_F32, HEAD, LSA_F32},
                       {"rope", LSA_PATH_F32, HEAD, LSA_F32},
                       {"q", LSA_PATH_F32, HEAD, LSA_F32},
                       {"w", LSA_PATH_F32, WEIGHT, LSA_F32},
                       {"logit", LSA_PATH_F32, LOGIT, LSA_F32},
                       {"bf16.raw", LSA_PATH_BF16, HEAD, LSA_BF16},
                       {"bf16.rope", LSA_PATH_BF16, HEAD, LSA_BF16},
                       {"bf16.q", LSA_PATH_BF16, HEAD, LSA_F32},
                       {"bf16.logit", LSA_PATH_BF16, LOGIT, LSA_F32},
                       {"fp8.code", LSA_PATH_FP8, HEAD, LSA_U8},
                       {"fp8.scale", LSA_PATH_FP8, WEIGHT, LSA_F32},
                       {"fp8.w", LSA_PATH_FP8, WEIGHT, LSA_F32},
                       {"fp8.logit", LSA_PATH_FP8, LOGIT, LSA_F32}};
const lsa_stage lsa_logit_stage[LSA_QUERY_PATHS] = {LSA_STAGE_LOGIT, LSA_STAGE_LOGIT_BF16,
                                                    LSA_STAGE_LOGIT_FP8};

const char *lsa_stage_name(lsa_stage s) {
    return STAGE[s].name;
}
lsa_query_path lsa_stage_path(lsa_stage s) {
    return STAGE[s].path;
}
lsa_dtype lsa_stage_dtype(lsa_stage s) {
    return STAGE[s].dtype;
}

int32_t lsa_gold_ranks(int32_t out[LSA_GOLD_RANKS], const lsa_indexer_geom *g) {
    const int32_t n = g->rank < LSA_GOLD_RANKS ? g->rank : LSA_GOLD_RANKS;
    for (int32_t i = 0; i < n; i++) out[i] = (int32_t)((int64_t)i * g->rank / n);
    return n;
}

int32_t lsa_gold_heads(int32_t out[LSA_GOLD_HEADS], const lsa_indexer_geom *g) {
    out[0] = 0;
    out[1] = g->n_head - 1;
    return g->n_head == 1 ? 1 : 2;
}

int32_t lsa_stage_shape(int64_t shape[3], lsa_stage s, const lsa_indexer_geom *g, bool full) {
    int32_t at[LSA_GOLD_RANKS];
    const kind k = STAGE[s].kind;
    shape[0] = M;
    shape[1] = k == RANK     ? (full ? g->rank : lsa_gold_ranks(at, g))
               : k == HEAD   ? (full ? g->n_head : lsa_gold_heads(at, g))
               : k == WEIGHT ? g->n_head
                             : N;
    shape[2] = k == HEAD ? 128 : 1;
    return k == HEAD ? 3 : 2;
}

int64_t lsa_stage_elems(lsa_stage s, const lsa_indexer_geom *g) {
    int64_t shape[3];
    lsa_stage_shape(shape, s, g, false);
    return shape[0] * shape[1] * shape[2];
}

void lsa_stages_fini(lsa_stages *s) {
    for (int i = 0; i < LSA_STAGES; i++) lsa_free(s->v[i]);
    memset(s, 0, sizeof *s);
}

lsa_status lsa_stages_put(lsa_stages *s, lsa_stage stage, const float *full, const lsa_indexer_geom *g,
                          lsa_err *err) {
    int64_t whole[3], part[3];
    int32_t at[LSA_GOLD_RANKS];
    lsa_stage_shape(whole, stage, g, true);
    lsa_stage_shape(part, stage, g, false);
    const kind k = STAGE[stage].kind;
    if (k == RANK) lsa_gold_ranks(at, g);
    if (k == HEAD) lsa_gold_heads(at, g);
    const lsa_status st = LSA_NEW(s->v[stage], part[0] * part[1] * part[2], err);
    if (st != LSA_OK) return st;
    for (int64_t i = 0; i < part[0] * part[1]; i++) {
        const int64_t row = i / part[1], col = k == RANK || k == HEAD ? at[i % part[1]] : i % part[1];
        memcpy(s->v[stage] + i * part[2], full + (row * whole[1] + col) * part[2],
               (size_t)part[2] * sizeof(float));
    }
    return LSA_OK;
}

lsa_status lsa_gold_score(float *z, lsa_ctx *ctx, int32_t n_head, const float *q, const float *w,
                          const uint8_t *key, bool groups, lsa_err *err) {
    const int64_t base = 0, step = groups ? 64 : n_head;
    const int32_t n_cand = N;
    for (int i = 0; i < M; i++)
        for (int64_t h = 0; h < n_head; h += step) {
            const int64_t at = (int64_t)i * n_head + h;
            const lsa_indexer_score_fwd_args a = {1,
                                                  lsa_min_i64(step, n_head - h),
                                                  128,
                                                  N,
                                                  N,
                                                  q + at * 128,
                                                  w + at,
                                                  key,
                                                  &base,
                                                  NULL,
                                                  &n_cand,
                                                  h > 0,
                                                  z + (int64_t)i * N};
            const lsa_status st = lsa_indexer_score_fwd(ctx, &a, err);
            if (st != LSA_OK) return st;
        }
    return LSA_OK;
}

/* One head through RoPE and Hadamard; rounded to bf16 around RoPE unless exact. */
typedef struct turn {
    int32_t dim, off, lo, hi; /* pair i: channels off + lo*i and off + lo*i + hi */
    double c[64], s[64];
    double hadamard; /* factor, 0 for none */
} turn;

static void turn_make(turn *t, const lsa_indexer_geom *g, int64_t position, lsa_fault fault, double v) {
    lsa_rope r = g->rope;
    float freq[64];
    if (fault == LSA_FAULT_ROPE_BASE) r.base = v;
    if (fault == LSA_FAULT_YARN_FACTOR) r.factor = v;
    if (fault == LSA_FAULT_YARN_LENGTH) r.original_len = (int64_t)v;
    if (fault == LSA_FAULT_POSITION_SHIFT) position += (int64_t)v;
    if (fault == LSA_FAULT_POSITION_ROWS) position = lsa_min_i64(position, (int64_t)v - 1);
    const double gain = fault == LSA_FAULT_YARN_MAGNITUDE ? 0.1 * log(r.factor) + 1 : 1;
    lsa_rope_freqs(freq, &r);
    t->dim = r.dim;
    t->off = fault == LSA_FAULT_ROPE_FIRST ? 0 : 128 - r.dim;
    t->lo = fault == LSA_FAULT_ROPE_HALVES ? 1 : 2;
    t->hi = fault == LSA_FAULT_ROPE_HALVES ? r.dim / 2 : 1;
    t->hadamard = fault == LSA_FAULT_HADAMARD ? v : 1 / sqrt(128.0);
    for (int32_t i = 0; i < r.dim / 2; i++) {
        const float angle = (float)position * freq[i]; /* NUMERIC: rounded to f32 before sin and cos */
        double x = (double)angle;
        if (fault == LSA_FAULT_ANGLE_DOUBLE) {
            const double plain = pow(r.base, -2.0 * i / r.dim), rounded = (double)(1.0f / (float)(1 / plain));
            x = (double)position * (double)freq[i] * (v == 2 ? plain / rounded : 1);
        }
        if (fault == LSA_FAULT_ROPE_TURN) x *= v;
        t->c[i] = cos(x) * gain;
        t->s[i] = sin(x) * gain;
    }
}

static void turn_head(const turn *t, bool exact, const float *raw, float *before, float *rope, float *q) {
    double x[128];
    for (int i = 0; i < 128; i++) before[i] = rope[i] = exact ? raw[i] : lsa_round_bf16(raw[i]);
    for (int32_t i = 0; i < t->dim / 2; i++) {
        float *p = rope + t->off + t->lo * i;
        const double a = (double)p[0], b = (double)p[t->hi];
        p[0] = (float)(a * t->c[i] - b * t->s[i]);
        p[t->hi] = (float)(a * t->s[i] + b * t->c[i]);
    }
    for (int i = 0; i < 128; i++) {
        if (!exact) rope[i] = lsa_round_bf16(rope[i]);
        x[i] = (double)rope[i];
    }
    if (t->hadamard != 0) {
        for (int h = 1; h < 128; h *= 2)
            for (int i = 0; i < 128; i++)
                if (!(i & h)) {
                    const double a = x[i], b = x[i | h];
                    x[i] = a + b;
                    x[i | h] = a - b;
                }
        for (int i = 0; i < 128; i++) x[i] *= t->hadamard;
    }
    for (int i = 0; i < 128; i++) q[i] = (float)x[i];
}

/* Values of the e4m3 codes of q; the scale. */
static float quantise(float *code, const float *q) {
    float amax = 1e-4f;
    for (int i = 0; i < 128; i++)
        if (!(fabsf(q[i]) <= amax)) amax = fabsf(q[i]);
    for (int i = 0; i < 128; i++) code[i] = lsa_e4m3_to_f32(lsa_f32_to_e4m3(q[i] / (amax / 448.0f)));
    return amax / 448.0f;
}

typedef struct work { /* full shapes */
    float *x, *g, *a, *u, *raw, *t, *before, *rope, *q, *w, *scale, *w8;
    uint8_t *key;
    float z[M * N], z2[M * N], rstd[M];
} work;

static void work_fini(work *k) {
    float *p[] = {k->x, k->g, k->a, k->u, k->raw, k->t, k->before, k->rope, k->q, k->w, k->scale, k->w8};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    lsa_free(k->key);
}

static lsa_status work_init(work *k, const lsa_indexer_geom *g, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t q = (int64_t)M * g->n_head * 128;
    LSA_TRY(LSA_NEW(k->x, (int64_t)M * g->hidden, err));
    LSA_TRY(LSA_NEW(k->g, g->rank, err));
    LSA_TRY(LSA_NEW(k->a, (int64_t)M * g->rank, err));
    LSA_TRY(LSA_NEW(k->u, (int64_t)M * g->rank, err));
    LSA_TRY(LSA_NEW(k->raw, q, err));
    LSA_TRY(LSA_NEW(k->t, q, err));
    LSA_TRY(LSA_NEW(k->before, q, err));
    LSA_TRY(LSA_NEW(k->rope, q, err));
    LSA_TRY(LSA_NEW(k->q, q, err));
    LSA_TRY(LSA_NEW(k->w, (int64_t)M * g->n_head, err));
    LSA_TRY(LSA_NEW(k->scale, (int64_t)M * g->n_head, err));
    LSA_TRY(LSA_NEW(k->w8, (int64_t)M * g->n_head, err));
    LSA_TRY(LSA_NEW(k->key, N * LSA_KEY_BYTES, err));
done:
    return st;
}

/* x, a, u, raw, w. */
static lsa_status project(work *k, lsa_ctx *ctx, const lsa_indexer_geom *g, const float *params,
                          int32_t layer, const lsa_chain_in *in, lsa_fault fault, double v, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t d = g->hidden, r = g->rank, H = g->n_head;
    const float *part[LSA_INDEXER_PARTS];
    for (int p = 0; p < LSA_INDEXER_PARTS; p++)
        part[p] = params + lsa_indexer_tensor_at(g, layer, (lsa_indexer_part)p).offset;
    for (int64_t i = 0; i < M * d; i++)
        k->x[i] = fault == LSA_FAULT_HIDDEN_LOW_BITS ? lsa_gold_unrounded(in->x[i], i % d) : in->x[i];
    for (int64_t i = 0; fault == LSA_FAULT_HIDDEN_NORM && i < M; i++) {
        double ss = 0;
        for (int64_t j = 0; j < d; j++) ss += (double)k->x[i * d + j] * (double)k->x[i * d + j];
        for (int64_t j = 0; j < d; j++)
            k->x[i * d + j] = (float)((double)k->x[i * d + j] / sqrt(ss / (double)d + 1e-6));
    }
    const float scale = fault == LSA_FAULT_SCALE ? (float)v : (float)(1 / sqrt(128.0 * (double)H));
    const lsa_gemm_args
        ga = {.trans_b = true, .m = M, .n = r, .k = d, .alpha = 1, .a = k->x, .b = part[LSA_WQ_A], .c = k->a},
        gq = {.trans_b = true,
              .m = M,
              .n = H * 128,
              .k = r,
              .alpha = 1,
              .a = k->u,
              .b = part[LSA_WQ_B],
              .c = k->raw},
        gw = {.trans_b = true,
              .m = M,
              .n = H,
              .k = d,
              .alpha = scale,
              .a = k->x,
              .b = part[LSA_W_PROJ],
              .c = k->w};
    const bool norm = fault != LSA_FAULT_Q_NORM || v == 1, weight = fault != LSA_FAULT_Q_NORM || v == 2;
    for (int64_t j = 0; j < r; j++) k->g[j] = weight ? part[LSA_Q_NORM][j] : 1.0f;
    LSA_TRY(lsa_gemm(ctx, &ga, err));
    const lsa_rmsnorm_fwd_args n = {M,    r,      fault == LSA_FAULT_EPS ? (float)v : g->eps, k->a, k->g,
                                    k->u, k->rstd};
    LSA_TRY(lsa_rmsnorm_fwd(ctx, &n, err));
    for (int64_t i = 0; !norm && i < M * r; i++) k->u[i] = k->g[i % r] * k->a[i];
    LSA_TRY(lsa_gemm(ctx, &gq, err));
    for (int64_t i = 0; fault == LSA_FAULT_TRANSPOSED && i < M * H * 128; i++) {
        const int64_t row = i / (H * 128), h = i / 128 % H, c = i % 128;
        k->t[i] = k->raw[row * H * 128 + c * H + h];
    }
    if (fault == LSA_FAULT_TRANSPOSED) memcpy(k->raw, k->t, (size_t)(M * H * 128) * sizeof(float));
    LSA_TRY(lsa_gemm(ctx, &gw, err));
done:
    return st;
}

static lsa_status score(work *k, lsa_ctx *ctx, const lsa_indexer_geom *g, const float *q, const float *w,
                        bool groups, lsa_fault fault, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_TRY(lsa_gold_score(k->z, ctx, g->n_head, q, w, k->key, groups, err));
    if (fault != LSA_FAULT_RELU) goto done;
    /* k.q = max(0, k.q) - max(0, -k.q) */
    for (int64_t i = 0; i < (int64_t)M * g->n_head * 128; i++) k->t[i] = -q[i];
    LSA_TRY(lsa_gold_score(k->z2, ctx, g->n_head, k->t, w, k->key, groups, err));
    for (int i = 0; i < M * N; i++) k->z[i] -= k->z2[i];
done:
    return st;
}

lsa_status lsa_chain_run(lsa_stages *out, lsa_ctx *ctx, const lsa_indexer_geom *g, const float *params,
                         int32_t layer, const lsa_chain_in *in, lsa_fault fault, double v, lsa_err *err) {
    lsa_status st = LSA_OK;
    work k = {0};
    const int64_t H = g->n_head;
    const float one = 1;
    memset(out, 0, sizeof *out);
    LSA_TRY(work_init(&k, g, err));
    LSA_TRY(project(&k, ctx, g, params, layer, in, fault, v, err));
    memcpy(k.key, in->key, N * LSA_KEY_BYTES);
    for (int64_t s = 0; fault == LSA_FAULT_KEY_SCALE && s < N; s++)
        memcpy(k.key + s * LSA_KEY_BYTES + 128, &one, sizeof one);
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_A, k.a, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_U, k.u, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_W, k.w, g, err));
    for (int p = LSA_PATH_F32; p <= LSA_PATH_BF16; p++) {
        for (int64_t i = 0; i < M; i++) {
            turn t;
            turn_make(&t, g, in->position[i], fault, v);
            for (int64_t at = i * H * 128; at < (i + 1) * H * 128; at += 128)
                turn_head(&t, p == LSA_PATH_F32, k.raw + at, k.before + at, k.rope + at, k.q + at);
        }
        LSA_TRY(score(&k, ctx, g, k.q, k.w, false, fault, err));
        const bool f32 = p == LSA_PATH_F32;
        LSA_TRY(lsa_stages_put(out, f32 ? LSA_STAGE_RAW : LSA_STAGE_RAW_BF16, k.before, g, err));
        LSA_TRY(lsa_stages_put(out, f32 ? LSA_STAGE_ROPE : LSA_STAGE_ROPE_BF16, k.rope, g, err));
        LSA_TRY(lsa_stages_put(out, f32 ? LSA_STAGE_Q : LSA_STAGE_Q_BF16, k.q, g, err));
        LSA_TRY(lsa_stages_put(out, lsa_logit_stage[p], k.z, g, err));
    }
    for (int64_t i = 0; i < M * H; i++) { /* from the bf16 path's q */
        k.scale[i] = quantise(k.rope + i * 128, k.q + i * 128);
        k.w8[i] = k.w[i] * k.scale[i];
    }
    LSA_TRY(score(&k, ctx, g, k.rope, k.w8, true, fault, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_CODE_FP8, k.rope, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_SCALE_FP8, k.scale, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_W_FP8, k.w8, g, err));
    LSA_TRY(lsa_stages_put(out, LSA_STAGE_LOGIT_FP8, k.z, g, err));
done:
    work_fini(&k);
    if (st != LSA_OK) lsa_stages_fini(out);
    return st;
}
