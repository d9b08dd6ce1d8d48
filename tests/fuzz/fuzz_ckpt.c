/* Checkpoints: the first byte chooses a file of a valid checkpoint (model, optim, state, MANIFEST), the rest
 * replaces or patches it; the manifest then vouches for the damage, so that the parsers behind the hashes are
 * reached. */
#include "tests/fuzz/scratch.h"

#include "data/ckpt.h"
#include "kernels/core/hash.h"
#include "kernels/core/json.h"

enum { FILES = 4 };
static const char *const NAME[FILES] = {"model.safetensors", "optim.safetensors", "state.json",
                                        "MANIFEST.json"};
static uint8_t *g_base[FILES];
static size_t g_size[FILES];
static json_t *g_manifest;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    char path[256];
    lsa_err err = {0};
    (void)argc, (void)argv;
    fuzz_scratch();
    if (lsa_mkdirs(g_scratch, &err) != LSA_OK) abort();
    for (int i = 0; i < FILES; i++) {
        snprintf(path, sizeof path, "%s/ckpt/%s", fuzz_base(), NAME[i]);
        g_base[i] = fuzz_read(&g_size[i], path);
    }
    g_manifest = json_loadb((const char *)g_base[3], g_size[3], 0, NULL);
    if (!g_manifest) abort();
    return 0;
}

static void vouch(const char *name, const uint8_t *p, size_t n) {
    char hex[17];
    json_t *file = json_object_get(json_object_get(g_manifest, "files"), name);
    if (!file) abort();
    lsa_hex64(hex, lsa_xxh64(p, n));
    json_object_set_new(file, "bytes", json_integer((json_int_t)n));
    json_object_set_new(file, "xxh64", json_string(hex));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    char path[256];
    lsa_ckpt c = {0};
    lsa_err err = {0};
    if (n < 2) return 0;
    const int which = data[0] % FILES;
    const bool patch = data[0] & 0x80 || which == 1;
    data++, n--;
    for (int i = 0; i < FILES; i++) {
        uint8_t *copy = NULL;
        const uint8_t *p = g_base[i];
        size_t size = g_size[i];
        if (i == 3 && which != 3) {
            p = copy = (uint8_t *)json_dumps(g_manifest, JSON_COMPACT);
            if (!p) abort();
            size = strlen((const char *)p);
        } else if (i == which && patch) {
            copy = malloc(size + 1);
            if (!copy) abort();
            memcpy(copy, p, size);
            fuzz_patch(copy, size, data, n);
            p = copy;
        } else if (i == which) {
            p = data, size = n;
        }
        if (i < 3) vouch(NAME[i], p, size);
        snprintf(path, sizeof path, "%s/%s", g_scratch, NAME[i]);
        fuzz_write(path, p, size);
        free(copy);
    }
    if (lsa_ckpt_load(&c, g_scratch, true, &err) == LSA_OK) lsa_ckpt_fini(&c);
    return 0;
}
