/* The conventions that an engine may have wrong: one table for diagnose.h, for the golden file (where
 * check_indexer.py reads it) and, by a test, for EXPORT_FORMAT.md. */
#ifndef LSA_EXPORT_CONVENTION_H
#define LSA_EXPORT_CONVENTION_H

#include "export/chain.h"
#include "kernels/core/json.h"

typedef struct lsa_convention {
    const char *name, *text; /* told together: "name: text" */
    lsa_fault fault;         /* LSA_FAULT_NONE: not a matter of one layer's arithmetic */
    const char *setting;     /* the same fault in check_indexer.py */
    const char *told;        /* name of the value in messages; NULL: the value is not told */
    int n;
    double v[12]; /* wrong values to try */
} lsa_convention;

enum { LSA_CONVENTIONS = 25, LSA_LAYER_MAP = 23, LSA_NUMERIC_PATH = 24 };
extern const lsa_convention lsa_conventions[LSA_CONVENTIONS];

/* Value t as chain.h takes it: for a scale it depends on the number of heads. */
double lsa_convention_value(const lsa_convention *c, int t, int32_t n_head);

/* JSON text [[name, text, setting, [value, ...]], ...] for this geometry; free() releases it. */
LSA_NODISCARD lsa_status lsa_conventions_text(char **out, const lsa_indexer_geom *g, lsa_err *err);

#endif
