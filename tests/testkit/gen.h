/* Test inputs from fixed seeds, and guarded buffers on a backend. For tests only: failures print and abort
 * the test program.
 *
 * A rig runs one op call: host arrays go into backend memory between guard zones of 0xA5, outputs start as
 * NaN, and lsa_rig_close copies outputs back and checks that guards and inputs still hold what they held. */
#ifndef LSA_TESTS_TESTKIT_GEN_H
#define LSA_TESTS_TESTKIT_GEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/core/rng.h"
#include "kernels/ctx.h"

/* ---- numbers ---- */
float lsa_gen_normal(lsa_rng *r);
/* x[n] normal with standard deviation s. */
void lsa_gen_fill(float *x, int64_t n, float s, lsa_rng *r);
int64_t lsa_gen_range(lsa_rng *r, int64_t lo, int64_t hi); /* in [lo, hi] */
/* keys [n, 132]: normal rows through the codec; every 17th row is all zeros. */
void lsa_gen_keys(uint8_t *keys, int64_t n, lsa_rng *r);
/* Zeroed host memory; never NULL. */
void *lsa_gen_alloc(int64_t n, size_t size);
#define LSA_GEN_NEW(T, n) ((T *)lsa_gen_alloc((int64_t)(n), sizeof(T)))

/* ---- backends ---- */
/* The backend under test: LSA_BACKEND (cpu by default, cuda, cuda:N, ref). */
const char *lsa_gen_backend(void);
bool lsa_gen_on_gpu(void);
/* One context per device string, kept for the life of the program. A missing GPU ends the program with 77. */
lsa_ctx *lsa_gen_ctx(const char *device);

typedef struct lsa_rig {
    lsa_ctx *ctx;
    int n, shift; /* shift: bytes every buffer is moved from 256-byte alignment (0, or 4 to provoke
                     misalignment) */
    struct lsa_rig_box {
        const void *in; /* host data that must stay as it is, or NULL */
        void *out;      /* host destination, or NULL */
        size_t bytes;
        unsigned char *raw; /* backend memory with guards */
    } box[24];
} lsa_rig;

void lsa_rig_open(lsa_rig *r, const char *device, int shift);
const void *lsa_rig_in(lsa_rig *r, const void *host, int64_t n, size_t size); /* NULL stays NULL */
void *lsa_rig_out(lsa_rig *r, void *host, int64_t n, size_t size);            /* filled with NaN */
void *lsa_rig_inout(lsa_rig *r, void *host, int64_t n, size_t size);
void lsa_rig_close(lsa_rig *r);

#endif
