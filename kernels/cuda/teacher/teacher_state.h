/* The GPU teacher's memory and kernels. Internal to kernels/cuda/teacher. See kernels/model/gpu_teacher.h.
 *
 * Sizes: T tokens of a document, m of a chunk, s streams, d hidden, H heads of D, Hi index heads of Di, G
 * groups of R, E experts, k of them a token, M moe width, nz = s (s + 2). */
#ifndef LSA_KERNELS_CUDA_TEACHER_TEACHER_STATE_H
#define LSA_KERNELS_CUDA_TEACHER_TEACHER_STATE_H

#include "kernels/cuda/cuda_state.h"

extern "C" {
#include "kernels/model/gpu_teacher.h"
}

enum {
    TEACHER_THREADS = 256,
    TEACHER_STREAMS = 8,
    TEACHER_WIDTH = 1024,   /* D and Di at most; powers of two from 64 on */
    TEACHER_SCREENED = 128, /* Di that the index is screened at, see select.cu */
    TEACHER_SLOTS = 3,      /* chunks whose statistics are on their way */
    TEACHER_MARKS = 16      /* chunks whose stages are not yet summed up */
};

struct lsa_gpu_layer {
    lsa_ctx *ctx;
    lsa_gpu_layer_weights w; /* the same pointers, on the device */
    bool borrowed;
};

/* Statistics of one chunk in one CSA layer, from the kernels to the tap: see slots.cu. */
struct teacher_rows {
    int32_t *sel, *n_sel;
    float *sel_logit, *mass, *part, *key; /* part [2,m] window, sink; key [m/4+1, Di] */
    float *probe;                         /* [LSA_GPU_MAX_PROBE][T/4 logits, ID, Hi] */
    float *hidden, *dense;                /* [hidden_room, d] [dense_room, T/4] */
};
struct teacher_slot {
    teacher_rows on, host; /* device, pinned */
    int64_t hidden_room, dense_room;
    cudaEvent_t ready, begun, copied;
    bool full;
    int64_t p, m, n_hidden, n_dense, hidden_stride, dense_every, first_key, n_key;
    int64_t probe[LSA_GPU_MAX_PROBE];
    int32_t n_probe;
    lsa_gpu_csa_tap *tap;
    void *user;
};

/* Events between the stages of a chunk in a layer; stage[i] ended at event i. */
struct teacher_marks {
    cudaEvent_t event[16];
    int stage[16], n;
};

struct lsa_gpu_teacher {
    lsa_ctx *ctx;
    cuda_state *cs;
    lsa_gpu_teacher_geom g;
    int64_t max_tokens, chunk, n; /* n: tokens of the document */
    int64_t nz, HD, ID, nx, top;  /* nx: rows of wx there is room for; top: top-k */
    lsa_gpu_teacher_tables table; /* on the device */
    int32_t *token;
    float *ring;               /* [n_slot * chunk, s, d] */
    float *X;                  /* [n, s, d], the document's part of it */
    int64_t n_slot;            /* a chunk more than the longest document has */
    struct teacher_park *park; /* or NULL: no document was parked yet (parked.cu) */
    const void *parked_from;   /* of the document */
    void *parked_to;
    bool parked_half;
    /* of the layer in work, whole document */
    float *win, *proj, *iproj; /* [T, D] [T, 2 roles D] [T, 4 Di] */
    float *row, *key;          /* [T/ratio, D] [T/4, Di] */
    /* of the chunk */
    float *z, *coef, *x, *xp, *qr, *qq, *q, *iq,
        *iw;                /* [m,nz] same [m,d] [m,nx] [m,q_rank] [m,HD+ID] [m,HD] [m,ID] [m,Hi] */
    float *o, *og, *o2, *y; /* [G,m,HD/G] [G,m,R] [m,G R] [m,d] */
    float *logit;           /* [logit_room]: rows of some tokens, at least one of T/4 + 32 */
    int32_t *candidate;
    int64_t logit_room;
    uint16_t *key16, *iq16; /* f16: [T/4, Di] [m, ID] */
    uint32_t *key_most;
    float *route, *weight;   /* [m,E] [m,k] */
    int32_t *expert, *place; /* [m,k] chosen, ascending; where their rows are in the list */
    int32_t *begin, *list;   /* [E+1] [m k] tokens by expert */
    float *act, *ye, *h13;   /* [m k, M] [m k, d] [m, 2M] */
    /* statistics: those of the slot in work */
    int32_t *sel, *n_sel;
    float *sel_logit, *mass, *part;
    teacher_slot slot[TEACHER_SLOTS];
    int next; /* slot */
    cudaStream_t copies;
    int64_t probe[LSA_GPU_MAX_PROBE];
    int32_t n_probe;
    int64_t dense_every, hidden_stride;
    teacher_marks marks[TEACHER_MARKS];
    int at_marks;
    double seconds[LSA_GPU_STAGES];
};

/* Launches, all on the context's stream; p: position of the chunk's first token. */
lsa_status teacher_embed(lsa_gpu_teacher *t, lsa_err *err);
lsa_status teacher_collapse(lsa_gpu_teacher *t, int64_t p, int64_t m, const float *fn, const float *base,
                            const float *scale, const float *norm, lsa_err *err);
lsa_status teacher_expand(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err);
lsa_status teacher_head(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err); /* x: what the head reads */
lsa_status teacher_project(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err);
/* entries [first, last) */
lsa_status teacher_compress(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t first, int64_t last,
                            lsa_err *err);
lsa_status teacher_select(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_err *err);
/* Selection by f16 logits alone (the bf16 tier): q [m, Hi, 128], key [chunks, 128] f16, iw [m, Hi]; logit and
 * candidate [room]: rows of some tokens, at least one; out as teacher_rows has it. */
struct teacher_index {
    const uint16_t *q, *key;
    const float *iw;
    float *logit;
    int32_t *candidate;
    int64_t room, p, m;
    int Hi, k;
    int32_t *sel, *n_sel;
    float *sel_logit;
};
lsa_status teacher_index16(const teacher_index *a, cudaStream_t s, lsa_err *err);
lsa_status teacher_attend(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err);
/* The whole row of f32 index logits of token `at` of the chunk. */
lsa_status teacher_probe(lsa_gpu_teacher *t, int64_t p, int64_t at, float *logit, lsa_err *err);
/* Dense mass of n positions from `first` on, t->dense_every apart, into out [n, T/4 + 1]. */
lsa_status teacher_dense(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t first, int64_t n,
                         float *out, lsa_err *err);
lsa_status teacher_moe(lsa_gpu_teacher *t, const lsa_gpu_layer *l, int64_t p, int64_t m, lsa_err *err);

/* Slots (slots.cu). take: the next one, after its former rows were delivered; its buffers become t->sel and
 * so on. hidden: the chunk's x. send: the copies are queued. deliver: all that are full, oldest first. */
lsa_status teacher_slots_create(lsa_gpu_teacher *t, lsa_err *err);
void teacher_slots_destroy(lsa_gpu_teacher *t);
lsa_status teacher_slots_room(lsa_gpu_teacher *t, lsa_err *err);
lsa_status teacher_slot_take(lsa_gpu_teacher *t, int64_t p, int64_t m, lsa_gpu_csa_tap *tap, void *user,
                             lsa_err *err);
lsa_status teacher_slot_hidden(lsa_gpu_teacher *t, lsa_err *err);
lsa_status teacher_slot_send(lsa_gpu_teacher *t, const lsa_gpu_layer *l, lsa_err *err);
lsa_status teacher_slots_deliver(lsa_gpu_teacher *t, lsa_err *err);

/* Documents that come and go between two layers (parked.cu). begin: t->X, and the copies into it are queued;
 * wait: before the chunk at p is computed; leave: after it. */
lsa_status teacher_park_begin(lsa_gpu_teacher *t, const lsa_gpu_teacher_doc *doc, lsa_err *err);
lsa_status teacher_park_wait(lsa_gpu_teacher *t, int64_t p, lsa_err *err);
lsa_status teacher_park_leave(lsa_gpu_teacher *t, int64_t p, lsa_err *err);
void teacher_park_destroy(lsa_gpu_teacher *t);

/* Times (marks.cu). begin: of a chunk; mark: `stage` ended here; collect: all that are known into seconds. */
lsa_status teacher_marks_create(lsa_gpu_teacher *t, lsa_err *err);
void teacher_marks_destroy(lsa_gpu_teacher *t);
lsa_status teacher_marks_begin(lsa_gpu_teacher *t, lsa_err *err);
lsa_status teacher_mark(lsa_gpu_teacher *t, lsa_gpu_stage stage, lsa_err *err);
lsa_status teacher_marks_collect(lsa_gpu_teacher *t, lsa_err *err);

/* Shared memory of a token's index query. */
static inline int teacher_query_bytes(const lsa_gpu_teacher_geom *g) {
    const int heads = (g->index_n_head + 7) / 8 * 8;
    return heads * (g->index_head_dim + 1) * (int)sizeof(float);
}
/* c [m,n] = a [m,k] b [n,k]^T (+ c) */
static inline lsa_status teacher_gemm(lsa_gpu_teacher *t, int64_t m, int64_t n, int64_t k, const float *a,
                                      const float *b, float beta, float *c, lsa_err *err) {
    const lsa_gemm_args args = {false, true, m, n, k, 1.0f, beta, a, b, c};
    return lsa_cuda_gemm(t->ctx, &args, err);
}

/* Sum over a block of TEACHER_THREADS; every thread gets it. */
static __device__ __forceinline__ float block_sum(float v) {
    __shared__ float part[TEACHER_THREADS / 32];
    for (int o = 16; o >= 1; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    float s = 0;
    for (int w = 0; w < TEACHER_THREADS / 32; w++) s += part[w];
    return s;
}

/* Rotation of the pair (i, i+1) of a vector's last rope channels; the angle's product is rounded before the
 * sine. */
static __device__ __forceinline__ void rotate_pair(float *x, float freq, float pos, float sign) {
    float sn, c;
    sincosf(__fmul_rn(pos, freq), &sn, &c);
    sn *= sign;
    const float a = x[0], b = x[1];
    x[0] = a * c - b * sn;
    x[1] = a * sn + b * c;
}

#endif
