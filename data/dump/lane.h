/* A thread that handles items one after the other, in the order they were given, while others are being made:
 * the steps of a dump after the GPU. Items weigh bytes; who gives them asks for room first. An item's failure
 * ends the lane: later items are only dropped, and every call gives the first error. */
#ifndef LSA_DATA_DUMP_LANE_H
#define LSA_DATA_DUMP_LANE_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

typedef struct lsa_lane lsa_lane;

/* handle: on the lane's thread; drop: frees an item, also after it was handled. limit: bytes at a time. */
LSA_NODISCARD lsa_status lsa_lane_create(lsa_lane **out, const char *name, int64_t limit,
                                         lsa_status (*handle)(void *user, void *item, lsa_err *err),
                                         void (*drop)(void *item), void *user, lsa_err *err);
/* Waits for what was given, unless the lane failed or `abandon`; NULL allowed. */
LSA_NODISCARD lsa_status lsa_lane_finish(lsa_lane *l, bool abandon, lsa_err *err);
void lsa_lane_destroy(lsa_lane *l); /* abandons; NULL allowed */

/* Reserves bytes if they fit, or if nothing else is there. */
bool lsa_lane_try(lsa_lane *l, int64_t bytes);
LSA_NODISCARD lsa_status lsa_lane_reserve(lsa_lane *l, int64_t bytes, lsa_err *err); /* waits for it */
/* An item for which `bytes` were reserved. Never waits. On failure the item is dropped. */
LSA_NODISCARD lsa_status lsa_lane_give(lsa_lane *l, void *item, int64_t bytes, lsa_err *err);
double lsa_lane_seconds(lsa_lane *l); /* spent in handle */

#endif
