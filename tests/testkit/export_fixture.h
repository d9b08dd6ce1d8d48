/* A small exported indexer on disk, for tests of what loads it. For tests only: failures print and abort. */
#ifndef LSA_TESTS_TESTKIT_EXPORT_FIXTURE_H
#define LSA_TESTS_TESTKIT_EXPORT_FIXTURE_H

#include <stdbool.h>

#include "data/indexer_file.h"

/* Geometry of the fixture: 3 layers (ordinals 0, 2, 3), hidden 48, 8 heads, rank 16. */
void lsa_fixture_geom(lsa_indexer_geom *g);
/* Makes the folder `dir` (a mkdtemp template, filled in) with indexer.safetensors from the seed; tau 64, tail
 * 256, ensemble mean. calibrated: at 256, 1024 and 4096 chunks; the threshold of
 * target i (of lsa_calib_target), knot k, ensemble s is (1 - 0.2 i + 0.1 k) * (s == SUM ? 10 : 0.8). */
void lsa_fixture_export(char *dir, uint64_t seed, bool calibrated);

#endif
