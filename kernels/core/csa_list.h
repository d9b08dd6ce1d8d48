/* A list of CSA layers as users write it. Pure, thread-safe. */
#ifndef LSA_KERNELS_CORE_CSA_LIST_H
#define LSA_KERNELS_CORE_CSA_LIST_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

/* Sets want[0..n_csa-1]: all of them for "all", else the ordinals named, such as "0,2". On anything else
 * fails with `code`; `what` names the option or key. */
LSA_NODISCARD lsa_status lsa_csa_list(bool *want, const char *text, int32_t n_csa, lsa_status code,
                                      const char *what, lsa_err *err);

#endif
