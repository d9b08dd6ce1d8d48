/* manifest.json of a shard folder. */
#include <stdint.h>

#include "data/manifest.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    lsa_manifest m = {0};
    lsa_err err = {0};
    if (lsa_manifest_parse(&m, (const char *)data, n, "fuzz", &err) == LSA_OK) lsa_manifest_fini(&m);
    return 0;
}
