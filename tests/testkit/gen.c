/* See gen.h. A guard zone that was written, or an input that changed, ends the test with the buffer's number.
 */
#include "tests/testkit/gen.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/dtype.h"
#include "kernels/core/lsa_ids.h"

enum { GUARD = 512 };

static void must(bool ok, const char *what) {
    if (ok) return;
    printf("testkit: %s\n", what);
    fflush(stdout);
    abort();
}

float lsa_gen_normal(lsa_rng *r) {
    const double u = ((double)lsa_rng_u32(r) + 1.0) * 0x1p-32, v = (double)lsa_rng_u32(r) * 0x1p-32;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}
void lsa_gen_fill(float *x, int64_t n, float s, lsa_rng *r) {
    for (int64_t i = 0; i < n; i++) x[i] = s * lsa_gen_normal(r);
}
int64_t lsa_gen_range(lsa_rng *r, int64_t lo, int64_t hi) {
    return lo + (int64_t)lsa_rng_below(r, (uint64_t)(hi - lo + 1));
}
void lsa_gen_keys(uint8_t *keys, int64_t n, lsa_rng *r) {
    float row[128];
    for (int64_t i = 0; i < n; i++) {
        lsa_gen_fill(row, 128, i % 17 == 16 ? 0.0f : 1.0f, r);
        lsa_key_encode(keys + i * LSA_KEY_BYTES, row);
    }
}
void *lsa_gen_alloc(int64_t n, size_t size) {
    void *p = calloc((size_t)n + 1, size);
    must(p != NULL, "out of memory");
    return p;
}

const char *lsa_gen_backend(void) {
    const char *s = getenv("LSA_BACKEND");
    return s && *s ? s : "cpu";
}
bool lsa_gen_on_gpu(void) {
    return lsa_ctx_kind(lsa_gen_ctx(lsa_gen_backend())) == LSA_BACKEND_CUDA;
}

lsa_ctx *lsa_gen_ctx(const char *device) {
    static struct {
        char name[32];
        lsa_ctx *ctx;
    } seen[8];
    int i = 0;
    while (seen[i].ctx && strcmp(seen[i].name, device) != 0) i++;
    must(i < 7, "too many device strings");
    if (!seen[i].ctx) {
        lsa_err err = {0};
        const lsa_status st = lsa_ctx_create(&seen[i].ctx, device, &err);
        if (st == LSA_E_DEVICE) {
            printf("skipped: %s\n", err.msg);
            exit(77);
        }
        must(st == LSA_OK, err.msg);
        snprintf(seen[i].name, sizeof seen[i].name, "%s", device);
        printf("backend %s: %s\n", device, lsa_ctx_describe(seen[i].ctx));
    }
    return seen[i].ctx;
}

void lsa_rig_open(lsa_rig *r, const char *device, int shift) {
    memset(r, 0, sizeof *r);
    r->ctx = lsa_gen_ctx(device);
    r->shift = shift;
}

static void *add(lsa_rig *r, const void *in, void *out, int64_t n, size_t size) {
    lsa_err err = {0};
    if (!in && !out) return NULL;
    must(r->n < (int)(sizeof r->box / sizeof *r->box), "too many buffers");
    struct lsa_rig_box *b = &r->box[r->n++];
    b->in = out ? NULL : in;
    b->out = out;
    b->bytes = (size_t)n * size;
    const size_t all = b->bytes + 2 * GUARD, at = GUARD + (size_t)r->shift;
    unsigned char *host = lsa_gen_alloc((int64_t)all, 1);
    memset(host, 0xA5, all);
    if (in)
        memcpy(host + at, in, b->bytes);
    else
        memset(host + at, 0xFF, b->bytes); /* NaN in every float format */
    must(LSA_CTX_NEW(r->ctx, b->raw, all, &err) == LSA_OK &&
             lsa_ctx_upload(r->ctx, b->raw, host, all, &err) == LSA_OK,
         err.msg);
    free(host);
    return b->raw + at;
}
const void *lsa_rig_in(lsa_rig *r, const void *host, int64_t n, size_t size) {
    return add(r, host, NULL, n, size);
}
void *lsa_rig_out(lsa_rig *r, void *host, int64_t n, size_t size) {
    return add(r, NULL, host, n, size);
}
void *lsa_rig_inout(lsa_rig *r, void *host, int64_t n, size_t size) {
    return add(r, host, host, n, size);
}

void lsa_rig_close(lsa_rig *r) {
    lsa_err err = {0};
    for (int i = 0; i < r->n; i++) {
        struct lsa_rig_box *b = &r->box[i];
        const size_t all = b->bytes + 2 * GUARD, at = GUARD + (size_t)r->shift;
        unsigned char *host = lsa_gen_alloc((int64_t)all, 1);
        must(lsa_ctx_download(r->ctx, host, b->raw, all, &err) == LSA_OK, err.msg);
        for (size_t k = 0; k < all; k++)
            if ((k < at || k >= at + b->bytes) && host[k] != 0xA5) {
                printf("buffer %d of %zu bytes: guard overwritten at byte %lld\n", i, b->bytes,
                       (long long)k - (long long)at);
                must(false, "write outside a tensor");
            }
        if (b->in) must(memcmp(host + at, b->in, b->bytes) == 0, "an input was changed");
        if (b->out) memcpy(b->out, host + at, b->bytes);
        lsa_ctx_free(r->ctx, b->raw);
        free(host);
    }
    r->n = 0;
}
