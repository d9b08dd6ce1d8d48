/* The calibration plot: see calibration_plot.h. The mistake that would stay silent: drawing bins of a handful
 * of chunks as if they were measurements; bins under 100 chunks are left out. */
#include "export/calibration_plot.h"

#include <math.h>
#include <stdio.h>

#include "kernels/core/page.h"

#define say lsa_page_say

enum { W = 960, H = 420, TOP = 54, BOTTOM = 360, FEW = 100 };

/* One panel: from (x0, BOTTOM) to (x1, TOP); values are already on a linear scale. */
typedef struct panel {
    int x0, x1;
    double xlo, xhi, ylo, yhi;
} panel;

static double px(const panel *a, double x) {
    return a->x0 + (x - a->xlo) / (a->xhi - a->xlo) * (a->x1 - a->x0);
}
static double py(const panel *a, double y) {
    return BOTTOM - (y - a->ylo) / (a->yhi - a->ylo) * (BOTTOM - TOP);
}

static void x_tick(page *p, const panel *a, double x, const char *text) {
    say(p, "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%d\" y2=\"%d\" class=\"grid\"/>", px(a, x), px(a, x), TOP,
        BOTTOM);
    say(p, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", px(a, x), BOTTOM + 18, text);
}
static void y_tick(page *p, const panel *a, double y, const char *text) {
    say(p, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" class=\"grid\"/>", a->x0, a->x1, py(a, y),
        py(a, y));
    say(p, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", a->x0 - 8, py(a, y) + 4, text);
}
static void titles(page *p, const panel *a, const char *title, const char *x, const char *y) {
    const int mid = (a->x0 + a->x1) / 2, left = a->x0 - 52;
    say(p, "<text x=\"%d\" y=\"24\" class=\"title\">%s</text>\n", a->x0, title);
    say(p, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\" class=\"axis\">%s</text>\n", mid, BOTTOM + 42, x);
    say(p,
        "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\" class=\"axis\" transform=\"rotate(-90 %d %d)\">%s</text>\n",
        left, (TOP + BOTTOM) / 2, left, (TOP + BOTTOM) / 2, y);
}

/* ---- reliability ---- */

static bool drawn(const lsa_reliability *r, int i) {
    return r->chunks[i] >= FEW && r->observed[i] > 0 && r->predicted[i] > 0;
}

/* Lowest decade that some bin needs, -1 to -5. */
static double lowest(const lsa_calibration *c) {
    double low = -1;
    for (int32_t l = 0; l < c->n_layer + LSA_CALIB_SCORES; l++) {
        const lsa_reliability *r = l < c->n_layer ? &c->layer[l] : &c->score[l - c->n_layer];
        for (int i = 0; i < r->n; i++)
            if (drawn(r, i)) low = fmin(low, floor(log10(fmin(r->observed[i], r->predicted[i]))));
    }
    return fmax(low, -5);
}

static void curve(page *p, const panel *a, const lsa_reliability *r, const char *name, const char *colour,
                  double width) {
    const char *to = "M";
    say(p, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"%.1f\" stroke-linejoin=\"round\" d=\"", colour,
        width);
    for (int i = 0; i < r->n; i++) {
        if (!drawn(r, i)) continue;
        say(p, "%s%.1f %.1f", to, px(a, fmax(a->xlo, log10(r->predicted[i]))),
            py(a, fmax(a->ylo, log10(r->observed[i]))));
        to = "L";
    }
    say(p, "\"/>\n");
    for (int i = 0; i < r->n; i++)
        if (drawn(r, i))
            say(p,
                "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" fill=\"%s\"><title>%s: predicted %.3g, golden %.3g of %lld chunks</title></circle>\n",
                px(a, fmax(a->xlo, log10(r->predicted[i]))), py(a, fmax(a->ylo, log10(r->observed[i]))),
                width + 0.7, colour, name, r->predicted[i], r->observed[i], (long long)r->chunks[i]);
}

static void legend(page *p, int row, const char *name, const char *colour, double width) {
    const int x = 92, y = TOP + 18 + 17 * row;
    say(p, "<line x1=\"%d\" x2=\"%d\" y1=\"%d\" y2=\"%d\" stroke=\"%s\" stroke-width=\"%.1f\"/>", x, x + 22,
        y - 4, y - 4, colour, width);
    say(p, "<text x=\"%d\" y=\"%d\" class=\"key\">%s</text>\n", x + 29, y, name);
}

static void draw_reliability(page *p, const lsa_calibration *c) {
    static const char *const colour[] = {"#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#8a8a8a", "#b08d57"};
    enum { N = sizeof colour / sizeof *colour };
    const double low = lowest(c);
    const panel a = {76, 440, low, 0, low, 0};
    for (double d = low; d <= 0; d++) {
        char text[16];
        snprintf(text, sizeof text, "%g", pow(10, d));
        x_tick(p, &a, d, text);
        y_tick(p, &a, d, text);
    }
    say(p,
        "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#222\" stroke-dasharray=\"5 4\"/>\n",
        px(&a, low), py(&a, low), px(&a, 0), py(&a, 0));
    titles(p, &a, "Were chunks as often golden as predicted?", "predicted chance of being golden",
           "share that was golden");
    int row = 0;
    for (int32_t l = 0; l < c->n_layer; l++) {
        char name[32];
        snprintf(name, sizeof name, "layer c%d", c->ord[l].v);
        curve(p, &a, &c->layer[l], name, colour[l % N], 1.5);
        if (l < N) legend(p, row++, name, colour[l % N], 1.5);
    }
    curve(p, &a, &c->score[LSA_SCORE_MEAN], "mean", "#0072b2", 2.6);
    legend(p, row++, "mean of layers", "#0072b2", 2.6);
    curve(p, &a, &c->score[LSA_SCORE_MAX], "maximum", "#d55e00", 2.6);
    legend(p, row++, "maximum of layers", "#d55e00", 2.6);
    say(p,
        "<line x1=\"92\" x2=\"114\" y1=\"%d\" y2=\"%d\" stroke=\"#222\" stroke-dasharray=\"5 4\"/><text x=\"121\" y=\"%d\" class=\"key\">as predicted</text>\n",
        TOP + 14 + 17 * row, TOP + 14 + 17 * row, TOP + 18 + 17 * row);
}

/* ---- thresholds ---- */

static double nice_step(double span) {
    const double raw = span / 5, mag = pow(10, floor(log10(raw)));
    return raw / mag < 1.5 ? mag : raw / mag < 3.5 ? 2 * mag : raw / mag < 7.5 ? 5 * mag : 10 * mag;
}

static void draw_thresholds(page *p, const lsa_calibration *c, lsa_ensemble ensemble) {
    static const char *const colour[LSA_CALIB_BUDGETS] = {"#08306b", "#2171b5", "#4f9fd6", "#85bfe6"};
    const lsa_calib_entry *e = c->entry[ensemble];
    const double first = log2((double)c->knot[0]), last = log2((double)c->knot[c->n_knot - 1]);
    panel a = {560, 880, first, fmax(last, first + 1), (double)INFINITY, -(double)INFINITY};
    for (int t = 0; t < LSA_CALIB_BUDGETS; t++)
        for (int32_t k = 0; k < c->n_knot; k++) {
            a.ylo = fmin(a.ylo, (double)e[t].threshold[k]);
            a.yhi = fmax(a.yhi, (double)e[t].threshold[k]);
        }
    const double step = nice_step(fmax(a.yhi - a.ylo, 1e-6));
    a.ylo = floor(a.ylo / step) * step;
    a.yhi = fmax(ceil(a.yhi / step) * step, a.ylo + step);
    for (int i = 0; a.ylo + i * step <= a.yhi + 0.01 * step; i++) {
        char text[32];
        const double v = a.ylo + i * step;
        snprintf(text, sizeof text, "%.4g", fabs(v) < 1e-9 * step ? 0.0 : v);
        y_tick(p, &a, v, text);
    }
    for (int i = (int)ceil(a.xlo - 1e-9); i <= (int)floor(a.xhi + 1e-9); i++) {
        char text[32];
        const double tokens = 4 * exp2(i);
        if (a.xhi - a.xlo > 8 && i % 2) continue;
        snprintf(text, sizeof text,
                 tokens < 1024      ? "%.0f"
                 : tokens < 1048576 ? "%.0fK"
                                    : "%.0fM",
                 tokens < 1024      ? tokens
                 : tokens < 1048576 ? tokens / 1024
                                    : tokens / 1048576);
        x_tick(p, &a, i, text);
    }
    char title[96];
    snprintf(title, sizeof title, "Threshold that holds a budget (score: %s)", lsa_ensemble_name(ensemble));
    titles(p, &a, title, "context, tokens", "threshold");
    double label = 0;
    for (int t = 0; t < LSA_CALIB_BUDGETS; t++) {
        say(p, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"2.2\" stroke-linejoin=\"round\" d=\"",
            colour[t]);
        for (int32_t k = 0; k < c->n_knot; k++)
            say(p, "%s%.1f %.1f", k ? "L" : "M", px(&a, log2((double)c->knot[k])),
                py(&a, (double)e[t].threshold[k]));
        say(p, "\"/>\n");
        for (int32_t k = 0; k < c->n_knot; k++)
            say(p,
                "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"><title>%.4g %% at %lld chunks: %.6g</title></circle>\n",
                px(&a, log2((double)c->knot[k])), py(&a, (double)e[t].threshold[k]), colour[t],
                100 * e[t].target, (long long)c->knot[k], (double)e[t].threshold[k]);
        const double want =
            py(&a, (double)e[t].threshold[c->n_knot - 1]) + 4; /* budgets ascend, thresholds fall */
        label = t ? fmax(want, label + 15) : want;
        say(p, "<text x=\"%.1f\" y=\"%.1f\" class=\"end\" style=\"fill:%s\">%.4g %%</text>\n",
            px(&a, last) + 9, label, colour[t], 100 * e[t].target);
    }
}

lsa_status lsa_calibration_svg(char **out, const lsa_calibration *c, lsa_ensemble ensemble, lsa_err *err) {
    page p = {0};
    *out = NULL;
    say(&p,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" role=\"img\" aria-label=\"calibration\">\n"
        "<style>text{font:12px system-ui,sans-serif;fill:#444}.title{font-size:15px;font-weight:600;fill:#111}.axis{font-size:13px}.grid{stroke:#e3e3e3}"
        ".end{font-weight:600}.key{fill:#222}</style>\n<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n",
        W, H, W, H, W, H);
    draw_reliability(&p, c);
    draw_thresholds(&p, c, ensemble);
    say(&p, "</svg>\n");
    if (!p.failed && LSA_VEC_RESERVE(p.s, p.s.len + 1, NULL) == LSA_OK) {
        p.s.data[p.s.len] = 0;
        *out = p.s.data;
        return LSA_OK;
    }
    lsa_free(p.s.data);
    LSA_RET_FAIL(LSA_E_NOMEM, "cannot draw the calibration plot");
}
