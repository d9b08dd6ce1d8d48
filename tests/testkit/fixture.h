/* Reading committed fixtures (small safetensors made by an oracle). For tests only: what is missing or has
 * another type fails the running test with its name. */
#ifndef LSA_TESTS_TESTKIT_FIXTURE_H
#define LSA_TESTS_TESTKIT_FIXTURE_H

#include "data/lsa_safetensors.h"

lsa_st *lsa_fixture_open(const char *path); /* relative to the source folder, where tests run */

/* An aligned copy of the tensor `fmt...`, to be freed; *n receives its elements unless NULL. */
void *lsa_fixture_get(const lsa_st *s, lsa_dtype dtype, int64_t *n, const char *fmt, ...) LSA_PRINTF(4, 5);
/* The same, or NULL if the fixture has no such tensor. */
void *lsa_fixture_find(const lsa_st *s, lsa_dtype dtype, int64_t *n, const char *fmt, ...) LSA_PRINTF(4, 5);

#endif
