/* TensorBoard event files: scalars only, written by hand (one record type; no library needed). */
#ifndef LSA_TRAINER_TBOARD_H
#define LSA_TRAINER_TBOARD_H

#include <stdint.h>
#include <stdio.h>

#include "kernels/core/lsa_status.h"

typedef struct lsa_tboard {
    FILE *f;
} lsa_tboard;

/* Opens dir/events.out.tfevents.<seconds>.lsa; dir is made. */
LSA_NODISCARD lsa_status lsa_tboard_open(lsa_tboard *t, const char *dir, lsa_err *err);
/* One scalar; flushed, so a running job can be watched. Failures are reported at close. */
void lsa_tboard_scalar(lsa_tboard *t, const char *tag, int64_t step, double value);
void lsa_tboard_close(lsa_tboard *t);

#endif
