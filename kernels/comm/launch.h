/* Who started this process, and as which of how many: read from the variables that mpirun, srun and torchrun
 * set. Pure; the program passes its environment. */
#ifndef LSA_KERNELS_COMM_LAUNCH_H
#define LSA_KERNELS_COMM_LAUNCH_H

#include <stdbool.h>

#include "kernels/core/lsa_status.h"

typedef struct lsa_launch {
    int rank, size;
    int local_rank; /* among the ranks of this host: which GPU to take; -1 unknown */
    bool mpi;       /* an MPI launcher: MPI_Init will find the others */
    const char *by; /* "mpirun", "srun --mpi=pmix", ..., static */
} lsa_launch;

/* get: value of a variable or NULL. LSA_E_ARG if variables are incomplete (a rank without its size;
 * WORLD_SIZE above 1 without a rank), out of range or contradict each other. Slurm's own numbers are used
 * only beside PMIx's: mpirun inside a Slurm job hands its daemons' on. */
LSA_NODISCARD lsa_status lsa_launch_read(lsa_launch *out, const char *(*get)(const char *name), lsa_err *err);

#endif
