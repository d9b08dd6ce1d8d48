/* A sink into memory: see memory_sink.h. */
#include "tests/testkit/memory_sink.h"

#include <stdlib.h>
#include <string.h>

static lsa_status put(void *user, const void *data, size_t n_bytes, lsa_err *err) {
    lsa_memory *m = user;
    (void)err;
    m->data = realloc(m->data, m->n + n_bytes);
    if (!m->data) abort();
    memcpy(m->data + m->n, data, n_bytes);
    m->n += n_bytes;
    return LSA_OK;
}

lsa_sink lsa_sink_memory(lsa_memory *m) {
    return (lsa_sink){put, m, 0};
}
