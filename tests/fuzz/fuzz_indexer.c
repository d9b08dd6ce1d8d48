/* An exported indexer through lsa_idx_open: whatever the file holds, it is refused with a message or its
 * logits are finite. First byte: 0 the rest is the file; else the rest patches a valid one. */
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "tests/fuzz/scratch.h"
#include "tests/testkit/judge_export.h"

static uint8_t *g_file;
static size_t g_size;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    char path[4096];
    snprintf(path, sizeof path, "%s/indexer/indexer.safetensors", fuzz_base());
    g_file = fuzz_read(&g_size, path);
    fuzz_scratch();
    mkdir(g_scratch, 0700);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    char path[128], text[LSA_IDX_ERROR] = "";
    if (n < 1) return 0;
    snprintf(path, sizeof path, "%s/indexer.safetensors", g_scratch);
    if (data[0] == 0) {
        fuzz_write(path, data + 1, n - 1);
    } else {
        uint8_t *p = malloc(g_size);
        if (!p) abort();
        memcpy(p, g_file, g_size);
        fuzz_patch(p, g_size, data + 1, n - 1);
        fuzz_write(path, p, g_size);
        free(p);
    }
    if (lsa_judge_export(g_scratch, data[0] % 3, text) < 0) {
        fprintf(stderr, "neither refused nor sound: %s\n", text);
        abort();
    }
    return 0;
}
