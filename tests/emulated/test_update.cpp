/* The GPU step's last kernels: AdamW and the gradient's norm by slices of several ranks against the whole,
 * bit for bit, from f32 and bf16 gradients; the loss over a row with a continuation against `ref`'s ops. */
#include "emulated/step_update_cu.cpp"

#include <vector>

extern "C" {
#include "kernels/ops.h"
}

lsa_status step_ranks_add(lsa_gpu_step *, double *, int64_t, lsa_err *) {
    return LSA_OK;
}
bool step_ranks_first(const lsa_gpu_step *) {
    return true;
}

static float draw() {
    return (float)rand() / (float)RAND_MAX - 0.5f;
}
static void fill(std::vector<float> &v) {
    for (auto &x : v) x = draw();
}

/* ---- slices ---- */

struct state {
    std::vector<float> p, m, v;
    std::vector<bf16> p16;
};

static void adamw(const lsa_indexer_geom &g, const lsa_gpu_shard &s, bool narrow,
                  const std::vector<float> &grad, const std::vector<bf16> &g16, step_control *c, state &x) {
    const lsa_indexer_tensor gain = lsa_indexer_tensor_at(&g, 0, LSA_Q_NORM);
    const int64_t layer = lsa_indexer_n_param(&g) / g.n_layer;
    const adamw_args a = {layer, gain.offset, gain.offset + gain.n, 0.9f,       0.999f,     1e-8f,
                          false, grad.data(), g16.data(),           x.p.data(), x.m.data(), x.v.data(),
                          NULL,  NULL,        x.p16.data(),         c,          s};
    const dim3 grid((unsigned)((s.own / 4 + 255) / 256), (unsigned)g.n_layer);
    if (narrow)
        emu::launch(grid, 256, 0, [&] { adamw_k<false, true>(a); });
    else
        emu::launch(grid, 256, 0, [&] { adamw_k<false, false>(a); });
}

static int slices(bool narrow, int ranks) {
    lsa_indexer_geom g = {};
    g.hidden = 24, g.rank = 8, g.n_head = 8, g.head_dim = 128, g.n_layer = 2, g.eps = 1e-6f;
    const int64_t P = lsa_indexer_n_param(&g), layer = P / g.n_layer;
    const lsa_indexer_tensor gain = lsa_indexer_tensor_at(&g, 0, LSA_Q_NORM);
    const lsa_gpu_shard whole = {1, {{0, layer, 0, false}}, layer};
    step_control c = {};
    c.grad_scale = 0.5f, c.step_size = 1e-2f, c.root_c2 = 1.5f, c.decay = 0.99f, c.updates = 3;
    std::vector<float> grad(P), seen(P), p0(P), m0(P), v0(P);
    std::vector<bf16> g16(P);
    double total = 0, sum = 0;
    int bad = 0;
    fill(grad), fill(p0);
    for (int64_t i = 0; i < P; i++) {
        const bool in_gain = i % layer >= gain.offset && i % layer < gain.offset + gain.n;
        g16[i] = __float2bfloat16(grad[i]);
        seen[i] = narrow && !in_gain ? __bfloat162float(g16[i]) : grad[i];
        total += (double)seen[i] * (double)seen[i];
        m0[i] = 0.01f * (float)(i % 7), v0[i] = 0.01f * (float)(i % 5);
    }
    state all = {p0, m0, v0, std::vector<bf16>(P)};
    adamw(g, whole, false, seen, g16, &c, all);
    for (int r = 0; r < ranks; r++) {
        lsa_gpu_shard s, n;
        lsa_err err = {};
        if (lsa_gpu_shard_make(&s, &g, r, ranks, &err)) return 1;
        state own = {p0, std::vector<float>(2 * s.own), std::vector<float>(2 * s.own), std::vector<bf16>(P)};
        for (int l = 0; l < 2; l++)
            for (int64_t i = 0; i < s.own; i++) {
                const int64_t at = l * layer + step_own_place(s, i);
                own.m[l * s.own + i] = m0[at], own.v[l * s.own + i] = v0[at];
            }
        adamw(g, s, narrow, grad, g16, &c, own);
        for (int l = 0; l < 2; l++)
            for (int64_t i = 0; i < s.own; i++) {
                const int64_t at = l * layer + step_own_place(s, i);
                bad += own.p[at] != all.p[at] || own.m[l * s.own + i] != all.m[at] ||
                       own.v[l * s.own + i] != all.v[at] || memcmp(&own.p16[at], &all.p16[at], 2) != 0;
                own.p[at] = p0[at];
            }
        bad += own.p != p0; /* nobody else's were touched */
        n = s;
        if (r > 0) step_drop_gain(&n);
        std::vector<double> part(64);
        if (narrow)
            emu::launch(64, 256, 0, [&] {
                sumsq_own_k<true>(grad.data(), g16.data(), layer, gain.offset, gain.offset + gain.n, 2, n,
                                  part.data());
            });
        else
            emu::launch(64, 256, 0, [&] {
                sumsq_own_k<false>(grad.data(), NULL, layer, gain.offset, gain.offset + gain.n, 2, n,
                                   part.data());
            });
        for (double x : part) sum += x;
    }
    if (!(fabs(sum - total) <= 1e-6 * total)) bad++;
    printf("slices of %d ranks, %s gradients: %s\n", ranks, narrow ? "bf16" : "f32", bad ? "FAILED" : "ok");
    return bad;
}

/* ---- continuation ---- */

enum { ROWS = 5, LAYERS = 3, REACH = 16, N = 700 };
#define OK(call)                                                                                             \
    do {                                                                                                     \
        if ((call) != LSA_OK) {                                                                              \
            printf("%s: %s\n", #call, err.msg);                                                              \
            return 1;                                                                                        \
        }                                                                                                    \
    } while (0)

static int continuation(lsa_ctx *ctx, lsa_step_loss kind) {
    const int32_t n_cand[ROWS] = {700, 1, 16, 333, 17};
    const float scale = 0.01f;
    std::vector<float> z(LAYERS * ROWS * N), y(ROWS * N), weight(ROWS * N, 1.0f), row_weight(ROWS, 0.7f),
        cost(REACH);
    std::vector<float> sum(ROWS * N), zc(ROWS * N), dzc(ROWS * N), dz(ROWS * N), dcost(REACH);
    std::vector<uint8_t> from(ROWS * N), from2(ROWS * N);
    std::vector<double> loss(ROWS), loss2(ROWS), part(ROWS * REACH);
    std::vector<float> copy(ROWS * N), bound(ROWS), dcost2(REACH);
    lsa_err err = {};
    for (auto &x : z) x = 6 * draw();
    for (int j = 0; j < REACH; j++) cost[j] = 0.1f * (float)j;
    for (int i = 0; i < ROWS; i++) {
        double total = 0;
        for (int c = 0; c < n_cand[i]; c++)
            total += y[i * N + c] = c == 0 || rand() % 5 == 0 ? 0.1f + draw() * 0.1f : 0;
        for (int c = 0; c < n_cand[i]; c++)
            y[i * N + c] = kind == LSA_STEP_KL ? (float)(y[i * N + c] / total) : y[i * N + c] > 0;
    }
    for (int i = 0; i < ROWS * N; i++) {
        sum[i] = z[i];
        for (int l = 1; l < LAYERS; l++) sum[i] += z[l * ROWS * N + i];
    }
    const lsa_continuation_fwd_args f = {ROWS,        N,      REACH,     sum.data(),
                                         cost.data(), n_cand, zc.data(), from.data()};
    OK(lsa_continuation_fwd(ctx, &f, &err));
    if (kind == LSA_STEP_KL) {
        const lsa_loss_kl_args a = {ROWS,   N,          scale,      zc.data(), y.data(), row_weight.data(),
                                    n_cand, dzc.data(), loss.data()};
        OK(lsa_loss_kl(ctx, &a, &err));
    } else {
        const lsa_loss_pointwise_args a = {ROWS,       N,        kind == LSA_STEP_FOCAL, 0.0f,   scale,
                                           zc.data(),  y.data(), weight.data(),          n_cand, dzc.data(),
                                           loss.data()};
        OK(lsa_loss_pointwise(ctx, &a, &err));
    }
    const lsa_continuation_bwd_args b = {ROWS,       N,      REACH,     from.data(),
                                         dzc.data(), n_cand, dz.data(), dcost.data()};
    OK(lsa_continuation_bwd(ctx, &b, &err));

    loss_args a = {};
    a.m = ROWS, a.L = LAYERS, a.n = N, a.layer_stride = ROWS * N, a.kind = kind, a.z = z.data(),
    a.y = y.data();
    a.weight = weight.data(), a.row_weight = kind == LSA_STEP_KL ? row_weight.data() : NULL,
    a.n_cand = n_cand;
    a.scale = &scale, a.row_loss = loss2.data(), a.copy = copy.data(), a.bound = bound.data(),
    a.reach = REACH;
    a.cost = cost.data(), a.from = from2.data(), a.cost_part = part.data();
    emu::launch(dim3(ROWS, 1), 256, 0, [&] { loss_k(a); });
    emu::launch(1, 32, 0, [&] { costs_grad_k(part.data(), ROWS, REACH, dcost2.data()); });
    double worst = 0, size = 0, loss_error = 0, cost_error = 0;
    int bad = 0;
    for (int i = 0; i < ROWS; i++) {
        loss_error = fmax(loss_error, fabs(loss[i] - loss2[i]));
        for (int c = 0; c < n_cand[i]; c++) {
            const double want = dz[i * N + c], have = (double)z[i * N + c] * scale;
            worst = fmax(worst, fabs(want - have)), size = fmax(size, fabs(want));
            bad += from[i * N + c] != from2[i * N + c] || !(bound[i] >= fabsf(z[i * N + c]));
        }
    }
    for (int j = 0; j < REACH; j++) cost_error = fmax(cost_error, fabs(dcost[j] - dcost2[j] * scale));
    printf("continuation, loss %d: gradient %.2g of %.2g, loss %.2g, costs %.2g\n", (int)kind, worst, size,
           loss_error, cost_error);
    if (!(worst <= 1e-6 && loss_error <= 1e-6 && cost_error <= 1e-6)) bad++; /* seen: 6e-8 */
    return bad;
}

/* A cost that an update would make negative is 0; one without a gradient stays, weight decay or not. */
static int costs() {
    float p[2] = {0.001f, 0.5f}, g[2] = {1, 0}, m[2] = {}, v[2] = {};
    step_control c = {};
    c.grad_scale = 1, c.step_size = 0.1f, c.root_c2 = 1, c.decay = 0.5f;
    adamw_args a = {};
    a.beta1 = 0.9f, a.beta2 = 0.999f, a.eps = 1e-8f, a.g = g, a.p = p, a.m = m, a.v = v, a.control = &c;
    emu::launch(1, LSA_MAX_REACH, 0, [&] { costs_k<false>(a, 0, 0, 2); });
    const bool ok = p[0] == 0.0f && p[1] == 0.5f && m[0] > 0.09f;
    printf("costs: %s\n", ok ? "ok" : "FAILED");
    return !ok;
}

int main() {
    int bad = costs();
    lsa_ctx *ctx;
    lsa_err err = {};
    OK(lsa_ctx_create(&ctx, "ref", &err));
    for (int ranks = 1; ranks <= 8; ranks *= 2) bad += slices(false, ranks) + slices(true, ranks);
    bad +=
        continuation(ctx, LSA_STEP_KL) + continuation(ctx, LSA_STEP_BCE) + continuation(ctx, LSA_STEP_FOCAL);
    lsa_ctx_destroy(ctx);
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
