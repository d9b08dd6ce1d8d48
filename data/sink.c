/* Sinks: see sink.h. The mistake that would stay silent: a comparison that stops at the shorter of the two.
 */
#include "data/sink.h"

#include <string.h>

#include "kernels/core/hash.h"

lsa_status lsa_sink_put(lsa_sink *s, const void *data, size_t n_bytes, lsa_err *err) {
    s->n_bytes += (int64_t)n_bytes;
    return n_bytes ? s->put(s->user, data, n_bytes, err) : LSA_OK;
}

lsa_status lsa_sink_zeros(lsa_sink *s, int64_t n_bytes, lsa_err *err) {
    static const char zero[64] = {0};
    lsa_status st = LSA_OK;
    for (; st == LSA_OK && n_bytes > 0; n_bytes -= 64)
        st = lsa_sink_put(s, zero, n_bytes < 64 ? (size_t)n_bytes : 64, err);
    return st;
}

lsa_status lsa_sink_uint(lsa_sink *s, uint64_t v, int width, lsa_err *err) {
    unsigned char b[8];
    for (int i = 0; i < width; i++) b[i] = (unsigned char)(v >> (8 * i));
    return lsa_sink_put(s, b, (size_t)width, err);
}

static lsa_status put_commit(void *user, const void *data, size_t n_bytes, lsa_err *err) {
    return lsa_commit_write(user, data, n_bytes, err);
}

lsa_sink lsa_sink_commit(lsa_commit *c) {
    return (lsa_sink){put_commit, c, 0};
}

static lsa_status put_compare(void *user, const void *data, size_t n_bytes, lsa_err *err) {
    lsa_compare *c = user;
    if (n_bytes > c->map.n_bytes - (size_t)c->at || memcmp(c->map.data + c->at, data, n_bytes))
        LSA_RET_FAIL(
            LSA_E_FORMAT,
            "'%s' is not what this lsa-export makes of the folder's indexer.safetensors (it differs after byte "
            "%lld): changed, damaged, or written by another version; export again",
            c->path, (long long)c->at);
    c->at += (int64_t)n_bytes;
    return LSA_OK;
}

lsa_status lsa_compare_open(lsa_compare *c, const char *path, lsa_err *err) {
    *c = (lsa_compare){.path = path};
    return lsa_map_open(&c->map, path, err);
}

lsa_sink lsa_sink_compare(lsa_compare *c) {
    return (lsa_sink){put_compare, c, 0};
}

lsa_status lsa_compare_end(const lsa_compare *c, lsa_err *err) {
    if ((size_t)c->at != c->map.n_bytes)
        LSA_RET_FAIL(LSA_E_FORMAT, "'%s' has %zu bytes, expected %lld; export again", c->path, c->map.n_bytes,
                     (long long)c->at);
    return LSA_OK;
}

void lsa_compare_close(lsa_compare *c) {
    lsa_map_close(&c->map);
}

static lsa_status put_crc(void *user, const void *data, size_t n_bytes, lsa_err *err) {
    uint32_t *crc = user;
    (void)err;
    *crc = lsa_crc32(*crc, data, n_bytes);
    return LSA_OK;
}

lsa_sink lsa_sink_crc(uint32_t *crc) {
    *crc = 0;
    return (lsa_sink){put_crc, crc, 0};
}

int64_t lsa_tensor_out_bytes(const lsa_tensor_out *t) {
    int64_t n = (int64_t)lsa_dtype_bytes(t->dtype);
    for (int32_t i = 0; i < t->n_dim; i++) n *= t->shape[i];
    return n;
}
