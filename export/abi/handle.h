/* What a handle of the server ABI is made of. Internal to export/abi; lsa_indexer.h is the interface.
 *
 * `shared` is read-only after open and belongs to all clones (counted); everything that a call writes belongs
 * to one handle, so clones need no lock. */
#ifndef LSA_EXPORT_ABI_HANDLE_H
#define LSA_EXPORT_ABI_HANDLE_H

#include <stdatomic.h>

#include "export/abi/lsa_indexer.h"
#include "export/abi/rule.h"
#include "kernels/cpu/score.h"
#include "kernels/model/gpu_retrieve.h"
#include "kernels/model/indexer.h"
#include "kernels/model/query_path.h"

typedef struct lsa_idx_shared {
    atomic_int handles;
    lsa_ctx *ctx;
    lsa_indexer_geom geom;
    float *params; /* flat; NULL on a GPU, which has its own */
    float freq[64];
    lsa_idx_export e;
    int64_t tau, trained_length;
    lsa_query_path path;
    int32_t max_batch;
    int64_t max_chunks;
} lsa_idx_shared;

/* Queries and work memory of a CPU handle. */
typedef struct lsa_idx_host {
    float *x, *a, *u, *rstd; /* [max_batch, hidden], [max_batch, rank] twice, [max_batch] */
    float *q, *w;            /* [n_layer, max_batch, heads, 128], [n_layer, max_batch, heads] */
    float *score;            /* [max_chunks] */
    int32_t *id;             /* [max_chunks] */
    int n_work;
    lsa_score_work *work; /* [n_work] */
    int64_t bytes;
} lsa_idx_host;

struct lsa_idx {
    lsa_idx_shared *s;
    int32_t queried[LSA_MAX_CSA]; /* requests of the layer's latest query */
    lsa_idx_host host;            /* all NULL on a GPU */
    lsa_gpu_retriever *gpu;       /* NULL on the CPU */
};

LSA_NODISCARD lsa_status lsa_idx_host_init(lsa_idx_host *h, const lsa_idx_shared *s, lsa_err *err);
void lsa_idx_host_fini(lsa_idx_host *h);

/* The calls on the CPU; arguments are those of lsa_indexer.h, checked as far as both devices can. */
LSA_NODISCARD lsa_status lsa_idx_host_query(lsa_idx *x, int32_t layer, int32_t m, const uint16_t *hidden,
                                            const int64_t *position, lsa_err *err);
LSA_NODISCARD lsa_status lsa_idx_host_score(lsa_idx *x, int32_t layer, int32_t m, const lsa_idx_keys *keys,
                                            float *logit, int64_t ld, lsa_err *err);
LSA_NODISCARD lsa_status lsa_idx_host_observe(float *state, int64_t ld, int64_t n, const int32_t *chunk,
                                              const float *mass, lsa_err *err);
LSA_NODISCARD lsa_status lsa_idx_host_select(lsa_idx *x, int32_t m, const lsa_select_rule *rule,
                                             const float *logit, int64_t ld, const int64_t *n_chunk,
                                             int32_t *out, int64_t ld_out, int32_t *n_out, lsa_err *err);

#endif
