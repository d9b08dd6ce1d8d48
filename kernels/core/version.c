/* Build identity. The commit and features are compile definitions of this one file. */
#include "kernels/core/version.h"

const char *lsa_version(void) {
    return LSA_VERSION;
}

const char *lsa_version_text(void) {
    return "lsa " LSA_VERSION "\ncommit   " LSA_COMMIT "\nCUDA     " LSA_FEATURE_CUDA
           "\nOpenBLAS " LSA_FEATURE_BLAS "\nHDF5     " LSA_FEATURE_HDF5 "\nMPI      " LSA_FEATURE_MPI;
}
