/* Screening in f16 keeps what the f32 choice needs: selections and their logits against a plain computation
 * in the same order, with ties, keys beyond f16, NaN, few and many candidates; and the bound against what
 * screening is off by. */
#include "emulated/teacher_select_cu.cpp"

#include <algorithm>
#include <vector>

static uint64_t g_state = 1;
static float draw() { /* -1 to 1 */
    g_state = g_state * 6364136223846793005u + 1442695040888963407u;
    return (float)((int64_t)(g_state >> 40) - (1 << 23)) / (float)(1 << 23);
}

enum { DI = 128 };

struct world {
    lsa_gpu_teacher t = {};
    cuda_state cs = {};
    int64_t p, m;
    std::vector<float> iq, iw, key, logit, sel_logit;
    std::vector<int32_t> candidate, sel, n_sel;
    std::vector<uint16_t> key16, iq16;
    uint32_t most = 0;
    world(int64_t first, int64_t tokens, int heads, int k, int64_t rows) : p(first), m(tokens) {
        const int64_t T = p + m, ld = T / 4 + 32;
        iq.resize(m * heads * DI), iw.resize(m * heads), key.resize(ld * DI), key16.resize(ld * DI);
        iq16.resize(m * heads * DI), logit.resize(rows * ld), candidate.resize(rows * ld);
        sel.assign(m * k, -1), n_sel.assign(m, -1), sel_logit.assign(m * k, NAN);
        t.cs = &cs, t.max_tokens = T, t.n = T, t.top = k, t.logit_room = rows * ld;
        t.g.index_n_head = heads, t.g.index_head_dim = DI, t.ID = (int64_t)heads * DI;
        t.iq = iq.data(), t.iw = iw.data(), t.key = key.data(), t.logit = logit.data();
        t.candidate = candidate.data(), t.key16 = key16.data(), t.iq16 = iq16.data(), t.key_most = &most;
        t.sel = sel.data(), t.n_sel = n_sel.data(), t.sel_logit = sel_logit.data();
    }
};

static float plain(const world &w, int64_t i, int64_t c) {
    float sum = 0;
    for (int h = 0; h < w.t.g.index_n_head; h++) {
        float dot = 0;
        for (int k = 0; k < DI; k++) dot += w.iq[(i * w.t.g.index_n_head + h) * DI + k] * w.key[c * DI + k];
        sum += w.iw[i * w.t.g.index_n_head + h] * fmaxf(dot, 0.0f);
    }
    return sum;
}

/* kind 0: random; 1: only a few different keys (ties); 2: some keys and queries beyond f16; 3: no product is
 * positive, every logit 0; 4: a NaN among the keys; 5: keys very close to each other. */
static int check(int64_t p, int64_t m, int heads, int k, int64_t rows, int kind) {
    world w(p, m, heads, k, rows);
    lsa_err err = {};
    float close[DI];
    for (float &v : close) v = draw();
    for (auto &v : w.iq) v = (kind == 3 ? fabsf(draw()) : draw()) * (kind == 2 ? 1e4f : 1.0f);
    for (auto &v : w.iw) v = draw();
    const int64_t chunks = (p + m) / 4;
    for (int64_t c = 0; c < chunks; c++)
        for (int i = 0; i < DI; i++)
            w.key[c * DI + i] = kind == 1   ? (c >= 5 ? w.key[(c % 5) * DI + i] : draw())
                                : kind == 3 ? -fabsf(draw())
                                : kind == 5 ? close[i] + 1e-4f * draw()
                                            : draw() * (kind == 2 && c % 7 == 0 ? 3e4f : 1.0f);
    if (kind == 4 && chunks > 20) w.key[20 * DI + 3] = NAN;
    if (teacher_select(&w.t, p, m, &err) != LSA_OK) return 1;
    int bad = 0;
    for (int64_t i = 0; i < m; i++) {
        const int64_t n = (p + i + 1) / 4;
        std::vector<std::pair<float, int32_t>> all;
        for (int64_t c = 0; c < n; c++) all.push_back({plain(w, i, c), (int32_t)c});
        std::sort(all.begin(), all.end(), [](const auto &a, const auto &b) {
            const bool x = a.first == a.first, y = b.first == b.first; /* NaN last */
            if (x != y) return x;
            return x && a.first != b.first ? a.first > b.first : a.second < b.second;
        });
        all.resize(std::min<size_t>(all.size(), (size_t)k));
        std::sort(all.begin(), all.end(), [](const auto &a, const auto &b) { return a.second < b.second; });
        bool good = w.n_sel[i] == (int32_t)all.size();
        for (size_t j = 0; good && j < all.size(); j++) {
            const float v = w.sel_logit[i * k + j];
            good = w.sel[i * k + j] == all[j].second &&
                   (v == all[j].first || (v != v && all[j].first != all[j].first));
        }
        bad += !good;
    }
    if (bad)
        printf("kind %d, %lld tokens from %lld, %d heads, k %d: %d rows wrong\n", kind, (long long)m,
               (long long)p, heads, k, bad);
    return bad != 0;
}

int main() {
    int bad = 0;
    for (int kind = 0; kind < 6; kind++) {
        bad += check(0, 100, 8, 8, 64, kind);    /* from the first token, in two parts */
        bad += check(2100, 12, 8, 16, 12, kind); /* more than one block of keys */
        bad += check(1300, 9, 3, 64, 9, kind);   /* heads that do not fill a group */
        bad += check(1300, 5, 8, 16, 5, kind);   /* too few tokens to screen */
    }
    bad += check(700, 70, 64, 32, 70, 0); /* V4's heads; more than one block of tokens */
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
