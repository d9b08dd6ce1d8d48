/* Command lines over glibc's argp: one table of subcommands per program, one table of options per subcommand.
 * Wrong flags end the process with exit code 2 and a pointer to --help; --help and --version work everywhere.
 * Programs only. */
#ifndef LSA_KERNELS_CORE_CLI_H
#define LSA_KERNELS_CORE_CLI_H

#include <stdint.h>

#include "kernels/core/lsa_status.h"

typedef enum lsa_opt_type {
    LSA_OPT_FLAG,
    LSA_OPT_STR,
    LSA_OPT_I64,
    LSA_OPT_F64,
    LSA_OPT_SIZE,
    LSA_OPT_MULTI
} lsa_opt_type;

#define LSA_MULTI_MAX 64
typedef struct lsa_multi { /* an option that may be given several times */
    const char *v[LSA_MULTI_MAX];
    int n;
} lsa_multi;

/* dst: bool*, const char**, int64_t*, double*, int64_t* (bytes; suffixes K, M, G are powers of 1024),
 * lsa_multi*. The value before parsing is the default. Ends with {0}. */
typedef struct lsa_opt {
    const char *name; /* long name without -- */
    const char *arg;  /* shown in --help; NULL for flags */
    lsa_opt_type type;
    void *dst;
    const char *help;
} lsa_opt;

/* Parses argv of one subcommand. Exactly n_pos positional arguments are required; args_doc names them
 * ("SHARDS"). */
void lsa_cli_parse(const char *summary, const char *args_doc, const lsa_opt *opts, int argc, char **argv,
                   const char **pos, int n_pos);

typedef struct lsa_subcommand {
    const char *name, *summary;
    lsa_status (*run)(int argc, char **argv, lsa_err *err);
} lsa_subcommand;

/* The whole main(): dispatch, print an error once, return the exit code. Ends with {0}. */
int lsa_cli_main(const char *program, const char *about, const lsa_subcommand *subs, int argc, char **argv);

#endif
