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
    token_rows win, proj;           /* [., D] and [., 2 roles D], [., 4 Di] */
    float *row, *key;               /* [max entries, D] [max chunks, Di]; CSA: storage F32 */
    uint8_t *rows, *keys;           /* encoded, on the GPU: all, or the reserve's */
    uint8_t *all_keys;              /* TIERED, keys_on_gpu: all keys; keys is then NULL */
    uint8_t *host_rows, *host_keys; /* TIERED: all */
    int32_t csa;                    /* its number among CSA layers, or -1 */
};

/* Where encoded rows are: page by page through a table, or one after the other (slot NULL). */
struct row_source {
    const uint8_t *base;
    const int32_t *slot; /* [pages] */
    int32_t page, bytes;
};
static __device__ __forceinline__ const uint8_t *row_at(const row_source &s, int64_t c) {
    const int64_t at = s.slot ? (int64_t)s.slot[c / s.page] * s.page + c % s.page : c;
    return s.base + at * s.bytes;
}

/* The chunks that a selection looks at, ascending: list [n], then all from n_masked on. */
struct chunk_ids {
    const int32_t *list;
    int64_t n, n_masked;
};
static __device__ __forceinline__ int32_t chunk_at(const chunk_ids &d, int64_t i) {
    return i < d.n ? d.list[i] : (int32_t)(d.n_masked + i - d.n);
}

/* Encoded rows and their tiers (pages.cu). */
struct page_store {
    int32_t row_bytes, key_bytes;
    int64_t n_page;     /* of the whole sequence */
    int32_t *slot_of;   /* pinned [n_page]: place in the reserve, or -1 */
    int32_t *shown;     /* pinned [n_page]: the same less prefetched pages; as in the table */
    int32_t *table;     /* on the GPU */
    int32_t *free_slot; /* pinned [reserve], n_free of them */
    int64_t n_free;
    int32_t *move;             /* pinned [reserve, 2]: page, slot */
    uint8_t *wanted;           /* pinned [n_page] */
    int32_t *list, *host_list; /* [max_chunk + 1] resident chunks below n_masked */
    int64_t n_list;
    float *fresh_row, *fresh_key; /* rows and keys of this call, before they are encoded */
    float *gathered;              /* [chunk top, D] selected rows, decoded */
    int32_t *gathered_sel;        /* [chunk top] where they are */
    uint8_t *stage;               /* [max_chunk + 1] keys of a layer while there is no set; or NULL */
    cudaStream_t copies;
    cudaEvent_t computed, copied;
};

/* Of m tokens: top-k entries a token, and [m]; part [2, m] window, sink; hidden [m, d], host only. */
struct decode_rows {
    int32_t *sel, *n_sel, *miss;
    float *sel_logit, *mass, *part, *hidden;
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
    decode_rows on, host; /* statistics of a layer: device, pinned */
    unsigned long long *all_miss;
    page_store store;
    lsa_gpu_session_use use;
};

/* Memory of a kind: counted in s->use. */
lsa_status decode_alloc(lsa_gpu_session *s, void **out, int64_t n, size_t size, int64_t *counter,
                        const char *name, lsa_err *err);
lsa_status decode_pinned(lsa_gpu_session *s, void **out, int64_t n, size_t size, lsa_err *err);
#define NEW(p, count, kind)                                                                                  \
    LSA_TRY(decode_alloc(s, (void **)&(p), (int64_t)(count), sizeof *(p), &s->use.kind, #p, err))
#define PINNED(p, count) LSA_TRY(decode_pinned(s, (void **)&(p), (int64_t)(count), sizeof *(p), err))

static inline float *at_position(float *rows, int64_t width, int64_t position) {
    return (float *)((uintptr_t)rows - (uintptr_t)(width * position) * sizeof(float));
}

/* ---- pages.cu ---- */
lsa_status pages_make(lsa_gpu_session *s, lsa_err *err); /* the layers are there, without CSA rows */
void pages_free(lsa_gpu_session *s);
void pages_reset(lsa_gpu_session *s);
lsa_status pages_set(lsa_gpu_session *s, const uint8_t *resident, int64_t n_masked, lsa_err *err);
/* Places for the pages that a call of m tokens fills. */
lsa_status pages_grow(lsa_gpu_session *s, int64_t m, lsa_err *err);
/* Encodes chunks [first, last) of a layer from fresh_row and fresh_key to where they live. */
lsa_status pages_store(lsa_gpu_session *s, const decode_layer *y, int64_t first, int64_t last, lsa_err *err);
/* Decodes the selected rows of m tokens into gathered, gathered_sel. */
lsa_status pages_gather(lsa_gpu_session *s, const decode_layer *y, int64_t m, lsa_err *err);
/* Keys of chunks below `visible`, for the indexer. */
lsa_status pages_keys(lsa_gpu_session *s, const decode_layer *y, int64_t visible, row_source *out,
                      lsa_err *err);

/* Decoded to host memory. */
lsa_status pages_read_keys(lsa_gpu_session *s, const decode_layer *y, int64_t first, int64_t last, float *key,
                           lsa_err *err);

/* Only resident chunks are scored. */
static inline bool reserve_only(const lsa_gpu_session *s) {
    return s->o.storage == LSA_GPU_ROWS_TIERED && s->masked;
}

/* Selections of a CSA layer into the teacher's sel, n_sel, sel_logit. */
lsa_status decode_select(lsa_gpu_session *s, const decode_layer *layer, int64_t p, int64_t m, lsa_err *err);

#endif
