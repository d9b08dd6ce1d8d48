/* A DeepSeek-V4 model folder: config.json and its sharded safetensors, read under the original tensor names.
 *
 * Accepts the original naming, transformers' module naming and the mixture that save_pretrained writes
 * (architecture notes 11.3, 12.1), with or without "model."; storage F32, BF16, F16, F8_E4M3 with E8M0 or F32
 * block scales (`.scale` or `weight_scale_inv`), packed FP4 (I8 or F4) with E8M0 scales per row per 32.
 * Dispatch is on the stored dtype. Immutable after open, thread-safe. */
#ifndef LSA_DATA_TEACHER_H
#define LSA_DATA_TEACHER_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/core/dtype.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/core/lsa_status.h"
#include "kernels/model/rope.h"

typedef enum lsa_layer_kind { LSA_LAYER_WINDOW = 0, LSA_LAYER_CSA, LSA_LAYER_HCA } lsa_layer_kind;

typedef struct lsa_teacher_config {
    int32_t hidden, n_layer, n_head, head_dim, rope_dim, q_rank, o_groups, o_rank, window;
    int32_t index_n_head, index_head_dim, index_topk;
    int32_t n_expert, n_shared, n_expert_tok, moe_dim, n_hash_layer;
    int32_t hc_mult, hc_iters, vocab;
    float hc_eps, norm_eps, route_scale, swiglu_limit;
    int64_t max_position;
    lsa_rope rope_main, rope_compress;   /* m = 0 layers; compressed layers */
    int32_t ratio[LSA_MAX_LAYERS];       /* 0, 4 or the HCA ratio, per layer */
    lsa_layer_kind kind[LSA_MAX_LAYERS]; /* CSA iff the ratio is 4 */
    bool hash_moe[LSA_MAX_LAYERS];
    int32_t n_csa;
    lsa_layer_id csa_id[LSA_MAX_CSA]; /* layer id of each CSA ordinal */
    int32_t csa_ord[LSA_MAX_LAYERS];  /* ordinal of a layer, -1 if not CSA */
    /* as config.json declares the storage: BF16, F8_E4M3 or (experts) F4; the loader goes by the files */
    lsa_dtype matrix_dtype, expert_dtype;
} lsa_teacher_config;

/* Reads hub-style (R) and transformers-style (H) config files. LSA_E_FORMAT / LSA_E_UNSUPPORTED (V4.1) with
 * the key. */
LSA_NODISCARD lsa_status lsa_teacher_config_load(lsa_teacher_config *out, const char *path, lsa_err *err);

typedef struct lsa_teacher lsa_teacher;
LSA_NODISCARD lsa_status lsa_teacher_open(lsa_teacher **out, const char *dir, lsa_err *err);
void lsa_teacher_close(lsa_teacher *t);
const lsa_teacher_config *lsa_teacher_cfg(const lsa_teacher *t);
const char *lsa_teacher_name(const lsa_teacher *t); /* last component of the folder's path */
uint64_t lsa_teacher_hash(
    const lsa_teacher *t); /* XXH64 over config bytes and every tensor (name, size, first 256 bytes) */

/* Every tensor that config.json calls for is there, with its shape, a known type and its scale: one message
 * for all that are missing. Afterwards lsa_teacher_note names tensors that nothing uses (count, first names),
 * or is
 * "": worth a warning, since they may belong to another architecture. MTP and DSpark tensors (mtp.*) are
 * expected to be unused. */
LSA_NODISCARD lsa_status lsa_teacher_check(lsa_teacher *t, lsa_err *err);
const char *lsa_teacher_note(const lsa_teacher *t);

bool lsa_teacher_has(const lsa_teacher *t,
                     const char *name); /* original name, e.g. "layers.1.attn.wq_a.weight" */
/* dst [rows, cols] f32, dequantised without rounding; [rows, cols] must be the tensor's logical shape (1-D:
 * rows = 1). LSA_E_FORMAT for NaN and infinity. */
LSA_NODISCARD lsa_status lsa_teacher_f32(float *dst, const lsa_teacher *t, const char *name, int64_t rows,
                                         int64_t cols, lsa_err *err);
LSA_NODISCARD lsa_status lsa_teacher_i64(int64_t *dst, const lsa_teacher *t, const char *name, int64_t rows,
                                         int64_t cols, lsa_err *err);

#endif
