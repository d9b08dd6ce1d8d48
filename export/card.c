/* Model cards: see card.h. Says what the file was fitted for and what it was not. */
#include "export/card.h"

#include <math.h>
#include <string.h>

#include "export/calibration_plot.h"
#include "export/card_calibration.h"
#include "kernels/core/mem.h"
#include "kernels/core/page.h"
#include "kernels/core/version.h"

#define say lsa_page_say

static const char *str(const json_t *o, const char *key, const char *dflt) {
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : dflt;
}

/* ---- sections ---- */

/* Text from outside in a table cell: no bar or line break may end the cell. */
static void cell(page *p, const char *text) {
    for (; *text; text++) {
        if (*text == '|') say(p, "\\");
        if ((unsigned char)*text >= ' ') say(p, "%c", *text);
    }
}

static void facts(page *p, const lsa_indexer_file *f) {
    const lsa_indexer_geom *g = &f->geom;
    say(p, "| | |\n|---|---|\n| licence | ");
    cell(p, str(f->train, "licence", "not stated"));
    say(p,
        " |\n| parameters | %lld, %s |\n| heads x head size | %d x %d |\n| rank | %d |\n| hidden size read | %d |\n",
        (long long)lsa_indexer_n_param(g),
        f->dtype == LSA_F32    ? "fp32"
        : f->dtype == LSA_BF16 ? "bf16 (q_norm_weight fp32)"
                               : "fp8 e4m3 with one fp32 scale a row, `<name>_scale` (q_norm_weight fp32)",
        g->n_head, g->head_dim, g->rank, g->hidden);
    say(p, "| joint layers (CSA ordinal = transformer layer) |");
    for (int32_t l = 0; l < g->n_layer; l++)
        say(p, " %d = %d%s", g->ord[l].v, g->id[l].v, l + 1 < g->n_layer ? "," : "");
    say(p, " |\n| score | %s |\n| window, always-resident tail | %lld, %lld tokens |\n",
        g->reach && g->prior
            ? "sum of the layers' logits, observed mass added (see Observed mass), continued (see Continuation)"
        : g->reach ? "sum of the layers' logits, continued (see Continuation)"
        : g->prior ? "sum of the layers' logits, observed mass added (see Observed mass)"
        : f->ensemble == LSA_ENSEMBLE_SUM  ? "sum of the layers' logits"
        : f->ensemble == LSA_ENSEMBLE_MEAN ? "mean of the layers' sigmoids"
                                           : "maximum of the layers' sigmoids",
        (long long)f->tau, (long long)f->tail);
    say(p, "| threshold | %.6g on the sigmoid%s |\n| teacher | ", f->threshold,
        f->calibration ? "; by budget and length: see Calibration"
                       : ", **not calibrated**: rank, or choose a budget");
    cell(p, str(f->train, "teacher", "?"));
    say(p,
        ", hash %s |\n| training data | %lld documents, longest %lld tokens, hash %s |\n| step | %lld |\n\n",
        str(f->train, "teacher_hash", "?"),
        (long long)json_integer_value(json_object_get(f->train, "train_documents")),
        (long long)json_integer_value(json_object_get(f->train, "trained_length")),
        str(f->train, "data_hash", "?"), (long long)json_integer_value(json_object_get(f->train, "step")));
}

static void conventions(page *p, const lsa_indexer_geom *g) {
    say(p,
        "## Conventions\n\n- Input: the attention input of the layer after its norm, rounded to bf16, of the token before the window, and that token's position.\n"
        "- a = Wa x; u = g a / rms(a), epsilon %g inside the root; q = Wb u, %d heads of %d.\n"
        "- RoPE on the last %d channels, adjacent pairs, base %g, YaRN factor %g over %lld, beta %g to %g, no magnitude scale; frequencies (in golden.safetensors) and angles "
        "are formed in fp32.\n- After RoPE: Hadamard (Sylvester order) / sqrt(128), on queries as on the stored keys.\n"
        "- logit = sum over heads of w_h max(0, k . q_h), w = Ww x / sqrt(128 x heads).\n\n"
        "`indexer.safetensors` holds `retrievers.l{ordinal}.wq_a.weight` [rank, hidden], `.wq_b.weight` [heads x 128, rank], `.q_norm_weight` [rank] and "
        "`.weights_proj.weight` [heads, hidden]. `golden.safetensors` holds inputs and the value after every stage. Before serving, give the "
        "engine's own score function to `check` of `check_indexer.py`, which lies beside it (numpy only) and names the convention that is wrong; `lsa-export verify` proves the "
        "folder.\n\n",
        (double)g->eps, g->n_head, g->head_dim, g->rope.dim, g->rope.base, g->rope.factor,
        (long long)g->rope.original_len, g->rope.beta_fast, g->rope.beta_slow);
}

static double captured(const json_t *eval, const char *row) {
    const json_t *v = json_object_get(json_object_get(eval, row), "captured_0.10");
    return json_is_number(v) ? json_number_value(v) : (double)NAN;
}

static void continuation(page *p, const lsa_indexer_file *f, const json_t *eval) {
    const float *b = f->params + lsa_indexer_costs_at(&f->geom);
    const double with = captured(eval, "sum"), without = captured(eval, "plain");
    if (!f->geom.reach) return;
    say(p,
        "## Continuation\n\nTrained with one: the score that ranks chunk c is z'(c) = max over j = 0 .. %d of z(c - j) - b_j, where z is the sum of the layers' logits%s, b_0 = 0, "
        "chunks before the first do not exist, and the costs b (`lsa.continuation` in the metadata, fp32) are\n\n```\n",
        f->geom.reach, f->geom.prior ? ", observed mass added," : "");
    for (int32_t j = 0; j < f->geom.reach; j++)
        say(p, "%.6g%s", (double)b[j], j + 1 < f->geom.reach ? " " : "\n");
    say(p,
        "```\n\n`liblsa_indexer` applies it. The weights load in a server that knows nothing of it, which then ranks by z alone");
    if (isfinite(with) && isfinite(without) && !f->geom.prior) /* with one, `plain` lacks both */
        say(p,
            " and loses: of the held-out attention mass, 10 %% of the chunks hold %.4f with the continuation, %.4f without",
            with, without);
    say(p,
        ". What it loses most is text that goes on from where it was read last: the weights were trained to find beginnings. "
        "For a server that cannot apply it, train without one.\n\n");
}

static void prior(page *p, const lsa_indexer_file *f, const json_t *eval) {
    const float *w = f->params + lsa_indexer_prior_at(&f->geom);
    const double with = captured(eval, "sum"), without = captured(eval, "plain");
    if (!f->geom.prior) return;
    say(p,
        "## Observed mass\n\nTrained with a prior: to the sum of the layers' logits of chunk c, w_1 ln(1 + m(c) / u) + w_2 ln(1 + M(c) / u) is added, w_1 = %.6g, w_2 = %.6g, "
        "u = %g (`lsa.prior` in the metadata, fp32). m(c) is the attention mass that the native top-k attention gave chunk c in the window just decoded: the "
        "mean over all CSA layers, heads and tokens of the window, a chunk that was not resident having none. M is a memory: when a window ends, M becomes %g M + m, then m the "
        "ended window's. After a prompt they are those of the prompt's windows under full attention, cut at multiples of %lld tokens.\n\n"
        "`liblsa_indexer` keeps m and M for a request that reports its masses. The weights load in a server that reports none, which then ranks without",
        (double)w[0], (double)w[1], (double)LSA_PRIOR_UNIT, (double)LSA_PRIOR_DECAY, (long long)f->tau);
    if (isfinite(with) && isfinite(without))
        say(p,
            " and loses: of the held-out attention mass, 10 %% of the chunks hold %.4f as trained, %.4f %s",
            with, without, f->geom.reach ? "with neither this nor the continuation" : "without");
    say(p, ". For a server that cannot report masses, train without one.\n\n");
}

static void evaluation(page *p, const json_t *eval, const lsa_indexer_geom *g) {
    static const char *const key[] = {"sum", "plain", "mean", "max"};
    const char *const name[] = {"sum of logits",
                                g->reach && g->prior ? "sum of the logits alone"
                                : g->prior           ? "sum without the observed mass"
                                                     : "sum without the continuation",
                                "mean of sigmoids", "maximum of sigmoids"};
    static const char *const column[] = {"precision",     "recall",       "f1",
                                         "kept",          "recall_at_k",  "captured_0.05",
                                         "captured_0.10", "captured_0.20"};
    say(p,
        "## Held-out evaluation\n\nAt the last evaluation of the training run, over all chunks that can be evicted; precision, recall, F1 and kept at the recipe's "
        "threshold.\n\n| score | precision | recall | F1 | kept | recall@K | captured mass at 5 %% | 10 %% | 20 %% |\n|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < 4; i++) {
        const json_t *row = json_object_get(eval, key[i]);
        if (!row) continue;
        say(p, "| %s |", name[i]);
        for (size_t j = 0; j < sizeof column / sizeof *column; j++) {
            const json_t *v = json_object_get(row, column[j]);
            if (json_is_number(v))
                say(p, " %.4f |", json_number_value(v));
            else
                say(p, " - |");
        }
        say(p, "\n");
    }
    say(p, "\n");
}

static void limits(page *p, const lsa_indexer_file *f, const lsa_calibration *c) {
    const long long trained = (long long)json_integer_value(json_object_get(f->train, "trained_length"));
    say(p,
        "## Limits\n\n- Fitted on contexts of up to %lld tokens of the data named above; positions far beyond were never seen.\n",
        trained);
    if (c) {
        say(p,
            "- Thresholds were measured at %lld to %lld tokens of context and are constant outside: nothing is known about the share they keep beyond %lld tokens. "
            "Calibrate on longer documents first, or keep a fixed share.\n",
            (long long)c->knot[0] * LSA_CHUNK, (long long)c->knot[c->n_knot - 1] * LSA_CHUNK,
            (long long)c->longest);
        say(p,
            "- A threshold holds its budget over many windows; single windows keep much less or more (p10 to p90 above), and text of another kind moves the mean. "
            "`lsa-export calibrate --check` measures the thresholds on your documents. Where memory is limited, cap the number of chunks as well.\n"
            "- Calibrated with fp32 queries; a server that rounds queries to fp8 flips about 3 %% of the chunks nearest to a threshold.\n");
    }
    say(p,
        "- Keys and hidden vectors must come from the teacher named above; another model, or another quantisation of its index keys, needs its own indexer.\n");
}

static void recipe(page *p, const json_t *r) {
    const char *key;
    json_t *v;
    say(p, "\n## Recipe\n\n```\n");
    json_object_foreach((json_t *)(uintptr_t)r, key, v) if (json_string_value(v))
        say(p, "%s: %s\n", key, json_string_value(v));
    say(p, "```\n");
}

/* *out NULL: not calibrated. To be freed. */
static lsa_status read_calibration(lsa_calibration **out, const lsa_indexer_file *f, lsa_err *err) {
    *out = NULL;
    if (!f->calibration) return LSA_OK;
    lsa_status st = LSA_NEW(*out, 1, err);
    if (st == LSA_OK)
        st = lsa_calibration_from_json(*out, f->calibration, f->geom.ord, f->geom.n_layer,
                                       "indexer.safetensors", err);
    if (st == LSA_OK) return LSA_OK;
    lsa_free(*out);
    *out = NULL;
    return st;
}

lsa_status lsa_card_text(char **out, const lsa_indexer_file *f, lsa_err *err) {
    lsa_status st = LSA_OK;
    lsa_calibration *c = NULL;
    page p = {0};
    *out = NULL;
    LSA_TRY(read_calibration(&c, f, err));
    const json_t *eval = json_object_get(f->train, "eval"), *r = json_object_get(f->train, "recipe");
    say(&p, "# Memory indexer for %s\n\n", str(f->train, "teacher", "a DeepSeek-V4 model"));
    say(&p,
        "Predicts which 4-token chunks of the context the next %lld tokens will need (Lookahead Sparse Attention, FlashMemory-DeepSeek-V4), so that a server keeps "
        "only those on the GPU. Written by lsa %s.\n\n",
        (long long)f->tau, lsa_version());
    facts(&p, f);
    lsa_card_serving(&p, f, c);
    prior(&p, f, eval);
    continuation(&p, f, eval);
    if (c) lsa_card_calibration(&p, f, c);
    if (eval) evaluation(&p, eval, &f->geom);
    conventions(&p, &f->geom);
    limits(&p, f, c);
    if (r) recipe(&p, r);
    if (p.failed || LSA_VEC_RESERVE(p.s, p.s.len + 1, NULL) != LSA_OK)
        LSA_FAIL(LSA_E_NOMEM, "cannot format the model card");
    p.s.data[p.s.len] = 0;
    *out = p.s.data;
    p.s.data = NULL;
done:
    lsa_free(p.s.data);
    lsa_free(c);
    return st;
}

lsa_status lsa_card_plot(char **out, const lsa_indexer_file *f, lsa_err *err) {
    lsa_calibration *c;
    *out = NULL;
    lsa_status st = read_calibration(&c, f, err);
    if (st == LSA_OK && c) st = lsa_calibration_svg(out, c, f->ensemble, err);
    lsa_free(c);
    return st;
}
