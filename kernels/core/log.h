/* What programs say while they run: levelled lines on stderr and one progress line.
 *
 * On a terminal the progress line is redrawn in place; otherwise a plain line is printed at most every few
 * seconds. Only programs and long-running drivers log; small library functions report through lsa_err. */
#ifndef LSA_KERNELS_CORE_LOG_H
#define LSA_KERNELS_CORE_LOG_H

#include <stdbool.h>

#include "kernels/core/lsa_status.h"

typedef enum lsa_log_level { LSA_LOG_QUIET = 0, LSA_LOG_WARN, LSA_LOG_INFO, LSA_LOG_DEBUG } lsa_log_level;

void lsa_log_set_level(lsa_log_level level); /* default INFO; call before threads start */
void lsa_info(const char *fmt, ...) LSA_PRINTF(1, 2);
void lsa_warn(const char *fmt, ...) LSA_PRINTF(1, 2);
void lsa_debug(const char *fmt, ...) LSA_PRINTF(1, 2);

/* Progress: `done` of `total` units (total 0 = unknown), a rate and an ETA. `extra` may be NULL. */
typedef struct lsa_progress {
    const char *what, *unit;
    double total, t0, shown, first;
    bool tty, open;
} lsa_progress;
void lsa_progress_begin(lsa_progress *p, const char *what, const char *unit, double total,
                        double already_done);
void lsa_progress_update(lsa_progress *p, double done, const char *extra);
void lsa_progress_end(lsa_progress *p);

/* Prints "<program>: error: <message>" and returns the exit code. */
int lsa_report_error(const char *program, const lsa_err *err);

/* SIGINT, SIGTERM and SIGUSR1 set a flag that long loops read; a second signal exits at once. */
void lsa_stop_install(void);
bool lsa_stop_requested(void);

#endif
