/* Existing weights -> checkpoint: a teacher's native indexer, an exported indexer, the reference's
 * checkpoints. */
#ifndef LSA_EXPORT_IMPORT_H
#define LSA_EXPORT_IMPORT_H

#include <stddef.h>

#include "kernels/core/lsa_status.h"

typedef struct lsa_import_options {
    const char *layers; /* "all" or CSA ordinals such as "10,12,20"; names without a layer need exactly one */
    const char
        *teacher; /* model folder whose config.json gives what the file lacks; NULL: DeepSeek-V4-Flash */
} lsa_import_options;

/* RUN/ckpt of `out` from one of
 *   a DeepSeek-V4 model folder: wq_a, q_norm and indexer.* of its CSA layers, any stored dtype;
 *   an exported INDEXER/ folder, or one of its files: everything it says is kept, so that exporting again
 * gives its bytes; a safetensors file or torch.save archive with `retrievers.l{ordinal}.*` (freqs_cis is
 * passed over; of an epoch checkpoint the dict under model_state); the same without prefix for one layer,
 * also under the pretrained names `q_norm.weight`, `indexer.wq_b.weight`, `indexer.weights_proj.weight`; a
 * folder of layer_{id}.safetensors of those. Heads and rank follow from the shapes. `note` [note_bytes]: what
 * was assumed, "" for nothing. LSA_E_ARG: `out` holds checkpoints, bad layers; LSA_E_FORMAT: the file;
 * LSA_E_UNSUPPORTED: a geometry that needs `teacher`. */
LSA_NODISCARD lsa_status lsa_export_import(const char *source, const char *out, const lsa_import_options *o,
                                           char *note, size_t note_bytes, lsa_err *err);

#endif
