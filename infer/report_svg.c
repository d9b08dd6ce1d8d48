/* SVG drawings: see report_svg.h. The mistake that would stay silent: a chart that leaves out the rows whose
 * number is null, so that a policy seems not to have been run; such rows stay in the table with a dash. */
#include "infer/report_svg.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/num.h"

#define say lsa_page_say

const char *lsa_policy_colour(const char *policy) {
    static const char *const map[][2] = {
        {"full", "#222222"},      {"dense", "#6b6b6b"},   {"lsa", "#0072b2"},
        {"oracle", "#009e73"},    {"recency", "#e69f00"}, {"random", "#a6a6a6"},
        {"untrained", "#cc79a7"}, {"last", "#d55e00"},    {"last-spread", "#56b4e9"}};
    for (size_t i = 0; i < sizeof map / sizeof *map; i++)
        if (!strcmp(map[i][0], policy)) return map[i][1];
    return "#222222";
}

const char *lsa_row_text(const json_t *r, const char *key) {
    const char *s = json_string_value(json_object_get(r, key));
    return s ? s : "";
}
double lsa_row_num(const json_t *r, const char *key) {
    const json_t *v = json_object_get(r, key);
    return json_is_number(v) ? json_number_value(v) : (double)NAN;
}

int lsa_row_budgets(double budget[LSA_MAX_BUDGET], const json_t *rows) {
    int n = 0;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const double b = lsa_row_num(json_array_get(rows, i), "budget");
        bool old = !isfinite(b) || n == LSA_MAX_BUDGET;
        for (int k = 0; k < n; k++) old = old || budget[k] == b;
        if (old) continue;
        int at = n++;
        for (; at > 0 && budget[at - 1] > b; at--) budget[at] = budget[at - 1];
        budget[at] = b;
    }
    return n;
}

static void show(char out[32], double v, const lsa_chart *c) {
    if (c->percent)
        snprintf(out, 32, "%.1f %%", 100 * v);
    else
        snprintf(out, 32, "%.4g", fabs(v) < 5e-5 ? 0.0 : v);
}

static void head(page *p, const lsa_chart *c, int w, int h) {
    say(p,
        "<figure><figcaption><b>%s</b> %s</figcaption><svg id=\"%s\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"%s\">\n",
        c->title, c->note, c->id, w, h, c->title);
}

/* ---- bars: one budget ---- */

enum { W = 480, H = 310, ROW = 26 };

typedef struct bar {
    const char *name;
    double v;
} bar;

static void bars(page *p, const json_t *rows, const lsa_chart *c) {
    enum { LEFT = 92, RIGHT = 66 };
    bar b[LSA_N_POLICY];
    int n = 0;
    double top = 0;
    for (size_t i = 0; i < json_array_size(rows) && n < LSA_N_POLICY; i++) {
        const json_t *r = json_array_get(rows, i);
        const double v = lsa_row_num(r, c->key);
        const char *name = lsa_row_text(r, "policy");
        if (!isfinite(v) || (!strcmp(name, "full") && !c->level) || !strcmp(name, "dense")) continue;
        int at = n++;
        for (; at > 0 && (c->low_is_good ? b[at - 1].v > v : b[at - 1].v < v); at--) b[at] = b[at - 1];
        b[at] = (bar){name, v};
        top = fmax(top, v);
    }
    if (n == 0) return;
    if (c->percent) top = 1;
    const int h = n * ROW + 8;
    head(p, c, W, h);
    say(p, "<line x1=\"%d\" x2=\"%d\" y1=\"2\" y2=\"%d\" class=\"axis\"/>\n", LEFT, LEFT, h - 2);
    for (int i = 0; i < n; i++) {
        char text[32];
        const double w = top > 0 ? fmax(0, b[i].v) / top * (W - LEFT - RIGHT) : 0;
        const int y = 4 + i * ROW;
        const char *strong = !strcmp(b[i].name, "lsa") ? " font-weight=\"700\"" : "";
        show(text, b[i].v, c);
        say(p,
            "<text x=\"%d\" y=\"%d\" class=\"name\" text-anchor=\"end\"%s>%s</text><rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\" fill=\"%s\"/><text x=\"%.1f\" y=\"%d\" class=\"value\"%s>%s</text>\n",
            LEFT - 8, y + 17, strong, b[i].name, LEFT, y + 3, w, ROW - 7, lsa_policy_colour(b[i].name),
            LEFT + w + 6, y + 17, strong, text);
    }
    say(p, "</svg></figure>\n");
}

/* ---- lines: several budgets ---- */

enum { L = 52, R = 92, T = 14, B = 44 };

typedef struct axes {
    double lo, hi, step, bmin, bmax;
    bool log_x;
} axes;

static double at_x(const axes *a, double b) {
    const double f =
        a->log_x ? log(b / a->bmin) / log(a->bmax / a->bmin) : (b - a->bmin) / (a->bmax - a->bmin);
    return L + 10 + f * (W - L - R - 20);
}
static double at_y(const axes *a, double v) {
    return T + (a->hi - v) / (a->hi - a->lo) * (H - T - B);
}

static double nice_step(double span) {
    const double raw = span / 5, mag = pow(10, floor(log10(raw)));
    return raw / mag < 1.5 ? mag : raw / mag < 3.5 ? 2 * mag : raw / mag < 7.5 ? 5 * mag : 10 * mag;
}

typedef struct label {
    double y, want;
    const char *name;
} label;

/* Labels at the line ends, pushed apart so that none covers another or leaves the picture. */
static void end_labels(page *p, label *l, int n, double x) {
    enum { GAP = 14 };
    for (int i = 1; i < n; i++)
        for (int j = i; j > 0 && l[j].y < l[j - 1].y; j--) {
            const label t = l[j];
            l[j] = l[j - 1];
            l[j - 1] = t;
        }
    for (int i = 1; i < n; i++) l[i].y = fmax(l[i].y, l[i - 1].y + GAP);
    if (n && l[n - 1].y > H - B + 4) l[n - 1].y = H - B + 4;
    for (int i = n - 2; i >= 0; i--) l[i].y = fmin(l[i].y, l[i + 1].y - GAP);
    for (int i = 0; i < n; i++)
        say(p,
            "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"0.7\"/><text x=\"%.1f\" y=\"%.1f\" fill=\"%s\" class=\"end\">%s</text>\n",
            x + 5, x + 16, l[i].want, l[i].y, lsa_policy_colour(l[i].name), x + 19, l[i].y + 4,
            lsa_policy_colour(l[i].name), l[i].name);
}

static bool find_axes(axes *a, const json_t *rows, const lsa_chart *c) {
    double budget[LSA_MAX_BUDGET], hi = -(double)INFINITY, lo = 0;
    const int n = lsa_row_budgets(budget, rows);
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        const double y = lsa_row_num(r, c->key);
        if (!isfinite(y) ||
            !(isfinite(lsa_row_num(r, "budget")) || (c->level && !strcmp(lsa_row_text(r, "policy"), "full"))))
            continue;
        hi = fmax(hi, y);
        lo = fmin(lo, y);
    }
    if (!isfinite(hi)) return false;
    if (c->percent) hi = 1;
    if (hi - lo < 1e-9) hi = lo + 1e-3;
    *a = (axes){.step = c->percent ? 0.2 : nice_step(hi - lo),
                .bmin = budget[0],
                .bmax = budget[n - 1],
                .log_x = budget[n - 1] / budget[0] >= 3};
    a->lo = floor(lo / a->step + 1e-9) * a->step;
    a->hi = ceil(hi / a->step - 1e-9) * a->step;
    return true;
}

static void grid(page *p, const axes *a, const json_t *rows, const lsa_chart *c) {
    double budget[LSA_MAX_BUDGET];
    const int n = lsa_row_budgets(budget, rows);
    for (int k = 0; k <= (int)lround((a->hi - a->lo) / a->step); k++) {
        const double v = a->lo + k * a->step;
        char text[32];
        if (c->percent)
            snprintf(text, sizeof text, "%.0f %%", 100 * v);
        else
            snprintf(text, sizeof text, "%.4g", fabs(v) < 1e-12 ? 0.0 : v);
        say(p,
            "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" class=\"%s\"/><text x=\"%d\" y=\"%.1f\" class=\"tick\" text-anchor=\"end\">%s</text>\n",
            L, W - R, at_y(a, v), at_y(a, v), fabs(v) < 1e-12 ? "axis" : "grid", L - 7, at_y(a, v) + 4, text);
    }
    for (int i = 0; i < n; i++)
        say(p, "<text x=\"%.1f\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">%.4g %%</text>\n",
            at_x(a, budget[i]), H - B + 18, 100 * budget[i]);
    say(p,
        "<text x=\"%d\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">budget: older chunks that stay</text>\n",
        L + (W - L - R) / 2, H - 8);
}

/* One policy's line and points; false if it has none. */
static bool line(page *p, const axes *a, const json_t *rows, const lsa_chart *c, const char *name,
                 double *end) {
    double budget[LSA_MAX_BUDGET], v[LSA_MAX_BUDGET];
    const int n = lsa_row_budgets(budget, rows);
    int last = -1;
    const char *colour = lsa_policy_colour(name);
    for (int k = 0; k < n; k++) {
        v[k] = (double)NAN;
        for (size_t i = 0; i < json_array_size(rows); i++) {
            const json_t *r = json_array_get(rows, i);
            if (!strcmp(lsa_row_text(r, "policy"), name) && lsa_row_num(r, "budget") == budget[k])
                v[k] = lsa_row_num(r, c->key);
        }
        if (isfinite(v[k])) last = k;
    }
    if (last < 0) return false;
    say(p, "<path fill=\"none\" stroke-width=\"%s\" stroke=\"%s\" d=\"", !strcmp(name, "lsa") ? "3.2" : "1.8",
        colour);
    const char *to = "M";
    for (int k = 0; k <= last; k++)
        if (isfinite(v[k])) {
            say(p, "%s%.1f %.1f", to, at_x(a, budget[k]), at_y(a, v[k]));
            to = "L";
        }
    say(p, "\"/>\n");
    for (int k = 0; k <= last; k++) {
        char text[32];
        if (!isfinite(v[k])) continue;
        show(text, v[k], c);
        say(p,
            "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.4\" fill=\"%s\"><title>%s, budget %.4g %%: %s</title></circle>\n",
            at_x(a, budget[k]), at_y(a, v[k]), colour, name, 100 * budget[k], text);
    }
    *end = at_y(a, v[last]);
    return true;
}

static void lines(page *p, const json_t *rows, const lsa_chart *c) {
    axes a;
    label ends[LSA_N_POLICY];
    int n = 0;
    if (!find_axes(&a, rows, c)) return;
    head(p, c, W, H);
    grid(p, &a, rows, c);
    for (size_t i = 0; c->level && i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        const double v = lsa_row_num(r, c->key);
        if (strcmp(lsa_row_text(r, "policy"), "full") || !isfinite(v)) continue;
        say(p,
            "<line x1=\"%d\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#222\" stroke-dasharray=\"5 4\"/>\n",
            L, at_x(&a, a.bmax), at_y(&a, v), at_y(&a, v));
        ends[n++] = (label){at_y(&a, v), at_y(&a, v), "full"};
    }
    for (int k = LSA_N_POLICY - 1; k > LSA_POLICY_DENSE; k--) { /* lsa last: on top */
        double y;
        const char *name = lsa_policy_name((lsa_policy)k);
        if (line(p, &a, rows, c, name, &y)) ends[n++] = (label){y, y, name};
    }
    end_labels(p, ends, n, at_x(&a, a.bmax));
    say(p, "</svg></figure>\n");
}

void lsa_svg_chart(page *p, const json_t *rows, const lsa_chart *c) {
    double budget[LSA_MAX_BUDGET];
    if (lsa_row_budgets(budget, rows) > 1)
        lines(p, rows, c);
    else
        bars(p, rows, c);
}

/* ---- memory ---- */

void lsa_svg_memory(page *p, const json_t *rows) {
    enum { LEFT = 110, RIGHT = 132, MAX = LSA_MAX_BUDGET + 1 };
    static const char *const choice[] = {"lsa",       "oracle", "recency",    "random",
                                         "untrained", "last",   "last-spread"};
    const json_t *shown[MAX];
    const char *who = NULL;
    int n = 0;
    double top = 0;
    for (size_t k = 0; k < sizeof choice / sizeof *choice && !who; k++)
        for (size_t i = 0; i < json_array_size(rows); i++)
            if (!strcmp(lsa_row_text(json_array_get(rows, i), "policy"), choice[k])) who = choice[k];
    for (size_t i = 0; i < json_array_size(rows) && n < MAX; i++) {
        const json_t *r = json_array_get(rows, i);
        const char *name = lsa_row_text(r, "policy");
        if (strcmp(name, "full") && (!who || strcmp(name, who))) continue;
        shown[n++] = r;
        top = fmax(top, lsa_row_num(r, "gpu_bytes") + lsa_row_num(r, "level1_bytes"));
    }
    if (n == 0 || !(top > 0)) return;
    say(p,
        "<figure><figcaption><b>Cache on the GPU</b> MiB a sequence, mean over the windows; pale: index keys of evicted chunks that the memory indexer "
        "still reads</figcaption><svg id=\"memory\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"Cache on the GPU\">\n<line x1=\"%d\" x2=\"%d\" y1=\"2\" y2=\"%d\" class=\"axis\"/>\n",
        W, n * ROW + 8, LEFT, LEFT, n * ROW + 6);
    for (int i = 0; i < n; i++) {
        const double kept = lsa_row_num(shown[i], "gpu_bytes"), keys = lsa_row_num(shown[i], "level1_bytes"),
                     b = lsa_row_num(shown[i], "budget");
        const double w = kept / top * (W - LEFT - RIGHT), wk = keys / top * (W - LEFT - RIGHT);
        const char *name = lsa_row_text(shown[i], "policy"), *colour = lsa_policy_colour(name);
        char what[64];
        if (isfinite(b))
            snprintf(what, sizeof what, "%s %.4g %%", name, 100 * b);
        else
            snprintf(what, sizeof what, "%s", name);
        const int y = 4 + i * ROW;
        say(p,
            "<text x=\"%d\" y=\"%d\" class=\"name\" text-anchor=\"end\">%s</text><rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\" fill=\"%s\"/>"
            "<rect x=\"%.1f\" y=\"%d\" width=\"%.1f\" height=\"%d\" fill=\"%s\" fill-opacity=\"0.35\"/>",
            LEFT - 8, y + 17, what, LEFT, y + 3, w, ROW - 7, colour, LEFT + w, y + 3, wk, ROW - 7, colour);
        say(p, "<text x=\"%.1f\" y=\"%d\" class=\"value\">%.2f", LEFT + w + wk + 6, y + 17, kept / 0x1p20);
        if (keys > 0) say(p, " + %.2f", keys / 0x1p20);
        say(p, " (%.0f %%)</text>\n", 100 * (kept + keys) / top);
    }
    say(p, "</svg></figure>\n");
}

/* ---- heat map ---- */

enum { HX = 52, HY = 10, HW = 412, HH = 300, LEVELS = 8 };

static int heat_level(uint8_t v) { /* -1 not formed, 0 nothing resident .. LEVELS all */
    return v == 0 ? -1 : ((v - 1) * LEVELS + 126) / 254;
}

/* One path per shade: every run of a row is one sub-path. */
static void heat_cells(page *p, const lsa_heat *h, const char *colour) {
    for (int k = 0; k <= LEVELS; k++) {
        bool open = false;
        for (int r = 0; r < h->rows; r++)
            for (int c = 0; c < h->cols;) {
                int e = c + 1;
                const int level = heat_level(h->v[r][c]);
                while (e < h->cols && heat_level(h->v[r][e]) == level) e++;
                if (level == k) {
                    if (!open)
                        say(p, "<path fill=\"%s\" fill-opacity=\"%.3f\" d=\"", k ? colour : "#000",
                            k ? (double)k / LEVELS : 0.055);
                    open = true;
                    say(p, "M%d %dh%dv1h-%dz", c, r, e - c, e - c);
                }
                c = e;
            }
        if (open) say(p, "\"/>\n");
    }
}

void lsa_svg_heat(page *p, const lsa_heat *h, const lsa_doc *doc) {
    const char *name = lsa_policy_name(h->policy);
    const double n = (double)lsa_max_i64(1, doc->n_token);
    const double step = 1024 * exp2(ceil(log2(n / 8 / 1024)));
    char budget[32] = "";
    if (h->budget >= 0) snprintf(budget, sizeof budget, ", budget %.4g %%", 100 * h->budget);
    say(p,
        "<figure><figcaption><b>%s</b>%s</figcaption><svg class=\"heat\" id=\"heat-%s\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"resident chunks of %s\">\n",
        name, budget, name, W, HY + HH + 42, name);
    say(p,
        "<svg x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" preserveAspectRatio=\"none\" shape-rendering=\"crispEdges\">\n",
        HX, HY, HW, HH, h->cols, h->rows);
    heat_cells(p, h, lsa_policy_colour(name));
    say(p, "</svg>\n<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" class=\"frame\"/>\n", HX, HY, HW, HH);
    for (int64_t i = 0; i < doc->n_replay; i++) {
        const lsa_replay *r = &doc->replay[i];
        say(p, "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\" class=\"replay\"/>\n",
            HX + (double)r->source / n * HW, HX + (double)(r->source + r->len) / n * HW,
            HY + (double)r->dest / n * HH, HY + (double)(r->dest + r->len) / n * HH);
    }
    for (int64_t i = 0; i < doc->n_fact; i++)
        say(p, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" class=\"need\"/>\n",
            HX + (double)doc->fact[i].statement / n * HW, HY + (double)doc->fact[i].question / n * HH);
    for (double t = 0; t <= n; t += step) {
        const double x = HX + t / n * HW, y = HY + t / n * HH;
        say(p,
            "<text x=\"%.1f\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">%.0fk</text><text x=\"%d\" y=\"%.1f\" class=\"tick\" text-anchor=\"end\">%.0fk</text>\n",
            x, HY + HH + 16, t / 1024, HX - 6, y + 4, t / 1024);
    }
    say(p,
        "<text x=\"%d\" y=\"%d\" class=\"tick\" text-anchor=\"middle\">where the chunk lies (token)</text><text x=\"12\" y=\"%d\" class=\"tick\" text-anchor=\"middle\" transform=\"rotate(-90 12 %d)\">when (token being written)</text></svg></figure>\n",
        HX + HW / 2, HY + HH + 34, HY + HH / 2, HY + HH / 2);
}
