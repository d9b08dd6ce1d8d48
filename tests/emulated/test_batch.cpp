/* A batch's step on the CPU: every kind of layer against double sums (infer/bench_check.h); all pages in a
 * reserve give full attention's bits wherever they lie; swapped pages are the host's, no more at once than
 * there are free places; the bytes are what the shapes say, and all memory comes back. */
#include "tests/emulated/emu/emu.h"

#include <algorithm>
#include <vector>

#include "tests/emulated/no_sm90.h"
#include "tests/emulated/small_net.h"

extern "C" {
#include "infer/bench_check.h"
}

/* not on a CPU: the memory indexer */
void level1_free(lsa_gpu_batch *) {}

static lsa_err err;
#define OK(call)                                                                                             \
    do {                                                                                                     \
        if ((call) != LSA_OK) return printf("%s\n", err.msg), 1;                                             \
    } while (0)

struct seen {
    std::vector<int32_t> page, sel;
    std::vector<float> logit, out;
};
static int look(lsa_gpu_batch *b, const lsa_gpu_batch_opts *o, int request, seen *s) {
    const int64_t n = lsa_gpu_batch_resident(b);
    s->page.resize(n), s->logit.resize(64 * n), s->sel.assign(o->top_k + 1, 0);
    s->out.resize(o->n_head * o->head_dim);
    lsa_gpu_batch_view v = {
        0, s->page.data(), s->logit.data(), s->sel.data(), s->sel.data() + o->top_k, s->out.data()};
    OK(lsa_gpu_batch_see(b, request, &v, &err));
    return 0;
}

/* All pages in a reserve, in other places and other pools: the bits of full attention, layer by layer. */
static int same_as_full(lsa_ctx *ctx, lsa_gpu_batch_opts o) {
    lsa_gpu_batch *full, *all;
    lsa_gpu_batch_opts f = o;
    f.reserve = f.staging = f.n_memory = 0;
    o.reserve = o.tokens / 256, o.staging = 0;
    OK(lsa_gpu_batch_create(&full, ctx, &f, &err));
    OK(lsa_gpu_batch_create(&all, ctx, &o, &err));
    int bad = 0;
    for (int l = 0; l < o.n_layer; l++) {
        OK(lsa_gpu_batch_layer(full, l, &err));
        OK(lsa_gpu_batch_layer(all, l, &err));
        for (int i = 0; i < o.batch; i++) {
            seen a, b;
            if (look(full, &f, i, &a) || look(all, &o, i, &b)) return 1;
            bad += a.page != b.page || a.sel != b.sel ||
                   memcmp(a.logit.data(), b.logit.data(), 4 * a.logit.size()) ||
                   memcmp(a.out.data(), b.out.data(), 4 * a.out.size());
        }
    }
    if (bad) printf("all pages in a reserve: %d layers differ from full attention\n", bad);
    lsa_gpu_batch_destroy(full);
    lsa_gpu_batch_destroy(all);
    return bad;
}

static int swapping(lsa_ctx *ctx, const lsa_gpu_batch_opts *o) {
    lsa_gpu_batch *b;
    lsa_gpu_pages *host;
    lsa_bench_check c;
    const int64_t P = o->tokens / 256, A = o->reserve - o->staging;
    OK(lsa_gpu_pages_create(&host, ctx, o, &err));
    OK(lsa_gpu_batch_create(&b, ctx, o, &err));
    OK(lsa_bench_check_batch(&c, b, o, &err));
    int bad = 0;
    std::vector<int32_t> want(o->batch * P), n(o->batch);
    for (int round = 0; round < 4; round++) {
        std::vector<seen> before(o->batch);
        for (int i = 0; i < o->batch; i++) {
            if (look(b, o, i, &before[i])) return 1;
            n[i] = 0; /* A pages that move on with the rounds; fewer for the last request */
            for (int64_t p = 0; p < P && n[i] < A - (i == o->batch - 1); p++)
                if ((p + i + round) % 2 == 0 || P - p <= A - n[i]) want[i * P + n[i]++] = (int32_t)p;
        }
        int64_t moved = 0, expected = 0;
        double seconds = -1;
        OK(lsa_gpu_batch_swap(b, host, want.data(), P, n.data(), &moved, &err));
        OK(lsa_gpu_batch_publish(b, &seconds, &err));
        for (int i = 0; i < o->batch; i++) {
            seen now;
            if (look(b, o, i, &now)) return 1;
            std::vector<int32_t> come, had = before[i].page, has = now.page;
            std::set_difference(has.begin(), has.end(), had.begin(), had.end(), std::back_inserter(come));
            std::vector<int32_t> wanted(want.begin() + i * P, want.begin() + i * P + n[i]), missing;
            std::set_difference(wanted.begin(), wanted.end(), had.begin(), had.end(),
                                std::back_inserter(missing));
            int64_t leave = 0;
            for (int32_t p : had) leave += !std::binary_search(wanted.begin(), wanted.end(), p);
            missing.resize(std::min<size_t>({missing.size(), (size_t)o->staging, (size_t)leave}));
            bad += !std::is_sorted(has.begin(), has.end()) || come != missing;
            bad += std::adjacent_find(has.begin(), has.end()) != has.end() || (int64_t)has.size() != A;
            expected += (int64_t)come.size() * 64 * (b->row_bytes * b->n_csa + 132 * b->n_kept);
        }
        bad += moved != expected || !(seconds >= 0);
        OK(lsa_bench_check_batch(&c, b, o, &err)); /* what lies in the places is what the lists say */
    }
    if (bad) printf("swapping: %d things are wrong\n", bad);
    const lsa_gpu_batch_use *u = lsa_gpu_batch_count(b);
    const int64_t B = o->batch, page = 64 * b->row_bytes;
    if (u->rows != B * o->reserve * b->n_csa * page || u->keys != B * o->reserve * b->n_kept * 64 * 132 ||
        u->keys_level1 != B * P * b->n_full * 64 * 132) {
        printf("bytes are not what the shapes say\n");
        bad++;
    }
    printf("heads of %d, %d requests: logits off by %.1e, outputs by %.1e\n", o->head_dim, o->batch,
           c.logit_off, c.out_off);
    lsa_gpu_batch_destroy(b);
    lsa_gpu_pages_destroy(host);
    return bad;
}

static int refusals(lsa_ctx *ctx, const lsa_gpu_batch_opts *o) {
    lsa_gpu_batch *b;
    int bad = 0;
    const auto refused = [&](lsa_status code, auto change) {
        lsa_gpu_batch_opts x = *o;
        change(x);
        err = {};
        bad += lsa_gpu_batch_create(&b, ctx, &x, &err) != code || b || !err.msg[0];
        err = {};
    };
    refused(LSA_E_UNSUPPORTED, [](auto &x) { x.head_dim = 256; });
    refused(LSA_E_UNSUPPORTED, [](auto &x) { x.index_head_dim = 64; });
    refused(LSA_E_ARG, [](auto &x) { x.tokens += 4; });
    refused(LSA_E_ARG, [](auto &x) { x.reserve = x.tokens; });
    refused(LSA_E_ARG, [](auto &x) { x.staging = x.reserve; });
    refused(LSA_E_ARG, [](auto &x) { x.batch = 0; });
    refused(LSA_E_ARG, [](auto &x) { x.memory[0] = 5; });
    if (bad) printf("refusals: %d are wrong\n", bad);
    return bad;
}

int main() {
    lsa_backend counted = counted_backend();
    lsa_ctx ctx = emulated_device(&counted);
    lsa_gpu_batch_opts small = {};
    small.n_layer = 5;
    const int32_t ratio[] = {0, 4, 128, 4, 4};
    std::copy(ratio, ratio + 5, small.ratio);
    small.n_head = 4, small.head_dim = 128, small.rope_dim = 64, small.window = 64;
    small.index_n_head = 8, small.index_head_dim = 128, small.top_k = 64;
    small.batch = 3, small.tokens = 4096, small.reserve = 7, small.staging = 2;
    small.n_memory = 1, small.memory[0] = 1;
    lsa_gpu_batch_opts v4 = small;
    v4.n_layer = 3, v4.ratio[2] = 128;
    v4.n_head = 64, v4.head_dim = 512, v4.window = 128, v4.index_n_head = 64, v4.top_k = 512;
    v4.batch = 1, v4.reserve = 10, v4.memory[0] = 0;
    int bad = refusals(&ctx, &small);
    bad += same_as_full(&ctx, small);
    bad += swapping(&ctx, &small);
    small.memory[0] = 2; /* the last layer's keys are all there */
    bad += swapping(&ctx, &small);
    bad += same_as_full(&ctx, v4);
    v4.n_memory = 0;
    bad += swapping(&ctx, &v4);
    if (memory_held || emu::pinned) {
        printf("%lld device and %lld pinned blocks are still held\n", (long long)memory_held,
               (long long)emu::pinned);
        bad++;
    }
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
