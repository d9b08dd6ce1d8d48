/* The one front door: arguments are checked here, once for all backends, so that CUDA is never laxer than the
 * CPU. */
#include "kernels/ops.h"

#include "kernels/backend.h"
#include "kernels/core/lsa_ids.h"
#include "kernels/core/num.h"

#define NEED(cond, what)                                                                                     \
    if (!(cond)) LSA_RET_FAIL(LSA_E_ARG, "%s: %s", __func__, what)

static bool fits(int64_t a, int64_t b, int64_t c) {
    int64_t x;
    return a >= 0 && b >= 0 && c >= 0 && lsa_mul_i64(a, b, &x) && lsa_mul_i64(x, c, &x) &&
           lsa_mul_i64(x, 8, &x);
}

static bool power_of_two(int64_t d) {
    return d >= 2 && d <= 1024 && (d & (d - 1)) == 0;
}

static lsa_status check_gemm(const lsa_gemm_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n, 1) && fits(a->m, a->k, 1) && fits(a->n, a->k, 1),
         "sizes must not be negative or overflow");
    NEED(a->beta == 0.0f || a->beta == 1.0f, "beta must be 0 or 1");
    NEED(a->m == 0 || a->n == 0 || (a->c && (a->k == 0 || (a->a && a->b))), "NULL matrix");
    return LSA_OK;
}
static lsa_status check_rmsnorm_fwd(const lsa_rmsnorm_fwd_args *a, lsa_err *err) {
    NEED(fits(a->m, a->r, 1) && a->r > 0 && a->eps >= 0, "m >= 0, r > 0, eps >= 0");
    NEED(a->m == 0 || (a->x && a->g && a->y && a->rstd), "NULL tensor");
    return LSA_OK;
}
static lsa_status check_rmsnorm_bwd(const lsa_rmsnorm_bwd_args *a, lsa_err *err) {
    NEED(fits(a->m, a->r, 1) && a->r > 0, "m >= 0, r > 0");
    NEED(a->dg && (a->m == 0 || (a->x && a->g && a->rstd && a->dy)), "NULL tensor");
    return LSA_OK;
}
static lsa_status check_rope_hadamard(const lsa_rope_hadamard_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n_head, a->d), "sizes must not be negative or overflow");
    NEED(power_of_two(a->d), "d must be a power of two in [2, 1024]");
    NEED(a->rope_dim >= 0 && a->rope_dim % 2 == 0 && a->rope_dim <= a->d,
         "rope_dim must be even and in [0, d]");
    NEED(a->m == 0 || a->n_head == 0 || (a->q && (a->rope_dim == 0 || (a->position && a->freq))),
         "NULL tensor");
    return LSA_OK;
}
/* pointers: those needed when there are columns; always: those needed with queries alone (a gradient is
 * written even then). */
static lsa_status check_score(int64_t m, int64_t n_head, int64_t d, int64_t n, int64_t n_key, bool pointers,
                              bool always, lsa_err *err) {
    NEED(fits(m, n_head, d) && fits(m, n, 1) && fits(n_key, LSA_KEY_BYTES, 1),
         "sizes must not be negative or overflow");
    NEED(d == 128, "d must be 128, the width of index keys");
    NEED(n_head >= 1 && n_head <= 128, "n_head must be in [1, 128]");
    NEED(n <= INT32_MAX, "n must fit 31 bits");
    NEED(m == 0 || n == 0 || (pointers && n_key > 0), "NULL tensor, or columns without keys");
    NEED(m == 0 || always, "NULL tensor");
    return LSA_OK;
}
static lsa_status check_indexer_score_fwd(const lsa_indexer_score_fwd_args *a, lsa_err *err) {
    return check_score(a->m, a->n_head, a->d, a->n, a->n_key,
                       a->q && a->w && a->keys && a->key_base && a->n_cand && a->z, true, err);
}
static lsa_status check_indexer_score_bwd(const lsa_indexer_score_bwd_args *a, lsa_err *err) {
    return check_score(a->m, a->n_head, a->d, a->n, a->n_key, a->keys && a->key_base && a->dz,
                       a->q && a->w && a->n_cand && a->dq && a->dw, err);
}
static lsa_status check_prior_fwd(const lsa_prior_fwd_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n, 1), "sizes must not be negative or overflow");
    NEED(a->m == 0 || a->n == 0 || (a->recent && a->memory && a->weight && a->n_cand && a->z), "NULL tensor");
    return LSA_OK;
}
static lsa_status check_prior_bwd(const lsa_prior_bwd_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n, 1), "sizes must not be negative or overflow");
    NEED(a->dweight && (a->m == 0 || a->n == 0 || (a->recent && a->memory && a->dz && a->n_cand)),
         "NULL tensor");
    return LSA_OK;
}
static lsa_status check_continuation_fwd(const lsa_continuation_fwd_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n, 1) && a->n <= INT32_MAX, "sizes must not be negative, n must fit 31 bits");
    NEED(a->reach >= 1 && a->reach <= LSA_MAX_REACH, "reach must be in [1, 64]");
    NEED(a->m == 0 || a->n == 0 || (a->z && a->cost && a->n_cand && a->out && a->from), "NULL tensor");
    NEED(a->m == 0 || a->n == 0 || a->out != a->z, "out must not alias z");
    return LSA_OK;
}
static lsa_status check_continuation_bwd(const lsa_continuation_bwd_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n, 1) && a->n <= INT32_MAX, "sizes must not be negative, n must fit 31 bits");
    NEED(a->reach >= 1 && a->reach <= LSA_MAX_REACH, "reach must be in [1, 64]");
    NEED(a->dcost && (a->m == 0 || a->n == 0 || (a->from && a->dout && a->n_cand && a->dz)), "NULL tensor");
    NEED(a->m == 0 || a->n == 0 || a->dz != a->dout, "dz must not alias dout");
    return LSA_OK;
}
static lsa_status check_loss_pointwise(const lsa_loss_pointwise_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n, 1), "sizes must not be negative or overflow");
    NEED(a->smoothing >= 0.0f && a->smoothing < 0.5f, "smoothing must be in [0, 0.5)");
    NEED(a->m == 0 || (a->row_loss && a->n_cand && (a->n == 0 || (a->z && a->y && a->dz))), "NULL tensor");
    return LSA_OK;
}
static lsa_status check_loss_pairwise(const lsa_loss_pairwise_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n, 1), "sizes must not be negative or overflow");
    NEED(a->m == 0 || (a->row_loss && a->n_cand && (a->n == 0 || (a->z && a->y && a->dz))), "NULL tensor");
    NEED(a->n == 0 || a->dz != a->z, "dz must not alias z");
    return LSA_OK;
}
static lsa_status check_loss_kl(const lsa_loss_kl_args *a, lsa_err *err) {
    NEED(fits(a->m, a->n, 1), "sizes must not be negative or overflow");
    NEED(a->m == 0 || (a->row_loss && a->n_cand && (a->n == 0 || (a->z && a->target && a->dz))),
         "NULL tensor");
    return LSA_OK;
}
static lsa_status check_sumsq(const lsa_sumsq_args *a, lsa_err *err) {
    NEED(fits(a->n, 1, 1) && a->out && (a->n == 0 || a->x), "n >= 0, pointers not NULL");
    return LSA_OK;
}
static lsa_status check_adamw(const lsa_adamw_args *a, lsa_err *err) {
    NEED(fits(a->n, 1, 1) && a->t >= 1, "n >= 0 and t >= 1");
    NEED(a->beta1 >= 0 && a->beta1 < 1 && a->beta2 >= 0 && a->beta2 < 1 && a->eps >= 0,
         "betas must be in [0, 1), eps >= 0");
    NEED(a->n == 0 || (a->g && a->p && a->m && a->v), "NULL tensor");
    return LSA_OK;
}

#define LSA_OP(op)                                                                                           \
    lsa_status lsa_##op(lsa_ctx *ctx, const lsa_##op##_args *a, lsa_err *err) {                              \
        lsa_status st = check_##op(a, err);                                                                  \
        if (st != LSA_OK) return st;                                                                         \
        if (!ctx->b->op)                                                                                     \
            LSA_RET_FAIL(LSA_E_UNSUPPORTED, "operation " #op " is not supported by the %s backend",          \
                         ctx->b->name);                                                                      \
        return ctx->b->op(ctx, a, err);                                                                      \
    }
#include "kernels/ops.def"
#undef LSA_OP
