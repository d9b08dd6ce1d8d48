/* Inside the teacher folder: its files, and a tensor under any of its spellings. */
#ifndef LSA_DATA_TEACHER_INTERNAL_H
#define LSA_DATA_TEACHER_INTERNAL_H

#include "data/lsa_safetensors.h"
#include "data/teacher.h"

#define LSA_TEACHER_FILES 512
#define LSA_TENSOR_NAME   256

struct lsa_teacher {
    lsa_teacher_config cfg;
    char name[128];
    uint64_t hash;
    int32_t n_file;
    lsa_st *file[LSA_TEACHER_FILES];
    char note[512]; /* set by lsa_teacher_check */
};

/* NULL if absent. */
const lsa_st_tensor *lsa_teacher_find(const lsa_teacher *t, const char *name);
/* The scale of a quantised tensor, a sibling of the name under which it is stored. */
const lsa_st_tensor *lsa_teacher_find_scale(const lsa_teacher *t, const char *stored);
/* A view of one matrix of transformers' stacked experts. *parent (may be NULL): the stored tensor. */
bool lsa_teacher_find_stacked(lsa_st_tensor *view, const lsa_st_tensor **parent, const lsa_teacher *t,
                              const char *name);

/* Where the values of a tensor lie. */
typedef struct lsa_teacher_place {
    lsa_st_tensor values;        /* the stored tensor, or one matrix of a stacked one */
    const lsa_st_tensor *stored; /* as the file holds it */
    const lsa_st_tensor *scale;  /* of quantised values, shape checked; else NULL */
    bool fp4;                    /* two E2M1 codes a byte */
} lsa_teacher_place;
/* Finds a float tensor of logical shape [rows, cols] (1-D: rows = 1) and checks shape, type and scale. */
LSA_NODISCARD lsa_status lsa_teacher_locate(lsa_teacher_place *out, const lsa_teacher *t, const char *name,
                                            int64_t rows, int64_t cols, lsa_err *err);
/* The same for ids, I64 or I32. */
LSA_NODISCARD lsa_status lsa_teacher_locate_ids(const lsa_st_tensor **out, const lsa_teacher *t,
                                                const char *name, int64_t rows, int64_t cols, lsa_err *err);

#endif
