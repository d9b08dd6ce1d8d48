/* Inside the engine: weights, session state, and the pieces of one layer step. Not installed.
 *
 * A forward call of n tokens at position p0 runs, per layer, three parallel regions over fixed blocks of
 * LSA_BLOCK tokens: project  (per block)  collapse streams, norm, all projections of x, queries, window rows
 *   compress (per entry)  pool the windows completed in this call into KV rows and index keys
 *   attend   (per block)  indexer logits, selection, attention, output, expand; then the whole MoE sublayer
 * Every buffer below that is indexed by token uses the offset inside the call. */
#ifndef LSA_INFER_ENGINE_H
#define LSA_INFER_ENGINE_H

#include "infer/lsa_infer.h"

#define LSA_BLOCK 64 /* tokens per block; results depend on it only by rounding */

typedef struct compressor_weights {
    int32_t ratio, roles, width; /* m, kappa (2 for CSA), c */
    float *ape;                  /* [m, kappa*c] */
    float *norm;                 /* [c] */
} compressor_weights;

typedef struct mhc_weights {
    float *fn, *base, *scale; /* [n(n+2), n*d], [n(n+2)], [3] */
} mhc_weights;

typedef struct layer_weights {
    mhc_weights hc_attn, hc_ffn;
    float *attn_norm, *ffn_norm; /* [d] */
    float *wx; /* [nx, d]: wq_a, wkv, then compressor wkv, wgate, indexer wkv, wgate, weights_proj */
    int32_t nx, at_kv, at_cv, at_cg, at_iv, at_ig, at_iw; /* first rows of each part; -1 where absent */
    float *q_norm, *kv_norm, *sink;
    float *wq;   /* [H*D (+ Hi*Di), q_rank]: wq_b, then the indexer's wq_b */
    float *wo_a; /* [G*o_rank, H*D/G] */
    float *wo_b; /* [d, G*o_rank] */
    compressor_weights comp, icomp;
    float *gate, *gate_bias; /* [E, d], [E] or NULL */
    int64_t *tid2eid;        /* [vocab, k] or NULL */
    float *w13, *w2;         /* [E+1, 2*moe, d], [E+1, d, moe]; the shared expert is number E */
} layer_weights;

struct lsa_engine {
    lsa_engine_opts opts;
    lsa_teacher *teacher;
    lsa_teacher_config c;
    float *embed, *head, *norm; /* [vocab, d], [vocab, d], [d] */
    float *hc_head_fn, *hc_head_base, *hc_head_scale;
    float *freq_main, *freq_comp; /* [rope_dim/2] */
    layer_weights layer[LSA_MAX_LAYERS];
};

/* Where a layer's weights go: room for n elements, then tensors into it, by their original names. `experts`:
 * the hash layers' table of experts by token, checked. */
typedef struct lsa_layer_sink {
    void *user;
    lsa_status (*room)(void *user, void **p, int64_t n, size_t size, const char *what, lsa_err *err);
    lsa_status (*numbers)(void *user, float *dst, const char *name, int64_t rows, int64_t cols, lsa_err *err);
    lsa_status (*experts)(void *user, int64_t *dst, const char *name, lsa_err *err);
} lsa_layer_sink;
/* w must be zero before. What was given room stays in w when it fails. */
LSA_NODISCARD lsa_status lsa_engine_read_layer(layer_weights *w, const lsa_engine *e, int32_t layer,
                                               const lsa_layer_sink *to, lsa_err *err);
LSA_NODISCARD lsa_status lsa_engine_experts_of_tokens(int64_t *dst, const lsa_engine *e, const char *name,
                                                      lsa_err *err);

/* Per-thread scratch for one block. */
typedef struct workspace {
    float *z;          /* [block, n(n+2)] mHC products */
    float *xp;         /* [block, max nx] */
    float *qr;         /* [block, q_rank] */
    float *qq;         /* [block, H*D + Hi*Di] */
    float *tile;       /* [block*Hi, LSA_KEY_TILE] */
    float *logit;      /* [block, max chunks] */
    float *select;     /* [max chunks] scratch of the selection */
    int32_t *sel;      /* [max chunks or top-k] */
    float *score;      /* [H, window + max rows] attention scores, then probabilities */
    float *mass;       /* [max chunks] */
    float *sel_logit;  /* [max chunks] */
    float *dense;      /* [max chunks] */
    const float **row; /* [window + max rows] */
    float *o;          /* [block, H*D] */
    float *g;          /* [block, G*o_rank] */
    float *y;          /* [block, d] */
    float *h13, *h;    /* [block, 2*moe], [block, moe] */
    float *gx, *gy;    /* [block, d] gathered tokens of one expert */
    float *route;      /* [block, E] */
} workspace;

typedef struct layer_state {
    float *win;          /* [window + chunk, D]: row of position p is p - (p0 - window) */
    float *proj, *iproj; /* [hist + chunk, 2*kappa*c]: values, then gates with ape added */
    int64_t hist;        /* tokens of history kept in proj: kappa*ratio */
    float *row;          /* [max entries, D] compressed KV rows */
    float *key;          /* [max chunks, Di], CSA only */
    float *hidden;       /* [d] of the last token, CSA only */
} layer_state;

struct lsa_session {
    const lsa_engine *e;
    lsa_session_opts o;
    int64_t pos;       /* tokens processed before the current call */
    int64_t max_chunk; /* CSA chunks there is room for */
    const uint8_t *resident;
    int64_t n_masked;
    float *X;    /* [chunk, n, d] streams */
    float *x;    /* [chunk, d] sublayer input */
    float *coef; /* [chunk, n(n+2)] pre, post, C */
    float *q, *iq, *iw;
    float *cs_main, *cs_comp; /* [chunk, rope_dim] cos, sin pairs */
    layer_state layer[LSA_MAX_LAYERS];
    workspace *ws;
    int32_t n_ws;
};

/* mhc.c: coefficients of tokens [t0, t0+n) from X, then y = sum_j pre_j X_j into out [n, d]. */
void lsa_mhc_collapse(const lsa_engine *e, const mhc_weights *w, const float *X, int64_t n, float *z,
                      float *coef, float *out);
/* X_k <- post_k o + sum_j C_jk X_j for n tokens. */
void lsa_mhc_expand(const lsa_engine *e, const float *coef, const float *o, int64_t n, float *X);
void lsa_mhc_head(const lsa_engine *e, const float *X, int64_t n, float *z, float *out);

/* compressor.c: entry i of a compressor from proj rows; base = position of proj row 0. Writes out [c]:
 * pooled, normed, rotated at position ratio*i; the caller applies Hadamard and simulations. */
void lsa_compress_entry(const lsa_engine *e, const compressor_weights *w, const float *proj, int64_t base,
                        int64_t i, float *out);

/* native_index.c */
#define LSA_KEY_TILE 128
void lsa_index_logits(const lsa_engine *e, const layer_state *l, const float *iq, const float *iw, int64_t n,
                      int64_t n_key, float *tile, float *logit, int64_t ld);

/* attention.c: one token, all heads, over `n_row` rows with sink. o [H, D]; window rows come first. On return
 * score holds the probabilities [H, n_row]. Returns the mean sink mass. */
float lsa_attend_rows(const lsa_engine *e, const layer_weights *w, const float *q, const float *const *row,
                      int64_t n_row, float *score, float *o);
/* Counterfactual mass over all visible chunks, mean over heads, into dense [n_visible]. */
void lsa_dense_mass(const lsa_engine *e, const layer_weights *w, const float *q, const float *const *win,
                    int64_t n_win, const float *rows, int64_t n_visible, float *score, float *dense);

/* moe.c: y [n, d] = MoE of x [n, d]. */
void lsa_moe(const lsa_engine *e, int32_t layer, const float *x, const int32_t *token, int64_t pos, int64_t n,
             workspace *ws, const lsa_taps *taps, float *y);

#endif
