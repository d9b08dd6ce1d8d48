/* How fast steps go when documents come from disk while training: see bench.h. Three rates: steps with every
 * document resident, steps of one epoch with a pool of a quarter of them, and the disk alone, read by as many
 * threads as the pool has readers. The last two begin with the page cache dropped: each byte comes from the
 * disk.
 */
#include <fcntl.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/core/clock.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"
#include "trainer/bench.h"
#include "trainer/resident.h"

typedef struct stream {
    lsa_ctx *ctx;
    lsa_source *s;
    lsa_order *o;
    lsa_resident *x;
    lsa_indexer_geom g;
    float *params;
} stream;

static void close_stream(stream *t) {
    lsa_resident_destroy(t->x);
    lsa_order_destroy(t->o);
    lsa_source_close(t->s);
    lsa_free(t->params);
}

/* Bytes that this process has had read from storage. */
static double storage_bytes(void) {
    struct rusage u;
    return getrusage(RUSAGE_SELF, &u) == 0 ? 512.0 * (double)u.ru_inblock : 0;
}

/* Windows a second over the rest of an epoch after a first step, with the given pool, twice if everything
 * stays resident; bytes and windows of an epoch. */
static lsa_status rate(double *windows_per_s, double *first_s, int64_t *data_bytes, int64_t *n_window,
                       const lsa_bench *b, lsa_ctx *ctx, const char *data, int64_t pool_mib, int epochs,
                       lsa_err *err) {
    lsa_status st = LSA_OK;
    stream t = {.ctx = ctx};
    lsa_recipe r = b->r;
    lsa_shards *sh = NULL;
    lsa_cursor c = {0};
    lsa_step_result res;
    r.pool_mib = pool_mib;
    r.val_documents = 0;
    LSA_TRY(lsa_shards_open(&sh, data, err));
    const lsa_shards_info f = *lsa_shards_get_info(sh);
    t.g = (lsa_indexer_geom){.hidden = f.hidden,
                             .n_head = (int32_t)b->heads,
                             .head_dim = 128,
                             .rank = (int32_t)b->rank,
                             .eps = 1e-6f,
                             .rope = f.rope};
    for (int32_t l = 0; l < f.n_csa; l++)
        if (f.has_keys[l]) {
            t.g.ord[t.g.n_layer].v = l;
            t.g.id[t.g.n_layer++] = f.csa_id[l];
        }
    LSA_TRY(lsa_indexer_geom_check(&t.g, err));
    LSA_TRY(lsa_source_open(&t.s, data, &r, &t.g, false, err));
    LSA_TRY(lsa_order_create(&t.o, t.s, &r, 0, 1, err));
    *data_bytes = 0;
    for (int64_t d = 0; d < lsa_source_n_train(t.s); d++) *data_bytes += lsa_source_doc_bytes(t.s, d);
    LSA_TRY(LSA_NEW(t.params, lsa_indexer_n_param(&t.g), err));
    lsa_indexer_init_random(t.params, &t.g, 1);
    LSA_TRY(lsa_resident_create(&t.x, ctx, NULL, t.s, t.o, &r, &t.g, t.params, NULL, NULL, 0, err));
    const double t0 = lsa_now_s();
    LSA_TRY(lsa_resident_launch(t.x, &c, 0, err));
    LSA_TRY(lsa_resident_take(t.x, &res, err));
    *first_s = lsa_now_s() - t0;
    *n_window = lsa_order_epoch_windows(t.o);
    const int64_t n = lsa_max_i64(8, epochs * *n_window / r.batch - 1);
    const double t1 = lsa_now_s();
    for (int64_t i = 0; i <= n; i++) {
        if (i < n) LSA_TRY(lsa_resident_launch(t.x, &c, i, err));
        if (i > 0) LSA_TRY(lsa_resident_take(t.x, &res, err));
    }
    *windows_per_s = (double)(n * r.batch) / (lsa_now_s() - t1);
done:
    lsa_shards_close(sh);
    close_stream(&t);
    return st;
}

/* Every shard file once, by as many threads as the pool has readers: dropped from the page cache, or read. */
static lsa_status each_shard(int64_t *bytes, const char *data, bool drop, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_shards *sh = NULL;
    int64_t n_byte = 0, failed = 0;
    LSA_TRY(lsa_shards_open(&sh, data, err));
    const int64_t n = lsa_shards_get_info(sh)->n_shard;
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : n_byte, failed) num_threads(LSA_RESIDENT_READERS)
    for (int64_t i = 0; i < n; i++) {
        enum { PART = 1 << 22 };
        char *const buf = malloc(PART);
        const int fd = buf ? open(lsa_shards_path(sh, (int32_t)i), O_RDONLY) : -1;
        ssize_t k;
        if (fd < 0)
            failed++;
        else if (drop)
            failed += fsync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0;
        else
            while ((k = read(fd, buf, PART)) > 0) n_byte += k;
        if (fd >= 0) close(fd);
        free(buf);
    }
    *bytes = n_byte;
    if (failed) LSA_FAIL(LSA_E_IO, "%lld shard files of '%s' could not be read", (long long)failed, data);
done:
    lsa_shards_close(sh);
    return st;
}

/* Bytes a second of the disk alone. */
static lsa_status disk_rate(double *out, const char *data, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t bytes;
    LSA_TRY(each_shard(&bytes, data, true, err));
    const double t0 = lsa_now_s();
    LSA_TRY(each_shard(&bytes, data, false, err));
    *out = (double)bytes / (lsa_now_s() - t0);
done:
    return st;
}

lsa_status lsa_bench_stream(const lsa_bench *b, const char *data, const char *device, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_ctx *ctx = NULL;
    double held, rotating, disk, first_held, first;
    int64_t bytes, n_window, none;
    LSA_TRY(lsa_ctx_create(&ctx, device, err));
    if (lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA)
        LSA_FAIL(LSA_E_DEVICE, "bench measures the GPU step: %s has none", lsa_ctx_describe(ctx));
    LSA_TRY(rate(&held, &first_held, &bytes, &n_window, b, ctx, data, 1 << 20, 2, err));
    LSA_TRY(disk_rate(&disk, data, err));
    LSA_TRY(each_shard(&none, data, true, err));
    const double read0 = storage_bytes();
    LSA_TRY(rate(&rotating, &first, &bytes, &n_window, b, ctx, data, lsa_max_i64(1, bytes >> 22), 1, err));
    /* bytes/s that the full rate takes: keys, hidden vectors and labels, and what the system reads ahead */
    const double need = (storage_bytes() - read0) / (double)n_window * held;
    const double allowed = need > disk ? held * disk / need : held;
    printf(
        "{\"bench\": \"stream\", \"device\": \"%s\", \"batch\": %lld, \"data_mib\": %.0f, \"pool_mib\": %.0f, \"resident_windows_per_s\": %.0f, "
        "\"rotating_windows_per_s\": %.0f, \"of_resident\": %.3f, \"of_what_the_disk_allows\": %.3f, \"disk_gb_per_s\": %.2f, \"needed_gb_per_s\": %.2f, \"binds\": \"%s\", "
        "\"first_step_s_resident\": %.3f, \"first_step_s_rotating\": %.3f}\n",
        lsa_ctx_describe(ctx), (long long)b->r.batch, (double)bytes / 1048576.0, (double)(bytes >> 22), held,
        rotating, rotating / held, rotating / allowed, disk / 1e9, need / 1e9,
        need > disk              ? "disk"
        : rotating >= 0.9 * held ? "step"
                                 : "readers",
        first_held, first);
done:
    lsa_ctx_destroy(ctx);
    return st;
}
