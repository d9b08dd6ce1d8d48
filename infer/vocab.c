/* Byte-level BPE writes every byte as a printable character: the printable ones stand for themselves, the
 * other 68 for U+0100 and up, in byte order. Undoing that is all that decoding needs. */
#include "infer/vocab.h"

#include <string.h>

#include "kernels/core/json.h"
#include "kernels/core/mem.h"

struct lsa_vocab {
    json_t *root;
    const char **text; /* [n], borrowed from root */
    int64_t n;
    int16_t byte_of[512]; /* code point -> byte, -1 none */
};

static bool printable(int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
}

lsa_status lsa_vocab_open(lsa_vocab **out, const char *path, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_vocab *v = NULL;
    json_t *model, *map, *id, *added;
    const char *token;
    size_t i;
    *out = NULL;
    LSA_TRY(LSA_NEW(v, 1, err));
    LSA_TRY(lsa_json_load(&v->root, path, err));
    LSA_TRY(lsa_json_object(&model, v->root, "model", path, err));
    LSA_TRY(lsa_json_object(&map, model, "vocab", path, err));
    json_object_foreach(map, token, id) if (json_is_integer(id) && json_integer_value(id) >= v->n &&
                                            json_integer_value(id) < 1 << 24) v->n =
        json_integer_value(id) + 1;
    added = json_object_get(v->root, "added_tokens");
    json_array_foreach(added, i, id) {
        const json_t *k = json_object_get(id, "id");
        if (json_is_integer(k) && json_integer_value(k) >= v->n && json_integer_value(k) < 1 << 24)
            v->n = json_integer_value(k) + 1;
    }
    LSA_TRY(lsa_alloc_((void **)&v->text, v->n, sizeof *v->text, "vocabulary", err));
    json_object_foreach(map, token, id) if (json_is_integer(id) && json_integer_value(id) >= 0 &&
                                            json_integer_value(id) < v->n) v->text[json_integer_value(id)] =
        token;
    json_array_foreach(added, i, id) {
        const json_t *k = json_object_get(id, "id");
        const char *s = json_string_value(json_object_get(id, "content"));
        if (s && json_is_integer(k) && json_integer_value(k) >= 0 && json_integer_value(k) < v->n)
            v->text[json_integer_value(k)] = s;
    }
    memset(v->byte_of, -1, sizeof v->byte_of);
    int extra = 0;
    for (int b = 0; b < 256; b++) v->byte_of[printable(b) ? b : 256 + extra++] = (int16_t)b;
    *out = v;
    v = NULL;
done:
    lsa_vocab_close(v);
    return st;
}

void lsa_vocab_close(lsa_vocab *v) {
    if (!v) return;
    json_decref(v->root);
    lsa_free(v->text);
    lsa_free(v);
}

size_t lsa_vocab_bytes(const lsa_vocab *v, int32_t id, char *out, size_t n) {
    if (id < 0 || id >= v->n || !v->text[id]) return 0;
    const unsigned char *p = (const unsigned char *)v->text[id];
    size_t k = 0;
    while (*p && k < n) {
        unsigned c = *p;
        if (c < 0x80)
            p++;
        else if ((c & 0xe0) == 0xc0 && p[1]) {
            c = (c & 0x1f) << 6 | (p[1] & 0x3f);
            p += 2;
        } else { /* beyond the byte alphabet: an added token, kept as it is */
            out[k++] = (char)*p++;
            continue;
        }
        out[k++] = c < 512 && v->byte_of[c] >= 0 ? (char)v->byte_of[c] : '?';
    }
    return k;
}
