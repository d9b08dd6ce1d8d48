/* Does it fit, and if not, what would make it fit: every suggestion is tried on the same sums before it is
 * made. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/dump/plan.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

#define GIB 0x1p30

typedef struct advice {
    const lsa_dump_plan *p;
    const lsa_dump_load *l;
    int64_t limit;
    bool disk; /* else host memory */
    char text[420];
} advice;

static bool fits(const advice *a, const lsa_dump_load *l) {
    lsa_dump_plan p = *a->p;
    return lsa_dump_bytes(&p, l, NULL) == LSA_OK && (a->disk ? p.disk_bytes : p.host_bytes) <= a->limit;
}

LSA_PRINTF(2, 3)
static void say(advice *a, const char *fmt, ...) {
    va_list ap;
    const size_t at = strlen(a->text);
    int n = snprintf(a->text + at, sizeof a->text - at, at ? ", " : "");
    va_start(ap, fmt);
    vsnprintf(a->text + at + (size_t)n, sizeof a->text - at - (size_t)n, fmt, ap);
    va_end(ap);
}

static void try_stats(advice *a) {
    lsa_dump_load l = *a->l;
    l.rule.stats = false;
    if (a->l->rule.stats && fits(a, &l)) say(a, "--no-stats");
}

static void try_dense(advice *a) {
    lsa_dump_load l = *a->l;
    l.rule.dense_every = 0;
    if (a->l->rule.dense_every && fits(a, &l)) say(a, "--dense-every 0");
}

static void try_stride(advice *a) {
    lsa_dump_load l = *a->l;
    while (l.rule.hidden_stride < 65536) {
        l.rule.hidden_stride = (int32_t)lsa_min_i64(65536, 2 * (int64_t)l.rule.hidden_stride);
        if (!fits(a, &l)) continue;
        say(a, "--hidden-stride %d", l.rule.hidden_stride);
        return;
    }
}

/* The most CSA layers, of those now kept, whose keys and hidden vectors fit. */
static void try_layers(advice *a) {
    lsa_dump_load l = *a->l;
    int32_t keep = 0;
    for (int32_t o = 0; o < l.c->n_csa; o++) keep += l.rule.has_keys[o];
    for (int32_t o = l.c->n_csa; o-- > 0 && keep > 1;) {
        if (!l.rule.has_keys[o]) continue;
        l.rule.has_keys[o] = false;
        keep--;
        if (!fits(a, &l)) continue;
        say(a, "--layers with %d of them", keep);
        return;
    }
}

static void try_documents(advice *a) {
    int64_t lo = 0, hi = a->l->n; /* lo fits, hi does not */
    while (hi - lo > 1) {
        lsa_dump_load l = *a->l;
        l.n = lo + (hi - lo) / 2;
        *(fits(a, &l) ? &lo : &hi) = l.n;
    }
    if (lo) say(a, "the first %lld of %lld --documents", (long long)lo, (long long)a->l->n);
}

static void try_shards(advice *a) {
    lsa_dump_load l = *a->l;
    while (l.shard_bytes > INT64_C(1) << 20) {
        l.shard_bytes /= 2;
        if (!fits(a, &l)) continue;
        say(a, "--shard-bytes %lldK", (long long)(l.shard_bytes >> 10));
        return;
    }
}

/* Longer documents cut off. */
static lsa_status try_lengths(advice *a, lsa_err *err) {
    int64_t lo = 0, hi = a->p->longest, *cut = NULL; /* lo fits, hi does not */
    const lsa_status st = LSA_NEW(cut, a->l->n, err);
    while (st == LSA_OK && hi - lo > 1) {
        lsa_dump_load l = *a->l;
        const int64_t mid = lo + (hi - lo) / 2;
        for (int64_t i = 0; i < l.n; i++) cut[i] = lsa_min_i64(l.length[i], mid);
        l.length = cut;
        *(fits(a, &l) ? &lo : &hi) = mid;
    }
    if (lo) say(a, "documents of at most %lld tokens", (long long)lo);
    lsa_free(cut);
    return st;
}

static lsa_status refuse_disk(const lsa_dump_plan *p, const lsa_dump_load *l, const char *out, lsa_err *err) {
    advice a = {.p = p, .l = l, .limit = p->disk_free, .disk = true};
    try_stats(&a);
    try_dense(&a);
    try_stride(&a);
    try_layers(&a);
    try_documents(&a);
    LSA_RET_FAIL(
        LSA_E_NOSPC,
        "the dump may need %.2f GiB, '%.200s' has %.2f GiB free; what would fit, each by itself: %s%sanother disk",
        (double)p->disk_bytes / GIB, out, (double)p->disk_free / GIB, a.text, *a.text ? ", " : "");
}

static lsa_status refuse_host(const lsa_dump_plan *p, const lsa_dump_load *l, lsa_err *err) {
    advice a = {.p = p, .l = l, .limit = p->host_budget};
    const double gib = (double)p->host_bytes / GIB, budget = (double)p->host_budget / GIB;
    if (p->host[LSA_HOST_WEIGHTS] > p->host_budget)
        LSA_RET_FAIL(
            LSA_E_NOMEM,
            "the weights alone take %.1f GiB of host memory in f32, the budget is %.1f GiB; only a GPU that they "
            "pass through layer by layer (run --device cuda --stream), a machine with more memory or a smaller "
            "teacher will do",
            (double)p->host[LSA_HOST_WEIGHTS] / GIB, budget);
    try_stats(&a);
    try_dense(&a);
    try_shards(&a);
    const lsa_status st = try_lengths(&a, err);
    if (st != LSA_OK) return st;
    LSA_RET_FAIL(
        LSA_E_NOMEM,
        "the dump may need %.2f GiB of host memory, the budget is %.2f GiB; what would fit, each by itself: "
        "%s%sa machine with more memory",
        gib, budget, a.text, *a.text ? ", " : "");
}

lsa_status lsa_dump_fits(const lsa_dump_plan *p, const lsa_dump_load *l, const char *out, lsa_err *err) {
    if (p->host_bytes > p->host_budget)
        return refuse_host(p, l, err); /* first: it may be beyond any option */
    if (p->disk_bytes > p->disk_free) return refuse_disk(p, l, out, err);
    return LSA_OK;
}

/* ---- --lengths ---- */

static bool number(int64_t *out, const char **at, int64_t hi) {
    char *end;
    errno = 0;
    const long long v = strtoll(*at, &end, 10);
    if (end == *at || **at < '0' || **at > '9' || errno || v < 1 || v > hi) return false;
    *out = v;
    *at = end;
    return true;
}

lsa_status lsa_dump_lengths(int64_t **length, int64_t *n, const char *text, lsa_err *err) {
    lsa_status st = LSA_OK;
    LSA_VEC(int64_t) v = {0};
    *length = NULL;
    for (const char *at = text;; at++) {
        int64_t count, tokens;
        if (!number(&count, &at, 100000000) || *at++ != 'x' || !number(&tokens, &at, INT64_C(1) << 31) ||
            (*at && *at != ',') || v.len + count > 100000000)
            LSA_FAIL(LSA_E_ARG, "--lengths '%.80s': expected COUNTxTOKENS, like 200x16384,8x1048576", text);
        LSA_TRY(LSA_VEC_RESERVE(v, v.len + count, err));
        while (count-- > 0) v.data[v.len++] = tokens;
        if (!*at) break;
    }
    *length = v.data;
    *n = v.len;
    v.data = NULL;
done:
    lsa_free(v.data);
    return st;
}
