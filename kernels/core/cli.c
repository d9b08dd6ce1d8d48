/* Command lines: see cli.h. */
#include "kernels/core/cli.h"

#include <argp.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/log.h"
#include "kernels/core/version.h"

#define MAX_OPTS 48
#define KEY0     256

typedef struct parse_state {
    const lsa_opt *opts;
    const char **pos;
    int n_pos, seen;
} parse_state;

static void set_number(struct argp_state *st, const lsa_opt *o, const char *arg) {
    char *end;
    errno = 0;
    if (o->type == LSA_OPT_F64) {
        double v = strtod(arg, &end);
        if (errno || end == arg || *end) argp_error(st, "--%s needs a number, not '%s'", o->name, arg);
        *(double *)o->dst = v;
        return;
    }
    long long v = strtoll(arg, &end, 10);
    int shift = 0;
    if (o->type == LSA_OPT_SIZE && *end) {
        const char *p = strchr("KMG", *end);
        if (p && *p) {
            shift = 10 * (int)(p - "KMG" + 1);
            end++;
        }
    }
    if (errno || end == arg || *end || v > (INT64_MAX >> shift) || (o->type == LSA_OPT_SIZE && v < 1))
        argp_error(st, "--%s needs %s, not '%s'", o->name,
                   o->type == LSA_OPT_SIZE ? "a size such as 16M" : "an integer", arg);
    *(int64_t *)o->dst = (int64_t)((uint64_t)v << shift);
}

static error_t on_option(int key, char *arg, struct argp_state *st) {
    parse_state *p = st->input;
    if (key >= KEY0 && key < KEY0 + MAX_OPTS) {
        const lsa_opt *o = &p->opts[key - KEY0];
        switch (o->type) {
        case LSA_OPT_FLAG:
            *(bool *)o->dst = true;
            break;
        case LSA_OPT_STR:
            *(const char **)o->dst = arg;
            break;
        case LSA_OPT_MULTI: {
            lsa_multi *m = o->dst;
            if (m->n == LSA_MULTI_MAX)
                argp_error(st, "--%s may be given at most %d times", o->name, LSA_MULTI_MAX);
            m->v[m->n++] = arg;
            break;
        }
        case LSA_OPT_I64:
        case LSA_OPT_F64:
        case LSA_OPT_SIZE:
            set_number(st, o, arg);
            break;
        }
        return 0;
    }
    if (key == ARGP_KEY_ARG) {
        if (p->seen >= p->n_pos) argp_error(st, "unexpected argument '%s'", arg);
        p->pos[p->seen++] = arg;
        return 0;
    }
    if (key == ARGP_KEY_END) {
        if (p->seen < p->n_pos) argp_error(st, "missing argument");
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

void lsa_cli_parse(const char *summary, const char *args_doc, const lsa_opt *opts, int argc, char **argv,
                   const char **pos, int n_pos) {
    struct argp_option a[MAX_OPTS + 1] = {{0}};
    for (int i = 0; opts[i].name && i < MAX_OPTS; i++) {
        a[i].name = opts[i].name;
        a[i].key = KEY0 + i;
        a[i].arg = opts[i].arg;
        a[i].doc = opts[i].help;
    }
    parse_state p = {opts, pos, n_pos, 0};
    const struct argp argp = {a, on_option, args_doc, summary, NULL, NULL, NULL};
    argp_parse(&argp, argc, argv, 0, NULL, &p);
}

static void print_usage(FILE *f, const char *program, const char *about, const lsa_subcommand *subs) {
    fprintf(f, "%s: %s\n\nUsage: %s COMMAND [OPTIONS...]\n\nCommands:\n", program, about, program);
    for (int i = 0; subs[i].name; i++) fprintf(f, "  %-10s %s\n", subs[i].name, subs[i].summary);
    fprintf(f,
            "\n%s COMMAND --help lists the options of a command; %s --version says what this build can do.\n",
            program, program);
}

int lsa_cli_main(const char *program, const char *about, const lsa_subcommand *subs, int argc, char **argv) {
    static char name[96];
    argp_err_exit_status = 2;
    argp_program_version = lsa_version_text();
    lsa_stop_install();
    if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "-?")) {
        print_usage(argc < 2 ? stderr : stdout, program, about, subs);
        return argc < 2 ? 2 : 0;
    }
    if (!strcmp(argv[1], "--version") || !strcmp(argv[1], "-V")) {
        puts(lsa_version_text());
        return 0;
    }
    for (int i = 0; subs[i].name; i++) {
        if (strcmp(argv[1], subs[i].name)) continue;
        snprintf(name, sizeof name, "%s %s", program, subs[i].name);
        argv[1] = name;
        lsa_err err = {0};
        lsa_status st = subs[i].run(argc - 1, argv + 1, &err);
        if (fflush(stdout) != 0 && st == LSA_OK)
            st = lsa_err_set(&err, LSA_E_IO, __FILE__, __LINE__, "cannot write to standard output");
        if (st == LSA_OK) return 0;
        if (err.code == LSA_OK) err.code = st;
        return lsa_report_error(name, &err);
    }
    fprintf(stderr, "%s: unknown command '%s'\n\n", program, argv[1]);
    print_usage(stderr, program, about, subs);
    return 2;
}
