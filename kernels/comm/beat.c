/* The side channel: see beat.h.
 *
 * A message is one fixed record. Rank 0's verdict is the first cause it sees: a connection that closed
 * without good-bye, silence beyond the deadline, a rank that the others wait for and that makes no progress,
 * or a rank that reports its own failure. The mistake that would stay silent: judging silence before reading
 * what has arrived, which would blame others after this process itself was stopped for a while. */
#include "kernels/comm/beat.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "kernels/core/clock.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"

enum { MAGIC = 0x4C534142, TEXT = 600, QUEUE = 4 };
enum { HELLO = 1, WELCOME, BEAT, FAIL, VERDICT, BYE };
/* How long a rank may go on after the verdict: less than launchers leave between SIGTERM and SIGKILL, so that
 * it is said; and when the caller knows it and is closing files. */
#define STUCK_S 0.5
#define TOLD_S  10.0

typedef struct msg {
    uint32_t magic, kind;
    uint64_t token;
    int32_t rank, code, pid, waiting;
    int64_t seq, ticks; /* collectives entered; signs of progress */
    char host[64], doing[32], text[TEXT];
} msg;

typedef struct peer { /* a connection; rank 0 has one to every other rank, the others one to rank 0 */
    int fd;
    bool joined, gone, bye, warned;
    int32_t rank, pid;
    char host[64], doing[32];
    double heard, moved, entered; /* when: anything; ticks or seq changed; the collective was entered */
    int64_t seq, ticks;
    bool waiting;
    char in[sizeof(msg)];
    size_t n_in;
    msg out[QUEUE];
    size_t n_out, sent; /* records queued; bytes of the first that are sent */
} peer;

struct lsa_beat {
    int rank, size, listen_fd, wake[2];
    double deadline, period;
    void (*stuck)(const lsa_err *);
    lsa_beat_address where;
    peer *peer; /* [n_peer]; rank 0: [size], its own state in [0] */
    int n_peer;
    pthread_t thread;
    bool running, stalled; /* stalled: has been said */
    pthread_mutex_t lock;  /* what follows */
    pthread_cond_t news;
    msg me;                                   /* own state, sent as a beat */
    bool has_verdict, told, closing, failing; /* told: the caller has seen the verdict */
    double verdict_at;
    lsa_err verdict;
    lsa_status fail_code;
    char fail_text[TEXT];
};

/* ---- sockets ---- */

static void put(peer *p, const msg *m) {
    if (p->fd < 0 || p->gone) return;
    if (m->kind == BEAT && p->n_out) return; /* the other side is not reading: a beat may be lost */
    if (p->n_out < QUEUE) p->out[p->n_out++] = *m;
}

static void flush(peer *p) {
    while (p->fd >= 0 && !p->gone && p->n_out) {
        const ssize_t n = send(p->fd, (const char *)&p->out[0] + p->sent, sizeof(msg) - p->sent,
                               MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            if (errno != EAGAIN && errno != EINTR) p->gone = true;
            return;
        }
        p->sent += (size_t)n;
        if (p->sent < sizeof(msg)) return;
        p->sent = 0;
        p->n_out--;
        memmove(&p->out[0], &p->out[1], p->n_out * sizeof(msg));
    }
}

/* One whole record into *m: 1; nothing yet: 0; closed: -1. */
static int take(peer *p, msg *m) {
    const ssize_t n = recv(p->fd, p->in + p->n_in, sizeof(msg) - p->n_in, MSG_DONTWAIT);
    if (n == 0) return -1;
    if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    p->n_in += (size_t)n;
    if (p->n_in < sizeof(msg)) return 0;
    memcpy(m, p->in, sizeof(msg));
    p->n_in = 0;
    m->host[sizeof m->host - 1] = m->doing[sizeof m->doing - 1] = m->text[TEXT - 1] = 0;
    return m->magic == MAGIC ? 1 : -1;
}

static msg record(const lsa_beat *b, uint32_t kind) {
    msg m = b->me;
    m.kind = kind;
    return m;
}

/* ---- verdict ---- */

static void judge(lsa_beat *b, lsa_status code, const char *text) {
    msg m;
    pthread_mutex_lock(&b->lock);
    if (!b->has_verdict) {
        b->has_verdict = true;
        b->verdict_at = lsa_now_s();
        lsa_err_set(&b->verdict, code, __FILE__, __LINE__, "%s", text);
        pthread_cond_broadcast(&b->news);
    }
    m = record(b, VERDICT);
    m.code = (int32_t)b->verdict.code;
    snprintf(m.text, sizeof m.text, "%.*s", TEXT - 1, b->verdict.msg);
    pthread_mutex_unlock(&b->lock);
    for (int i = 0; b->rank == 0 && i < b->n_peer; i++) {
        put(&b->peer[i], &m);
        flush(&b->peer[i]);
    }
}

static bool judged(lsa_beat *b) {
    pthread_mutex_lock(&b->lock);
    const bool has = b->has_verdict;
    pthread_mutex_unlock(&b->lock);
    return has;
}

static void on_message(lsa_beat *b, peer *p, const msg *m, double now) {
    char text[TEXT];
    p->heard = now;
    switch (m->kind) {
    case BEAT:
        if (m->seq != p->seq || m->ticks != p->ticks) p->moved = now;
        if (m->seq != p->seq || (m->waiting && !p->waiting)) p->entered = now;
        p->seq = m->seq;
        p->ticks = m->ticks;
        p->waiting = m->waiting;
        memcpy(p->doing, m->doing, sizeof p->doing);
        break;
    case FAIL:
        p->bye = true;
        snprintf(text, sizeof text, "rank %d (process %d on %s) failed: %.480s", (int)p->rank, (int)p->pid,
                 p->host, m->text);
        judge(b, (lsa_status)m->code, text);
        break;
    case VERDICT:
        judge(b, (lsa_status)m->code, m->text);
        break;
    case BYE:
        p->bye = true;
        break;
    default:
        break;
    }
}

static void lost(lsa_beat *b, peer *p) {
    char text[TEXT];
    if (p->gone && p->bye) return;
    p->gone = true;
    if (p->bye) return;
    p->bye = true;
    snprintf(text, sizeof text,
             "rank %d (process %d on %s) died: its connection closed (killed, crashed or out of memory?)",
             (int)p->rank, (int)p->pid, p->host);
    judge(b, LSA_E_COMM, text);
}

static void silent(lsa_beat *b, peer *p, double now) {
    char text[TEXT];
    if (p->bye || p->gone || !p->joined || !(now - p->heard > b->deadline)) return;
    snprintf(
        text, sizeof text,
        "rank %d (process %d on %s) has been silent for %.0f s: it is stopped, its machine is down or the "
        "network to it is cut",
        (int)p->rank, (int)p->pid, p->host, now - p->heard);
    judge(b, LSA_E_COMM, text);
}

/* When the first rank began to wait for p: it is in a collective that p has not entered. `never` if none. */
static double waited_since(const lsa_beat *b, const peer *p, double never) {
    double since = never;
    for (int i = 0; i < b->size; i++) {
        const peer *const q = &b->peer[i];
        if (q->waiting && q->seq > p->seq && q->entered < since) since = q->entered;
    }
    return since;
}

/* Rank 0: is anybody waited for? A rank that waits itself, though in an earlier collective, is not to blame.
 */
static void late(lsa_beat *b, double now) {
    char text[TEXT];
    bool all_wait = true;
    double last_in = 0, last_move = 0;
    for (int i = 0; i < b->size; i++) {
        peer *const p = &b->peer[i];
        const double since = waited_since(b, p, now);
        const bool is_late = !p->waiting && !p->bye && now - since > b->deadline;
        all_wait = all_wait && p->waiting;
        last_in = p->entered > last_in ? p->entered : last_in;
        last_move = p->moved > last_move ? p->moved : last_move;
        if (is_late && now - p->moved > b->deadline) {
            snprintf(
                text, sizeof text,
                "rank %d (process %d on %s) hangs: the others have waited %.0f s for it, it is alive but "
                "has not moved since it was %s",
                i, (int)p->pid, p->host, now - since, *p->doing ? p->doing : "starting");
            judge(b, LSA_E_COMM, text);
            return;
        }
        if (is_late && !p->warned)
            lsa_warn("rank %d (process %d on %s) is slow: the others have waited %.0f s for it; it is %s", i,
                     (int)p->pid, p->host, now - since, *p->doing ? p->doing : "starting");
        p->warned = is_late;
    }
    if (!all_wait && now - last_move > b->deadline && !b->stalled) /* perhaps long work: nobody is to blame */
        lsa_warn("no rank has moved for %.0f s; rank 0 is %s", now - last_move,
                 *b->peer[0].doing ? b->peer[0].doing : "starting");
    b->stalled = now - last_move > b->deadline;
    if (!all_wait || !(now - last_in > 2 * b->deadline)) return;
    snprintf(text, sizeof text,
             "collectives do not end although all ranks have been in one for %.0f s: their data network is "
             "broken (this side channel is not)",
             now - last_in);
    judge(b, LSA_E_COMM, text);
}

/* ---- the thread ---- */

/* A connection on rank 0's port: counts once it has said the token and an open rank. */
static void welcome(lsa_beat *b, double now) {
    const int fd = accept4(b->listen_fd, NULL, NULL, SOCK_CLOEXEC);
    struct pollfd f = {fd, POLLIN, 0};
    peer p = {.fd = fd};
    msg m;
    int got = 0;
    if (fd < 0) return;
    while (got == 0 && poll(&f, 1, 500) > 0) got = take(&p, &m);
    if (got != 1 || m.kind != HELLO || m.token != b->where.token || m.rank < 1 || m.rank >= b->size ||
        b->peer[m.rank].joined) {
        close(fd);
        return;
    }
    peer *const q = &b->peer[m.rank];
    q->fd = fd;
    q->joined = true;
    q->rank = m.rank;
    q->pid = m.pid;
    memcpy(q->host, m.host, sizeof q->host);
    q->heard = q->moved = q->entered = now;
    pthread_mutex_lock(&b->lock);
    m = record(b, WELCOME);
    pthread_mutex_unlock(&b->lock);
    put(q, &m);
    flush(q);
}

static void own_state(lsa_beat *b, double now, msg *beat) {
    pthread_mutex_lock(&b->lock);
    *beat = record(b, BEAT);
    pthread_mutex_unlock(&b->lock);
    if (b->rank == 0) on_message(b, &b->peer[0], beat, now);
}

static bool all_sent(const lsa_beat *b) {
    for (int i = 0; i < b->n_peer; i++)
        if (b->peer[i].fd >= 0 && !b->peer[i].gone && b->peer[i].n_out) return false;
    return true;
}

/* Last words: failure or good-bye, then at most a second to get them out. */
static void end(lsa_beat *b) {
    const double until = lsa_now_s() + 1.0;
    pthread_mutex_lock(&b->lock);
    const bool failing = b->failing;
    msg m = record(b, failing ? FAIL : BYE);
    m.code = (int32_t)b->fail_code;
    memcpy(m.text, b->fail_text, sizeof m.text);
    pthread_mutex_unlock(&b->lock);
    if (failing && b->rank == 0) {
        char text[TEXT];
        snprintf(text, sizeof text, "rank 0 (process %d on %s) failed: %.480s", (int)m.pid, m.host, m.text);
        judge(b, (lsa_status)m.code, text);
    } else {
        for (int i = 0; i < b->n_peer; i++) put(&b->peer[i], &m);
    }
    while (!all_sent(b) && lsa_now_s() < until) {
        for (int i = 0; i < b->n_peer; i++) flush(&b->peer[i]);
        const struct timespec nap = {0, 2000000};
        nanosleep(&nap, NULL);
    }
}

static void watch_main(lsa_beat *b, double now) {
    pthread_mutex_lock(&b->lock);
    const bool over = b->has_verdict && !b->closing && now - b->verdict_at > (b->told ? TOLD_S : STUCK_S);
    const lsa_err why = b->verdict;
    pthread_mutex_unlock(&b->lock);
    if (over && b->stuck) b->stuck(&why);
}

static void read_all(lsa_beat *b, struct pollfd *f, double now) {
    for (int i = 0; i < b->n_peer; i++) {
        peer *const p = &b->peer[i];
        int got = 1;
        msg m;
        if (p->fd < 0 || p->gone || !(f[i].revents & (POLLIN | POLLHUP | POLLERR))) continue;
        while (got == 1)
            if ((got = take(p, &m)) == 1) on_message(b, p, &m, now);
        if (got < 0) lost(b, p);
    }
}

static void *watch(void *arg) {
    lsa_beat *const b = arg;
    struct pollfd *f = NULL;
    double last_beat = 0, before = lsa_now_s();
    msg beat;
    if (LSA_NEW(f, b->n_peer + 2, NULL) != LSA_OK) return NULL;
    for (;;) {
        for (int i = 0; i < b->n_peer; i++)
            f[i] = (struct pollfd){b->peer[i].gone ? -1 : b->peer[i].fd,
                                   (short)(POLLIN | (b->peer[i].n_out ? POLLOUT : 0)), 0};
        f[b->n_peer] = (struct pollfd){b->wake[0], POLLIN, 0};
        f[b->n_peer + 1] = (struct pollfd){b->listen_fd, POLLIN, 0};
        poll(f, (nfds_t)b->n_peer + 2, (int)(1000 * b->period / 2));
        const double now = lsa_now_s();
        read_all(b, f, now);
        if (now - before > b->deadline / 2) /* we were stopped ourselves: give the others their time */
            for (int i = 0; i < b->n_peer; i++)
                b->peer[i].heard = b->peer[i].moved = b->peer[i].entered = now;
        before = now;
        if (f[b->n_peer + 1].revents & POLLIN) welcome(b, now);
        pthread_mutex_lock(&b->lock);
        const bool closing = b->closing;
        pthread_mutex_unlock(&b->lock);
        if (closing) break;
        if (now - last_beat >= b->period) {
            own_state(b, now, &beat);
            for (int i = 0; i < b->n_peer; i++) put(&b->peer[i], &beat);
            last_beat = now;
        }
        for (int i = 0; i < b->n_peer; i++) flush(&b->peer[i]);
        for (int i = 0; i < b->n_peer && !judged(b); i++)
            if (i != b->rank || b->rank > 0) silent(b, &b->peer[i], now);
        if (b->rank == 0 && !judged(b)) late(b, now);
        watch_main(b, now);
    }
    end(b);
    lsa_free(f);
    return NULL;
}

/* ---- opening and closing ---- */

static void destroy(lsa_beat *b) {
    if (!b) return;
    for (int i = 0; b->peer && i < b->n_peer; i++)
        if (b->peer[i].fd >= 0) close(b->peer[i].fd);
    if (b->listen_fd >= 0) close(b->listen_fd);
    for (int i = 0; i < 2; i++)
        if (b->wake[i] >= 0) close(b->wake[i]);
    pthread_mutex_destroy(&b->lock);
    pthread_cond_destroy(&b->news);
    lsa_free(b->peer);
    lsa_free(b);
}

static lsa_status create(lsa_beat **out, int rank, int size, double deadline_s,
                         void (*stuck)(const lsa_err *), lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_beat *b = NULL;
    LSA_TRY(LSA_NEW(b, 1, err));
    b->listen_fd = b->wake[0] = b->wake[1] = -1;
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->news, NULL);
    b->rank = rank;
    b->size = size;
    b->deadline = deadline_s;
    b->period = deadline_s < 8 ? deadline_s / 8 : 1.0;
    b->stuck = stuck;
    b->n_peer = rank == 0 ? size : 1;
    b->me = (msg){.magic = MAGIC, .rank = rank, .pid = (int32_t)getpid()};
    gethostname(b->me.host, sizeof b->me.host - 1);
    LSA_TRY(LSA_NEW(b->peer, b->n_peer, err));
    for (int i = 0; i < b->n_peer; i++) b->peer[i] = (peer){.fd = -1, .rank = i};
    if (pipe2(b->wake, O_CLOEXEC | O_NONBLOCK) != 0)
        LSA_FAIL(LSA_E_IO, "cannot make a pipe: %s", strerror(errno));
    *out = b;
    b = NULL;
done:
    destroy(b);
    return st;
}

static lsa_status start(lsa_beat *b, lsa_err *err) {
    if (pthread_create(&b->thread, NULL, watch, b) != 0)
        LSA_RET_FAIL(LSA_E_NOMEM, "cannot start the thread that watches the ranks");
    b->running = true;
    return LSA_OK;
}

void lsa_beat_addresses(lsa_beat_address *w) {
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all) != 0) return;
    for (int pass = 0; pass < 2; pass++)
        for (struct ifaddrs *a = all; a && w->n_addr < LSA_BEAT_ADDRESSES; a = a->ifa_next) {
            const int family = a->ifa_addr ? a->ifa_addr->sa_family : AF_UNSPEC;
            const bool loopback = a->ifa_flags & IFF_LOOPBACK;
            if (family != AF_INET || !(a->ifa_flags & IFF_UP) || loopback != (pass == 1)) continue;
            if (getnameinfo(a->ifa_addr, sizeof(struct sockaddr_in), w->addr[w->n_addr], sizeof w->addr[0],
                            NULL, 0, NI_NUMERICHOST) == 0)
                w->n_addr++;
        }
    freeifaddrs(all);
}

lsa_status lsa_beat_listen(lsa_beat **out, lsa_beat_address *where, int size, double deadline_s,
                           void (*stuck)(const lsa_err *), lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_beat *b = NULL;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY)};
    socklen_t n = sizeof a;
    *out = NULL;
    memset(where, 0, sizeof *where);
    LSA_TRY(create(&b, 0, size, deadline_s, stuck, err));
    b->listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (b->listen_fd < 0 || bind(b->listen_fd, (struct sockaddr *)&a, sizeof a) != 0 ||
        listen(b->listen_fd, size) != 0 || getsockname(b->listen_fd, (struct sockaddr *)&a, &n) != 0)
        LSA_FAIL(LSA_E_COMM, "rank 0 cannot listen for the other ranks: %s", strerror(errno));
    where->port = ntohs(a.sin_port);
    where->pid = b->me.pid;
    memcpy(where->host, b->me.host, sizeof where->host);
    if (getrandom(&where->token, sizeof where->token, 0) != (ssize_t)sizeof where->token)
        LSA_FAIL(LSA_E_IO, "no random bytes: %s", strerror(errno));
    lsa_beat_addresses(where);
    b->where = *where;
    b->me.token = where->token;
    b->peer[0].pid = b->me.pid;
    memcpy(b->peer[0].host, b->me.host, sizeof b->me.host);
    b->peer[0].heard = b->peer[0].moved = lsa_now_s();
    LSA_TRY(start(b, err));
    *out = b;
    b = NULL;
done:
    destroy(b);
    return st;
}

/* One try: connected and welcomed within two seconds. */
static bool join_at(lsa_beat *b, const char *addr, int port) {
    peer *const p = &b->peer[0];
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct pollfd f = {fd, POLLOUT, 0};
    msg hello = record(b, HELLO), m;
    int failed = 0, got = 0;
    socklen_t n = sizeof failed;
    if (fd < 0) return false;
    if (inet_pton(AF_INET, addr, &a.sin_addr) == 1 &&
        (connect(fd, (struct sockaddr *)&a, sizeof a) == 0 || errno == EINPROGRESS) &&
        poll(&f, 1, 2000) == 1 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &n) == 0 && failed == 0) {
        *p = (peer){.fd = fd};
        put(p, &hello);
        flush(p);
        f.events = POLLIN;
        while (got == 0 && poll(&f, 1, 2000) == 1) got = take(p, &m);
        if (got == 1 && m.kind == WELCOME && m.token == b->where.token) return true;
    }
    close(fd);
    p->fd = -1;
    return false;
}

lsa_status lsa_beat_join(lsa_beat **out, const lsa_beat_address *where, int rank, int size, double deadline_s,
                         void (*stuck)(const lsa_err *), lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_beat *b = NULL;
    bool in = false;
    *out = NULL;
    LSA_TRY(create(&b, rank, size, deadline_s, stuck, err));
    b->where = *where;
    b->me.token = where->token;
    const double until = lsa_now_s() + deadline_s;
    for (int k = 0; !in && (k < where->n_addr || lsa_now_s() < until); k++)
        in = where->n_addr && join_at(b, where->addr[k % where->n_addr], where->port);
    if (!in)
        LSA_FAIL(
            LSA_E_COMM,
            "rank %d on %s cannot reach rank 0 on %s by TCP, port %d (first address %s): is there a firewall "
            "between them?",
            rank, b->me.host, where->host, (int)where->port, where->n_addr ? where->addr[0] : "none");
    peer *const p = &b->peer[0];
    p->joined = true;
    p->pid = where->pid;
    memcpy(p->host, where->host, sizeof p->host);
    p->heard = lsa_now_s();
    LSA_TRY(start(b, err));
    *out = b;
    b = NULL;
done:
    destroy(b);
    return st;
}

void lsa_beat_close(lsa_beat *b, bool failed, lsa_status st, const char *text) {
    if (!b) return;
    pthread_mutex_lock(&b->lock);
    b->closing = true;
    b->failing = failed && !b->has_verdict;
    b->fail_code = st;
    snprintf(b->fail_text, sizeof b->fail_text, "%.*s", TEXT - 1, text ? text : "");
    pthread_mutex_unlock(&b->lock);
    if (write(b->wake[1], "", 1) < 0) { /* the thread looks by itself within half a period */
    }
    pthread_join(b->thread, NULL);
    destroy(b);
}

/* ---- the caller's side ---- */

void lsa_beat_enter(lsa_beat *b, const char *what) {
    if (!b) return;
    pthread_mutex_lock(&b->lock);
    b->me.seq++;
    b->me.waiting = 1;
    snprintf(b->me.doing, sizeof b->me.doing, "%s", what);
    pthread_mutex_unlock(&b->lock);
}
void lsa_beat_leave(lsa_beat *b) {
    if (!b) return;
    pthread_mutex_lock(&b->lock);
    b->me.waiting = 0;
    pthread_mutex_unlock(&b->lock);
}
void lsa_beat_tick(lsa_beat *b, const char *doing) {
    if (!b) return;
    pthread_mutex_lock(&b->lock);
    b->me.ticks++;
    snprintf(b->me.doing, sizeof b->me.doing, "%s", doing);
    pthread_mutex_unlock(&b->lock);
}

lsa_status lsa_beat_check(lsa_beat *b, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (!b) return st;
    pthread_mutex_lock(&b->lock);
    if (b->has_verdict) {
        b->told = true;
        st = b->verdict.code;
        if (err && err->code == LSA_OK) *err = b->verdict;
    }
    pthread_mutex_unlock(&b->lock);
    return st;
}

bool lsa_beat_await(lsa_beat *b, double seconds) {
    struct timespec t;
    if (!b) return false;
    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += (time_t)seconds;
    pthread_mutex_lock(&b->lock);
    while (!b->has_verdict && pthread_cond_timedwait(&b->news, &b->lock, &t) == 0) {
    }
    const bool has = b->has_verdict;
    pthread_mutex_unlock(&b->lock);
    return has;
}
