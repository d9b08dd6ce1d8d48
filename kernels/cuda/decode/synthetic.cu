/* Fills caches and queries of a batch (kernels/model/synthetic.h). */
#include <cuda_bf16.h>

#include "kernels/cuda/decode/batch_state.h"
#include "kernels/cuda/decode/codec.cuh"

extern "C" {
#include "kernels/model/synthetic.h"
}

enum { THREADS = 256 };

/* A block a slot and layer. */
static __global__ void __launch_bounds__(THREADS)
    pages_k(const __grid_constant__ page_fill f, int row_words) {
    const int64_t slot = blockIdx.x;
    const int layer = blockIdx.y, words = f.D ? row_words * LSA_PAGE_CHUNKS : KEY_PAGE / 4;
    const int32_t page = f.page ? f.page[slot] : (int32_t)(slot % f.n_page);
    uint32_t *const to = (uint32_t *)f.to + (slot * f.layers + layer) * words;
    if (page < 0) return;
    for (int w = threadIdx.x; w < words; w += THREADS)
        to[w] = f.D ? lsa_synth_row(LSA_SYNTH_ROW, (uint32_t)f.ord[layer],
                                    (uint32_t)(page * LSA_PAGE_CHUNKS + w / row_words), w % row_words, f.D,
                                    f.rope)
                    : lsa_synth_key((uint32_t)f.ord[layer], (uint32_t)page, w);
}

lsa_status synth_pages(const page_fill *f, cudaStream_t s, lsa_err *err) {
    if (f->slots == 0 || f->layers == 0) return LSA_OK;
    pages_k<<<dim3((unsigned)f->slots, (unsigned)f->layers), THREADS, 0, s>>>(
        *f, f->D ? encoded_row_bytes(f->D, f->rope) / 4 : 0);
    LSA_LAUNCHED("synthetic pages");
}

/* A block a row. */
static __global__ void __launch_bounds__(THREADS)
    rows_k(uint32_t *to, int kind, int32_t layer, int64_t period, int words, int D, int rope) {
    for (int w = threadIdx.x; w < words; w += THREADS)
        to[blockIdx.x * (int64_t)words + w] =
            lsa_synth_row((lsa_synth_kind)kind, (uint32_t)layer, (uint32_t)(blockIdx.x % period), w, D, rope);
}
lsa_status synth_rows(uint8_t *to, int kind, int32_t layer, int64_t entries, int64_t period, int32_t D,
                      int32_t rope, cudaStream_t s, lsa_err *err) {
    if (entries == 0) return LSA_OK;
    rows_k<<<(unsigned)entries, THREADS, 0, s>>>((uint32_t *)to, kind, layer, period,
                                                 encoded_row_bytes(D, rope) / 4, D, rope);
    LSA_LAUNCHED("synthetic rows");
}

struct query_args {
    float *q, *sink, *w, *index_f32;
    uint8_t *index_code;
    int32_t H, D, index_heads, heads; /* heads: index heads as the scorer has them */
};

/* A block a head of a request. */
static __global__ void __launch_bounds__(THREADS) queries_k(const __grid_constant__ query_args a) {
    const int h = blockIdx.x, i = blockIdx.y;
    if (h < a.H) {
        for (int c = threadIdx.x; c < a.D; c += THREADS)
            a.q[((int64_t)i * a.H + h) * a.D + c] = 4 * lsa_synth_real(LSA_SYNTH_Q, i, h, c);
        if (i == 0 && threadIdx.x == 0) a.sink[h] = 2 * lsa_synth_real(LSA_SYNTH_SINK, 0, h, 0);
    }
    if (h >= a.heads) return;
    for (int c = threadIdx.x; c < 128; c += THREADS) {
        const uint8_t code = h < a.index_heads ? lsa_synth_index_q(i, h, c) : 0;
        const int64_t at = ((int64_t)i * a.heads + h) * 128 + c;
        if (a.index_code)
            a.index_code[at] = code;
        else
            a.index_f32[at] = code_value(code);
    }
    if (threadIdx.x == 0)
        a.w[i * a.heads + h] = h < a.index_heads ? lsa_synth_real(LSA_SYNTH_INDEX_W, i, h, 0) : 0;
}
lsa_status synth_queries(lsa_gpu_batch *b, cudaStream_t s, lsa_err *err) {
    const bool fp8 = b->scorer.form == SERVE_FP8;
    const query_args a = {b->q,
                          b->sink,
                          b->scorer.w,
                          fp8 ? NULL : (float *)b->scorer.q,
                          fp8 ? (uint8_t *)b->scorer.q : NULL,
                          b->o.n_head,
                          b->o.head_dim,
                          b->o.index_n_head,
                          b->scorer.heads};
    const int heads = a.H > a.heads ? a.H : a.heads;
    queries_k<<<dim3((unsigned)heads, (unsigned)b->o.batch), THREADS, 0, s>>>(a);
    LSA_LAUNCHED("synthetic queries");
}

static __global__ void __launch_bounds__(THREADS) hidden_k(uint16_t *to, int hidden, int cycle) {
    const int c = blockIdx.x * THREADS + threadIdx.x, i = blockIdx.y;
    if (c < hidden)
        to[(int64_t)i * hidden + c] =
            (uint16_t)(__float_as_uint(lsa_synth_real(LSA_SYNTH_HIDDEN, i, cycle, c)) >> 16);
}
lsa_status synth_hidden(uint16_t *to, int32_t m, int32_t hidden, int32_t cycle, cudaStream_t s,
                        lsa_err *err) {
    hidden_k<<<dim3((unsigned)((hidden + THREADS - 1) / THREADS), (unsigned)m), THREADS, 0, s>>>(to, hidden,
                                                                                                 cycle);
    LSA_LAUNCHED("synthetic hidden vectors");
}
