/* Documents as blocks: see block.h. The layout is kernels/model/gpu_step.h's. */
#include "trainer/block.h"

#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "trainer/batch.h"

void lsa_block_fini(lsa_block *b) {
    lsa_gpu_host_free(b->data);
    memset(b, 0, sizeof *b);
}

typedef struct needs { /* of all windows */
    int64_t n, room, *begin;
    int32_t *chunk;
    float *weight, *mass;
} needs;

static void needs_fini(needs *x) {
    lsa_free(x->begin);
    lsa_free(x->chunk);
    lsa_free(x->weight);
    lsa_free(x->mass);
}

static lsa_status grow(void **p, int64_t n, int64_t room, size_t size, lsa_err *err) {
    void *q = NULL;
    lsa_status st = lsa_alloc_(&q, room, size, "windows", err);
    if (st != LSA_OK) return st;
    if (n) memcpy(q, *p, (size_t)n * size);
    lsa_free(*p);
    *p = q;
    return LSA_OK;
}

static lsa_status more(needs *x, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (x->n + n <= x->room) return LSA_OK;
    const int64_t room = lsa_max_i64(2 * x->room, x->n + n);
    LSA_TRY(grow((void **)&x->chunk, x->n, room, sizeof *x->chunk, err));
    LSA_TRY(grow((void **)&x->weight, x->n, room, sizeof *x->weight, err));
    LSA_TRY(grow((void **)&x->mass, x->n, room, sizeof *x->mass, err));
    x->room = room;
done:
    return st;
}

/* Window i: dense needs on scratch, then the entries that are not empty. */
static lsa_status window_needs(needs *x, const lsa_source *s, const lsa_recipe *r, const lsa_train_doc *d,
                               const lsa_window *w, bool eval, bool has_mass, float *mass, uint8_t *votes,
                               lsa_err *err) {
    lsa_status st = LSA_OK;
    const bool kl = r->loss == LSA_LOSS_KL && !eval;
    int64_t count = 0;
    if (!kl) lsa_window_needs(NULL, votes, s, d, w);
    if (kl) lsa_window_needs(mass, NULL, s, d, w);
    if (eval && has_mass) lsa_window_native(mass, r->sharpen, d, w);
    for (int64_t c = 0; c < w->n_cand; c++)
        count += (!kl && votes[c]) || ((kl || (eval && has_mass)) && mass[c] > 0.0f);
    LSA_TRY(more(x, count, err));
    for (int64_t c = 0; c < w->n_cand; c++) {
        const bool golden = !kl && votes[c];
        const float m = kl || (eval && has_mass) ? mass[c] : 0.0f;
        if (!golden && !(m > 0.0f)) continue;
        x->chunk[x->n] = (int32_t)c;
        x->weight[x->n] = golden ? eval ? 1.0f : lsa_positive_weight(r, d, (int32_t)c, votes[c]) : 0.0f;
        x->mass[x->n++] = m;
    }
done:
    return st;
}

lsa_status lsa_block_build(lsa_block *b, const lsa_source *s, const lsa_recipe *r, const lsa_indexer_geom *g,
                           const lsa_train_doc *d, int64_t n_window, bool eval, lsa_err *err) {
    lsa_status st = LSA_OK;
    needs x = {0};
    float *mass = NULL;
    uint8_t *votes = NULL;
    lsa_gpu_window *window = NULL;
    const bool has_mass = lsa_shards_get_info(lsa_source_shards(s))->has_stats;
    const int64_t n_key = d->info.n_key, hid = g->hidden;
    LSA_TRY(LSA_NEW(mass, n_key, err));
    LSA_TRY(LSA_NEW(votes, n_key, err));
    LSA_TRY(LSA_NEW(window, n_window, err));
    LSA_TRY(LSA_NEW(x.begin, n_window + 1, err));
    for (int64_t i = 0; i < n_window; i++) {
        lsa_window w;
        LSA_TRY(lsa_window_at(&w, s, d, i, err));
        window[i] = (lsa_gpu_window){w.query, (int32_t)w.hidden_row, (int32_t)w.n_cand};
        LSA_TRY(window_needs(&x, s, r, d, &w, eval, has_mass, mass, votes, err));
        x.begin[i + 1] = x.n;
    }
    b->doc = (lsa_gpu_doc){
        .doc = d->doc, .n_key = n_key, .n_hidden = d->info.n_hidden, .n_window = n_window, .n_need = x.n};
    lsa_gpu_doc_layout(&b->doc, g->n_layer, hid);
    if (b->doc.bytes > b->room) {
        lsa_gpu_host_free(b->data);
        b->data = NULL;
        b->room = 0;
        LSA_TRY(lsa_gpu_host_alloc(&b->data, b->doc.bytes + b->doc.bytes / 4, err));
        b->room = b->doc.bytes + b->doc.bytes / 4;
    }
    uint8_t *const out = b->data;
    for (int32_t l = 0; l < g->n_layer; l++) {
        uint8_t *const key = out + b->doc.key + l * n_key * 128, *const scale =
                                                                     out + b->doc.scale + l * n_key * 4;
        for (int64_t k = 0; k < n_key; k++) {
            memcpy(key + k * 128, d->key[l] + k * LSA_KEY_BYTES, 128);
            memcpy(scale + k * 4, d->key[l] + k * LSA_KEY_BYTES + 128, 4);
        }
        if (d->info.n_hidden)
            memcpy(out + b->doc.hidden + l * d->info.n_hidden * hid * 2, d->hidden[l],
                   (size_t)(d->info.n_hidden * hid * 2));
    }
    if (n_window) memcpy(out + b->doc.window, window, (size_t)n_window * sizeof *window);
    memcpy(out + b->doc.need_begin, x.begin, (size_t)(n_window + 1) * sizeof *x.begin);
    if (x.n) {
        memcpy(out + b->doc.chunk, x.chunk, (size_t)x.n * sizeof *x.chunk);
        memcpy(out + b->doc.weight, x.weight, (size_t)x.n * sizeof *x.weight);
        memcpy(out + b->doc.mass, x.mass, (size_t)x.n * sizeof *x.mass);
    }
done:
    needs_fini(&x);
    lsa_free(mass);
    lsa_free(votes);
    lsa_free(window);
    return st;
}
