/* The page of a report: one file, inline CSS and SVG, no network. */
#ifndef LSA_INFER_REPORT_HTML_H
#define LSA_INFER_REPORT_HTML_H

#include "infer/report.h"

LSA_NODISCARD lsa_status lsa_report_html(const char *path, const json_t *rows, const lsa_validation *v,
                                         const lsa_report_about *a, lsa_err *err);

#endif
