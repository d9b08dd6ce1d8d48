/* Inside kernels/comm: a communicator and the table behind it. */
#ifndef LSA_KERNELS_COMM_TABLE_H
#define LSA_KERNELS_COMM_TABLE_H

#include "kernels/comm/beat.h"
#include "kernels/comm/comm.h"

typedef struct lsa_comm_table {
    const char *name;
    lsa_status (*all_gather)(lsa_comm *c, const void *in, void *out, int64_t n_bytes, lsa_err *err);
    lsa_status (*all_gather_f32)(lsa_comm *c, float *x, const int64_t *begin, lsa_err *err);
    lsa_status (*gather_f32)(lsa_comm *c, const float *mine, float *out, const int64_t *begin, lsa_err *err);
    lsa_status (*broadcast)(lsa_comm *c, void *data, int64_t n_bytes, lsa_err *err);
    lsa_status (*reduce_scatter)(lsa_comm *c, float *const *part, int n_part, const int64_t *begin,
                                 float *out, lsa_err *err);
    void (*close)(lsa_comm *c, bool together);
} lsa_comm_table;

struct lsa_comm {
    const lsa_comm_table *t;
    int rank, size, local_rank;
    double deadline_s;
    lsa_beat *beat; /* NULL with one rank */
    void *impl;     /* the table's own */
    char text[96];
};

extern const lsa_comm_table lsa_comm_self;
/* Fills rank, size, local_rank, t and impl. Without MPI in the build: LSA_E_UNSUPPORTED. */
LSA_NODISCARD lsa_status lsa_comm_mpi_open(lsa_comm *c, lsa_err *err);
/* The same for ranks that meet through the file `path`. Waits for the others without end. */
LSA_NODISCARD lsa_status lsa_comm_file_open(lsa_comm *c, const char *path, const lsa_launch *l, lsa_err *err);

#endif
