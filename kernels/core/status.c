/* Error records: see lsa_status.h. Invariant: once a record holds an error, only lsa_err_wrap changes it. */
#include "kernels/core/lsa_status.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

lsa_status lsa_err_set(lsa_err *err, lsa_status code, const char *file, int line, const char *fmt, ...) {
    int sys = errno;
    if (err && err->code == LSA_OK) {
        err->code = code;
        err->sys = sys;
        err->file = file;
        err->line = line;
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(err->msg, sizeof err->msg, fmt, ap);
        va_end(ap);
    }
    errno = sys;
    return code;
}

void lsa_err_wrap(lsa_err *err, const char *fmt, ...) {
    if (!err || err->code == LSA_OK) return;
    char old[sizeof err->msg], head[sizeof err->msg];
    memcpy(old, err->msg, sizeof old);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(head, sizeof head, fmt, ap);
    va_end(ap);
    size_t n = strlen(head);
    if (n > sizeof head - 2) n = sizeof head - 2;
    snprintf(err->msg, sizeof err->msg, "%.*s: ", (int)n, head);
    size_t used = strlen(err->msg);
    snprintf(err->msg + used, sizeof err->msg - used, "%s", old);
}

lsa_status lsa_status_from_errno(int sys) {
    switch (sys) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return LSA_E_NOSPC;
    case ENOMEM:
        return LSA_E_NOMEM;
    default:
        return LSA_E_IO;
    }
}

int lsa_exit_code(lsa_status code) {
    switch (code) {
    case LSA_OK:
        return 0;
    case LSA_E_ARG:
    case LSA_E_CONFIG:
        return 2;
    case LSA_E_FORMAT:
        return 3;
    case LSA_E_NOSPC:
    case LSA_E_NOMEM:
    case LSA_E_DEVICE:
        return 4;
    case LSA_E_INTERRUPTED:
        return 5;
    case LSA_E_NUMERIC:
        return 6;
    case LSA_E_BUG:
        return 70;
    case LSA_E_IO:
    case LSA_E_COMM:
    case LSA_E_UNSUPPORTED:
        return 1;
    }
    return 70;
}

const char *lsa_status_name(lsa_status code) {
    static const char *const names[] = {"ok",          "argument",    "config", "format", "io",
                                        "no space",    "no memory",   "device", "comm",   "numeric",
                                        "unsupported", "interrupted", "bug"};
    return (unsigned)code < sizeof names / sizeof *names ? names[code] : "unknown";
}
