/* The chance that a chunk is golden from its logit: sigmoid(z / temperature + offset), by maximum likelihood.
 * Pure, thread-safe. Source: Platt, Probabilistic outputs for support vector machines, 1999 (two-parameter
 * logistic regression; here plain likelihood, by Newton's method). */
#ifndef LSA_TRAINER_PLATT_H
#define LSA_TRAINER_PLATT_H

#include <stdint.h>

#include "kernels/core/lsa_status.h"

typedef struct lsa_platt {
    float temperature, offset;
    const char
        *identity; /* NULL: fitted. Else why it was not, and temperature is 1, offset 0 (static text) */
} lsa_platt;

/* n points: logit z[i], seen golden[i] times with a golden chunk and other[i] times with another. Without
 * golden or other chunks, with classes that a limit on z separates (the likelihood then has no maximum), and
 * where the chance does not rise with z, nothing is fitted: identity says so. LSA_E_NUMERIC: a NaN or
 * infinity. */
LSA_NODISCARD lsa_status lsa_platt_fit(lsa_platt *out, const double *z, const int64_t *golden,
                                       const int64_t *other, int64_t n, lsa_err *err);

#endif
