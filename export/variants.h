/* The optional files of an export folder beside indexer.safetensors: indexer.pt, layer_{id}.safetensors,
 * indexer.gguf. */
#ifndef LSA_EXPORT_VARIANTS_H
#define LSA_EXPORT_VARIANTS_H

#include "data/indexer_file.h"
#include "export/folder.h"

/* Writes the files that *o asks for into dir. */
LSA_NODISCARD lsa_status lsa_variants_write(const lsa_indexer_file *f, const char *dir,
                                            const lsa_export_options *o, lsa_err *err);
/* Compares those files with what *f gives, byte by byte; LSA_E_FORMAT names the file. */
LSA_NODISCARD lsa_status lsa_variants_check(const lsa_indexer_file *f, const char *dir,
                                            const lsa_export_options *o, lsa_err *err);

#endif
