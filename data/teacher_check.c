/* The tensors of a model folder against those of its geometry, before any value is read: with hundreds of GiB
 * of weights the first missing one must not be found half an hour later.
 *
 * The mistake that would stay silent: a tensor that changes the model under a name this program does not
 * know. Everything unused is counted and named; only the drafting block (mtp.*, DSpark) is expected to be
 * unused. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/teacher_internal.h"
#include "data/teacher_tensors.h"
#include "kernels/core/mem.h"

typedef struct survey {
    const lsa_teacher *t;
    LSA_VEC(const lsa_st_tensor *) used;
    int64_t expected, missing;
    char first[96];
} survey;

static lsa_status visit(void *user, const lsa_teacher_tensor *x, lsa_err *err) {
    survey *s = user;
    lsa_teacher_place f = {0};
    lsa_status st = LSA_OK;
    s->expected++;
    if (!lsa_teacher_has(s->t, x->name)) {
        if (s->missing++ == 0) snprintf(s->first, sizeof s->first, "%s", x->name);
        return LSA_OK;
    }
    if (x->dtype == LSA_I64)
        LSA_TRY(lsa_teacher_locate_ids(&f.stored, s->t, x->name, x->rows, x->cols, err));
    else
        LSA_TRY(lsa_teacher_locate(&f, s->t, x->name, x->rows, x->cols, err));
    LSA_TRY(LSA_VEC_RESERVE(s->used, s->used.len + 2, err));
    s->used.data[s->used.len++] = f.stored;
    if (f.scale) s->used.data[s->used.len++] = f.scale;
done:
    return st;
}

static int by_address(const void *a, const void *b) {
    const lsa_st_tensor *x = *(const lsa_st_tensor *const *)a, *y = *(const lsa_st_tensor *const *)b;
    return (x > y) - (x < y);
}

static bool drafting(const char *name) {
    if (!strncmp(name, "model.", 6)) name += 6;
    return !strncmp(name, "mtp.", 4);
}

static void note_unused(lsa_teacher *t, const survey *s) {
    int64_t n = 0;
    char names[330] = "";
    for (int32_t i = 0; i < t->n_file; i++)
        for (int64_t j = 0; j < lsa_st_count(t->file[i]); j++) {
            const lsa_st_tensor *x = lsa_st_at(t->file[i], j);
            if (drafting(x->name) || bsearch(&x, s->used.data, (size_t)s->used.len, sizeof x, by_address))
                continue;
            const size_t at = strlen(names);
            if (n < 3) snprintf(names + at, sizeof names - at, "%s'%.100s'", n ? ", " : "", x->name);
            n++;
        }
    if (n)
        snprintf(t->note, sizeof t->note, "model '%s': its files hold %lld tensors that nothing uses: %s%s",
                 t->name, (long long)n, names, n > 3 ? " ..." : "");
}

lsa_status lsa_teacher_check(lsa_teacher *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    survey s = {.t = t};
    LSA_TRY(lsa_teacher_each(&t->cfg, visit, &s, err));
    if (s.missing == 1)
        LSA_FAIL(LSA_E_FORMAT, "tensor '%s' is missing from model '%s' under every known spelling", s.first,
                 t->name);
    if (s.missing)
        LSA_FAIL(
            LSA_E_FORMAT,
            "model '%s': %lld of the %lld tensors that its config.json needs are missing under every known "
            "spelling, first '%s'",
            t->name, (long long)s.missing, (long long)s.expected, s.first);
    if (s.used.len) qsort(s.used.data, (size_t)s.used.len, sizeof *s.used.data, by_address);
    note_unused(t, &s);
done:
    lsa_free(s.used.data);
    return st;
}

const char *lsa_teacher_note(const lsa_teacher *t) {
    return t->note;
}
