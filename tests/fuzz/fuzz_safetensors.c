/* Safetensors: no header may make a tensor point outside the file. Every byte of every tensor is read. */
#include <stdint.h>
#include <stdlib.h>

#include "data/lsa_safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    lsa_st *s = NULL;
    lsa_err err = {0};
    if (lsa_st_open_memory(&s, data, n, "fuzz", &err) != LSA_OK) return 0;
    unsigned sum = 0;
    for (int64_t i = 0; i < lsa_st_count(s); i++) {
        const lsa_st_tensor *t = lsa_st_at(s, i);
        for (size_t k = 0; k < t->n_bytes; k++) sum += ((const uint8_t *)t->data)[k];
        if (t->n_elem > (int64_t)(2 * n)) abort(); /* two elements a byte at most */
        float *f = malloc((size_t)(t->n_elem + 1) * sizeof *f);
        if (f && lsa_st_to_f32(f, t, &err) == LSA_OK) sum += t->n_elem > 0 && f[0] > 0;
        free(f);
        if (lsa_st_find(s, t->name) != t) abort();
    }
    lsa_st_close(s);
    return sum == 0x7fffffff;
}
