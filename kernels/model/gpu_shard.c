/* Slices of parameters: see gpu_shard.h. */
#include "kernels/model/gpu_shard.h"

static bool divides(const lsa_indexer_geom *g, int size) {
    for (int p = 0; p < LSA_INDEXER_PARTS; p++)
        if (p != LSA_Q_NORM && lsa_indexer_tensor_at(g, 0, (lsa_indexer_part)p).n % (4 * (int64_t)size))
            return false;
    return true;
}

lsa_status lsa_gpu_shard_make(lsa_gpu_shard *out, const lsa_indexer_geom *g, int rank, int size,
                              lsa_err *err) {
    *out = (lsa_gpu_shard){0};
    if (!divides(g, size)) {
        int fewer = size - 1;
        while (fewer > 1 && !divides(g, fewer)) fewer--;
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "%d GPUs: the projections (hidden size %d, rank %d, %d heads) do not divide by 4 x %d; start %d ranks",
            size, g->hidden, g->rank, g->n_head, size, fewer);
    }
    for (int p = 0; p < LSA_INDEXER_PARTS; p++) {
        const lsa_indexer_tensor t = lsa_indexer_tensor_at(g, 0, (lsa_indexer_part)p);
        const bool gain = p == LSA_Q_NORM;
        const int64_t n = gain ? t.n : t.n / size;
        out->piece[out->n_piece++] = (lsa_gpu_piece){t.offset + (gain ? 0 : rank * n), n, out->own, gain};
        out->own += n;
    }
    return LSA_OK;
}
