/* Growing text: see page.h. A failure is sticky and seen at the end, so that drawing code stays readable. */
#include "kernels/core/page.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void lsa_page_say(page *p, const char *fmt, ...) {
    char buf[4096];
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(buf, sizeof buf, fmt, ap);
    va_end(ap);
    if (n < 0 || n >= (int)sizeof buf || LSA_VEC_RESERVE(p->s, p->s.len + n, NULL) != LSA_OK) {
        p->failed = true;
        return;
    }
    memcpy(p->s.data + p->s.len, buf, (size_t)n);
    p->s.len += n;
}

void lsa_page_escaped(page *p, const char *text) {
    for (; text && *text; text++) {
        switch (*text) {
        case '<':
            lsa_page_say(p, "&lt;");
            break;
        case '>':
            lsa_page_say(p, "&gt;");
            break;
        case '&':
            lsa_page_say(p, "&amp;");
            break;
        case '"':
            lsa_page_say(p, "&quot;");
            break;
        default:
            lsa_page_say(p, "%c", *text);
        }
    }
}
