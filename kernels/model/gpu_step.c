/* The part of the GPU step that needs no GPU. */
#include "kernels/model/gpu_step.h"

#include "kernels/core/num.h"

void lsa_gpu_doc_layout(lsa_gpu_doc *d, int32_t n_layer, int64_t hidden) {
    struct {
        int64_t *field, bytes;
    } part[] = {{&d->key, n_layer * d->n_key * 128},
                {&d->scale, n_layer * d->n_key * 4},
                {&d->hidden, n_layer * d->n_hidden * hidden * 2},
                {&d->window, d->n_window * (int64_t)sizeof(lsa_gpu_window)},
                {&d->need_begin, (d->n_window + 1) * 8},
                {&d->chunk, d->n_need * 4},
                {&d->weight, d->n_need * 4},
                {&d->mass, d->n_need * 4}};
    int64_t at = 0;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        *part[i].field = at;
        at += lsa_align_up(part[i].bytes, 256);
    }
    d->bytes = at;
}
