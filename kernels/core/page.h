/* A growing text, for HTML, SVG and Markdown. */
#ifndef LSA_KERNELS_CORE_PAGE_H
#define LSA_KERNELS_CORE_PAGE_H

#include <stdbool.h>

#include "kernels/core/lsa_status.h"
#include "kernels/core/mem.h"

typedef struct page {
    LSA_VEC(char) s;
    bool failed; /* out of memory, or one piece longer than the buffer: checked once at the end */
} page;

void lsa_page_say(page *p, const char *fmt, ...) LSA_PRINTF(2, 3);
void lsa_page_escaped(page *p,
                      const char *text); /* for content from outside: names and paths; NULL is empty */

#endif
