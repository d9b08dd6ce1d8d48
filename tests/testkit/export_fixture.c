/* See export_fixture.h. */
#include "tests/testkit/export_fixture.h"

#include <stdio.h>
#include <stdlib.h>

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
    static const char *const ensemble[] = {"sum", "mean", "max"};
    static const double target[] = {0.05, 0.1, 0.2};
    json_t *layers = json_array(), *all = json_object();
    for (int32_t l = 0; l < g->n_layer; l++)
        json_array_append_new(layers, json_pack("{s:i, s:f, s:f}", "ordinal", g->ord[l].v, "temperature",
                                                1 + 0.5 * l, "offset", 0.125 * l));
    for (int s = 0; s < 3; s++) {
        json_t *a = json_array();
        for (int i = 0; i < 3; i++) {
            json_t *t = json_array();
            for (int k = 0; k < 3; k++)
                json_array_append_new(t, json_real((1 - 0.2 * i + 0.1 * k) * (s == 0 ? 10 : 0.8)));
            json_array_append_new(a, json_pack("{s:f, s:o}", "target", target[i], "threshold", t));
        }
        json_object_set_new(all, ensemble[s], json_pack("{s:o}", "budget", a));
    }
    return json_pack("{s:s, s:o, s:[i, i, i], s:o}", "format", "lsa-calibration/1", "layers", layers, "knots",
                     256, 1024, 4096, "ensembles", all);
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
