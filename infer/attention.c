/* Softmax attention of one token over gathered rows, with a sink per head (architecture notes 5.4). One row
 * serves as key and value of all heads. */
#include "infer/engine.h"
#include "infer/numeric.h"

/* Scores of all heads, then probabilities in place; returns the mean sink mass. */
static float softmax_rows(const lsa_engine *e, const layer_weights *w, const float *q,
                          const float *const *row, int64_t n_row, float *score) {
    const int64_t H = e->c.n_head, D = e->c.head_dim;
    const float f = 1.0f / sqrtf((float)D);
    float sink_sum = 0.0f;
    for (int64_t i = 0; i < n_row; i++)
        for (int64_t h = 0; h < H; h++) score[h * n_row + i] = lsa_dot(q + h * D, row[i], D) * f;
    for (int64_t h = 0; h < H; h++) {
        float *s = score + h * n_row, m = w->sink[h], z;
        for (int64_t i = 0; i < n_row; i++) m = fmaxf(m, s[i]);
        float sink = expf(w->sink[h] - m);
        z = sink;
        for (int64_t i = 0; i < n_row; i++) z += s[i] = expf(s[i] - m);
        float inv = 1.0f / z;
        for (int64_t i = 0; i < n_row; i++) s[i] *= inv;
        sink_sum += sink * inv;
    }
    return sink_sum / (float)H;
}

float lsa_attend_rows(const lsa_engine *e, const layer_weights *w, const float *q, const float *const *row,
                      int64_t n_row, float *score, float *o) {
    const int64_t H = e->c.n_head, D = e->c.head_dim;
    float sink = softmax_rows(e, w, q, row, n_row, score);
    for (int64_t i = 0; i < H * D; i++) o[i] = 0.0f;
    for (int64_t i = 0; i < n_row; i++)
        for (int64_t h = 0; h < H; h++) {
            const float p = score[h * n_row + i], *r = row[i];
            float *oh = o + h * D;
            for (int64_t j = 0; j < D; j++) oh[j] += p * r[j];
        }
    return sink;
}

void lsa_dense_mass(const lsa_engine *e, const layer_weights *w, const float *q, const float *const *win,
                    int64_t n_win, const float *rows, int64_t n_visible, float *score, float *dense) {
    const int64_t H = e->c.n_head, D = e->c.head_dim;
    const float f = 1.0f / sqrtf((float)D);
    for (int64_t s = 0; s < n_visible; s++) dense[s] = 0.0f;
    for (int64_t h = 0; h < H; h++) {
        const float *qh = q + h * D;
        float m = w->sink[h];
        for (int64_t s = 0; s < n_visible; s++) m = fmaxf(m, score[s] = lsa_dot(qh, rows + s * D, D) * f);
        float z = expf(w->sink[h] - m);
        for (int64_t i = 0; i < n_win; i++) z += expf(lsa_dot(qh, win[i], D) * f - m);
        for (int64_t s = 0; s < n_visible; s++) z += score[s] = expf(score[s] - m);
        for (int64_t s = 0; s < n_visible; s++) dense[s] += score[s] / (z * (float)H);
    }
}
