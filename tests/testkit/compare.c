/* See compare.h. Compiled without fast-math and without contraction. */
#include "tests/testkit/compare.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

bool lsa_compare_f64(const char *what, const double *a, const double *b, int64_t n, lsa_tol t) {
    double sb = 0, sa = 0, ab = 0;
    int64_t n_fin = 0, n_bad = 0, worst = -1;
    double worst_over = -1;
    for (int64_t i = 0; i < n; i++) {
        if (isfinite(b[i])) {
            sb += b[i] * b[i];
            n_fin++;
            if (isfinite(a[i])) {
                sa += a[i] * a[i];
                ab += a[i] * b[i];
            }
        }
    }
    double rms = n_fin ? sqrt(sb / (double)n_fin) : 0;
    for (int64_t i = 0; i < n; i++) {
        bool pass;
        double over = 0;
        if (isnan(b[i]))
            pass = isnan(a[i]);
        else if (isinf(b[i]))
            pass = a[i] == b[i];
        else {
            double lim = t.atol + t.rtol * fmax(fabs(b[i]), rms), d = fabs(a[i] - b[i]);
            pass = d <= lim;
            over = isnan(d) ? (double)INFINITY : d - lim;
        }
        if (!pass) {
            n_bad++;
            if (worst < 0 || over > worst_over) {
                worst = i;
                worst_over = over;
            }
        }
    }
    if (n_bad) {
        printf("%s: %lld of %lld differ; worst at %lld: got %.9g, want %.9g (atol %g, rtol %g, rms %g)\n",
               what, (long long)n_bad, (long long)n, (long long)worst, a[worst], b[worst], t.atol, t.rtol,
               rms);
        return false;
    }
    if (t.ctol > 0 && sb > 0) {
        double c = 1.0 - ab / sqrt(sa * sb);
        if (!(c <= t.ctol)) {
            printf("%s: 1-cos is %g, limit %g\n", what, c, t.ctol);
            return false;
        }
    }
    return true;
}

bool lsa_compare_f32(const char *what, const float *a, const float *b, int64_t n, lsa_tol tol) {
    double *x = malloc(2 * (size_t)(n + 1) * sizeof *x);
    if (!x) return false;
    double *y = x + n + 1;
    for (int64_t i = 0; i < n; i++) {
        x[i] = (double)a[i];
        y[i] = (double)b[i];
    }
    bool ok = lsa_compare_f64(what, x, y, n, tol);
    free(x);
    return ok;
}

double lsa_worst_rel_f32(const float *a, const float *b, int64_t n) {
    double s = 0, worst = 0;
    for (int64_t i = 0; i < n; i++) s += (double)b[i] * (double)b[i];
    double rms = n ? sqrt(s / (double)n) : 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]) / fmax(fmax(fabs((double)b[i]), rms), 1e-300);
        if (!(d <= worst)) worst = d;
    }
    return worst;
}
