/* The indexer's scores and their gradient on the CPU. Internal to kernels/cpu; formulas in ops.h. */
#ifndef LSA_KERNELS_CPU_SCORE_H
#define LSA_KERNELS_CPU_SCORE_H

#include "kernels/ops.h"

LSA_NODISCARD lsa_status lsa_cpu_score_fwd(const lsa_indexer_score_fwd_args *a, lsa_err *err);
LSA_NODISCARD lsa_status lsa_cpu_score_bwd(const lsa_indexer_score_bwd_args *a, lsa_err *err);

#endif
