/* Damaged and lying shard folders: each gives one error that names the file and what is wrong with it;
 * nothing crashes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <fcntl.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/core/mem.h"
#include "data/h5.h"
#include "data/shard_internal.h"
#include "kernels/core/dtype.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/rng.h"
#include "tests/testkit/shard_fixture.h"

/* ---- damage ---- */

static void flip(const char *path, int64_t at, uint8_t mask) {
    int fd = open(path, O_RDWR | O_CLOEXEC);
    uint8_t b;
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &b, 1, (off_t)at), 1);
    b ^= mask;
    assert_int_equal(pwrite(fd, &b, 1, (off_t)at), 1);
    close(fd);
}

/* Edits manifest.json through the parsed form and takes the file sizes and hashes as they are now (trust =
 * lie well). */
static void remanifest(const shard_fixture *x, void (*edit)(lsa_manifest *m)) {
    lsa_manifest m;
    FIX_OK(lsa_manifest_load(&m, x->dir, &fix_err));
    for (int64_t i = 0; i < m.shard.len; i++) {
        FIX_OK(lsa_file_size(&m.shard.data[i].bytes, shard_fixture_path(x, m.shard.data[i].file), &fix_err));
        FIX_OK(lsa_xxh64_file(&m.shard.data[i].xxh64, shard_fixture_path(x, m.shard.data[i].file), &fix_err));
    }
    if (edit) edit(&m);
    FIX_OK(lsa_manifest_save(&m, x->dir, &fix_err));
    lsa_manifest_fini(&m);
}

static void test_truncated(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("short");
    shard_fixture_seal(&x);
    const char *p = shard_fixture_path(&x, "shard_00001.h5");
    int64_t full;
    lsa_shards *s;
    FIX_OK(lsa_file_size(&full, p, &fix_err));
    const int64_t cut[] = {full - 1, full - 100, full / 2, 2048, 100, 7, 0};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++) {
        assert_int_equal(truncate(p, (off_t)cut[i]), 0);
        FIX_REFUSE(lsa_shards_open(&s, x.dir, &fix_err), LSA_E_FORMAT, "shard_00001.h5");
        assert_null(s);
        FIX_REFUSE(lsa_shards_verify(x.dir, &fix_err), LSA_E_FORMAT, "shard_00001.h5");
        if (cut[i] == 0) break;
        remanifest(&x, NULL); /* the manifest lies too: HDF5 and the bounds of each dataset must notice */
        FIX_REFUSE(lsa_shards_open(&s, x.dir, &fix_err), LSA_E_FORMAT, "shard_00001.h5");
    }
    unlink(p);
    FIX_REFUSE(lsa_shards_open(&s, x.dir, &fix_err), LSA_E_FORMAT, "is missing");
    FIX_REFUSE(lsa_shards_verify(x.dir, &fix_err), LSA_E_FORMAT, "is missing");
    shard_fixture_free(&x);
}

typedef struct walk {
    const char *dir, *path;
    lsa_h5_reader *h;
    int n;
} walk;

/* One byte of one dataset: verify names the dataset. */
static lsa_status flip_one(void *user, const char *name, lsa_err *err) {
    walk *w = user;
    int64_t bytes, at;
    uint64_t hash;
    lsa_status st = lsa_h5_find_any(w->h, name, &bytes, &at, &hash, err);
    if (st != LSA_OK || bytes == 0) return st;
    char quoted[160];
    snprintf(quoted, sizeof quoted, "'%s'", name);
    for (int i = 0; i < 2; i++) {
        const int64_t where = at + (i ? bytes - 1 : 0);
        flip(w->path, where, 0x10);
        FIX_REFUSE(lsa_shards_verify(w->dir, &fix_err), LSA_E_FORMAT, quoted);
        assert_non_null(strstr(fix_err.msg, w->path));
        flip(w->path, where, 0x10);
    }
    w->n++;
    return LSA_OK;
}

static void test_flipped_data(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("flip");
    shard_fixture_seal(&x);
    char path[512];
    snprintf(path, sizeof path, "%s", shard_fixture_path(&x, "shard_00001.h5"));
    walk w = {x.dir, path, NULL, 0};
    FIX_OK(lsa_h5_open(&w.h, path, &fix_err));
    FIX_OK(lsa_h5_each(w.h, flip_one, &w, &fix_err));
    lsa_h5_close(w.h);
    assert_true(w.n >= 40); /* all datasets of three layers */
    FIX_OK(lsa_shards_verify(x.dir, &fix_err));
    shard_fixture_free(&x);
}

static lsa_status read_all(const char *dir) {
    lsa_shards *s;
    lsa_status st = lsa_shards_open(&s, dir, NULL);
    if (st != LSA_OK) return st;
    for (int64_t d = 0; d < lsa_shards_get_info(s)->n_doc; d++)
        for (int32_t o = 0; o < 3; o++) {
            lsa_csr c;
            uint8_t *key;
            int64_t *pos;
            uint16_t *hid;
            if (lsa_shards_labels(&c, s, d, NULL) != LSA_OK) st = LSA_E_FORMAT;
            lsa_csr_fini(&c);
            if (lsa_shards_stats(&c, s, d, (lsa_csa_ord){o}, NULL) != LSA_OK) st = LSA_E_FORMAT;
            lsa_csr_fini(&c);
            if (lsa_shards_dense(&c, s, d, (lsa_csa_ord){o}, NULL) != LSA_OK) st = LSA_E_FORMAT;
            lsa_csr_fini(&c);
            if (lsa_shards_keys(&key, s, d, (lsa_csa_ord){o}, NULL) == LSA_OK) lsa_free(key);
            if (lsa_shards_hidden(&pos, &hid, s, d, (lsa_csa_ord){o}, NULL) == LSA_OK)
                lsa_free(pos), lsa_free(hid);
        }
    lsa_shards_close(s);
    return st;
}

/* Bits anywhere in the file, structure included. Nothing may crash or hang, and verify must always refuse. In
 * children, because a crash inside HDF5 would end the test otherwise. */
/* HDF5's own structures: refused on opening, before HDF5 parses them, wherever the bit lies. */
static void test_flipped_head(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("head");
    lsa_manifest m;
    lsa_shards *s;
    shard_fixture_seal(&x);
    FIX_OK(lsa_manifest_load(&m, x.dir, &fix_err));
    const int64_t head = m.shard.data[1].head_bytes;
    assert_true(head > 4096 && head < m.shard.data[1].bytes);
    for (int64_t at = 0; at < head; at += 997) {
        flip(shard_fixture_path(&x, "shard_00001.h5"), at, 0x04);
        FIX_REFUSE(lsa_shards_open(&s, x.dir, &fix_err), LSA_E_FORMAT, "HDF5's own structures");
        FIX_REFUSE(lsa_shards_verify(x.dir, &fix_err), LSA_E_FORMAT, "HDF5's own structures");
        flip(shard_fixture_path(&x, "shard_00001.h5"), at, 0x04);
    }
    FIX_OK(lsa_shards_open(&s, x.dir, &fix_err));
    lsa_shards_close(s);
    lsa_manifest_fini(&m);
    shard_fixture_free(&x);
}

static void test_flipped_anywhere(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("any");
    shard_fixture_seal(&x);
    char path[512];
    snprintf(path, sizeof path, "%s", shard_fixture_path(&x, "shard_00000.h5"));
    int64_t n;
    FIX_OK(lsa_file_size(&n, path, &fix_err));
    lsa_rng r = lsa_rng_make(99, 1);
    int refused = 0;
    for (int round = 0; round < 400; round++) {
        const int64_t at = round < 100 ? round : (int64_t)lsa_rng_below(&r, (uint64_t)n);
        const uint8_t mask = (uint8_t)(1u << lsa_rng_below(&r, 8));
        flip(path, at, mask);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            alarm(20);
            omp_set_num_threads(1); /* threads of a team do not survive a fork */
            lsa_err e = {0};
            if (lsa_shards_verify(x.dir, &e) != LSA_E_FORMAT) _exit(2);
            _exit(read_all(x.dir) == LSA_OK ? 0 : 1);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        if (!WIFEXITED(status) || WEXITSTATUS(status) > 1)
            fail_msg("flipping mask %d of byte %lld: wait status %d", mask, (long long)at, status);
        refused += WEXITSTATUS(status);
        flip(path, at, mask);
    }
    assert_true(refused > 20);
    FIX_OK(lsa_shards_verify(x.dir, &fix_err));
    shard_fixture_free(&x);
}

/* ---- lies: hashes fit, content does not ---- */

static void late_label(shard_fixture *x) { /* a chunk that exists but is not visible to its row */
    x->d[0].labels.chunk[x->d[0].labels.begin[30] - 1] = 9;
}
static void far_label(shard_fixture *x) {
    x->d[2].labels.chunk[x->d[2].labels.n_entry - 1] = 16;
}
static void negative_stat(shard_fixture *x) {
    x->d[2].stats[1].chunk[0] = -1;
}
static void far_dense(shard_fixture *x) {
    lsa_csr *c = &x->d[2].dense[2];
    c->chunk[c->n_entry - 1] = 1 << 30;
}
static void falling(shard_fixture *x) {
    lsa_csr *c = &x->d[2].labels;
    c->chunk[c->begin[64] - 1] = c->chunk[c->begin[64] - 2];
}
static void begin_falls(shard_fixture *x) {
    x->d[2].labels.begin[40] = x->d[2].labels.begin[41] + 1;
}
static void begin_far(shard_fixture *x) {
    x->d[2].stats[0].begin[40] = INT64_MAX - 5;
}
static void begin_negative(shard_fixture *x) {
    x->d[2].stats[0].begin[40] = INT64_MIN;
}
static void many_votes(shard_fixture *x) {
    x->d[0].labels.votes[5] = 4;
}
static void no_votes(shard_fixture *x) {
    x->d[0].labels.votes[5] = 0;
}
static void nan_mass(shard_fixture *x) {
    x->d[0].stats[2].mass[3] = 0x7e00;
}
static void big_mass(shard_fixture *x) {
    for (int64_t i = 0; i < x->d[0].stats[2].n_entry; i++) x->d[0].stats[2].mass[i] = lsa_f32_to_f16(0.9f);
}
static void inf_logit(shard_fixture *x) {
    x->d[0].stats[2].logit[3] = 0x7c00;
}
static void bad_sink(shard_fixture *x) {
    x->d[0].sink_mass[1][7] = lsa_f32_to_f16(-0.5f);
}
static void bad_rest(shard_fixture *x) {
    x->d[0].dense[1].rest[2] = lsa_f32_to_f16(2.0f);
}
static void dense_order(shard_fixture *x) {
    x->d[0].dense[1].row[2] = x->d[0].dense[1].row[1];
}
static void nan_hidden(shard_fixture *x) {
    x->d[0].hidden[0][3] = 0x7fc0;
}
static void zero_scale(shard_fixture *x) {
    memset(x->d[0].key[2] + 3 * LSA_KEY_BYTES + 128, 0, 4);
}
static void other_keys(shard_fixture *x) { /* probes no longer fit: as if RoPE or the rotation were wrong */
    for (int i = 0; i < 128; i++) x->d[2].key[0][5 * LSA_KEY_BYTES + i] ^= 0x80;
}
static void far_probe(shard_fixture *x) {
    x->d[2].probe_row[1] = 64;
}

static void test_lies(void **state) {
    (void)state;
    const struct {
        void (*tell)(shard_fixture *x);
        const char *says;
    } lie[] = {{late_label, "not visible"},
               {far_label, "'/labels' row 63: chunk 16 must be in [0, 16)"},
               {negative_stat, "'/stats/c1' row"},
               {far_dense, "'/dense/c2' row"},
               {falling, "ascending"},
               {begin_falls, "falls at row 41"},
               {begin_far, "/stats/c0/begin"},
               {begin_negative, "/stats/c0/begin"},
               {many_votes, "4 votes"},
               {no_votes, "0 votes"},
               {nan_mass, "mass"},
               {big_mass, "masses add up"},
               {inf_logit, "not finite"},
               {bad_sink, "'/stats/c1/sink_mass' row 7"},
               {bad_rest, "dense masses"},
               {dense_order, "'/dense/c1/row' is not ascending"},
               {nan_hidden, "not finite"},
               {zero_scale, "key 3 of layer c2 has scale 0"},
               {other_keys, "correlate"},
               {far_probe, "/probe/row 1"}};
    shard_fixture good = shard_fixture_make("good");
    shard_fixture_seal(&good);
    FIX_OK(lsa_shards_verify(good.dir, &fix_err));
    shard_fixture_free(&good);
    for (size_t i = 0; i < sizeof lie / sizeof *lie; i++) {
        shard_fixture x = shard_fixture_make("lies");
        lie[i].tell(&x);
        shard_fixture_seal(&x);
        FIX_REFUSE(lsa_shards_verify(x.dir, &fix_err), LSA_E_FORMAT, lie[i].says);
        shard_fixture_free(&x);
    }
}

/* Numbers inside the document table are checked when the folder is opened. */
static void overwrite(const char *path, const char *set, int64_t index, int64_t value) {
    lsa_h5_reader *h;
    int64_t bytes, at;
    uint64_t hash;
    FIX_OK(lsa_h5_open(&h, path, &fix_err));
    FIX_OK(lsa_h5_find_any(h, set, &bytes, &at, &hash, &fix_err));
    lsa_h5_close(h);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    assert_true(fd >= 0 && pwrite(fd, &value, 8, (off_t)(at + 8 * index)) == 8);
    close(fd);
}

static void test_lying_table(void **state) {
    (void)state;
    const struct {
        const char *set;
        int64_t index, value;
        const char *says;
    } lie[] = {
        {"/docs/n_tokens", 0, -1, "do not fit together"},
        {"/docs/n_tokens", 0, INT64_MAX, "do not fit together"},
        {"/docs/key_begin", 0, 1, "starts at 1"},
        {"/docs/key_begin", 1, 1000, "falls at row 2"},
        {"/docs/row_begin", 1, -5, "falls at row 1"},
        {"/docs/row_begin", 2, 44, "ends at 44, expected 43"},
        {"/rows/position", 0, INT64_MAX, "first labelled position"},
        {"/rows/position", 0, -1, "first labelled position"},
        {"/hidden/row", 0, 1000, "points outside the rows"},
        {"/hidden/row", 1, 3, "not ascending"},
        {"/hidden/row", 0, -7, "not ascending"},
    };
    for (size_t i = 0; i < sizeof lie / sizeof *lie; i++) {
        shard_fixture x = shard_fixture_make("table");
        shard_fixture_seal(&x);
        char path[512];
        snprintf(path, sizeof path, "%s", shard_fixture_path(&x, "shard_00000.h5"));
        overwrite(path, lie[i].set, lie[i].index, lie[i].value);
        lsa_shards *s;
        FIX_REFUSE(lsa_shards_open(&s, x.dir, &fix_err), LSA_E_FORMAT, lie[i].says);
        assert_null(s);
        shard_fixture_free(&x);
    }
    shard_fixture x = shard_fixture_make(
        "table"); /* a later position is a matter for verify, once the hashes are made to fit */
    shard_fixture_seal(&x);
    overwrite(shard_fixture_path(&x, "shard_00000.h5"), "/rows/position", 17, 3);
    FIX_REFUSE(lsa_shards_verify(x.dir, &fix_err), LSA_E_FORMAT, "'/rows/position'");
    shard_fixture_free(&x);
}

static void wide_hidden(lsa_manifest *m) {
    m->info.hidden = FIX_HIDDEN * 2;
}
static void more_layers(lsa_manifest *m) {
    m->info.csa_id[m->info.n_csa++].v = 100;
}
static void keys_of_1(lsa_manifest *m) {
    m->info.has_keys[1] = true;
}
static void other_teacher(lsa_manifest *m) {
    m->info.teacher_hash ^= 1;
}
static void more_docs(lsa_manifest *m) {
    m->shard.data[0].documents = 3;
}
static void fewer_rows(lsa_manifest *m) {
    m->shard.data[0].rows = 42;
}
static void huge(lsa_manifest *m) {
    m->shard.data[0].documents = INT64_C(1) << 49;
}
static void missing_file(lsa_manifest *m) {
    snprintf(m->shard.data[1].file, sizeof m->shard.data[1].file, "shard_00007.h5");
}
static void twice(lsa_manifest *m) {
    m->shard.data[1] = m->shard.data[0];
}
static void outside(lsa_manifest *m) {
    snprintf(m->shard.data[1].file, sizeof m->shard.data[1].file, "../x.h5");
}
static void none(lsa_manifest *m) {
    m->shard.len = 0;
}
static void other_stride(lsa_manifest *m) {
    m->info.hidden_stride = 7;
}

static void test_lying_manifest(void **state) {
    (void)state;
    const struct {
        void (*edit)(lsa_manifest *m);
        const char *says;
        bool verify; /* open accepts it */
    } lie[] = {{wide_hidden, "expected [5,32]", false},
               {more_layers, "'/stats/c3/begin' is missing", false},
               {keys_of_1, "'/keys/c1' is missing", false},
               {other_teacher, "another teacher", false},
               {more_docs, "expected [3,0]", false},
               {fewer_rows, "expected 42", false},
               {huge, "more than its", false},
               {missing_file, "shard_00007.h5' is missing", false},
               {twice, "listed twice", false},
               {outside, "not a plain file name", false},
               {none, "no sealed shard", false},
               {other_stride, "not on the stride of 7", true}};
    for (size_t i = 0; i < sizeof lie / sizeof *lie; i++) {
        shard_fixture x = shard_fixture_make("manifest");
        shard_fixture_seal(&x);
        remanifest(&x, lie[i].edit);
        lsa_shards *s = NULL;
        if (!lie[i].verify)
            FIX_REFUSE(lsa_shards_open(&s, x.dir, &fix_err), LSA_E_FORMAT, lie[i].says);
        else
            FIX_REFUSE(lsa_shards_verify(x.dir, &fix_err), LSA_E_FORMAT, lie[i].says);
        assert_null(s);
        shard_fixture_free(&x);
    }
    lsa_shards *s;
    FIX_REFUSE(lsa_shards_open(&s, "/nonexistent", &fix_err), LSA_E_IO, "manifest.json");
}

/* The manifest as text: parsed whole or refused, and what is saved is what was parsed. */
static void test_manifest_text(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("text");
    shard_fixture_seal(&x);
    char *text, *again;
    size_t n, n2;
    lsa_manifest m;
    char path[512];
    snprintf(path, sizeof path, "%s", shard_fixture_path(&x, "manifest.json"));
    FIX_OK(lsa_read_file(&text, &n, path, &fix_err));
    FIX_OK(lsa_manifest_parse(&m, text, n, "m", &fix_err));
    FIX_OK(lsa_manifest_save(&m, x.dir, &fix_err));
    lsa_manifest_fini(&m);
    FIX_OK(lsa_read_file(&again, &n2, path, &fix_err));
    assert_int_equal(n, n2);
    assert_memory_equal(text, again, n);
    for (size_t cut = 0; cut + 2 < n; cut++) { /* the last two bytes are "}\n" */
        assert_int_equal(lsa_manifest_parse(&m, text, cut, "m", NULL), LSA_E_FORMAT);
        lsa_manifest_fini(&m);
    }
    const struct {
        const char *from, *to, *says;
    } edit[] = {{"lsa-shard/1", "lsa-shard/9", "this program reads lsa-shard/1"},
                {"\"hidden\": 16", "\"hidden\": 00", "not valid JSON"},
                {"\"hidden\": 16", "\"hidden\": -4", "must be in [1,"},
                {"\"hidden_stride\": 8", "\"hidden_stride\": 0", "hidden_stride"},
                {"\"pool\": 64", "\"pool\": \"\"", "'pool' must be an integer"},
                {"\"ordinal\": 1", "\"ordinal\": 0", "ordinal"},
                {"\"id\": 3", "\"id\": 1", "'id' must be in [2,"},
                {"\"base\": 160000.0", "\"base\": 0.00000", "rope"},
                {"\"ratio\": 4", "\"ratio\": 8", "ratio"},
                {"\"shards\"", "\"shapes\"", "'shards' is missing"},
                {"\"documents\": 2", "\"documents\": 0", "documents"}};
    for (size_t i = 0; i < sizeof edit / sizeof *edit; i++) {
        char *copy = strdup(text), *at = strstr(copy, edit[i].from);
        assert_non_null(at);
        memcpy(at, edit[i].to, strlen(edit[i].to));
        FIX_REFUSE(lsa_manifest_parse(&m, copy, n, "m", &fix_err), LSA_E_FORMAT, edit[i].says);
        free(copy);
    }
    lsa_free(text);
    lsa_free(again);
    shard_fixture_free(&x);
}

/* ---- another codec: everything in order, but not what this version reads ---- */

static char g_shard[512];

static void rehash_head(lsa_manifest *m) {
    lsa_manifest_shard *const a = &m->shard.data[0];
    FIX_OK(lsa_shard_hash_head(&a->head_xxh64, g_shard, a->head_bytes, &fix_err));
}

static void test_other_codec(void **state) {
    (void)state;
    const struct {
        const char *from, *to, *says;
    } other[] = {{"e4m3_f32", "e2m1_ue8", "keys in codec 'e2m1_ue8'"},
                 {"hadamard128", "none_at_all", "rotation 'none_at_all'"}};
    for (size_t i = 0; i < 2; i++) {
        shard_fixture x = shard_fixture_make("codec");
        shard_fixture_seal(&x);
        snprintf(g_shard, sizeof g_shard, "%s", shard_fixture_path(&x, "shard_00000.h5"));
        char *text;
        size_t n;
        int found = 0;
        FIX_OK(lsa_read_file(&text, &n, g_shard, &fix_err));
        const size_t len = strlen(other[i].from);
        for (size_t at = 0; at + len <= n; at++)
            if (!memcmp(text + at, other[i].from, len)) memcpy(text + at, other[i].to, len), found++;
        assert_true(found > 0);
        FILE *const f = fopen(g_shard, "wb");
        assert_true(f && fwrite(text, 1, n, f) == n && fclose(f) == 0);
        lsa_free(text);
        remanifest(&x, rehash_head);
        lsa_shards *s;
        FIX_REFUSE(lsa_shards_open(&s, x.dir, &fix_err), LSA_E_UNSUPPORTED, other[i].says);
        FIX_REFUSE(lsa_shards_verify(x.dir, &fix_err), LSA_E_UNSUPPORTED, other[i].says);
        shard_fixture_free(&x);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_truncated),      cmocka_unit_test(test_flipped_data),
        cmocka_unit_test(test_flipped_head),   cmocka_unit_test(test_flipped_anywhere),
        cmocka_unit_test(test_lies),           cmocka_unit_test(test_lying_table),
        cmocka_unit_test(test_lying_manifest), cmocka_unit_test(test_manifest_text),
        cmocka_unit_test(test_other_codec)};
    return cmocka_run_group_tests(tests, shard_fixture_begin, shard_fixture_end);
}
