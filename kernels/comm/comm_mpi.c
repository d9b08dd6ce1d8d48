/* The table over MPI, host memory. Calls are non-blocking and polled, because a blocking call on a rank that
 * is gone never returns; the side channel (beat.h) says when to give up.
 *
 * The mistake that would stay silent: MPI_Allreduce, whose order of addition depends on the number of ranks
 * and on the algorithm that the library picks; sums are made here, in one order. */
#include <limits.h>
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kernels/comm/table.h"
#include "kernels/core/clock.h"
#include "kernels/core/mem.h"

typedef struct mpi_state {
    MPI_Comm world;
    int *count, *displ, *send_count, *send_displ; /* [size] */
    float *send, *recv;
    int64_t cap_send, cap_recv;
} mpi_state;

static lsa_status check(int rc, const char *what, lsa_err *err) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int n = 0;
    if (rc == MPI_SUCCESS) return LSA_OK;
    MPI_Error_string(rc, text, &n);
    LSA_RET_FAIL(LSA_E_COMM, "%s failed: %s", what, text);
}

/* Polls until the request is done or a rank has failed; spins a little, then sleeps between looks. */
static lsa_status finish(lsa_comm *c, int rc, MPI_Request *req, const char *what, lsa_err *err) {
    lsa_status st = check(rc, what, err);
    if (st != LSA_OK) return st;
    lsa_beat_enter(c->beat, what);
    for (int64_t spin = 0;; spin++) {
        int done = 0;
        LSA_TRY(check(MPI_Test(req, &done, MPI_STATUS_IGNORE), what, err));
        if (done) break;
        if (spin < 200) {
            sched_yield();
        } else {
            const struct timespec nap = {0, spin < 2000 ? 50000 : 500000};
            nanosleep(&nap, NULL);
        }
        if (spin % 16 == 0) LSA_TRY(lsa_beat_check(c->beat, err));
    }
done:
    lsa_beat_leave(c->beat);
    /* The library may have noticed the loss before the side channel, which knows the rank: wait for its word.
     */
    if (st == LSA_E_COMM && lsa_beat_await(c->beat, 2 * c->deadline_s)) {
        if (err) *err = (lsa_err){0};
        st = lsa_beat_check(c->beat, err);
    }
    return st;
}

static lsa_status counts(lsa_comm *c, const int64_t *begin, lsa_err *err) {
    mpi_state *const s = c->impl;
    if (begin[c->size] > INT_MAX)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "a collective of %lld elements; MPI counts to 2^31 - 1",
                     (long long)begin[c->size]);
    for (int i = 0; i < c->size; i++) {
        s->count[i] = (int)(begin[i + 1] - begin[i]);
        s->displ[i] = (int)begin[i];
    }
    return LSA_OK;
}

static lsa_status all_gather(lsa_comm *c, const void *in, void *out, int64_t n_bytes, lsa_err *err) {
    mpi_state *const s = c->impl;
    MPI_Request r;
    if (n_bytes > INT_MAX)
        LSA_RET_FAIL(LSA_E_UNSUPPORTED, "gathering %lld bytes a rank at once", (long long)n_bytes);
    const int rc = MPI_Iallgather(in, (int)n_bytes, MPI_BYTE, out, (int)n_bytes, MPI_BYTE, s->world, &r);
    return finish(c, rc, &r, "gathering", err);
}

static lsa_status all_gather_f32(lsa_comm *c, float *x, const int64_t *begin, lsa_err *err) {
    mpi_state *const s = c->impl;
    MPI_Request r;
    lsa_status st = counts(c, begin, err);
    if (st != LSA_OK) return st;
    const int rc =
        MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_FLOAT, x, s->count, s->displ, MPI_FLOAT, s->world, &r);
    return finish(c, rc, &r, "gathering floats", err);
}

static lsa_status gather_f32(lsa_comm *c, const float *mine, float *out, const int64_t *begin, lsa_err *err) {
    mpi_state *const s = c->impl;
    MPI_Request r;
    lsa_status st = counts(c, begin, err);
    if (st != LSA_OK) return st;
    const int rc =
        MPI_Igatherv(mine, s->count[c->rank], MPI_FLOAT, out, s->count, s->displ, MPI_FLOAT, 0, s->world, &r);
    return finish(c, rc, &r, "gathering floats on rank 0", err);
}

static lsa_status broadcast(lsa_comm *c, void *data, int64_t n_bytes, lsa_err *err) {
    enum { PIECE = 1 << 28 };
    mpi_state *const s = c->impl;
    for (int64_t at = 0; at < n_bytes; at += PIECE) {
        MPI_Request r;
        const int n = (int)(n_bytes - at < PIECE ? n_bytes - at : PIECE);
        const int rc = MPI_Ibcast((char *)data + at, n, MPI_BYTE, 0, s->world, &r);
        lsa_status st = finish(c, rc, &r, "broadcasting", err);
        if (st != LSA_OK) return st;
    }
    return LSA_OK;
}

static lsa_status room(float **p, int64_t *cap, int64_t n, lsa_err *err) {
    if (n <= *cap) return LSA_OK;
    lsa_free(*p);
    *p = NULL;
    *cap = 0;
    lsa_status st = lsa_alloc_((void **)p, n, sizeof **p, "exchange buffer", err);
    if (st == LSA_OK) *cap = n;
    return st;
}

static lsa_status reduce_scatter(lsa_comm *c, float *const *part, int n_part, const int64_t *begin,
                                 float *out, lsa_err *err) {
    lsa_status st = LSA_OK;
    mpi_state *const s = c->impl;
    MPI_Request r;
    const int64_t mine = begin[c->rank + 1] - begin[c->rank], all = begin[c->size] - begin[0];
    if (all * n_part > INT_MAX || mine * n_part * c->size > INT_MAX)
        LSA_FAIL(LSA_E_UNSUPPORTED, "reducing %lld elements of %d parts at once", (long long)all, n_part);
    LSA_TRY(room(&s->send, &s->cap_send, all * n_part, err));
    LSA_TRY(room(&s->recv, &s->cap_recv, mine * n_part * c->size, err));
    int64_t at = 0;
    for (int i = 0; i < c->size; i++) { /* what rank i adds up: its range of each of my parts */
        const int64_t n = begin[i + 1] - begin[i];
        s->send_count[i] = (int)(n * n_part);
        s->send_displ[i] = (int)at;
        s->count[i] = (int)(mine * n_part);
        s->displ[i] = (int)(mine * n_part * i);
        for (int p = 0; p < n_part; p++, at += n)
            if (n) memcpy(s->send + at, part[p] + begin[i], (size_t)n * sizeof(float));
    }
    const int rc = MPI_Ialltoallv(s->send, s->send_count, s->send_displ, MPI_FLOAT, s->recv, s->count,
                                  s->displ, MPI_FLOAT, s->world, &r);
    LSA_TRY(finish(c, rc, &r, "adding gradients", err));
    const int64_t n_all = (int64_t)c->size * n_part;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < mine; i++) {
        double sum = 0;
        for (int64_t p = 0; p < n_all; p++) sum += (double)s->recv[p * mine + i];
        out[begin[c->rank] + i] = (float)sum;
    }
done:
    return st;
}

/* After a failure MPI_Finalize would wait for ranks that are gone: the process ends without it, which tells
 * the launcher to end the others. */
static void close_mpi(lsa_comm *c, bool together) {
    mpi_state *const s = c->impl;
    if (!s) return;
    if (together) {
        MPI_Comm_free(&s->world);
        MPI_Finalize();
    }
    void *p[] = {s->count, s->displ, s->send_count, s->send_displ, s->send, s->recv, s};
    for (size_t i = 0; together && i < sizeof p / sizeof *p; i++)
        lsa_free(p[i]); /* else MPI may still write */
    c->impl = NULL;
}

static const lsa_comm_table table = {"mpi",     all_gather,     all_gather_f32, gather_f32,
                                     broadcast, reduce_scatter, close_mpi};

lsa_status lsa_comm_mpi_open(lsa_comm *c, lsa_err *err) {
    lsa_status st = LSA_OK;
    mpi_state *s = NULL;
    MPI_Comm local;
    int provided;
    LSA_TRY(LSA_NEW(s, 1, err));
    c->impl = s;
    c->t = &table;
    LSA_TRY(check(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided), "MPI_Init", err));
    if (provided < MPI_THREAD_FUNNELED)
        LSA_FAIL(LSA_E_UNSUPPORTED, "this MPI allows no threads beside the calling one");
    LSA_TRY(check(MPI_Comm_dup(MPI_COMM_WORLD, &s->world), "MPI_Comm_dup", err));
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_set_errhandler(s->world, MPI_ERRORS_RETURN);
    MPI_Comm_rank(s->world, &c->rank);
    MPI_Comm_size(s->world, &c->size);
    LSA_TRY(check(MPI_Comm_split_type(s->world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local),
                  "MPI_Comm_split_type", err));
    MPI_Comm_rank(local, &c->local_rank);
    MPI_Comm_free(&local);
    LSA_TRY(LSA_NEW(s->count, c->size, err));
    LSA_TRY(LSA_NEW(s->displ, c->size, err));
    LSA_TRY(LSA_NEW(s->send_count, c->size, err));
    LSA_TRY(LSA_NEW(s->send_displ, c->size, err));
done:
    return st;
}
