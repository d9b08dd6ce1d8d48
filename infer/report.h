/* What a validation says: a table for people, one JSON line per policy and budget, report.json and a
 * self-contained report.html. */
#ifndef LSA_INFER_REPORT_H
#define LSA_INFER_REPORT_H

#include "infer/validate.h"
#include "kernels/core/json.h"

/* One row with the documented keys; parts are null without needs, captured is null where nothing can be
 * evicted. full: the row of the full policy, for differences; may be NULL. */
json_t *lsa_report_row(const lsa_result *r, const lsa_result *full);
void lsa_report_table(const lsa_validation *v);

typedef struct lsa_report_about {
    const char *teacher, *tokens, *indexer; /* indexer may be NULL */
    int64_t documents, longest;
    const lsa_validate_opts *opts;
} lsa_report_about;
/* Writes dir/report.json and dir/report.html, each atomically. */
LSA_NODISCARD lsa_status lsa_report_write(const lsa_validation *v, const lsa_report_about *a, const char *dir,
                                          lsa_err *err);

#endif
