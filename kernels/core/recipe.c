/* Recipes: see recipe.h. The cyaml schema is made from the key table at run time: a mapping of sections, each
 * a mapping of optional strings. */
#include "kernels/core/recipe.h"

#include <limits.h>
#include <cyaml/cyaml.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/log.h"
#include "kernels/core/mem.h"

enum { MAX_KEY = 96, MAX_SECTION = 16 };

/* ---- one value ---- */

static lsa_status bad(const lsa_key *k, const char *v, const char *want, const char *where, lsa_err *err) {
    LSA_RET_FAIL(LSA_E_CONFIG, "%s: %s must be %s, found '%.80s'", where, k->name, want, v);
}

static lsa_status set_value(void *recipe, const lsa_key *k, const char *v, const char *where, lsa_err *err) {
    char want[192], *end;
    void *dst = (char *)recipe + k->offset;
    errno = 0;
    switch (k->type) {
    case LSA_KEY_I64: {
        long long x = strtoll(v, &end, 10);
        snprintf(want, sizeof want, "an integer in [%.0f, %.0f]", k->lo, k->hi);
        if (errno || end == v || *end || (double)x < k->lo || (double)x > k->hi)
            return bad(k, v, want, where, err);
        memcpy(dst, &(int64_t){x}, sizeof(int64_t));
        return LSA_OK;
    }
    case LSA_KEY_F64: {
        double x = strtod(v, &end);
        snprintf(want, sizeof want, "a number in [%g, %g]", k->lo, k->hi);
        if (end == v || *end || !(x >= k->lo && x <= k->hi)) return bad(k, v, want, where, err);
        memcpy(dst, &x, sizeof x);
        return LSA_OK;
    }
    case LSA_KEY_BOOL: {
        bool yes = !strcmp(v, "true"), no = !strcmp(v, "false");
        if (!yes && !no) return bad(k, v, "true or false", where, err);
        memcpy(dst, &yes, sizeof yes);
        return LSA_OK;
    }
    case LSA_KEY_CHOICE: {
        int64_t i = 0;
        size_t n = strlen(v);
        for (const char *p = k->choices;; i++) {
            size_t m = strcspn(p, "|");
            if (m == n && !strncmp(p, v, n)) {
                memcpy(dst, &i, sizeof i);
                return LSA_OK;
            }
            if (!p[m]) break;
            p += m + 1;
        }
        snprintf(want, sizeof want, "one of %s", k->choices);
        return bad(k, v, want, where, err);
    }
    case LSA_KEY_TEXT:
        for (const char *c = v; *c; c++) /* what YAML could fold or break when it is written out again */
            if (*c < 0x20 || *c > 0x7e) return bad(k, v, "printable ASCII", where, err);
        if (strlen(v) >= LSA_KEY_TEXT_MAX) return bad(k, v, "shorter than 128 characters", where, err);
        snprintf(dst, LSA_KEY_TEXT_MAX, "%s", v);
        return LSA_OK;
    }
    return LSA_E_BUG;
}

static void get_value(char *buf, size_t n, const void *recipe, const lsa_key *k) {
    const void *src = (const char *)recipe + k->offset;
    int64_t i;
    double x;
    bool b;
    switch (k->type) {
    case LSA_KEY_I64:
        memcpy(&i, src, sizeof i);
        snprintf(buf, n, "%lld", (long long)i);
        return;
    case LSA_KEY_F64:
        memcpy(&x, src, sizeof x);
        snprintf(buf, n, "%.17g", x);
        for (int p = 1; p < 17; p++) { /* the shortest text that reads back as the same number */
            char s[64];
            snprintf(s, sizeof s, "%.*g", p, x);
            if (strtod(s, NULL) == x) {
                snprintf(buf, n, "%s", s);
                return;
            }
        }
        return;
    case LSA_KEY_BOOL:
        memcpy(&b, src, sizeof b);
        snprintf(buf, n, "%s", b ? "true" : "false");
        return;
    case LSA_KEY_CHOICE: {
        memcpy(&i, src, sizeof i);
        const char *p = k->choices;
        while (i-- > 0) p += strcspn(p, "|") + 1;
        snprintf(buf, n, "%.*s", (int)strcspn(p, "|"), p);
        return;
    }
    case LSA_KEY_TEXT:
        snprintf(buf, n, "%s", (const char *)src);
        return;
    }
}

/* ---- names ---- */

static const lsa_key *find_key(const lsa_key *keys, int n, const char *name) {
    for (int i = 0; i < n; i++)
        if (!strcmp(keys[i].name, name)) return &keys[i];
    return NULL;
}

static int distance(const char *a, const char *b) { /* Levenshtein, short strings */
    int row[80], na = (int)strlen(a), nb = (int)strlen(b);
    if (na > 79 || nb > 79) return 99;
    for (int j = 0; j <= nb; j++) row[j] = j;
    for (int i = 1; i <= na; i++) {
        int diag = row[0];
        row[0] = i;
        for (int j = 1; j <= nb; j++) {
            int up = row[j], best = diag + (a[i - 1] != b[j - 1]);
            if (up + 1 < best) best = up + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diag = up;
            row[j] = best;
        }
    }
    return row[nb];
}

static lsa_status unknown_key(const lsa_key *keys, int n, const char *name, const char *where, lsa_err *err) {
    const bool bare = !strchr(name, '.'); /* a section's own key */
    int best = 0, least = INT_MAX;
    for (int i = 0; i < n; i++) {
        const int d = distance(bare ? strchr(keys[i].name, '.') + 1 : keys[i].name, name);
        if (d < least) best = i, least = d;
    }
    LSA_RET_FAIL(LSA_E_CONFIG, "%s: unknown key '%.80s'; did you mean '%s'? ('lsa-train config' lists all)",
                 where, name, keys[best].name);
}

/* ---- YAML ---- */

typedef struct yaml_schema {
    cyaml_schema_field_t top[MAX_SECTION + 1], field[MAX_SECTION][MAX_KEY + 1];
    cyaml_schema_value_t root;
    char section[MAX_SECTION][32];
    int n_section;
} yaml_schema;

/* The loaded form: one string pointer per key. */
typedef struct yaml_values {
    char *v[MAX_KEY];
} yaml_values;

static void make_schema(yaml_schema *s, const lsa_key *keys, int n) {
    static const cyaml_schema_field_t end = CYAML_FIELD_END;
    int count[MAX_SECTION] = {0};
    memset(s, 0, sizeof *s);
    for (int i = 0; i < n; i++) {
        const char *dot = strchr(keys[i].name, '.');
        const size_t len = (size_t)(dot - keys[i].name);
        int k = 0;
        while (k < s->n_section && (strncmp(s->section[k], keys[i].name, len) || s->section[k][len])) k++;
        if (k == s->n_section) snprintf(s->section[s->n_section++], 32, "%.*s", (int)len, keys[i].name);
        cyaml_schema_field_t *f = &s->field[k][count[k]++];
        *f = (cyaml_schema_field_t){.key = dot + 1,
                                    .data_offset = (uint32_t)((size_t)i * sizeof(char *)),
                                    .value = {.type = CYAML_STRING,
                                              .flags = CYAML_FLAG_POINTER | CYAML_FLAG_OPTIONAL,
                                              .data_size = 1,
                                              .string = {.min = 0, .max = 4096}}};
    }
    for (int k = 0; k < s->n_section; k++) {
        s->field[k][count[k]] = end;
        s->top[k] = (cyaml_schema_field_t){.key = s->section[k],
                                           .data_offset = 0,
                                           .value = {.type = CYAML_MAPPING,
                                                     .flags = CYAML_FLAG_OPTIONAL,
                                                     .data_size = sizeof(yaml_values),
                                                     .mapping = {.fields = s->field[k]}}};
    }
    s->top[s->n_section] = end;
    s->root = (cyaml_schema_value_t){.type = CYAML_MAPPING,
                                     .flags = CYAML_FLAG_POINTER,
                                     .data_size = sizeof(yaml_values),
                                     .mapping = {.fields = s->top}};
}

typedef struct yaml_log {
    char text[512];
} yaml_log;

LSA_PRINTF(3, 0)
static void on_log(cyaml_log_t level, void *ctx, const char *fmt, va_list args) {
    yaml_log *l = ctx;
    size_t n = strlen(l->text);
    if (level < CYAML_LOG_ERROR || n > sizeof l->text - 64) return;
    vsnprintf(l->text + n, sizeof l->text - n, fmt, args);
    for (char *p = l->text + n; *p; p++)
        if (*p == '\n') *p = ' ';
}

/* cyaml says "Unexpected key: foo"; the nearest known name helps more. */
static lsa_status yaml_failed(const lsa_key *keys, int n, const char *msg, const char *where, lsa_err *err) {
    const char *p = strstr(msg, "Unexpected key: ");
    if (p) {
        char name[96];
        snprintf(name, sizeof name, "%.*s", (int)strcspn(p + 16, " "), p + 16);
        for (int i = 0; i < n; i++) { /* a known key in the wrong section */
            const char *dot = strchr(keys[i].name, '.');
            if (!strcmp(dot + 1, name))
                LSA_RET_FAIL(LSA_E_CONFIG, "%s: key '%s' stands in the wrong section; it is '%s'", where,
                             name, keys[i].name);
        }
        return unknown_key(keys, n, name, where, err);
    }
    LSA_RET_FAIL(LSA_E_CONFIG, "%s: not a valid recipe: %s", where, msg);
}

static lsa_status set_defaults(void *out, const lsa_key *keys, int n, lsa_err *err) {
    for (int i = 0; i < n; i++) {
        lsa_status st = set_value(out, &keys[i], keys[i].dflt, "default", err);
        if (st != LSA_OK) return st;
    }
    return LSA_OK;
}

lsa_status lsa_recipe_parse(void *out, const lsa_key *keys, int n, const char *text, size_t n_bytes,
                            const char *where, lsa_err *err) {
    lsa_status st = LSA_OK;
    yaml_schema *s = NULL;
    yaml_values *v = NULL;
    yaml_log log = {""};
    const cyaml_config_t cfg = {
        .log_fn = on_log, .log_ctx = &log, .mem_fn = cyaml_mem, .log_level = CYAML_LOG_ERROR};
    LSA_TRY(set_defaults(out, keys, n, err));
    if (n > MAX_KEY) LSA_FAIL(LSA_E_BUG, "too many recipe keys");
    LSA_TRY(LSA_NEW(s, 1, err));
    make_schema(s, keys, n);
    bool blank = true; /* an empty file is a recipe of defaults */
    for (size_t i = 0; i < n_bytes; i++) blank = blank && strchr(" \t\r\n", text[i]) && text[i];
    if (blank) goto done;
    cyaml_err_t e =
        cyaml_load_data((const uint8_t *)text, n_bytes, &cfg, &s->root, (cyaml_data_t **)&v, NULL);
    if (e != CYAML_OK) {
        st = yaml_failed(keys, n, log.text[0] ? log.text : cyaml_strerror(e), where, err);
        goto done;
    }
    for (int i = 0; v && i < n; i++)
        if (v->v[i]) LSA_TRY(set_value(out, &keys[i], v->v[i], where, err));
done:
    if (v) cyaml_free(&cfg, &s->root, v, 0);
    lsa_free(s);
    return st;
}

lsa_status lsa_recipe_set(void *out, const lsa_key *keys, int n, const char *const *set, int n_set,
                          lsa_err *err) {
    for (int i = 0; i < n_set; i++) {
        char name[96];
        const char *eq = strchr(set[i], '=');
        if (!eq || (size_t)(eq - set[i]) >= sizeof name)
            LSA_RET_FAIL(LSA_E_CONFIG, "--set '%s': expected key=value", set[i]);
        snprintf(name, sizeof name, "%.*s", (int)(eq - set[i]), set[i]);
        const lsa_key *k = find_key(keys, n, name);
        if (!k) return unknown_key(keys, n, name, "--set", err);
        lsa_status st = set_value(out, k, eq + 1, "--set", err);
        if (st != LSA_OK) return st;
    }
    return LSA_OK;
}

lsa_status lsa_recipe_load(void *out, const lsa_key *keys, int n, const char *path, const char *const *set,
                           int n_set, lsa_err *err) {
    lsa_status st = LSA_OK;
    char *text = NULL;
    size_t n_bytes = 0;
    if (path) LSA_TRY(lsa_read_file(&text, &n_bytes, path, err));
    LSA_TRY(lsa_recipe_parse(out, keys, n, text ? text : "", n_bytes, path ? path : "recipe", err));
    LSA_TRY(lsa_recipe_set(out, keys, n, set, n_set, err));
done:
    lsa_free(text);
    return st;
}

/* YAML text in place: plain where nothing in it could mean something, else in single quotes, with those
 * inside doubled. */
static void quote(char *text, size_t n) {
    char out[2 * LSA_KEY_TEXT_MAX + 3];
    size_t at = 0;
    if (*text &&
        strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./") == strlen(text))
        return;
    out[at++] = '\'';
    for (const char *c = text; *c && at + 4 < sizeof out; c++) {
        if (*c == '\'') out[at++] = '\'';
        out[at++] = *c;
    }
    out[at++] = '\'';
    out[at] = 0;
    snprintf(text, n, "%s", out);
}

lsa_status lsa_recipe_text(char **out, const void *recipe, const lsa_key *keys, int n, bool help,
                           lsa_err *err) {
    const int64_t cap = (int64_t)n * 512 + 1;
    char *t = NULL, value[2 * LSA_KEY_TEXT_MAX + 3], range[192];
    size_t at = 0;
    *out = NULL;
    lsa_status st = lsa_alloc_((void **)&t, cap, 1, "recipe text", err);
    if (st != LSA_OK) return st;
    for (int i = 0; i < n; i++) {
        const lsa_key *k = &keys[i];
        const char *dot = strchr(k->name, '.');
        const size_t len = (size_t)(dot - k->name);
        if (i == 0 || strncmp(keys[i - 1].name, k->name, len + 1))
            at += (size_t)snprintf(t + at, (size_t)cap - at, "%s%.*s:\n", i ? "\n" : "", (int)len, k->name);
        get_value(value, sizeof value, recipe, k);
        if (k->type == LSA_KEY_TEXT) quote(value, sizeof value);
        at += (size_t)snprintf(t + at, (size_t)cap - at, "  %s: %s", dot + 1, value);
        if (help) {
            if (k->type == LSA_KEY_CHOICE)
                snprintf(range, sizeof range, "%s", k->choices);
            else if (k->type == LSA_KEY_BOOL)
                snprintf(range, sizeof range, "true|false");
            else if (k->type == LSA_KEY_TEXT)
                snprintf(range, sizeof range, "text");
            else
                snprintf(range, sizeof range, "%g to %g", k->lo, k->hi);
            at += (size_t)snprintf(t + at, (size_t)cap - at, "  # %s (%s; default %s)", k->help, range,
                                   *k->dflt ? k->dflt : "none");
        }
        at += (size_t)snprintf(t + at, (size_t)cap - at, "\n");
    }
    *out = t;
    return LSA_OK;
}

json_t *lsa_recipe_json(const void *recipe, const lsa_key *keys, int n) {
    json_t *o = json_object();
    char value[2 * LSA_KEY_TEXT_MAX + 3];
    for (int i = 0; i < n; i++) {
        get_value(value, sizeof value, recipe, &keys[i]);
        json_object_set_new(o, keys[i].name, json_string(value));
    }
    return o;
}

lsa_status lsa_recipe_from_json(void *out, const lsa_key *keys, int n, const json_t *o, const char *where,
                                lsa_err *err) {
    lsa_status st = set_defaults(out, keys, n, err);
    const char *name;
    json_t *v;
    if (st != LSA_OK) return st;
    if (!json_is_object(o)) LSA_RET_FAIL(LSA_E_FORMAT, "%s: the recipe is not an object", where);
    json_object_foreach((json_t *)(uintptr_t)o, name, v) {
        const lsa_key *k = find_key(keys, n, name);
        if (!k) return unknown_key(keys, n, name, where, err);
        if (!json_is_string(v)) LSA_RET_FAIL(LSA_E_FORMAT, "%s: %s is not a string", where, name);
        st = set_value(out, k, json_string_value(v), where, err);
        if (st != LSA_OK) return st;
    }
    return LSA_OK;
}
