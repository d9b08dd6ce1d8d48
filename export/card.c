/* Model cards: see card.h. Says what the file was fitted for and what it was not. */
#include "export/card.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/version.h"

typedef struct text {
    char *s;
    size_t n, cap;
} text;

static void say(text *t, const char *fmt, ...) LSA_PRINTF(2, 3);
static void say(text *t, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(t->s + t->n, t->cap - t->n, fmt, ap);
    va_end(ap);
    t->n += n > 0 ? (size_t)n : 0;
    if (t->n >= t->cap) t->n = t->cap - 1;
}

static const char *str(const json_t *o, const char *key, const char *dflt) {
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : dflt;
}

lsa_status lsa_card_text(char **out, const lsa_indexer_file *f, lsa_err *err) {
    const lsa_indexer_geom *g = &f->geom;
    text t = {.cap = 1 << 16};
    *out = NULL;
    lsa_status st = lsa_alloc_((void **)&t.s, (int64_t)t.cap, 1, "model card", err);
    if (st != LSA_OK) return st;
    const json_t *eval = json_object_get(f->train, "eval"), *recipe = json_object_get(f->train, "recipe");
    say(&t, "# Memory indexer for %s\n\n", str(f->train, "teacher", "a DeepSeek-V4 model"));
    say(&t,
        "Predicts which 4-token chunks of the context the next %lld tokens will need (Lookahead Sparse Attention, FlashMemory-DeepSeek-V4), so that a server keeps "
        "only those on the GPU. Written by lsa %s.\n\n",
        (long long)f->tau, lsa_version());
    say(&t,
        "| | |\n|---|---|\n| parameters | %lld, %s |\n| heads x head size | %d x %d |\n| rank | %d |\n| hidden size read | %d |\n",
        (long long)lsa_indexer_n_param(g),
        f->dtype == LSA_F32    ? "fp32"
        : f->dtype == LSA_BF16 ? "bf16 (q_norm_weight fp32)"
                               : "fp8 e4m3 with one fp32 scale a row, `<name>_scale` (q_norm_weight fp32)",
        g->n_head, g->head_dim, g->rank, g->hidden);
    say(&t, "| joint layers (CSA ordinal = transformer layer) |");
    for (int32_t l = 0; l < g->n_layer; l++)
        say(&t, " %d = %d%s", g->ord[l].v, g->id[l].v, l + 1 < g->n_layer ? "," : "");
    say(&t,
        " |\n| RoPE | last %d channels, adjacent pairs, base %g, YaRN factor %g over %lld, beta %g to %g, no magnitude scale; frequencies (in golden.safetensors) and angles are formed in fp32 |\n",
        g->rope.dim, g->rope.base, g->rope.factor, (long long)g->rope.original_len, g->rope.beta_fast,
        g->rope.beta_slow);
    say(&t,
        "| after RoPE | Hadamard (Sylvester order) / sqrt(128), on queries as on the stored keys |\n| head weights | scaled by 1/sqrt(128 x heads) |\n");
    say(&t,
        "| score | %s |\n| window, always-resident tail | %lld, %lld tokens |\n| threshold | %g on the sigmoid, **not calibrated**: rank, or choose a budget |\n",
        f->ensemble == LSA_ENSEMBLE_SUM    ? "sum of the layers' logits"
        : f->ensemble == LSA_ENSEMBLE_MEAN ? "mean of the layers' sigmoids"
                                           : "maximum of the layers' sigmoids",
        (long long)f->tau, (long long)f->tail, f->threshold);
    say(&t, "| teacher | %s, hash %s |\n| training data | %lld documents, longest %lld tokens, hash %s |\n",
        str(f->train, "teacher", "?"), str(f->train, "teacher_hash", "?"),
        (long long)json_integer_value(json_object_get(f->train, "train_documents")),
        (long long)json_integer_value(json_object_get(f->train, "trained_length")),
        str(f->train, "data_hash", "?"));
    say(&t, "| step | %lld |\n\n", (long long)json_integer_value(json_object_get(f->train, "step")));
    if (eval) {
        const json_t *sum = json_object_get(eval, "sum"), *mean = json_object_get(eval, "mean");
        say(&t,
            "## Held-out evaluation (all chunks that can be evicted)\n\n| score | precision | recall | F1 | kept | recall@K | captured mass at 5 / 10 / 20 %% |\n|---|---|---|---|---|---|---|\n");
        const json_t *rows[] = {sum, mean};
        const char *names[] = {"sum of logits", "mean of sigmoids"};
        for (int i = 0; i < 2; i++) {
            const char *k[] = {"precision", "recall", "f1", "kept", "recall_at_k"};
            say(&t, "| %s |", names[i]);
            for (int j = 0; j < 5; j++) say(&t, " %.4f |", json_number_value(json_object_get(rows[i], k[j])));
            say(&t, " %.4f / %.4f / %.4f |\n", json_number_value(json_object_get(rows[i], "captured_0.05")),
                json_number_value(json_object_get(rows[i], "captured_0.10")),
                json_number_value(json_object_get(rows[i], "captured_0.20")));
        }
        say(&t, "\n");
    }
    say(&t,
        "## How to load it\n\n`indexer.safetensors` holds `retrievers.l{ordinal}.wq_a.weight` [rank, hidden], `.wq_b.weight` [heads x 128, rank], `.q_norm_weight` [rank] and "
        "`.weights_proj.weight` [heads, hidden]. `golden.safetensors` holds inputs and the value after every stage. "
        "Before serving, run `check(folder, score, path)` of `check_indexer.py` (numpy only) on the engine's own score function: it names the convention that is wrong. "
        "`lsa-export verify` proves the folder itself.\n\n");
    say(&t,
        "## Limits\n\nFitted on contexts up to the length above; positions far beyond it were never seen. The hidden vector is the attention input of its layer after "
        "the input norm, of the token before the window.\n");
    if (recipe) {
        const char *key;
        json_t *v;
        say(&t, "\n## Recipe\n\n```\n");
        json_object_foreach((json_t *)(uintptr_t)recipe, key, v)
            say(&t, "%s: %s\n", key, json_string_value(v));
        say(&t, "```\n");
    }
    *out = t.s;
    return LSA_OK;
}
