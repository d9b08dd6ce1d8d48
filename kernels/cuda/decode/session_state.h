/* A GPU session's memory and kernels. Internal to kernels/cuda/decode. See kernels/model/gpu_session.h.
 *
 * The teacher's kernels index rows by position in the document. A session keeps only some of them, so it
 * hands out pointers moved back by the position of the first row it has (at_position). */
#ifndef LSA_KERNELS_CUDA_DECODE_SESSION_STATE_H
#define LSA_KERNELS_CUDA_DECODE_SESSION_STATE_H

#include "kernels/cuda/teacher/teacher_state.h"

extern "C" {
#include "kernels/model/gpu_session.h"
}

/* Rows of the last `keep` tokens and of this call, in order; the rows move to the front when room runs out.
 */
struct token_rows {
    float *data;   /* [room, width] */
    float *second; /* the index compressor's, which move with the others; or NULL */
    int64_t width, second_width, keep, room, first; /* first: position of row 0 */
};

struct decode_layer {
    const lsa_gpu_layer *l;
    token_rows win, proj; /* [., D] and [., 2 roles D], [., 4 Di] */
    float *row, *key;     /* [max entries, D] [max chunks, Di] */
    int32_t csa;          /* its number among CSA layers, or -1 */
};

struct lsa_gpu_session {
    lsa_gpu_teacher *t;
    lsa_gpu_session_opts o;
    decode_layer layer[LSA_MAX_LAYERS];
    int32_t n_layer, n_csa;
    int64_t pos, max_chunk;
    int32_t *token; /* [chunk] */
    float *X;       /* [chunk, s, d] */
    float *logit;   /* [logit_rows, max_chunk + 1] of the indexer */
    int64_t logit_rows;
    float *hidden; /* [n_csa, d] of the last token */
    float *out;    /* [out_rows, vocab], made when first wanted */
    int64_t out_rows;
    uint8_t *mask; /* [max_chunk + 1] */
    int64_t n_masked;
    bool masked;
    int32_t *miss, *host_miss; /* [chunk] of a layer */
    unsigned long long *all_miss;
};

static inline float *at_position(float *rows, int64_t width, int64_t position) {
    return (float *)((uintptr_t)rows - (uintptr_t)(width * position) * sizeof(float));
}

/* Selections of a CSA layer into the teacher's sel, n_sel, sel_logit; keys are in layer->key. */
lsa_status decode_select(lsa_gpu_session *s, const decode_layer *layer, int64_t p, int64_t m, lsa_err *err);

#endif
