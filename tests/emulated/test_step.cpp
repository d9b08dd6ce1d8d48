/* A decode step's kernels against double sums and a plain sort: attention over encoded rows by a page table,
 * with window, sink and any number of parts; top-k with ties, NaN and every length; the copy of pages. */
#include "tests/emulated/emu/emu.h"

#include "kernels/cuda/decode/codec.cuh"
#include "kernels/cuda/decode/step.h"

#include <algorithm>
#include <vector>

static uint32_t g_state = 1;
static uint32_t draw() {
    g_state = g_state * 1664525u + 1013904223u;
    return g_state >> 8;
}
static float real() { /* -1 to 1 */
    return (float)((int)(draw() % 2001) - 1000) / 1000;
}

/* Codes, rotary channels and scales of any size that rows have. */
static void put_row(uint8_t *row, int D) {
    const int plain = D - ATTEND_ROPE, bytes = encoded_row_bytes(D, ATTEND_ROPE);
    for (int c = 0; c < plain; c++) row[c] = (draw() & 0x80) | draw() % 0x7f;
    for (int c = 0; c < ATTEND_ROPE; c++) {
        const uint16_t v = (draw() & 0x8000) | 0x3f00 | (draw() & 0x7f);
        memcpy(row + plain + 2 * c, &v, 2);
    }
    for (int c = plain + 2 * ATTEND_ROPE; c < bytes; c++) row[c] = 117 + draw() % 4;
}

static int attend(int m, int H, int D, int n_window, int pages, int n_sel, int splits, int n_sm) {
    const int row = encoded_row_bytes(D, ATTEND_ROPE), groups = (H + ATTEND_HEADS - 1) / ATTEND_HEADS,
              room = n_sel; /* pages 0: rows one after the other, all of them */
    const int slots = pages * m + 3;
    const int64_t page_stride = 64 * row + 64; /* another layer's lies between */
    std::vector<float> q(m * H * D), sink(H), out(m * H * D, NAN), again(m * H * D, NAN);
    std::vector<uint8_t> window(m * (n_window + 1) * row), rows;
    std::vector<int32_t> slot(m * pages + 1), sel(m * room + 1), n(m), order(slots);
    for (auto &v : q) v = 6 * real();
    for (auto &v : sink) v = 3 * real();
    for (int i = 0; i < m * (n_window + 1); i++) put_row(window.data() + i * row, D);
    rows.assign(pages ? slots * page_stride : (int64_t)m * room * row + 1, 0x7f); /* NaN */
    for (int i = 0; i < slots; i++) order[i] = i;
    for (int i = slots - 1; i > 0; i--) std::swap(order[i], order[draw() % (i + 1)]);
    for (int i = 0; i < m; i++) {
        n[i] = i == 1 ? n_sel / 2 : n_sel;
        if (!pages) {
            n[i] = n_sel;
            for (int k = 0; k < n_sel; k++) put_row(rows.data() + ((int64_t)i * n_sel + k) * row, D);
        }
        for (int p = 0; p < pages; p++) {
            slot[i * pages + p] = order[i * pages + p];
            for (int k = 0; k < 64; k++)
                put_row(rows.data() + slot[i * pages + p] * page_stride + k * row, D);
        }
        std::vector<int32_t> all(pages * 64);
        for (size_t k = 0; k < all.size(); k++) all[k] = (int32_t)k;
        for (size_t k = all.size(); k > 1; k--) std::swap(all[k - 1], all[draw() % k]);
        if (pages) std::copy(all.begin(), all.begin() + n_sel, sel.begin() + i * room);
    }
    lsa_gpu_retriever x = {};
    lsa_err err = {};
    if (splits == 0) splits = decode_splits(n_sm, m, H, n_window + n_sel);
    std::vector<float> part(decode_part_room(m, H, D, splits), NAN), stat(m * groups * splits * 32, NAN);
    std::vector<uint32_t> ticket(m * groups);
    attend_args a = {};
    a.q = q.data(), a.sink = sink.data(), a.out = out.data(), a.window = window.data(), a.rows = rows.data();
    a.window_stride = (int64_t)(n_window + 1) * row, a.row_stride = (int64_t)n_sel * row;
    a.page_stride = page_stride;
    if (pages)
        a.slot = slot.data(), a.sel = sel.data(), a.n_sel = n.data(), a.ld_slot = pages, a.ld_sel = room;
    a.n_window = n_window, a.n_row = n_sel, a.m = m, a.H = H, a.splits = splits;
    a.scale = 1 / sqrtf((float)D);
    a.part = part.data(), a.stat = stat.data(), a.ticket = ticket.data();
    if (decode_attend(&x, &a, D, 0, &err) != LSA_OK) {
        printf("%s\n", err.msg);
        return 1;
    }
    for (uint32_t t : ticket)
        if (t) return printf("a ticket is not 0 afterwards\n"), 1;
    double worst = 0, rms = 0, off = 0;
    for (int i = 0; i < m; i++) {
        std::vector<const uint8_t *> at;
        for (int k = 0; k < n_window; k++) at.push_back(window.data() + i * a.window_stride + k * row);
        for (int k = 0; k < n[i]; k++) {
            const int c = pages ? sel[i * room + k] : k;
            at.push_back(pages ? rows.data() + slot[i * pages + c / 64] * page_stride + c % 64 * row
                               : rows.data() + ((int64_t)i * n_sel + c) * row);
        }
        std::vector<float> v(at.size() * D);
        for (size_t k = 0; k < at.size(); k++)
            for (int c = 0; c < D; c++) v[k * D + c] = row_value(at[k], c, D, ATTEND_ROPE);
        for (int h = 0; h < H; h++) {
            const float *const qh = q.data() + (i * H + h) * D;
            std::vector<double> z(at.size());
            double top = sink[h], sum = 0;
            for (size_t k = 0; k < at.size(); k++) {
                double d = 0;
                for (int c = 0; c < D; c++) d += (double)qh[c] * v[k * D + c];
                z[k] = d / sqrt((double)D);
                top = std::max(top, z[k]);
            }
            for (auto &y : z) sum += y = exp(y - top);
            sum += exp(sink[h] - top);
            for (int c = 0; c < D; c++) {
                double o = 0;
                for (size_t k = 0; k < at.size(); k++) o += z[k] / sum * v[k * D + c];
                const double d = fabs(o - out[(i * H + h) * D + c]);
                worst = d == d ? std::max(worst, d) : INFINITY;
                rms += o * o;
                off += d * d;
            }
        }
    }
    rms = sqrt(rms / (m * H * D)) + 1e-30, off = sqrt(off / (m * H * D));
    const bool same_again = [&] { /* and once more: nothing is left behind */
                                  a.out = again.data();
                                  return decode_attend(&x, &a, D, 0, &err) == LSA_OK &&
                                         !memcmp(out.data(), again.data(), 4 * out.size());
    }();
    const bool bad = !(worst < 3e-3 && off < 1e-3 * rms) || !same_again;
    printf(
        "m %d, H %d, D %d, window %d, pages %d, selected %d, parts %d: off by %.1e (%.1e at most) of %.2f%s\n",
        m, H, D, n_window, pages, n_sel, splits, off, worst, rms, bad ? " FAILED" : "");
    return bad;
}

static int topk(int m, int64_t n, int k, int levels, bool nan) {
    const int64_t ld = n + 5, segments = (n + TOPK_SEGMENT - 1) / TOPK_SEGMENT;
    std::vector<float> z(m * ld), best(m * segments * k);
    std::vector<int32_t> sel(m * k, -1), n_sel(m, -1), best_at(m * segments * k);
    std::vector<int64_t> len(m);
    for (auto &v : z) v = nan && draw() % 50 == 0 ? NAN : levels ? (float)(draw() % levels) - 1 : real();
    for (int i = 0; i < m; i++) len[i] = i == 0 ? n : i == 1 ? n / 3 : i == 2 ? 0 : draw() % (n + 1);
    lsa_gpu_retriever x = {};
    lsa_err err = {};
    const topk_args a = {z.data(), len.data(), ld,           n,           m,
                         k,        sel.data(), n_sel.data(), best.data(), best_at.data()};
    if (decode_topk(&x, &a, 0, &err) != LSA_OK) return printf("%s\n", err.msg), 1;
    int bad = 0;
    for (int i = 0; i < m; i++) {
        std::vector<int32_t> want(len[i]);
        const float *const row = z.data() + i * ld;
        for (size_t c = 0; c < want.size(); c++) want[c] = (int32_t)c;
        std::stable_sort(want.begin(), want.end(), [&](int32_t p, int32_t q) {
            const bool u = row[p] == row[p], v = row[q] == row[q];
            return u != v ? u : u && row[p] > row[q];
        });
        want.resize(std::min<size_t>(want.size(), k));
        std::sort(want.begin(), want.end());
        bad += n_sel[i] != (int32_t)want.size() || memcmp(want.data(), sel.data() + i * k, 4 * want.size());
    }
    if (bad) printf("top %d of %lld, %d levels: %d requests wrong\n", k, (long long)n, levels, bad);
    return bad != 0;
}

static int swap_pages() {
    enum { LAYERS = 3, PAGES = 9, SLOTS = 5, A = 80, B = 48 };
    std::vector<uint8_t> from(PAGES * LAYERS * A), to(SLOTS * LAYERS * A, 1), keys(PAGES * LAYERS * B),
        key_to(SLOTS * LAYERS * B, 1);
    for (auto &v : from) v = draw();
    for (auto &v : keys) v = draw();
    const int2 move[] = {{7, 0}, {2, 4}, {8, 1}};
    swap_args a = {{{from.data(), to.data(), LAYERS * A, LAYERS * A, LAYERS * A},
                    {keys.data(), key_to.data(), LAYERS * B, LAYERS * B, LAYERS * B}},
                   move,
                   3};
    lsa_err err = {};
    if (decode_swap(&a, 0, &err) != LSA_OK) return 1;
    int bad = 0;
    for (const int2 &v : move) {
        bad += memcmp(&from[v.x * LAYERS * A], &to[v.y * LAYERS * A], LAYERS * A) != 0;
        bad += memcmp(&keys[v.x * LAYERS * B], &key_to[v.y * LAYERS * B], LAYERS * B) != 0;
    }
    for (int i = 0; i < LAYERS * A; i++) bad += to[2 * LAYERS * A + i] != 1;
    if (bad) printf("swapped pages differ\n");
    return bad;
}

int main() {
    int bad = 0;
    bad += attend(2, 16, 128, 128, 4, 200, 1, 0);
    bad += attend(3, 8, 128, 5, 2, 64, 3, 0);     /* heads that do not fill a block, a short window */
    bad += attend(2, 24, 128, 0, 1, 1, 4, 0);     /* more parts than tiles; none of the second request */
    bad += attend(1, 4, 128, 1, 0, 0, 2, 0);      /* a window only */
    bad += attend(2, 32, 128, 128, 0, 500, 7, 0); /* every row, as HCA */
    bad += attend(1, 64, 512, 128, 12, 512, 0, 132);
    bad += attend(2, 64, 512, 128, 9, 512, 3, 0);
    bad += attend(1, 64, 512, 128, 0, 300, 0, 132);
    for (int levels : {0, 1, 3, 1000})
        for (bool nan : {false, true}) {
            bad += topk(4, 100, 512, levels, nan);
            bad += topk(4, 5000, 512, levels, nan);
            bad += topk(3, 22300, 512, levels, nan);
            bad += topk(4, TOPK_ALONE + 1, 512, levels, nan);
            bad += topk(3, 70000, 64, levels, nan);
            bad += topk(2, 40000, 1024, levels, nan);
        }
    bad += swap_pages();
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
