/* How fast steps go when documents come from disk while training: see bench.h. Three rates: steps with every
 * document resident, steps with a pool of a quarter of them, and the disk alone, read by as many threads as
 * the pool has readers with the page cache dropped first. */
#include <fcntl.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
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

/* Windows a second over two epochs after a first step, with the given pool; bytes and windows of an epoch. */
static lsa_status rate(double *windows_per_s, double *first_s, int64_t *data_bytes, int64_t *n_window,
                       const lsa_bench *b, lsa_ctx *ctx, const char *data, int64_t pool_mib, lsa_err *err) {
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
    LSA_TRY(lsa_resident_create(&t.x, ctx, t.s, t.o, &r, &t.g, t.params, NULL, NULL, 0, err));
    const double t0 = lsa_now_s();
    LSA_TRY(lsa_resident_launch(t.x, &c, 0, err));
    LSA_TRY(lsa_resident_take(t.x, &res, err));
    *first_s = lsa_now_s() - t0;
    *n_window = lsa_order_epoch_windows(t.o);
    const int64_t n = lsa_max_i64(8, 2 * *n_window / r.batch);
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

/* Bytes a second of reading the shard files, cold where the system lets us drop its cache. */
static lsa_status disk_rate(double *out, const char *data, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_shards *sh = NULL;
    int64_t bytes = 0, failed = 0;
    LSA_TRY(lsa_shards_open(&sh, data, err));
    const int64_t n = lsa_shards_get_info(sh)->n_shard;
    double t0 = 0;
    for (int pass = 0; pass < 2; pass++) { /* drop, then read */
        t0 = lsa_now_s();
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : bytes, failed) num_threads(LSA_RESIDENT_READERS)
        for (int64_t i = 0; i < n; i++) {
            enum { PART = 1 << 22 };
            char *const buf = malloc(PART);
            const int fd = buf ? open(lsa_shards_path(sh, (int32_t)i), O_RDONLY) : -1;
            ssize_t k;
            if (fd < 0)
                failed++;
            else if (pass == 0)
                failed += fsync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0;
            else
                while ((k = read(fd, buf, PART)) > 0) bytes += k;
            if (fd >= 0) close(fd);
            free(buf);
        }
    }
    *out = (double)bytes / (lsa_now_s() - t0);
    if (failed) LSA_FAIL(LSA_E_IO, "%lld shard files of '%s' could not be read", (long long)failed, data);
done:
    lsa_shards_close(sh);
    return st;
}

lsa_status lsa_bench_stream(const lsa_bench *b, const char *data, const char *device, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_ctx *ctx = NULL;
    double held, rotating, disk, first_held, first;
    int64_t bytes, n_window;
    LSA_TRY(lsa_ctx_create(&ctx, device, err));
    if (lsa_ctx_kind(ctx) != LSA_BACKEND_CUDA)
        LSA_FAIL(LSA_E_DEVICE, "bench measures the GPU step: %s has none", lsa_ctx_describe(ctx));
    LSA_TRY(rate(&held, &first_held, &bytes, &n_window, b, ctx, data, 1 << 20, err));
    LSA_TRY(disk_rate(&disk, data, err));
    LSA_TRY(rate(&rotating, &first, &bytes, &n_window, b, ctx, data, lsa_max_i64(1, bytes >> 22), err));
    const double need = (double)bytes / (double)n_window * held; /* bytes/s that the full rate takes */
    printf(
        "{\"bench\": \"stream\", \"device\": \"%s\", \"batch\": %lld, \"data_mib\": %.0f, \"pool_mib\": %.0f, \"resident_windows_per_s\": %.0f, "
        "\"rotating_windows_per_s\": %.0f, \"of_resident\": %.3f, \"disk_gb_per_s\": %.2f, \"needed_gb_per_s\": %.2f, \"binds\": \"%s\", "
        "\"first_step_s_resident\": %.3f, \"first_step_s_rotating\": %.3f}\n",
        lsa_ctx_describe(ctx), (long long)b->r.batch, (double)bytes / 1048576.0, (double)(bytes >> 22), held,
        rotating, rotating / held, disk / 1e9, need / 1e9,
        rotating >= 0.97 * held ? "step"
        : need > disk           ? "disk"
                                : "readers",
        first_held, first);
done:
    lsa_ctx_destroy(ctx);
    return st;
}
