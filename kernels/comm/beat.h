/* The side channel that tells dead, silent and hung ranks apart: every rank keeps one TCP connection to rank
 * 0, watched by a thread of its own that does nothing else, so that it speaks while the rank computes and
 * falls silent when the process is stopped or cut off. Rank 0 judges and tells everybody; a rank that cannot
 * hear rank 0 judges that. No MPI in here. Thread-safe between the watching thread and one caller. */
#ifndef LSA_KERNELS_COMM_BEAT_H
#define LSA_KERNELS_COMM_BEAT_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

enum { LSA_BEAT_ADDRESSES = 12 };
/* Where rank 0 listens; travels to the others by the table's own means. */
typedef struct lsa_beat_address {
    uint64_t token; /* so that nobody else's connection counts */
    int32_t port, pid, n_addr;
    char host[64];
    char addr[LSA_BEAT_ADDRESSES][48];
} lsa_beat_address;

void lsa_beat_addresses(lsa_beat_address *w); /* fills n_addr and addr: this host's, loopback last */

typedef struct lsa_beat lsa_beat;
/* Rank 0: listens, fills *where, starts the thread. */
LSA_NODISCARD lsa_status lsa_beat_listen(lsa_beat **out, lsa_beat_address *where, int size, double deadline_s,
                                         void (*stuck)(const lsa_err *), lsa_err *err);
/* The others: connect, starts the thread. */
LSA_NODISCARD lsa_status lsa_beat_join(lsa_beat **out, const lsa_beat_address *where, int rank, int size,
                                       double deadline_s, void (*stuck)(const lsa_err *), lsa_err *err);
/* failed: tell the others st and text first; else say good-bye, which all ranks do. */
void lsa_beat_close(lsa_beat *b, bool failed, lsa_status st, const char *text);

/* All take NULL: one rank has no side channel. */
void lsa_beat_enter(lsa_beat *b, const char *what); /* into a collective; static text */
void lsa_beat_leave(lsa_beat *b);
void lsa_beat_tick(lsa_beat *b, const char *doing); /* progress outside collectives; static text */
LSA_NODISCARD lsa_status lsa_beat_check(lsa_beat *b, lsa_err *err); /* the verdict, if there is one */
bool lsa_beat_await(lsa_beat *b, double seconds);                   /* until there is one */

#endif
