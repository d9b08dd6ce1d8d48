/* Collectives: see comm.h. Opening order: the table, then the program's version (the first collective, so
 * that another program is named before its messages are misread), then the side channel. */
#include "kernels/comm/comm.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/comm/table.h"
#include "kernels/core/hash.h"
#include "kernels/core/mem.h"
#include "kernels/core/version.h"

enum { SELF, MPI, FILE_TABLE };
static const char FILE_PREFIX[] = "file:";

/* Which table "auto" and the launcher mean. */
static lsa_status choose(int *table, const lsa_comm_opts *o, lsa_err *err) {
    const lsa_launch *l = &o->launch;
    const bool is_auto = !strcmp(o->ranks, "auto"), is_mpi = !strcmp(o->ranks, "mpi"),
               is_file = !strncmp(o->ranks, FILE_PREFIX, sizeof FILE_PREFIX - 1);
    *table = is_file ? FILE_TABLE : is_mpi || (is_auto && l->mpi && l->size > 1) ? MPI : SELF;
    if ((!is_auto && !is_mpi && !is_file && strcmp(o->ranks, "self")) ||
        (is_file && !o->ranks[sizeof FILE_PREFIX - 1]))
        LSA_RET_FAIL(LSA_E_ARG, "--ranks '%.40s': expected auto, self, mpi or file:PATH", o->ranks);
    if (!(o->deadline_s >= 1 && o->deadline_s <= 86400))
        LSA_RET_FAIL(LSA_E_ARG, "--deadline %g: must be in [1, 86400] seconds", o->deadline_s);
    if (is_auto && !l->mpi && l->size > 1)
        LSA_RET_FAIL(
            LSA_E_ARG,
            "%s started %d processes, which have not been told how to find each other: --ranks file:PATH names a file in a folder "
            "that all see; or start them with mpirun or 'srun --mpi=pmix'; or pass --ranks self if each is a run of its own",
            l->by, l->size);
    if (is_file && l->size < 2)
        LSA_RET_FAIL(
            LSA_E_ARG,
            "--ranks %.60s, but nothing says which of how many ranks this process is: set RANK and WORLD_SIZE (torchrun and srun do)",
            o->ranks);
    return LSA_OK;
}

/* ---- meeting: until the side channel stands nobody watches, and tables wait for ever ---- */

typedef struct meeting {
    const lsa_comm_opts *o;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool watched, met;
} meeting;

static void *watch(void *arg) {
    meeting *const m = arg;
    const double limit = LSA_COMM_MEET * m->o->deadline_s;
    struct timespec until;
    bool late = false;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)limit;
    pthread_mutex_lock(&m->lock);
    while (!m->met && !late) late = pthread_cond_timedwait(&m->changed, &m->lock, &until) != 0;
    late = late && !m->met;
    pthread_mutex_unlock(&m->lock);
    if (late) {
        lsa_err why = {0};
        char host[64] = "?";
        gethostname(host, sizeof host - 1);
        lsa_err_set(
            &why, LSA_E_COMM, __FILE__, __LINE__,
            "rank %d of %d (%s, started by %s) has not met the others within %.0f s: one of them has not started, does not see the file "
            "(--ranks file:PATH), or the network does not reach it (with Open MPI: OMPI_MCA_btl_tcp_if_include names the interface); "
            "--deadline raises this limit",
            m->o->launch.rank, m->o->launch.size, host, m->o->launch.by, limit);
        m->o->stuck(&why);
    }
    return NULL;
}

/* Without the thread opening goes on unwatched. */
static void meeting_begin(meeting *m, const lsa_comm_opts *o) {
    pthread_condattr_t a;
    *m = (meeting){.o = o};
    pthread_mutex_init(&m->lock, NULL);
    pthread_condattr_init(&a);
    pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    pthread_cond_init(&m->changed, &a);
    pthread_condattr_destroy(&a);
    m->watched = o->stuck && pthread_create(&m->thread, NULL, watch, m) == 0;
}
static void meeting_end(meeting *m) {
    pthread_mutex_lock(&m->lock);
    m->met = true;
    pthread_cond_signal(&m->changed);
    pthread_mutex_unlock(&m->lock);
    if (m->watched) pthread_join(m->thread, NULL);
    pthread_cond_destroy(&m->changed);
    pthread_mutex_destroy(&m->lock);
}

static lsa_status open_beat(lsa_comm *c, const lsa_comm_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_beat_address where = {0};
    if (c->rank == 0) LSA_TRY(lsa_beat_listen(&c->beat, &where, c->size, c->deadline_s, o->stuck, err));
    LSA_TRY(lsa_comm_broadcast(c, &where, sizeof where, err));
    if (c->rank > 0) LSA_TRY(lsa_beat_join(&c->beat, &where, c->rank, c->size, c->deadline_s, o->stuck, err));
    LSA_TRY(lsa_comm_barrier(c, err));
done:
    return st;
}

static lsa_status meet(lsa_comm *c, int table, const lsa_comm_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    const char *v = lsa_version_text();
    if (table == FILE_TABLE)
        LSA_TRY(lsa_comm_file_open(c, o->ranks + sizeof FILE_PREFIX - 1, &o->launch, err));
    else
        LSA_TRY(lsa_comm_mpi_open(c, err));
    if (o->launch.local_rank >= 0) c->local_rank = o->launch.local_rank;
    LSA_TRY(lsa_comm_agree(c, "the program (version, commit or features)", lsa_xxh64(v, strlen(v)),
                           LSA_E_CONFIG, err));
    if (c->size > 1) LSA_TRY(open_beat(c, o, err));
done:
    return st;
}

lsa_status lsa_comm_open(lsa_comm **out, const lsa_comm_opts *o, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_comm *c = NULL;
    int table;
    *out = NULL;
    LSA_TRY(choose(&table, o, err));
    LSA_TRY(LSA_NEW(c, 1, err));
    c->t = &lsa_comm_self;
    c->size = 1;
    c->local_rank = o->launch.local_rank > 0 ? o->launch.local_rank : 0;
    c->deadline_s = o->deadline_s;
    if (table != SELF) {
        meeting m;
        meeting_begin(&m, o);
        st = meet(c, table, o, err);
        meeting_end(&m);
        if (st != LSA_OK) goto done;
    }
    snprintf(c->text, sizeof c->text, "%d rank%s over %s", c->size, c->size > 1 ? "s" : "", c->t->name);
    *out = c;
    c = NULL;
done:
    lsa_comm_close(c, st, err);
    return st;
}

void lsa_comm_close(lsa_comm *c, lsa_status st, const lsa_err *err) {
    if (!c) return;
    bool together = st == LSA_OK || st == LSA_E_INTERRUPTED;
    if (together && c->size > 1) together = lsa_comm_barrier(c, NULL) == LSA_OK;
    lsa_beat_close(c->beat, !together, st, err ? err->msg : "");
    c->t->close(c, together);
    lsa_free(c);
}

int lsa_comm_rank(const lsa_comm *c) {
    return c->rank;
}
int lsa_comm_size(const lsa_comm *c) {
    return c->size;
}
int lsa_comm_local_rank(const lsa_comm *c) {
    return c->local_rank;
}
bool lsa_comm_is_self(const lsa_comm *c) {
    return c->t == &lsa_comm_self;
}
const char *lsa_comm_describe(const lsa_comm *c) {
    return c->text;
}
void lsa_comm_tick(lsa_comm *c, const char *doing) {
    lsa_beat_tick(c->beat, doing);
}
void lsa_comm_enter(lsa_comm *c, const char *what) {
    lsa_beat_enter(c->beat, what);
}
void lsa_comm_leave(lsa_comm *c) {
    lsa_beat_leave(c->beat);
}
lsa_status lsa_comm_check(lsa_comm *c, lsa_err *err) {
    return lsa_beat_check(c->beat, err);
}

lsa_status lsa_comm_all_gather(lsa_comm *c, const void *in, void *out, int64_t n_bytes, lsa_err *err) {
    return c->t->all_gather(c, in, out, n_bytes, err);
}
lsa_status lsa_comm_all_gather_f32(lsa_comm *c, float *x, const int64_t *begin, lsa_err *err) {
    return c->t->all_gather_f32(c, x, begin, err);
}
lsa_status lsa_comm_gather_f32(lsa_comm *c, const float *mine, float *out, const int64_t *begin,
                               lsa_err *err) {
    return c->t->gather_f32(c, mine, out, begin, err);
}
lsa_status lsa_comm_broadcast(lsa_comm *c, void *data, int64_t n_bytes, lsa_err *err) {
    return c->t->broadcast(c, data, n_bytes, err);
}
lsa_status lsa_comm_reduce_scatter(lsa_comm *c, float *const *part, int n_part, const int64_t *begin,
                                   float *out, lsa_err *err) {
    return c->t->reduce_scatter(c, part, n_part, begin, out, err);
}

lsa_status lsa_comm_barrier(lsa_comm *c, lsa_err *err) {
    bool ignored = false;
    return lsa_comm_any(c, &ignored, err);
}

lsa_status lsa_comm_any(lsa_comm *c, bool *flag, lsa_err *err) {
    lsa_status st = LSA_OK;
    uint8_t mine = *flag, *all = NULL;
    LSA_TRY(LSA_NEW(all, c->size, err));
    LSA_TRY(lsa_comm_all_gather(c, &mine, all, 1, err));
    for (int i = 0; i < c->size; i++) *flag = *flag || all[i];
done:
    lsa_free(all);
    return st;
}

lsa_status lsa_comm_agree(lsa_comm *c, const char *what, uint64_t hash, lsa_status code, lsa_err *err) {
    lsa_status st = LSA_OK;
    uint64_t *all = NULL;
    char text[160] = "";
    int most = 0, n_most = 0, n_differ = 0;
    size_t at = 0;
    LSA_TRY(LSA_NEW(all, c->size, err));
    LSA_TRY(lsa_comm_all_gather(c, &hash, all, sizeof hash, err));
    for (int i = 0; i < c->size; i++) { /* the value of most ranks; ties: that of the lowest */
        int n = 0;
        for (int j = 0; j < c->size; j++) n += all[j] == all[i];
        if (n > n_most) most = i, n_most = n;
    }
    for (int i = 0; i < c->size; i++) {
        if (all[i] == all[most]) continue;
        if (at + 16 < sizeof text)
            at += (size_t)snprintf(text + at, sizeof text - at, "%s%d", n_differ ? ", " : "", i);
        n_differ++;
    }
    if (n_differ)
        LSA_FAIL(
            code,
            "%s of rank%s %s differs from that of rank %d (%d of %d ranks differ); all ranks must have the same",
            what, n_differ > 1 ? "s" : "", text, most, n_differ, c->size);
done:
    lsa_free(all);
    return st;
}
