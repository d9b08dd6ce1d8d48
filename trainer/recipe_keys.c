/* The key table: the only place where a recipe key is defined. */
#include "trainer/recipe_keys.h"

#include <stddef.h>
#include <stdio.h>

#include "kernels/core/lsa_ids.h"

#define I64(name, field, dflt, lo, hi, help)                                                                 \
    { name, LSA_KEY_I64, dflt, lo, hi, NULL, offsetof(lsa_recipe, field), help }
#define F64(name, field, dflt, lo, hi, help)                                                                 \
    { name, LSA_KEY_F64, dflt, lo, hi, NULL, offsetof(lsa_recipe, field), help }
#define BOOL(name, field, dflt, help)                                                                        \
    { name, LSA_KEY_BOOL, dflt, 0, 0, NULL, offsetof(lsa_recipe, field), help }
#define PICK(name, field, dflt, which, help)                                                                 \
    { name, LSA_KEY_CHOICE, dflt, 0, 0, which, offsetof(lsa_recipe, field), help }
#define TEXT(name, field, dflt, help)                                                                        \
    { name, LSA_KEY_TEXT, dflt, 0, 0, NULL, offsetof(lsa_recipe, field), help }

const lsa_key lsa_recipe_keys[] = {
    PICK("train.mode", mode, "lookahead", "lookahead|reference",
         "lookahead: the query of a window is the token before it; reference: the published trainer's rules"),
    I64("train.steps", steps, "1000", 1, 1e8, "optimiser steps"),
    I64("train.batch", batch, "128", 1, 65536, "windows per step"),
    I64("train.seed", seed, "42", 0, 9e15, "seed of initialisation, order and sampling"),
    I64("train.eval_every", eval_every, "200", 0, 1e8, "steps between evaluations (0: only at the end)"),
    I64("train.save_every", save_every, "200", 1, 1e8, "steps between checkpoints"),
    I64("train.log_every", log_every, "10", 1, 1e8, "steps between lines of metrics.jsonl"),
    I64("train.keep", keep, "2", 1, 1e6, "checkpoints kept besides best and latest"),
    I64("train.milestone_every", milestone_every, "0", 0, 1e8,
        "steps between checkpoints that are kept for good (0: none)"),
    I64("train.patience", patience, "0", 0, 1e6,
        "stop after this many evaluations without improvement (0: never)"),
    I64("train.max_bad", max_bad, "10", 1, 1e6, "give up after this many non-finite steps in a row"),
    I64("train.cache_mib", cache_mib, "4096", 1, 1e7, "host memory for documents, MiB"),
    I64("train.pool_mib", pool_mib, "16384", 1, 1e7,
        "memory for the keys and hidden vectors of the documents in use and the next ones, MiB (on a GPU its own memory), shared equally "
        "by the virtual shards; shuffled windows are shuffled among documents of a shard that are in it together"),
    PICK(
        "train.precision", precision, "bf16", "bf16|fp8|f32",
        "on a GPU: bf16 products, the same with queries rounded to fp8 as servers do, or f32 op by op; a CPU computes in f32"),
    I64("train.micro_batch", micro_batch, "0", 0, 65536,
        "windows at a time on a GPU, gradients added up; lowers memory (0: the whole batch)"),
    BOOL("train.portable", portable, "false",
         "debugging aid: on a GPU only the kernels that every architecture has"),
    TEXT("train.trace", trace, "",
         "debugging aid: write the exact samples of every step to this safetensors file"),

    I64("data.virtual_shards", virtual_shards, "8", 1, 4096,
        "parts that the documents are dealt to, balanced by windows; a step asks train.batch / this many windows of each; the number of "
        "ranks divides it, and nothing else depends on that number"),

    TEXT("model.layers", layers, "all", "joint CSA layers: all, or ordinals such as 0,2"),
    I64("model.heads", heads, "32", 1, 128, "indexer heads"),
    I64("model.rank", rank, "256", 1, 65536, "rank of the query projection"),
    I64("model.continuation", reach, "0", 0, LSA_MAX_REACH,
        "following chunks that a chunk lends its score to, at a learned cost for each distance (0: none; tau / 4 reaches one window)"),
    BOOL(
        "model.prior", prior, "false",
        "add what level 2 gave each chunk in the windows before to its score, with learned weights; eval.budget of the chunks are taken to have "
        "been resident in those windows"),

    I64("window.tau", tau, "64", 1, 65536, "tokens a window lasts"),
    I64("window.tail", tail, "256", 0, 1e7, "newest tokens that are always resident"),
    I64("window.stride", stride, "64", 1, 65536, "tokens between windows used for training"),

    PICK("sample.candidates", candidates, "all", "all|sampled",
         "score all evictable chunks, or positives and sampled negatives"),
    PICK("sample.order", order, "document", "document|shuffled",
         "windows of a document together, or all windows shuffled"),
    I64("sample.val_documents", val_documents, "2", 0, 1e9, "last documents held out for evaluation"),
    I64("sample.min_layers", min_layers, "2", 1, 64, "votes that make a chunk golden"),
    I64("sample.max_pos", max_pos, "512", 1, 1e6, "positives per sample at most"),
    F64("sample.neg_ratio", neg_ratio, "3", 0, 1e6, "sampled negatives per positive"),
    I64("sample.max_neg", max_neg, "65536", 1, 1e9, "sampled negatives per sample at most"),
    F64("sample.hard_share", hard_share, "0", 0, 1,
        "of the sampled negatives: taken from the chunks that the indexer itself ranks highest (GPU, bf16 or fp8)"),
    I64("sample.hard_every", hard_every, "500", 1, 1e8,
        "steps after which the hard negatives are ranked anew (also when a run resumes, which is then not bit-exact)"),
    BOOL("sample.exclude_resident", exclude_resident, "true",
         "leave out chunks of the tail, which are resident anyway"),
    BOOL("sample.causal", causal, "true", "candidates and positives only among chunks visible at the query"),

    PICK("loss.kind", loss, "kl", "kl|bce|focal|bpr|margin", "kl: to the window mass; the others: on votes"),
    PICK("loss.target", target, "native", "native|dense", "mass that kl aims at"),
    F64("loss.sharpen", sharpen, "1", 0.1, 8,
        "kl: power of a token's mass on a chunk before those of a window are added; above 1 a chunk that one token needs much counts for more than one that many need a little. "
        "Evaluations of training count captured mass in the same power"),
    PICK("loss.on", ensemble, "sum", "sum|layer",
         "loss on the sum of the layers' logits, or mean of the layers' losses"),
    BOOL("loss.weighted", weighted, "false", "weight positives by votes"),
    BOOL("loss.by_mass", by_mass, "false",
         "kl: a window counts by the mass it has on its candidates, as captured mass counts it"),
    BOOL(
        "loss.balance", balance, "false",
        "bce and focal on all candidates: a window's negatives weigh together sample.neg_ratio times its positives"),
    BOOL("loss.trivial", trivial, "false",
         "weight 0.5 for chunks golden in over 80 % of a document's tokens"),
    F64("loss.smoothing", smoothing, "0", 0, 0.49, "label smoothing of bce and focal"),
    F64("loss.margin", margin, "1", 0, 1e6, "margin of the margin loss"),

    F64("optim.lr", lr, "1e-3", 0, 10, "peak learning rate"),
    F64("optim.min_lr", min_lr, "0", 0, 10, "learning rate at the end of the cosine"),
    I64("optim.warmup", warmup, "50", 0, 1e8, "steps of linear warm-up"),
    PICK("optim.schedule", schedule, "cosine", "cosine|constant", "after the warm-up"),
    PICK("optim.moments", moments, "f32", "f32|bf16",
         "AdamW's moments in GPU memory (bf16: stochastic rounding)"),
    F64("optim.weight_decay", weight_decay, "0.01", 0, 10, "decoupled weight decay"),
    BOOL("optim.decay_norm", decay_norm, "false", "decay the norm gains too"),
    BOOL(
        "optim.zero1", zero1, "false",
        "with several ranks: each holds and updates the moments of its part of the parameters (less memory, the same result on CPUs; "
        "on GPUs the last bits of a sum may differ)"),
    PICK(
        "optim.exchange", exchange, "f32", "f32|bf16",
        "what several GPUs send each other of the gradients (bf16: half the bytes); CPU ranks add in double"),
    F64("optim.beta1", beta1, "0.9", 0, 0.999999, "first moment"),
    F64("optim.beta2", beta2, "0.999", 0, 0.9999999, "second moment"),
    F64("optim.eps", eps, "1e-8", 0, 1, "added to the root of the second moment"),
    F64("optim.clip", clip, "1", 0, 1e9, "global gradient norm limit (0: none)"),

    F64("eval.threshold", threshold, "0.5", 0, 1,
        "on sigmoid scores, for precision, recall, F1 and kept fraction"),
    I64("eval.topk", topk, "512", 1, 1e9, "K of recall@K"),
    F64("eval.budget", budget, "0.1", 1e-6, 1, "budget of the captured mass that picks the best checkpoint"),
    PICK(
        "eval.metric", metric, "captured", "captured|f1|recall",
        "what makes a checkpoint the best: captured mass of the summed logits, F1 or recall@K of the mean ensemble"),
};
const int lsa_recipe_n_key = (int)(sizeof lsa_recipe_keys / sizeof *lsa_recipe_keys);

lsa_status lsa_recipe_check(const lsa_recipe *r, lsa_err *err) {
    if (r->mode == LSA_MODE_REFERENCE) {
        if (r->loss == LSA_LOSS_KL || r->candidates != LSA_CAND_SAMPLED || r->ensemble != LSA_ON_LAYER ||
            r->causal || r->exclude_resident)
            LSA_RET_FAIL(
                LSA_E_CONFIG,
                "train.mode reference needs sample.candidates: sampled, sample.causal: false, sample.exclude_resident: false, "
                "loss.on: layer and a loss on votes; recipes/reference.yaml has all of them");
    } else if (r->loss == LSA_LOSS_KL && !r->causal) {
        LSA_RET_FAIL(LSA_E_CONFIG, "loss.kind kl needs sample.causal: true");
    }
    if (r->loss != LSA_LOSS_KL && (r->loss == LSA_LOSS_BPR || r->loss == LSA_LOSS_MARGIN) &&
        r->candidates == LSA_CAND_ALL)
        LSA_RET_FAIL(LSA_E_CONFIG, "pairwise losses need sample.candidates: sampled");
    if (r->balance &&
        (r->candidates != LSA_CAND_ALL || (r->loss != LSA_LOSS_BCE && r->loss != LSA_LOSS_FOCAL)))
        LSA_RET_FAIL(LSA_E_CONFIG, "loss.balance needs sample.candidates: all and loss.kind bce or focal");
    if (r->reach && (r->ensemble != LSA_ON_SUM || r->candidates != LSA_CAND_ALL))
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "model.continuation needs loss.on: sum, whose score it continues, and sample.candidates: "
            "all, because it lends between neighbouring chunks");
    if (r->reach && *r->trace)
        LSA_RET_FAIL(LSA_E_CONFIG, "train.trace knows no continuation: set model.continuation: 0");
    if (r->prior &&
        (r->ensemble != LSA_ON_SUM || r->candidates != LSA_CAND_ALL || !r->causal || !r->exclude_resident))
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "model.prior needs loss.on: sum, whose score it is added to, sample.candidates: all, "
                     "sample.causal: true and sample.exclude_resident: true");
    if (r->prior && r->stride % r->tau)
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "model.prior needs windows that follow each other as in decoding: window.stride %lld must "
            "be a multiple of window.tau %lld",
            (long long)r->stride, (long long)r->tau);
    if (r->prior && *r->trace)
        LSA_RET_FAIL(LSA_E_CONFIG, "train.trace knows no observed mass: set model.prior: false");
    if (r->batch % r->virtual_shards) {
        const int64_t below = r->batch / r->virtual_shards * r->virtual_shards;
        char lower[32] = "";
        if (below) snprintf(lower, sizeof lower, "%lld or ", (long long)below);
        LSA_RET_FAIL(LSA_E_CONFIG,
                     "train.batch %lld is not a multiple of data.virtual_shards %lld; the nearest are %s%lld",
                     (long long)r->batch, (long long)r->virtual_shards, lower,
                     (long long)(below + r->virtual_shards));
    }
    if (r->micro_batch && r->batch % r->micro_batch)
        LSA_RET_FAIL(LSA_E_CONFIG, "train.micro_batch %lld must divide train.batch %lld",
                     (long long)r->micro_batch, (long long)r->batch);
    if (r->hard_share > 0 && (r->candidates != LSA_CAND_SAMPLED || r->precision == LSA_PRECISION_F32))
        LSA_RET_FAIL(
            LSA_E_CONFIG,
            "sample.hard_share needs sample.candidates: sampled and train.precision bf16 or fp8 (a GPU)");
    if (r->min_lr > r->lr)
        LSA_RET_FAIL(LSA_E_CONFIG, "optim.min_lr %g exceeds optim.lr %g", r->min_lr, r->lr);
    return LSA_OK;
}
