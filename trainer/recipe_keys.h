/* The recipe of lsa-train: every key, with its type, range, default and meaning, in one table
 * (recipe_keys.c). */
#ifndef LSA_TRAINER_RECIPE_KEYS_H
#define LSA_TRAINER_RECIPE_KEYS_H

#include "kernels/core/recipe.h"

enum { LSA_MODE_LOOKAHEAD = 0, LSA_MODE_REFERENCE };
enum { LSA_CAND_ALL = 0, LSA_CAND_SAMPLED };
enum { LSA_ORDER_DOCUMENT = 0, LSA_ORDER_SHUFFLED };
enum { LSA_LOSS_KL = 0, LSA_LOSS_BCE, LSA_LOSS_FOCAL, LSA_LOSS_BPR, LSA_LOSS_MARGIN };
enum { LSA_TARGET_NATIVE = 0, LSA_TARGET_DENSE };
enum { LSA_ON_SUM = 0, LSA_ON_LAYER };
enum { LSA_SCHED_COSINE = 0, LSA_SCHED_CONSTANT };
enum { LSA_PRECISION_BF16 = 0, LSA_PRECISION_FP8, LSA_PRECISION_F32 };
enum { LSA_MOMENTS_F32 = 0, LSA_MOMENTS_BF16 };
enum { LSA_EXCHANGE_F32 = 0, LSA_EXCHANGE_BF16 };
enum { LSA_METRIC_CAPTURED = 0, LSA_METRIC_F1, LSA_METRIC_RECALL };

typedef struct lsa_recipe {
    int64_t mode;
    char layers[LSA_KEY_TEXT_MAX];
    int64_t heads, rank, reach;
    int64_t tau, tail, stride;
    int64_t candidates, max_pos, max_neg, order, val_documents, min_layers;
    double neg_ratio, hard_share;
    int64_t hard_every;
    bool exclude_resident, causal, prior;
    int64_t loss, target, ensemble;
    bool weighted, trivial, by_mass, balance;
    double smoothing, margin, sharpen;
    double lr, min_lr, weight_decay, beta1, beta2, eps, clip;
    int64_t warmup, schedule, moments, exchange;
    bool decay_norm, zero1;
    int64_t steps, batch, seed, eval_every, save_every, log_every, keep, milestone_every, patience, max_bad,
        cache_mib;
    int64_t precision, micro_batch, pool_mib, virtual_shards;
    bool portable;
    double threshold, budget;
    int64_t topk, metric;
    char trace[LSA_KEY_TEXT_MAX];
} lsa_recipe;

extern const lsa_key lsa_recipe_keys[];
extern const int lsa_recipe_n_key;

/* Checks what no single key can: reference mode's fixed choices, targets that need statistics. */
LSA_NODISCARD lsa_status lsa_recipe_check(const lsa_recipe *r, lsa_err *err);

#endif
