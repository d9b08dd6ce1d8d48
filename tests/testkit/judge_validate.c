/* See judge_validate.h. NUMERIC: losses within 1e-3 nats a token; what is kept may differ where two scores
 * are closer than rounding, so counts within 2 %. */
#include "tests/testkit/judge_validate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "infer/validate.h"
#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "kernels/core/rng.h"

static lsa_status make_indexer(lsa_indexer_file *f, const lsa_teacher_config *c, lsa_err *err) {
    f->geom = (lsa_indexer_geom){.hidden = c->hidden,
                                 .n_head = 8,
                                 .head_dim = 128,
                                 .rank = 16,
                                 .eps = c->norm_eps,
                                 .rope = c->rope_compress,
                                 .n_layer = 1};
    f->geom.ord[0].v = c->n_csa - 1; /* not all layers, nor the first */
    f->geom.id[0] = c->csa_id[c->n_csa - 1];
    f->ensemble = LSA_ENSEMBLE_SUM;
    const lsa_status st = LSA_NEW(f->params, lsa_indexer_n_param(&f->geom), err);
    if (st == LSA_OK) lsa_indexer_init_random(f->params, &f->geom, 5);
    return st;
}

static lsa_status write_document(char *path, int64_t n, int32_t vocab, lsa_err *err) {
    lsa_rng rng = lsa_rng_make(17, 3);
    FILE *f = fopen(path, "w");
    if (!f) LSA_RET_FAIL(LSA_E_IO, "cannot write %s", path);
    fprintf(f, "{\"tokens\": [");
    for (int64_t i = 0; i < n; i++)
        fprintf(f, "%s%d", i ? ", " : "", (int)lsa_rng_below(&rng, (uint64_t)vocab));
    fprintf(f, "]}\n");
    fclose(f);
    return LSA_OK;
}

static int apart(const char *what, const char *policy, double a, double b, double most) {
    if (fabs(a - b) <= most) return 0;
    printf("%s: %s %.6g on the CPU, %.6g on the GPU\n", policy, what, a, b);
    return 1;
}

static int compare(const lsa_validation *a, const lsa_validation *b) {
    int bad = a->n != b->n || a->n == 0;
    double worst = 0;
    for (int i = 0; i < a->n && !bad; i++) {
        const lsa_result *x = &a->row[i], *y = &b->row[i];
        const char *name = lsa_policy_name(x->policy);
        const double n = (double)x->tokens, miss = (double)x->misses;
        bad += x->policy != y->policy || x->budget != y->budget || x->tokens != y->tokens ||
               x->windows != y->windows || x->evictable != y->evictable || x->gpu_bytes != y->gpu_bytes;
        worst = fmax(worst, fabs(x->nll[0] - y->nll[0]) / n);
        bad += apart("nll a token", name, x->nll[0] / n, y->nll[0] / n, 1e-3);
        bad += apart("kl a token", name, x->kl / n, y->kl / n, 1e-3);
        bad += apart("kept", name, (double)x->kept, (double)y->kept, 0);
        bad += apart("misses", name, miss, (double)y->misses, 0.02 * miss);
        bad += apart("captured", name, x->captured / x->total_mass, y->captured / y->total_mass, 1e-3);
        bad += apart("agreement", name, (double)x->agree, (double)y->agree, 0.02 * n);
        if (lsa_policy_evicts(x->policy) && x->budget == 1) { /* nothing leaves: full attention's bits */
            bad += apart("nll of full", name, y->nll[0], b->full.nll[0], 0);
            bad += apart("misses with everything", name, 0, (double)y->misses, 0);
        } else if (lsa_policy_evicts(x->policy) && !(miss > 0)) {
            printf("%s: no misses at a quarter\n", name);
            bad++;
        }
    }
    printf("%d rows; nll a token within %.2g%s\n", a->n, worst, bad ? ": FAILED" : "");
    return bad;
}

/* Rows and keys in host memory give what the same bytes on the GPU give, in less of its memory. */
static int compare_tiers(const lsa_validation *a, const lsa_validation *b) {
    int bad = a->n != b->n || a->n == 0;
    for (int i = 0; i < a->n && !bad; i++) {
        const lsa_result *x = &a->row[i], *y = &b->row[i];
        const char *name = lsa_policy_name(x->policy);
        bad += apart("nll, tiered", name, x->nll[0], y->nll[0], 0);
        bad += apart("kl, tiered", name, x->kl, y->kl, 0);
        bad += apart("kept, tiered", name, (double)x->kept, (double)y->kept, 0);
        if (!lsa_policy_evicts(x->policy)) continue;
        if (x->budget == 1) bad += apart("nll of full, tiered", name, y->nll[0], b->full.nll[0], 0);
        if (x->budget < 1) bad += y->rows_bytes >= x->rows_bytes || y->swapped_bytes == 0;
        bad += !y->misses_unknown || x->misses_unknown || y->host_bytes <= x->host_bytes;
        printf("%s %g: %lld bytes of rows on the GPU, all are %lld; %lld swapped\n", name, x->budget,
               (long long)y->rows_bytes, (long long)x->rows_bytes, (long long)y->swapped_bytes);
    }
    return bad;
}

int judge_validate(lsa_ctx *ctx, const char *dir, int64_t n, int64_t tau, int64_t tail) {
    lsa_status st = LSA_OK;
    lsa_err why = {0}, *const err = &why;
    lsa_engine *e = NULL;
    lsa_docs *docs = NULL;
    lsa_indexer_file f = {0};
    lsa_validation cpu = {0}, gpu = {0}, server = {0}, tiered = {0};
    lsa_validate_opts o = {.budget = {0.25, 1},
                           .n_budget = 2,
                           .tau = tau,
                           .tail = tail,
                           .threshold = -1,
                           .seed = 1,
                           .logits_mib = 64};
    char work[] = "/tmp/lsa-judge.XXXXXX", path[64];
    int bad = 1;
    for (int p = 0; p < LSA_N_POLICY; p++) o.policy[p] = true;
    if (!mkdtemp(work)) abort();
    snprintf(path, sizeof path, "%s/doc.jsonl", work);
    LSA_TRY(lsa_engine_open(&e, dir, NULL, err));
    LSA_TRY(write_document(path, n, lsa_engine_config(e)->vocab, err));
    LSA_TRY(lsa_docs_open(&docs, path, NULL, NULL, lsa_engine_config(e)->vocab, err));
    LSA_TRY(make_indexer(&f, lsa_engine_config(e), err));
    LSA_TRY(lsa_validate(&cpu, e, docs, &f, &o, err));
    o.gpu = ctx;
    LSA_TRY(lsa_validate(&gpu, e, docs, &f, &o, err));
    bad = compare(&cpu, &gpu);
    for (int p = 0; p < LSA_N_POLICY; p++) o.policy[p] = p == LSA_POLICY_LSA || p == LSA_POLICY_RANDOM;
    o.storage = LSA_GPU_ROWS_SERVER;
    LSA_TRY(lsa_validate(&server, e, docs, &f, &o, err));
    o.storage = LSA_GPU_ROWS_TIERED;
    o.page = 1;
    LSA_TRY(lsa_validate(&tiered, e, docs, &f, &o, err));
    bad += compare_tiers(&server, &tiered);
done:
    if (st != LSA_OK) printf("%s\n", why.msg);
    lsa_validation_fini(&cpu);
    lsa_validation_fini(&gpu);
    lsa_validation_fini(&server);
    lsa_validation_fini(&tiered);
    lsa_indexer_file_fini(&f);
    lsa_docs_close(docs);
    lsa_engine_close(e);
    return bad + (lsa_remove_tree(work, err) != LSA_OK);
}
