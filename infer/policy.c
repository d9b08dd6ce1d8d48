/* Policies and parts: see policy.h.
 *
 * The mistake that would stay silent: an interval that is off by one token or one fact. Answers are 16 tokens
 * (q+8..q+23), a fact is 25 (p..p+24), both ends included in the design's text and excluded at the right
 * here. */
#include "infer/policy.h"

#include <math.h>
#include <string.h>

#include "kernels/core/num.h"
#include "kernels/core/rng.h"

enum {
    FACT = 25,
    ANSWER_BEGIN = 8,
    ANSWER_END = 24,
    FAR = 512,
    REPLAY_SEEN = 16,
    SPREAD = 16,
    RANDOM_STREAM = 401
};

#define KNOWN "full, dense, lsa, oracle, recency, random, untrained, last, last-spread"
static const char *const NAME[] = {"full",   "dense",     "lsa",  "oracle",     "recency",
                                   "random", "untrained", "last", "last-spread"};

const char *lsa_policy_name(lsa_policy p) {
    return NAME[p];
}
bool lsa_policy_evicts(lsa_policy p) {
    return p != LSA_POLICY_FULL && p != LSA_POLICY_DENSE;
}
bool lsa_policy_learned(lsa_policy p) {
    return p == LSA_POLICY_LSA || p == LSA_POLICY_UNTRAINED;
}

lsa_status lsa_policy_parse(bool want[LSA_N_POLICY], const char *list, lsa_err *err) {
    const char *p = list;
    do {
        const size_t n = strcspn(p, ",");
        int k = 0;
        if (n == 5 && !strncmp(p, "quest", 5))
            LSA_RET_FAIL(LSA_E_UNSUPPORTED, "policy quest is not in this version; use " KNOWN);
        while (k < LSA_N_POLICY && (strlen(NAME[k]) != n || strncmp(p, NAME[k], n))) k++;
        if (k == LSA_N_POLICY)
            LSA_RET_FAIL(LSA_E_ARG, "--policy '%.*s' is unknown; expected " KNOWN, (int)n, p);
        want[k] = true;
        p += n;
    } while (*p++ == ',');
    return LSA_OK;
}

void lsa_policy_score(float *score, lsa_policy p, const lsa_policy_inputs *in, int64_t n) {
    switch (p) {
    case LSA_POLICY_ORACLE:
        memcpy(score, in->mass, (size_t)n * sizeof *score);
        return;
    case LSA_POLICY_RECENCY:
        for (int64_t c = 0; c < n; c++) score[c] = (float)c; /* exact up to 2^24 chunks, 67 M tokens */
        return;
    case LSA_POLICY_RANDOM: {
        lsa_rng g =
            lsa_rng_make(lsa_mix64(in->seed, RANDOM_STREAM), lsa_mix64((uint64_t)in->doc, (uint64_t)in->s));
        for (int64_t c = 0; c < n; c++) score[c] = lsa_rng_uniform(&g);
        return;
    }
    case LSA_POLICY_LAST:
        memcpy(score, in->last, (size_t)n * sizeof *score);
        return;
    case LSA_POLICY_LAST_SPREAD:
        memcpy(score, in->last, (size_t)n * sizeof *score);
        for (int64_t c = 0; c < n; c++)
            for (int64_t k = 1; in->last[c] > 0.0f && k <= SPREAD && c + k < n; k++)
                score[c + k] = fmaxf(score[c + k], in->last[c] - 1e-3f * (float)k);
        return;
    default:
        memset(score, 0, (size_t)n * sizeof *score);
        return;
    }
}

static void mark(uint8_t *part, int64_t n, int64_t a, int64_t b, int bit, bool set) {
    for (int64_t t = lsa_max_i64(a, 1); t < lsa_min_i64(b, n); t++)
        part[t] = (uint8_t)(set ? part[t] | 1u << bit : part[t] & ~(1u << bit));
}

void lsa_token_parts(uint8_t *part, const lsa_doc *d) {
    const int64_t n = d->n_token;
    memset(part, 0, (size_t)n);
    mark(part, n, 1, n, LSA_PART_ALL, true);
    if (!d->has_needs) return;
    mark(part, n, n / 2, n, LSA_PART_OTHER, true);
    for (int64_t i = 0; i < d->n_fact; i++) {
        const int64_t p = d->fact[i].statement, q = d->fact[i].question;
        mark(part, n, p, p + FACT, LSA_PART_OTHER, false);
        mark(part, n, q, q + FACT, LSA_PART_OTHER, false);
        if (q - p > FAR) mark(part, n, q + ANSWER_BEGIN, q + ANSWER_END, LSA_PART_ANSWER, true);
    }
    for (int64_t i = 0; i < d->n_replay; i++) {
        const lsa_replay *r = &d->replay[i];
        mark(part, n, r->dest, r->dest + r->len, LSA_PART_OTHER, false);
        mark(part, n, r->dest + REPLAY_SEEN, r->dest + r->len, LSA_PART_REPLAY, true);
    }
}
