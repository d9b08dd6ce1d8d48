/* Kernels of a decode step for a batch of requests, one layer a launch. Internal to kernels/cuda/decode.
 *
 * A request looks at a list of pages of 64 chunks, ascending: all of them, or the resident ones. Inside a
 * layer's kernels a chunk is its position in that list, so ties to the lower position are ties to the lower
 * chunk, and a list of all pages gives full attention's bits wherever the pages lie. */
#ifndef LSA_KERNELS_CUDA_DECODE_STEP_H
#define LSA_KERNELS_CUDA_DECODE_STEP_H

#include "kernels/cuda/serve/serve_state.h"

enum { ATTEND_HEADS = 16, ATTEND_ROWS = 64, ATTEND_SPLITS = 64, ATTEND_ROPE = 64 };

/* Encoded rows (codec.cuh) of m requests: n_window from `window`, then the selected. */
struct attend_args {
    const float *q, *sink; /* [m, H, D] [H] */
    float *out;            /* [m, H, D] */
    const uint8_t *window, *rows;
    int64_t window_stride;      /* bytes from request to request */
    int64_t row_stride;         /* slot NULL: the same for rows, which follow each other */
    int64_t page_stride;        /* slot: bytes from page to page of this layer */
    const int32_t *slot;        /* [m, ld_slot] where the pages of a request lie; NULL: no pages */
    const int32_t *sel, *n_sel; /* [m, ld_sel] positions in its list; [m]; NULL: rows 0 .. n_row - 1 */
    int64_t ld_slot, ld_sel;
    int32_t n_window, n_row, m, H, splits; /* n_row: most selected rows */
    float scale;
    float *part, *stat; /* [m, groups, splits, 16, D] and [.., 2, 16]: work */
    uint32_t *ticket;   /* [m, groups] 0, and 0 again afterwards */
};

/* Blocks that share a request's rows, so that m requests fill n_sm multiprocessors. */
int32_t decode_splits(int32_t n_sm, int32_t m, int32_t H, int32_t n_row);
/* Elements of part (stat: 32 where part has 16 D). */
static inline int64_t decode_part_room(int32_t m, int32_t H, int32_t D, int32_t splits) {
    return (int64_t)m * ((H + ATTEND_HEADS - 1) / ATTEND_HEADS) * splits * ATTEND_HEADS * D;
}
/* x: launches only (serve_launch). D: 128 or 512 with 64 rotary channels, else LSA_E_UNSUPPORTED. */
lsa_status decode_attend(const lsa_gpu_retriever *x, const attend_args *a, int32_t D, cudaStream_t s,
                         lsa_err *err);
/* More shared memory than 48 KiB is allowed once. */
lsa_status decode_prepare_attend(int32_t D, lsa_err *err);

enum { TOPK_SEGMENT = 8192, TOPK_ALONE = 24576 }; /* chunks of a block; of a request that needs one block */

/* The k highest logits of each request, ties to the lower, NaN last, ascending positions. */
struct topk_args {
    const float *logit; /* [m, ld] */
    const int64_t *n;   /* [m] */
    int64_t ld, most;   /* most: max of n */
    int32_t m, k;
    int32_t *sel, *n_sel; /* [m, k] [m] */
    float *best;          /* [m, segments, k] work, with best_at, if most > TOPK_ALONE */
    int32_t *best_at;
};
lsa_status decode_topk(const lsa_gpu_retriever *x, const topk_args *a, cudaStream_t s, lsa_err *err);

/* Pages into their places, one launch: move [n]: page of the host store, slot. */
struct swap_part {
    const uint8_t *from;
    uint8_t *to;
    int64_t from_bytes, to_bytes, bytes; /* of a page; bytes: a multiple of 16 */
};
struct swap_args {
    swap_part part[2];
    const int2 *move;
    int32_t n;
};
lsa_status decode_swap(const swap_args *a, cudaStream_t s, lsa_err *err);

#endif
