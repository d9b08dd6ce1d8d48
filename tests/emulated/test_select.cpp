/* The server's selection kernels against the host's (kernels/model/select.h): every mode, with ties and NaNs,
 * thousands to a quarter of a million chunks; observed masses, and the state that they make. */
#include "emulated/serve_select_cu.cpp"

#include <vector>

static uint32_t g_state = 1;
static uint32_t draw() {
    g_state = g_state * 1664525u + 1013904223u;
    return g_state >> 8;
}

/* One handle's work memory. */
struct memory {
    lsa_gpu_retriever x = {};
    cuda_state cs = {};
    std::vector<uint32_t> code, mask, count, histogram;
    std::vector<uint64_t> page;
    std::vector<serve_bound> bound;
    memory(int m, int64_t n)
        : code(m * n), mask(m * (n / 32 + 1)), count(m * (n / SERVE_BLOCK + 1)), histogram(m * SERVE_BINS),
          page(m * (n / 64 + 1)), bound(m) {
        x.cs = &cs, x.max_batch = m, x.max_chunks = n;
        x.code = code.data(), x.mask = mask.data(), x.count = count.data(), x.histogram = histogram.data();
        x.page_key = page.data(), x.bound = bound.data();
    }
};

static int observed;
static int check(int64_t N, int layers, int levels, int mode) {
    enum { M = 2 };
    memory w(M, N);
    lsa_select_rule r = {};
    lsa_err err = {};
    std::vector<float> z(layers * M * N);
    std::vector<int32_t> out(M * N), n_out(M);
    const int64_t n[M] = {N, draw() % N};
    int bad = 0;
    for (auto &v : z) v = draw() % 5000 == 0 ? NAN : (float)(draw() % levels) / levels * 4 - 2;
    r.mode = (lsa_select_mode)mode, r.score = (lsa_score_rule)(draw() % 3), r.n_layer = layers;
    r.k = mode == LSA_SELECT_PAGES ? 1 + draw() % (N / 64 + 2) : draw() % 2000;
    r.cap = draw() % 2 ? draw() % 500 : 0;
    r.sink = draw() % 100, r.tail = draw() % 300, r.budget = 0.1;
    r.threshold = (r.score ? 0.5f : 0.0f) + (float)(draw() % 100) / 100;
    for (int l = 0; l < layers; l++) r.temperature[l] = 1;
    /* masses of two windows for the first request; the second observed none */
    std::vector<float> seen(2 * N), host(2 * N);
    const float *states[M] = {seen.data(), NULL};
    if (!r.score && draw() % 2) {
        r.observed = states, r.observed_ld = N, r.prior[0] = 0.7f, r.prior[1] = -0.4f;
        r.reach = draw() % 4;
        for (int j = 0; j < r.reach; j++) r.cost[j] = 0.1f * (float)(j + 1);
        for (int k = 0; k < 2; k++) {
            std::vector<int32_t> chunk;
            std::vector<float> mass;
            for (int32_t c = draw() % 7; c < N; c += 1 + draw() % 9) {
                chunk.push_back(c);
                mass.push_back((float)(draw() % 1000) * 1e-5f);
            }
            if (lsa_gpu_retriever_observe(&w.x, seen.data(), N, (int64_t)chunk.size(), chunk.data(),
                                          mass.data(), NULL, &err))
                return 1;
            for (int64_t c = 0; c < N; c++) host[N + c] = fmaf(0.9f, host[N + c], host[c]), host[c] = 0;
            for (size_t e = 0; e < chunk.size(); e++) host[chunk[e]] = mass[e];
        }
        if (memcmp(host.data(), seen.data(), host.size() * 4)) {
            printf("%ld chunks: the state differs\n", (long)N);
            return 1;
        }
        observed++;
    }
    if (lsa_gpu_retriever_select(&w.x, M, &r, z.data(), N, n, out.data(), N, n_out.data(), NULL, &err)) {
        printf("%s\n", err.msg);
        return 1;
    }
    for (int i = 0; i < M; i++) {
        std::vector<int32_t> want(lsa_select_room(&r, n[i]) + 1);
        int64_t n_want;
        lsa_select_rule one = r;
        if (r.observed) one.observed = states + i;
        if (lsa_select(want.data(), &n_want, NULL, &one, z.data() + i * N, M * N, n[i], &err)) return 1;
        const bool same = n_want == n_out[i] && !memcmp(want.data(), out.data() + i * N, (size_t)n_want * 4);
        if (!same)
            printf("mode %d, score %d, %ld of %ld chunks, k %ld: the host keeps %ld, the kernels %d\n", mode,
                   r.score, (long)n[i], (long)N, (long)r.k, (long)n_want, n_out[i]);
        bad += !same;
    }
    return bad;
}

int main() {
    int bad = 0;
    for (int round = 0; round < 8; round++)
        for (int mode = 0; mode < 4; mode++)
            bad += check(300 + draw() % 6000, 1 + draw() % 3, round % 2 ? 5 : 100000, mode);
    bad += check(40000, 2, 100000, LSA_SELECT_BUDGET);
    for (int levels : {1, 2, 5, 100000}) /* many pages alike: the k-th by the bits of the key */
        for (int round = 0; round < 3; round++)
            bad += check(60000 + draw() % 60000, 1, levels, LSA_SELECT_PAGES);
    bad +=
        check(262144 + 64 * 7 + 5, 1, 100000, LSA_SELECT_PAGES); /* more than a thread keeps in registers */
    bad += observed < 4;                                         /* or nothing was tested */
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
