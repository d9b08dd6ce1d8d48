/* A document as one block of memory for the GPU: keys, hidden vectors, and what each of its windows needs. */
#ifndef LSA_TRAINER_BLOCK_H
#define LSA_TRAINER_BLOCK_H

#include "kernels/model/gpu_step.h"
#include "trainer/source.h"

typedef struct lsa_block { /* grows, never shrinks; pinned memory */
    void *data;
    int64_t room;
    lsa_gpu_doc doc;
} lsa_block;
void lsa_block_fini(lsa_block *b);

/* n_window as lsa_source_n_window says. For training: positives with their loss weight, or (kl) target mass.
 * For evaluation: golden chunks with weight 1 and native mass. Thread-safe. */
LSA_NODISCARD lsa_status lsa_block_build(lsa_block *b, const lsa_source *s, const lsa_recipe *r,
                                         const lsa_indexer_geom *g, const lsa_train_doc *d, int64_t n_window,
                                         bool eval, lsa_err *err);

#endif
