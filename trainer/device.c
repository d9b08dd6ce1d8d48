/* A rank's device: see device.h. */
#include "trainer/device.h"

#include <stdio.h>
#include <string.h>

lsa_status lsa_device_open(lsa_ctx **out, const char *device, lsa_comm *comm, lsa_err *err) {
    lsa_status st = LSA_OK;
    const int local = comm ? lsa_comm_local_rank(comm) : 0;
    char own[32];
    LSA_TRY(lsa_ctx_create(out, device, err));
    if (!comm || lsa_comm_size(comm) == 1) return LSA_OK;
    if (lsa_ctx_kind(*out) == LSA_BACKEND_CUDA && !strchr(device, ':') && local > 0) {
        lsa_ctx_destroy(*out);
        snprintf(own, sizeof own, "cuda:%d", local);
        LSA_TRY(lsa_ctx_create(out, own, err));
    }
    LSA_TRY(lsa_comm_agree(comm, "the kind of device (GPU or CPU)", (uint64_t)lsa_ctx_kind(*out),
                           LSA_E_CONFIG, err));
done:
    if (st != LSA_OK && comm && lsa_comm_size(comm) > 1) lsa_err_wrap(err, "process %d of its host", local);
    return st;
}
