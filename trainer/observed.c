/* Observed masses: see observed.h. The mistake that would stay silent: a window that sees its own masses,
 * which are what it has to predict (tests/unit/test_prior.c plants some). */
#include "trainer/observed.h"

#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "kernels/prior.h"

void lsa_observed_fini(lsa_observed *o) {
    lsa_free(o->begin);
    lsa_free(o->chunk);
    lsa_free(o->mass);
    memset(o, 0, sizeof *o);
}

int64_t lsa_observed_bytes(const lsa_observed *o) {
    return o->begin ? (o->n_window + 1) * 8 + o->begin[o->n_window] * 8 : 0;
}

/* sum[chunk] of rows [a, b), layer after layer in row order. */
static void add_rows(float *sum, const lsa_csr *native, int32_t n_csa, int64_t a, int64_t b) {
    for (int32_t l = 0; l < n_csa; l++)
        for (int64_t j = native[l].begin[a]; j < native[l].begin[b]; j++)
            sum[native[l].chunk[j]] += lsa_f16_to_f32(native[l].mass[j]);
}

/* Entries of the windows, counted (o->chunk NULL) or written. sum [n_key] is scratch, left at 0. */
static void walk(lsa_observed *o, const lsa_csr *native, int32_t n_csa, int64_t first, int64_t n_row,
                 int64_t n_key, float *sum) {
    for (int64_t k = 0, n = 0; k < o->n_window; k++) {
        const int64_t a = lsa_max_i64(k * o->tau - first, 0),
                      b = lsa_min_i64((k + 1) * o->tau - first, n_row);
        if (a < b) add_rows(sum, native, n_csa, a, b);
        for (int64_t c = 0; a < b && c < n_key; c++) {
            if (!(sum[c] > 0.0f)) continue;
            if (o->chunk) {
                o->chunk[n] = (int32_t)c;
                o->mass[n] = sum[c] / ((float)n_csa * (float)(b - a));
            }
            n++;
            sum[c] = 0;
        }
        o->begin[k + 1] = n;
    }
}

lsa_status lsa_observed_build(lsa_observed *o, const lsa_csr *native, int32_t n_csa, int64_t first,
                              int64_t n_row, int64_t n_key, int64_t tau, lsa_err *err) {
    lsa_status st = LSA_OK;
    float *sum = NULL;
    *o = (lsa_observed){.tau = tau, .n_key = n_key, .n_window = lsa_ceil_div(first + n_row, tau)};
    LSA_TRY(LSA_NEW(sum, n_key, err));
    LSA_TRY(LSA_NEW(o->begin, o->n_window + 1, err));
    walk(o, native, n_csa, first, n_row, n_key, sum);
    LSA_TRY(LSA_NEW(o->chunk, o->begin[o->n_window], err));
    LSA_TRY(LSA_NEW(o->mass, o->begin[o->n_window], err));
    walk(o, native, n_csa, first, n_row, n_key, sum);
done:
    lsa_free(sum);
    if (st != LSA_OK) lsa_observed_fini(o);
    return st;
}

void lsa_observed_masses(float *recent, float *memory, const lsa_observed *o, int64_t start) {
    const int64_t last = lsa_min_i64(start / o->tau, o->n_window) - 1; /* the window just decoded */
    float weight[LSA_PRIOR_WINDOWS] = {1.0f};
    memset(recent, 0, (size_t)o->n_key * sizeof *recent);
    memset(memory, 0, (size_t)o->n_key * sizeof *memory);
    for (int i = 1; i < LSA_PRIOR_WINDOWS; i++) weight[i] = weight[i - 1] * LSA_PRIOR_DECAY;
    for (int64_t k = lsa_max_i64(0, last - LSA_PRIOR_WINDOWS); k <= last; k++)
        for (int64_t j = o->begin[k]; j < o->begin[k + 1]; j++) {
            const int32_t c = o->chunk[j];
            if (k == last)
                recent[c] = o->mass[j];
            else
                memory[c] = fmaf(weight[last - 1 - k], o->mass[j], memory[c]);
        }
}
