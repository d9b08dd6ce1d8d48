/* The indexer step by step on the host, every stage kept, on every numeric path, with one convention replaced
 * at will. With none replaced and on the `ref` backend it is the truth of golden.safetensors; with one
 * replaced it is what an engine with that fault computes (diagnose.h). RoPE, Hadamard and the rounding of
 * queries are written here once more, in double, and not taken from kernels/: truth shares no code with what
 * it judges. Formulas: notes of FlashMemory 5.1 to 5.3. Not thread-safe on one context. */
#ifndef LSA_EXPORT_CHAIN_H
#define LSA_EXPORT_CHAIN_H

#include "kernels/core/dtype.h"
#include "kernels/model/indexer.h"
#include "kernels/model/query_path.h"

enum { LSA_GOLD_M = 4, LSA_GOLD_KEYS = 48, LSA_GOLD_RANKS = 64, LSA_GOLD_HEADS = 2 };

/* In the order of computation on each path. Codes are held as their values. */
typedef enum lsa_stage {
    LSA_STAGE_A = 0, /* Wa x */
    LSA_STAGE_U,     /* after q_norm */
    LSA_STAGE_RAW,   /* Wb u */
    LSA_STAGE_ROPE,  /* after RoPE */
    LSA_STAGE_Q,     /* after Hadamard */
    LSA_STAGE_W,     /* head weights, scaled */
    LSA_STAGE_LOGIT,
    LSA_STAGE_RAW_BF16, /* bf16 path: rounded before RoPE */
    LSA_STAGE_ROPE_BF16,
    LSA_STAGE_Q_BF16,
    LSA_STAGE_LOGIT_BF16,
    LSA_STAGE_CODE_FP8, /* fp8 path: one scale a head, folded into its weight */
    LSA_STAGE_SCALE_FP8,
    LSA_STAGE_W_FP8,
    LSA_STAGE_LOGIT_FP8,
    LSA_STAGES
} lsa_stage;

const char *lsa_stage_name(lsa_stage s); /* after "l{ordinal}.": "a", "bf16.raw", ... */
lsa_query_path lsa_stage_path(lsa_stage s);
lsa_dtype lsa_stage_dtype(lsa_stage s);
extern const lsa_stage lsa_logit_stage[LSA_QUERY_PATHS];

/* The shape in the golden file: [M, sampled ranks], [M, sampled heads, 128], [M, heads] or [M, keys]; with
 * `full` nothing is sampled. Returns the number of dimensions. */
int32_t lsa_stage_shape(int64_t shape[3], lsa_stage s, const lsa_indexer_geom *g, bool full);
int64_t lsa_stage_elems(lsa_stage s, const lsa_indexer_geom *g);
/* Which ranks and heads are sampled, ascending; returns how many. */
int32_t lsa_gold_ranks(int32_t out[LSA_GOLD_RANKS], const lsa_indexer_geom *g);
int32_t lsa_gold_heads(int32_t out[LSA_GOLD_HEADS], const lsa_indexer_geom *g);

/* Values of one layer in their golden shape; v[s] NULL: not known. Owned. */
typedef struct lsa_stages {
    float *v[LSA_STAGES];
} lsa_stages;
void lsa_stages_fini(lsa_stages *s);
/* Copies the sampled part of a stage in full shape. */
LSA_NODISCARD lsa_status lsa_stages_put(lsa_stages *s, lsa_stage stage, const float *full,
                                        const lsa_indexer_geom *g, lsa_err *err);

typedef struct lsa_chain_in { /* host, borrowed */
    const float *x;           /* [M, hidden], exact in bf16 */
    const uint8_t *key;       /* [KEYS, 132] */
    const int64_t *position;  /* [M] */
} lsa_chain_in;

/* What an engine gets that is to round hidden vectors itself: x with low bits that round away. */
static inline float lsa_gold_unrounded(float x, int64_t channel) {
    return channel % 2 ? x * (1 - 0x1p-10f) : x * (1 + 0x1p-10f);
}

/* One replaced convention and its wrong value v. */
typedef enum lsa_fault {
    LSA_FAULT_NONE = 0,
    LSA_FAULT_HADAMARD,    /* factor in place of 1/sqrt(128); 0: not turned */
    LSA_FAULT_ROPE_HALVES, /* channel i paired with i + dim/2 */
    LSA_FAULT_ROPE_FIRST,  /* on the first channels */
    LSA_FAULT_ROPE_TURN,   /* factor of the angle: 0, -1 */
    LSA_FAULT_ROPE_BASE,
    LSA_FAULT_YARN_FACTOR, /* 1: no YaRN */
    LSA_FAULT_YARN_LENGTH,
    LSA_FAULT_YARN_MAGNITUDE,  /* turned channels times 0.1 ln(factor) + 1 */
    LSA_FAULT_ANGLE_DOUBLE,    /* 1: product in double, 2: frequencies too */
    LSA_FAULT_POSITION_SHIFT,  /* added */
    LSA_FAULT_POSITION_ROWS,   /* positions cut at a table of v rows */
    LSA_FAULT_SCALE,           /* factor of the head weights in place of 1/sqrt(128 H) */
    LSA_FAULT_TRANSPOSED,      /* q read as [128, H] */
    LSA_FAULT_HIDDEN_NORM,     /* x normalised once more */
    LSA_FAULT_HIDDEN_LOW_BITS, /* x not rounded */
    LSA_FAULT_Q_NORM,          /* 0: u = a, 1: no weight, 2: only the weight */
    LSA_FAULT_EPS,
    LSA_FAULT_RELU,     /* left out */
    LSA_FAULT_KEY_SCALE /* left out */
} lsa_fault;

/* All stages of joint layer `layer` on a host context (ref, cpu). */
LSA_NODISCARD lsa_status lsa_chain_run(lsa_stages *out, lsa_ctx *ctx, const lsa_indexer_geom *g,
                                       const float *params, int32_t layer, const lsa_chain_in *in,
                                       lsa_fault fault, double v, lsa_err *err);

/* Logits [M, KEYS] from q [M, H, 128] and w [M, H] on a host context. groups: heads 0-63 and 64-127 are
 * scored apart and the two results added, as the reference's paged kernel does. */
LSA_NODISCARD lsa_status lsa_gold_score(float *z, lsa_ctx *ctx, int32_t n_head, const float *q,
                                        const float *w, const uint8_t *key, bool groups, lsa_err *err);

#endif
