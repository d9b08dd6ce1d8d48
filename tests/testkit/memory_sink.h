/* For tests: a sink into growing memory. Failures end the test program. */
#ifndef LSA_TESTS_TESTKIT_MEMORY_SINK_H
#define LSA_TESTS_TESTKIT_MEMORY_SINK_H

#include "data/sink.h"

typedef struct lsa_memory {
    unsigned char *data; /* free() it */
    size_t n;
} lsa_memory;

lsa_sink lsa_sink_memory(lsa_memory *m);

#endif
