/* The evaluation kernel: counts, recall in the top K and captured mass of every score, with and without a
 * continuation, against a plain count by sorting. The first window's scores fit shared memory, the others' do
 * not. */
#include "emulated/step_eval_cu.cpp"

#include <algorithm>
#include <numeric>
#include <vector>

extern "C" {
#include "kernels/continuation.h"
#include "kernels/core/num.h"
}

lsa_status step_prepare_eval(lsa_gpu_step *, int64_t, lsa_err *) {
    return LSA_OK;
}
lsa_status step_query(lsa_gpu_step *, int64_t, int64_t, lsa_err *) {
    return LSA_OK;
}
lsa_status step_score_z(lsa_gpu_step *, int64_t, int64_t, lsa_err *) {
    return LSA_OK;
}

enum { LAYERS = 3, M = 2 };
static const double BUDGET[3] = {0.05, 0.10, 0.20};

static float draw() {
    return (float)rand() / (float)RAND_MAX;
}

/* Scores of a window under row `kind` of the result, as trainer/eval.c has them: rank orders, prob is
 * compared. */
static void scores(const std::vector<float> &z, int64_t n, int i, int64_t k, int kind, const float *cost,
                   int reach, std::vector<float> &rank, std::vector<float> &prob) {
    const int ensemble = kind - LAYERS - (reach > 0);
    const auto at = [&](int l, int64_t c) { return z[(l * M + i) * n + c]; };
    const auto sigmoid = [](float x) { return 1.0f / (1.0f + expf(-x)); };
    rank.resize(k), prob.resize(k);
    for (int64_t c = 0; c < k; c++) {
        float sum = 0, mean = 0, top = 0;
        for (int l = 0; l < LAYERS; l++) {
            sum += at(l, c);
            mean += sigmoid(at(l, c)) / LAYERS;
            top = fmaxf(top, sigmoid(at(l, c)));
        }
        rank[c] = kind < LAYERS ? at(kind, c) : ensemble == 0 ? mean : ensemble == 1 ? top : sum;
    }
    if (ensemble == 2 && kind >= LAYERS) lsa_continue(rank.data(), NULL, rank.data(), k, cost, reach);
    for (int64_t c = 0; c < k; c++) prob[c] = ensemble == 0 || ensemble == 1 ? rank[c] : sigmoid(rank[c]);
}

static int check(int64_t n, int reach, bool cached, bool ties) {
    const int rows = LAYERS + 3 + (reach > 0);
    std::vector<float> z(LAYERS * M * n), cost(64), rank, prob;
    for (auto &x : z) x = ties ? (float)(rand() % 9) / 2 - 2 : 4 * draw() - 2;
    for (int j = 0; j < 64; j++) cost[j] = 0.2f * (float)j;
    lsa_gpu_window window[M] = {{0, 0, (int32_t)n}, {0, 0, (int32_t)(n / 3)}};
    std::vector<int32_t> chunk;
    std::vector<float> weight, mass;
    int64_t begin[M + 1] = {};
    for (int i = 0; i < M; i++) {
        for (int32_t c = 0; c < window[i].n_cand; c++)
            if (rand() % 6 == 0)
                chunk.push_back(c), weight.push_back((float)(rand() % 2)), mass.push_back(draw());
        begin[i + 1] = (int64_t)chunk.size();
    }
    step_doc doc = {};
    doc.window = window, doc.need_begin = begin, doc.chunk = chunk.data(), doc.weight = weight.data(),
    doc.mass = mass.data();
    const lsa_gpu_row row[M] = {{0, 0, 0}, {0, 1, 0}};
    std::vector<lsa_gpu_eval_row> out(rows * M);
    eval_args a = {};
    a.row = row, a.doc = &doc, a.z = z.data(), a.L = LAYERS, a.m = M, a.n_cut = 4, a.n = n, a.k_top = 40,
    a.threshold = 0.5f, a.cached = cached, a.reach = reach, a.cost = cost.data(), a.out = out.data();
    for (int b = 0; b < 3; b++) a.budget[b] = BUDGET[b];
    emu::launch(dim3(M, rows), dim3(THREADS), CUTS * BINS * 4 + (cached ? n * 4 : 0), [&] { eval_k(a); });
    int bad = 0;
    for (int kind = 0; kind < rows; kind++)
        for (int i = 0; i < M; i++) {
            const int64_t k = window[i].n_cand;
            const lsa_gpu_eval_row &got = out[kind * M + i];
            scores(z, n, i, k, kind, cost.data(), reach, rank, prob);
            std::vector<int32_t> order(k), place(k);
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(),
                             [&](int32_t x, int32_t y) { return rank[x] > rank[y]; });
            for (int64_t j = 0; j < k; j++) place[order[j]] = (int32_t)j;
            int32_t have = 0, tp = 0, pos = 0, hit = 0;
            double total = 0, captured[3] = {};
            for (int64_t c = 0; c < k; c++) have += prob[c] >= 0.5f;
            for (int64_t e = begin[i]; e < begin[i + 1]; e++) {
                const int32_t c = chunk[e];
                const bool golden = weight[e] > 0;
                pos += golden, tp += golden && prob[c] >= 0.5f, hit += golden && place[c] < 40,
                    total += (double)mass[e];
                for (int b = 0; b < 3; b++)
                    if (place[c] < lsa_budget_chunks(BUDGET[b], k)) captured[b] += (double)mass[e];
            }
            bool ok = got.n_cand == k && got.have == have && got.tp == tp && got.n_pos == pos &&
                      got.hit_k == hit && fabs((double)got.total_mass - total) <= 1e-4;
            for (int b = 0; b < 3; b++) ok = ok && fabs((double)got.captured[b] - captured[b]) <= 1e-4;
            if (!ok)
                printf(
                    "%ld chunks, reach %d, row %d, window %d: have %d of %d, tp %d of %d, hits %d of %d, captured %g of %g\n",
                    (long)k, reach, kind, i, got.have, have, got.tp, tp, got.hit_k, hit,
                    (double)got.captured[1], captured[1]);
            bad += !ok;
        }
    return bad;
}

int main() {
    int bad = 0;
    for (int reach = 0; reach <= 16; reach += 16)
        for (int way = 0; way < 4; way++) bad += check(way < 2 ? 700 : 5000, reach, way % 2 == 0, way == 1);
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
