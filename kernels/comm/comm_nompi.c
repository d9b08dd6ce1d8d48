/* Stands in for comm_mpi.c in builds without MPI, so that callers need no #ifdef. */
#include "kernels/comm/table.h"

lsa_status lsa_comm_mpi_open(lsa_comm *c, lsa_err *err) {
    (void)c;
    LSA_RET_FAIL(
        LSA_E_UNSUPPORTED,
        "several ranks were asked for, but this build has no MPI; install libopenmpi-dev and configure with -DLSA_MPI=ON");
}
