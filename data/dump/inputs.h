/* What a dump reads, short of the weights: config.json, the documents, the rule; and the plan that follows.
 */
#ifndef LSA_DATA_DUMP_INPUTS_H
#define LSA_DATA_DUMP_INPUTS_H

#include "data/dump/plan.h"

typedef struct lsa_dump_inputs {
    lsa_teacher_config c;
    lsa_docs *docs;     /* NULL if only lengths are known */
    int64_t *length;    /* [load.n] */
    lsa_dump_load load; /* points into this struct: do not move it */
} lsa_dump_inputs;

/* lengths: "COUNTxTOKENS,..." instead of o->tokens, or NULL. */
LSA_NODISCARD lsa_status lsa_dump_inputs_open(lsa_dump_inputs *in, const lsa_dump_opts *o,
                                              const char *lengths, lsa_err *err);
void lsa_dump_inputs_close(lsa_dump_inputs *in);

/* Costs, free disk at `out`, and the host budget: o->host_budget, or this machine's memory. */
LSA_NODISCARD lsa_status lsa_dump_inputs_plan(lsa_dump_plan *p, const lsa_dump_inputs *in,
                                              const lsa_dump_opts *o, const char *out, lsa_err *err);

/* Reads the first tokens of `doc` with statistics, and scales by FLOPs to documents first..load.n-1. */
LSA_NODISCARD lsa_status lsa_dump_measure(lsa_dump_plan *p, const lsa_reader *r, const lsa_dump_inputs *in,
                                          const lsa_doc *doc, int64_t first, lsa_err *err);

/* lsa-dump plan: prints it (json: one line), then refuses what does not fit. Nothing is written; weights are
 * loaded only to measure, if they are there and fit. */
LSA_NODISCARD lsa_status lsa_dump_plan_command(const lsa_dump_opts *o, const char *lengths, const char *out,
                                               bool json, lsa_err *err);

#endif
