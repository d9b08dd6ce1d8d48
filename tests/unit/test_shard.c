/* Shards: what is sealed reads back bit for bit, from several threads too; equal content gives equal files; a
 * full disk leaves what was there. Damage and lies: test_shard_damage.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <omp.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "data/h5.h"
#include "data/shard_internal.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"
#include "tests/testkit/shard_fixture.h"

/* ---- round trip ---- */

static void same_csr(const lsa_csr *a, const lsa_csr *b) {
    const size_t n = (size_t)b->n_entry;
    assert_int_equal(a->n_row, b->n_row);
    assert_int_equal(a->n_entry, b->n_entry);
    if (b->n_row) assert_memory_equal(a->begin, b->begin, (size_t)(b->n_row + 1) * 8);
    if (!n) return;
    assert_memory_equal(a->chunk, b->chunk, n * 4);
    if (b->votes) assert_memory_equal(a->votes, b->votes, n);
    if (b->logit) assert_memory_equal(a->logit, b->logit, n * 2);
    if (b->mass) assert_memory_equal(a->mass, b->mass, n * 2);
}

static void same_doc(const lsa_shards *s, int64_t i, const lsa_doc_stats *d, const lsa_shards_info *f) {
    const lsa_shards_doc g = lsa_shards_get_doc(s, i);
    assert_string_equal(g.name, d->name);
    assert_int_equal(g.n_token, d->n_token);
    assert_int_equal(g.n_key, d->n_key);
    assert_int_equal(g.n_row, d->n_token);
    assert_int_equal(g.first_position, 0);
    assert_int_equal(g.n_hidden, d->n_hidden);
    assert_int_equal(g.shard, i / 2);
    lsa_csr c;
    FIX_OK(lsa_shards_labels(&c, s, i, &fix_err));
    same_csr(&c, &d->labels);
    lsa_csr_fini(&c);
    for (int32_t o = 0; o < f->n_csa; o++) {
        uint8_t *key;
        int64_t *pos;
        uint16_t *hid;
        FIX_OK(lsa_shards_stats(&c, s, i, (lsa_csa_ord){o}, &fix_err));
        same_csr(&c, &d->stats[o]);
        lsa_csr_fini(&c);
        FIX_OK(lsa_shards_dense(&c, s, i, (lsa_csa_ord){o}, &fix_err));
        same_csr(&c, &d->dense[o]);
        for (int64_t r = 0; r < c.n_row; r++) {
            assert_int_equal(c.row[r], d->dense[o].row[r]);
            assert_int_equal(c.rest[r], d->dense[o].rest[r]);
        }
        lsa_csr_fini(&c);
        if (!f->has_keys[o]) {
            FIX_REFUSE(lsa_shards_keys(&key, s, i, (lsa_csa_ord){o}, &fix_err), LSA_E_CONFIG, "no keys");
            FIX_REFUSE(lsa_shards_hidden(&pos, &hid, s, i, (lsa_csa_ord){o}, &fix_err), LSA_E_CONFIG,
                       "no keys");
            continue;
        }
        FIX_OK(lsa_shards_keys(&key, s, i, (lsa_csa_ord){o}, &fix_err));
        FIX_OK(lsa_shards_hidden(&pos, &hid, s, i, (lsa_csa_ord){o}, &fix_err));
        if (d->n_key) assert_memory_equal(key, d->key[o], (size_t)(d->n_key * LSA_KEY_BYTES));
        if (d->n_hidden) assert_memory_equal(hid, d->hidden[o], (size_t)(d->n_hidden * FIX_HIDDEN * 2));
        for (int64_t h = 0; h < d->n_hidden; h++) assert_int_equal(pos[h], (h + 1) * FIX_STRIDE - 1);
        lsa_free(key);
        lsa_free(pos);
        lsa_free(hid);
    }
    FIX_REFUSE(lsa_shards_stats(&c, s, i, (lsa_csa_ord){3}, &fix_err), LSA_E_CONFIG, "layers [0, 3)");
    FIX_REFUSE(lsa_shards_dense(&c, s, i, (lsa_csa_ord){-1}, &fix_err), LSA_E_CONFIG, "layers [0, 3)");
}

static void test_round_trip(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("round");
    shard_fixture_seal(&x);
    FIX_OK(lsa_shards_verify(x.dir, &fix_err));
    lsa_shards *s;
    FIX_OK(lsa_shards_open(&s, x.dir, &fix_err));
    const lsa_shards_info *f = lsa_shards_get_info(s);
    assert_string_equal(f->teacher, x.f.teacher);
    assert_true(f->teacher_hash == x.f.teacher_hash);
    assert_int_equal(f->hidden_stride, FIX_STRIDE);
    assert_int_equal(f->csa_id[2].v, 8);
    assert_false(f->has_keys[1]);
    assert_true(f->rope.base == x.f.rope.base && f->label_top_p == 0.6);
    assert_int_equal(f->n_doc, FIX_DOCS);
    assert_int_equal(f->n_token, 40 + 3 + 64 + 9);
    assert_int_equal(f->n_shard, 2);
    for (int i = 0; i < FIX_DOCS; i++) same_doc(s, i, &x.d[i], &x.f);
    const uint64_t h = lsa_shards_hash(s);
    lsa_shards_close(s);
    x.d[3].labels.votes[0] ^= 1; /* another content is another identity */
    shard_fixture_seal(&x);
    FIX_OK(lsa_shards_open(&s, x.dir, &fix_err));
    assert_true(lsa_shards_hash(s) != h);
    lsa_shards_close(s);
    shard_fixture_free(&x);
}

/* Reads from several threads at once give what one thread reads. */
static void test_threads(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("threads");
    shard_fixture_seal(&x);
    lsa_shards *s;
    FIX_OK(lsa_shards_open(&s, x.dir, &fix_err));
    int bad = 0;
#pragma omp parallel for num_threads(4) reduction(+ : bad)
    for (int i = 0; i < 400; i++) {
        const lsa_doc_stats *d = &x.d[i % FIX_DOCS];
        lsa_csr c;
        uint8_t *key = NULL;
        if (lsa_shards_labels(&c, s, i % FIX_DOCS, NULL) != LSA_OK ||
            lsa_shards_keys(&key, s, i % FIX_DOCS, (lsa_csa_ord){2}, NULL) != LSA_OK)
            bad++;
        else if (c.n_entry != d->labels.n_entry ||
                 (c.n_entry && memcmp(c.chunk, d->labels.chunk, (size_t)c.n_entry * 4)) ||
                 (d->n_key && memcmp(key, d->key[2], (size_t)(d->n_key * LSA_KEY_BYTES))))
            bad++;
        lsa_csr_fini(&c);
        lsa_free(key);
    }
    assert_int_equal(bad, 0);
    lsa_shards_close(s);
    shard_fixture_free(&x);
}

/* Files must not depend on when they were written: HDF5 keeps times in whole seconds, so wait for another
 * one. */
static void test_equal_bytes(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("equal");
    lsa_manifest_shard a, b;
    FIX_OK(lsa_shard_seal(&a, x.dir, "a.h5", &x.f, x.d, FIX_DOCS, &fix_err));
    usleep(1100000);
    const int threads = omp_get_max_threads();
    omp_set_num_threads(threads == 1 ? 5 : 1); /* nor on the number of threads */
    FIX_OK(lsa_shard_seal(&b, x.dir, "b.h5", &x.f, x.d, FIX_DOCS, &fix_err));
    omp_set_num_threads(threads);
    assert_true(a.xxh64 == b.xxh64);
    assert_int_equal(a.bytes, b.bytes);
    assert_int_equal(a.tokens, 116);
    assert_int_equal(a.documents, FIX_DOCS);
    int64_t guess = 0;
    for (int i = 0; i < FIX_DOCS; i++) guess += lsa_doc_stats_bytes(&x.d[i], &x.f);
    assert_true(guess < a.bytes &&
                a.bytes < guess + 150000); /* what boundaries are made of is near the truth */
    shard_fixture_free(&x);
}

/* ---- disk full ---- */

/* Under every limit the seal fails as "no space" and leaves neither the file nor a temporary; the shard
 * before stays. */
static void test_disk_full(void **state) {
    (void)state;
    shard_fixture x = shard_fixture_make("full");
    lsa_manifest_shard s;
    FIX_OK(lsa_shard_seal(&s, x.dir, "shard_00000.h5", &x.f, x.d, 1, &fix_err));
    lsa_manifest_shard whole;
    FIX_OK(lsa_shard_seal(&whole, x.dir, "whole.h5", &x.f, x.d, FIX_DOCS, &fix_err));
    for (int i = 0; i <= 40; i++) {
        const rlim_t limit = i == 40 ? (rlim_t)whole.bytes - 1 : (rlim_t)(whole.bytes * i / 40);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            const struct rlimit r = {limit, limit};
            omp_set_num_threads(1); /* threads of a team do not survive a fork */
            lsa_stop_install();     /* ignores SIGXFSZ, as the programs do */
            lsa_err e = {0};
            if (setrlimit(RLIMIT_FSIZE, &r)) _exit(9);
            lsa_status st = lsa_shard_seal(&s, x.dir, "shard_00001.h5", &x.f, x.d, FIX_DOCS, &e);
            if (st != LSA_E_NOSPC || e.code != st || !strstr(e.msg, "shard_00001.h5"))
                fprintf(stderr, "%d: %s\n", (int)st, e.msg);
            _exit(st == LSA_E_NOSPC && strstr(e.msg, "shard_00001.h5") ? 0 : 1);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        if (!WIFEXITED(status) || WEXITSTATUS(status))
            fail_msg("limit %lld: wait status %d", (long long)limit, status);
        assert_false(lsa_exists(shard_fixture_path(&x, "shard_00001.h5")));
        assert_false(lsa_exists(shard_fixture_path(&x, "shard_00001.h5.tmp")));
        FIX_OK(lsa_shard_check_hashes(NULL, NULL, shard_fixture_path(&x, "shard_00000.h5"), &fix_err));
    }
    FIX_OK(lsa_shard_seal(&s, x.dir, "shard_00001.h5", &x.f, x.d, FIX_DOCS, &fix_err)); /* space is back */
    assert_true(s.xxh64 == whole.xxh64);
    shard_fixture_free(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_round_trip), cmocka_unit_test(test_threads),
                                       cmocka_unit_test(test_equal_bytes), cmocka_unit_test(test_disk_full)};
    return cmocka_run_group_tests(tests, shard_fixture_begin, shard_fixture_end);
}
