/* The collectives of kernels/comm on one process and, by running itself under mpirun, on 2, 3 and 4: sums
 * against a brute-force sum of every term in shard order, bit for bit; agreement; and a rank whose work
 * stands still while its process is alive. Started by mpirun (a case name as argument) this program is a
 * rank. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/comm/comm.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"
#include "kernels/core/rng.h"
#include "kernels/core/version.h"

enum { N = 30011, SHARDS = 12, DEADLINE_S = 2 };

static const char *g_program;

static const char *variable(const char *name) {
    return getenv(name);
}

/* ---- a rank ---- */

/* Terms of very different size, so that another order of addition gives other bits. */
static void term(float *x, int shard) {
    lsa_rng r = lsa_rng_make(77, (uint64_t)shard);
    for (int i = 0; i < N; i++) x[i] = ldexpf(lsa_rng_uniform(&r) - 0.5f, (int)lsa_rng_below(&r, 60) - 30);
}

#define NEED(x)                                                                                              \
    do {                                                                                                     \
        if (!(x)) {                                                                                          \
            fprintf(stderr, "rank %d: not so: %s (line %d)\n", lsa_comm_rank(c), #x, __LINE__);              \
            return LSA_E_BUG;                                                                                \
        }                                                                                                    \
    } while (0)

static lsa_status sums(lsa_comm *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int size = lsa_comm_size(c), rank = lsa_comm_rank(c), share = SHARDS / size;
    float *part[SHARDS], *want, *got, *one;
    int64_t begin[SHARDS + 1];
    double *sum;
    NEED(SHARDS % size == 0);
    NEED(lsa_comm_local_rank(c) == rank); /* one host here */
    LSA_TRY(lsa_comm_check(c, err));
    for (int r = 0; r <= size; r++)
        begin[r] = (int64_t)N * r * r / (size * size); /* uneven; the first may be empty */
    LSA_TRY(LSA_NEW(want, N, err));
    LSA_TRY(LSA_NEW(got, N, err));
    LSA_TRY(LSA_NEW(one, N, err));
    LSA_TRY(LSA_NEW(sum, N, err));
    for (int s = 0; s < SHARDS; s++) {
        term(one, s);
        for (int i = 0; i < N; i++) sum[i] += (double)one[i];
    }
    for (int i = 0; i < N; i++) want[i] = (float)sum[i];
    for (int p = 0; p < share; p++) {
        LSA_TRY(LSA_NEW(part[p], N, err));
        term(part[p], rank * share + p);
    }
    LSA_TRY(lsa_comm_reduce_scatter(c, part, share, begin, got, err));
    for (int64_t i = begin[rank]; i < begin[rank + 1]; i++) NEED(got[i] == want[i]);
    LSA_TRY(lsa_comm_gather_f32(c, got + begin[rank], rank == 0 ? one : NULL, begin, err));
    LSA_TRY(lsa_comm_all_gather_f32(c, got, begin, err));
    NEED(!memcmp(got, want, N * sizeof *got));
    NEED(rank > 0 || !memcmp(one, want, N * sizeof *one));

    int64_t mine[2] = {rank, 10 * rank}, all[2 * SHARDS];
    LSA_TRY(lsa_comm_all_gather(c, mine, all, sizeof mine, err));
    for (int r = 0; r < size; r++) NEED(all[2 * r] == r && all[2 * r + 1] == 10 * r);
    term(one, rank);
    LSA_TRY(lsa_comm_broadcast(c, one, N * (int64_t)sizeof *one, err));
    term(want, 0);
    NEED(!memcmp(one, want, N * sizeof *one));
    bool flag = rank == size - 1;
    LSA_TRY(lsa_comm_any(c, &flag, err));
    NEED(flag);
    flag = false;
    LSA_TRY(lsa_comm_any(c, &flag, err));
    NEED(!flag);
    LSA_TRY(lsa_comm_agree(c, "the number", 7, LSA_E_CONFIG, err));
    for (int p = 0; p < share; p++) lsa_free(part[p]);
    lsa_free(want), lsa_free(got), lsa_free(one), lsa_free(sum);
done:
    return st;
}

static void sleep_s(double s) {
    const struct timespec t = {(time_t)s, (long)(1e9 * (s - floor(s)))};
    nanosleep(&t, NULL);
}

static lsa_status rank_work(lsa_comm *c, const char *what, lsa_err *err) {
    const int rank = lsa_comm_rank(c);
    if (!strcmp(what, "sums")) return sums(c, err);
    if (!strcmp(what, "differ")) return lsa_comm_agree(c, "the thing", rank == 2 ? 1 : 0, LSA_E_CONFIG, err);
    if (!strcmp(what, "fails") && rank == 1) LSA_RET_FAIL(LSA_E_NOSPC, "cannot write: the disk is full");
    if (!strcmp(what, "hangs") && rank == 1) { /* alive, but its work stands still */
        lsa_comm_tick(c, "testing");
        sleep_s(60);
    }
    if (!strcmp(what, "slow") && rank == 1)
        for (int i = 0; i < 3 * DEADLINE_S; i++) { /* moves, and comes late */
            lsa_comm_tick(c, "testing");
            sleep_s(1);
        }
    if (!strcmp(what, "busy") &&
        rank == 0) { /* does not look at the others for long: is told by the watcher */
        for (int i = 0; i < 60; i++) {
            lsa_comm_tick(c, "testing");
            sleep_s(1);
        }
    }
    if (!strcmp(what, "busy") && rank == 1) _exit(0);
    return lsa_comm_barrier(c, err);
}

static void stuck(const lsa_err *err) {
    _exit(lsa_report_error("comm", err));
}

static int be_a_rank(const char *ranks, const char *what) {
    lsa_comm_opts o = {.ranks = ranks, .deadline_s = DEADLINE_S, .stuck = stuck};
    lsa_comm *c = NULL;
    lsa_err err = {0};
    lsa_status st = lsa_launch_read(&o.launch, variable, &err);
    if (st == LSA_OK) st = lsa_comm_open(&c, &o, &err);
    if (st == LSA_OK) st = rank_work(c, what, &err);
    lsa_comm_close(c, st, &err);
    return st == LSA_OK ? 0 : lsa_report_error("comm", &err);
}

/* ---- the tests ---- */

typedef struct outcome {
    int code;
    double seconds;
    char text[8192];
} outcome;

static bool g_file; /* ranks meet through a file, started by a shell */

static outcome launch(int n, const char *what) {
    outcome o = {0};
    char cmd[512];
    struct timespec a, b;
    if (g_file) {
        snprintf(
            cmd, sizeof cmd,
            "f=$(mktemp -u /tmp/lsa-meet-XXXXXX); export OMP_NUM_THREADS=1 WORLD_SIZE=%d; rc=0; pids=; "
            "for r in $(seq 0 %d); do RANK=$r timeout 60 '%s' %s file:$f 2>&1 & pids=\"$pids $!\"; done; "
            "for p in $pids; do wait $p; c=$?; [ $c = 0 ] || rc=$c; done; rm -f $f; exit $rc",
            n, n - 1, g_program, what);
        goto run;
    }
    if (strstr(lsa_version_text(), "MPI      OFF") || system("command -v mpirun >/dev/null") != 0) {
        puts("skipped: this build or machine has no MPI");
        skip();
    }
    snprintf(
        cmd, sizeof cmd,
        "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 timeout 60 mpirun --oversubscribe -n %d "
        "'%s' %s 2>&1",
        n, g_program, what);
run:
    clock_gettime(CLOCK_MONOTONIC, &a);
    FILE *f = popen(cmd, "r");
    assert_non_null(f);
    const size_t k = fread(o.text, 1, sizeof o.text - 1, f);
    o.text[k] = 0;
    o.code = WEXITSTATUS(pclose(f));
    clock_gettime(CLOCK_MONOTONIC, &b);
    o.seconds = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
    return o;
}
static void expect(int n, const char *what, int code, const char *text, double within_s) {
    const outcome o = launch(n, what);
    if (o.code != code || !strstr(o.text, text) || !(o.seconds <= within_s))
        fail_msg("%s on %d ranks: exit %d (expected %d) after %.1f s (at most %.0f), '%s' expected in:\n%s",
                 what, n, o.code, code, o.seconds, within_s, text, o.text);
}

static void test_one_process(void **state) {
    (void)state;
    lsa_comm *c = NULL;
    lsa_err err = {0};
    const lsa_comm_opts o = {.ranks = "auto", .deadline_s = 20, .launch = {.size = 1, .by = "nobody"}};
    assert_int_equal(lsa_comm_open(&c, &o, &err), LSA_OK);
    assert_int_equal(lsa_comm_size(c), 1);
    if (sums(c, &err) != LSA_OK) fail_msg("%s", err.msg);
    lsa_comm_close(c, LSA_OK, NULL);
}

static void test_refusals(void **state) {
    (void)state;
    lsa_comm *c = NULL;
    lsa_err err = {0};
    lsa_comm_opts o = {.ranks = "auto", .deadline_s = 20, .launch = {.size = 2, .rank = 1, .by = "torchrun"}};
    assert_int_equal(lsa_comm_open(&c, &o, &err), LSA_E_ARG);
    assert_non_null(strstr(err.msg, "torchrun started 2 processes"));
    o.ranks = "some";
    err = (lsa_err){0};
    assert_int_equal(lsa_comm_open(&c, &o, &err), LSA_E_ARG);
    o.ranks = "self";
    o.deadline_s = (double)NAN;
    err = (lsa_err){0};
    assert_int_equal(lsa_comm_open(&c, &o, &err), LSA_E_ARG);
}

static void test_sums(void **state) {
    (void)state;
    for (int n = 2; n <= 4; n++) expect(n, "sums", 0, "", 30);
}
static void test_differ(void **state) {
    (void)state;
    expect(4, "differ", 2, "the thing of rank 2 differs", 30);
}
static void test_failing_rank(void **state) {
    (void)state; /* everyone leaves with its code and says who it was */
    expect(3, "fails", 4, "failed: cannot write: the disk is full", 30);
}
static void test_hanging_rank(void **state) {
    (void)state;
    expect(3, "hangs", 1, "rank 1 (process", 3 * DEADLINE_S + 5);
    expect(3, "hangs", 1, "hangs: the others have waited", 3 * DEADLINE_S + 5);
}
static void test_slow_rank(void **state) {
    (void)state;
    expect(3, "slow", 0, "is slow: the others have waited", 30);
}
/* The watching thread speaks before the launcher, which ends the job too, kills the rest. */
static void test_busy_rank_is_told(void **state) {
    (void)state;
    expect(2, "busy", 1, "rank 1 (process", 15);
}

static void over_file(void **state, void (*test)(void **)) {
    g_file = true;
    test(state);
    g_file = false;
}
static void test_file_sums(void **state) {
    over_file(state, test_sums);
}
static void test_file_differ(void **state) {
    over_file(state, test_differ);
}
static void test_file_failing_rank(void **state) {
    over_file(state, test_failing_rank);
}
static void test_file_hanging_rank(void **state) {
    over_file(state, test_hanging_rank);
}
static void test_file_busy_rank(void **state) {
    over_file(state, test_busy_rank_is_told);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_process),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_differ),
        cmocka_unit_test(test_failing_rank),
        cmocka_unit_test(test_hanging_rank),
        cmocka_unit_test(test_slow_rank),
        cmocka_unit_test(test_busy_rank_is_told),
        cmocka_unit_test(test_file_sums),
        cmocka_unit_test(test_file_differ),
        cmocka_unit_test(test_file_failing_rank),
        cmocka_unit_test(test_file_hanging_rank),
        cmocka_unit_test(test_file_busy_rank),
    };
    if (argc > 2 && getenv("RANK")) return be_a_rank(argv[2], argv[1]);
    if (argc > 1 && getenv("OMPI_COMM_WORLD_RANK")) return be_a_rank("auto", argv[1]);
    g_program = argv[0];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
