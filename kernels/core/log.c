/* Logging, progress and the stop flag: the only process-wide state of lsa, and all of it belongs to programs.
 */
#include "kernels/core/log.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kernels/core/clock.h"

static lsa_log_level g_level = LSA_LOG_INFO;
static bool g_line_open; /* a progress line stands on the terminal */

void lsa_log_set_level(lsa_log_level level) {
    g_level = level;
}

LSA_PRINTF(3, 0)
static void say(lsa_log_level level, const char *tag, const char *fmt, va_list ap) {
    if (level > g_level) return;
    char line[2048];
    vsnprintf(line, sizeof line, fmt, ap);
    fprintf(stderr, "%s%s%s\n", g_line_open ? "\r\033[K" : "", tag, line);
    g_line_open = false;
}

void lsa_info(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    say(LSA_LOG_INFO, "", fmt, ap);
    va_end(ap);
}

void lsa_warn(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    say(LSA_LOG_WARN, "warning: ", fmt, ap);
    va_end(ap);
}

void lsa_debug(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    say(LSA_LOG_DEBUG, "", fmt, ap);
    va_end(ap);
}

void lsa_progress_begin(lsa_progress *p, const char *what, const char *unit, double total,
                        double already_done) {
    memset(p, 0, sizeof *p);
    p->what = what;
    p->unit = unit;
    p->total = total;
    p->first = already_done;
    p->t0 = lsa_now_s();
    p->shown = p->t0;
    p->tty = isatty(STDERR_FILENO) == 1;
}

void lsa_progress_update(lsa_progress *p, double done, const char *extra) {
    double now = lsa_now_s();
    bool last = p->total > 0 && done >= p->total;
    if (g_level < LSA_LOG_INFO || (!last && now - p->shown < (p->tty ? 0.2 : 5.0))) return;
    p->shown = now;
    double rate = (done - p->first) / (now - p->t0 + 1e-9);
    char line[256], eta[64] = "";
    if (p->total > 0 && rate > 0) snprintf(eta, sizeof eta, ", %.0f s left", (p->total - done) / rate);
    if (p->total > 0)
        snprintf(line, sizeof line, "%s %.0f/%.0f %s (%.1f %%), %.4g %s/s%s%s%s", p->what, done, p->total,
                 p->unit, 100.0 * done / p->total, rate, p->unit, eta, extra ? ", " : "", extra ? extra : "");
    else
        snprintf(line, sizeof line, "%s %.0f %s, %.4g %s/s%s%s", p->what, done, p->unit, rate, p->unit,
                 extra ? ", " : "", extra ? extra : "");
    if (p->tty) {
        fprintf(stderr, "\r\033[K%s", line);
        fflush(stderr);
        g_line_open = true;
    } else {
        fprintf(stderr, "%s\n", line);
    }
    p->open = true;
}

void lsa_progress_end(lsa_progress *p) {
    if (p->tty && g_line_open) fprintf(stderr, "\n");
    g_line_open = false;
    p->open = false;
}

int lsa_report_error(const char *program, const lsa_err *err) {
    fprintf(stderr, "%s%s: %s: %s\n", g_line_open ? "\n" : "", program,
            err->code == LSA_E_INTERRUPTED ? "interrupted" : "error",
            err->msg[0] ? err->msg : lsa_status_name(err->code));
    g_line_open = false;
    return lsa_exit_code(err->code);
}

static volatile sig_atomic_t g_stop;

static void on_signal(int sig) {
    if (g_stop) _exit(128 + sig);
    g_stop = 1;
}

void lsa_stop_install(void) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = on_signal;
    sigaction(SIGINT, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
    sigaction(SIGUSR1, &a, NULL); /* which mpirun hands on to its ranks */
    signal(SIGXFSZ, SIG_IGN);     /* a file-size limit must arrive as EFBIG, not as death */
    signal(SIGPIPE, SIG_IGN);
}

bool lsa_stop_requested(void) {
    return g_stop != 0;
}
