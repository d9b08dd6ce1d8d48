/* Launch variables: see launch.h. The mistake that would stay silent: taking a rank from one launcher's
 * variables and the size from another's, or starting as four separate trainings of one rank each. */
#include "kernels/comm/launch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct names {
    const char *by, *rank, *size, *local;
    bool mpi;
} names;

/* In order of trust. PMIX_RANK comes last of MPI's: Open MPI sets it too. */
static const names TABLE[] = {
    {"mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", true},
    {"mpiexec (PMI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", true},
    {"srun with PMIx", "PMIX_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", true},
};
static const names TORCH = {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", false};
static const names SLURM = {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", false};

static lsa_status number(int *out, const char *name, const char *text, lsa_err *err) {
    char *end;
    errno = 0;
    const long v = strtol(text, &end, 10);
    if (errno || end == text || *end || v < 0 || v > 1 << 20)
        LSA_RET_FAIL(LSA_E_ARG, "%s='%.40s' is not a rank or a number of ranks", name, text);
    *out = (int)v;
    return LSA_OK;
}

/* *found: both rank and size are set. */
static lsa_status read_one(lsa_launch *o, bool *found, const names *n, const char *(*get)(const char *),
                           lsa_err *err) {
    lsa_status st = LSA_OK;
    const char *rank = get(n->rank), *size = get(n->size), *local = get(n->local);
    *found = rank && size;
    if (!*found) return LSA_OK;
    *o = (lsa_launch){.local_rank = -1, .mpi = n->mpi, .by = n->by};
    LSA_TRY(number(&o->rank, n->rank, rank, err));
    LSA_TRY(number(&o->size, n->size, size, err));
    if (local) LSA_TRY(number(&o->local_rank, n->local, local, err));
    if (o->size < 1 || o->rank >= o->size)
        LSA_FAIL(LSA_E_ARG, "%s=%d and %s=%d: the rank must be in [0, %d]", n->rank, o->rank, n->size,
                 o->size, o->size - 1);
done:
    return st;
}

/* A launcher's rank without its size would start as a run of one rank, once for every process. The other way
 * round is no mistake: every Slurm step has a size. */
static lsa_status half_mpi(const char *(*get)(const char *), lsa_err *err) {
    for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE; i++) {
        const names *const n = &TABLE[i];
        if (get(n->rank) && !get(n->size))
            LSA_RET_FAIL(
                LSA_E_ARG,
                "%s is set but %s is not: the variables of %s are incomplete; hand on its whole environment, or unset %s",
                n->rank, n->size, n->by, n->rank);
    }
    return LSA_OK;
}

/* torchrun's variables without the rank or the size. They matter only where nobody else says how many ranks
 * there are, or says another number: a lone WORLD_SIZE is what scripts export for other trainers. */
static lsa_status half_torch(const lsa_launch *o, bool found, const char *(*get)(const char *),
                             lsa_err *err) {
    lsa_status st = LSA_OK;
    const char *const rank = get(TORCH.rank), *const size = get(TORCH.size);
    int n = 1;
    if (rank && !size && get("MASTER_ADDR"))
        LSA_FAIL(LSA_E_ARG,
                 "RANK and MASTER_ADDR are set but WORLD_SIZE is not: start all ranks with one launcher");
    if (!size || rank) goto done;
    LSA_TRY(number(&n, TORCH.size, size, err));
    if (found && n != o->size)
        LSA_FAIL(LSA_E_ARG, "WORLD_SIZE=%d, but %s started %d rank%s: unset WORLD_SIZE or make them equal", n,
                 o->by, o->size, o->size > 1 ? "s" : "");
    if (!found && n != 1)
        LSA_FAIL(
            LSA_E_ARG,
            "WORLD_SIZE=%d is set but RANK is not, and no MPI launcher started this process: for %d ranks use 'mpirun -n %d' or "
            "'srun --mpi=pmix -n %d', for one rank unset WORLD_SIZE",
            n, n, n, n);
done:
    return st;
}

lsa_status lsa_launch_read(lsa_launch *out, const char *(*get)(const char *name), lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_launch torch;
    bool found = false, has_torch;
    *out = (lsa_launch){.size = 1, .local_rank = -1, .by = "no launcher"};
    for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE && !found; i++)
        LSA_TRY(read_one(out, &found, &TABLE[i], get, err));
    LSA_TRY(read_one(&torch, &has_torch, &TORCH, get, err));
    LSA_TRY(half_torch(out, found, get, err));
    if (has_torch && found && (torch.rank != out->rank || torch.size != out->size))
        LSA_FAIL(
            LSA_E_ARG,
            "%s says rank %d of %d, but RANK=%d and WORLD_SIZE=%d: unset those that another launcher left",
            out->by, out->rank, out->size, torch.rank, torch.size);
    if (has_torch && found && torch.local_rank >= 0) {
        if (out->local_rank >= 0 && out->local_rank != torch.local_rank)
            LSA_FAIL(LSA_E_ARG, "%s says local rank %d, but LOCAL_RANK=%d: unset it", out->by,
                     out->local_rank, torch.local_rank);
        out->local_rank = torch.local_rank;
    }
    if (found) goto done;
    LSA_TRY(half_mpi(get, err));
    if (has_torch) {
        *out = torch;
        goto done;
    }
    if (get("SLURM_STEP_ID")) LSA_TRY(read_one(out, &found, &SLURM, get, err));
    if (!found) *out = (lsa_launch){.size = 1, .local_rank = -1, .by = "no launcher"};
done:
    return st;
}
