/* Files of torch.save (zip archives, torch 1.6 and later) that hold a flat dict name -> tensor: a writer
 * whose bytes torch.load(weights_only=True) reads, also mapped, and a reader that runs nothing
 * (data/pickle.h).
 *
 * Layout: {dir}/data.pkl, {dir}/byteorder, {dir}/data/{key} (one storage each, data at multiples of 64
 * bytes), {dir}/version, {dir}/.data/serialization_id. The reader takes {dir} from the one data.pkl. */
#ifndef LSA_DATA_TORCH_FILE_H
#define LSA_DATA_TORCH_FILE_H

#include "data/lsa_safetensors.h"
#include "data/sink.h"
#include "kernels/core/lsa_status.h"

/* The archive `dir` of the n tensors in the given order, as collections.OrderedDict; F32, F16, BF16 and C64.
 * Tensors with equal emit and src share one storage. `note` (NULL: none) becomes {dir}/extra/lsa.json, which
 * torch passes over. */
LSA_NODISCARD lsa_status lsa_torch_emit(lsa_sink *to, const char *dir, const lsa_tensor_out *t, int64_t n,
                                        const char *note, lsa_err *err);

typedef struct lsa_torch lsa_torch;
/* Opens a flat dict, or the one under 'model_state' of an epoch checkpoint. Everything but the CRC of the
 * storages is checked here. Thread-safe after open. */
LSA_NODISCARD lsa_status lsa_torch_open(lsa_torch **out, const char *path, lsa_err *err);
/* The same over caller-owned memory (fuzzing, tests); `name` appears in messages. */
LSA_NODISCARD lsa_status lsa_torch_open_memory(lsa_torch **out, const void *data, size_t n_bytes,
                                               const char *name, lsa_err *err);
void lsa_torch_close(lsa_torch *t);
int64_t lsa_torch_count(const lsa_torch *t);
const lsa_st_tensor *lsa_torch_at(const lsa_torch *t, int64_t i);
const lsa_st_tensor *lsa_torch_find(const lsa_torch *t, const char *name); /* NULL if absent */
/* {dir}/extra/lsa.json, not terminated; NULL if absent. */
const char *lsa_torch_note(const lsa_torch *t, size_t *n_bytes);
/* dst[n_elem] of a tensor of this file, after its storage's CRC was checked. As lsa_st_to_f32. */
LSA_NODISCARD lsa_status lsa_torch_to_f32(float *dst, const lsa_torch *t, const lsa_st_tensor *x,
                                          lsa_err *err);

#endif
