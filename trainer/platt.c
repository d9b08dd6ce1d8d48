/* Platt scaling: see platt.h. The mistake that would stay silent: stopping Newton's method where it overshot;
 * a step is taken only if it raises the likelihood, which is concave, so the end is the maximum. */
#include "trainer/platt.h"

#include <math.h>
#include <stddef.h>

/* Log-likelihood at (a, b) of p = sigmoid(a x + b), with gradient and Hessian (upper triangle: aa, ab, bb) of
 * its negative. x is z shifted and scaled, so that the Hessian is well conditioned. */
typedef struct point {
    double value, ga, gb, haa, hab, hbb;
} point;

static point likelihood(double a, double b, double mean, double scale, const double *z, const int64_t *golden,
                        const int64_t *other, int64_t n) {
    point p = {0};
    for (int64_t i = 0; i < n; i++) {
        const double g = (double)golden[i], m = g + (double)other[i];
        if (m == 0) continue;
        const double x = (z[i] - mean) / scale, u = a * x + b;
        const double soft = log1p(exp(-fabs(u))); /* -log of the larger of p and 1 - p */
        const double q = u >= 0 ? 1 / (1 + exp(-u)) : exp(u) / (1 + exp(u)), r = g - m * q,
                     w = m * q * (1 - q);
        p.value -= g * (soft + fmax(0, -u)) + (m - g) * (soft + fmax(0, u));
        p.ga += r * x, p.gb += r;
        p.haa += w * x * x, p.hab += w * x, p.hbb += w;
    }
    return p;
}

/* Why there is nothing to fit, or NULL. */
static const char *degenerate(const double *z, const int64_t *golden, const int64_t *other, int64_t n) {
    double low_g = (double)INFINITY, high_g = -(double)INFINITY, low_o = (double)INFINITY,
           high_o = -(double)INFINITY;
    for (int64_t i = 0; i < n; i++) {
        if (golden[i]) low_g = fmin(low_g, z[i]), high_g = fmax(high_g, z[i]);
        if (other[i]) low_o = fmin(low_o, z[i]), high_o = fmax(high_o, z[i]);
    }
    if (!isfinite(low_g)) return "no chunk is golden";
    if (!isfinite(low_o)) return "every chunk is golden";
    if (low_g >= high_o || high_g <= low_o) return "a limit on the logit separates golden chunks from others";
    return NULL;
}

lsa_status lsa_platt_fit(lsa_platt *out, const double *z, const int64_t *golden, const int64_t *other,
                         int64_t n, lsa_err *err) {
    *out = (lsa_platt){.temperature = 1, .offset = 0};
    double total = 0, mean = 0, var = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(z[i]))
            LSA_RET_FAIL(LSA_E_NUMERIC, "logit %lld to calibrate on is not finite", (long long)i);
        const double m = (double)(golden[i] + other[i]);
        total += m, mean += m * z[i];
    }
    out->identity = degenerate(z, golden, other, n);
    if (out->identity) return LSA_OK;
    mean /= total;
    for (int64_t i = 0; i < n; i++)
        var += (double)(golden[i] + other[i]) * (z[i] - mean) * (z[i] - mean) / total;
    const double scale = sqrt(var); /* > 0: the classes overlap */
    double a = 0, b = 0;
    point p = likelihood(a, b, mean, scale, z, golden, other, n);
    for (int it = 0; it < 100; it++) {
        const double det = p.haa * p.hbb - p.hab * p.hab;
        if (!(det > 0)) break;
        double da = (p.hbb * p.ga - p.hab * p.gb) / det, db = (p.haa * p.gb - p.hab * p.ga) / det;
        point next = likelihood(a + da, b + db, mean, scale, z, golden, other, n);
        for (int half = 0; half < 40 && !(next.value >= p.value); half++) {
            da /= 2, db /= 2;
            next = likelihood(a + da, b + db, mean, scale, z, golden, other, n);
        }
        if (!(next.value >= p.value)) break;
        a += da, b += db, p = next;
        if (fabs(da) + fabs(db) < 1e-12 * (1 + fabs(a) + fabs(b))) break;
    }
    const float temperature = (float)(scale / a), offset = (float)(b - a * mean / scale);
    if (!(a > 0) || !(temperature > 0) || !isfinite(temperature) || !isfinite(offset))
        out->identity = "the chance of being golden does not rise with the logit";
    else
        out->temperature = temperature, out->offset = offset;
    return LSA_OK;
}
