/* Kernels of the bf16 tier on the CPU: attention at V4's true sizes (64 and 128 heads of 512, 512 selected
 * rows) and at smaller ones, and the choice by f16 logits, against plain sums in double precision. */
#include "tests/emulated/emu/emu.h"

#include "kernels/cuda/teacher/bf16_state.h"

#include <algorithm>
#include <vector>

extern "C" {
#include "kernels/core/lsa_ids.h"
#include "tests/testkit/judge_bf16.h"
}

/* Stands in for cuBLASLt. */
lsa_status bf16_gemm(lsa_bf16 *, int, const bf16_product *p, lsa_err *) {
    std::vector<float> a(p->k);
    for (int64_t i = 0; i < p->m; i++) {
        for (int64_t k = 0; k < p->k; k++) a[k] = bf16_value(p->a[i * p->lda + k]);
        for (int64_t j = 0; j < p->n; j++) {
            float s = 0;
            for (int64_t k = 0; k < p->k; k++) s += a[k] * bf16_value(p->b[j * p->ldb + k]);
            if (p->c_f32)
                ((float *)p->c)[i * p->ldc + j] = s;
            else
                ((uint16_t *)p->c)[i * p->ldc + j] = bf16_of(s);
        }
    }
    return LSA_OK;
}
void bf16_gemm_close(lsa_bf16 *) {}

using std::vector;

static uint64_t seed = 1;
static float uniform() { /* [-1, 1) */
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)(seed >> 40) * 0x1p-23f - 1.0f;
}
static uint16_t half_bits(float x) {
    const __half h = __float2half_rn(x);
    uint16_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}
static double half_value(uint16_t u) {
    __half h;
    memcpy(&h, &u, sizeof h);
    return (double)__half2float(h);
}
static vector<uint16_t> numbers(size_t n, float size) {
    vector<uint16_t> v(n);
    for (uint16_t &x : v) x = half_bits(bf16_round(size * uniform()));
    return v;
}

/* One case: `m` tokens from position p; rows of them all (HCA) or `top` selected ones (CSA). */
static int judge_attend(int H, int D, int window, int ratio, int top, bool csa, int64_t p, int64_t m) {
    const int64_t T = p + m, n_row = ratio ? T / ratio : 0, rope = 64;
    const vector<uint16_t> q = numbers((size_t)(m * H * D), 3), win = numbers((size_t)(T * D), 2),
                           row = numbers((size_t)((n_row + 1) * D), 2);
    vector<float> sink(H), freq(rope / 2), mass((size_t)(m * top + 1)), part(2 * m);
    vector<int32_t> sel((size_t)(m * top + 1)), n_sel(m);
    vector<uint16_t> o((size_t)(m * H * D));
    for (float &x : sink) x = 3 * uniform();
    for (int i = 0; i < rope / 2; i++) freq[i] = powf(10000.0f, -2.0f * (float)i / (float)rope);
    for (int64_t t = 0; csa && t < m; t++) {
        const int64_t visible = (p + t + 1) / ratio;
        n_sel[t] = (int32_t)std::min<int64_t>(visible, top);
        for (int i = 0; i < n_sel[t]; i++) sel[t * top + i] = (int32_t)(i * visible / n_sel[t]);
    }
    const int tiles = (window + top + 63) / 64, blocks = 2;
    vector<uint16_t> kept((size_t)(blocks * tiles * 64 * 64));
    vector<float> kept_most((size_t)(blocks * tiles * 64));
    bf16_attend_args a = {};
    a.q = q.data(), a.win = win.data(), a.row = row.data(), a.sink = sink.data(), a.freq = freq.data();
    if (csa) a.sel = sel.data(), a.n_sel = n_sel.data(), a.mass = mass.data(), a.part = part.data();
    a.o = o.data(), a.kept = kept.data(), a.kept_most = kept_most.data();
    a.p = p, a.m = m, a.ldq = a.ldo = (int64_t)H * D;
    a.H = H, a.window = window, a.ratio = ratio, a.top = top, a.rope = (int)rope, a.tiles = tiles,
    a.blocks = blocks;
    lsa_err err = {};
    if (bf16_attend(&a, D, NULL, &err) != LSA_OK) {
        printf("attention: %s\n", err.msg);
        return 1;
    }
    double off = 0, size = 0, off_mass = 0;
    for (int64_t t = 0; t < m; t++) {
        const int64_t pos = p + t, n_win = std::min<int64_t>(pos + 1, window),
                      n = n_win + (!ratio ? 0
                                   : csa  ? n_sel[t]
                                          : (pos + 1) / ratio);
        vector<double> all(n, 0.0);
        double all_sink = 0;
        for (int h = 0; h < H; h++) {
            vector<double> s(n);
            vector<const uint16_t *> from(n);
            double most = sink[h], z = 0;
            for (int64_t i = 0; i < n; i++) {
                from[i] = i < n_win ? win.data() + (pos + 1 - n_win + i) * D
                                    : row.data() + (csa ? sel[t * top + i - n_win] : i - n_win) * D;
                double dot = 0;
                for (int c = 0; c < D; c++)
                    dot += half_value(q[(t * H + h) * D + c]) * half_value(from[i][c]);
                most = std::max(most, s[i] = dot / sqrt((double)D));
            }
            for (int64_t i = 0; i < n; i++) z += s[i] = exp(s[i] - most);
            z += exp(sink[h] - most);
            all_sink += exp(sink[h] - most) / z / H;
            vector<double> y(D, 0.0);
            for (int64_t i = 0; i < n; i++) {
                all[i] += s[i] / z / H;
                for (int c = 0; c < D; c++) y[c] += s[i] / z * half_value(from[i][c]);
            }
            for (int64_t i = 0; i < rope / 2; i++) {
                double *const x = &y[D - rope + 2 * i];
                const double angle = (double)((float)pos * freq[i]), u = x[0], v = x[1];
                x[0] = u * cos(angle) + v * sin(angle);
                x[1] = v * cos(angle) - u * sin(angle);
            }
            for (int c = 0; c < D; c++) {
                const double d = bf16_value(o[(t * H + h) * D + c]) - y[c];
                off += d * d;
                size += y[c] * y[c];
            }
        }
        double window_mass = 0;
        for (int64_t i = 0; i < n_win; i++) window_mass += all[i];
        if (!csa) continue;
        for (int64_t i = n_win; i < n; i++)
            off_mass = std::max(off_mass, fabs(all[i] - mass[t * top + i - n_win]) / (all[i] + 1e-6));
        off_mass = std::max(off_mass, fabs(window_mass - part[t]));
        off_mass = std::max(off_mass, fabs(all_sink - part[m + t]));
    }
    const double rms = sqrt(off / size);
    /* bf16 results: at most 2^-9 each, about 0.0017 rms; the rotated ones are rounded twice */
    const bool ok = rms < 3e-3 && off_mass < 2e-3;
    printf("attention %d x %d, window %d, %s, position %lld: rms %.2g of the output, mass %.2g%s\n", H, D,
           window,
           csa     ? "selected"
           : ratio ? "all rows"
                   : "no rows",
           (long long)p, rms, off_mass, ok ? "" : "  FAILED");
    return !ok;
}

/* Choice of the `top` highest logits, ties to the lower chunk. */
static int judge_index(int Hi, int top, int64_t p, int64_t m) {
    const int64_t keys = lsa_visible(p + m - 1), Di = 128;
    const vector<uint16_t> q = numbers((size_t)(m * Hi * Di), 2), key = numbers((size_t)((keys + 1) * Di), 2);
    vector<float> iw((size_t)(m * Hi)), logit((size_t)(3 * (keys + 32))), sel_logit((size_t)(m * top));
    vector<int32_t> candidate(logit.size()), sel((size_t)(m * top)), n_sel(m);
    for (float &x : iw) x = uniform() * 0.011f;
    const teacher_index a = {
        q.data(), key.data(), iw.data(), logit.data(), candidate.data(), (int64_t)logit.size(), p,
        m,        Hi,         top,       sel.data(),   n_sel.data(),     sel_logit.data()};
    lsa_err err = {};
    if (teacher_index16(&a, NULL, &err) != LSA_OK) {
        printf("index: %s\n", err.msg);
        return 1;
    }
    double off = 0;
    int64_t apart = 0, all = 0;
    for (int64_t t = 0; t < m; t++) {
        const int64_t n = lsa_visible(p + t), want = std::min<int64_t>(n, top);
        vector<double> z(n, 0.0);
        for (int64_t k = 0; k < n; k++)
            for (int h = 0; h < Hi; h++) {
                double dot = 0;
                for (int c = 0; c < Di; c++)
                    dot += half_value(q[(t * Hi + h) * Di + c]) * half_value(key[k * Di + c]);
                z[k] += iw[t * Hi + h] * std::max(dot, 0.0);
            }
        vector<int32_t> order(n);
        for (int64_t k = 0; k < n; k++) order[k] = (int32_t)k;
        std::sort(order.begin(), order.end(), [&](int x, int y) { return z[x] > z[y]; });
        if (n_sel[t] != want) {
            printf("index: token %lld has %d selected, expected %lld\n", (long long)t, n_sel[t],
                   (long long)want);
            return 1;
        }
        for (int64_t i = 0; i < want; i++) {
            const int32_t c = sel[t * top + i];
            if (c < 0 || c >= n || (i && c <= sel[t * top + i - 1])) {
                printf("index: token %lld: place %lld holds chunk %d\n", (long long)t, (long long)i, c);
                return 1;
            }
            off = std::max(off, fabs(z[c] - sel_logit[t * top + i]));
            apart += z[c] < z[order[want - 1]] - 1e-5;
            all++;
        }
    }
    const bool ok = off < 1e-5 && apart == 0;
    printf("index %d heads, top %d, position %lld: logits off by %.2g, %lld of %lld beyond a tie%s\n", Hi,
           top, (long long)p, off, (long long)apart, (long long)all, ok ? "" : "  FAILED");
    return !ok;
}

int main() {
    int bad = 0;
    bad += judge_attend(64, 512, 128, 4, 512, true, 4095, 2);    /* V4-Flash CSA */
    bad += judge_attend(64, 512, 128, 128, 512, false, 9983, 1); /* V4-Flash HCA */
    bad += judge_attend(128, 512, 128, 4, 1024, true, 5000, 1);  /* V4-Pro CSA */
    bad += judge_attend(4, 128, 64, 4, 64, true, 0, 9);          /* a document's beginning, few heads */
    bad += judge_attend(10, 256, 8, 0, 64, false, 3, 7);
    bad += judge_attend(5, 128, 64, 4, 64, true, 700, 5);
    bad += judge_index(64, 512, 2600, 3);
    bad += judge_index(5, 64, 200, 40);
    bad += judge_index(8, 64, 0, 9);

    static cuda_state device;
    lsa_ctx ctx = {LSA_BACKEND_CUDA, &lsa_backend_cpu, &device, "emulated"};
    lsa_gpu_teacher_geom g = {};
    g.hidden = 64, g.n_head = 4, g.head_dim = 128, g.rope_dim = 64, g.q_rank = 32, g.o_groups = 2,
    g.o_rank = 16;
    g.window = 16, g.index_n_head = 5, g.index_head_dim = 128, g.index_topk = 8;
    g.n_expert = 6, g.n_expert_tok = 2, g.moe_dim = 32, g.hc_mult = 4, g.hc_iters = 20, g.vocab = 50;
    g.hc_eps = g.norm_eps = 1e-6f, g.route_scale = 1.5f, g.swiglu_limit = 1.0f;
    bad += judge_bf16(&ctx, &g, 4, 2, false, 90, 40, 1);
    bad += judge_bf16(&ctx, &g, 16, 1, true, 70, 33, 1);
    bad += judge_bf16(&ctx, &g, 0, 0, false, 40, 40, 1);
    g.sim_fp8_kv = g.sim_fp4_index = true;
    g.hc_mult = 2;
    bad += judge_bf16(&ctx, &g, 4, 2, true, 90, 90, 1);
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
