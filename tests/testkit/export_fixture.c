/* See export_fixture.h. */
#include "tests/testkit/export_fixture.h"

#include <stdio.h>
#include <stdlib.h>

#include "data/calibration.h"
#include "kernels/core/mem.h"
#include "tests/testkit/gen.h"

void lsa_fixture_geom(lsa_indexer_geom *g) {
    *g = (lsa_indexer_geom){.hidden = 48,
                            .n_head = 8,
                            .head_dim = 128,
                            .rank = 16,
                            .eps = 1e-6f,
                            .rope = {64, 160000, 16, 4096, 32, 1},
                            .n_layer = 3,
                            .ord = {{0}, {2}, {3}},
                            .id = {{2}, {6}, {8}}};
}

static json_t *calibration(const lsa_indexer_geom *g) {
    static const int64_t knot[] = {256, 1024, 4096};
    lsa_calibration *c = LSA_GEN_NEW(lsa_calibration, 1);
    json_t *o = NULL;
    snprintf(c->data_hash, sizeof c->data_hash, "%s", "0123456789abcdef");
    c->documents = c->windows = c->longest = 1;
    c->n_layer = g->n_layer;
    c->n_knot = 3;
    for (int32_t l = 0; l < g->n_layer; l++) {
        c->ord[l] = g->ord[l];
        c->temperature[l] = 1 + 0.5f * (float)l;
        c->offset[l] = 0.125f * (float)l;
    }
    for (int k = 0; k < 3; k++) c->knot[k] = knot[k];
    for (int s = 0; s < LSA_CALIB_SCORES; s++) {
        c->score[s].n = s != LSA_SCORE_SUM;
        for (int i = 0; i < LSA_CALIB_TARGETS; i++) {
            c->entry[s][i].target = lsa_calib_target[i];
            for (int k = 0; k < 3; k++)
                c->entry[s][i].threshold[k] =
                    (float)((1 - 0.2 * i + 0.1 * k) * (s == LSA_SCORE_SUM ? 10 : 0.8));
        }
    }
    if (lsa_calibration_to_json(&o, c, NULL) != LSA_OK) abort();
    lsa_free(c);
    return o;
}

void lsa_fixture_export(char *dir, uint64_t seed, bool calibrated) {
    lsa_err err = {0};
    lsa_indexer_file f = {.ensemble = LSA_ENSEMBLE_MEAN, .tau = 64, .tail = 256, .threshold = 0.5};
    lsa_fixture_geom(&f.geom);
    f.params = LSA_GEN_NEW(float, lsa_indexer_n_param(&f.geom));
    lsa_indexer_init_random(f.params, &f.geom, seed);
    for (int32_t l = 0; l < f.geom.n_layer; l++) { /* scales that are not all one */
        const lsa_indexer_tensor t = lsa_indexer_tensor_at(&f.geom, l, LSA_Q_NORM);
        for (int64_t i = 0; i < t.n; i++) f.params[t.offset + i] = 0.5f + 0.125f * (float)(i % 9);
    }
    f.train = json_pack("{s:i}", "trained_length", 16384);
    if (calibrated) f.calibration = calibration(&f.geom);
    if (!mkdtemp(dir) || lsa_indexer_file_save(&f, dir, &err) != LSA_OK) {
        fprintf(stderr, "cannot make an export in %s: %s\n", dir, err.msg);
        abort();
    }
    lsa_indexer_file_fini(&f);
}
