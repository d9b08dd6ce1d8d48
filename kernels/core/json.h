/* Typed access to JSON over Jansson, with messages that name the object and the key.
 *
 * Getters: `where` names the document in messages. A missing key is an error unless the *_or form is used; a
 * key of the wrong type is always an error (LSA_E_FORMAT). Borrowed pointers live as long as the root. */
#ifndef LSA_KERNELS_CORE_JSON_H
#define LSA_KERNELS_CORE_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

/* Parse text or a file. Duplicate keys are refused. The caller json_decref()s *out. */
LSA_NODISCARD lsa_status lsa_json_parse(json_t **out, const char *text, size_t n, const char *where,
                                        lsa_err *err);
LSA_NODISCARD lsa_status lsa_json_load(json_t **out, const char *path, lsa_err *err);
/* Deterministic text (sorted keys, 2-space indent, trailing newline), committed atomically. */
LSA_NODISCARD lsa_status lsa_json_save(const json_t *root, const char *path, lsa_err *err);

LSA_NODISCARD lsa_status lsa_json_i64(int64_t *out, const json_t *o, const char *key, const char *where,
                                      lsa_err *err);
LSA_NODISCARD lsa_status lsa_json_f64(double *out, const json_t *o, const char *key, const char *where,
                                      lsa_err *err);
LSA_NODISCARD lsa_status lsa_json_str(const char **out, const json_t *o, const char *key, const char *where,
                                      lsa_err *err);
LSA_NODISCARD lsa_status lsa_json_array(json_t **out, const json_t *o, const char *key, const char *where,
                                        lsa_err *err);
LSA_NODISCARD lsa_status lsa_json_object(json_t **out, const json_t *o, const char *key, const char *where,
                                         lsa_err *err);
/* With a default for a missing key. */
LSA_NODISCARD lsa_status lsa_json_i64_or(int64_t *out, int64_t dflt, const json_t *o, const char *key,
                                         const char *where, lsa_err *err);
LSA_NODISCARD lsa_status lsa_json_f64_or(double *out, double dflt, const json_t *o, const char *key,
                                         const char *where, lsa_err *err);
/* An integer in [lo, hi]. */
LSA_NODISCARD lsa_status lsa_json_i64_in(int64_t *out, int64_t lo, int64_t hi, const json_t *o,
                                         const char *key, const char *where, lsa_err *err);

#endif
