/* Lists of CSA layers: see csa_list.h. */
#include "kernels/core/csa_list.h"

#include <stdlib.h>
#include <string.h>

lsa_status lsa_csa_list(bool *want, const char *text, int32_t n_csa, lsa_status code, const char *what,
                        lsa_err *err) {
    const bool all = !strcmp(text, "all");
    for (int32_t o = 0; o < n_csa; o++) want[o] = all;
    for (const char *p = all ? "" : text; *p;) {
        char *end;
        const long v = strtol(p, &end, 10);
        if (end == p || v < 0 || v >= n_csa || (*end && *end != ','))
            LSA_RET_FAIL(code, "%s '%s': expected all, or CSA ordinals in [0, %d] with commas between", what,
                         text, n_csa - 1);
        want[v] = true;
        p = *end ? end + 1 : end;
    }
    return LSA_OK;
}
