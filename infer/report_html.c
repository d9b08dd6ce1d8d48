/* report.html: written for someone who has never seen the paper. Colours from a palette that the colour-blind can tell apart
 * (Okabe and Ito), and every line is labelled at its end, so colour never carries the meaning alone. */
#include "infer/report_html.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/file.h"
#include "kernels/core/mem.h"
#include "kernels/core/version.h"

typedef struct page {
    LSA_VEC(char) s;
    bool failed;
} page;

static void say(page *p, const char *fmt, ...) LSA_PRINTF(2, 3);
static void say(page *p, const char *fmt, ...) {
    char buf[4096];
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(buf, sizeof buf, fmt, ap);
    va_end(ap);
    if (n < 0 || n >= (int)sizeof buf || LSA_VEC_RESERVE(p->s, p->s.len + n, NULL) != LSA_OK) {
        p->failed = true;
        return;
    }
    memcpy(p->s.data + p->s.len, buf, (size_t)n);
    p->s.len += n;
}

static void escaped(page *p, const char *s) {
    for (; s && *s; s++) {
        if (*s == '<') say(p, "&lt;");
        else if (*s == '>') say(p, "&gt;");
        else if (*s == '&') say(p, "&amp;");
        else if (*s == '"') say(p, "&quot;");
        else say(p, "%c", *s);
    }
}

static const char *colour(const char *policy) {
    static const char *const map[][2] = {{"full", "#000000"},   {"dense", "#666666"},     {"lsa", "#0072b2"},  {"oracle", "#009e73"},     {"recency", "#e69f00"},
                                         {"random", "#999999"}, {"untrained", "#cc79a7"}, {"last", "#d55e00"}, {"last-spread", "#56b4e9"}};
    for (size_t i = 0; i < sizeof map / sizeof *map; i++)
        if (!strcmp(map[i][0], policy)) return map[i][1];
    return "#000000";
}

static const char *text_of(const json_t *r, const char *key) {
    const char *s = json_string_value(json_object_get(r, key));
    return s ? s : "";
}
static double num(const json_t *r, const char *key) {
    const json_t *v = json_object_get(r, key);
    return json_is_number(v) ? json_number_value(v) : (double)NAN;
}

static void td(page *p, double v, int decimals, const char *unit) {
    if (isfinite(v)) say(p, "<td>%.*f%s</td>", decimals, v, unit);
    else say(p, "<td>&ndash;</td>");
}

static void table(page *p, const json_t *rows) {
    say(p, "<table id=\"policies\"><thead><tr><th>policy</th><th>budget</th><th>answers recalled</th><th>attention captured</th><th>loss</th><th>answers</th><th>replays</th>"
           "<th>other text</th><th>top-1 as full</th><th>KL</th><th>MiB a sequence</th><th>misses a window</th></tr></thead><tbody>\n");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        const char *name = text_of(r, "policy");
        say(p, "<tr%s><th><i style=\"background:%s\"></i>%s</th>", !strcmp(name, "lsa") ? " class=\"us\"" : "", colour(name), name);
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

/* ---- curves ------------------------------------------------------------------------------------------------ */

enum { W = 460, H = 300, L = 56, R = 96, T = 16, B = 42 };

static double nice_step(double span) {
    const double raw = span / 5, mag = pow(10, floor(log10(raw)));
    return raw / mag < 1.5 ? mag : raw / mag < 3.5 ? 2 * mag : raw / mag < 7.5 ? 5 * mag : 10 * mag;
}

typedef struct label {
    double y;
    const char *name;
} label;

/* Labels at the line ends, pushed apart so that none covers another. */
static void end_labels(page *p, label *l, int n) {
    for (int i = 1; i < n; i++)
        for (int j = i; j > 0 && l[j].y < l[j - 1].y; j--) {
            const label t = l[j];
            l[j] = l[j - 1];
            l[j - 1] = t;
        }
    for (int i = 1; i < n; i++)
        if (l[i].y < l[i - 1].y + 13) l[i].y = l[i - 1].y + 13;
    for (int i = 0; i < n; i++)
        say(p, "<text x=\"%d\" y=\"%.1f\" fill=\"%s\" class=\"end\">%s</text>\n", W - R + 8, l[i].y + 4, colour(l[i].name), l[i].name);
}

/* One value against budget, a line per policy; full is a dashed level if `level` is set. */
static void curve(page *p, const json_t *rows, const char *id, const char *title, const char *note, const char *key, bool from_zero, bool level) {
    double lo = from_zero ? 0 : INFINITY, hi = -INFINITY, bmax = 0, bmin = INFINITY;
    bool any = false;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        const double b = num(r, "budget"), y = num(r, key);
        if (isfinite(y) && (isfinite(b) || (level && !strcmp(text_of(r, "policy"), "full")))) {
            lo = fmin(lo, y);
            hi = fmax(hi, y);
        }
        if (!isfinite(b) || !isfinite(y)) continue;
        any = true;
        bmax = fmax(bmax, b);
        bmin = fmin(bmin, b);
    }
    if (!any) return;
    if (hi - lo < 1e-9) hi = lo + 1e-3;
    const double step = nice_step(hi - lo);
    lo = floor(lo / step + 1e-9) * step;
    hi = ceil(hi / step - 1e-9) * step;
    const double bx = bmin == bmax ? 0 : bmin * 0.5, bw = bmin == bmax ? 2 * bmax : bmax - bx; /* a single budget sits in the middle */
#define X(b) (L + ((b)-bx) / bw * (W - L - R))
#define Y(v) (T + (hi - (v)) / (hi - lo) * (H - T - B))
    say(p, "<figure><figcaption><b>%s</b> %s</figcaption><svg id=\"%s\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">\n", title, note, id, W, H, title);
    for (double v = lo; v <= hi + step / 2; v += step)
        say(p, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" class=\"grid\"/><text x=\"%d\" y=\"%.1f\" class=\"tick\" text-anchor=\"end\">%.4g</text>\n", L, W - R, Y(v),
            Y(v), L - 7, Y(v) + 4, fabs(v) < 1e-12 ? 0.0 : v);
    double seen[LSA_MAX_BUDGET];
    int n_seen = 0;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const double b = num(json_array_get(rows, i), "budget");
        bool old = !isfinite(b);
        for (int k = 0; k < n_seen; k++) old = old || seen[k] == b;
        if (old || n_seen == LSA_MAX_BUDGET) continue;
        seen[n_seen++] = b;
        say(p, "<text x=\"%.1f\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">%.4g %%</text>\n", X(b), H - B + 18, 100 * b);
    }
    say(p, "<text x=\"%d\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">chunks kept of those that could be evicted</text>\n", L + (W - L - R) / 2, H - 6);
    label ends[LSA_N_POLICY];
    int n_end = 0;
    for (int k = 0; k < LSA_N_POLICY; k++) {
        const char *name = lsa_policy_name((lsa_policy)k);
        bool open = false;
        double last = 0;
        for (int pass = 0; pass < 2; pass++) { /* the line, then its points */
            bool first = true;
            for (size_t i = 0; i < json_array_size(rows); i++) {
                const json_t *r = json_array_get(rows, i);
                const double b = num(r, "budget"), y = num(r, key);
                if (strcmp(text_of(r, "policy"), name) || !isfinite(y)) continue;
                if (!isfinite(b)) {
                    if (pass == 0 && level && k == LSA_POLICY_FULL) {
                        say(p, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#000\" stroke-dasharray=\"4 3\"/>\n", L, W - R, Y(y), Y(y));
                        open = true;
                        last = y;
                    }
                    continue;
                }
                if (pass == 0 && first) say(p, "<path fill=\"none\" stroke-width=\"%s\" stroke=\"%s\" d=\"", k == LSA_POLICY_LSA ? "3" : "1.8", colour(name));
                if (pass == 0) say(p, "%c%.1f %.1f", first ? 'M' : 'L', X(b), Y(y));
                else say(p, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.2\" fill=\"%s\"><title>%s, %.4g %%: %.4g</title></circle>\n", X(b), Y(y), colour(name), name, 100 * b, y);
                first = false;
                open = true;
                last = y;
            }
            if (pass == 0 && !first) say(p, "\"/>\n");
        }
        if (open) ends[n_end++] = (label){Y(last), name};
    }
    end_labels(p, ends, n_end);
    say(p, "</svg></figure>\n");
#undef X
#undef Y
}

/* ---- bars and heat maps ------------------------------------------------------------------------------------ */

static void memory_bars(page *p, const json_t *rows) {
    double top = 0;
    int n = 0;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        const char *name = text_of(r, "policy");
        if (strcmp(name, "full") && strcmp(name, "lsa")) continue;
        top = fmax(top, num(r, "gpu_bytes"));
        n++;
    }
    if (n == 0 || !(top > 0)) return;
    say(p, "<figure><figcaption><b>Cache on the GPU</b> per sequence, mean over windows, in the layout of a server (compressed rows and index keys of all "
           "compressed-sparse layers; the memory indexer's own keys stay)</figcaption><svg id=\"memory\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"memory\">\n", W, 30 * n + 10);
    int at = 0;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        const char *name = text_of(r, "policy");
        if (strcmp(name, "full") && strcmp(name, "lsa")) continue;
        const double v = num(r, "gpu_bytes"), w = v / top * 230;
        char what[48];
        if (isfinite(num(r, "budget"))) snprintf(what, sizeof what, "%s %.4g %%", name, 100 * num(r, "budget"));
        else snprintf(what, sizeof what, "%s", name);
        say(p, "<text x=\"96\" y=\"%d\" class=\"tick\" text-anchor=\"end\">%s</text><rect x=\"104\" y=\"%d\" width=\"%.1f\" height=\"20\" fill=\"%s\"/><text x=\"%.1f\" y=\"%d\" class=\"tick\">%.2f MiB (%.1f %%)</text>\n",
            30 * at + 21, what, 30 * at + 7, w, colour(name), 110 + w, 30 * at + 21, v / 0x1p20, 100 * v / top);
        at++;
    }
    say(p, "</svg></figure>\n");
}

static void heat_map(page *p, const lsa_heat *h) {
    const double cw = 380.0 / h->cols, rh = 260.0 / h->rows;
    say(p, "<figure><figcaption><b>%s, %.4g %%</b></figcaption><svg class=\"heat\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"resident chunks, %s\"><rect x=\"40\" y=\"8\" width=\"380\" height=\"260\" fill=\"#f4f4f4\"/>\n",
        lsa_policy_name(h->policy), 100 * h->budget, W, H, lsa_policy_name(h->policy));
    for (int r = 0; r < h->rows; r++)
        for (int c = 0; c < h->cols;) { /* runs of one shade are one rectangle */
            int e = c;
            while (e < h->cols && h->v[r][e] == h->v[r][c]) e++;
            if (h->v[r][c] > 1)
                say(p, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\" fill-opacity=\"%.2f\"/>", 40 + c * cw, 8 + r * rh, (e - c) * cw + 0.05, rh + 0.05,
                    colour(lsa_policy_name(h->policy)), (h->v[r][c] - 1) / 254.0);
            c = e;
        }
    say(p, "<text x=\"230\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">position in the document &rarr;</text><text x=\"24\" y=\"138\" class=\"tick\" text-anchor=\"middle\" transform=\"rotate(-90 24 138)\">&larr; time</text></svg></figure>\n", H - 12);
}

static const char STYLE[] =
    "body{font:15px/1.5 system-ui,-apple-system,Segoe UI,Roboto,sans-serif;color:#1a1a1a;background:#fff;max-width:1040px;margin:32px auto;padding:0 20px}"
    "h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:34px 0 8px}p{max-width:760px}.meta{color:#666;margin-top:0}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13.5px}th,td{padding:5px 8px;text-align:right;border-bottom:1px solid #e6e6e6}"
    "thead th{font-weight:600;color:#555;vertical-align:bottom;border-bottom:2px solid #ccc}tbody th{text-align:left;font-weight:500;white-space:nowrap}thead th:first-child{text-align:left}"
    "tr.us{background:#eaf3fa}i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:7px}"
    ".row{display:flex;flex-wrap:wrap;gap:18px}figure{margin:8px 0;flex:1 1 440px;max-width:500px}figcaption{color:#555;font-size:13.5px}figcaption b{color:#1a1a1a}"
    "svg{width:100%;height:auto}.grid{stroke:#e8e8e8}.tick{font-size:11px;fill:#555}.end{font-size:11.5px;font-weight:600}";

lsa_status lsa_report_html(const char *path, const json_t *rows, const lsa_validation *v, const lsa_report_about *a, lsa_err *err) {
    page p = {{0}, false};
    const json_t *full = NULL, *us = NULL;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        if (!strcmp(text_of(r, "policy"), "full")) full = r;
        if (!strcmp(text_of(r, "policy"), "lsa") && (!us || fabs(num(r, "budget") - 0.1) < fabs(num(us, "budget") - 0.1))) us = r;
    }
    say(&p, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>lsa validation</title><style>%s</style></head><body>\n",
        STYLE);
    say(&p, "<h1>Lookahead Sparse Attention: what is lost by keeping less</h1><p class=\"meta\">teacher <b>");
    escaped(&p, a->teacher);
    say(&p, "</b>, %lld documents of up to %lld tokens, window %lld, tail %lld tokens; lsa %s</p>\n", (long long)a->documents, (long long)a->longest, (long long)a->opts->tau,
        (long long)a->opts->tail, lsa_version());
    say(&p, "<p>A language model with a long context keeps a compressed row of every four tokens (a chunk) on the GPU. Here a small network, the memory indexer, "
            "chooses every %lld tokens which older chunks the next tokens will need; only those and the newest %lld tokens stay. The table compares it with "
            "keeping everything (<b>full</b>), with an <b>oracle</b> that knows the future attention, and with simple rules, all at the same number of chunks.</p>\n",
        (long long)a->opts->tau, (long long)a->opts->tail);
    if (full && us && isfinite(num(us, "captured")))
        say(&p, "<p>With %.4g %% of the older chunks the indexer keeps %.0f %% of the attention that full attention puts on them, at %.1f %% of the cache; the loss per token rises by %.4f nats.</p>\n",
            100 * num(us, "budget"), 100 * num(us, "captured"), 100 * num(us, "gpu_bytes") / fmax(1, num(full, "gpu_bytes")), num(us, "nll_diff"));
    table(&p, rows);
    say(&p, "<p class=\"meta\">Loss in nats a token; answers: values of a fact stated far earlier; replays: spans seen before. Misses: chunks that full attention would choose but that are not resident.</p>\n");
    say(&p, "<h2>Against the budget</h2><div class=\"row\">\n");
    curve(&p, rows, "loss", "Loss over full attention", "nats a token, lower is better", "nll_diff", true, false);
    curve(&p, rows, "captured", "Attention captured", "share of the mass on evictable chunks", "captured", true, false);
    curve(&p, rows, "recalled", "Answers recalled", "share of answer tokens predicted right", "recalled", true, true);
    memory_bars(&p, rows);
    say(&p, "</div>\n");
    if (v->n_heat) {
        say(&p, "<h2>Where the resident chunks lie</h2><p>The first document. Each row is a moment, time running down; dark places are resident. The edge on the right is the newest text.</p><div class=\"row\">\n");
        for (int i = 0; i < v->n_heat; i++) heat_map(&p, &v->heat[i]);
        say(&p, "</div>\n");
    }
    say(&p, "</body></html>\n");
    lsa_status st = LSA_OK;
    if (p.failed) st = lsa_err_set(err, LSA_E_NOMEM, __FILE__, __LINE__, "cannot format '%s'", path);
    else st = lsa_write_file(path, p.s.data, (size_t)p.s.len, err);
    lsa_free(p.s.data);
    return st;
}
