/* What must hold for any folder given to lsa_idx_open, however damaged: it is refused with a message, or it
 * loads and its logits and selections are sound. Shared by the fuzz target and the test of seeded damage. */
#ifndef LSA_TESTS_TESTKIT_JUDGE_EXPORT_H
#define LSA_TESTS_TESTKIT_JUDGE_EXPORT_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "export/abi/lsa_indexer.h"

enum { LSA_JUDGE_CHUNKS = 70 };

/* 0: refused, 1: loaded and sound, -1: neither; `text` (LSA_IDX_ERROR bytes) says what or why. */
static inline int lsa_judge_export(const char *dir, int32_t path, char *text) {
    static const lsa_idx_rule rule[] = {{LSA_IDX_TOPK, LSA_IDX_EXPORTED, 9, 0, 0, 0, 1, 2},
                                        {LSA_IDX_CALIBRATED, LSA_IDX_EXPORTED, 0, 0, 0.1, 0, 1, 2}};
    const lsa_idx_options o = {"cpu", path, 1, LSA_JUDGE_CHUNKS};
    lsa_idx *x = NULL;
    const int code = lsa_idx_open(&x, LSA_IDX_ABI, dir, &o, text);
    if (code != LSA_IDX_OK) {
        if (x || !text[0] || code == LSA_IDX_E_BUG) return -1;
        return 0;
    }
    lsa_idx_info i;
    lsa_idx_get_info(x, &i);
    uint16_t *hidden = calloc((size_t)i.hidden, sizeof *hidden);
    uint8_t *key = calloc(LSA_JUDGE_CHUNKS, 132);
    float *z = calloc((size_t)i.n_layer * LSA_JUDGE_CHUNKS, sizeof *z);
    const int64_t position = 4 * LSA_JUDGE_CHUNKS, n = LSA_JUDGE_CHUNKS;
    const lsa_idx_keys k = {key, NULL, n};
    const float scale = 0.01f;
    int verdict = 1;
    if (!hidden || !key || !z) abort();
    for (int32_t c = 0; c < i.hidden; c++) hidden[c] = (uint16_t)(0x3f00 + c % 128 + (c % 3 ? 0x8000 : 0));
    for (int c = 0; c < LSA_JUDGE_CHUNKS; c++) {
        for (int b = 0; b < 128; b++)
            key[c * 132 + b] = (uint8_t)((c * 7 + b * 5) % 0x7f + (b % 2 ? 0x80 : 0));
        memcpy(key + c * 132 + 128, &scale, 4);
    }
    for (int32_t l = 0; l < i.n_layer && verdict == 1; l++) {
        float *row = z + (int64_t)l * LSA_JUDGE_CHUNKS;
        if (lsa_idx_query(x, l, 1, hidden, &position, NULL, text) != LSA_IDX_OK ||
            lsa_idx_score(x, l, 1, &k, row, n, NULL, text) != LSA_IDX_OK)
            verdict = -1;
        for (int c = 0; c < LSA_JUDGE_CHUNKS && verdict == 1; c++)
            if (!isfinite(row[c])) {
                snprintf(text, LSA_IDX_ERROR, "layer %d, chunk %d: logit %g", l, c, (double)row[c]);
                verdict = -1;
            }
    }
    for (int r = 0; r < 2 && verdict == 1; r++) {
        int32_t id[LSA_JUDGE_CHUNKS], n_id = -1;
        const int got = lsa_idx_select(x, 1, &rule[r], z, n, &n, id, n, &n_id, NULL, text);
        if (got == LSA_IDX_E_CONFIG && r == 1 && text[0]) continue; /* no such budget */
        if (got != LSA_IDX_OK || n_id < 3 || (r == 0 && n_id != 12) || id[0] != 0 || id[n_id - 1] != n - 1)
            verdict = -1;
    }
    free(hidden), free(key), free(z);
    lsa_idx_close(x);
    return verdict;
}

#endif
