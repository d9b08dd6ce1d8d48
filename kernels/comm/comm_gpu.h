/* Collectives of device memory over NCCL, for ranks that a host table (comm.h) has brought together: one GPU
 * a rank. Operations are enqueued on a stream (a cudaStream_t) and may be captured into a CUDA graph; every
 * rank enqueues the same ones in the same order. All are in place. NCCL is loaded by the first open, so
 * nothing else depends on it. One thread. Errors: LSA_E_UNSUPPORTED without NCCL, LSA_E_COMM with the rank
 * that is gone or NCCL's own words. */
#ifndef LSA_KERNELS_COMM_COMM_GPU_H
#define LSA_KERNELS_COMM_COMM_GPU_H

#include <stdint.h>

#include "kernels/comm/comm.h"

typedef struct lsa_gpu_comm lsa_gpu_comm;
typedef enum lsa_gpu_type { LSA_GPU_F32 = 0, LSA_GPU_BF16, LSA_GPU_F64 } lsa_gpu_type;

/* Collective. device: this rank's GPU, the current one of the calling thread; for the message. */
LSA_NODISCARD lsa_status lsa_gpu_comm_open(lsa_gpu_comm **out, lsa_comm *host, int device, lsa_err *err);
/* Collective unless a rank has failed. NULL allowed. */
void lsa_gpu_comm_close(lsa_gpu_comm *c);

/* Operations between begin and end are launched together. */
LSA_NODISCARD lsa_status lsa_gpu_comm_begin(lsa_gpu_comm *c, lsa_err *err);
LSA_NODISCARD lsa_status lsa_gpu_comm_end(lsa_gpu_comm *c, lsa_err *err);
/* x [n]: the sum of all ranks' x. */
LSA_NODISCARD lsa_status lsa_gpu_comm_add(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type,
                                          void *stream, lsa_err *err);
/* x [n], n a multiple of the ranks: slice `rank` of x becomes that slice of the sum, the rest is undefined.
 */
LSA_NODISCARD lsa_status lsa_gpu_comm_add_slices(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type,
                                                 void *stream, lsa_err *err);
/* x [n]: slice i is that of rank i. */
LSA_NODISCARD lsa_status lsa_gpu_comm_gather_slices(lsa_gpu_comm *c, void *x, int64_t n, lsa_gpu_type type,
                                                    void *stream, lsa_err *err);

/* Fails if another rank or an exchange has failed; NCCL's operations are then aborted, so that a stream which
 * waits for them ends. For whoever polls a stream. */
LSA_NODISCARD lsa_status lsa_gpu_comm_check(lsa_gpu_comm *c, lsa_err *err);

#endif
