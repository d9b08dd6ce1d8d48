/* What engine and session will allocate, from the geometry alone: the same sums as engine.c and session.c,
 * compared with a running program's peak by tests/cli/test_plan.py. */
#include "data/teacher_tensors.h"
#include "infer/engine.h"
#include "kernels/core/num.h"

static lsa_status add(void *user, const lsa_teacher_tensor *t, lsa_err *err) {
    int64_t *sum = user;
    (void)err;
    *sum += t->rows * t->cols * (int64_t)(t->dtype == LSA_I64 ? sizeof(int64_t) : sizeof(float));
    return LSA_OK;
}

lsa_status lsa_engine_bytes(int64_t *out, const lsa_teacher_config *c, lsa_err *err) {
    *out = (int64_t)sizeof(lsa_engine);
    return lsa_teacher_each(c, add, out, err);
}

/* Rows of the stacked projection of x, the widest over the layers. */
static int64_t widest_projection(const lsa_teacher_config *c) {
    int64_t nx = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        int64_t n = (int64_t)c->q_rank + c->head_dim;
        if (c->kind[l] == LSA_LAYER_CSA)
            n += 4 * (int64_t)c->head_dim + 4 * (int64_t)c->index_head_dim + c->index_n_head;
        if (c->kind[l] == LSA_LAYER_HCA) n += 2 * (int64_t)c->head_dim;
        nx = lsa_max_i64(nx, n);
    }
    return nx;
}

static int64_t workspace_bytes(const lsa_teacher_config *c, const lsa_session_opts *o) {
    const int64_t B = LSA_BLOCK, n = c->hc_mult, m = o->max_tokens / LSA_CHUNK + 1, d = c->hidden;
    const int64_t HD = (int64_t)c->n_head * c->head_dim, ID = (int64_t)c->index_n_head * c->index_head_dim;
    int64_t hca = 0;
    for (int32_t l = 0; l < c->n_layer; l++)
        if (c->kind[l] == LSA_LAYER_HCA) hca = lsa_max_i64(hca, o->max_tokens / c->ratio[l]);
    const int64_t rows = c->window + 1 + lsa_max_i64(hca, o->attend_all ? m : lsa_min_i64(m, c->index_topk));
    const int64_t per_token =
        n * (n + 2) + widest_projection(c) + c->q_rank + HD + ID + (int64_t)c->index_n_head * LSA_KEY_TILE +
        m + HD + (int64_t)c->o_groups * c->o_rank + 3 * d + 3 * (int64_t)c->moe_dim + c->n_expert;
    return 4 * (B * per_token + 3 * m + (c->n_head + 1) * lsa_max_i64(rows, m)) + 8 * rows;
}

int64_t lsa_session_bytes(const lsa_teacher_config *c, const lsa_session_opts *o, int32_t n_thread) {
    const int64_t N = lsa_min_i64(o->chunk ? o->chunk : 512, o->max_tokens), n = c->hc_mult, d = c->hidden;
    const int64_t HD = (int64_t)c->n_head * c->head_dim, Hi = c->index_n_head, Di = c->index_head_dim;
    int64_t f = N * (n * d + d + n * (n + 2) + HD + Hi * Di + Hi + 2 * (int64_t)c->rope_dim);
    for (int32_t l = 0; l < c->n_layer; l++) {
        const int64_t roles = c->kind[l] == LSA_LAYER_CSA ? 2 : 1, hist = roles * c->ratio[l];
        f += (c->window + N) * c->head_dim;
        if (c->kind[l] == LSA_LAYER_WINDOW) continue;
        f += (hist + N) * 2 * roles * c->head_dim + (o->max_tokens / c->ratio[l] + 1) * c->head_dim;
        if (c->kind[l] == LSA_LAYER_CSA) f += (hist + N) * 4 * Di + (o->max_tokens / LSA_CHUNK + 1) * Di + d;
    }
    return 4 * f + n_thread * workspace_bytes(c, o);
}
