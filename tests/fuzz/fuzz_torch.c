/* torch.save archives and the pickles in them: the same bytes as the one and as the other. */
#include <stdint.h>
#include <stdlib.h>

#include "data/pickle.h"
#include "data/torch_file.h"
#include "kernels/core/mem.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void whole(const uint8_t *data, size_t n) {
    lsa_torch *t = NULL;
    lsa_err err = {0};
    unsigned sum = 0;
    if (lsa_torch_open_memory(&t, data, n, "fuzz", &err) != LSA_OK) return;
    for (int64_t i = 0; i < lsa_torch_count(t); i++) {
        const lsa_st_tensor *x = lsa_torch_at(t, i);
        for (size_t k = 0; k < x->n_bytes; k++) sum += ((const uint8_t *)x->data)[k];
        if (x->n_bytes > n) abort();
        float *f = malloc((size_t)(x->n_elem + 1) * sizeof *f);
        if (f && lsa_torch_to_f32(f, t, x, &err) == LSA_OK) sum += x->n_elem > 0 && f[0] > 0;
        free(f);
        if (lsa_torch_find(t, x->name) != x) abort();
    }
    size_t n_note;
    const char *note = lsa_torch_note(t, &n_note);
    for (size_t k = 0; k < n_note; k++) sum += (unsigned char)note[k];
    lsa_torch_close(t);
    if (sum == 0x7fffffff) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    lsa_pickle_tensor *t = NULL;
    int64_t k;
    lsa_err err = {0};
    whole(data, n);
    if (lsa_pickle_tensors(&t, &k, data, n, "fuzz", &err) == LSA_OK)
        for (int64_t i = 0; i < k; i++)
            if (t[i].offset < 0 || t[i].n_elem < 0 || t[i].offset + t[i].n_elem > t[i].storage_n) abort();
    lsa_free(t);
    return 0;
}
