/* For fuzz targets whose subject reads files: a private folder in memory, patched copies, whole writes. */
#ifndef LSA_TESTS_FUZZ_SCRATCH_H
#define LSA_TESTS_FUZZ_SCRATCH_H

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static char g_scratch[64];

/* The folder that LSA_FUZZ_BASE names holds valid files made by tests/fuzz/run.sh. */
static inline const char *fuzz_base(void) {
    const char *s = getenv("LSA_FUZZ_BASE");
    if (!s) {
        fprintf(stderr, "set LSA_FUZZ_BASE (tests/fuzz/run.sh does)\n");
        exit(2);
    }
    return s;
}
static inline void fuzz_scratch(void) {
    const char *root = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(g_scratch, sizeof g_scratch, "%s/lsa-fuzz-%ld", root, (long)getpid());
}
static inline void fuzz_write(const char *path, const void *data, size_t n) {
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, n) != (ssize_t)n || close(fd) != 0) abort();
}
static inline uint8_t *fuzz_read(size_t *n, const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END) != 0) abort();
    const long size = ftell(f);
    uint8_t *p = malloc((size_t)size + 1);
    rewind(f);
    if (!p || fread(p, 1, (size_t)size, f) != (size_t)size) abort();
    fclose(f);
    *n = (size_t)size;
    return p;
}
/* data is a list of patches: 4 bytes of offset (modulo the size), 1 of length, then the bytes. */
static inline void fuzz_patch(uint8_t *p, size_t size, const uint8_t *data, size_t n) {
    while (n >= 6 && size > 0) {
        uint32_t at;
        memcpy(&at, data, 4);
        size_t len = data[4] % 16 + 1u;
        data += 5, n -= 5;
        if (len > n) len = n;
        for (size_t i = 0; i < len; i++) p[(at + i) % size] = data[i];
        data += len, n -= len;
    }
}

#endif
