/* The shard reader on a patched shard: whatever HDF5's metadata, tables and indexes say, reading stays inside
 * the file and the arrays. The input is a list of patches (scratch.h) to the first shard of the base folder.
 */
#include "tests/fuzz/scratch.h"

#include "data/h5.h"
#include "data/lsa_shard.h"
#include "data/manifest.h"
#include "kernels/core/file.h"

static uint8_t *g_base, *g_copy;
static size_t g_size;
static lsa_manifest g_manifest;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    char path[256];
    lsa_err err = {0};
    (void)argc, (void)argv;
    lsa_h5_init();
    fuzz_scratch();
    snprintf(path, sizeof path, "%s/shards", fuzz_base());
    if (lsa_manifest_load(&g_manifest, path, &err) != LSA_OK || lsa_mkdirs(g_scratch, &err) != LSA_OK)
        abort();
    g_manifest.shard.len = 1;
    snprintf(path, sizeof path, "%s/shards/%s", fuzz_base(), g_manifest.shard.data[0].file);
    g_base = fuzz_read(&g_size, path);
    g_copy = malloc(g_size);
    if (!g_copy || lsa_manifest_save(&g_manifest, g_scratch, &err) != LSA_OK) abort();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    char path[256];
    lsa_shards *s = NULL;
    lsa_err err = {0};
    memcpy(g_copy, g_base, g_size);
    fuzz_patch(g_copy, g_size, data, n);
    snprintf(path, sizeof path, "%s/%s", g_scratch, g_manifest.shard.data[0].file);
    fuzz_write(path, g_copy, g_size);

    if (lsa_shards_open(&s, g_scratch, &err) != LSA_OK) return 0;
    for (int64_t d = 0; d < lsa_shards_get_info(s)->n_doc; d++) {
        lsa_csr c = {0};
        for (int32_t o = 0; o < lsa_shards_get_info(s)->n_csa; o++) {
            uint8_t *key = NULL;
            int64_t *position = NULL;
            uint16_t *hidden = NULL;
            if (lsa_shards_keys(&key, s, d, (lsa_csa_ord){o}, &err) == LSA_OK) lsa_free(key);
            if (lsa_shards_hidden(&position, &hidden, s, d, (lsa_csa_ord){o}, &err) == LSA_OK)
                lsa_free(position), lsa_free(hidden);
            if (lsa_shards_stats(&c, s, d, (lsa_csa_ord){o}, &err) == LSA_OK) lsa_csr_fini(&c);
            if (lsa_shards_dense(&c, s, d, (lsa_csa_ord){o}, &err) == LSA_OK) lsa_csr_fini(&c);
        }
        if (lsa_shards_labels(&c, s, d, &err) == LSA_OK) lsa_csr_fini(&c);
    }
    lsa_shards_close(s);
    (void)!lsa_shards_verify(g_scratch, &err);
    return 0;
}
