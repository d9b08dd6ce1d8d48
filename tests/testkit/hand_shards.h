/* Hand-made shards for tests of the trainer: five documents whose votes and masses are drawn at random and
 * kept here, so that a test can recompute what training must see without the code under test. Chunk 5 is
 * golden nearly everywhere. */
#ifndef LSA_TESTS_TESTKIT_HAND_SHARDS_H
#define LSA_TESTS_TESTKIT_HAND_SHARDS_H

#include <stdbool.h>
#include <stdint.h>

enum { HAND_LAYERS = 2, HAND_HIDDEN = 8, HAND_DOCS = 5, HAND_LONGEST = 700 };
extern const int64_t hand_tokens[HAND_DOCS]; /* the third is shorter than any window */

/* Position of each document's first row, for the next hand_shards: 0 unless a test sets it. */
extern int64_t hand_first[HAND_DOCS];

/* Masses of these tokens of one document are 8 times as large in the next hand_shards: none unless a test
 * sets it. Votes stay. */
extern struct hand_plant { int64_t doc, begin, end; } hand_plant;

/* Two shards in a fresh folder. A hidden vector says which document, layer and row it is; so do the first
 * bytes of a key. Fails the running cmocka test on any error. */
void hand_shards(const char *dir, int32_t hidden_stride);

/* Largest vote of at least min_layers for chunk c by tokens [a, b), else 0; mass of the same, all layers; and
 * whether over 80 % of the document's tokens hold c golden. */
uint8_t hand_votes(int64_t doc, int64_t a, int64_t b, int64_t c, int64_t min_layers);
double hand_mass(int64_t doc, int64_t a, int64_t b, int64_t c);
/* The same of each token's mass to this power. */
double hand_power(int64_t doc, int64_t a, int64_t b, int64_t c, double power);
bool hand_trivial(int64_t doc, int64_t c, int64_t min_layers);

#endif
