/* Named weights out of whatever file holds them: safetensors, or an archive of torch.save (told apart by
 * content). */
#ifndef LSA_DATA_TENSOR_FILE_H
#define LSA_DATA_TENSOR_FILE_H

#include "data/lsa_safetensors.h"
#include "kernels/core/lsa_status.h"

typedef struct lsa_tensor_file lsa_tensor_file;

/* Checks names, shapes and sizes of the whole file (data/lsa_safetensors.h, data/torch_file.h). Thread-safe
 * after open. */
LSA_NODISCARD lsa_status lsa_tensor_file_open(lsa_tensor_file **out, const char *path, lsa_err *err);
void lsa_tensor_file_close(lsa_tensor_file *f);
const char *lsa_tensor_file_path(const lsa_tensor_file *f);
int64_t lsa_tensor_file_count(const lsa_tensor_file *f);
const lsa_st_tensor *lsa_tensor_file_at(const lsa_tensor_file *f, int64_t i);
const lsa_st_tensor *lsa_tensor_file_find(const lsa_tensor_file *f, const char *name); /* NULL if absent */
/* String metadata of a safetensors file, or of the note that lsa puts into archives; NULL if absent. */
const char *lsa_tensor_file_metadata(const lsa_tensor_file *f, const char *key);

/* dst [product of shape], f32 from any float dtype; codes in F8_E4M3 are multiplied by `<name>_scale`, f32
 * [rows] or [rows, 1], which must be there. LSA_E_FORMAT: missing, another shape, a number that is not
 * finite. */
LSA_NODISCARD lsa_status lsa_tensor_file_read(float *dst, const lsa_tensor_file *f, const char *name,
                                              int32_t n_dim, const int64_t *shape, lsa_err *err);

#endif
