/* Ranks and collectives of host memory as one small table: `self` (one process), `mpi` and
 * `file` (any number of hosts).
 *
 * A rank that dies, stops, hangs or fails ends every rank: within the deadline each call in progress returns,
 * with a message that names the rank and the cause and with the failing rank's code (LSA_E_COMM for one that
 * is gone). After such an error nothing but lsa_comm_close may be called. Every rank makes the same calls in
 * the same order, from one thread. Results are the same bits on every rank and, given the same shards, on
 * every number of ranks.
 *
 * GPUs exchange gradients by NCCL inside their step (kernels/cuda/step/ranks.cu), which this table brings
 * together and watches. */
#ifndef LSA_KERNELS_COMM_COMM_H
#define LSA_KERNELS_COMM_COMM_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/comm/launch.h"
#include "kernels/core/lsa_status.h"

typedef struct lsa_comm lsa_comm;

enum { LSA_COMM_MEET = 6 }; /* opening may take so many deadlines: large jobs start slowly */

typedef struct lsa_comm_opts {
    /* "auto": mpi if an MPI launcher started more than one rank; or "self", "mpi", or "file:PATH": ranks that
     * a launcher numbered meet through this file, which rank 0 makes in a folder that all see (by TCP, no
     * MPI) */
    const char *ranks;
    double deadline_s; /* see above; at least 1 */
    lsa_launch launch;
    /* Called by a watching thread when another rank has failed and the caller, deep in its own work, has not
     * noticed for half a second, or when the ranks do not meet: report and leave; must not return. NULL: the
     * meeting is not watched. */
    void (*stuck)(const lsa_err *err);
} lsa_comm_opts;

/* Collective. All ranks must be the same program: LSA_E_CONFIG names the rank that is another. */
LSA_NODISCARD lsa_status lsa_comm_open(lsa_comm **out, const lsa_comm_opts *o, lsa_err *err);
/* st, err: how this rank's work ended. With an error the other ranks are told; with LSA_OK or
 * LSA_E_INTERRUPTED, which all ranks must reach together, it waits for them. NULL allowed. */
void lsa_comm_close(lsa_comm *c, lsa_status st, const lsa_err *err);

int lsa_comm_rank(const lsa_comm *c);
int lsa_comm_size(const lsa_comm *c);
int lsa_comm_local_rank(const lsa_comm *c); /* among the ranks of this host */
bool lsa_comm_is_self(const lsa_comm *c);   /* one process that no launcher started as a rank */
const char *lsa_comm_describe(const lsa_comm *c);

/* A sign of progress outside collectives: a rank that gives none for the deadline while others wait for it is
 * taken for hung; one that is only slow is named in a warning. doing: static text, such as "evaluating". */
void lsa_comm_tick(lsa_comm *c, const char *doing);
/* Around a wait for other ranks that is no call of this table, such as for a step over NCCL, polled with
 * lsa_comm_check: every rank makes the same ones. what: static text. */
void lsa_comm_enter(lsa_comm *c, const char *what);
void lsa_comm_leave(lsa_comm *c);
/* Fails if another rank has. */
LSA_NODISCARD lsa_status lsa_comm_check(lsa_comm *c, lsa_err *err);

/* Rank i's n_bytes lie at out + i * n_bytes on every rank. */
LSA_NODISCARD lsa_status lsa_comm_all_gather(lsa_comm *c, const void *in, void *out, int64_t n_bytes,
                                             lsa_err *err);
/* In place: rank i brings floats [begin[i], begin[i+1]) of x, begin [size+1]; afterwards all have all. */
LSA_NODISCARD lsa_status lsa_comm_all_gather_f32(lsa_comm *c, float *x, const int64_t *begin, lsa_err *err);
/* Rank i brings begin[i+1] - begin[i] floats; rank 0 has them at out + begin[i] (out NULL elsewhere). */
LSA_NODISCARD lsa_status lsa_comm_gather_f32(lsa_comm *c, const float *mine, float *out, const int64_t *begin,
                                             lsa_err *err);
/* From rank 0. */
LSA_NODISCARD lsa_status lsa_comm_broadcast(lsa_comm *c, void *data, int64_t n_bytes, lsa_err *err);
/* out[i] = sum over all ranks' parts of part[p][i], for i in [begin[rank], begin[rank+1]); out is indexed as
 * the parts are and may be part[0]. NUMERIC: added in double, rank 0's parts first, each rank's in order: the
 * same terms give the same bits however they are dealt to ranks. */
LSA_NODISCARD lsa_status lsa_comm_reduce_scatter(lsa_comm *c, float *const *part, int n_part,
                                                 const int64_t *begin, float *out, lsa_err *err);

/* Built on the above. */
LSA_NODISCARD lsa_status lsa_comm_barrier(lsa_comm *c, lsa_err *err);
LSA_NODISCARD lsa_status lsa_comm_any(lsa_comm *c, bool *flag, lsa_err *err); /* true where any rank's is */
/* Fails with `code` on every rank unless all bring the same hash; names the ranks that differ from most. */
LSA_NODISCARD lsa_status lsa_comm_agree(lsa_comm *c, const char *what, uint64_t hash, lsa_status code,
                                        lsa_err *err);

#endif
