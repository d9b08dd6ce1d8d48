/* Fixtures: see fixture.h. */
#include <setjmp.h>
#include <stdbool.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "tests/testkit/fixture.h"

lsa_st *lsa_fixture_open(const char *path) {
    lsa_st *s = NULL;
    lsa_err err = {0};
    if (lsa_st_open(&s, path, &err) != LSA_OK) fail_msg("%s", err.msg);
    return s;
}

static void *get(const lsa_st *s, lsa_dtype dtype, int64_t *n, const char *name, bool must) {
    const lsa_st_tensor *t = lsa_st_find(s, name);
    if (!t && !must) return NULL;
    if (!t) fail_msg("the fixture has no tensor '%s'", name);
    if (t->dtype != dtype) fail_msg("fixture tensor '%s' is %s", name, lsa_dtype_name(t->dtype));
    void *p = malloc(t->n_bytes + 1);
    if (!p) fail_msg("out of memory");
    memcpy(p, t->data, t->n_bytes);
    if (n) *n = t->n_elem;
    return p;
}

#define NAME(name)                                                                                           \
    char name[128];                                                                                          \
    va_list ap;                                                                                              \
    va_start(ap, fmt);                                                                                       \
    vsnprintf(name, sizeof name, fmt, ap);                                                                   \
    va_end(ap)

void *lsa_fixture_get(const lsa_st *s, lsa_dtype dtype, int64_t *n, const char *fmt, ...) {
    NAME(name);
    return get(s, dtype, n, name, true);
}
void *lsa_fixture_find(const lsa_st *s, lsa_dtype dtype, int64_t *n, const char *fmt, ...) {
    NAME(name);
    return get(s, dtype, n, name, false);
}
