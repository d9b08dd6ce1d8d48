/* Token id -> text, from a Hugging Face tokenizer.json with byte-level BPE. Decoding only; thread-safe after
 * open. */
#ifndef LSA_INFER_VOCAB_H
#define LSA_INFER_VOCAB_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/core/lsa_status.h"

typedef struct lsa_vocab lsa_vocab;
LSA_NODISCARD lsa_status lsa_vocab_open(lsa_vocab **out, const char *path, lsa_err *err);
void lsa_vocab_close(lsa_vocab *v);
/* Raw bytes of a token (not NUL-terminated; may be part of a UTF-8 character); an unknown id gives 0 bytes.
 */
size_t lsa_vocab_bytes(const lsa_vocab *v, int32_t id, char *out, size_t n);

#endif
