/* GGUF v3 sidecar of an indexer: tensors blk.{layer id}.memidx.* and the conventions as metadata. Keys:
 * EXPORT_FORMAT.md. */
#ifndef LSA_EXPORT_GGUF_H
#define LSA_EXPORT_GGUF_H

#include "data/indexer_file.h"
#include "data/sink.h"

/* The whole file. GGUF has no fp8 with a scale a row: an fp8 indexer is written in bf16, which holds the same
 * values. */
LSA_NODISCARD lsa_status lsa_gguf_emit(lsa_sink *to, const lsa_indexer_file *f, lsa_err *err);

#endif
