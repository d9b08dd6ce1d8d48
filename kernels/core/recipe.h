/* Recipes: YAML read through libcyaml by one key table (type, range, default, help). Scalars load as strings
 * and the table checks them, because libcyaml alone would read `1e3` as the integer 1. Unknown keys are
 * refused with the nearest known one. */
#ifndef LSA_KERNELS_CORE_RECIPE_H
#define LSA_KERNELS_CORE_RECIPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/core/json.h"
#include "kernels/core/lsa_status.h"

typedef enum lsa_key_type {
    LSA_KEY_I64,
    LSA_KEY_F64,
    LSA_KEY_BOOL,
    LSA_KEY_CHOICE,
    LSA_KEY_TEXT
} lsa_key_type;

#define LSA_KEY_TEXT_MAX 128
typedef struct lsa_key {
    const char *name; /* "section.key" */
    lsa_key_type type;
    const char *dflt;    /* as it would be written in YAML */
    double lo, hi;       /* numbers */
    const char *choices; /* "a|b|c": the value is stored as the index, int64 */
    size_t offset;       /* of the value in the recipe struct: int64_t, double, bool, int64_t (index),
                            char[LSA_KEY_TEXT_MAX] */
    const char *help;
} lsa_key;

/* out = defaults, then the file (NULL: none), then "key=value" overrides. LSA_E_CONFIG names key, value, what
 * is allowed. */
LSA_NODISCARD lsa_status lsa_recipe_load(void *out, const lsa_key *keys, int n_key, const char *path,
                                         const char *const *set, int n_set, lsa_err *err);
/* Only the overrides, onto a recipe that is already there. */
LSA_NODISCARD lsa_status lsa_recipe_set(void *out, const lsa_key *keys, int n_key, const char *const *set,
                                        int n_set, lsa_err *err);
/* The same as lsa_recipe_load from memory (fuzzing, tests). */
LSA_NODISCARD lsa_status lsa_recipe_parse(void *out, const lsa_key *keys, int n_key, const char *text,
                                          size_t n, const char *where, lsa_err *err);
/* Resolved recipe as YAML text (help: with comments), to be freed by lsa_free; and as flat JSON
 * {"section.key": "value"}. */
LSA_NODISCARD lsa_status lsa_recipe_text(char **out, const void *recipe, const lsa_key *keys, int n_key,
                                         bool help, lsa_err *err);
json_t *lsa_recipe_json(const void *recipe, const lsa_key *keys, int n_key);
LSA_NODISCARD lsa_status lsa_recipe_from_json(void *out, const lsa_key *keys, int n_key, const json_t *o,
                                              const char *where, lsa_err *err);

#endif
