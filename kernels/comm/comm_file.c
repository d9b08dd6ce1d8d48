/* The table over TCP, for ranks that meet through a file in a shared folder: no MPI. Rank 0 writes where it
 * listens, every other rank keeps one connection to it, and all data go through rank 0: enough beside NCCL,
 * slow for the gradients of many CPU ranks.
 *
 * The mistake that would stay silent: a file that an earlier run left. Its token is not the one that listens
 * now, so that a rank which read it is not let in and reads again. */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "kernels/comm/table.h"
#include "kernels/core/clock.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"

enum { MAGIC = 0x4C534146, LOOK_MS = 20 };

typedef struct file_state {
    int *fd;     /* [size]: rank 0's to every other; the others' in [0] */
    double *sum; /* rank 0 */
    float *one;
    int64_t cap_sum, cap_one;
} file_state;

typedef struct greeting { /* a rank's first words, and rank 0's answer */
    uint32_t magic;
    int32_t rank, size, local;
    uint64_t token;
    char host[64];
} greeting;

/* ---- moving bytes ---- */

typedef struct transfer {
    int fd;
    bool out;
    char *at;
    int64_t left;
} transfer;

static lsa_status broken(lsa_comm *c, const char *what, lsa_err *err) {
    const int why = errno;
    /* the side channel knows which rank it is */
    if (lsa_beat_await(c->beat, 2 * c->deadline_s)) return lsa_beat_check(c->beat, err);
    LSA_RET_FAIL(LSA_E_COMM, "%s failed: %s", what, why ? strerror(why) : "the connection closed");
}

/* Some bytes of one transfer: 1, or 0 if it must wait, or -1. */
static int step(transfer *t) {
    const size_t n = t->left < (int64_t)1 << 24 ? (size_t)t->left : (size_t)1 << 24;
    const ssize_t k =
        t->out ? send(t->fd, t->at, n, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(t->fd, t->at, n, MSG_DONTWAIT);
    if (k < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if (k == 0) {
        errno = 0;
        return -1;
    }
    t->at += k;
    t->left -= k;
    return 1;
}

/* All of them, at most one a connection and direction at a time, until done or a rank has failed. */
static lsa_status move(lsa_comm *c, transfer *t, int n, const char *what, lsa_err *err) {
    lsa_status st = LSA_OK;
    struct pollfd *f = NULL;
    double looked = lsa_now_s();
    LSA_TRY(LSA_NEW(f, n, err));
    lsa_beat_enter(c->beat, what);
    for (;;) {
        int waiting = 0;
        for (int i = 0; i < n; i++) {
            int moved = 1;
            while (t[i].left > 0 && moved > 0)
                if ((moved = step(&t[i])) < 0) {
                    st = broken(c, what, err);
                    goto done;
                }
            if (t[i].left > 0) f[waiting++] = (struct pollfd){t[i].fd, t[i].out ? POLLOUT : POLLIN, 0};
        }
        if (waiting == 0) break;
        poll(f, (nfds_t)waiting, LOOK_MS);
        if (lsa_now_s() - looked > 1e-3 * LOOK_MS) {
            LSA_TRY(lsa_beat_check(c->beat, err));
            looked = lsa_now_s();
        }
    }
done:
    lsa_beat_leave(c->beat);
    lsa_free(f);
    return st;
}

/* Rank 0 with every other rank: `at` and `bytes` of rank i's transfer. */
typedef struct part {
    char *at;
    int64_t bytes;
} part;
static lsa_status with_all(lsa_comm *c, bool out, part (*of)(void *user, int rank), void *user,
                           const char *what, lsa_err *err) {
    const file_state *const s = c->impl;
    lsa_status st = LSA_OK;
    transfer *t = NULL;
    LSA_TRY(LSA_NEW(t, c->size, err));
    for (int i = 1; i < c->size; i++) {
        const part p = of(user, i);
        t[i - 1] = (transfer){s->fd[i], out, p.at, p.bytes};
    }
    LSA_TRY(move(c, t, c->size - 1, what, err));
done:
    lsa_free(t);
    return st;
}
static lsa_status with_first(lsa_comm *c, bool out, void *at, int64_t bytes, const char *what, lsa_err *err) {
    const file_state *const s = c->impl;
    return move(c, &(transfer){s->fd[0], out, at, bytes}, 1, what, err);
}

typedef struct slices {
    char *base;
    const int64_t *begin; /* in elements of 4 bytes, or NULL: `bytes` a rank */
    int64_t bytes;
    bool whole; /* everything of it, to everyone */
} slices;
static part slice_of(void *user, int rank) {
    const slices *const s = user;
    if (s->whole) return (part){s->base, s->bytes};
    if (!s->begin) return (part){s->base + rank * s->bytes, s->bytes};
    return (part){s->base + s->begin[rank] * 4, (s->begin[rank + 1] - s->begin[rank]) * 4};
}

/* ---- the table ---- */

static lsa_status all_gather(lsa_comm *c, const void *in, void *out, int64_t n_bytes, lsa_err *err) {
    static const char what[] = "gathering";
    lsa_status st = LSA_OK;
    slices each = {out, NULL, n_bytes, false}, all = {out, NULL, n_bytes * c->size, true};
    if (n_bytes) memmove((char *)out + c->rank * n_bytes, in, (size_t)n_bytes);
    if (c->rank > 0) {
        LSA_TRY(with_first(c, true, (char *)out + c->rank * n_bytes, n_bytes, what, err));
        return with_first(c, false, out, n_bytes * c->size, what, err);
    }
    LSA_TRY(with_all(c, false, slice_of, &each, what, err));
    LSA_TRY(with_all(c, true, slice_of, &all, what, err));
done:
    return st;
}

static lsa_status all_gather_f32(lsa_comm *c, float *x, const int64_t *begin, lsa_err *err) {
    static const char what[] = "gathering floats";
    lsa_status st = LSA_OK;
    const part own = slice_of(&(slices){(char *)x, begin, 0, false}, c->rank);
    slices each = {(char *)x, begin, 0, false};
    slices all = {(char *)(x + begin[0]), NULL, (begin[c->size] - begin[0]) * 4, true};
    if (c->rank > 0) {
        LSA_TRY(with_first(c, true, own.at, own.bytes, what, err));
        return with_first(c, false, all.base, all.bytes, what, err);
    }
    LSA_TRY(with_all(c, false, slice_of, &each, what, err));
    LSA_TRY(with_all(c, true, slice_of, &all, what, err));
done:
    return st;
}

static lsa_status gather_f32(lsa_comm *c, const float *mine, float *out, const int64_t *begin, lsa_err *err) {
    static const char what[] = "gathering floats on rank 0";
    const int64_t n = (begin[c->rank + 1] - begin[c->rank]) * 4;
    slices each = {(char *)out, begin, 0, false};
    if (c->rank > 0) return with_first(c, true, (void *)(uintptr_t)mine, n, what, err);
    if (n) memmove(out + begin[0], mine, (size_t)n);
    return with_all(c, false, slice_of, &each, what, err);
}

static lsa_status broadcast(lsa_comm *c, void *data, int64_t n_bytes, lsa_err *err) {
    static const char what[] = "broadcasting";
    slices all = {data, NULL, n_bytes, true};
    return c->rank > 0 ? with_first(c, false, data, n_bytes, what, err)
                       : with_all(c, true, slice_of, &all, what, err);
}

/* Terms arrive in the order in which they are added: rank by rank, part by part. */
static lsa_status reduce_scatter(lsa_comm *c, float *const *x, int n_part, const int64_t *begin, float *out,
                                 lsa_err *err) {
    static const char what[] = "adding gradients";
    lsa_status st = LSA_OK;
    file_state *const s = c->impl;
    const int64_t b = begin[0], n = begin[c->size] - b;
    if (c->rank > 0) {
        const part own = slice_of(&(slices){(char *)out, begin, 0, false}, c->rank);
        for (int p = 0; p < n_part; p++) LSA_TRY(with_first(c, true, x[p] + b, n * 4, what, err));
        return with_first(c, false, own.at, own.bytes, what, err);
    }
    if (n > s->cap_sum) {
        lsa_free(s->sum), lsa_free(s->one);
        s->sum = NULL, s->one = NULL, s->cap_sum = 0;
        LSA_TRY(LSA_NEW(s->sum, n, err));
        LSA_TRY(LSA_NEW(s->one, n, err));
        s->cap_sum = n;
    }
    for (int r = 0; r < c->size; r++)
        for (int p = 0; p < n_part; p++) {
            const float *term = r == 0 ? x[p] + b : s->one;
            if (r > 0) LSA_TRY(move(c, &(transfer){s->fd[r], false, (char *)s->one, n * 4}, 1, what, err));
            const bool first = r == 0 && p == 0;
#pragma omp parallel for schedule(static)
            for (int64_t i = 0; i < n; i++) s->sum[i] = (first ? 0.0 : s->sum[i]) + (double)term[i];
        }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) s->one[i] = (float)s->sum[i];
    if (begin[1] > b) memcpy(out + b, s->one, (size_t)(begin[1] - b) * 4);
    slices each = {(char *)s->one - b * 4, begin, 0, false};
    LSA_TRY(with_all(c, true, slice_of, &each, what, err));
done:
    return st;
}

static void close_file(lsa_comm *c, bool together) {
    file_state *const s = c->impl;
    (void)together;
    if (!s) return;
    for (int i = 0; s->fd && i < c->size; i++)
        if (s->fd[i] >= 0) close(s->fd[i]);
    lsa_free(s->fd);
    lsa_free(s->sum);
    lsa_free(s->one);
    lsa_free(s);
    c->impl = NULL;
}

static const lsa_comm_table table = {"file",    all_gather,     all_gather_f32, gather_f32,
                                     broadcast, reduce_scatter, close_file};

/* ---- meeting ---- */

static void set_up(int fd) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* A greeting, whole, within two seconds. */
static bool say(int fd, const greeting *g) {
    return send(fd, g, sizeof *g, MSG_NOSIGNAL) == (ssize_t)sizeof *g;
}
static bool hear(int fd, greeting *g, int wait_ms) {
    size_t n = 0;
    struct pollfd f = {fd, POLLIN, 0};
    while (n < sizeof *g && poll(&f, 1, wait_ms) == 1) {
        const ssize_t k = recv(fd, (char *)g + n, sizeof *g - n, 0);
        if (k <= 0) return false;
        n += (size_t)k;
    }
    g->host[sizeof g->host - 1] = 0;
    return n == sizeof *g && g->magic == MAGIC;
}

/* Rank 0: all others are let in, then hear which of their host's ranks they are. */
static lsa_status admit(lsa_comm *c, int listen_fd, const greeting *me, lsa_err *err) {
    lsa_status st = LSA_OK;
    file_state *const s = c->impl;
    greeting *got = NULL;
    LSA_TRY(LSA_NEW(got, c->size, err));
    got[0] = *me;
    for (int n = 1; n < c->size;) {
        greeting g;
        const int fd = accept(listen_fd, NULL, NULL);
        if (fd < 0) continue;
        set_up(fd);
        if (!hear(fd, &g, 2000) || g.token != me->token || g.rank < 1 || g.rank >= c->size ||
            s->fd[g.rank] >= 0) {
            close(fd);
            continue;
        }
        if (g.size != c->size)
            LSA_FAIL(LSA_E_ARG, "rank %d on %s was told of %d ranks, rank 0 of %d", (int)g.rank, g.host,
                     (int)g.size, c->size);
        s->fd[g.rank] = fd;
        got[g.rank] = g;
        n++;
    }
    for (int i = 0; i < c->size; i++) {
        got[i].local = 0;
        for (int j = 0; j < i; j++) got[i].local += !strcmp(got[j].host, got[i].host);
        if (i > 0 && !say(s->fd[i], &got[i]))
            LSA_FAIL(LSA_E_COMM, "rank %d on %s left while the ranks met", i, got[i].host);
    }
done:
    lsa_free(got);
    return st;
}

static lsa_status be_first(lsa_comm *c, const char *path, greeting *me, lsa_err *err) {
    lsa_status st = LSA_OK;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY)};
    socklen_t n = sizeof a;
    lsa_beat_address where = {0};
    char text[1024];
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) != 0 || listen(fd, c->size) != 0 ||
        getsockname(fd, (struct sockaddr *)&a, &n) != 0)
        LSA_FAIL(LSA_E_COMM, "rank 0 cannot listen for the other ranks: %s", strerror(errno));
    if (getrandom(&me->token, sizeof me->token, 0) != (ssize_t)sizeof me->token)
        LSA_FAIL(LSA_E_IO, "no random bytes: %s", strerror(errno));
    lsa_beat_addresses(&where);
    int at = snprintf(text, sizeof text, "lsa-ranks/1 %d %016llx %d", c->size, (unsigned long long)me->token,
                      ntohs(a.sin_port));
    for (int i = 0; i < where.n_addr; i++)
        at += snprintf(text + at, sizeof text - (size_t)at, " %s", where.addr[i]);
    text[at++] = '\n';
    LSA_TRY(lsa_write_file(path, text, (size_t)at, err));
    LSA_TRY(admit(c, fd, me, err));
    unlink(path);
done:
    if (fd >= 0) close(fd);
    return st;
}

static int reach(const char *addr, int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    const struct timeval limit = {2, 0};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit); /* of connect too */
    if (inet_pton(AF_INET, addr, &a.sin_addr) == 1 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0)
        return fd;
    close(fd);
    return -1;
}

/* One look at the file: connected and let in, or not yet. */
static bool try_to_join(lsa_comm *c, const char *path, greeting *me) {
    file_state *const s = c->impl;
    char *text = NULL, *rest = NULL;
    size_t n;
    bool in = false;
    if (!lsa_exists(path) || lsa_read_file(&text, &n, path, NULL) != LSA_OK) return false;
    const char *const magic = strtok_r(text, " \n", &rest), *const size = strtok_r(NULL, " \n", &rest),
                      *const token = strtok_r(NULL, " \n", &rest), *const port = strtok_r(NULL, " \n", &rest);
    if (!port || strcmp(magic, "lsa-ranks/1") || !size) goto done;
    me->token = strtoull(token, NULL, 16);
    for (const char *addr = strtok_r(NULL, " \n", &rest); addr && !in; addr = strtok_r(NULL, " \n", &rest)) {
        greeting g;
        const int fd = reach(addr, atoi(port));
        if (fd < 0) continue;
        set_up(fd);
        /* the answer comes when all are there; somebody else's port, or a run that is over, closes at once */
        in = say(fd, me) && hear(fd, &g, 1000 * LSA_COMM_MEET * (int)c->deadline_s) && g.token == me->token;
        if (in)
            s->fd[0] = fd, me->local = g.local;
        else
            close(fd);
    }
done:
    lsa_free(text);
    return in;
}

lsa_status lsa_comm_file_open(lsa_comm *c, const char *path, const lsa_launch *l, lsa_err *err) {
    lsa_status st = LSA_OK;
    const struct timespec nap = {0, 50000000};
    file_state *s = NULL;
    greeting me = {.magic = MAGIC, .rank = l->rank, .size = l->size};
    gethostname(me.host, sizeof me.host - 1);
    LSA_TRY(LSA_NEW(s, 1, err));
    c->impl = s;
    c->t = &table;
    c->rank = l->rank;
    c->size = l->size;
    LSA_TRY(LSA_NEW(s->fd, c->size, err));
    for (int i = 0; i < c->size; i++) s->fd[i] = -1;
    if (c->rank == 0)
        LSA_TRY(be_first(c, path, &me, err));
    else
        while (!try_to_join(c, path, &me)) nanosleep(&nap, NULL); /* the meeting is watched: comm.c */
    c->local_rank = me.local;
done:
    return st;
}
