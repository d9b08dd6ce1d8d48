/* Reports: rows, the table and report.json; the page itself is in report_html.c. */
#include "infer/report.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "infer/report_html.h"
#include "kernels/core/file.h"
#include "kernels/core/version.h"

static double mean(double sum, int64_t n) {
    return n ? sum / (double)n : (double)NAN;
}
static double nll(const lsa_result *r, int part) {
    return mean(r->nll[part], r->n[part]);
}

/* A number, or null for what does not exist. */
static void put(json_t *o, const char *key, double v) {
    json_object_set_new(o, key, isfinite(v) ? json_real(v) : json_null());
}

json_t *lsa_report_row(const lsa_result *r, const lsa_result *full) {
    json_t *o = json_object();
    const bool all = r->policy == LSA_POLICY_FULL || r->policy == LSA_POLICY_DENSE;
    json_object_set_new(o, "policy", json_string(lsa_policy_name(r->policy)));
    json_object_set_new(o, "budget", r->budget < 0 ? json_null() : json_real(r->budget));
    json_object_set_new(o, "documents", json_integer(r->documents));
    json_object_set_new(o, "tokens", json_integer(r->tokens));
    put(o, "nll", nll(r, LSA_PART_ALL));
    put(o, "nll_answer", nll(r, LSA_PART_ANSWER));
    put(o, "nll_replay", nll(r, LSA_PART_REPLAY));
    put(o, "nll_other", nll(r, LSA_PART_OTHER));
    put(o, "recalled", mean((double)r->recalled, r->n[LSA_PART_ANSWER]));
    put(o, "captured", all ? 1.0 : r->total_mass > 0 ? r->captured / r->total_mass : (double)NAN);
    put(o, "kept", all ? 1.0 : mean((double)r->kept, r->evictable));
    put(o, "gpu_bytes", mean(r->gpu_bytes, r->windows));
    put(o, "level1_bytes", mean(r->level1_bytes, r->windows));
    put(o, "misses_per_window", r->misses_unknown ? (double)NAN : mean((double)r->misses, r->windows));
    if (r->rows_bytes) { /* measured on a GPU */
        put(o, "measured_rows_bytes", (double)r->rows_bytes);
        put(o, "measured_keys_bytes", (double)r->keys_bytes);
        put(o, "measured_host_bytes", (double)r->host_bytes);
        put(o, "swapped_bytes_per_window", mean((double)r->swapped_bytes, r->windows));
    }
    put(o, "top1_agreement", mean((double)r->agree, r->n[LSA_PART_ALL]));
    put(o, "kl", mean(r->kl, r->n_kl));
    if (full) {
        put(o, "nll_diff", nll(r, LSA_PART_ALL) - nll(full, LSA_PART_ALL));
        put(o, "nll_answer_diff", nll(r, LSA_PART_ANSWER) - nll(full, LSA_PART_ANSWER));
        put(o, "nll_replay_diff", nll(r, LSA_PART_REPLAY) - nll(full, LSA_PART_REPLAY));
        put(o, "nll_other_diff", nll(r, LSA_PART_OTHER) - nll(full, LSA_PART_OTHER));
    }
    return o;
}

static void cell(double v, int width, int decimals) {
    if (isfinite(v))
        printf("%*.*f", width, decimals, v);
    else
        printf("%*s", width, "-");
}

void lsa_report_table(const lsa_validation *v) {
    printf("%-12s %7s %9s %9s %8s %9s %9s %9s %9s %10s %9s\n", "policy", "budget", "recalled", "captured",
           "nll", "answers", "replays", "other", "kept", "MiB/seq", "misses");
    for (int i = 0; i < v->n; i++) {
        const lsa_result *r = &v->row[i];
        const bool all = r->policy == LSA_POLICY_FULL || r->policy == LSA_POLICY_DENSE;
        char budget[16] = "-";
        if (r->budget >= 0) snprintf(budget, sizeof budget, "%.4g %%", 100 * r->budget);
        printf("%-12s %7s", lsa_policy_name(r->policy), budget);
        cell(mean((double)r->recalled, r->n[LSA_PART_ANSWER]), 10, 3);
        cell(all ? 1.0 : r->total_mass > 0 ? r->captured / r->total_mass : (double)NAN, 10, 3);
        cell(nll(r, LSA_PART_ALL), 9, 4);
        cell(nll(r, LSA_PART_ANSWER), 10, 3);
        cell(nll(r, LSA_PART_REPLAY), 10, 3);
        cell(nll(r, LSA_PART_OTHER), 10, 3);
        cell(all ? 1.0 : mean((double)r->kept, r->evictable), 10, 3);
        cell(mean(r->gpu_bytes, r->windows) / 0x1p20, 11, 3);
        cell(r->misses_unknown ? (double)NAN : mean((double)r->misses, r->windows), 10, 0);
        printf("\n");
    }
    printf(
        "recalled: share of answer tokens right; captured: attention mass kept of what could be evicted; nll in nats a token, over all tokens, answers,\n"
        "replayed spans and other text; MiB/seq: resident cache as a server stores it, mean over windows; misses: wanted chunks not resident, a window\n");
}

lsa_status lsa_report_write(const lsa_validation *v, const lsa_report_about *a, const char *dir,
                            lsa_err *err) {
    lsa_status st = LSA_OK;
    char path[LSA_PATH_MAX];
    json_t *root = NULL, *rows = json_array(), *budgets = json_array();
    LSA_TRY(lsa_mkdirs(dir, err));
    for (int i = 0; i < v->n; i++) json_array_append_new(rows, lsa_report_row(&v->row[i], &v->full));
    for (int i = 0; i < a->opts->n_budget; i++) json_array_append_new(budgets, json_real(a->opts->budget[i]));
    root =
        json_pack("{s:s, s:s, s:s, s:s, s:s?, s:I, s:I, s:I, s:I, s:I, s:O, s:O, s:f}", "format",
                  "lsa-report/1", "lsa", lsa_version(), "teacher", a->teacher, "tokens", a->tokens, "indexer",
                  a->indexer, "documents", (json_int_t)a->documents, "longest", (json_int_t)a->longest, "tau",
                  (json_int_t)a->opts->tau, "tail", (json_int_t)a->opts->tail, "sink",
                  (json_int_t)a->opts->sink, "budgets", budgets, "rows", rows, "seconds", v->seconds);
    LSA_TRY(lsa_path(path, err, "%s/report.json", dir));
    LSA_TRY(lsa_json_save(root, path, err));
    LSA_TRY(lsa_path(path, err, "%s/report.html", dir));
    LSA_TRY(lsa_report_html(path, rows, v, a, err));
done:
    json_decref(root);
    json_decref(rows);
    json_decref(budgets);
    return st;
}
