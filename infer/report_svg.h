/* The drawings of a report, as inline SVG. Colours from a palette that the colour-blind can tell apart (Okabe
 * and Ito), and every line, bar and map carries its name, so colour never carries the meaning alone. Not
 * installed. */
#ifndef LSA_INFER_REPORT_SVG_H
#define LSA_INFER_REPORT_SVG_H

#include "kernels/core/page.h"
#include "infer/validate.h"
#include "kernels/core/json.h"

const char *lsa_policy_colour(const char *policy);

/* Readers of a report row (infer/report.h); a missing or null number is NaN. */
double lsa_row_num(const json_t *row, const char *key);
const char *lsa_row_text(const json_t *row, const char *key);
int lsa_row_budgets(double budget[LSA_MAX_BUDGET],
                    const json_t *rows); /* distinct, ascending; returns how many */

typedef struct lsa_chart {
    const char *id, *title, *note, *key;
    bool percent;     /* values are shares: shown times 100 */
    bool level;       /* draw `full` too, as a dashed level */
    bool low_is_good; /* order of the bars */
} lsa_chart;
/* `key` against budget, a line per policy; with a single budget, bars. Nothing if no row has the number. */
void lsa_svg_chart(page *p, const json_t *rows, const lsa_chart *c);

/* Cache per sequence: full against what one policy keeps at each budget, and the keys that level 1 still
 * reads. */
void lsa_svg_memory(page *p, const json_t *rows);

/* Where the resident chunks of `doc` lie over time; facts asked and spans replayed are marked. */
void lsa_svg_heat(page *p, const lsa_heat *h, const lsa_doc *doc);

#endif
