/* Launch variables of mpirun, srun and torchrun: rank, size and local rank, and every contradiction refused.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>

#include "kernels/comm/launch.h"

static const char *const *g_env; /* "NAME=value", ends with NULL */

static const char *get(const char *name) {
    const size_t n = strlen(name);
    for (const char *const *e = g_env; *e; e++)
        if (!strncmp(*e, name, n) && (*e)[n] == '=') return *e + n + 1;
    return NULL;
}

#define ENV(...) ((const char *const[]){__VA_ARGS__, NULL})

static void reads(const char *const *env, int rank, int size, int local, bool mpi) {
    lsa_launch l;
    lsa_err err = {0};
    g_env = env;
    if (lsa_launch_read(&l, get, &err) != LSA_OK) fail_msg("%s", err.msg);
    assert_int_equal(l.rank, rank);
    assert_int_equal(l.size, size);
    assert_int_equal(l.local_rank, local);
    assert_int_equal(l.mpi, mpi);
}
static void refuses(const char *const *env, const char *text) {
    lsa_launch l;
    lsa_err err = {0};
    g_env = env;
    assert_int_equal(lsa_launch_read(&l, get, &err), LSA_E_ARG);
    if (!strstr(err.msg, text)) fail_msg("'%s' is not in '%s'", text, err.msg);
}

static void test_launchers(void **state) {
    (void)state;
    reads(ENV("HOME=x"), 0, 1, -1, false);
    reads(ENV("OMPI_COMM_WORLD_RANK=3", "OMPI_COMM_WORLD_SIZE=4", "OMPI_COMM_WORLD_LOCAL_RANK=1",
              "PMIX_RANK=3"),
          3, 4, 1, true);
    reads(ENV("PMI_RANK=0", "PMI_SIZE=2"), 0, 2, -1, true);
    reads(ENV("PMIX_RANK=5", "SLURM_STEP_NUM_TASKS=8", "SLURM_LOCALID=1", "SLURM_PROCID=5"), 5, 8, 1, true);
    reads(ENV("RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=0", "MASTER_ADDR=h"), 1, 2, 0, false);
    reads(ENV("SLURM_STEP_ID=0", "SLURM_PROCID=1", "SLURM_STEP_NUM_TASKS=2"), 1, 2, -1, false);
    /* a batch script is no task, whatever the job's size; a single task is no several ranks */
    reads(ENV("SLURM_NTASKS=8", "SLURM_PROCID=0"), 0, 1, -1, false);
    /* mpirun inside a job hands its daemon's numbers on: they say nothing about the rank */
    reads(ENV("OMPI_COMM_WORLD_RANK=3", "OMPI_COMM_WORLD_SIZE=4", "SLURM_STEP_ID=0", "SLURM_PROCID=0",
              "SLURM_STEP_NUM_TASKS=2"),
          3, 4, -1, true);
    /* a lone WORLD_SIZE that says what the launcher says, or one rank; a RANK that is somebody else's */
    reads(ENV("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2", "WORLD_SIZE=2"), 1, 2, -1, true);
    reads(ENV("WORLD_SIZE=1"), 0, 1, -1, false);
    reads(ENV("RANK=gold"), 0, 1, -1, false);
    /* both launchers' variables, saying the same; torchrun's local rank fills in */
    reads(ENV("PMI_RANK=1", "PMI_SIZE=2", "RANK=1", "WORLD_SIZE=2", "LOCAL_RANK=1"), 1, 2, 1, true);
}

static void test_contradictions(void **state) {
    (void)state;
    refuses(ENV("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=4", "RANK=2", "WORLD_SIZE=4"), "RANK=2");
    refuses(ENV("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=4", "RANK=1", "WORLD_SIZE=2"),
            "WORLD_SIZE=2");
    refuses(ENV("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_LOCAL_RANK=1", "RANK=1",
                "WORLD_SIZE=2", "LOCAL_RANK=0"),
            "LOCAL_RANK=0");
    /* half of a launcher's variables */
    refuses(ENV("WORLD_SIZE=4"), "no MPI launcher started this process: for 4 ranks use 'mpirun -n 4'");
    refuses(ENV("WORLD_SIZE=2", "MASTER_ADDR=h"), "RANK is not");
    refuses(ENV("WORLD_SIZE=four"), "WORLD_SIZE='four'");
    refuses(ENV("RANK=1", "MASTER_ADDR=h"), "WORLD_SIZE is not");
    refuses(ENV("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2", "WORLD_SIZE=4"),
            "WORLD_SIZE=4, but mpirun");
    refuses(ENV("OMPI_COMM_WORLD_RANK=1"), "OMPI_COMM_WORLD_SIZE is not");
    refuses(ENV("PMI_RANK=1"), "PMI_SIZE is not");
    refuses(ENV("PMIX_RANK=1", "SLURM_PROCID=1"), "SLURM_STEP_NUM_TASKS is not");
    refuses(ENV("PMIX_RANK=1", "RANK=1", "WORLD_SIZE=2"), "SLURM_STEP_NUM_TASKS is not");
    refuses(ENV("PMI_RANK=2", "PMI_SIZE=2"), "[0, 1]");
    refuses(ENV("PMI_RANK=x", "PMI_SIZE=2"), "PMI_RANK='x'");
    refuses(ENV("RANK=-1", "WORLD_SIZE=2"), "RANK='-1'");
    refuses(ENV("RANK=0", "WORLD_SIZE="), "WORLD_SIZE=''");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_launchers),
        cmocka_unit_test(test_contradictions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
