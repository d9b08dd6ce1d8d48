/* Serving and calibration sections of the card: see card_calibration.h. The mistake that would stay silent:
 * numbers of one score printed beside the rule of another; every table names its score. */
#include "export/card_calibration.h"

#include <math.h>

#define say lsa_page_say

static void percent(page *p, double x) {
    if (isfinite(x))
        say(p, " %.1f |", 100 * x);
    else
        say(p, " - |");
}
static void measured(page *p, double x, lsa_interval i) {
    if (!isfinite(x))
        say(p, " - |");
    else if (isfinite(i.low))
        say(p, " %.3f [%.3f, %.3f] |", x, i.low, i.high);
    else
        say(p, " %.3f |", x);
}

/* Share of chunks, of golden chunks and of mass, in one cell. */
static void triple(page *p, const lsa_calib_point *x) {
    const double v[] = {x->kept, x->recall, x->captured};
    for (int i = 0; i < 3; i++) {
        if (isfinite(v[i]))
            say(p, " %.3f", v[i]);
        else
            say(p, " -");
        say(p, i < 2 ? " /" : " |");
    }
}

/* ---- how to serve ---- */

static void reference_server(page *p, const lsa_indexer_file *f, const lsa_calibration *c) {
    say(p,
        "### On the reference server\n\nIts rule is: keep a chunk if the maximum over the layers of sigmoid(logit + offset) is above the threshold. It has one threshold and "
        "one offset for all layers and lengths. ");
    if (c && c->folded)
        say(p,
            "The weights of this file are scaled so that the values below make that rule, at a context of %lld tokens, keep exactly the chunks of the calibrated "
            "maximum for a budget of %.4g %%.\n\n",
            (long long)c->fold.chunks * LSA_CHUNK, 100 * c->fold.budget);
    else if (f->geom.reach || f->geom.prior)
        say(p,
            "**This file was not made for it**: it has neither the sum nor %s, and `lsa-export "
            "calibrate --fold` refuses. With the values below it keeps whatever it happens to keep.\n\n",
            f->geom.reach ? "the continuation" : "the observed mass");
    else
        say(p,
            "**This file was not made for it**: with the values below the share it keeps is whatever it happens to be. `lsa-export calibrate --fold BUDGET` makes "
            "one that was.\n\n");
    say(p, "| variable | value |\n|---|---|\n| `SGLANG_RETRIEVER_INLINE_LAYERS` | `");
    for (int32_t l = 0; l < f->geom.n_layer; l++) say(p, "%s%d", l ? "," : "", f->geom.ord[l].v);
    say(p,
        "` |\n| `SGLANG_RETRIEVER_ENSEMBLE_MODE` | `or` |\n| `SGLANG_RETRIEVER_SIGMOID_THRESH` | `0.5` |\n");
    if (c && c->folded) say(p, "| `SGLANG_RETRIEVER_LOGIT_OFFSET` | `%.6f` |\n", c->fold.logit_offset);
    say(p, "| `SGLANG_RETRIEVER_INTERVAL` | `%lld` |\n| `SGLANG_RETRIEVER_LAST_KEEP` (chunks) | `%lld` |\n\n",
        (long long)f->tau, (long long)(f->tail / LSA_CHUNK));
    if (c && c->folded)
        say(p,
            "Without the offset, a threshold of `%.6f` is the same rule. What the fold loses, measured on the documents of the calibration (shares of evictable chunks "
            "kept, of golden chunks, of native attention mass): the budget holds near one length only, and the sum of the logits now weighs the layers "
            "differently, so rank by the maximum.\n\n",
            f->threshold);
    if (!c || !c->folded) return;
    say(p,
        "| context, tokens | before folding, no offset: kept / golden / mass | calibrated maximum | now, with the offset |\n|---|---|---|---|\n");
    for (int32_t k = 0; k < c->n_knot; k++) {
        const lsa_calib_point *x[] = {&c->fold.before[k], &c->fold.calibrated[k], &c->fold.after[k]};
        say(p, "| %lld |", (long long)c->knot[k] * LSA_CHUNK);
        for (int i = 0; i < 3; i++) {
            triple(p, x[i]);
        }
        say(p, "\n");
    }
    say(p, "\n");
}

void lsa_card_serving(page *p, const lsa_indexer_file *f, const lsa_calibration *c) {
    say(p,
        "## How to serve it\n\nEvery %lld tokens, score all chunks but the newest %lld tokens' from the hidden vectors of the token before, and keep some of them until the "
        "next time. A chunk's score is %s. ",
        (long long)f->tau, (long long)f->tail,
        f->geom.reach && f->geom.prior
            ? "the sum of the layers' logits, observed mass added (see Observed mass), continued (see Continuation)"
        : f->geom.reach ? "the sum of the layers' logits, continued (see Continuation)"
        : f->geom.prior ? "the sum of the layers' logits, observed mass added (see Observed mass)"
        : f->ensemble == LSA_ENSEMBLE_SUM  ? "the sum of the layers' logits"
        : f->ensemble == LSA_ENSEMBLE_MEAN ? "the mean of the layers' sigmoids"
                                           : "the maximum of the layers' sigmoids");
    if (c)
        say(p,
            "Keep the highest share (a fixed budget, whatever the text), or every chunk whose score is strictly above the threshold of the table below: that holds the "
            "budget on average over text like the calibration's, and spends more where more is needed. Between the lengths of the table, interpolate linearly in "
            "log2 of the visible chunks (tokens / 4).\n\n");
    else
        say(p,
            "**Not calibrated**: no threshold is known to keep a certain share, so keep a fixed share of the highest, or run `lsa-export calibrate` first.\n\n");
    reference_server(p, f, c);
}

/* ---- calibration ---- */

static void thresholds(page *p, const lsa_indexer_file *f, const lsa_calibration *c) {
    const lsa_calib_entry *e = c->entry[f->ensemble];
    say(p,
        "Thresholds of the %s score (the file holds those of the sum, mean and maximum):\n\n| context, tokens | documents |",
        f->geom.reach ? "continued sum" : lsa_ensemble_name(f->ensemble));
    for (int t = 0; t < LSA_CALIB_TARGETS; t++)
        say(p, t < LSA_CALIB_BUDGETS ? " budget %.4g %% |" : " recall %.4g %% |", 100 * e[t].target);
    say(p, "\n|---|---|---|---|---|---|---|---|---|\n");
    for (int32_t k = 0; k < c->n_knot; k++) {
        say(p, "| %lld | %lld |", (long long)c->knot[k] * LSA_CHUNK, (long long)c->knot_documents[k]);
        for (int t = 0; t < LSA_CALIB_TARGETS; t++) say(p, " %.6g |", (double)e[t].threshold[k]);
        say(p, "\n");
    }
}

/* Shortest, middle and longest knot. */
static void kept(page *p, const lsa_indexer_file *f, const lsa_calibration *c) {
    const lsa_calib_entry *e = c->entry[f->ensemble];
    const int32_t at[] = {0, c->n_knot / 2, c->n_knot - 1};
    say(p,
        "\nWhat they keep, with 95 %% intervals over documents (resampled, thresholds fixed):\n\n| context, tokens | target | kept, %% | golden chunks kept | native mass "
        "kept | kept by windows, p10 to p90, %% |\n|---|---|---|---|---|---|\n");
    for (int i = 0; i < 3; i++) {
        if (i && at[i] == at[i - 1]) continue;
        for (int t = 0; t < LSA_CALIB_TARGETS; t++) {
            const lsa_calib_point *q = &e[t].at[at[i]];
            say(p, "| %lld | %s %.4g %% |", (long long)c->knot[at[i]] * LSA_CHUNK, lsa_calib_kind(t),
                100 * e[t].target);
            percent(p, q->kept);
            measured(p, q->recall, q->recall_ci);
            measured(p, q->captured, q->captured_ci);
            say(p, " %.1f to %.1f |\n", 100 * q->spread.low, 100 * q->spread.high);
        }
    }
}

void lsa_card_calibration(page *p, const lsa_indexer_file *f, const lsa_calibration *c) {
    say(p,
        "## Calibration\n\nMeasured on %lld documents (%lld windows, longest %lld tokens, data hash %s) that were not used for training, over every evictable chunk. A "
        "chunk is golden if enough layers of the teacher voted for it inside the window (`sample.min_layers`).\n\n![reliability and thresholds](calibration.svg)\n\n",
        (long long)c->documents, (long long)c->windows, (long long)c->longest, c->data_hash);
    thresholds(p, f, c);
    kept(p, f, c);
    say(p,
        "\nThe chance that a chunk is golden is about sigmoid(logit / temperature + offset); the mean and maximum scores use these:\n\n| layer | temperature | offset "
        "|\n|---|---|---|\n");
    for (int32_t l = 0; l < c->n_layer; l++)
        say(p, "| c%d | %.6g | %.6g |\n", c->ord[l].v, (double)c->temperature[l], (double)c->offset[l]);
    say(p, "\n");
}
