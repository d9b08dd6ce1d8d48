/* Recomputes sampled logits, the choice of the top k and sampled heads of layers on the host. */
#include "infer/bench_check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/model/synthetic.h"

enum { SAMPLES = 256, HEADS = 4 };

typedef struct looker {
    const lsa_gpu_batch_opts *o;
    lsa_gpu_batch_view v;
    lsa_bench_check *out;
    int32_t request, layer, ord; /* ord: -1 if not CSA */
    int32_t *order;              /* [64 n_page] */
    float *row, *q;              /* [entries, D] [D] */
    double *z, *sum;             /* [entries] [D] */
} looker;

static int64_t chunk_of(const looker *k, int64_t position) {
    return (int64_t)k->v.page[position / LSA_PAGE_CHUNKS] * LSA_PAGE_CHUNKS + position % LSA_PAGE_CHUNKS;
}

static double logit_of(const looker *k, int64_t position) {
    const uint32_t page = (uint32_t)k->v.page[position / LSA_PAGE_CHUNKS];
    const int32_t e = (int32_t)(position % LSA_PAGE_CHUNKS);
    float key[128];
    double z = 0;
    for (int32_t c = 0; c < 128; c++)
        key[c] =
            lsa_e4m3_to_f32((uint8_t)(lsa_synth_key((uint32_t)k->ord, page, e * 32 + c / 4) >> 8 * (c & 3)));
    for (int32_t h = 0; h < k->o->index_n_head; h++) {
        double dot = 0;
        for (int32_t c = 0; c < 128; c++)
            dot +=
                (double)lsa_e4m3_to_f32(lsa_synth_index_q((uint32_t)k->request, (uint32_t)h, (uint32_t)c)) *
                (double)key[c];
        if (dot > 0)
            z += (double)lsa_synth_real(LSA_SYNTH_INDEX_W, (uint32_t)k->request, (uint32_t)h, 0) * dot;
    }
    return z * (double)lsa_bits_f32(lsa_synth_key((uint32_t)k->ord, page, 2048 + e));
}

static lsa_status check_logits(looker *k, lsa_err *err) {
    const int64_t n = k->v.n_page * LSA_PAGE_CHUNKS, step = n > SAMPLES ? n / SAMPLES : 1;
    double worst = 0, square = 0;
    int64_t seen = 0;
    for (int64_t c = 0; c < n; c += step, seen++) {
        const double want = logit_of(k, c), d = fabs(want - (double)k->v.logit[c]);
        square += want * want;
        if (!(d <= worst)) worst = d; /* a NaN too */
    }
    const double off = worst / (sqrt(square / (double)seen) + 1e-30);
    if (!(off <= k->out->logit_off)) k->out->logit_off = off;
    if (!(off < 1e-2))
        LSA_RET_FAIL(LSA_E_NUMERIC,
                     "layer %d, request %d: a logit is off by %.2g of the root mean square; expected 0.01",
                     k->layer, k->request, off);
    return LSA_OK;
}

static const float *g_logit; /* of the sort below; one thread */
static int better(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    if (g_logit[x] != g_logit[y]) return g_logit[x] > g_logit[y] ? -1 : 1;
    return x < y ? -1 : x > y;
}
static int ascending(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return x < y ? -1 : x > y;
}

static lsa_status check_choice(const looker *k, lsa_err *err) {
    const int64_t n = k->v.n_page * LSA_PAGE_CHUNKS, want = n < k->o->top_k ? n : k->o->top_k;
    for (int64_t c = 0; c < n; c++) k->order[c] = (int32_t)c;
    g_logit = k->v.logit;
    qsort(k->order, (size_t)n, sizeof *k->order, better);
    qsort(k->order, (size_t)want, sizeof *k->order, ascending);
    if (k->v.n_sel[0] != want || memcmp(k->order, k->v.sel, (size_t)want * sizeof *k->order))
        LSA_RET_FAIL(LSA_E_NUMERIC, "layer %d, request %d: the selection is not the top %lld of its logits",
                     k->layer, k->request, (long long)want);
    return LSA_OK;
}

static void decode_row(float *to, lsa_synth_kind kind, int32_t layer, int64_t entry,
                       const lsa_gpu_batch_opts *o) {
    const int32_t D = o->head_dim, rope = o->rope_dim, plain = D - rope;
    for (int32_t w = 0; w < plain / 4; w++) {
        const uint32_t code = lsa_synth_row(kind, (uint32_t)layer, (uint32_t)entry, w, D, rope);
        const int32_t group = 4 * w / 64, at = plain + 2 * rope + group;
        const uint32_t scale = lsa_synth_row(kind, (uint32_t)layer, (uint32_t)entry, at / 4, D, rope);
        for (int32_t j = 0; j < 4; j++)
            to[4 * w + j] =
                lsa_e4m3_to_f32((uint8_t)(code >> 8 * j)) * lsa_e8m0_to_f32((uint8_t)(scale >> 8 * (at & 3)));
    }
    for (int32_t w = 0; w < rope / 2; w++) {
        const uint32_t v = lsa_synth_row(kind, (uint32_t)layer, (uint32_t)entry, plain / 4 + w, D, rope);
        to[plain + 2 * w] = lsa_bf16_to_f32((uint16_t)v);
        to[plain + 2 * w + 1] = lsa_bf16_to_f32((uint16_t)(v >> 16));
    }
}

static lsa_status check_outputs(looker *k, lsa_err *err) {
    const lsa_gpu_batch_opts *o = k->o;
    const int32_t D = o->head_dim, W = o->window;
    const int64_t hca = k->ord < 0 && o->ratio[k->layer] > 0 ? o->tokens / o->ratio[k->layer] : 0,
                  n = W + (k->ord >= 0 ? k->v.n_sel[0] : hca);
    double worst = 0, square = 0;
    double *const z = k->z, *const sum = k->sum;
    for (int64_t e = 0; e < n; e++) {
        if (e < W)
            decode_row(k->row + e * D, LSA_SYNTH_WINDOW, k->layer, (int64_t)k->request * W + e, o);
        else if (k->ord >= 0)
            decode_row(k->row + e * D, LSA_SYNTH_ROW, k->ord, chunk_of(k, k->v.sel[e - W]), o);
        else
            decode_row(k->row + e * D, LSA_SYNTH_HCA, k->layer, e - W, o);
    }
    for (int32_t j = 0; j < HEADS && j < o->n_head; j++) {
        const int32_t h = (int32_t)((int64_t)j * o->n_head / HEADS);
        double most = 2 * (double)lsa_synth_real(LSA_SYNTH_SINK, 0, (uint32_t)h, 0), total;
        const double sink = most;
        for (int32_t c = 0; c < D; c++)
            k->q[c] = 4 * lsa_synth_real(LSA_SYNTH_Q, (uint32_t)k->request, (uint32_t)h, (uint32_t)c);
        for (int64_t e = 0; e < n; e++) {
            double dot = 0;
            for (int32_t c = 0; c < D; c++)
                dot += 4 *
                       (double)lsa_synth_real(LSA_SYNTH_Q, (uint32_t)k->request, (uint32_t)h, (uint32_t)c) *
                       (double)k->row[e * D + c];
            z[e] = dot / sqrt((double)D);
            if (z[e] > most) most = z[e];
        }
        total = exp(sink - most);
        memset(sum, 0, (size_t)D * sizeof *sum);
        for (int64_t e = 0; e < n; e++) {
            const double p = exp(z[e] - most);
            total += p;
            for (int32_t c = 0; c < D; c++) sum[c] += p * (double)k->row[e * D + c];
        }
        for (int32_t c = 0; c < D; c++) {
            const double want = sum[c] / total, d = fabs(want - (double)k->v.out[(int64_t)h * D + c]);
            square += want * want / D / (o->n_head < HEADS ? o->n_head : HEADS);
            if (!(d <= worst)) worst = d;
        }
    }
    const double off = worst / (sqrt(square) + 1e-30);
    if (!(off <= k->out->out_off)) k->out->out_off = off;
    if (!(off < 1e-2))
        LSA_RET_FAIL(LSA_E_NUMERIC,
                     "layer %d, request %d: an output is off by %.2g of the root mean square; expected 0.01",
                     k->layer, k->request, off);
    return LSA_OK;
}

static lsa_status check_layer(looker *k, lsa_gpu_batch *b, int32_t layer, int32_t ord, lsa_err *err) {
    lsa_status st = LSA_OK;
    const lsa_gpu_batch_opts *o = k->o;
    uint64_t h[2] = {k->out->checksum, 0};
    k->layer = layer, k->ord = ord;
    LSA_TRY(lsa_gpu_batch_layer(b, layer, err));
    for (int i = 0; i < 2; i++) {
        k->request = i ? o->batch - 1 : 0;
        LSA_TRY(lsa_gpu_batch_see(b, k->request, &k->v, err));
        if (ord >= 0) {
            LSA_TRY(check_logits(k, err));
            LSA_TRY(check_choice(k, err));
            h[1] ^= lsa_xxh64(k->v.sel, (size_t)k->v.n_sel[0] * sizeof *k->v.sel);
        }
        LSA_TRY(check_outputs(k, err));
        h[1] = h[1] * 31 + lsa_xxh64(k->v.out, (size_t)o->n_head * (size_t)o->head_dim * sizeof *k->v.out);
    }
    k->out->checksum = lsa_xxh64(h, sizeof h);
done:
    return st;
}

lsa_status lsa_bench_check_batch(lsa_bench_check *out, lsa_gpu_batch *b, const lsa_gpu_batch_opts *o,
                                 lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t n_page = lsa_gpu_batch_resident(b), chunks = n_page * LSA_PAGE_CHUNKS;
    int64_t entries = o->window + o->top_k;
    int32_t ord[LSA_MAX_LAYERS], n_csa = 0, first = -1, last = -1, hca = -1, plain = -1;
    looker k = {.o = o, .out = out};
    *out = (lsa_bench_check){0};
    for (int32_t l = 0; l < o->n_layer; l++) {
        ord[l] = o->ratio[l] == LSA_CHUNK ? n_csa++ : -1;
        if (ord[l] == 0) first = l;
        if (ord[l] >= 0) last = l;
        if (o->ratio[l] > LSA_CHUNK) hca = l;
        if (o->ratio[l] == 0) plain = l;
        if (o->ratio[l] > LSA_CHUNK && o->window + o->tokens / o->ratio[l] > entries)
            entries = o->window + o->tokens / o->ratio[l];
    }
    LSA_TRY(LSA_NEW(k.v.page, n_page, err));
    LSA_TRY(LSA_NEW(k.v.logit, chunks, err));
    LSA_TRY(LSA_NEW(k.v.sel, o->top_k + 1, err));
    LSA_TRY(LSA_NEW(k.v.out, (int64_t)o->n_head * o->head_dim, err));
    LSA_TRY(LSA_NEW(k.order, chunks, err));
    LSA_TRY(LSA_NEW(k.row, entries * o->head_dim, err));
    LSA_TRY(LSA_NEW(k.q, o->head_dim, err));
    LSA_TRY(LSA_NEW(k.z, entries, err));
    LSA_TRY(LSA_NEW(k.sum, o->head_dim, err));
    k.v.n_sel = k.v.sel + o->top_k;
    const int32_t layer[] = {first, last > first ? last : -1, hca, plain};
    for (size_t j = 0; j < sizeof layer / sizeof *layer; j++)
        if (layer[j] >= 0) LSA_TRY(check_layer(&k, b, layer[j], ord[layer[j]], err));
done:
    lsa_free(k.v.page);
    lsa_free(k.v.logit);
    lsa_free(k.v.sel);
    lsa_free(k.v.out);
    lsa_free(k.order);
    lsa_free(k.row);
    lsa_free(k.q);
    lsa_free(k.z);
    lsa_free(k.sum);
    return st;
}
