/* What the windows of a batch have observed when they are decided, as in decoding: a window's masses count
 * only on chunks that were resident in it, which is what the model itself, with the weights of now, would
 * have kept. Training on the masses of full attention instead teaches a model to lean on what it will not
 * see. */
#ifndef LSA_TRAINER_OBSERVER_H
#define LSA_TRAINER_OBSERVER_H

#include "trainer/batch.h"

/* The state of one request between its windows; zero it first. */
typedef struct lsa_observer {
    int64_t doc, next; /* the state is that before the window of document `doc` that starts at token `next` */
    int64_t room;
    float *recent, *memory; /* [room] masses */
    float *score, *scratch; /* [room] work */
    int32_t *sel;
} lsa_observer;
void lsa_observer_fini(lsa_observer *o);

typedef struct lsa_observe_args {
    const float *z;  /* logits of chunk c of row i in layer l: z[l * stride + i * b->n + c] */
    int32_t n_layer; /* layers to add up: 1 if z is the sum already */
    int64_t stride;
    double budget; /* of the evictable chunks that stay resident */
    const float *weight, *cost;
    int32_t reach;
} lsa_observe_args;

/* Fills b->recent and b->memory row by row. A row whose window follows the state's goes on from it; any other
 * begins as the first window after a prompt does, with all that full attention gave the chunks before. o
 * NULL: rows go on from the rows before them only. The chunks of the tail (those behind a row's candidates)
 * are always resident. */
LSA_NODISCARD lsa_status lsa_observe(lsa_observer *o, const lsa_batch *b, const lsa_observe_args *a,
                                     lsa_err *err);

#endif
