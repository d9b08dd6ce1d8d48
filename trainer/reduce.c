/* Reduction of gradients: see reduce.h. The mistake that would stay silent: a sum whose order or grouping
 * follows the number of ranks, so that the same recipe trains a slightly different model on other machines.
 */
#include "trainer/reduce.h"

#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"

typedef struct bucket {
    int32_t layer;
    int64_t first; /* of its elements, in the layer */
    int64_t *cut;  /* [size+1] slices, in the layer */
} bucket;

struct lsa_reduce {
    lsa_comm *comm;
    int rank, size, n_part;
    bool sharded;
    int64_t n_layer, per_layer; /* parameters of a layer */
    int64_t n_extra;            /* behind all layers: one bucket of "layer" n_layer */
    float **part;               /* [n_part] [per_layer] */
    bucket *bucket;
    lsa_slice *slice;
    int64_t n_bucket, owned, most_pieces; /* most_pieces: of any rank */
    double *mine, *all;                   /* [n_part + most_pieces], and of every rank */
};

static int64_t pieces(int64_t n) {
    return lsa_ceil_div(n, LSA_REDUCE_PIECE);
}

static lsa_status make_buckets(lsa_reduce *x, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t each = lsa_ceil_div(x->per_layer, LSA_REDUCE_BUCKET);
    int64_t *count = NULL;
    const int64_t n_bucket = x->n_layer * each + (x->n_extra > 0);
    LSA_TRY(LSA_NEW(x->bucket, n_bucket, err));
    LSA_TRY(LSA_NEW(x->slice, n_bucket, err));
    LSA_TRY(LSA_NEW(count, x->size, err));
    for (int64_t i = 0; i < n_bucket; i++) {
        bucket *const b = &x->bucket[i];
        b->layer = (int32_t)(i / each);
        b->first = i % each * LSA_REDUCE_BUCKET;
        const int64_t all = b->layer < x->n_layer ? x->per_layer : x->n_extra,
                      n = lsa_min_i64(LSA_REDUCE_BUCKET, all - b->first);
        LSA_TRY(LSA_NEW(b->cut, x->size + 1, err));
        x->n_bucket++;
        for (int r = 0; r <= x->size; r++)
            b->cut[r] = b->first + lsa_min_i64(n, pieces(n) * r / x->size * LSA_REDUCE_PIECE);
        for (int r = 0; r < x->size; r++) count[r] += pieces(b->cut[r + 1] - b->cut[r]);
        const int64_t base = b->layer * x->per_layer;
        x->slice[i] = (lsa_slice){base + b->cut[x->rank], base + b->cut[x->rank + 1], x->owned};
        x->owned += x->slice[i].end - x->slice[i].begin;
    }
    for (int r = 0; r < x->size; r++) x->most_pieces = lsa_max_i64(x->most_pieces, count[r]);
done:
    lsa_free(count);
    return st;
}

lsa_status lsa_reduce_create(lsa_reduce **out, lsa_comm *comm, const lsa_indexer_geom *g, int n_part,
                             bool sharded, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_reduce *x = NULL;
    *out = NULL;
    LSA_TRY(LSA_NEW(x, 1, err));
    x->comm = comm;
    x->rank = lsa_comm_rank(comm);
    x->size = lsa_comm_size(comm);
    x->n_part = n_part;
    x->sharded = sharded;
    x->n_layer = g->n_layer;
    x->per_layer = lsa_indexer_layer_params(g);
    x->n_extra = lsa_indexer_n_extra(g);
    LSA_TRY(lsa_alloc_((void **)&x->part, n_part, sizeof *x->part, "gradients", err));
    for (int p = 0; p < n_part; p++)
        LSA_TRY(LSA_NEW(x->part[p], lsa_max_i64(x->per_layer, LSA_MAX_EXTRA), err));
    LSA_TRY(make_buckets(x, err));
    LSA_TRY(LSA_NEW(x->mine, n_part + x->most_pieces, err));
    LSA_TRY(LSA_NEW(x->all, x->size * (n_part + x->most_pieces), err));
    *out = x;
    x = NULL;
done:
    lsa_reduce_destroy(x);
    return st;
}

void lsa_reduce_destroy(lsa_reduce *x) {
    if (!x) return;
    for (int p = 0; x->part && p < x->n_part; p++) lsa_free(x->part[p]);
    for (int64_t i = 0; i < x->n_bucket; i++) lsa_free(x->bucket[i].cut);
    void *p[] = {x->part, x->bucket, x->slice, x->mine, x->all, x};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
}

float *lsa_reduce_part(lsa_reduce *x, int p) {
    return x->part[p];
}
int64_t lsa_reduce_slices(const lsa_reduce *x, const lsa_slice **s) {
    *s = x->slice;
    return x->n_bucket;
}
int64_t lsa_reduce_owned(const lsa_reduce *x) {
    return x->owned;
}

lsa_status lsa_reduce_layer(lsa_reduce *x, int32_t layer, float *grad, lsa_err *err) {
    lsa_status st = LSA_OK;
    float *const to = grad + layer * x->per_layer;
    for (int64_t i = 0; i < x->n_bucket; i++) {
        const bucket *const b = &x->bucket[i];
        if (b->layer != layer) continue;
        LSA_TRY(lsa_comm_reduce_scatter(x->comm, x->part, x->n_part, b->cut, to, err));
        if (!x->sharded) LSA_TRY(lsa_comm_all_gather_f32(x->comm, to, b->cut, err));
    }
done:
    return st;
}

static double sum_of_squares(const float *x, int64_t n) {
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)x[i];
    return s;
}

lsa_status lsa_reduce_totals(double *sumsq, double *total_loss, lsa_reduce *x, const float *grad,
                             const double *loss, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int64_t block = x->n_part + x->most_pieces;
    int64_t k = x->n_part, *next = NULL;
    *sumsq = *total_loss = 0;
    memcpy(x->mine, loss, (size_t)x->n_part * sizeof *loss);
    for (int64_t i = 0; i < x->n_bucket; i++) {
        const lsa_slice *const s = &x->slice[i];
        const int64_t n = pieces(s->end - s->begin);
#pragma omp parallel for schedule(static)
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = s->begin + j * LSA_REDUCE_PIECE;
            x->mine[k + j] = sum_of_squares(grad + at, lsa_min_i64(LSA_REDUCE_PIECE, s->end - at));
        }
        k += n;
    }
    LSA_TRY(lsa_comm_all_gather(x->comm, x->mine, x->all, block * (int64_t)sizeof *x->all, err));
    LSA_TRY(LSA_NEW(next, x->size, err));
    for (int r = 0; r < x->size; r++) {
        for (int p = 0; p < x->n_part; p++) *total_loss += x->all[r * block + p];
        next[r] = r * block + x->n_part;
    }
    /* NUMERIC: the pieces in the order of the parameters, whoever summed them */
    for (int64_t i = 0; i < x->n_bucket; i++)
        for (int r = 0; r < x->size; r++)
            for (int64_t j = pieces(x->bucket[i].cut[r + 1] - x->bucket[i].cut[r]); j > 0; j--)
                *sumsq += x->all[next[r]++];
done:
    lsa_free(next);
    return st;
}

lsa_status lsa_reduce_share(lsa_reduce *x, float *params, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int64_t i = 0; i < x->n_bucket; i++) {
        const bucket *const b = &x->bucket[i];
        LSA_TRY(lsa_comm_all_gather_f32(x->comm, params + b->layer * x->per_layer, b->cut, err));
    }
done:
    return st;
}

lsa_status lsa_reduce_collect(lsa_reduce *x, const float *owned, float *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (int64_t i = 0; i < x->n_bucket; i++) {
        const bucket *const b = &x->bucket[i];
        LSA_TRY(lsa_comm_gather_f32(x->comm, owned + x->slice[i].at,
                                    out ? out + b->layer * x->per_layer : NULL, b->cut, err));
    }
done:
    return st;
}
