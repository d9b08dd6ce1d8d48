/* The indexer's geometry <-> JSON: the string metadata "lsa.geometry" of model.safetensors and of the
 * exported file. */
#ifndef LSA_DATA_GEOM_JSON_H
#define LSA_DATA_GEOM_JSON_H

#include "kernels/core/json.h"
#include "kernels/core/lsa_status.h"
#include "kernels/model/indexer.h"

/* The caller json_decref()s *out. */
LSA_NODISCARD lsa_status lsa_geom_to_json(json_t **out, const lsa_indexer_geom *g, lsa_err *err);
/* Checked: LSA_E_FORMAT names `where` and the field. */
LSA_NODISCARD lsa_status lsa_geom_from_json(lsa_indexer_geom *g, const json_t *o, const char *where,
                                            lsa_err *err);

#endif
