/* report.html: written for someone who has never seen the paper. Self-contained: no script, no font, no
 * request. */
#include "infer/report_html.h"

#include <math.h>
#include <string.h>

#include "infer/report_svg.h"
#include "kernels/core/file.h"
#include "kernels/core/version.h"

#define say lsa_page_say
#define num lsa_row_num

static void td(page *p, double v, int decimals, const char *unit) {
    if (isfinite(v))
        say(p, "<td>%.*f%s</td>", decimals, v, unit);
    else
        say(p, "<td>&ndash;</td>");
}

static void table(page *p, const json_t *rows) {
    say(p,
        "<table id=\"policies\"><thead><tr><th>policy</th><th>budget</th><th>answers recalled</th><th>attention captured</th><th>loss</th><th>answers</th><th>replays</th>"
        "<th>other text</th><th>top-1 as full</th><th>KL</th><th>MiB a sequence</th><th>misses a window</th></tr></thead><tbody>\n");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        const char *name = lsa_row_text(r, "policy");
        say(p, "<tr%s><th><i style=\"background:%s\"></i>%s</th>",
            !strcmp(name, "lsa") ? " class=\"us\"" : "", lsa_policy_colour(name), name);
        td(p, 100 * num(r, "budget"), 0, " %");
        td(p, num(r, "recalled"), 3, "");
        td(p, num(r, "captured"), 3, "");
        td(p, num(r, "nll"), 4, "");
        td(p, num(r, "nll_answer"), 3, "");
        td(p, num(r, "nll_replay"), 3, "");
        td(p, num(r, "nll_other"), 3, "");
        td(p, num(r, "top1_agreement"), 3, "");
        td(p, num(r, "kl"), 4, "");
        td(p, num(r, "gpu_bytes") / 0x1p20, 2, "");
        td(p, num(r, "misses_per_window"), 0, "");
        say(p, "</tr>\n");
    }
    say(p, "</tbody></table>\n");
}

static const char STYLE[] =
    "body{font:15px/1.5 system-ui,-apple-system,Segoe UI,Roboto,sans-serif;color:#1a1a1a;background:#fff;max-width:1040px;margin:32px auto;padding:0 20px}"
    "h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:34px 0 8px}p{max-width:760px}.meta{color:#666;margin-top:0}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13.5px}th,td{padding:5px 8px;text-align:right;border-bottom:1px solid #e6e6e6}"
    "thead th{font-weight:600;color:#555;vertical-align:bottom;border-bottom:2px solid #ccc}tbody th{text-align:left;font-weight:500;white-space:nowrap}thead th:first-child{text-align:left}"
    "tr.us{background:#eaf3fa}i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:7px}"
    ".row{display:flex;flex-wrap:wrap;gap:18px}figure{margin:8px 0;flex:1 1 440px;max-width:500px}figcaption{color:#555;font-size:13.5px}figcaption b{color:#1a1a1a}"
    "svg{width:100%;height:auto}.grid{stroke:#e8e8e8}.axis{stroke:#888}.frame{fill:none;stroke:#888}.tick{font-size:11px;fill:#555}.name{font-size:12px;fill:#1a1a1a}.value{font-size:12px;fill:#1a1a1a}.need{fill:none;stroke:#d55e00;stroke-width:1.2}.replay{stroke:#cc79a7;stroke-width:1.6}.end{font-size:11.5px;font-weight:600}";

/* What the numbers say, in a sentence: the indexer's row nearest to a budget of 10 %. */
static void summary(page *p, const json_t *rows, const json_t *full) {
    const json_t *us = NULL;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        if (strcmp(lsa_row_text(r, "policy"), "lsa")) continue;
        if (!us || fabs(num(r, "budget") - 0.1) < fabs(num(us, "budget") - 0.1)) us = r;
    }
    if (!us || !isfinite(num(us, "captured"))) return;
    say(p,
        "<p>The indexer keeps %.3g %% of the older chunks. They hold %.0f %% of the attention that full attention puts on older chunks and take, with the newest ones, "
        "%.0f %% of the cache; the loss rises by %.3f nats a token",
        100 * num(us, "kept"), 100 * num(us, "captured"),
        100 * num(us, "gpu_bytes") / fmax(1, num(full, "gpu_bytes")), num(us, "nll_diff"));
    if (isfinite(num(us, "recalled")))
        say(p, ", and %.0f %% of the answers are still right (%.0f %% with everything resident)",
            100 * num(us, "recalled"), 100 * num(full, "recalled"));
    say(p, ".</p>\n");
}

static void intro(page *p, const lsa_report_about *a) {
    say(p,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>lsa validation</title><style>%s</style></head><body>\n",
        STYLE);
    say(p, "<h1>Lookahead Sparse Attention: what is lost by keeping less</h1><p class=\"meta\">teacher <b>");
    lsa_page_escaped(p, a->teacher);
    say(p, "</b>, %lld documents of up to %lld tokens, window %lld, tail %lld tokens; lsa %s</p>\n",
        (long long)a->documents, (long long)a->longest, (long long)a->opts->tau, (long long)a->opts->tail,
        lsa_version());
    say(p,
        "<p>A language model with a long context keeps a compressed row of every four tokens (a chunk) on the GPU. Here a small network, the memory indexer, "
        "chooses every %lld tokens which older chunks the next tokens will need; only those and the newest %lld tokens stay. The table compares it with "
        "keeping everything (<b>full</b>), with an <b>oracle</b> that knows the future attention, and with simple rules, all at the same number of chunks.</p>\n",
        (long long)a->opts->tau, (long long)a->opts->tail);
}

static void charts(page *p, const json_t *rows) {
    static const lsa_chart chart[] = {
        {"loss", "Loss over full attention", "nats a token, lower is better", "nll_diff", false, false, true},
        {"captured", "Attention captured", "share of the attention on chunks that can be evicted", "captured",
         true, false, false},
        {"recalled", "Answers recalled", "share of the answer tokens predicted right", "recalled", true, true,
         false}};
    say(p, "<h2>Against the budget</h2><div class=\"row\">\n");
    for (size_t i = 0; i < sizeof chart / sizeof *chart; i++) lsa_svg_chart(p, rows, &chart[i]);
    lsa_svg_memory(p, rows);
    say(p, "</div>\n");
}

static void heat_maps(page *p, const lsa_validation *v) {
    if (v->n_heat == 0) return;
    say(p,
        "<h2>Where the resident chunks lie</h2><p>The first document; time runs down. Coloured: resident. The diagonal edge is the newest text, always resident. "
        "Circles: a fact stated here (across) is asked for there (down). Bars: a span that is written again later.</p><div class=\"row\">\n");
    for (int i = 0; i < v->n_heat; i++) lsa_svg_heat(p, &v->heat[i], v->first);
    say(p, "</div>\n");
}

lsa_status lsa_report_html(const char *path, const json_t *rows, const lsa_validation *v,
                           const lsa_report_about *a, lsa_err *err) {
    lsa_status st = LSA_OK;
    page p = {{0}, false};
    json_t *full = lsa_report_row(&v->full, &v->full);
    intro(&p, a);
    summary(&p, rows, full);
    table(&p, rows);
    say(&p,
        "<p class=\"meta\">Loss in nats a token; answers: values of a fact stated far earlier; replays: spans seen before. Misses: chunks that full attention would choose but that are not resident.</p>\n");
    charts(&p, rows);
    heat_maps(&p, v);
    say(&p, "</body></html>\n");
    if (p.failed)
        st = lsa_err_set(err, LSA_E_NOMEM, __FILE__, __LINE__, "cannot format '%s'", path);
    else
        st = lsa_write_file(path, p.s.data, (size_t)p.s.len, err);
    lsa_free(p.s.data);
    json_decref(full);
    return st;
}
