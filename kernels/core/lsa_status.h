/* Status codes and the caller-owned error record: the one error convention of lsa.
 *
 * Zero is success everywhere. A fallible function returns lsa_status and takes `lsa_err *err` last (NULL is
 * allowed: the code is still returned). The first failure wins: a record that already holds an error is not
 * overwritten, so clean-up code may call fallible functions freely. Libraries never print, exit or read the
 * environment; main() prints `err->msg` once and leaves with lsa_exit_code(code).
 *
 * Thread safety: a record belongs to one thread at a time; there is no global "last error". */
#ifndef LSA_STATUS_H
#define LSA_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define LSA_NODISCARD    __attribute__((warn_unused_result))
#define LSA_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define LSA_NODISCARD
#define LSA_PRINTF(a, b)
#endif

typedef enum lsa_status {
    LSA_OK = 0,
    LSA_E_ARG,         /* wrong call or command-line flag */
    LSA_E_CONFIG,      /* wrong recipe or configuration value */
    LSA_E_FORMAT,      /* a file's content is not what its format says */
    LSA_E_IO,          /* the operating system refused a read or write */
    LSA_E_NOSPC,       /* disk full, or a size limit hit */
    LSA_E_NOMEM,       /* out of host or device memory */
    LSA_E_DEVICE,      /* GPU missing or failing */
    LSA_E_COMM,        /* a collective failed */
    LSA_E_NUMERIC,     /* non-finite numbers */
    LSA_E_UNSUPPORTED, /* valid, but this build or program does not do it */
    LSA_E_INTERRUPTED, /* stopped by a signal, state saved */
    LSA_E_BUG          /* our own invariant broken */
} lsa_status;

typedef struct lsa_err {
    lsa_status code;
    int sys;          /* errno at the failure, 0 if none */
    int rank;         /* reporting rank, 0 in single-process runs */
    int line;         /* source line */
    const char *file; /* source file, static storage */
    char msg[768];    /* what failed: which object: expected, found: next action */
} lsa_err;

/* Fills *err (unless NULL or already set) and returns `code`. errno is preserved and stored in err->sys. */
lsa_status lsa_err_set(lsa_err *err, lsa_status code, const char *file, int line, const char *fmt, ...)
    LSA_PRINTF(5, 6);

/* Puts "context: " in front of an existing message; does nothing if err is NULL or holds no error. */
void lsa_err_wrap(lsa_err *err, const char *fmt, ...) LSA_PRINTF(2, 3);

/* Code for a failed system call: ENOSPC, EDQUOT and EFBIG give LSA_E_NOSPC, ENOMEM LSA_E_NOMEM, else
 * LSA_E_IO. */
lsa_status lsa_status_from_errno(int sys);

/* Process exit code: 0 done, 1 failed, 2 wrong flag or recipe, 3 bad file, 4 resource, 5 interrupted with
 * state saved, 6 non-finite numbers, 70 our bug. */
int lsa_exit_code(lsa_status code);

const char *lsa_status_name(lsa_status code);

/* Both need a local `lsa_status st = LSA_OK;`, an `lsa_err *err` and a label `done:`. */
#define LSA_TRY(expr)                                                                                        \
    do {                                                                                                     \
        st = (expr);                                                                                         \
        if (st != LSA_OK) goto done;                                                                         \
    } while (0)
#define LSA_FAIL(code, ...)                                                                                  \
    do {                                                                                                     \
        st = lsa_err_set(err, (code), __FILE__, __LINE__, __VA_ARGS__);                                      \
        goto done;                                                                                           \
    } while (0)
/* The same where nothing needs releasing. */
#define LSA_RET_FAIL(code, ...) return lsa_err_set(err, (code), __FILE__, __LINE__, __VA_ARGS__)

#ifdef __cplusplus
}
#endif
#endif
