/* Which device a rank works on. */
#ifndef LSA_TRAINER_DEVICE_H
#define LSA_TRAINER_DEVICE_H

#include "kernels/comm/comm.h"
#include "kernels/ctx.h"

/* device: as lsa_ctx_create. Of several ranks on a host each takes the GPU of its number there unless device
 * names one; LSA_E_CONFIG unless all ranks have a GPU, or none. Collective; comm NULL: one rank. */
LSA_NODISCARD lsa_status lsa_device_open(lsa_ctx **out, const char *device, lsa_comm *comm, lsa_err *err);

#endif
