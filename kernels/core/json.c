/* JSON getters: see json.h. */
#include "kernels/core/json.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/mem.h"

lsa_status lsa_json_parse(json_t **out, const char *text, size_t n, const char *where, lsa_err *err) {
    json_error_t e;
    *out = json_loadb(text, n, JSON_REJECT_DUPLICATES, &e);
    if (!*out)
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: not valid JSON: line %d, column %d: %s", where, e.line, e.column,
                     e.text);
    return LSA_OK;
}

lsa_status lsa_json_load(json_t **out, const char *path, lsa_err *err) {
    char *text = NULL;
    size_t n;
    *out = NULL;
    lsa_status st = lsa_read_file(&text, &n, path, err);
    if (st == LSA_OK) st = lsa_json_parse(out, text, n, path, err);
    lsa_free(text);
    return st;
}

lsa_status lsa_json_save(const json_t *root, const char *path, lsa_err *err) {
    char *text = json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    if (!text) LSA_RET_FAIL(LSA_E_NOMEM, "cannot format JSON for '%s'", path);
    size_t n = strlen(text);
    text[n] = '\n'; /* replaces the terminator: n + 1 bytes are written, the string is not used again */
    lsa_status st = lsa_write_file(path, text, n + 1, err);
    free(text);
    return st;
}

static lsa_status need(json_t **v, const json_t *o, const char *key, bool ok_missing, const char *where,
                       lsa_err *err) {
    if (!json_is_object(o)) LSA_RET_FAIL(LSA_E_FORMAT, "%s: expected an object that holds '%s'", where, key);
    *v = json_object_get(o, key);
    if (!*v && !ok_missing) LSA_RET_FAIL(LSA_E_FORMAT, "%s: key '%s' is missing", where, key);
    return LSA_OK;
}

#define GET(ok_missing)                                                                                      \
    json_t *v = NULL;                                                                                        \
    lsa_status st = need(&v, o, key, ok_missing, where, err);                                                \
    if (st != LSA_OK) return st;
#define WANT(test, type)                                                                                     \
    if (!(test)) LSA_RET_FAIL(LSA_E_FORMAT, "%s: key '%s' must be %s", where, key, type);

lsa_status lsa_json_i64(int64_t *out, const json_t *o, const char *key, const char *where, lsa_err *err) {
    *out = 0;
    GET(false)
    WANT(json_is_integer(v), "an integer")
    *out = (int64_t)json_integer_value(v);
    return LSA_OK;
}

lsa_status lsa_json_f64(double *out, const json_t *o, const char *key, const char *where, lsa_err *err) {
    *out = 0;
    GET(false)
    WANT(json_is_number(v), "a number")
    *out = json_number_value(v);
    return LSA_OK;
}

lsa_status lsa_json_str(const char **out, const json_t *o, const char *key, const char *where, lsa_err *err) {
    *out = NULL;
    GET(false)
    WANT(json_is_string(v), "a string")
    *out = json_string_value(v);
    return LSA_OK;
}

lsa_status lsa_json_array(json_t **out, const json_t *o, const char *key, const char *where, lsa_err *err) {
    *out = NULL;
    GET(false)
    WANT(json_is_array(v), "an array")
    *out = v;
    return LSA_OK;
}

lsa_status lsa_json_object(json_t **out, const json_t *o, const char *key, const char *where, lsa_err *err) {
    *out = NULL;
    GET(false)
    WANT(json_is_object(v), "an object")
    *out = v;
    return LSA_OK;
}

lsa_status lsa_json_i64_or(int64_t *out, int64_t dflt, const json_t *o, const char *key, const char *where,
                           lsa_err *err) {
    *out = dflt;
    GET(true)
    if (!v || json_is_null(v)) return LSA_OK;
    return lsa_json_i64(out, o, key, where, err);
}

lsa_status lsa_json_f64_or(double *out, double dflt, const json_t *o, const char *key, const char *where,
                           lsa_err *err) {
    *out = dflt;
    GET(true)
    if (!v || json_is_null(v)) return LSA_OK;
    return lsa_json_f64(out, o, key, where, err);
}

lsa_status lsa_json_i64_in(int64_t *out, int64_t lo, int64_t hi, const json_t *o, const char *key,
                           const char *where, lsa_err *err) {
    lsa_status st = lsa_json_i64(out, o, key, where, err);
    if (st == LSA_OK && (*out < lo || *out > hi)) {
        int64_t found = *out;
        *out = 0;
        LSA_RET_FAIL(LSA_E_FORMAT, "%s: key '%s' must be in [%lld, %lld], found %lld", where, key,
                     (long long)lo, (long long)hi, (long long)found);
    }
    return st;
}
