/* The host's side of a dump beside a GPU, at full speed: taps, merging, sealing and verification, with a
 * made-up teacher of the mini teacher's shape that selects and weighs at once. Arguments: lengths of the
 * documents (COUNTxTOKENS,...; 3x8192,1x65536) and the folder to write to (in /tmp, removed). One JSON line:
 * tokens/s and seconds by stage, and a hash over the shards, which must not depend on the number of threads.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/dump/run.h"
#include "kernels/backend.h"
#include "kernels/core/file.h"
#include "kernels/core/hash.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/core/mem.h"
#include "kernels/core/num.h"

#ifdef LSA_HAVE_CUDA
int main(void) {
    puts("skipped: the made-up teacher stands in for the GPU's in builds without CUDA only");
    return 77;
}
#else

/* ---- a teacher that is quick: in the place of kernels/cuda/gpu_teacher_stub.c ---- */

struct lsa_gpu_layer {
    int32_t roles;
};

struct lsa_gpu_teacher {
    lsa_gpu_teacher_geom g;
    lsa_gpu_teacher_doc doc;
    int64_t probe[LSA_GPU_MAX_PROBE], chunk, max_tokens, turn;
    int32_t *sel, *n_sel;
    float *logit, *mass, *part, *key, *hidden, *row, *iq;
};

lsa_status lsa_cuda_open(lsa_ctx *c, int index, lsa_err *err) {
    (void)index, (void)err;
    *c = (lsa_ctx){LSA_BACKEND_CUDA, &lsa_backend_cpu, NULL, "made up"};
    return LSA_OK;
}
lsa_status lsa_gpu_free_bytes(int64_t *out, lsa_ctx *ctx, lsa_err *err) {
    (void)ctx, (void)err;
    *out = INT64_C(1) << 40;
    return LSA_OK;
}

void lsa_gpu_teacher_destroy(lsa_gpu_teacher *t) {
    if (!t) return;
    void *const p[] = {t->sel, t->n_sel, t->logit, t->mass, t->part, t->key, t->hidden, t->row, t->iq};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lsa_free(p[i]);
    lsa_free(t);
}
lsa_status lsa_gpu_teacher_create(lsa_gpu_teacher **out, lsa_ctx *ctx, const lsa_gpu_teacher_geom *g,
                                  const lsa_gpu_teacher_tables *w, int64_t max_tokens, int64_t chunk,
                                  lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_gpu_teacher *t = NULL;
    const int64_t k = g->index_topk, n = max_tokens / LSA_CHUNK + 1, Di = g->index_head_dim;
    (void)ctx, (void)w;
    *out = NULL;
    LSA_TRY(LSA_NEW(t, 1, err));
    t->g = *g, t->chunk = chunk, t->max_tokens = max_tokens;
    LSA_TRY(LSA_NEW(t->sel, chunk * k, err));
    LSA_TRY(LSA_NEW(t->n_sel, chunk, err));
    LSA_TRY(LSA_NEW(t->logit, chunk * k, err));
    LSA_TRY(LSA_NEW(t->mass, chunk * k, err));
    LSA_TRY(LSA_NEW(t->part, chunk, err));
    LSA_TRY(LSA_NEW(t->key, (chunk / LSA_CHUNK + 1) * Di, err));
    LSA_TRY(LSA_NEW(t->hidden, (chunk + 1) * g->hidden, err));
    LSA_TRY(LSA_NEW(t->row, n, err));
    LSA_TRY(LSA_NEW(t->iq, (int64_t)g->index_n_head * (Di + 1), err));
    for (int64_t i = 0; i < chunk * k; i++) {
        t->logit[i] = (float)((i * 2654435761) % 4096) / 512; /* votes: some 20 of 64 */
        t->mass[i] = (float)((i * 40503) % 1000) / 128000;
    }
    for (int64_t i = 0; i < chunk; i++) t->part[i] = 0.125f;
    for (int64_t i = 0; i < (chunk / LSA_CHUNK + 1) * Di; i++) t->key[i] = (float)(i * 7 % 23) - 11;
    for (int64_t i = 0; i < chunk * g->hidden; i++) t->hidden[i] = (float)(i * 5 % 19) / 8;
    *out = t;
    t = NULL;
done:
    lsa_gpu_teacher_destroy(t);
    return st;
}

lsa_status lsa_gpu_layer_put(lsa_gpu_layer **out, lsa_gpu_teacher *t, const lsa_gpu_layer_weights *w,
                             lsa_err *err) {
    (void)t;
    const lsa_status st = LSA_NEW(*out, 1, err);
    if (st == LSA_OK) (*out)->roles = w->roles;
    return st;
}
void lsa_gpu_layer_drop(lsa_gpu_layer *l) {
    lsa_free(l);
}

lsa_status lsa_gpu_teacher_begin(lsa_gpu_teacher *t, const lsa_gpu_teacher_doc *doc, lsa_err *err) {
    (void)err;
    t->doc = *doc;
    for (int32_t i = 0; i < doc->n_probe; i++) t->probe[i] = doc->probe[i];
    return LSA_OK;
}

lsa_status lsa_gpu_teacher_layer(lsa_gpu_teacher *t, const lsa_gpu_layer *l, lsa_gpu_csa_tap *tap, void *user,
                                 lsa_err *err) {
    const int64_t k = t->g.index_topk;
    (void)err;
    t->turn++;
    for (int64_t p = 0; l->roles == 2 && tap && p < t->doc.n; p += t->chunk) {
        const int64_t m = lsa_min_i64(t->chunk, t->doc.n - p), turn = t->turn % 7;
        lsa_gpu_probe probe[LSA_GPU_MAX_PROBE];
        lsa_gpu_csa_rows a = {.first = p,
                              .m = m,
                              .top_k = k,
                              .sel = t->sel,
                              .n_sel = t->n_sel,
                              .logit = t->logit,
                              .mass = t->mass,
                              .window_mass = t->part,
                              .sink_mass = t->part,
                              .key = t->key,
                              .first_key = p / LSA_CHUNK,
                              .n_key = (p + m) / LSA_CHUNK - p / LSA_CHUNK,
                              .hidden = t->hidden,
                              .hidden_stride = t->doc.hidden_stride,
                              .probe = probe};
#pragma omp parallel for
        for (int64_t i = 0; i < m; i++) { /* spread over the context, some of it in every layer */
            const int64_t visible = lsa_visible(p + i), n = lsa_min_i64(k, visible);
            t->n_sel[i] = (int32_t)n;
            for (int64_t j = 0; j < n; j++) {
                const int64_t at = j * visible / n, room = visible / n;
                t->sel[i * k + j] = (int32_t)(at + (j % 2 ? 0 : turn * (room - 1) / 6));
            }
        }
        for (int32_t i = 0; i < t->doc.n_probe; i++)
            if (t->probe[i] >= p && t->probe[i] < p + m)
                probe[a.n_probe++] = (lsa_gpu_probe){t->probe[i], t->row, t->iq,
                                                     t->iq + t->g.index_n_head * t->g.index_head_dim};
        tap(user, &a);
    }
    return LSA_OK;
}

lsa_status lsa_gpu_teacher_drain(lsa_gpu_teacher *t, lsa_err *err) {
    (void)t, (void)err;
    return LSA_OK;
}
lsa_status lsa_gpu_teacher_seconds(lsa_gpu_teacher *t, double out[LSA_GPU_STAGES], lsa_err *err) {
    (void)t, (void)err;
    memset(out, 0, LSA_GPU_STAGES * sizeof *out);
    return LSA_OK;
}

/* ---- the bench ---- */

/* Documents begin with token 0. */
static lsa_status write_tokens(const char *path, const char *lengths, lsa_err *err) {
    lsa_status st = LSA_OK;
    int64_t *length = NULL, n = 0;
    FILE *const f = fopen(path, "wb");
    if (!f) LSA_RET_FAIL(LSA_E_IO, "cannot write '%s'", path);
    LSA_TRY(lsa_dump_lengths(&length, &n, lengths, err));
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < length[i]; k++) {
            const uint16_t id = (uint16_t)(k ? 2 + k % 97 : 0);
            if (fwrite(&id, sizeof id, 1, f) != 1) LSA_FAIL(LSA_E_IO, "cannot write '%s'", path);
        }
done:
    lsa_free(length);
    if (fclose(f) && st == LSA_OK) LSA_RET_FAIL(LSA_E_IO, "cannot write '%s'", path);
    return st;
}

static lsa_status bench(const char *lengths, const char *dir, lsa_err *err) {
    lsa_status st = LSA_OK;
    char tokens[LSA_PATH_MAX], out[LSA_PATH_MAX], path[LSA_PATH_MAX];
    lsa_dump_opts o = lsa_dump_defaults();
    lsa_dump_plan plan;
    lsa_dump_times t;
    lsa_manifest m = {0};
    uint64_t all = 0;
    int64_t bytes = 0;
    LSA_TRY(lsa_path(tokens, err, "%s/tokens.u16", dir));
    LSA_TRY(lsa_path(out, err, "%s/shards", dir));
    LSA_TRY(write_tokens(tokens, lengths, err));
    o.teacher = "recipes/mini/teacher", o.tokens = tokens;
    LSA_TRY(lsa_dump_run(&o, out, "cuda", false, &plan, &t, err));
    LSA_TRY(lsa_manifest_load(&m, out, err));
    for (int64_t i = 0; i < m.shard.len; i++) {
        uint64_t h;
        LSA_TRY(lsa_path(path, err, "%s/%s", out, m.shard.data[i].file));
        LSA_TRY(lsa_xxh64_file(&h, path, err));
        if (h != m.shard.data[i].xxh64) LSA_FAIL(LSA_E_FORMAT, "shard %lld is damaged", (long long)i);
        all = all * 31 + h, bytes += m.shard.data[i].bytes;
    }
    printf(
        "{\"bench\": \"dump_host\", \"lengths\": \"%s\", \"tokens\": %lld, \"bytes\": %lld, \"seconds\": %.3f, "
        "\"tokens_per_s\": %.0f, \"taps_s\": %.3f, \"merging_s\": %.3f, \"sealing_s\": %.3f, \"xxh64\": \"%016llx\"}\n",
        lengths, (long long)t.tokens, (long long)bytes, t.seconds, (double)t.tokens / t.seconds, t.gpu.taps,
        t.merging, t.sealing, (unsigned long long)all);
done:
    lsa_manifest_fini(&m);
    return st;
}

int main(int argc, char **argv) {
    lsa_err err = {0};
    char made[] = "/tmp/lsa-dump-speed-XXXXXX";
    const char *const dir = argc > 2 ? argv[2] : mkdtemp(made);
    if (!dir) return 1;
    const lsa_status st = bench(argc > 1 ? argv[1] : "3x8192,1x65536", dir, &err);
    if (st != LSA_OK) fprintf(stderr, "%s\n", err.msg);
    if (argc <= 2 && lsa_remove_tree(dir, &err) != LSA_OK) return 1;
    return st != LSA_OK;
}
#endif
